package image

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// spawn starts a server that makes a socket, until the test ends.
func spawn(t *testing.T, socket, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	waitFor(t, name, func() bool {
		select {
		case <-ended:
			t.Fatalf("%s: %s", name, said.String())
		default:
		}
		_, err := os.Stat(socket)
		return err == nil
	})
}

// dialled opens an export whose server may not listen yet.
func dialled(t *testing.T, socket, export, bitmap string) *Remote {
	t.Helper()
	var r *Remote
	var err error
	for until := time.Now().Add(10 * time.Second); ; {
		if r, err = Dial(t.Context(), socket, export, bitmap); err == nil || time.Now().After(until) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func TestARemoteReadsWhatOtherServersOffer(t *testing.T) {
	needTools(t)
	m, path := sparseFile(t, 3, 24<<20+512)
	dir := shortDir(t)
	for name, args := range map[string][]string{
		"nbdkit":             {"nbdkit", "--foreground", "--unix", dir + "/nbdkit", "file", path},
		"nbdkit in pieces":   {"nbdkit", "--foreground", "--unix", dir + "/pieces", "--filter=delay", "file", path, "rdelay=1ms"},
		"nbdkit without map": {"nbdkit", "--foreground", "--unix", dir + "/nomap", "--filter=noextents", "file", path},
		"qemu-nbd":           {"qemu-nbd", "--read-only", "--persistent", "--format=raw", "--socket=" + dir + "/qemu", path},
	} {
		socket := map[string]string{"nbdkit": "nbdkit", "nbdkit in pieces": "pieces", "nbdkit without map": "nomap", "qemu-nbd": "qemu"}[name]
		socket = filepath.Join(dir, socket)
		spawn(t, socket, args[0], args[1:]...)
		r := dialled(t, socket, "", "")
		got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
		if err != nil || !bytes.Equal(got, m.data) {
			t.Fatalf("%s: %d bytes of %d, %v", name, len(got), len(m.data), err)
		}
		var at, holes int64
		if err := r.Extents(t.Context(), 0, r.Size(), func(e Extent) bool {
			if e.Offset != at || e.Zero && !zeros(m.data[e.Offset:e.Offset+e.Length]) {
				t.Errorf("%s: extent %+v at %d", name, e, at)
			}
			if at += e.Length; e.Zero {
				holes += e.Length
			}
			return true
		}); err != nil || at != r.Size() || (holes == 0) != (name == "nbdkit without map") {
			t.Errorf("%s: extents up to %d with %d bytes of holes, %v", name, at, holes, err)
		}
	}
}

func TestARemoteSeesWhatQEMUHasAsDirty(t *testing.T) {
	needTools(t)
	dir := shortDir(t)
	disk := filepath.Join(dir, "disk.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", disk, "16M")
	tool(t, "qemu-io", "-c", "write -P 1 0 8M", disk)
	tool(t, "qemu-img", "bitmap", "--add", disk, "changes")
	tool(t, "qemu-io", "-c", "write -P 2 1M 4k", "-c", "write -z -u 2M 128k", "-c", "write -P 3 12M 64k", "-c", "write -P 4 16773120 4k", disk)
	socket := filepath.Join(dir, "s")
	spawn(t, socket, "qemu-nbd", "--read-only", "--persistent", "--format=qcow2", "--bitmap=changes", "--socket="+socket, disk)
	r := dialled(t, socket, "", "changes")
	got, err := r.Dirty(t.Context())
	want := []Extent{{1 << 20, 64 << 10, false}, {2 << 20, 128 << 10, true}, {12 << 20, 64 << 10, false}, {16<<20 - 64<<10, 64 << 10, false}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%s, %v\nwant %s", fmt.Sprint(got), err, fmt.Sprint(want))
	}
}
