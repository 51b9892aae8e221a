package vmtest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

func foundAndListed(t *testing.T, s *stage) {
	spec := s.Spec(t)
	if _, err := s.v.Find(s.ctx, spec.Name); !errors.Is(err, vm.ErrGone) {
		t.Fatalf("find before start: %v, want ErrGone", err)
	}
	m := s.start(t, spec)
	if m.Name() != spec.Name || m.Owner() != spec.Owner {
		t.Fatalf("started %s of %v", m.Name(), m.Owner())
	}
	if state := s.state(t, m); state != vm.Running {
		t.Fatalf("state %s, want running", state)
	}
	found, err := s.v.Find(s.ctx, spec.Name)
	if err != nil || found.Owner() != spec.Owner || found.Name() != spec.Name || found.SerialLog() != m.SerialLog() {
		t.Fatalf("found %v, %v", found, err)
	}
	if owner, ok := s.listed(t, spec.Name); !ok || owner != spec.Owner {
		t.Fatalf("listed %v %v", owner, ok)
	}
	if err := found.Destroy(s.ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := s.v.Find(s.ctx, spec.Name); !errors.Is(err, vm.ErrGone) {
		t.Fatalf("find after destroy: %v, want ErrGone", err)
	}
	if _, ok := s.listed(t, spec.Name); ok {
		t.Fatal("still listed after destroy")
	}
	if state := s.state(t, m); state != vm.Off {
		t.Fatalf("state %s, want off", state)
	}
}

func nameOnce(t *testing.T, s *stage) {
	spec := s.Spec(t)
	m := s.start(t, spec)
	other := s.Spec(t)
	other.Name = spec.Name
	if _, err := s.v.Start(s.ctx, other); !errors.Is(err, vm.ErrExists) {
		t.Fatalf("second start: %v, want ErrExists", err)
	}
	if state := s.state(t, m); state != vm.Running {
		t.Fatalf("the first is %s, want running", state)
	}
	if err := m.Destroy(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.start(t, other)
}

func destroyTwice(t *testing.T, s *stage) {
	m := s.start(t, s.Spec(t))
	for range 2 {
		if err := m.Destroy(s.ctx); err != nil {
			t.Fatal(err)
		}
	}
}

func serialLog(t *testing.T, s *stage) {
	spec := s.Spec(t)
	m := s.start(t, spec)
	if filepath.Dir(m.SerialLog()) != spec.Dir {
		t.Fatalf("serial log is %s, outside of the machine's folder", m.SerialLog())
	}
	s.says(t, m, "tiny: up", 1)
}

func echo(t *testing.T, s *stage) {
	m := s.start(t, s.Spec(t))
	s.says(t, m, "tiny: wrote", 1)
	for _, port := range []dr.GuestPort{dr.PortISA, dr.PortVirtio} {
		for range 2 {
			c := s.connect(t, m, port)
			if _, err := m.Channel(s.ctx, port); err == nil {
				t.Fatalf("%s: a second connection was let in", port)
			}
			if slices.Contains(s.Echo, port) {
				exchange(t, c, "hello from outside", s.Patience)
			}
			if err := c.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("read after the deadline: %v", err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := m.Channel(s.ctx, "smoke-signals"); err == nil {
		t.Fatal("connected to a port that no machine has")
	}
}

func screenshot(t *testing.T, s *stage) {
	m := s.start(t, s.Spec(t))
	s.says(t, m, "tiny: up", 1)
	shot, err := m.Screenshot(s.ctx)
	plausiblePicture(t, shot, err)
}

func shutdown(t *testing.T, s *stage) {
	m := s.start(t, s.Spec(t))
	s.says(t, m, "tiny: wrote", 1)
	clean, err := m.Shutdown(s.ctx, s.Patience)
	if err != nil || !clean {
		t.Fatalf("clean %v, %v", clean, err)
	}
	if state := s.state(t, m); state != vm.Off {
		t.Fatalf("state %s, want off", state)
	}
	if clean, err := m.Shutdown(s.ctx, s.Patience); err != nil || !clean {
		t.Fatalf("again: clean %v, %v", clean, err)
	}
}

func shutdownDeaf(t *testing.T, s *stage) {
	m := s.start(t, s.Spec(t))
	s.tell(t, m, "I")
	clean, err := m.Shutdown(s.ctx, 500*time.Millisecond)
	if err != nil || clean {
		t.Fatalf("clean %v, %v", clean, err)
	}
	if state := s.state(t, m); state != vm.Off {
		t.Fatalf("state %s, want off", state)
	}
}

func outlives(t *testing.T, s *stage) {
	first := s.Open(t)
	spec := s.Spec(t)
	if _, err := first.Start(s.ctx, spec); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Find(s.ctx, spec.Name); err == nil {
		t.Fatal("a closed hypervisor still answers")
	}
	m, err := s.v.Find(s.ctx, spec.Name)
	if err != nil {
		t.Fatal(err)
	}
	if m.Owner() != spec.Owner {
		t.Fatalf("owner %v", m.Owner())
	}
	s.tell(t, m, "still there?")
	if err := m.Destroy(s.ctx); err != nil {
		t.Fatal(err)
	}
}

func badSpecs(t *testing.T, s *stage) {
	for name, spoil := range map[string]func(*vm.Spec){
		"name":             func(spec *vm.Spec) { spec.Name = "../../etc" },
		"no folder":        func(spec *vm.Spec) { spec.Dir += "/none" },
		"long folder":      func(spec *vm.Spec) { spec.Dir = "/" + strings.Repeat("a", 100) },
		"no processor":     func(spec *vm.Spec) { spec.Hardware.CPUs = 0 },
		"no memory":        func(spec *vm.Spec) { spec.Hardware.Memory = 0 },
		"disk missing":     func(spec *vm.Spec) { spec.Disks = nil },
		"layer missing":    func(spec *vm.Spec) { spec.Disks = []vm.Disk{{}} },
		"layer not there":  func(spec *vm.Spec) { spec.Disks[0].Layers[0].Path += "x" },
		"network missing":  func(spec *vm.Spec) { spec.Networks = nil },
		"export on top":    func(spec *vm.Spec) { spec.Disks[0].Layers[0] = vm.Layer{Socket: "/none", Export: "x"} },
		"export not there": func(spec *vm.Spec) { spec.Disks[0].Layers[1] = vm.Layer{Socket: "/none", Export: "x"} },
	} {
		spec := s.Spec(t)
		spec.Disks[0].Layers = append(slices.Clone(spec.Disks[0].Layers), spec.Disks[0].Layers[0])[:2]
		dir, before := spec.Dir, files(t, spec.Dir)
		spoil(&spec)
		m, err := s.v.Start(s.ctx, spec)
		if err == nil {
			_ = m.Destroy(s.ctx)
			t.Errorf("%s: started", name)
			continue
		}
		t.Logf("%s: %v", name, err)
		if _, ok := s.listed(t, spec.Name); ok {
			t.Errorf("%s: a machine is left", name)
		}
		if after := files(t, dir); !slices.Equal(before, after) {
			t.Errorf("%s: files are left: %v", name, after)
		}
	}
}

func cancelled(t *testing.T, s *stage) {
	spec := s.Spec(t)
	before := files(t, spec.Dir)
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	if _, err := s.v.Start(ctx, spec); !errors.Is(err, context.Canceled) {
		t.Fatalf("start: %v", err)
	}
	if _, ok := s.listed(t, spec.Name); ok {
		t.Fatal("a machine is left")
	}
	if after := files(t, spec.Dir); !slices.Equal(before, after) {
		t.Fatalf("files are left: %v", after)
	}
}

func topOnly(t *testing.T, s *stage) {
	spec := s.Spec(t)
	layers := spec.Disks[0].Layers
	below := filepath.Join(filepath.Dir(spec.Dir), "base.raw")
	before := digest(t, below)
	m := s.start(t, spec)
	s.says(t, m, "tiny: wrote", 1)
	if err := m.Destroy(s.ctx); err != nil {
		t.Fatal(err)
	}
	if digest(t, below) != before {
		t.Fatal("the layer below was written to")
	}
	if got := s.Sector(t, layers[0], 1); !bytes.Equal(got, bytes.Repeat([]byte(Mark), 512/len(Mark))) {
		t.Fatalf("sector 1 through the top layer: %q…", got[:16])
	}
}

func panics(t *testing.T, s *stage) {
	m := s.start(t, s.Spec(t))
	s.tell(t, m, "P")
	s.soon(t, "the machine is crashed", func() bool { return s.state(t, m) == vm.Crashed })
	if _, reason, _ := m.State(s.ctx); reason == "" {
		t.Fatal("no reason is given")
	}
	shot, err := m.Screenshot(s.ctx)
	plausiblePicture(t, shot, err)
	if clean, err := m.Shutdown(s.ctx, 200*time.Millisecond); err != nil || clean {
		t.Fatalf("shutdown of a crashed machine: clean %v, %v", clean, err)
	}
	if state := s.state(t, m); state != vm.Off {
		t.Fatalf("state %s, want off", state)
	}
}

func reboots(t *testing.T, s *stage) {
	m := s.start(t, s.Spec(t))
	s.tell(t, m, "R")
	s.says(t, m, "tiny: up", 2)
	if state := s.state(t, m); state != vm.Running {
		t.Fatalf("state %s, want running", state)
	}
}

func mustNotReboot(t *testing.T, s *stage) {
	spec := s.Spec(t)
	spec.NoReboot = true
	m := s.start(t, spec)
	s.tell(t, m, "R")
	s.soon(t, "the machine is off", func() bool { return s.state(t, m) == vm.Off })
	if _, ok := s.listed(t, spec.Name); ok {
		t.Fatal("still listed")
	}
}

func resumes(t *testing.T, s *stage) {
	spec := s.Spec(t)
	spec.Paused = true
	m := s.start(t, spec)
	if state, reason, err := m.State(s.ctx); err != nil || state != vm.Paused || reason == "" {
		t.Fatalf("state %s (%s), %v; want paused with a reason", state, reason, err)
	}
	if log, _ := os.ReadFile(m.SerialLog()); bytes.Contains(log, []byte("tiny")) {
		t.Fatalf("its processors ran: %s", log)
	}
	for range 2 { // one that runs is no error
		if err := m.Resume(s.ctx); err != nil {
			t.Fatal(err)
		}
	}
	s.says(t, m, "tiny: wrote", 1)
	if state := s.state(t, m); state != vm.Running {
		t.Fatalf("state %s, want running", state)
	}
	if err := m.Destroy(s.ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(s.ctx); !errors.Is(err, vm.ErrGone) {
		t.Fatalf("resume of a machine that is gone: %v, want ErrGone", err)
	}
}

func tooLarge(t *testing.T, s *stage) {
	host, err := s.v.Host(s.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if host.Free <= 0 || host.Free > host.Memory || host.CPUs < 1 || host.Version == "" || host.Emulator == "" ||
		(host.Accelerator == "kvm") != (host.KVMReason == "") {
		t.Fatalf("host %+v", host)
	}
	t.Logf("host %+v", host)
	spec := s.Spec(t)
	spec.Hardware.Memory = int(host.Free>>20) + 1
	if _, err := s.v.Start(s.ctx, spec); !errors.Is(err, vm.ErrCapacity) {
		t.Fatalf("start: %v, want ErrCapacity", err)
	}
	if _, ok := s.listed(t, spec.Name); ok {
		t.Fatal("a machine is left")
	}
}

func usage(t *testing.T, s *stage) {
	m := s.start(t, s.Spec(t))
	s.says(t, m, "tiny: wrote", 1)
	s.tell(t, m, "D")
	s.says(t, m, "tiny: read", 1)
	var u vm.Usage
	s.soon(t, "it has used something", func() (ok bool) {
		var err error
		if u, err = m.Usage(s.ctx); err != nil {
			t.Fatal(err)
		}
		return u.CPU > 0 && u.ReadBytes >= 512 && u.ReadOps >= 1 && u.WriteBytes == 512
	})
	t.Logf("usage %+v", u)
}

func crowded(t *testing.T, s *stage) {
	end := s.Crowd(t)
	defer end()
	m := s.start(t, s.Spec(t))
	s.tell(t, m, "D")
	s.says(t, m, "tiny: read", 1)
	u, err := m.Usage(s.ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("usage %+v", u)
	if u.Waited < u.CPU/10 {
		t.Errorf("on a crowded host it used a processor for %s and waited for one for %s", u.CPU, u.Waited)
	}
}

func gone(t *testing.T, s *stage) {
	m := s.start(t, s.Spec(t))
	if err := m.Destroy(s.ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Channel(s.ctx, dr.PortISA); !errors.Is(err, vm.ErrGone) {
		t.Errorf("channel: %v, want ErrGone", err)
	}
	if _, err := m.Screenshot(s.ctx); !errors.Is(err, vm.ErrGone) {
		t.Errorf("screenshot: %v, want ErrGone", err)
	}
	if _, err := m.Usage(s.ctx); !errors.Is(err, vm.ErrGone) {
		t.Errorf("usage: %v, want ErrGone", err)
	}
	if state := s.state(t, m); state != vm.Off {
		t.Errorf("state %s, want off", state)
	}
}
