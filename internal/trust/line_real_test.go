package trust

import (
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
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

// The node is alone in a network namespace, behind a cable of its own: whatever listens in there would be its.
func TestANodeAloneInItsNetworkListensNowhereAndOutlivesAPulledCable(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root, ip and nsenter: set MUSTER_REAL=1")
	}
	const near, far, ours, theirs = "mtrust0", "mtrust1", "10.213.77.1", "10.213.77.2"
	run(t, "ip", "link", "add", near, "type", "veth", "peer", "name", far)
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", near).Run() })
	run(t, "ip", "addr", "add", ours+"/30", "dev", near)
	run(t, "ip", "link", "set", near, "up")
	m := &testMaster{t: t, dir: newAuthority(t), address: ours + ":0", timing: touchy}
	m.start()
	t.Cleanup(func() { m.stop() })
	p := startProcess(t, m.node(office), &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET})
	pid := fmt.Sprint(p.Pid)
	run(t, "ip", "link", "set", far, "netns", pid)
	inside := func(args ...string) { run(t, "nsenter", append([]string{"-t", pid, "-n", "ip"}, args...)...) }
	inside("addr", "add", theirs+"/30", "dev", far)
	inside("link", "set", far, "up")
	m.waitConnected(office)

	established := 0
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6", "packet"} {
		raw, err := os.ReadFile(filepath.Join("/proc", pid, "net", table))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(strings.TrimSpace(string(raw)), "\n") {
			f := strings.Fields(line)
			switch {
			case i == 0: // the header
			case strings.HasPrefix(table, "tcp") && len(f) > 3 && f[3] == "01":
				established++
			case strings.HasPrefix(table, "tcp") && len(f) > 3 && f[3] != "0A": // on its way up or down
			default:
				t.Errorf("%s: %s", table, line)
			}
		}
	}
	if established == 0 {
		t.Fatal("no connection of the node was found in its namespace: nothing is proven")
	}

	run(t, "ip", "link", "set", near, "down")
	until(t, "the master notices", func() bool { return len(m.hub.Connected()) == 0 })
	run(t, "ip", "link", "set", near, "up")
	m.waitConnected(office)
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// serveMaster is a master in a process of its own: what this test program does when it is told to, until it is killed.
func serveMaster(dir, address string) {
	a, err := Open(dir, nil)
	var listener net.Listener
	if err == nil {
		listener, err = net.Listen("tcp", address)
	}
	if err == nil {
		h := NewHub(a, quiet)
		h.timing = hasty
		err = h.Serve(context.Background(), listener, map[string]http.Handler{"/who": http.HandlerFunc(who)})
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// Whoever has a certificate is in the book, and whoever has none can still use the token, whenever the master was killed.
func TestJoinsOutliveAMasterThatIsKilledAgainAndAgain(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to kill some dozen processes")
	}
	dir := newAuthority(t)
	book, err := OpenRegistry(dir)
	if err != nil {
		t.Fatal(err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	kills := 0
	work.Go(func() { // a master that is killed again and again, soon after it answers
		random := mathrand.New(mathrand.NewPCG(3, 4))
		for ; ctx.Err() == nil; kills++ {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "TRUST_TEST_MASTER="+dir, "TRUST_TEST_LISTEN="+address)
			if err := cmd.Start(); err != nil {
				t.Error(err)
				return
			}
			for ctx.Err() == nil {
				if c, err := net.Dial("tcp", address); err == nil {
					c.Close()
					break
				}
			}
			timer := time.NewTimer(time.Duration(20+random.IntN(80)) * time.Millisecond)
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
			_ = cmd.Process.Kill() // SIGKILL
			_ = cmd.Wait()
		}
	})
	const count = 12
	var joins sync.WaitGroup
	folders := make([]string, count)
	for i := range count {
		folders[i] = filepath.Join(t.TempDir(), "node")
		token, err := book.Enrol(Peer{Role: Appliance, Customer: "acme", Name: fmt.Sprintf("box-%d", i)}, time.Hour, []string{address})
		if err != nil {
			t.Fatal(err)
		}
		joins.Go(func() {
			for end := time.Now().Add(time.Minute); ; {
				_, err := Join(ctx, folders[i], token)
				var no *Refusal
				switch {
				case err == nil:
					return
				case errors.As(err, &no), time.Now().After(end):
					t.Errorf("%s did not join: %v", token.Peer, err)
					return
				}
			}
		})
	}
	joins.Wait()
	cancel()
	work.Wait()
	t.Logf("the master was killed %d times", kills)
	m := &testMaster{t: t, dir: dir, address: address, timing: hasty}
	m.start()
	defer func() { m.stop() }()
	keys := map[string]bool{}
	for _, folder := range folders {
		n, err := OpenNode(folder)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := get(hurried(t, n).Client(), baseURL+"/who"); err != nil {
			t.Errorf("%s: %v", n.Peer(), err)
		}
		keys[n.CustomerKey()] = true
	}
	if len(keys) != 1 {
		t.Errorf("one customer has %d keys", len(keys))
	}
}
