// Package vmtest is the suite of promises that every hypervisor keeps. A driver's test is one call of Run with a Rig.
//
// Its guest is tiny (see tiny/tiny.s): one boot sector that talks on the serial ports, writes a sector and obeys a few
// letters. Real machines run it as it is; make-believe ones imitate it.
//
// Knows: the promises of vm.
// Must not know: any driver.
package vmtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

//go:generate sh -c "as --64 -o tiny/tiny.o tiny/tiny.s && ld -m elf_x86_64 -Ttext 0x7c00 --oformat binary -o tiny/tiny.bin tiny/tiny.o && rm tiny/tiny.o && chmod 644 tiny/tiny.bin"
//go:embed tiny/tiny.bin
var tiny []byte

const (
	diskSize = 4 << 20
	// Mark fills the sector that the tiny guest writes, number 1 of its first disk.
	Mark = "scratch!"
)

// Rig is a driver and what the suite needs beside it.
type Rig struct {
	// Open gives a hypervisor; each call another one on the same host.
	Open func(t *testing.T) vm.Hypervisor
	// Layer makes an empty top layer at path, on top of a raw file.
	Layer func(t *testing.T, path string, below vm.Layer) vm.Layer
	// Sector reads a sector through a top layer.
	Sector func(t *testing.T, top vm.Layer, n int64) []byte
	// Crowd keeps the host's processors busy with other things until end is called.
	Crowd func(t *testing.T) (end func())
	// Echo are the ports on which the guest sends back what it gets.
	Echo []dr.GuestPort
	// Patience is how long a guest may take to do anything.
	Patience time.Duration
}

// Run holds a driver to every promise.
func Run(t *testing.T, rig Rig) {
	for _, promise := range []struct {
		name string
		test func(*testing.T, *stage)
	}{
		{"a machine is found and listed with its owner until it is destroyed", foundAndListed},
		{"a name is used once at a time", nameOnce},
		{"destroying twice is no error", destroyTwice},
		{"what the first serial port says is in the log", serialLog},
		{"a port carries bytes both ways, and again after a reconnect", echo},
		{"a screenshot is a picture", screenshot},
		{"a guest that hears the power button goes down by itself", shutdown},
		{"a guest that does not hear it is switched off", shutdownDeaf},
		{"a machine outlives the hypervisor that started it", outlives},
		{"a bad spec leaves nothing", badSpecs},
		{"a start that nobody waits for leaves nothing", cancelled},
		{"what a machine writes is in the top layer only", topOnly},
		{"a guest that panics stays to be looked at", panics},
		{"a guest that reboots starts again", reboots},
		{"a guest that must not reboot is off", mustNotReboot},
		{"a machine that was started paused runs when it is resumed", resumes},
		{"a machine larger than the host is refused", tooLarge},
		{"what a machine has used grows", usage},
		{"that the host had no time for a machine is told", crowded},
		{"a machine that is gone says so", gone},
	} {
		t.Run(promise.name, func(t *testing.T) {
			promise.test(t, newStage(t, rig))
		})
	}
}

// stage is one promise's hypervisor and folder.
type stage struct {
	Rig
	v   vm.Hypervisor
	ctx context.Context
}

func newStage(t *testing.T, rig Rig) *stage {
	ctx, cancel := context.WithTimeout(t.Context(), 10*rig.Patience)
	t.Cleanup(cancel)
	v := rig.Open(t)
	t.Cleanup(func() { _ = v.Close() })
	return &stage{Rig: rig, v: v, ctx: ctx}
}

// Spec is a machine whose first disk boots the tiny guest from layers made by the rig. Its folder is removed after the
// test.
func (rig Rig) Spec(t *testing.T) vm.Spec {
	t.Helper()
	dir, err := os.MkdirTemp("", "muvm") // short: paths of sockets have little room
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	base := filepath.Join(dir, "base.raw")
	if err := os.WriteFile(base, Disk(), 0o600); err != nil {
		t.Fatal(err)
	}
	machine := filepath.Join(dir, "m")
	if err := os.Mkdir(machine, 0o700); err != nil {
		t.Fatal(err)
	}
	// A real QEMU runs as another user and has to pass; the machine's own folder is the driver's business.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	below := vm.Layer{Path: base, Format: "raw"}
	top := rig.Layer(t, filepath.Join(machine, "top"), below)
	layers := []vm.Layer{top}
	if top.Format != "raw" {
		layers = append(layers, below)
	}
	return vm.Spec{
		Name:  dr.NewID("vmtest"),
		Owner: vm.Owner{Kind: "test", ID: dr.NewID("verdict"), Term: 7},
		Dir:   machine,
		Hardware: dr.Hardware{
			Firmware: dr.BIOS, Machine: "q35", CPUs: 1, Memory: 32, DiskBus: dr.BusVirtio, NICModel: dr.NICVirtio,
			Disks: []dr.HWDisk{{Serial: "TINY-0", Boot: true}}, NICs: []dr.HWNIC{{MAC: "52:54:00:12:34:56"}},
			SMBIOS: dr.SMBIOS{UUID: "b7d1a0f4-3d2c-4c58-9a0e-1f2e3d4c5b6a", Manufacturer: "Tiny, Inc.", Product: "Sector"},
		},
		Disks:    []vm.Disk{{Layers: layers, Scratch: true}},
		Networks: []vm.Network{{}},
	}
}

// Disk is a disk that boots the tiny guest.
func Disk() []byte {
	disk := make([]byte, diskSize)
	copy(disk, tiny)
	return disk
}

// start starts a machine that is destroyed after the test whatever happens.
func (s *stage) start(t *testing.T, spec vm.Spec) vm.Machine {
	t.Helper()
	began := time.Now()
	m, err := s.v.Start(s.ctx, spec)
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	t.Logf("started in %s", time.Since(began).Round(time.Millisecond))
	t.Cleanup(func() {
		v := s.Open(t)
		defer v.Close()
		if m, err := v.Find(context.WithoutCancel(s.ctx), spec.Name); err == nil {
			if err := m.Destroy(context.WithoutCancel(s.ctx)); err != nil {
				t.Errorf("destroy: %v", err)
			}
		}
	})
	return m
}

// soon waits until something is true.
func (s *stage) soon(t *testing.T, what string, true func() bool) {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !true() {
		select {
		case <-tick.C:
			if time.Since(began) > s.Patience {
				t.Fatalf("after %s still not: %s", s.Patience, what)
			}
		case <-s.ctx.Done():
			t.Fatalf("%v, still not: %s", s.ctx.Err(), what)
		}
	}
	t.Logf("%s after %s", what, time.Since(began).Round(time.Millisecond))
}

// says waits until the guest has said something, so many times.
func (s *stage) says(t *testing.T, m vm.Machine, text string, times int) {
	t.Helper()
	s.soon(t, "the guest says "+text, func() bool {
		log, _ := os.ReadFile(m.SerialLog())
		return bytes.Count(log, []byte(text)) >= times
	})
}

// connect connects to a port on which the guest answers.
func (s *stage) connect(t *testing.T, m vm.Machine, port dr.GuestPort) vm.Channel {
	t.Helper()
	c, err := m.Channel(s.ctx, port)
	if err != nil {
		t.Fatalf("connect to %s: %v", port, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// tell sends letters to the guest and waits until it has sent them back: it has heard, and does it next.
func (s *stage) tell(t *testing.T, m vm.Machine, letters string) {
	t.Helper()
	s.says(t, m, "tiny: wrote", 1) // before that it does not listen
	c := s.connect(t, m, dr.PortISA)
	defer c.Close()
	exchange(t, c, letters, s.Patience)
}

func exchange(t *testing.T, c vm.Channel, letters string, patience time.Duration) {
	t.Helper()
	if err := errors.Join(c.SetReadDeadline(time.Now().Add(patience)), c.SetWriteDeadline(time.Now().Add(patience))); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, letters); err != nil {
		t.Fatalf("write: %v", err)
	}
	got := make([]byte, len(letters))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != letters {
		t.Fatalf("sent %q, came back %q, %v", letters, got, err)
	}
}

func (s *stage) state(t *testing.T, m vm.Machine) vm.State {
	t.Helper()
	state, _, err := m.State(s.ctx)
	if err != nil {
		t.Fatalf("state: %v", err)
	}
	return state
}

func (s *stage) listed(t *testing.T, name string) (vm.Owner, bool) {
	t.Helper()
	list, err := s.v.List(s.ctx)
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	i := slices.IndexFunc(list, func(o vm.Owned) bool { return o.Name == name })
	if i < 0 {
		return vm.Owner{}, false
	}
	return list[i].Owner, true
}

func digest(t *testing.T, path string) [32]byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(data)
}

func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func plausiblePicture(t *testing.T, shot []byte, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("screenshot: %v", err)
	}
	picture, err := png.Decode(bytes.NewReader(shot))
	if err != nil {
		t.Fatalf("screenshot is no PNG: %v", err)
	}
	if size := picture.Bounds().Size(); size.X < 320 || size.Y < 200 || size.X > 4096 || size.Y > 4096 {
		t.Fatalf("screenshot is %v", size)
	}
}
