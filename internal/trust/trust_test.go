package trust

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("TRUST_TEST_NODE"); dir != "" {
		serveNode(dir)
		return
	}
	if dir := os.Getenv("TRUST_TEST_MASTER"); dir != "" {
		serveMaster(dir, os.Getenv("TRUST_TEST_LISTEN"))
		return
	}
	goleak.VerifyTestMain(m)
}

// hasty is timing for tests: what takes minutes takes seconds.
var hasty = timing{dial: 10 * time.Second, idle: 10 * time.Second, ping: 10 * time.Second, stranger: 5 * time.Second, look: 5 * time.Millisecond,
	backoff: 5 * time.Millisecond, backoffTo: 50 * time.Millisecond, settled: time.Minute, shutdown: 20 * time.Millisecond}

// touchy is hasty timing that takes a second of silence for death, which on a busy machine it need not be.
var touchy = func(t timing) timing {
	t.idle, t.ping = 300*time.Millisecond, 700*time.Millisecond
	return t
}(hasty)

// clock is a clock that a test sets.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) set(ahead time.Duration) { c.ahead.Store(int64(ahead)) }

// testMaster is a master that can be stopped and started again.
type testMaster struct {
	*Authority
	t       testing.TB
	dir     string
	address string
	clock   clock
	timing  timing
	hub     *Hub
	wire    func(net.Listener) net.Listener // what is between the port and the hub, nil for nothing
	tell    func(Happening)
	long    atomic.Pointer[func(http.ResponseWriter, *http.Request)]
	stop    func()
}

var quiet = slog.New(slog.DiscardHandler)

func newAuthority(t testing.TB) (dir string) {
	t.Helper()
	base := t.TempDir()
	dir = filepath.Join(base, "trust")
	if err := Create(dir, Plan{Name: "hq", Listen: "127.0.0.1:0", Addresses: []string{"127.0.0.1:1"}, KeyFile: filepath.Join(base, "master.key")}); err != nil {
		t.Fatal(err)
	}
	a, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, customer := range []string{"acme", "globex"} {
		if _, err := a.MakeCustomerKey(customer); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func newMaster(t testing.TB) *testMaster { return newMasterWith(t, hasty) }

func newMasterWith(t testing.TB, pace timing) *testMaster {
	t.Helper()
	m := &testMaster{t: t, dir: newAuthority(t), timing: pace}
	m.start()
	t.Cleanup(func() { m.stop() })
	return m
}

// start opens the folder anew, as a new process would, on the port that it had.
func (m *testMaster) start() {
	m.t.Helper()
	a, err := Open(m.dir, nil)
	if err != nil {
		m.t.Fatal(err)
	}
	a.now = m.clock.now
	m.Authority = a
	address := m.address
	if address == "" {
		address = "127.0.0.1:0"
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		m.t.Fatal(err)
	}
	m.address = listener.Addr().String()
	if m.wire != nil {
		listener = m.wire(listener)
	}
	m.hub = NewHub(a, quiet)
	m.hub.timing, m.hub.Tell = m.timing, m.tell
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() {
		if err := m.hub.Serve(ctx, listener, map[string]http.Handler{"/echo": http.HandlerFunc(echo), "/who": http.HandlerFunc(who), "/swallow": http.HandlerFunc(swallow), "/long": http.HandlerFunc(m.answerLong)}); err != nil {
			m.t.Error(err)
		}
	})
	m.stop = func() { cancel(); work.Wait() }
}

func (m *testMaster) answerLong(w http.ResponseWriter, r *http.Request) {
	if long := m.long.Load(); long != nil {
		(*long)(w, r)
	}
}

func echo(w http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(w).EnableFullDuplex()
	_, _ = io.Copy(w, r.Body)
}

func who(w http.ResponseWriter, r *http.Request) {
	p, ok := PeerOf(r.Context())
	if !ok {
		http.Error(w, "nobody", http.StatusTeapot)
		return
	}
	_, _ = io.WriteString(w, p.String())
}

var office = Peer{Role: Appliance, Customer: "acme", Name: "office"}

// token enrols a node.
func (m *testMaster) token(who Peer) Token {
	m.t.Helper()
	token, err := m.Enrol(who, time.Hour, []string{m.address})
	if err != nil {
		m.t.Fatal(err)
	}
	return token
}

// node enrols and joins one.
func (m *testMaster) node(who Peer) *Node {
	m.t.Helper()
	n, err := Join(m.t.Context(), filepath.Join(m.t.TempDir(), "node"), m.token(who))
	if err != nil {
		m.t.Fatal(err)
	}
	return paced(m.t, n, m.timing)
}

func hurried(t testing.TB, n *Node) *Node { return paced(t, n, hasty) }

func paced(t testing.TB, n *Node, pace timing) *Node {
	fast := newNodeWith(n.dir, pace)
	if _, err := fast.load(); err != nil {
		t.Fatal(err)
	}
	fast.Log = quiet
	t.Cleanup(fast.client.CloseIdleConnections)
	return fast
}

// serve keeps a node's reverse connection up until the test, or the caller, ends it.
func serve(t testing.TB, n *Node, handler http.Handler) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() { n.Serve(ctx, handler) })
	stop = func() { cancel(); work.Wait() }
	t.Cleanup(stop)
	return stop
}

// until waits for what will be.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(20 * time.Second); !is(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// get asks, and gives the answer's body.
func get(client *http.Client, url string) (string, error) {
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	return string(body), err
}

// down asks a node from the master.
func (m *testMaster) down(p Peer) (string, error) {
	client, err := m.hub.Client(p.Role, p.Name)
	if err != nil {
		return "", err
	}
	return get(client, "https://node/")
}

func (m *testMaster) waitConnected(p Peer) {
	m.t.Helper()
	until(m.t, p.String()+" is connected", func() bool {
		_, err := m.down(p)
		return err == nil
	})
}

func greet(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") }

// refused insists on a refusal that says something.
func refused(t *testing.T, err error, says string) {
	t.Helper()
	var no *Refusal
	if !errors.As(err, &no) || !strings.Contains(no.Reason, says) {
		t.Fatalf("got %v, want a refusal with %q", err, says)
	}
}

func newKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
