package guestfs_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/disk"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/files"
	"github.com/musterdr/muster/internal/files/guestfs"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// counting says how often an image was opened.
type counting struct {
	files.Opener
	opened int
	slow   bool // folders are read file by file
	gave   int  // names that came out of folders
	read   int  // files that were read by themselves
}

func (c *counting) Open(ctx context.Context, disks []files.Disk) (files.Guest, error) {
	c.opened++
	g, err := c.Opener.Open(ctx, disks)
	return &counted{g, c}, err
}

type counted struct {
	files.Guest
	c *counting
}

func (g *counted) Folder(ctx context.Context, path string, each func(files.Member, io.Reader) error) error {
	if g.c.slow {
		return nil
	}
	return g.Guest.Folder(ctx, path, func(m files.Member, content io.Reader) error {
		g.c.gave++
		return each(m, content)
	})
}

func (g *counted) Read(ctx context.Context, path string, w io.Writer) error {
	g.c.read++
	return g.Guest.Read(ctx, path, w)
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

const (
	mib      = 1 << 20
	rootUUID = "0b5c1f5e-0000-4000-8000-000000000001"
	dataUUID = "0b5c1f5e-0000-4000-8000-000000000002"
	evil     = "\x1b[31m..\nevil'\"$(x)\xff"
	label    = "system_u:object_r:var_t:s0\x00"
)

var accessList = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\x21\x00\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"

// machine makes a disk with a small system on ext4, its /srv on XFS, /opt on ext4 in a logical volume and /data in a subvolume of
// btrfs, and two file systems that it does not mount, NTFS and FAT.
func machine(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	write := func(name, content string) {
		t.Helper()
		must(t, os.MkdirAll(filepath.Dir(root+name), 0o755), os.WriteFile(root+name, []byte(content), 0o644))
	}
	for _, d := range []string{"/bin", "/srv", "/opt", "/data", "/proc", "/var/many"} {
		must(t, os.MkdirAll(root+d, 0o755))
	}
	write("/etc/fstab", "UUID="+rootUUID+" / ext4 defaults 0 1\nUUID="+dataUUID+" /srv xfs defaults 0 2\n/dev/vg0/opt /opt ext4 defaults 0 2\nLABEL=data /data btrfs subvol=@data 0 0\n")
	write("/etc/os-release", "ID=debian\nVERSION_ID=\"12\"\nPRETTY_NAME=\"Debian\"\n")
	write("/etc/debian_version", "12.5\n")
	write("/etc/hostname", "shop\n")
	write("/home/anna/budget.xls", "last week's")
	write("/home/anna/"+evil, "evil")
	for i := range 300 {
		content := "" // which has not to be read: reading file by file takes a fifth of a second for each
		if i%10 == 0 {
			content = "x"
		}
		write("/var/many/"+strings.Repeat("f", 1+i%200)+string(rune('a'+i%26)), content)
	}
	must(t, os.Link(root+"/home/anna/budget.xls", root+"/home/anna/second"), os.Symlink("../etc\n", root+"/home/anna/link"), os.Symlink("/etc/shadow", root+"/home/anna/plain"),
		os.Chown(root+"/home/anna/budget.xls", 1000, 1001), os.Chmod(root+"/home/anna/budget.xls", 0o640))
	must(t, unix.Lsetxattr(root+"/home/anna/budget.xls", "user.color", []byte("a\\x41"), 0), unix.Lsetxattr(root+"/home/anna/budget.xls", "system.posix_acl_access", []byte(accessList), 0),
		unix.Lsetxattr(root+"/home/anna/budget.xls", "security.selinux", []byte(label), 0))
	old := time.Date(2024, 3, 1, 12, 0, 0, 0, time.UTC)
	must(t, os.Chtimes(root+"/home/anna/budget.xls", old, old))
	f, err := os.Create(root + "/home/anna/sparse")
	must(t, err, f.Truncate(30*mib))
	_, err = f.WriteAt([]byte("in the middle"), 10*mib)
	must(t, err, f.Close())

	part := func(n string) string { return filepath.Join(dir, n) }
	run(t, "mke2fs", "-q", "-t", "ext4", "-U", rootUUID, "-d", root, "-E", "root_owner=0:0", part("root.img"), "64M")
	run(t, "truncate", "-s", "320M", part("srv.img"))
	must(t, os.WriteFile(part("page"), []byte("<html>"), 0o600), os.WriteFile(part("proto"), []byte("/dev/null\n0 0\nd--755 0 0\nwww d--755 33 33\nindex.html ---644 33 33 "+part("page")+"\n$\n$\n"), 0o600))
	run(t, "mkfs.xfs", "-q", "-m", "uuid="+dataUUID, "-p", part("proto"), part("srv.img"))
	run(t, "truncate", "-s", "20M", part("win.img"), part("usb.img"))
	run(t, "mkntfs", "-q", "-F", part("win.img"))
	run(t, "ntfscp", "-f", part("win.img"), part("page"), "Grüße.txt")
	run(t, "mkfs.vfat", part("usb.img"))
	run(t, "mcopy", "-i", part("usb.img"), part("page"), "::photo.jpg")

	disk := part("disk.img")
	run(t, "truncate", "-s", "640M", disk)
	table := exec.Command("sfdisk", "-q", disk)
	table.Stdin = strings.NewReader("label: gpt\nstart=2048,size=131072\nstart=133120,size=655360\nstart=788480,size=40960\nstart=829440,size=40960\nstart=870400,size=65536\nstart=935936,size=327680\n")
	if out, err := table.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, sector := range map[string]string{"root.img": "2048", "srv.img": "133120", "win.img": "788480", "usb.img": "829440"} {
		run(t, "dd", "if="+part(name), "of="+disk, "bs=512", "seek="+sector, "conv=notrunc,sparse", "status=none")
	}
	// This host's kernel may know neither volumes nor subvolumes, and its KVM may not work.
	t.Setenv("LIBGUESTFS_BACKEND", "direct")
	t.Setenv("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
	run(t, "guestfish", "--rw", "--format=raw", "-a", disk, "run",
		":", "pvcreate", "/dev/sda5", ":", "vgcreate", "vg0", "/dev/sda5", ":", "lvcreate", "opt", "vg0", "16",
		":", "mkfs", "ext4", "/dev/vg0/opt", ":", "mount", "/dev/vg0/opt", "/", ":", "write", "/tool", "in a volume", ":", "umount", "/",
		":", "mkfs", "btrfs", "/dev/sda6", "label:data", ":", "mount", "/dev/sda6", "/", ":", "write", "/outside", "not mounted",
		":", "btrfs-subvolume-create", "/@data", ":", "write", "/@data/table", "in a subvolume", ":", "lsetxattr", "user.of", "btrfs", "5", "/@data/table")
	return disk
}

func TestAnImageIsBrowsedAsItsSystemShowsIt(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root, libguestfs and file system tools: set MUSTER_REAL=1")
	}
	ctx := t.Context()
	driver := folder.Driver{Path: filepath.Join(t.TempDir(), "store")}
	must(t, store.Create(ctx, driver, "p"))
	st, err := store.Open(ctx, driver, "p")
	must(t, err)
	t.Cleanup(func() { st.Close(context.Background()) })
	src, err := disk.Open([]string{machine(t)})
	must(t, err)
	snap, err := capture.Take(ctx, src, st, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: "srv-1", Name: "shop"}}, nil)
	must(t, err, src.Close())

	cache := os.Getenv("MUSTER_GUESTFS_CACHE")
	if cache == "" {
		cache = filepath.Join(os.TempDir(), "muster-guestfs-cache")
	}
	sockets, err := os.MkdirTemp("", "f")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(sockets) })
	opener := &counting{Opener: guestfs.Driver{Work: t.TempDir(), Cache: cache}}
	browser := func() *files.Browser { return files.New(st, opener, sockets) }
	b := browser()
	began := time.Now()
	list := func(path string) string {
		t.Helper()
		l, err := b.List(ctx, api.FilesQuery{Server: "shop", Path: path})
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range l.Files {
			names = append(names, strings.TrimPrefix(f.Path, path))
		}
		return strings.Join(append(names, l.Notes...), " ")
	}
	first := list("/")
	t.Logf("the first look took %s: %s", time.Since(began), first)
	if want := "@sda3 @sda4 bin data etc home lost+found opt proc srv var"; first != want {
		t.Errorf("/ holds %s, want %s", first, want)
	}
	// From here on nothing is opened, also by another process.
	same := b
	b = browser()
	began = time.Now()
	for path, want := range map[string]string{"/srv": "/www", "/srv/www": "/index.html", "/opt": "/lost+found /tool", "/data": "/table", "/@sda3": "/Grüße.txt", "/@sda4": "/photo.jpg",
		"/home/anna": `/\x1b[31m..\x0aevil'"$(x)\xff /budget.xls /link /plain /second /sparse`} {
		if got := list(path); got != want {
			t.Errorf("%s holds %q, want %q", path, got, want)
		}
	}
	t.Logf("five more listings took %s", time.Since(began))
	found, err := b.Find(ctx, api.FindQuery{Server: "shop", Pattern: "*.xls"})
	if err != nil || len(found.Found) != 1 || found.Found[0].Path != "/home/anna/budget.xls" || len(found.Unseen) != 0 {
		t.Errorf("found %+v, %v", found, err)
	}
	if f := found.Found[0]; f.Mode != "0660" || f.UID != 1000 || f.GID != 1001 || f.Size != 11 || f.Modified.Unix() != 1709294400 {
		t.Errorf("it is %+v", f)
	}
	must(t, b.Close())

	began, b = time.Now(), same
	for path, want := range map[string]string{"/home/anna/budget.xls": "last week's", "/srv/www/index.html": "<html>", "/opt/tool": "in a volume", "/data/table": "in a subvolume", "/@sda3/Grüße.txt": "<html>", "/@sda4/photo.jpg": "<html>",
		`/home/anna/\x1b[31m..\x0aevil'"$(x)\xff`: "evil", "/home/anna/sparse": strings.Repeat("\x00", 10*mib) + "in the middle" + strings.Repeat("\x00", 20*mib-13)} {
		var got bytes.Buffer
		if err := b.Get(ctx, api.GetQuery{Server: "shop", Path: path}, &got); err != nil || got.String() != want {
			t.Errorf("%s: %d bytes, %v", path, got.Len(), err)
		}
	}
	for path, want := range map[string]api.Kind{"/home": api.Invalid, "/home/anna/link": api.Invalid, "/nothing": api.NotFound, "/home/../etc/passwd": api.Invalid} {
		if err := b.Get(ctx, api.GetQuery{Server: "shop", Path: path}, io.Discard); api.KindOf(err) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
	t.Logf("reading ten files took %s", time.Since(began))
	var stream bytes.Buffer
	must(t, b.Get(ctx, api.GetQuery{Server: "shop", Path: "/home/anna", Tar: true}, &stream))
	checkTar(t, &stream)

	// Everything at once is the same as file by file.
	var whole [2]map[string]string
	for i, slow := range []bool{false, true} {
		opener.slow, opener.read = slow, 0
		stream.Reset()
		began = time.Now()
		must(t, b.Get(ctx, api.GetQuery{Server: "shop", Path: "/", Tar: true}, &stream))
		whole[i] = described(t, &stream)
		t.Logf("a tar of %d names took %s, %d files by themselves: %v", len(whole[i]), time.Since(began), opener.read, slow)
		if slow != (opener.read > 20) {
			t.Errorf("%d files were read by themselves, with file by file %v", opener.read, slow)
		}
	}
	for name, want := range whole[1] {
		if got := whole[0][name]; got != want {
			t.Errorf("%q at once is %.300q, by itself %.300q", name, got, want)
		}
	}
	if opener.gave < 200 {
		t.Errorf("only %d names came out of folders at once", opener.gave)
	}
	if len(whole[0]) != len(whole[1]) || len(whole[0]) < 200 || whole[0]["data/table"] == "" {
		t.Errorf("%d names at once, %d one by one", len(whole[0]), len(whole[1]))
	}
	must(t, b.Close())
	if opener.opened != 1 {
		t.Errorf("the image was opened %d times", opener.opened)
	}
	if left, _ := os.ReadDir(sockets); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}

	// The index goes with the snapshot.
	must(t, st.Forget(ctx, snap.ID))
	if kept, err := st.Kept(ctx, snap.ID); len(kept) > 0 {
		t.Errorf("kept without its snapshot: %v, %v", kept, err)
	}
}

// described says of every name in a tar stream all that there is to say. Of names of one file it does not matter which comes first.
func described(t *testing.T, stream io.Reader) map[string]string {
	t.Helper()
	out, first := map[string]string{}, map[string]string{}
	linked := map[string][]string{}
	for r := tar.NewReader(stream); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		if h.Typeflag == tar.TypeLink {
			first[h.Name] = h.Linkname
			linked[h.Linkname] = append(linked[h.Linkname], h.Name)
			continue
		}
		text := fmt.Sprintf("%c %o %d:%d %s %s %d,%d %x", h.Typeflag, h.Mode, h.Uid, h.Gid, h.ModTime, h.Linkname, h.Devmajor, h.Devminor, sha256.Sum256(data))
		for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
			if strings.HasPrefix(key, "SCHILY.") || strings.HasPrefix(key, "GNU.sparse") {
				text += fmt.Sprintf(" %s=%q", key, h.PAXRecords[key])
			}
		}
		out[h.Name] = text
	}
	for name, target := range first {
		if out[target] == "" {
			t.Errorf("%q is a link to %q, which is not there", name, target)
		}
	}
	for target, names := range linked {
		names = append(names, target)
		slices.Sort(names)
		// A sparse file's own name is among its records.
		text := strings.ReplaceAll(out[target], target, names[0]) + fmt.Sprintf(" names %q", names)
		for _, name := range names {
			out[name] = text
		}
	}
	return out
}

func checkTar(t *testing.T, stream *bytes.Buffer) {
	t.Helper()
	if stream.Len() > 4*mib {
		t.Errorf("holes are written out: %d bytes", stream.Len())
	}
	var names []string
	for r := tar.NewReader(stream); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		names = append(names, h.Name)
		switch h.Name {
		case "anna/budget.xls":
			if string(data) != "last week's" || h.Uid != 1000 || h.Mode != 0o660 || h.ModTime.Unix() != 1709294400 || h.PAXRecords["SCHILY.xattr.user.color"] != `a\x41` ||
				h.PAXRecords["SCHILY.xattr.system.posix_acl_access"] != accessList || h.PAXRecords["SCHILY.xattr.security.selinux"] != label {
				t.Errorf("%+v %q", h, data)
			}
		case "anna/second":
			if h.Typeflag != tar.TypeLink || h.Linkname != "anna/budget.xls" {
				t.Errorf("%+v", h)
			}
		case "anna/link":
			if h.Linkname != "../etc\n" {
				t.Errorf("%+v", h)
			}
		case "anna/sparse":
			if len(data) != 30*mib || string(data[10*mib:10*mib+13]) != "in the middle" {
				t.Errorf("sparse has %d bytes", len(data))
			}
		}
	}
	if want := []string{"anna", "anna/" + evil, "anna/budget.xls", "anna/link", "anna/plain", "anna/second", "anna/sparse"}; !slices.Equal(names, want) {
		t.Errorf("%q, want %q", names, want)
	}
}
