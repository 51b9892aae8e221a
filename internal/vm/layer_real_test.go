package vm

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func needQemuImg(t *testing.T) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to run qemu-img")
	}
}

func runTool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// rawDisk makes a raw file of 8 MiB of which the second and third MiB hold data.
func rawDisk(t *testing.T) (string, []byte) {
	t.Helper()
	content := make([]byte, 8<<20)
	noise := rand.NewChaCha8([32]byte{7})
	_, _ = noise.Read(content[1<<20 : 3<<20])
	path := filepath.Join(t.TempDir(), "base disk.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(content[1<<20:3<<20], 1<<20); err != nil {
		t.Fatal(err)
	}
	return path, content
}

// serveFile offers a file as an export, in a folder and under a name that need escaping, with qemu-nbd.
func serveFile(t *testing.T, path string) Layer {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "a b+c&d")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l := Layer{Socket: filepath.Join(dir, "s"), Export: "snap-20260102t030405-abc/0"}
	cmd := exec.Command("qemu-nbd", "-r", "-t", "-e", "8", "-f", "raw", "-x", l.Export, "-k", l.Socket, path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for tick := time.NewTicker(20 * time.Millisecond); ; {
		if c, err := net.Dial("unix", l.Socket); err == nil {
			_ = c.Close()
			tick.Stop()
			return l
		}
		select {
		case <-ctx.Done():
			t.Fatal("qemu-nbd did not start")
		case <-tick.C:
		}
	}
}

func through(t *testing.T, layers ...Layer) string {
	t.Helper()
	name, err := chain(layers)
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func TestALayerShowsWhatIsBelowAndKeepsWhatIsWritten(t *testing.T) {
	needQemuImg(t)
	path, content := rawDisk(t)
	for name, below := range map[string]Layer{
		"file":   {Path: path, Format: "raw"},
		"export": serveFile(t, path),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			layer, err := NewLayer(t.Context(), filepath.Join(dir, "delta.qcow2"), below)
			if err != nil {
				t.Fatal(err)
			}
			if err := Detach(t.Context(), layer.Path); err != nil {
				t.Fatal(err)
			}
			if info := runTool(t, "qemu-img", "info", layer.Path); strings.Contains(info, "backing") {
				t.Errorf("a detached layer names what is below it: %s", info)
			}
			top, err := NewLayer(t.Context(), filepath.Join(dir, "live.qcow2"), layer)
			if err != nil {
				t.Fatal(err)
			}
			if n, err := LayerWritten(t.Context(), top.Path); err != nil || n != 0 {
				t.Fatalf("a new layer has %d bytes, %v", n, err)
			}
			runTool(t, "qemu-io", "-c", "write -P 0xab 2M 128k", "-c", "write -z 0 64k", through(t, top, layer, below))
			if n, err := LayerWritten(t.Context(), top.Path); err != nil || n != 128<<10 {
				t.Fatalf("counted %d bytes, %v; want %d", n, err, 128<<10)
			}
			if n, err := LayerWritten(t.Context(), layer.Path); err != nil || n != 0 {
				t.Fatalf("the layer below was written to: %d bytes, %v", n, err)
			}
			want := bytes.Clone(content)
			copy(want[2<<20:], bytes.Repeat([]byte{0xab}, 128<<10))
			var mu sync.Mutex
			var last int64
			for _, dst := range []string{"flat.raw", "flat.qcow2", "flat"} {
				format := "qcow2"
				if dst == "flat.raw" {
					format = "raw"
				}
				dst = filepath.Join(dir, dst)
				err := Flatten(t.Context(), []Layer{top, layer, below}, dst, func(_ string, done, total int64, _ string) {
					mu.Lock()
					defer mu.Unlock()
					if last = done; total != int64(len(want)) {
						t.Errorf("progress of %d bytes, the disk has %d", total, len(want))
					}
				})
				if err != nil {
					t.Fatal(err)
				}
				if last != int64(len(want)) {
					t.Errorf("progress ended at %d", last)
				}
				raw := filepath.Join(dir, "again.raw")
				runTool(t, "qemu-img", "convert", "-f", format, "-O", "raw", dst, raw)
				if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s differs, %v", dst, err)
				}
				if strings.Contains(runTool(t, "qemu-img", "info", dst), "backing") {
					t.Errorf("%s needs something below it", dst)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestALayerIsNeverOverwrittenAndNeverHalfMade(t *testing.T) {
	needQemuImg(t)
	path, _ := rawDisk(t)
	below := Layer{Path: path, Format: "raw"}
	dir := t.TempDir()
	at := filepath.Join(dir, "delta.qcow2")
	if _, err := NewLayer(t.Context(), at, below); err != nil {
		t.Fatal(err)
	}
	if _, err := NewLayer(t.Context(), at, below); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second layer at the same path: %v", err)
	}
	if err := Flatten(t.Context(), []Layer{below}, at, nil); !errors.Is(err, fs.ErrExist) {
		t.Errorf("flatten onto a layer: %v", err)
	}
	gone := Layer{Socket: filepath.Join(dir, "nobody"), Export: "snap-1/0", Format: "raw"}
	_, err := NewLayer(t.Context(), filepath.Join(dir, "x.qcow2"), gone)
	if err == nil || !strings.Contains(err.Error(), "No such file") {
		t.Errorf("on an export that is not served: %v; want qemu-img's own words", err)
	}
	for _, bad := range []Layer{{Path: "rel.raw", Format: "raw"}, {Path: path}, {Path: path, Format: "vmdk"},
		{Path: path, Socket: "/s", Format: "raw"}, {Socket: "s", Format: "raw"}} {
		if _, err := NewLayer(t.Context(), filepath.Join(dir, "y.qcow2"), bad); err == nil {
			t.Errorf("made a layer on %+v", bad)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := NewLayer(ctx, filepath.Join(dir, "z.qcow2"), below); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}
