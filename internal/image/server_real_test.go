package image

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	dir, err := os.MkdirTemp("", "nbd") // not of the test's name, which may not stand in a URI
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
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
