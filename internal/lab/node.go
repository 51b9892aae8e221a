package lab

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/silo"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/sim"
)

// How leases run where silos are elsewhere: long enough for a busy machine, short enough for a test.
const (
	lease      = 3 * time.Second
	leaseGrace = time.Second
)

// Node is a silo on a make-believe host of its own, which the master reaches over HTTP. Its process can be killed and started
// again, its line can be cut, and its clock can be stopped.
type Node struct {
	Name string
	Host *sim.Host

	Link *Link // to a master on another machine; nil: a line of the lab's own, which can be cut

	lab      *Lab
	networks *networks
	exports  *exporter
	line     line

	mu      sync.Mutex
	server  *httptest.Server
	stop    func()
	stopped time.Duration // what the clock shows while it is stopped; 0: it runs
}

func newNode(l *Lab, name string, guest func(vm.Spec) sim.Guest) *Node {
	l.t.Helper()
	n := &Node{Name: name, Host: &sim.Host{Boot: guest}, lab: l, networks: &networks{made: map[string]bool{}}}
	n.exports = &exporter{lab: l, running: map[string]func(){}}
	n.line.up = make(chan struct{})
	close(n.line.up)
	n.Start()
	return n
}

func (n *Node) dir() string { return n.lab.path("at-" + n.Name) }

// Start starts the silo's process.
func (n *Node) Start() {
	n.lab.t.Helper()
	if err := n.open(); err != nil {
		n.lab.t.Fatalf("start silo %s: %v", n.Name, err)
	}
}

func (n *Node) open() error {
	ctx, cancel := context.WithCancel(context.Background())
	st, err := store.Open(ctx, n.lab.driver(), password)
	if err != nil {
		cancel()
		return err
	}
	hv := n.Host.Open()
	var stores silo.Stores = nodeStores{st, &silo.Leased{Driver: n.lab.driverAt}}
	if n.Link != nil {
		stores = n.Link.stores()
	}
	config := silo.Config{Name: n.Name, Stores: stores, Networks: n.networks, Exporter: n.exports, GuestAgent: n.lab.path("muster-guest"),
		Dir: n.dir(), Run: n.lab.path("run-" + n.Name), Clock: n.clock}
	Equip(&config, hv, n.lab.system)
	s, err := silo.Open(ctx, config)
	if err != nil {
		cancel()
		return errors.Join(err, st.Close(ctx))
	}
	server := httptest.NewUnstartedServer(n.line.serve(ctx, api.SiloHandler(s)))
	server.EnableHTTP2 = true
	server.StartTLS()
	served := make(chan struct{})
	go func() {
		defer close(served)
		if n.Link != nil {
			n.Link.Node.Serve(ctx, api.SiloHandler(s))
		}
	}()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.server = server
	n.stop = func() {
		hv.Close() // first: a process that is killed tidies nothing up
		cancel()
		<-served
		server.CloseClientConnections()
		server.Close()
		s.Close()
		st.Close(context.Background())
	}
	return nil
}

// Kill ends the process: its machines run on.
func (n *Node) Kill() {
	n.mu.Lock()
	stop := n.stop
	n.stop = nil
	n.mu.Unlock()
	if stop != nil {
		stop()
	}
}

func (n *Node) remove() {
	n.line.join()
	n.Kill()
	n.exports.stopAll()
	if err := n.Host.Close(); err != nil {
		n.lab.t.Error(err)
	}
}

// Cut cuts the line to the master: nothing arrives any more, on either side, and neither is told.
func (n *Node) Cut() { n.line.cut() }

// Join mends the line.
func (n *Node) Join() { n.line.join() }

// StopClock stops the node's clock, as for a process that is stopped or a host that sleeps: by itself it notices nothing.
func (n *Node) StopClock() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stopped = running()
}

var started = time.Now()

func running() time.Duration { return time.Since(started) + time.Second }

func (n *Node) clock() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.stopped != 0 {
		return n.stopped
	}
	return running()
}

// Left lists what there is on the node; see Lab.Left.
func (n *Node) Left() []string {
	left := leftOn(n.lab.t, n.Host, n.exports, n.networks, n.dir())
	for i := range left {
		left[i] = n.Name + ": " + left[i]
	}
	return left
}

// Has says whether a machine is on this node.
func (n *Node) Has(spec vm.Spec) bool {
	rel, err := filepath.Rel(n.lab.path("run-"+n.Name), spec.Dir)
	return err == nil && filepath.IsLocal(rel)
}

// Deltas lists the files of deltas that the node has.
func (n *Node) Deltas() (files []string) {
	files, _ = filepath.Glob(filepath.Join(n.dir(), "images", "*", "*", "*.qcow2"))
	return files
}

// reached is the silo as the master sees it.
func (n *Node) reached() api.Silo {
	if n.Link != nil {
		return n.Link.silo(n.Name)
	}
	return api.RemoteSilo(&http.Client{Transport: n}, "https://"+n.Name)
}

// RoundTrip carries a request to whatever process the node is now.
func (n *Node) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := n.line.wait(r.Context()); err != nil {
		return nil, err
	}
	n.mu.Lock()
	server, alive := n.server, n.stop != nil
	n.mu.Unlock()
	if !alive {
		return nil, errors.New("connection refused")
	}
	r = r.Clone(r.Context())
	r.URL.Scheme, r.URL.Host = "https", server.Listener.Addr().String()
	resp, err := server.Client().Transport.RoundTrip(r)
	if err == nil {
		resp.Body = held{resp.Body, r.Context(), &n.line}
	}
	return resp, err
}

// line is a connection that can be cut so that neither end notices.
type line struct {
	mu sync.Mutex
	up chan struct{} // closed while it carries
}

func (l *line) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.up:
		l.up = make(chan struct{})
	default:
	}
}

func (l *line) join() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.up:
	default:
		close(l.up)
	}
}

func (l *line) carries() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.up
}

func (l *line) wait(ctx context.Context) error {
	select {
	case <-l.carries():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// serve hands requests on. That the one who asked has gone is learned only over a line that carries.
func (l *line) serve(life context.Context, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
		defer cancel()
		defer context.AfterFunc(life, cancel)()
		defer context.AfterFunc(r.Context(), func() {
			if l.wait(life) == nil {
				cancel()
			}
		})()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// held is an answer of which nothing arrives while the line is cut.
type held struct {
	io.ReadCloser
	ctx  context.Context //nolint:containedctx // of the request that it answers
	line *line
}

func (h held) Read(p []byte) (int, error) {
	n, err := h.ReadCloser.Read(p)
	if werr := h.line.wait(h.ctx); werr != nil {
		return 0, werr
	}
	return n, err
}
