package image

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

func needTools(t testing.TB) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to run nbdinfo, nbdcopy, qemu-img and fio")
	}
}

func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	var out, complaint bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = &out, &complaint, t.TempDir()
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out.String(), complaint.String())
	}
	return out.String()
}

// offer serves an image on a unix socket and gives its URI.
func offer(t testing.TB, s *Server, name string, img Image) string {
	t.Helper()
	if err := s.Add(name, img); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(shortDir(t), "s")
	l, err := Listen(socket, 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s, l)
	return "nbd+unix:///" + name + "?socket=" + socket
}

// serve serves a listener until the test ends.
func serve(t testing.TB, s *Server, l net.Listener) {
	t.Helper()
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// sparseFile writes a random image with holes to a file.
func sparseFile(t testing.TB, seed uint64, size int64) (*memory, string) {
	t.Helper()
	m := randomMemory(seed, size)
	path := filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, e := range m.extents {
		if !e.Zero {
			if _, err := f.WriteAt(m.data[e.Offset:e.Offset+e.Length], e.Offset); err != nil {
				t.Fatal(err)
			}
		}
	}
	return m, path
}

func openFile(t testing.TB, path string) *File {
	t.Helper()
	f, err := OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestToolsSeeTheImageAsItIs(t *testing.T) {
	needTools(t)
	// The odd size is no multiple of a sector.
	for _, size := range []int64{48 << 20, 5<<20 + 12345} {
		m, path := sparseFile(t, 3, size)
		for kind, img := range map[string]Image{"file": openFile(t, path), "memory": m} {
			t.Run(kind, func(t *testing.T) {
				uri := offer(t, NewServer(), "snap-20260102t030405-abc/0", img)

				info := tool(t, "nbdinfo", "--json", uri)
				var seen struct {
					Exports []struct {
						Size      int64    `json:"export-size"`
						Contexts  []string `json:"contexts"`
						ReadOnly  bool     `json:"is_read_only"`
						MultiConn bool     `json:"can_multi_conn"`
					} `json:"exports"`
				}
				if err := json.Unmarshal([]byte(info), &seen); err != nil {
					t.Fatal(err)
				}
				if len(seen.Exports) != 1 {
					t.Fatalf("nbdinfo saw %s", info)
				}
				if x := seen.Exports[0]; x.Size != size || !x.ReadOnly || !x.MultiConn ||
					len(x.Contexts) != 1 || x.Contexts[0] != "base:allocation" {
					t.Errorf("nbdinfo saw %s", info)
				}
				if list := tool(t, "nbdinfo", "--list", "--json", uri); !strings.Contains(list, "snap-20260102t030405-abc/0") {
					t.Errorf("nbdinfo --list saw %s", list)
				}

				var extents []struct {
					Offset, Length, Type int64
				}
				if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--map", "--json", uri)), &extents); err != nil {
					t.Fatal(err)
				}
				var covered int64
				for _, e := range extents {
					if e.Offset != covered {
						t.Fatalf("the map has a gap at %d", covered)
					}
					covered += e.Length
					if hole := e.Type == 3; hole && !zeros(m.data[e.Offset:e.Offset+e.Length]) {
						t.Errorf("data at %d is said to be a hole", e.Offset)
					} else if !hole && kind == "memory" && m.isHole(e.Offset, min(size, e.Offset+minHole)) {
						t.Errorf("the hole at %d is said to be data", e.Offset)
					}
				}
				if covered != size {
					t.Errorf("the map covers %d of %d bytes", covered, size)
				}

				copied := filepath.Join(t.TempDir(), "copy.raw")
				tool(t, "nbdcopy", "--connections=4", uri, copied)
				same(t, copied, m.data)
				tool(t, "nbdcopy", "--synchronous", uri, copied+"2")
				same(t, copied+"2", m.data)

				tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", path, uri)
				tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copied+"3")
				same(t, copied+"3", m.data)
				var mapped []struct {
					Start, Length int64
					Zero, Data    bool
				}
				if err := json.Unmarshal([]byte(tool(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)), &mapped); err != nil {
					t.Fatal(err)
				}
				holes := 0
				for _, e := range mapped {
					if e.Zero {
						holes++
						if to := min(e.Start+e.Length, size); !zeros(m.data[e.Start:to]) {
							t.Errorf("qemu-img map: data at %d is said to be zero", e.Start)
						}
					}
				}
				if holes == 0 {
					t.Error("qemu-img map found no hole")
				}
			})
		}
	}
}

// same compares a file with the image; QEMU rounds its length up to a sector.
func same(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) < len(want) || !bytes.Equal(got[:len(want)], want) || !zeros(got[len(want):]) {
		t.Errorf("%s differs from the image", filepath.Base(path))
	}
}

func zeros(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

func TestFioVerifiesWhatItWroteAndSeesOneWrongByte(t *testing.T) {
	needTools(t)
	path := filepath.Join(t.TempDir(), "disk.raw")
	tool(t, "fio", "--name=fill", "--filename="+path, "--rw=write", "--bs=16k", "--size=64m",
		"--verify=crc32c", "--do_verify=0")
	uri := offer(t, quiet(), "snap-20260102t030405-abc/0", openFile(t, path))
	verify := func(args ...string) *exec.Cmd {
		return exec.CommandContext(t.Context(), "fio", append([]string{"--name=check", "--ioengine=nbd", "--uri=" + uri,
			"--readonly", "--size=64m", "--verify=crc32c", "--verify_fatal=1", "--iodepth=16"}, args...)...)
	}
	for _, args := range [][]string{
		{"--rw=read", "--bs=16k"}, {"--rw=randread", "--bs=16k"}, {"--rw=randread", "--bs=256k", "--verify_interval=16k"},
	} {
		if out, err := verify(args...).CombinedOutput(); err != nil {
			t.Errorf("fio %v: %v\n%s", args, err, out)
		}
	}

	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0xa5, 0x5a}, 33<<20+777); err != nil {
		t.Fatal(err)
	}
	if out, err := verify("--rw=randread", "--bs=16k").CombinedOutput(); err == nil {
		t.Errorf("fio found nothing wrong:\n%s", out)
	}
}

func TestQEMUSeesADamagedImageAsAnIOErrorAndTheOwnerLearns(t *testing.T) {
	needTools(t)
	m := randomMemory(50, 8<<20)
	m.extents = []Extent{{0, 8 << 20, false}}
	m.badFrom, m.badTo = 4<<20, 4<<20+512
	s := quiet()
	var told atomic.Int64
	s.OnError = func(string, error) { told.Add(1) }
	uri := offer(t, s, "damaged/0", m)
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read 0 2M", uri)
	out, err := exec.CommandContext(t.Context(), "qemu-io", "-r", "-f", "raw", "-c", "read 3M 2M", uri).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Input/output error") {
		t.Errorf("qemu-io: %v\n%s", err, out)
	}
	if told.Load() == 0 {
		t.Error("the owner was not told")
	}
}

func TestARunningQEMUIsSeenOnItsDisk(t *testing.T) {
	needTools(t)
	_, path := sparseFile(t, 51, 4<<20)
	for _, mode := range []struct {
		readOnly bool
		want     error
	}{{true, nil}, {false, ErrInUse}} {
		drive := "file=" + path + ",format=raw,if=none,id=d"
		if mode.readOnly {
			drive += ",readonly=on"
		}
		cmd := exec.CommandContext(t.Context(), "qemu-system-x86_64", "-accel", "tcg", "-S", "-display", "none", "-nodefaults",
			"-m", "16", "-drive", drive, "-device", "virtio-blk-pci,drive=d", "-monitor", "stdio")
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// It answers once its devices are complete.
		if _, err := io.WriteString(stdin, "info status\n"); err != nil {
			t.Error(err)
		}
		lines := bufio.NewScanner(stdout)
		for lines.Scan() && !strings.HasPrefix(lines.Text(), "VM status") {
		}
		f, err := OpenFile(path)
		if err == nil {
			_ = f.Close()
		}
		if !errors.Is(err, mode.want) {
			t.Errorf("read-only %v: %v", mode.readOnly, err)
		}
		_ = stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	openFile(t, path)
}

func TestALayerOnAnExportHoldsWhatIsWrittenAndTheImageStaysAsItIs(t *testing.T) {
	needTools(t)
	m := randomMemory(53, 8<<20)
	uri := offer(t, quiet(), "snap-20260102t030405-abc/0", m)
	uri = strings.Replace(uri, "abc/0", "abc%2F0", 1)
	layer := filepath.Join(t.TempDir(), "layer.qcow2")
	tool(t, "qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", uri, layer)
	want := bytes.Clone(m.data)
	copy(want[3<<20+512:], bytes.Repeat([]byte{0xab}, 1024))
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 0xab 3146240 1024", layer)
	seen := filepath.Join(t.TempDir(), "seen.raw")
	tool(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", layer, seen)
	same(t, seen, want)
	tool(t, "nbdcopy", uri, seen+"2")
	same(t, seen+"2", m.data)
}

// loop makes a block device of a file.
func loop(t *testing.T, path string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("block devices need root")
	}
	device := strings.TrimSpace(tool(t, "losetup", "--find", "--show", path))
	t.Cleanup(func() { _ = exec.Command("losetup", "--detach", device).Run() })
	return device
}

func TestABlockDeviceIsReadAsItIs(t *testing.T) {
	needTools(t)
	m, path := sparseFile(t, 52, 6<<20+512)
	f := openFile(t, loop(t, path))
	if !f.Device() || f.Size() != m.Size() {
		t.Errorf("device %v of %d bytes", f.Device(), f.Size())
	}
	if !f.Direct() {
		t.Error("a loop device can be read past the page cache")
	}
	got := make([]byte, m.Size()-3)
	if _, err := f.ReadAt(got, 3); err != nil || !bytes.Equal(got, m.data[3:]) {
		t.Errorf("the content differs, %v", err)
	}
	uri := offer(t, quiet(), "device/0", f)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", path, uri)
}

func TestAMountedDeviceIsInUseAndDirectReadsSeeWhatIsWritten(t *testing.T) {
	needTools(t)
	path := filepath.Join(t.TempDir(), "fs.raw")
	tool(t, "truncate", "-s", "64M", path)
	device := loop(t, path)
	tool(t, "mkfs.xfs", "-q", "-f", "-l", "size=10m", "--unsupported", device)
	at := t.TempDir()
	tool(t, "mount", device, at)
	t.Cleanup(func() { _ = exec.Command("umount", at).Run() })
	if _, err := OpenFile(device); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), at) {
		t.Errorf("mounted: %v", err)
	}
	f, err := OpenFileInUse(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buffered, err := OpenFileInUse(device)
	if err != nil {
		t.Fatal(err)
	}
	defer buffered.Close()
	if !f.Direct() {
		t.Fatal("a loop device can be read past the page cache")
	}
	whole := make([]byte, f.Size())
	for _, f := range []*File{f, buffered} { // the page cache now holds what was there
		if _, err := f.ReadAt(whole, 0); err != nil {
			t.Fatal(err)
		}
	}
	order := []byte("order 4711: one red bicycle, delivered to nobody in particular")
	if err := os.WriteFile(filepath.Join(at, "orders"), bytes.Repeat(order, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "sync", "-f", at)
	if _, err := f.ReadAt(whole, 0); err != nil || !bytes.Contains(whole, order) {
		t.Errorf("a direct read does not see what was written, %v", err)
	}
	if _, err := buffered.ReadAt(whole, 0); err == nil && bytes.Contains(whole, order) {
		t.Log("here an ordinary read sees it too")
	}
	tool(t, "mount", "-o", "remount,ro", at)
	g, err := OpenFile(device)
	if err != nil {
		t.Errorf("mounted read-only: %v", err)
	} else {
		_ = g.Close()
	}
}
