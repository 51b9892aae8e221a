package lab

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/trust"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/sim"
)

// The environment of a silo that is a process of its own: the lab's folder and its name.
const (
	envLab  = "MUSTER_LAB_DIR"
	envSilo = "MUSTER_LAB_SILO"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(envLab); dir != "" {
		if err := beSilo(dir, os.Getenv(envSilo)); err != nil {
			panic(err)
		}
		return
	}
	os.Exit(m.Run())
}

// beSilo is a silo until standard input ends. Each of its machines leaves a file when it is started, and boots when
// there is another.
func beSilo(dir, name string) error {
	l := &Lab{Dir: dir, system: Debian(), Nodes: map[string]*Node{}}
	node, err := trust.OpenNode(filepath.Join(dir, "at-"+name, "node"))
	if err != nil {
		return err
	}
	node.Log = quiet
	n := &Node{Name: name, lab: l, networks: &networks{made: map[string]bool{}}, exports: &exporter{lab: l, running: map[string]func(){}},
		Link: &Link{Node: node}}
	n.line.up = make(chan struct{})
	close(n.line.up)
	n.Host = &sim.Host{Boot: func(spec vm.Spec) sim.Guest {
		return sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
			if os.WriteFile(l.path("went-"+name), nil, 0o600) != nil || !awaitFile(ctx, l.path("free-"+name)) {
				return sim.PowerOff
			}
			return Healthy(spec).Run(ctx, c)
		})
	}}
	if err := n.open(); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin) // ends with whoever started us
	n.Kill()
	return err
}

func awaitFile(ctx context.Context, path string) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(path); err == nil {
			return true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}

// process starts a silo's process.
func (l *Lab) process(t *testing.T, name string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envLab+"="+l.Dir, envSilo+"="+name)
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

// apart is a lab whose silo a is a process of its own over a real line, and first to be given work.
func apart(t *testing.T) (*Lab, *patient, *exec.Cmd) {
	t.Helper()
	l, p := farm(t, "a", "b")
	l.Crash()
	l.Nodes["a"].Kill()
	l.Nodes["a"].Link = l.Connect(t, "a")
	child := l.process(t, "a")
	l.Open()
	until(t, "the process is heard of", func() bool {
		s, err := l.ShowSilo(ctx, "a")
		return err == nil && s.Silo.State == dr.SiloActive && s.Connected && s.Silo.Beats > 3
	})
	if _, err := l.DrainSilo(ctx, "b", api.DrainRequest{Drain: true}); err != nil {
		t.Fatal(err)
	}
	return l, p, child
}

// tests has silo a begin a test, and b ready to take over.
func (l *Lab) tests(t *testing.T) api.Operation {
	t.Helper()
	op, err := l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	limit, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if !awaitFile(limit, l.path("went-a")) {
		t.Fatal("no machine was started")
	}
	if _, err := l.DrainSilo(ctx, "b", api.DrainRequest{}); err != nil {
		t.Fatal(err)
	}
	return op
}

func (l *Lab) signal(t *testing.T, cmd *exec.Cmd, s syscall.Signal) {
	t.Helper()
	if err := cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func TestAProcessThatIsStoppedWakesAsAZombieAndChangesNothing(t *testing.T) {
	t.Parallel()
	l, p, child := apart(t)
	op := l.tests(t)
	l.signal(t, child, syscall.SIGSTOP)
	p.let("b")
	l.passedOn(t, op, "b")
	if err := os.WriteFile(l.path("free-a"), nil, 0o600); err != nil { // its machine could pass the moment it wakes
		t.Fatal(err)
	}
	l.signal(t, child, syscall.SIGCONT)
	until(t, "the silo is back", func() bool { return l.state(t, "a") == dr.SiloActive })
	l.told(t, "silo.lost", "lease.taken", "silo.back")
	l.clean(t)
	l.passedOn(t, op, "b")
}

func TestAProcessThatIsKilledLosesOnlyTime(t *testing.T) {
	t.Parallel()
	l, p, child := apart(t)
	op := l.tests(t)
	l.signal(t, child, syscall.SIGKILL)
	p.let("b")
	l.passedOn(t, op, "b")
	l.process(t, "a")
	until(t, "the silo is back", func() bool { return l.state(t, "a") == dr.SiloActive })
	l.told(t, "silo.lost", "lease.taken", "silo.back")
	l.clean(t)
}
