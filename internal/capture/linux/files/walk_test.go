package files

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/fileset"
)

// took is what a walk gave, put together as an appliance would.
type took struct {
	t       *testing.T
	before  []kept
	at      int
	all     []kept
	piece   []byte
	again   int
	changed []string
}

type kept struct {
	e    *fileset.Entry
	data string
}

func (k *took) Same(n int64) error {
	k.all = append(k.all, k.before[k.at:k.at+int(n)]...)
	k.at += int(n)
	return nil
}
func (k *took) Gone(n int64) error   { k.at += int(n); return nil }
func (k *took) Piece(b []byte) error { k.piece = append(k.piece, b...); return nil }
func (k *took) Again() error         { k.piece, k.again = nil, k.again+1; return nil }
func (k *took) Entry(e *fileset.Entry) error {
	if k.at < len(k.before) {
		switch order := fileset.Compare(k.before[k.at].e.Path, e.Path); {
		case order == 0:
			k.at++
		case order < 0:
			k.t.Errorf("%q comes while %q was not dealt with", e.Path, k.before[k.at].e.Path)
		}
	}
	back, rest, err := fileset.Decode(e.AppendBinary(nil))
	if err != nil || len(rest) > 0 || int64(len(k.piece)) != e.Stored() {
		k.t.Errorf("entry %+v with %d bytes: %v", e, len(k.piece), err)
	}
	k.all = append(k.all, kept{&back, string(k.piece)})
	k.changed = append(k.changed, e.Path)
	k.piece = nil
	return nil
}

// walk walks dir/srv with what was taken before.
func walk(t *testing.T, dir string, before []kept, set func(*Walk)) (*took, *Walk) {
	t.Helper()
	k := &took{t: t, before: before}
	next := 0
	w := &Walk{Top: dir, Set: fileset.Set{Roots: []string{"/srv"}}, Out: k, Settle: time.Nanosecond, Known: func() (Known, bool, error) {
		if next == len(before) {
			return Known{}, false, nil
		}
		next++
		e := before[next-1].e
		return Known{Path: e.Path, Identity: e.Identity()}, true, nil
	}}
	if set != nil {
		set(w)
	}
	if err := w.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	check := fileset.Checker{Set: w.Set}
	for _, x := range k.all {
		if err := check.Next(x.e); err != nil {
			t.Error(err)
		}
	}
	if k.at != len(before) && next == len(before) {
		t.Errorf("%d of %d known entries were dealt with", k.at, len(before))
	}
	return k, w
}

func (k *took) entry(path string) kept {
	k.t.Helper()
	i := slices.IndexFunc(k.all, func(x kept) bool { return x.e.Path == path })
	if i < 0 {
		k.t.Fatalf("%q is not there", path)
	}
	return k.all[i]
}

func (k *took) paths() (out []string) {
	for _, x := range k.all {
		out = append(out, x.e.Path)
	}
	return out
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// folder is a place whose file system keeps attributes.
func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if os.Getuid() != 0 {
		t.Skip("only root may make what is to be read")
	}
	must(t, os.MkdirAll(dir+"/srv", 0o755))
	return dir
}

var acl = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\x21\x00\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"

// nasty makes one of everything.
func nasty(t *testing.T, srv string) {
	t.Helper()
	long := strings.Repeat("n", 255)
	must(t,
		os.WriteFile(srv+"/plain", []byte("hello"), 0o640),
		os.WriteFile(srv+"/empty", nil, 0),
		os.WriteFile(srv+"/"+long, []byte("long"), 0o600),
		os.WriteFile(srv+"/\xff\xfe\x80", []byte("bytes"), 0o600),
		os.WriteFile(srv+"/new\nline\t\\\"'$(x)*", []byte("newline"), 0o600),
		os.WriteFile(srv+"/-rf", []byte("dash"), 0o600),
		os.WriteFile(srv+"/setuid", []byte("suid"), 0o600), os.Chown(srv+"/setuid", 1234, 4321), unix.Chmod(srv+"/setuid", 0o6755),
		os.Link(srv+"/plain", srv+"/zlink"),
		os.Symlink("/etc/passwd", srv+"/symlink"), os.Symlink("\xff dangling \n", srv+"/dangling"), os.Lchown(srv+"/symlink", 7, 8),
		unix.Mkfifo(srv+"/fifo", 0o622),
		unix.Mknod(srv+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), unix.Mknod(srv+"/loop", unix.S_IFBLK|0o660, int(unix.Mkdev(7, 300))),
		unix.Mknod(srv+"/socket", unix.S_IFSOCK|0o666, 0),
		os.MkdirAll(srv+"/dir/deep/er", 0o700), unix.Chmod(srv+"/dir", 0o3775), os.WriteFile(srv+"/dir.x", nil, 0o600), os.WriteFile(srv+"/dir/a", []byte("a"), 0o600),
	)
	f, err := os.Create(srv + "/sparse")
	must(t, err, f.Truncate(1<<40))
	_, e1 := f.WriteAt([]byte("begin"), 1<<20)
	_, e2 := f.WriteAt([]byte("end"), 1<<40-3)
	must(t, e1, e2, f.Close())
	f, err = os.Create(srv + "/hole")
	must(t, err, f.Truncate(12345), f.Close())
	for _, a := range []struct{ file, name, value string }{
		{"plain", "user.note", "a\x00b\xff"}, {"plain", "user.empty", ""}, {"plain", "user.a=b", "eq"}, {"plain", "system.posix_acl_access", acl}, {"dir", "system.posix_acl_default", acl},
		{"setuid", "security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"},
		{"symlink", "trusted.link", "on a link"}, {"fifo", "trusted.pipe", "on a pipe"}, {"symlink", "security.selinux", "system_u:object_r:etc_t:s0"},
	} {
		if err := unix.Lsetxattr(srv+"/"+a.file, a.name, []byte(a.value), 0); err != nil {
			t.Fatalf("set %s of %s: %v", a.name, a.file, err)
		}
	}
	for file, at := range map[string]unix.Timespec{"plain": {Sec: -86400*365*10 - 1, Nsec: 123456789}, "symlink": {Sec: 1, Nsec: 1}, "dir": {Sec: 1 << 32, Nsec: 999999999}} {
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, srv+"/"+file, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

func TestEverythingLinuxKeepsOfAFileIsRead(t *testing.T) {
	dir := folder(t)
	nasty(t, dir+"/srv")
	k, w := walk(t, dir, nil, nil)
	long := "/srv/" + strings.Repeat("n", 255)
	for path, want := range map[string]kept{
		"/srv/-rf":   {&fileset.Entry{Kind: fileset.File, Mode: 0o600, Size: 4}, "dash"},
		"/srv/plain": {&fileset.Entry{Kind: fileset.File, Mode: 0o660, Size: 5, Mtime: fileset.Time{Sec: -86400*365*10 - 1, Nsec: 123456789}, Attrs: []fileset.Attr{{Name: "system.posix_acl_access", Value: acl}, {Name: "user.a=b", Value: "eq"}, {Name: "user.empty"}, {Name: "user.note", Value: "a\x00b\xff"}}}, "hello"},
		"/srv/empty": {&fileset.Entry{Kind: fileset.File}, ""},
		long:         {&fileset.Entry{Kind: fileset.File, Mode: 0o600, Size: 4}, "long"}, "/srv/\xff\xfe\x80": {&fileset.Entry{Kind: fileset.File, Mode: 0o600, Size: 5}, "bytes"},
		"/srv/new\nline\t\\\"'$(x)*": {&fileset.Entry{Kind: fileset.File, Mode: 0o600, Size: 7}, "newline"},
		"/srv/setuid":                {&fileset.Entry{Kind: fileset.File, Mode: 0o6755, UID: 1234, GID: 4321, Size: 4, Attrs: []fileset.Attr{{Name: "security.capability", Value: "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}}}, "suid"},
		"/srv/zlink":                 {&fileset.Entry{Kind: fileset.Link, Mode: 0o660, Target: "/srv/plain"}, ""},
		"/srv/symlink":               {&fileset.Entry{Kind: fileset.Symlink, Mode: 0o777, UID: 7, GID: 8, Target: "/etc/passwd", Mtime: fileset.Time{Sec: 1, Nsec: 1}, Attrs: []fileset.Attr{{Name: "security.selinux", Value: "system_u:object_r:etc_t:s0"}, {Name: "trusted.link", Value: "on a link"}}}, ""},
		"/srv/dangling":              {&fileset.Entry{Kind: fileset.Symlink, Mode: 0o777, Target: "\xff dangling \n"}, ""},
		"/srv/fifo":                  {&fileset.Entry{Kind: fileset.NamedPipe, Mode: 0o600, Attrs: []fileset.Attr{{Name: "trusted.pipe", Value: "on a pipe"}}}, ""},
		"/srv/null":                  {&fileset.Entry{Kind: fileset.CharDev, Major: 1, Minor: 3}, ""},
		"/srv/loop":                  {&fileset.Entry{Kind: fileset.BlockDev, Major: 7, Minor: 300}, ""},
		"/srv/dir":                   {&fileset.Entry{Kind: fileset.Folder, Mode: 0o3775, Mtime: fileset.Time{Sec: 1 << 32, Nsec: 999999999}, Attrs: []fileset.Attr{{Name: "system.posix_acl_default", Value: acl}}}, ""},
		"/srv/sparse":                {&fileset.Entry{Kind: fileset.File, Mode: 0o644, Size: 1 << 40, Sparse: true}, ""},
		"/srv/hole":                  {&fileset.Entry{Kind: fileset.File, Mode: 0o644, Size: 12345, Sparse: true}, ""},
	} {
		got := k.entry(path)
		e := *got.e
		var st unix.Stat_t
		must(t, unix.Lstat(dir+path, &st))
		if want.e.Mtime == (fileset.Time{}) {
			want.e.Mtime = fileset.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}
		}
		want.e.Path, want.e.Inode, want.e.Dev, want.e.Ctime = path, st.Ino, st.Dev, fileset.Time{Sec: st.Ctim.Sec, Nsec: uint32(st.Ctim.Nsec)}
		want.e.Mode = st.Mode & 0o7777
		if path == "/srv/zlink" && len(e.Attrs) > 0 {
			t.Errorf("%s has attributes of its own", path)
		}
		if path == "/srv/sparse" {
			var all string
			for _, x := range e.Data {
				if x.Length > 1<<20 {
					t.Errorf("a hole was read: %+v", e.Data)
				}
			}
			all, e.Data = got.data, nil
			if !strings.Contains(all, "begin") || !strings.HasSuffix(all, "end") {
				t.Errorf("the data of a sparse file: %d bytes", len(all))
			}
			got.data = ""
		}
		if !reflect.DeepEqual(e, *want.e) || got.data != want.data {
			t.Errorf("%q is\n%+v %q, want\n%+v %q", path, e, got.data, *want.e, want.data)
		}
	}
	if slices.Contains(k.paths(), "/srv/socket") || len(w.Notes()) != 1 || !strings.Contains(w.Notes()[0], "1 sockets") {
		t.Errorf("notes %q", w.Notes())
	}

	// Nothing changed: nothing is read.
	again, w := walk(t, dir, k.all, nil)
	if len(again.changed) > 0 || w.Read > 0 || w.Files > 0 || len(again.all) != len(k.all) {
		t.Errorf("changed %q, %d bytes were read", again.changed, w.Read)
	}
}

func TestOnlyWhatChangedIsRead(t *testing.T) {
	dir := folder(t)
	srv := dir + "/srv"
	must(t, os.MkdirAll(srv+"/a/sub", 0o755), os.MkdirAll(srv+"/b", 0o755), os.MkdirAll(srv+"/swap", 0o755))
	for i := range 50 {
		must(t, os.WriteFile(fmt.Sprintf("%s/a/f%02d", srv, i), fmt.Appendf(nil, "file %d", i), 0o644), os.WriteFile(fmt.Sprintf("%s/b/f%02d", srv, i), []byte("b"), 0o644))
	}
	first, _ := walk(t, dir, nil, nil)
	info, err := os.Stat(srv + "/a/f10")
	must(t, err,
		os.WriteFile(srv+"/a/f10", []byte("FILE 10"), 0o644), os.Chtimes(srv+"/a/f10", info.ModTime(), info.ModTime()), // same size and time as before
		os.Remove(srv+"/a/f20"), os.Rename(srv+"/a/f30", srv+"/a/sub/moved"), os.Chmod(srv+"/a/f40", 0o600), os.WriteFile(srv+"/a/new", []byte("new"), 0o600),
		os.RemoveAll(srv+"/b"), os.Symlink("a", srv+"/b"), os.Remove(srv+"/swap"), os.WriteFile(srv+"/swap", nil, 0o600))
	second, w := walk(t, dir, first.all, nil)
	want := []string{"/srv", "/srv/a", "/srv/a/f10", "/srv/a/f40", "/srv/a/new", "/srv/a/sub", "/srv/a/sub/moved", "/srv/b", "/srv/swap"}
	if !slices.Equal(second.changed, want) {
		t.Errorf("changed %q, want %q", second.changed, want)
	}
	if w.Files != 5 || w.Read != int64(len("FILE 10")+len("file 40")+len("new")+len("file 30")) {
		t.Errorf("%d files, %d bytes were read", w.Files, w.Read)
	}
	anew, _ := walk(t, dir, nil, nil)
	if !reflect.DeepEqual(anew.all, second.all) {
		t.Errorf("what changed and what is known are not what is there: %q, want %q", second.paths(), anew.paths())
	}
}

func TestAChangeTooRecentForTheClockIsReadAgain(t *testing.T) {
	dir := folder(t)
	must(t, os.WriteFile(dir+"/srv/a", []byte("x"), 0o644))
	first, _ := walk(t, dir, nil, func(w *Walk) { w.Settle = time.Hour })
	second, w := walk(t, dir, first.all, nil)
	if w.Read != 1 || len(second.changed) != 2 {
		t.Errorf("read %d bytes, changed %q", w.Read, second.changed)
	}
	if _, w = walk(t, dir, second.all, nil); w.Read != 0 {
		t.Errorf("read %d bytes once it had settled", w.Read)
	}
}

// busy changes something whenever a path is about to be opened.
func busy(path string, change func()) func(*Walk) {
	return func(w *Walk) {
		w.Opened = func(p string) {
			if p == path {
				change()
			}
		}
	}
}

func TestWhoeverSwapsThingsMeanwhileLeadsNobodyOutside(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.MkdirAll(secret, 0o755), os.WriteFile(secret+"/a", []byte("secret"), 0o644))
	for name, c := range map[string]struct {
		path   string
		change func(srv string) error
	}{
		"a folder becomes a link": {"/srv/d", func(srv string) error {
			return errors.Join(os.RemoveAll(srv+"/d"), os.Symlink(secret, srv+"/d"))
		}},
		"a file becomes a link": {"/srv/d/a", func(srv string) error {
			return errors.Join(os.RemoveAll(srv+"/d/a"), os.Symlink(secret+"/a", srv+"/d/a"))
		}},
		"a file becomes a pipe": {"/srv/d/a", func(srv string) error {
			return errors.Join(os.RemoveAll(srv+"/d/a"), unix.Mkfifo(srv+"/d/a", 0o600))
		}},
		"a folder moves away": {"/srv/d/a", func(srv string) error {
			return errors.Join(os.RemoveAll(srv+"/e"), os.Rename(srv+"/d", srv+"/e"), os.Symlink(secret, srv+"/d"))
		}},
		"a file vanishes":   {"/srv/d/a", func(srv string) error { return os.RemoveAll(srv + "/d/a") }},
		"a folder vanishes": {"/srv/d", func(srv string) error { return os.RemoveAll(srv + "/d") }},
	} {
		t.Run(name, func(t *testing.T) {
			dir := folder(t)
			srv := dir + "/srv"
			must(t, os.MkdirAll(srv+"/d", 0o755), os.WriteFile(srv+"/d/a", []byte("ok"), 0o644), os.WriteFile(srv+"/f", []byte("last"), 0o644))
			done := false
			change := func() {
				if !done {
					done = true
					must(t, c.change(srv))
				}
			}
			for _, before := range [][]kept{nil, {{&fileset.Entry{Kind: fileset.Folder, Path: "/srv"}, ""}, {&fileset.Entry{Kind: fileset.Folder, Path: "/srv/d"}, ""}, {&fileset.Entry{Kind: fileset.File, Path: "/srv/d/a"}, ""}, {&fileset.Entry{Kind: fileset.File, Path: "/srv/f"}, ""}}} {
				k, _ := walk(t, dir, before, busy(c.path, change))
				if !done {
					t.Fatal("nothing was swapped")
				}
				for _, x := range k.all {
					if strings.Contains(x.data, "secret") {
						t.Errorf("%s: %q was read", x.e.Path, x.data)
					}
				}
				if k.entry("/srv/f").data != "last" {
					t.Error("what follows was not read")
				}
			}
		})
	}
}

func TestWhatIsSwappedForEverIsLeftOutAndNamed(t *testing.T) {
	dir := folder(t)
	srv := dir + "/srv"
	must(t, os.WriteFile(srv+"/a", []byte("x"), 0o644))
	n := 0
	k, w := walk(t, dir, nil, busy("/srv/a", func() {
		if n++; n%2 == 1 {
			must(t, os.Remove(srv+"/a"), os.Symlink("x", srv+"/a"))
		} else {
			must(t, os.Remove(srv+"/a"), os.WriteFile(srv+"/a", nil, 0o644))
		}
	}))
	if slices.Contains(k.paths(), "/srv/a") || len(w.Notes()) != 1 || !strings.Contains(w.Notes()[0], `"/srv/a" became something else`) {
		t.Errorf("%q, notes %q", k.paths(), w.Notes())
	}
}

// growing is an Out that writes to the file that is being read.
type growing struct {
	*took
	path string
	stop int
}

func (g *growing) Piece(b []byte) error {
	if g.stop != 0 {
		g.stop--
		f, err := os.OpenFile(g.path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteString("more")
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return g.took.Piece(b)
}

func TestAFileThatChangesWhileItIsReadIsReadAgainAndNamedIfThatNeverEnds(t *testing.T) {
	for _, c := range []struct {
		stop, again int
		unstable    bool
	}{{1, 1, false}, {2, 2, false}, {-1, 2, true}} {
		dir := folder(t)
		must(t, os.WriteFile(dir+"/srv/log", []byte("begin"), 0o644))
		var k *took
		var w *Walk
		k, w = walk(t, dir, nil, func(w *Walk) { w.Out = &growing{took: w.Out.(*took), path: dir + "/srv/log", stop: c.stop} })
		got := k.entry("/srv/log")
		if k.again != c.again || got.e.Unstable != c.unstable || !strings.HasPrefix(got.data, "begin") || (len(w.Notes()) > 0) != c.unstable {
			t.Errorf("%d writes: read again %d times, unstable %v, %q, notes %q", c.stop, k.again, got.e.Unstable, got.data, w.Notes())
		}
		if c.unstable {
			if _, w := walk(t, dir, k.all, nil); w.Files != 1 {
				t.Error("a file that was never seen at rest was taken as known")
			}
		}
	}
	// One that is cut off meanwhile.
	dir := folder(t)
	must(t, os.WriteFile(dir+"/srv/log", bytes.Repeat([]byte("x"), 3*MaxPiece), 0o644))
	k, _ := walk(t, dir, nil, func(w *Walk) { w.Out = &cutting{w.Out.(*took), dir + "/srv/log"} })
	if got := k.entry("/srv/log"); got.e.Size != 10 || got.e.Unstable || len(got.data) != 10 {
		t.Errorf("a file that was cut off: %+v", got.e)
	}
}

type cutting struct {
	*took
	path string
}

func (c *cutting) Piece(b []byte) error {
	if c.again == 0 {
		must(c.t, os.Truncate(c.path, 10))
	}
	return c.took.Piece(b)
}

func TestExcludedNamesAndOtherFileSystemsAreLeftOut(t *testing.T) {
	dir := folder(t)
	srv := dir + "/srv"
	must(t, os.MkdirAll(srv+"/cache/x", 0o755), os.MkdirAll(srv+"/mem", 0o755), os.WriteFile(srv+"/a.tmp", nil, 0o600), os.WriteFile(srv+"/a", nil, 0o600))
	if err := unix.Mount("tmpfs", srv+"/mem", "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("mount: %v", err)
	}
	defer func() { must(t, unix.Unmount(srv+"/mem", 0)) }()
	must(t, os.WriteFile(srv+"/mem/a", nil, 0o600))
	k, w := walk(t, dir, nil, func(w *Walk) { w.Set.Exclude = []string{"*.tmp", "/srv/cache"} })
	if want := []string{"/srv", "/srv/a", "/srv/mem"}; !slices.Equal(k.paths(), want) || !k.entry("/srv/mem").e.Edge || len(w.Notes()) != 1 {
		t.Errorf("%q, notes %q", k.paths(), w.Notes())
	}
	// One that is named is read.
	k, _ = walk(t, dir, nil, func(w *Walk) { w.Set.Roots = []string{"/srv/mem"} })
	if want := []string{"/srv/mem", "/srv/mem/a"}; !slices.Equal(k.paths(), want) {
		t.Errorf("%q", k.paths())
	}
}

func TestARootThatIsNoFolderIsNamed(t *testing.T) {
	dir := folder(t)
	must(t, os.Symlink("srv", dir+"/link"), os.WriteFile(dir+"/srv/file", nil, 0o600))
	for root, word := range map[string]string{"/gone": "no such folder", "/link": "is a link", "/srv/file": "no folder", "/link/x": "is a link"} {
		w := &Walk{Top: dir, Set: fileset.Set{Roots: []string{root}}, Out: &took{t: t}, Known: func() (Known, bool, error) { return Known{}, false, nil }}
		if err := w.Run(t.Context()); err == nil || !strings.Contains(err.Error(), word) || !strings.Contains(err.Error(), root) {
			t.Errorf("%s: %v", root, err)
		}
	}
}

func TestNoDescriptorIsLeftOpen(t *testing.T) {
	dir := folder(t)
	nasty(t, dir+"/srv")
	open := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(names)
	}
	before := open()
	walk(t, dir, nil, nil)
	if after := open(); after != before {
		t.Errorf("%d descriptors are open, and were %d", after, before)
	}
}
