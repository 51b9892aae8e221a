package trust

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
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
	m := &testMaster{t: t, dir: newAuthority(t), address: ours + ":0"}
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
