package guestfs_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/capture/linux/files"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/prerecover/guestfs"
	"github.com/musterdr/muster/internal/vm"
)

// taken is what a walk gave.
type taken struct {
	all   []fileset.Entry
	data  map[string]string
	piece strings.Builder
}

func (o *taken) Same(int64) error     { return nil }
func (o *taken) Gone(int64) error     { return nil }
func (o *taken) Piece(b []byte) error { o.piece.Write(b); return nil }
func (o *taken) Again() error         { o.piece.Reset(); return nil }
func (o *taken) Entry(e *fileset.Entry) error {
	o.all, o.data[e.Path] = append(o.all, *e), o.piece.String()
	o.piece.Reset()
	return nil
}

var srv = fileset.Set{Roots: []string{"/srv"}, Exclude: []string{"*.tmp"}}

func walkSrv(t *testing.T, top string) *taken {
	t.Helper()
	o := &taken{data: map[string]string{}}
	w := &files.Walk{Top: top, Set: srv, Out: o, Known: func() (files.Known, bool, error) { return files.Known{}, false, nil }}
	if err := w.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o *taken) asData() *prerecover.Data {
	now := time.Now()
	return &prerecover.Data{Snapshot: "snap-d", Taken: now, Image: "snap-i", Before: now.Add(-24 * time.Hour), Set: srv,
		Each: func(_ context.Context, each func(*fileset.Entry, func() (io.ReadCloser, error)) error) error {
			for i := range o.all {
				e := &o.all[i]
				err := each(e, func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(o.data[e.Path])), nil })
				if err != nil {
					return err
				}
			}
			return nil
		}}
}

// mounted mounts the system's partition of a raw image by the host's kernel: these images are our own.
func mounted(t *testing.T, img, options string) string {
	t.Helper()
	dir := t.TempDir()
	run(t, "mount", "-o", "loop,offset=2097152"+options, img, dir)
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

var accessList = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\x21\x00\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"

// days is what happens on a server after its image was taken.
func days(t *testing.T, srv string) {
	t.Helper()
	must(t,
		os.WriteFile(srv+"/many/f007", []byte("changed in place"), 0o644), os.Remove(srv+"/many/f008"), os.Rename(srv+"/old", srv+"/renamed"),
		os.RemoveAll(srv+"/gone"), os.RemoveAll(srv+"/becomes-link"), os.Symlink("/etc", srv+"/becomes-link"),
		os.Remove(srv+"/becomes-folder"), os.MkdirAll(srv+"/becomes-folder/in", 0o750), os.WriteFile(srv+"/becomes-folder/in/x", []byte("x"), 0o600),
		os.WriteFile(srv+"/\xff\xfe\n'\"$(x)", []byte("bytes"), 0o600), os.WriteFile(srv+"/"+strings.Repeat("n", 255), nil, 0o600),
		os.WriteFile(srv+"/setuid", []byte("suid"), 0o600), os.Lchown(srv+"/setuid", 1234, 4321), unix.Chmod(srv+"/setuid", 0o6755),
		os.Link(srv+"/many/f009", srv+"/new-name"), os.Symlink("\xff dangling", srv+"/dangling"), unix.Mkfifo(srv+"/fifo", 0o622),
		unix.Mknod(srv+"/dev", unix.S_IFBLK|0o660, int(unix.Mkdev(7, 300))), os.Chmod(srv+"/many/f010", 0o400),
		os.WriteFile(srv+"/acl", []byte("a"), 0o640))
	f, err := os.Create(srv + "/sparse")
	must(t, err, f.Truncate(3<<30))
	_, err = f.WriteAt([]byte("in the middle"), 1<<30)
	must(t, err, f.Close())
	for _, a := range [][3]string{{"acl", "system.posix_acl_access", accessList}, {"acl", "user.a=b%", "x\x00\xff"}, {"dangling", "trusted.x", "on a link"},
		{"setuid", "security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"acl", "security.selinux", "system_u:object_r:var_t:s0"}, {"many", "system.posix_acl_default", accessList}} {
		must(t, unix.Lsetxattr(srv+"/"+a[0], a[1], []byte(a[2]), 0))
	}
	past := unix.Timespec{Sec: -1000, Nsec: 123456789}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, srv+"/acl", []unix.Timespec{past, past}, unix.AT_SYMLINK_NOFOLLOW))
}

func TestTheNewestDataGoesIntoTheImage(t *testing.T) {
	needReal(t)
	root := system(t)
	put := func(name, content string) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Dir(root+"/srv/"+name), 0o755), os.WriteFile(root+"/srv/"+name, []byte(content), 0o644))
	}
	for i := range 400 {
		put(fmt.Sprintf("many/f%03d", i), strings.Repeat("x", i))
	}
	for _, n := range []string{"old/a", "gone/b/c", "becomes-link/d", "becomes-folder", "kept.tmp", "gone.d/e"} {
		put(n, n)
	}
	img := disk(t, root, 1<<30)
	server := filepath.Join(t.TempDir(), "server.img")
	run(t, "cp", "--sparse=always", img, server)
	top := mounted(t, server, "")
	days(t, top+"/srv")
	want := walkSrv(t, top)
	base := vm.Layer{Path: img, Format: "raw"}
	req := prerecover.Request{ID: "pre-1", Dir: t.TempDir(), Base: []vm.Layer{base}, Agent: []byte("\x7fELF agent"), Data: want.asData(),
		Snapshot: dr.Snapshot{ID: "snap-d", ServerID: "srv-1", Server: "shop", Disks: []dr.SnapshotDisk{{Name: "sda"}}, Inventory: serverNIC}}
	driver := guestfs.Driver{Work: t.TempDir(), Cache: cache(t)}
	c := &clock{t: t, name: "data"}
	p, err := prerecover.Run(t.Context(), driver, req, c.report)
	c.stop()
	if err != nil {
		t.Fatal(err)
	}
	d := p.Data
	t.Logf("merged %+v", d)
	if d.Entries != int64(len(want.all)) || d.Written < 6 || d.Written > 12 || d.Removed != 5 || d.Bytes > 1<<20 {
		t.Errorf("merged %+v", d)
	}

	// What is on the disk that boots is what was on the server, entry by entry.
	whole := filepath.Join(t.TempDir(), "whole.raw")
	run(t, "qemu-img", "convert", "-O", "raw", attach(t, p.Deltas[0], base).Path, whole)
	out, err := exec.Command("sh", "-c", "losetup -f --show -o 2097152 "+whole+" | { read d; e2fsck -fn $d; s=$?; losetup -d $d; exit $s; }").CombinedOutput()
	if err != nil {
		t.Errorf("the file system is not clean: %v\n%s", err, out)
	}
	booted := mounted(t, whole, ",ro,noload")
	got := walkSrv(t, booted)
	if len(got.all) != len(want.all) {
		t.Errorf("%d entries, want %d", len(got.all), len(want.all))
	}
	for i := range min(len(got.all), len(want.all)) {
		g, w := got.all[i], want.all[i]
		for _, e := range []*fileset.Entry{&g, &w} {
			e.Inode, e.Dev, e.Ctime, e.Recent = 0, 0, fileset.Time{}, false
		}
		if g.Kind == fileset.Link || g.Kind == fileset.Symlink {
			g.Mode, w.Mode = 0, 0
		}
		if !g.Equal(&w) || got.data[g.Path] != want.data[w.Path] {
			t.Errorf("%q is\n%+v (%d bytes), want\n%+v (%d bytes)", w.Path, g, len(got.data[g.Path]), w, len(want.data[w.Path]))
		}
	}
	if b, err := os.ReadFile(booted + "/srv/kept.tmp"); err != nil || string(b) != "kept.tmp" {
		t.Errorf("what is left out of the data was not left alone: %q, %v", b, err)
	}

	// Data for which there is no room is refused, and says so.
	big := *want
	big.all = append(big.all[:len(big.all):len(big.all)], fileset.Entry{Kind: fileset.File, Path: "/srv/\xff\xff", Size: 5 << 30})
	req.Dir, req.Data = t.TempDir(), big.asData()
	_, err = prerecover.Run(t.Context(), driver, req, nil)
	if !errors.Is(err, prerecover.ErrNotRescuable) || !strings.Contains(err.Error(), "does not fit into the image") {
		t.Errorf("error = %v", err)
	}
	if left, _ := filepath.Glob(req.Dir + "/*"); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
