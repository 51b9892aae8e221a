package libvirt_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/libvirt"
	"github.com/musterdr/muster/internal/vm/vmtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// real skips a test that was not asked for. Run these as: MUSTER_REAL=1 scripts/sandbox run -- go test ./internal/vm/…
func real(t *testing.T) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs libvirtd and QEMU: MUSTER_REAL=1 scripts/sandbox run -- go test ./internal/vm/...")
	}
}

func open(t *testing.T) vm.Hypervisor {
	t.Helper()
	h, err := libvirt.Open(context.Background(), libvirt.Config{ProbeFile: filepath.Join(os.TempDir(), "muster-test-kvm.json")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func rig() vmtest.Rig {
	return vmtest.Rig{
		Open: open, Layer: overlay, Sector: sector, Crowd: crowd, Echo: []dr.GuestPort{dr.PortISA}, Patience: 20 * time.Second,
	}
}

func TestLibvirtKeepsThePromises(t *testing.T) {
	real(t)
	vmtest.Run(t, rig())
}

// crowd has four busy loops a processor.
func crowd(t *testing.T) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var all []*exec.Cmd
	end = func() {
		cancel()
		for _, c := range all {
			_ = c.Wait()
		}
	}
	for range 4 * runtime.NumCPU() {
		c := exec.CommandContext(ctx, "sh", "-c", "while :; do :; done")
		if err := c.Start(); err != nil {
			end()
			t.Fatal(err)
		}
		all = append(all, c)
	}
	return end
}

// overlay makes a qcow2 layer.
func overlay(t *testing.T, path string, below vm.Layer) vm.Layer {
	t.Helper()
	layer, err := vm.NewLayer(t.Context(), path, below)
	if err != nil {
		t.Fatal(err)
	}
	return layer
}

// sector reads a sector through a qcow2 layer.
func sector(t *testing.T, top vm.Layer, n int64) []byte {
	t.Helper()
	flat := filepath.Join(t.TempDir(), "flat")
	if out, err := exec.CommandContext(context.Background(), "qemu-img", "convert", "-O", "raw", top.Name(), flat).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	data, err := os.ReadFile(flat)
	if err != nil {
		t.Fatal(err)
	}
	return data[512*n : 512*(n+1)]
}
