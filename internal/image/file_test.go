package image

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestAFileIsReadAsItIs(t *testing.T) {
	m, path := sparseFile(t, 30, 3<<20+1001)
	buffered, direct := openFile(t, path), openFile(t, path)
	files := []*File{buffered}
	if direct.Direct() { // not every file system can
		files = append(files, direct)
	}
	rapid.Check(t, func(rt *rapid.T) {
		off := rapid.Int64Range(0, m.Size()+10).Draw(rt, "offset")
		length := rapid.OneOf(rapid.IntRange(0, 9000), rapid.IntRange(0, 3<<20)).Draw(rt, "length")
		want := make([]byte, length)
		n, end := m.ReadAt(want, off)
		for _, f := range files {
			got := make([]byte, length)
			if k, err := f.ReadAt(got, off); k != n || !errors.Is(err, end) || !bytes.Equal(got, want) {
				rt.Fatalf("read of %d at %d: %d bytes, %v; want %d, %v", length, off, k, err, n, end)
			}
		}
	})
	if buffered.Size() != m.Size() || buffered.Device() {
		t.Errorf("size %d, device %v", buffered.Size(), buffered.Device())
	}
}

func TestAFilesExtentsCoverItAndHolesAreZeros(t *testing.T) {
	m, path := sparseFile(t, 31, 8<<20+5)
	f := openFile(t, path)
	holes := 0
	rapid.Check(t, func(rt *rapid.T) {
		off := rapid.Int64Range(0, m.Size()).Draw(rt, "offset")
		length := rapid.Int64Range(0, m.Size()-off).Draw(rt, "length")
		pos := off
		err := f.Extents(t.Context(), off, length, func(e Extent) bool {
			if e.Offset != pos || e.Length <= 0 {
				rt.Fatalf("extent %+v, want it at %d", e, pos)
			}
			if e.Zero {
				if holes++; !zeros(m.data[e.Offset : e.Offset+e.Length]) {
					rt.Fatalf("data in the hole %+v", e)
				}
			}
			pos += e.Length
			return true
		})
		if err != nil || pos != off+length {
			rt.Fatalf("extents end at %d, want %d, %v", pos, off+length, err)
		}
	})
	if holes == 0 {
		t.Error("no hole was seen")
	}
	if err := f.Extents(t.Context(), 1, m.Size(), func(Extent) bool { return true }); err == nil {
		t.Error("extents past the end")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.Extents(ctx, 0, 10, func(Extent) bool { return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestWhatIsNoRawDiskIsRefusedWithAWayOut(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, parts ...string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(strings.Join(parts, "")), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, _ = z.Write(make([]byte, 4096))
	_ = z.Close()
	pad := strings.Repeat("\x00", 1<<20)
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		dir:                                      "folder",
		filepath.Join(dir, "nothing"):            "no such file",
		fifo:                                     "neither a file nor a block device",
		"/dev/zero":                              "neither a file nor a block device",
		write("empty"):                           "empty",
		write("a.qcow2", "QFI\xfb\x00\x00", pad): "qcow2 image, not a raw disk: convert it first (qemu-img convert -O raw ",
		write("a.vmdk", "KDMV", pad):             "qemu-img convert -O raw ",
		write("b.vmdk", "# Disk DescriptorFile"): "qemu-img convert -O raw ",
		write("a.vhdx", "vhdxfile", pad):         "qemu-img convert -O raw ",
		write("a.vhd", pad, "conectix", pad[:504]):                                                     "qemu-img convert -O raw -f vpc ",
		write("a.vdi", "<<< Oracle VM VirtualBox Disk Image >>>\n", pad[:24], "\x7f\x10\xda\xbe", pad): "qemu-img convert -O raw ",
		write("a.img.gz", zipped.String()):                                                             "gzip -dc ",
		write("a.xz", "\xfd7zXZ\x00"):                                                                  "xz -dc ",
		write("a.zst", "\x28\xb5\x2f\xfd"):                                                             "zstd -dc ",
		write("a.ova", pad[:257], "ustar"):                                                             "tar ",
	} {
		f, err := OpenFile(path)
		if err == nil {
			_ = f.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", filepath.Base(path), err, want)
		}
	}
	for _, ok := range []string{write("tiny", "x"), write("sector", pad[:510], "\x55\xaa"), write("zeros", pad)} {
		f, err := OpenFile(ok)
		if err != nil {
			t.Errorf("%s: %v", filepath.Base(ok), err)
			continue
		}
		_ = f.Close()
	}
}

func TestADiskThatAMachineWritesToIsInUse(t *testing.T) {
	_, path := sparseFile(t, 32, 1<<20)
	writer, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	lock := func(kind int16, byte int64) {
		t.Helper()
		l := unix.Flock_t{Type: kind, Start: byte, Len: 1}
		if err := unix.FcntlFlock(writer.Fd(), unix.F_OFD_SETLK, &l); err != nil {
			t.Fatal(err)
		}
	}
	// What QEMU holds on an image that it only reads: it uses consistent reads and lets nobody else write.
	lock(unix.F_RDLCK, 100)
	lock(unix.F_RDLCK, 201)
	f, err := OpenFile(path)
	if err != nil {
		t.Fatalf("only read by a machine: %v", err)
	}
	_ = f.Close()
	for _, permission := range []int64{101, 103} {
		lock(unix.F_RDLCK, permission)
		if _, err := OpenFile(path); !errors.Is(err, ErrInUse) {
			t.Errorf("lock %d: %v", permission, err)
		}
		f, err := OpenFileInUse(path)
		if err != nil {
			t.Errorf("asked otherwise: %v", err)
		} else {
			_ = f.Close()
		}
		lock(unix.F_UNLCK, permission)
	}
}

func TestAFileThatShrankIsAnErrorAndNotZeros(t *testing.T) {
	_, path := sparseFile(t, 33, 1<<20)
	f := openFile(t, path)
	if err := os.Truncate(path, 1<<19); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAt(make([]byte, 4096), 1<<19-1024); n != 1024 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%d bytes, %v", n, err)
	}
}
