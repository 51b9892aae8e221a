package trust

import (
	"context"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// stalling is a listener whose connections can be made to stand still, as when a cable is pulled: nothing arrives, and
// nobody says that it does not.
type stalling struct {
	net.Listener
	mu    sync.Mutex
	conns []*stallConn
}

type stallConn struct {
	net.Conn
	still  atomic.Bool
	closed chan struct{}
	once   sync.Once
}

func (s *stalling) Accept() (net.Conn, error) {
	c, err := s.Listener.Accept()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = append(s.conns, &stallConn{Conn: c, closed: make(chan struct{})})
	return s.conns[len(s.conns)-1], nil
}

func (s *stallConn) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if s.still.Load() {
		<-s.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (s *stallConn) Write(p []byte) (int, error) {
	if s.still.Load() {
		return len(p), nil // into the void
	}
	return s.Conn.Write(p)
}

func (s *stallConn) Close() error {
	s.once.Do(func() { close(s.closed) })
	if s.still.Load() {
		return nil // the other end never hears of it
	}
	return s.Conn.Close()
}

func TestACableThatIsPulledIsNoticedAtBothEnds(t *testing.T) {
	m := newMasterWith(t, touchy)
	n := m.node(office)
	m.stop()
	var cable *stalling
	m.wire = func(l net.Listener) net.Listener {
		cable = &stalling{Listener: l}
		return cable
	}
	m.start()
	serve(t, n, http.HandlerFunc(greet))
	m.waitConnected(office)
	client, err := m.hub.Client(Appliance, "office")
	if err != nil {
		t.Fatal(err)
	}
	cable.mu.Lock()
	pulled := cable.conns
	for _, c := range pulled {
		c.still.Store(true)
	}
	cable.mu.Unlock()
	t.Cleanup(func() {
		for _, c := range pulled {
			c.Conn.Close()
		}
	})
	// The node makes a new connection, because it has heard nothing on the old one, and both directions go on over new ones.
	until(t, "the node comes back", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://node/", nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(request)
		if err != nil {
			return false
		}
		return response.Body.Close() == nil
	})
	until(t, "the node's requests go through", func() bool { _, err := get(n.Client(), baseURL+"/who"); return err == nil })
	until(t, "the master has let the old ones go", func() bool {
		m.hub.mu.Lock()
		defer m.hub.mu.Unlock()
		for c := range m.hub.conns {
			if raw, ok := c.tls.NetConn().(*stallConn); ok && raw.still.Load() {
				return false
			}
		}
		return true
	})
}

// brittle is a listener whose connections break after so many bytes.
type brittle struct {
	net.Listener
	left func() int64
}

func (b brittle) Accept() (net.Conn, error) {
	c, err := b.Listener.Accept()
	if err != nil {
		return nil, err
	}
	short := &brittleConn{Conn: c}
	short.left.Store(b.left())
	return short, nil
}

type brittleConn struct {
	net.Conn
	left atomic.Int64
}

func (b *brittleConn) spend(n int, err error) (int, error) {
	if b.left.Add(-int64(n)) < 0 {
		b.Conn.Close()
		return 0, errors.New("the line broke")
	}
	return n, err
}

func (b *brittleConn) Read(p []byte) (int, error)  { n, err := b.Conn.Read(p); return b.spend(n, err) }
func (b *brittleConn) Write(p []byte) (int, error) { n, err := b.Conn.Write(p); return b.spend(n, err) }

func TestALineThatIsCutAtAnyByteIsMadeAgain(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	m.stop()
	random := mathrand.New(mathrand.NewPCG(1, 2))
	var mu sync.Mutex
	var cuts atomic.Int64
	const calm = 60 // then the line is good again
	m.wire = func(l net.Listener) net.Listener {
		return brittle{l, func() int64 {
			mu.Lock()
			defer mu.Unlock()
			if cuts.Add(1) > calm {
				return 1 << 40
			}
			if random.IntN(2) == 0 {
				return random.Int64N(6000) // in the handshake and the first requests
			}
			return random.Int64N(400000)
		}}
	}
	m.start()
	serve(t, n, http.HandlerFunc(echo))
	whole := 0
	until(t, "the line is good again", func() bool {
		if bounce(n.Client(), baseURL+"/echo", 100000, 1) == nil {
			whole++
		}
		if down, err := m.hub.Client(Appliance, "office"); err == nil && bounce(down, "https://node/", 100000, 2) == nil {
			whole++
		}
		return cuts.Load() > calm
	})
	m.waitConnected(office)
	until(t, "both directions work", func() bool {
		down, err := m.hub.Client(Appliance, "office")
		return err == nil && bounce(down, "https://node/", 1<<20, 3) == nil && bounce(n.Client(), baseURL+"/echo", 1<<20, 4) == nil
	})
	t.Logf("%d connections, %d bodies arrived in between", cuts.Load(), whole)
}

func TestStrangersCannotShutNodesOut(t *testing.T) {
	pace := hasty
	pace.stranger = time.Second
	m := newMasterWith(t, pace)
	n := m.node(office)
	n.client.CloseIdleConnections()
	var held []net.Conn
	defer func() {
		for _, c := range held {
			c.Close()
		}
	}()
	for range maxStrangersAddress * 2 { // they connect and say nothing
		c, err := net.Dial("tcp", m.address)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	turnedAway := 0
	for _, c := range held[maxStrangersAddress:] {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			turnedAway++
		}
	}
	if turnedAway < maxStrangersAddress {
		t.Errorf("%d of %d were turned away", turnedAway, maxStrangersAddress)
	}
	until(t, "those who say nothing are sent away, and the node comes in", func() bool { // after timing.stranger
		_, err := get(n.Client(), baseURL+"/who")
		return err == nil
	})
}

func TestANodeHasSoManyConnectionsAndNoMore(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for range maxConnsNode {
		c, err := n.dial(t.Context(), alpnRequests)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	until(t, "all are counted", func() bool {
		m.hub.mu.Lock()
		defer m.hub.mu.Unlock()
		return m.hub.perNode["office"] == maxConnsNode
	})
	_, err := get(n.Client(), baseURL+"/who")
	refused(t, err, "connections open already")
}

func TestAHeaderWithoutEndIsRefused(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	request, err := http.NewRequest(http.MethodGet, baseURL+"/who", nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		request.Header.Set(fmt.Sprintf("X-%d", i), strings.Repeat("x", maxHeader/10))
	}
	response, err := n.Client().Do(request)
	if err == nil {
		response.Body.Close()
		if response.StatusCode == http.StatusOK {
			t.Error("it was taken")
		}
	}
	if _, err := get(n.Client(), baseURL+"/who"); err != nil {
		t.Errorf("the next request: %v", err)
	}
}
