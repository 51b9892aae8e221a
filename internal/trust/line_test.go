package trust

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestTheMasterReachesANodeThatOnlyDialsOut(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	if _, err := m.hub.Client(Appliance, "office"); !errors.Is(err, ErrAway) {
		t.Errorf("before it connected: %v", err)
	}
	stop := serve(t, n, http.HandlerFunc(greet))
	m.waitConnected(office)
	if all := m.hub.Connected(); len(all) != 1 || all[0] != n.Peer() {
		t.Errorf("connected: %v", all)
	}
	if _, err := m.hub.Client(Silo, "office"); !errors.Is(err, ErrAway) {
		t.Errorf("an appliance was taken for a silo: %v", err)
	}
	client, err := m.hub.Client(Appliance, "office")
	if err != nil {
		t.Fatal(err)
	}
	stop()
	until(t, "the node is away", func() bool { _, err := get(client, "https://node/"); return errors.Is(err, ErrAway) })
	serve(t, n, http.HandlerFunc(greet))
	until(t, "the same client works again", func() bool { got, err := get(client, "https://node/"); return err == nil && got == "here" })
}

func TestARevokedNodeIsCutOffAtOnce(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	other := m.node(Peer{Role: Silo, Name: "silo-1"})
	under, end := make(chan struct{}), make(chan struct{})
	defer close(end)
	serve(t, n, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/long" {
			close(under)
			select {
			case <-r.Context().Done():
			case <-end:
			}
		}
	}))
	serve(t, other, http.HandlerFunc(greet))
	m.waitConnected(office)
	m.waitConnected(other.Peer())
	down, err := m.hub.Client(Appliance, "office")
	if err != nil {
		t.Fatal(err)
	}
	cut := make(chan error, 2)
	go func() { _, err := get(down, "https://node/long"); cut <- err }()
	body, feed := io.Pipe()
	defer feed.Close()
	go func() { // an upload that never ends
		response, err := n.Client().Post(baseURL+"/echo", "", body)
		if err == nil {
			_, err = io.Copy(io.Discard, response.Body)
			response.Body.Close()
		}
		cut <- err
	}()
	<-under
	if _, err := feed.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	// As another process does it.
	book, err := OpenRegistry(m.dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := book.Revoke("office"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-cut; err == nil {
			t.Error("a request of a revoked node ended well")
		}
	}
	t.Logf("cut after %s", time.Since(began))
	var no *Refusal
	until(t, "the reason is told", func() bool { // the first may still meet the connection that is being cut
		_, err = get(n.Client(), baseURL+"/who")
		return errors.As(err, &no)
	})
	refused(t, err, "was revoked on")
	if _, err := m.down(office); !errors.Is(err, ErrAway) {
		t.Errorf("the master still reaches it: %v", err)
	}
	if _, err := m.down(other.Peer()); err != nil {
		t.Errorf("another node was cut off too: %v", err)
	}
	if _, err := book.Revoke("nobody"); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %v", err)
	}
	// The node goes on trying, and a join into its folder lets it in.
	if _, err := Join(t.Context(), n.dir, m.token(office)); err != nil {
		t.Fatal(err)
	}
	m.waitConnected(office)
}

func TestANodeThatIsEnrolledAnewShutsItsOldSelfOut(t *testing.T) {
	m := newMaster(t)
	old := m.node(office)
	serve(t, old, http.HandlerFunc(greet))
	m.waitConnected(office)
	m.node(office) // on another machine
	until(t, "the old one is cut", func() bool { return len(m.hub.Connected()) == 0 })
	var no *Refusal
	var err error
	until(t, "the reason is told", func() bool {
		_, err = get(old.Client(), baseURL+"/who")
		return errors.As(err, &no)
	})
	refused(t, err, "enrolled anew")
}

func TestRenewalUnderWayDisturbsNothing(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	n.now = m.clock.now
	serve(t, n, http.HandlerFunc(greet))
	m.waitConnected(office)
	for days := 5; days <= 40; days += 5 {
		before := n.Peer().Serial
		m.clock.set(time.Duration(days) * 24 * time.Hour)
		for renewed := false; !renewed; renewed = n.Peer().Serial != before {
			if _, err := m.down(office); err != nil {
				t.Fatalf("down, on day %d: %v", days, err)
			}
			if _, err := get(n.Client(), baseURL+"/who"); err != nil {
				t.Fatalf("up, on day %d: %v", days, err)
			}
		}
	}
	again, err := OpenNode(n.dir)
	if err != nil || again.Peer() != n.Peer() {
		t.Errorf("on the medium there is %v, %v", again.Peer(), err)
	}
}

// What was granted and never arrived shuts nobody out, however often.
func TestRenewalsWhoseAnswersAreLostShutNobodyOut(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	for range 3 * maxSerials {
		request, err := newRequest(office, newKey(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ask(t.Context(), n.client, pathRenew, renewRequest{request}); err != nil {
			t.Fatal(err)
		}
	}
	n.client.CloseIdleConnections()
	if _, err := get(n.Client(), baseURL+"/who"); err != nil {
		t.Error(err)
	}
	if nodes, err := m.Nodes(); err != nil || len(nodes[0].Serials) != maxSerials {
		t.Errorf("the book keeps %d serials", len(nodes[0].Serials))
	}
}

func TestAMasterThatIsRestartedHasItsNodesBack(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	n.now = m.clock.now
	serve(t, n, http.HandlerFunc(greet))
	for i := range 5 {
		m.waitConnected(office)
		ctx, cancel := context.WithCancel(t.Context())
		var work sync.WaitGroup
		for range 4 { // in the middle of everything
			work.Go(func() {
				for ctx.Err() == nil {
					_, _ = get(n.Client(), baseURL+"/who")
					_, _ = m.hubDown(ctx, office)
				}
			})
		}
		until(t, "work is under way", func() bool { _, err := m.down(office); return err == nil })
		before := n.Peer().Serial
		m.clock.set(time.Duration(i+1) * 5 * 24 * time.Hour) // a certificate is due as well
		m.stop()
		cancel()
		work.Wait()
		m.start()
		until(t, "the certificate is renewed", func() bool { return n.Peer().Serial != before })
	}
	m.waitConnected(office)
	if _, err := get(n.Client(), baseURL+"/who"); err != nil {
		t.Error(err)
	}
}

func (m *testMaster) hubDown(ctx context.Context, p Peer) (string, error) {
	client, err := m.hub.Client(p.Role, p.Name)
	if err != nil {
		return "", err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://node/", nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	return "", response.Body.Close()
}

// serveNode is a node in a process of its own: what this test program does when it is told to.
func serveNode(dir string) {
	n := newNodeWith(dir, hasty)
	if _, err := n.load(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	n.Log = slog.New(slog.DiscardHandler)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends it, or is gone
		cancel()
	}()
	n.Serve(ctx, http.HandlerFunc(greet))
}

// process starts a joined node in a process of its own.
func process(t *testing.T, n *Node) *os.Process { return startProcess(t, n, nil) }

func startProcess(t *testing.T, n *Node, how *syscall.SysProcAttr) *os.Process {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.SysProcAttr = how
	cmd.Env = append(os.Environ(), "TRUST_TEST_NODE="+n.dir)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process
}

func TestANodeThatStandsStillIsNoticedAndComesBack(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	p := process(t, n)
	m.waitConnected(office)
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	until(t, "the master notices", func() bool { return len(m.hub.Connected()) == 0 })
	if took := time.Since(began); took > hasty.idle+hasty.ping+5*time.Second {
		t.Errorf("that took %s", took)
	}
	if err := p.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	m.waitConnected(office)
}

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
	m := newMaster(t)
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

// R11: what is connected to its master and answers it has no socket that anybody could connect to.
func TestAConnectedNodeListensNowhere(t *testing.T) {
	m := newMaster(t)
	p := process(t, m.node(office))
	m.waitConnected(office)
	sockets := map[string]bool{}
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		to, _ := os.Readlink(l)
		if inode, ok := strings.CutPrefix(to, "socket:["); ok {
			sockets[strings.TrimSuffix(inode, "]")] = true
		}
	}
	open := 0
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6"} {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", p.Pid, table))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(raw)) {
			f := strings.Fields(line)
			if len(f) < 10 || !sockets[f[9]] {
				continue
			}
			open++
			if table != "tcp" && table != "tcp6" || f[3] != "01" { // 01: established, 0A: listening
				t.Errorf("%s: %s", table, line)
			}
		}
	}
	if open == 0 {
		t.Fatalf("no connection of process %d was found among %d sockets: nothing is proven", p.Pid, len(sockets))
	}
}

func TestBothDirectionsCarryLargeBodiesAtOnce(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	serve(t, n, http.HandlerFunc(echo))
	m.waitConnected(office)
	down, err := m.hub.Client(Appliance, "office")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	began := time.Now()
	const each, size = 3, 8 << 20
	for i := range each {
		for _, way := range []struct {
			client *http.Client
			url    string
		}{{n.Client(), baseURL + "/echo"}, {down, "https://node/echo"}} {
			work.Go(func() {
				if err := bounce(way.client, way.url, size, uint64(i)); err != nil {
					t.Error(err)
				}
			})
		}
	}
	work.Wait()
	t.Logf("%d MiB there and back in %s", 2*each*size>>20, time.Since(began))
}

// bounce sends random bytes and wants the same back.
func bounce(client *http.Client, url string, size int64, seed uint64) error {
	sent, came := sha256.New(), sha256.New()
	var key [32]byte
	key[0] = byte(seed)
	body := io.TeeReader(io.LimitReader(mathrand.NewChaCha8(key), size), sent)
	response, err := client.Post(url, "application/octet-stream", body)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	n, err := io.Copy(came, response.Body)
	if err != nil {
		return err
	}
	if n != size || !bytes.Equal(sent.Sum(nil), came.Sum(nil)) {
		return fmt.Errorf("%s: %d bytes came back of %d, or others", url, n, size)
	}
	return nil
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
	m := newMaster(t)
	m.hub.timing.stranger = time.Second
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
