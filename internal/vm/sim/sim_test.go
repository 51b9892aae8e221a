package sim_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/sim"
	"github.com/musterdr/muster/internal/vm/vmtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSimKeepsThePromises(t *testing.T) {
	host := &sim.Host{Boot: func(vm.Spec) sim.Guest { return tiny{} }, Memory: 1 << 30}
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	})
	vmtest.Run(t, vmtest.Rig{
		Open:   func(*testing.T) vm.Hypervisor { return host.Open() },
		Layer:  rawCopy,
		Sector: rawSector,
		Crowd: func(*testing.T) func() {
			busy.Store(true)
			return func() { busy.Store(false) }
		},
		Echo:     []dr.GuestPort{dr.PortISA, dr.PortVirtio},
		Patience: 10 * time.Second,
	})
}

func TestAnEmulatorThatDiesIsCrashedAndGone(t *testing.T) {
	host := &sim.Host{Boot: func(vm.Spec) sim.Guest {
		return sim.GuestFunc(func(_ context.Context, c *sim.Computer) sim.End { c.Die(); return sim.PowerOff })
	}}
	v := host.Open()
	rig := vmtest.Rig{Layer: rawCopy}
	m, err := v.Start(t.Context(), rig.Spec(t))
	if err != nil {
		t.Fatal(err)
	}
	if clean, err := m.Shutdown(t.Context(), 10*time.Second); err != nil || !clean {
		t.Fatal(clean, err)
	}
	if state, reason, _ := m.State(t.Context()); state != vm.Crashed || reason == "" {
		t.Fatalf("state %s (%s), want crashed", state, reason)
	}
	if _, err := v.Find(t.Context(), m.Name()); !errors.Is(err, vm.ErrGone) {
		t.Fatalf("find: %v, want ErrGone", err)
	}
}

func TestAGuestThatFloodsFillsNeitherDiskNorMemory(t *testing.T) {
	flooded := make(chan struct{})
	host := &sim.Host{Boot: func(vm.Spec) sim.Guest {
		return sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
			noise := bytes.Repeat([]byte("noise\n"), 10_000)
			for range 200 {
				_, _ = c.Serial().Write(noise)
				_, _ = c.Port(dr.PortISA).Write(noise) // nobody is connected: lost
			}
			close(flooded)
			<-ctx.Done()
			return sim.PowerOff
		})
	}}
	v := host.Open()
	rig := vmtest.Rig{Layer: rawCopy}
	m, err := v.Start(t.Context(), rig.Spec(t))
	if err != nil {
		t.Fatal(err)
	}
	<-flooded
	if info, err := os.Stat(m.SerialLog()); err != nil || info.Size() > 8<<20 {
		t.Fatalf("serial log: %v, %v", info.Size(), err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestAGuestPausesWithItsReason(t *testing.T) {
	host := &sim.Host{Boot: func(vm.Spec) sim.Guest {
		return sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
			fmt.Fprintln(c.Serial(), "about to read")
			c.Pause(ctx, "I/O error")
			return sim.PowerOff
		})
	}}
	v := host.Open()
	rig := vmtest.Rig{Layer: rawCopy}
	m, err := v.Start(t.Context(), rig.Spec(t))
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	for state, reason := vm.Running, ""; state != vm.Paused || reason != "I/O error"; state, reason, _ = m.State(t.Context()) {
		select {
		case <-deadline:
			t.Fatalf("state %s (%s), want paused", state, reason)
		default:
		}
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// busy is whether the make-believe host has no time for guests.
var busy atomic.Bool

// tiny imitates vmtest's guest.
type tiny struct{}

func (tiny) Run(ctx context.Context, c *sim.Computer) sim.End {
	say := func(what string) { fmt.Fprintf(c.Serial(), "tiny: %s\r\n", what) }
	say("up")
	if _, err := c.ReadAt(0, make([]byte, 512), 0); err != nil {
		say("no")
	}
	if _, err := c.WriteAt(0, bytes.Repeat([]byte(vmtest.Mark), 512/len(vmtest.Mark)), 512); err != nil {
		say("no")
	} else {
		say("wrote")
	}
	letters := make(chan byte)
	isa, virtio := c.Port(dr.PortISA), c.Port(dr.PortVirtio)
	go func() { _, _ = io.Copy(virtio, virtio) }()
	go func() {
		for b := make([]byte, 1); ; {
			if _, err := isa.Read(b); err != nil {
				return
			}
			select {
			case letters <- b[0]:
			case <-ctx.Done():
				return
			}
		}
	}()
	button := c.Button()
	for {
		select {
		case <-ctx.Done():
			return sim.PowerOff
		case <-button:
			return sim.PowerOff
		case letter := <-letters:
			if letter == 'I' {
				button = nil
			}
			if busy.Load() {
				c.Starve(time.Minute)
			}
			_, _ = isa.Write([]byte{letter})
			switch letter {
			case 'P':
				return sim.Panic
			case 'R':
				return sim.Reboot
			case 'D':
				if _, err := c.ReadAt(0, make([]byte, 512), 2048*512); err != nil {
					say("no")
				} else {
					say("read")
				}
			}
		}
	}
}

// rawCopy makes a top layer that holds everything: a make-believe machine knows no chains.
func rawCopy(t *testing.T, path string, below vm.Layer) vm.Layer {
	t.Helper()
	in, err := os.Open(below.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	return vm.Layer{Path: path, Format: "raw"}
}

func rawSector(t *testing.T, top vm.Layer, n int64) []byte {
	t.Helper()
	f, err := os.Open(top.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sector := make([]byte, 512)
	if _, err := f.ReadAt(sector, 512*n); err != nil {
		t.Fatal(err)
	}
	return sector
}
