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
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
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

// What takes long tells how far it is, and ends when nobody wants it any more, in both directions.
func TestProgressAndCancellingTravel(t *testing.T) {
	m := newMaster(t)
	n := m.node(office)
	ended := make(chan struct{}, 2)
	long := func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "1 of 2\n")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		ended <- struct{}{}
	}
	m.long.Store(&long)
	serve(t, n, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/long" {
			long(w, r)
		}
	}))
	m.waitConnected(office)
	down, err := m.hub.Client(Appliance, "office")
	if err != nil {
		t.Fatal(err)
	}
	for url, client := range map[string]*http.Client{"https://node/long": down, baseURL + "/long": n.Client()} {
		ctx, cancel := context.WithCancel(t.Context())
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		told := make([]byte, 7)
		if _, err := io.ReadFull(response.Body, told); err != nil || string(told) != "1 of 2\n" {
			t.Errorf("%s: got %q, %v", url, told, err)
		}
		cancel()
		<-ended
		response.Body.Close()
	}
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
	n := newNodeWith(dir, touchy)
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
	m := newMasterWith(t, touchy)
	n := m.node(office)
	p := process(t, n)
	m.waitConnected(office)
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	until(t, "the master notices", func() bool { return len(m.hub.Connected()) == 0 })
	if took := time.Since(began); took > touchy.idle+touchy.ping+5*time.Second {
		t.Errorf("that took %s", took)
	}
	if err := p.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	m.waitConnected(office)
}

func TestADeadPeerIsNoticedWithinHalfAMinute(t *testing.T) {
	if h := patient.http2(); h.SendPingTimeout+h.PingTimeout > 30*time.Second || h.SendPingTimeout <= 0 {
		t.Errorf("asked after %s, waited for %s", h.SendPingTimeout, h.PingTimeout)
	}
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

// BenchmarkLine sends 64 MiB to the master, and from the master to a node.
func BenchmarkLine(b *testing.B) {
	m := newMaster(b)
	n := m.node(office)
	serve(b, n, http.HandlerFunc(swallow))
	m.waitConnected(office)
	down, err := m.hub.Client(Appliance, "office")
	if err != nil {
		b.Fatal(err)
	}
	body := make([]byte, 64<<20)
	for name, way := range map[string]struct {
		client *http.Client
		url    string
	}{"up": {n.Client(), baseURL + "/swallow"}, "down": {down, "https://node/swallow"}} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(body)))
			for b.Loop() {
				response, err := way.client.Post(way.url, "", bytes.NewReader(body))
				if err != nil {
					b.Fatal(err)
				}
				response.Body.Close()
			}
		})
	}
}

func swallow(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }
