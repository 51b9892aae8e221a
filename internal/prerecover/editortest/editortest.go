// Package editortest proves that a way of opening images keeps the contract of prerecover.Guest. Every driver's test is
// one call of Run.
//
// Knows: the contract.
// Must not know: how a driver keeps it.
package editortest

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/prerecover"
)

// Content is what the driver's image must hold, on one ext4 file system that is the whole of its only disk.
type Content struct {
	Files   map[string]string // regular files, mode 0644
	Links   map[string]string
	Folders []string
	Pipes   []string
}

// Hostile are names that must be no trouble.
var Hostile = []string{
	"new\nline", `back\slash`, `"double"`, "'single'", "$(id)", "`id`", "!id", "|id", "# no comment", "-rf", "~root", "..hidden..",
	" leading and trailing ", "\x01\x1b[31m\x7f", "\xff\xfe not utf-8", "ünïcödé", "a b\tc", "<!id", "%s%n", "{a,b}", "*?[x]", "win:x",
}

// Standard is the content the suite asks for.
func Standard() Content {
	c := Content{
		Files: map[string]string{
			"etc/plain":      "plain\n",
			"etc/empty":      "",
			"etc/binary":     "\x00\x01\xffmuster-0000\n\x00",
			"etc/big":        strings.Repeat("0123456789abcdef", 64<<10), // 1 MiB
			"usr/lib/target": "through links\n",
		},
		Links: map[string]string{
			"etc/absolute": "/usr/lib/target",
			"etc/relative": "../usr/lib/target",
			"etc/escape":   "../../../../../../etc/plain",
			"etc/loop":     "loop",
			"etc/nowhere":  "/does/not/exist",
			"outside":      "/../../..",
			"lib":          "usr/lib",
		},
		Folders: []string{"etc/folder", "hostile", "boot"},
		Pipes:   []string{"etc/pipe"},
	}
	for _, h := range Hostile {
		c.Files["hostile/"+h] = h
	}
	return c
}

// Open opens a guest that holds the content and has nothing mounted. The driver's test
// cleans up.
type Open func(t *testing.T, c Content) prerecover.Guest

// Run proves the contract on one guest.
func Run(t *testing.T, open Open) {
	ctx := context.Background()
	g := open(t, Standard())
	device := mountOnly(t, g)
	t.Run("a whole disk without a partition table is one device", func(t *testing.T) {
		if device.Type != "ext4" || device.Number != 0 || device.Disk != 0 {
			t.Errorf("device = %+v", device)
		}
	})
	t.Run("reading", func(t *testing.T) { testReading(ctx, t, g) })
	t.Run("data is listed, removed and unpacked", func(t *testing.T) { testData(ctx, t, g) })
	t.Run("hostile names", func(t *testing.T) { testHostile(ctx, t, g) })
	t.Run("writing", func(t *testing.T) { testWriting(ctx, t, g) })
	t.Run("links and folders", func(t *testing.T) { testLinks(ctx, t, g) })
	t.Run("nothing leads out of the guest", func(t *testing.T) { testEscape(ctx, t, g) })
	t.Run("close keeps the deltas", func(t *testing.T) {
		if err := g.Close(ctx); err != nil {
			t.Fatal(err)
		}
		if len(g.Deltas()) != 1 {
			t.Errorf("deltas = %v", g.Deltas())
		}
		if _, err := g.Read(ctx, "/etc/plain", 100); err == nil {
			t.Error("a closed guest still answers")
		}
	})
}

func mountOnly(t *testing.T, g prerecover.Guest) prerecover.Device {
	t.Helper()
	ctx := context.Background()
	disks, err := g.Disks(ctx)
	if err != nil || len(disks) != 1 || disks[0].Table != "" {
		t.Fatalf("disks = %+v, %v", disks, err)
	}
	devices, err := g.Devices(ctx)
	if err != nil || len(devices) != 1 {
		t.Fatalf("devices = %+v, %v", devices, err)
	}
	if _, err := g.Read(ctx, "/etc/plain", 100); err == nil {
		t.Error("a file could be read with nothing mounted")
	}
	if err := g.Mount(ctx, "/dev/does-not-exist", "/", ""); err == nil {
		t.Error("a device that is not there was mounted")
	}
	if err := g.Mount(ctx, devices[0].Name, "/", ""); err != nil {
		t.Fatal(err)
	}
	return devices[0]
}

func testReading(ctx context.Context, t *testing.T, g prerecover.Guest) {
	want := Standard().Files
	for _, name := range []string{"plain", "empty", "binary", "big"} {
		got, err := g.Read(ctx, "/etc/"+name, 1<<20)
		if err != nil || string(got) != want["etc/"+name] {
			t.Errorf("read %s: %d bytes, %v", name, len(got), err)
		}
	}
	if _, err := g.Read(ctx, "/etc/big", 1<<20-1); !errors.Is(err, prerecover.ErrTooLarge) {
		t.Errorf("a file over the limit: %v", err)
	}
	for _, name := range []string{"/etc/none", "/none/none", "/etc/plain/none", "/etc/nowhere", "/etc/loop"} {
		if _, err := g.Read(ctx, name, 100); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("read %s: %v", name, err)
		}
		if _, err := g.Stat(ctx, name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("stat %s: %v", name, err)
		}
	}
	for _, name := range []string{"/etc/pipe", "/etc/folder", "/"} {
		if _, err := g.Read(ctx, name, 100); !errors.Is(err, prerecover.ErrNotRegular) {
			t.Errorf("read %s: %v", name, err)
		}
	}
	for _, name := range []string{"/etc/absolute", "/etc/relative", "/lib/target"} {
		if got, err := g.Read(ctx, name, 100); err != nil || string(got) != "through links\n" {
			t.Errorf("read %s: %q, %v", name, got, err)
		}
	}
	s, err := g.Lstat(ctx, "/etc/absolute")
	if err != nil || s.Mode&fs.ModeSymlink == 0 || s.Link != "/usr/lib/target" {
		t.Errorf("lstat of a link: %+v, %v", s, err)
	}
	if s, err = g.Stat(ctx, "/etc/absolute"); err != nil || !s.Mode.IsRegular() || s.Size != 14 || s.Mode.Perm() != 0o644 {
		t.Errorf("stat through a link: %+v, %v", s, err)
	}
	if _, err := g.List(ctx, "/etc", 3); !errors.Is(err, prerecover.ErrTooLarge) {
		t.Errorf("a folder over the limit: %v", err)
	}
	if _, err := g.List(ctx, "/etc/plain", 3); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("list of a file: %v", err)
	}
	if names, err := g.List(ctx, "/etc/folder", 10); err != nil || len(names) != 0 {
		t.Errorf("list of an empty folder: %q, %v", names, err)
	}
	if space, err := g.Space(ctx, "/etc"); err != nil || space.Free <= 0 || space.Inodes == 0 {
		t.Errorf("space = %+v, %v", space, err)
	}
}

func testHostile(ctx context.Context, t *testing.T, g prerecover.Guest) {
	names, err := g.List(ctx, "/hostile", 1000)
	want := slices.Sorted(slices.Values(Hostile))
	if err != nil || !slices.Equal(names, want) {
		t.Errorf("list = %q, %v", names, err)
	}
	for _, h := range Hostile {
		got, err := g.Read(ctx, "/hostile/"+h, 1000)
		if err != nil || string(got) != h {
			t.Errorf("read %q: %q, %v", h, got, err)
		}
		if err := g.Write(ctx, "/hostile/"+h, []byte("changed "+h)); err != nil {
			t.Errorf("write %q: %v", h, err)
		}
		if err := g.Symlink(ctx, h, "/hostile/link"); err != nil {
			t.Errorf("link to %q: %v", h, err)
		}
		if s, err := g.Lstat(ctx, "/hostile/link"); err != nil || s.Link != h {
			t.Errorf("link to %q: %+v, %v", h, s, err)
		}
		if got, err = g.Read(ctx, "/hostile/link", 1000); err != nil || string(got) != "changed "+h {
			t.Errorf("read through a link to %q: %q, %v", h, got, err)
		}
		if err := g.Remove(ctx, "/hostile/"+h); err != nil {
			t.Errorf("remove %q: %v", h, err)
		}
	}
	if err := g.Remove(ctx, "/hostile/link"); err != nil {
		t.Error(err)
	}
	if names, err = g.List(ctx, "/hostile", 10); err != nil || len(names) != 0 {
		t.Errorf("after removing all: %q, %v", names, err)
	}
	long := "/hostile/" + strings.Repeat("x", prerecover.MaxPath)
	if _, err := g.Stat(ctx, long); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a path that is too long: %v", err)
	}
	for _, bad := range []string{"relative", "", "/zero\x00byte"} {
		if err := g.Write(ctx, bad, nil); err == nil {
			t.Errorf("path %q was written to", bad)
		}
	}
	// The longest path made of the most expensive bytes still works.
	deep := "/hostile" + strings.Repeat("/"+strings.Repeat("\n", 250), 4)
	if err := g.Mkdir(ctx, deep[:len(deep)-251]); err != nil {
		t.Error(err)
	}
	if err := g.Write(ctx, deep, []byte("deep")); err != nil {
		t.Error(err)
	}
	if got, err := g.Read(ctx, deep, 10); err != nil || string(got) != "deep" {
		t.Errorf("read of a deep path: %q, %v", got, err)
	}
}

func testWriting(ctx context.Context, t *testing.T, g prerecover.Guest) {
	if err := g.Write(ctx, "/etc/new", []byte("new")); err != nil {
		t.Fatal(err)
	}
	if s, err := g.Stat(ctx, "/etc/new"); err != nil || s.Mode != 0o644 || s.UID != 0 || s.Size != 3 {
		t.Errorf("a new file: %+v, %v", s, err)
	}
	if err := g.Chmod(ctx, "/etc/new", 0o750); err != nil {
		t.Error(err)
	}
	if err := g.Chown(ctx, "/etc/new", 12, 34); err != nil {
		t.Error(err)
	}
	label := "system_u:object_r:bin_t:s0"
	if err := g.SetXattr(ctx, "/etc/new", "security.selinux", label); err != nil {
		t.Error(err)
	}
	content := bytes.Repeat([]byte("\x00\xff\n"), 300<<10)
	if err := g.Write(ctx, "/etc/new", content); err != nil {
		t.Error(err)
	}
	if s, err := g.Stat(ctx, "/etc/new"); err != nil || s.Mode != 0o750 || s.UID != 12 || s.GID != 34 || s.Size != int64(len(content)) {
		t.Errorf("a file written again: %+v, %v", s, err)
	}
	if got, err := g.Xattr(ctx, "/etc/new", "security.selinux"); err != nil || got != label {
		t.Errorf("attribute = %q, %v", got, err)
	}
	if got, err := g.Xattr(ctx, "/etc/new", "user.none"); err != nil || got != "" {
		t.Errorf("attribute that is not there = %q, %v", got, err)
	}
	if got, err := g.Read(ctx, "/etc/new", 1<<20); err != nil || !bytes.Equal(got, content) {
		t.Errorf("read back: %d bytes, %v", len(got), err)
	}
	if err := g.Write(ctx, "/none/new", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("write into a folder that is not there: %v", err)
	}
	for _, name := range []string{"/etc/pipe", "/etc/folder"} {
		if err := g.Write(ctx, name, nil); !errors.Is(err, prerecover.ErrNotRegular) {
			t.Errorf("write to %s: %v", name, err)
		}
	}
	if err := g.Write(ctx, "/etc/relative", []byte("written through a link\n")); err != nil {
		t.Error(err)
	}
	if got, err := g.Read(ctx, "/usr/lib/target", 100); err != nil || string(got) != "written through a link\n" {
		t.Errorf("write through a link: %q, %v", got, err)
	}
}

func testLinks(ctx context.Context, t *testing.T, g prerecover.Guest) {
	for range 2 { // a second time is no error
		if err := g.Mkdir(ctx, "/a/b/c"); err != nil {
			t.Fatal(err)
		}
		if err := g.Symlink(ctx, "/dev/null", "/a/b/c/link"); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := g.Stat(ctx, "/a/b"); err != nil || s.Mode != fs.ModeDir|0o755 {
		t.Errorf("a new folder: %+v, %v", s, err)
	}
	if err := g.Write(ctx, "/a/file", nil); err != nil {
		t.Error(err)
	}
	if err := g.Symlink(ctx, "b", "/a/file"); err != nil {
		t.Error(err)
	}
	if names, err := g.List(ctx, "/a/file/c", 10); err != nil || !slices.Equal(names, []string{"link"}) {
		t.Errorf("a file replaced by a link: %q, %v", names, err)
	}
	if err := g.Remove(ctx, "/a/b"); err == nil {
		t.Error("a folder was removed")
	}
	for range 2 {
		if err := g.Remove(ctx, "/a/b/c/link"); err != nil {
			t.Error(err)
		}
	}
}

func testEscape(ctx context.Context, t *testing.T, g prerecover.Guest) {
	for _, name := range []string{"/etc/escape", "/outside/etc/plain", "/../../etc/plain", "/etc/folder/../plain"} {
		if got, err := g.Read(ctx, name, 100); err != nil || string(got) != "plain\n" {
			t.Errorf("read %s: %q, %v", name, got, err)
		}
	}
	if _, err := g.Stat(ctx, "/outside/sysroot"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a link led out of the guest: %v", err)
	}
	if err := g.Write(ctx, "/outside/escaped", []byte("x")); err != nil {
		t.Error(err)
	}
	if got, err := g.Read(ctx, "/escaped", 10); err != nil || string(got) != "x" {
		t.Errorf("what was written through ..: %q, %v", got, err)
	}
}
