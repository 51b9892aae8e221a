package guestfs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/files"
	"github.com/musterdr/muster/internal/fileset"
)

// What the appliance's tar, which is that of the host, writes of a folder when tar-out asks for owners as numbers and for attributes.
func TestATarOfAFolderIsReadWithNothingLost(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may set labels")
	}
	const evil = "\x1b[31m..\nevil'\"$(x)\xff"
	list := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\x21\x00\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
	long := string(bytes.Repeat([]byte("n"), 200))
	dir := t.TempDir()
	for _, name := range []string{"page", evil, "sub/" + long} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755), os.WriteFile(filepath.Join(dir, name), []byte("in "+name), 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	page := filepath.Join(dir, "page")
	want := []fileset.Attr{{Name: "security.selinux", Value: "system_u:object_r:var_t:s0\x00"}, {Name: "system.posix_acl_access", Value: list}, {Name: "user.a=b%c", Value: "x\x00\n=y"}}
	for _, a := range want {
		if err := unix.Lsetxattr(page, a.Name, []byte(a.Value), 0); err != nil {
			t.Skipf("this file system keeps no %s: %v", a.Name, err)
		}
	}
	if err := errors.Join(os.Link(page, filepath.Join(dir, "sub/again")), os.Symlink("page", filepath.Join(dir, "link")), os.Truncate(filepath.Join(dir, evil), 3<<20)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("tar", "-C", dir, "--numeric-owner", "--xattrs", "-cf", "-", ".")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	stream, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	seen, content := map[string]files.Member{}, map[string]int{}
	err = members(bytes.NewReader(stream), "/srv", func(m files.Member, r io.Reader) error {
		data, err := io.ReadAll(r)
		seen[m.Path], content[m.Path] = m, len(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"/srv", "/srv/page", "/srv/link", "/srv/sub", "/srv/sub/again", "/srv/sub/" + long, "/srv/" + evil} {
		if seen[name].Path != name {
			t.Errorf("%q is not there", name)
		}
	}
	if len(seen) != 7 || seen["/srv"].File || seen["/srv/link"].File || content["/srv/"+evil] != 3<<20 || seen["/srv/"+evil].Size != 3<<20 {
		t.Errorf("%d names: %+v", len(seen), seen)
	}
	first, again := seen["/srv/page"], seen["/srv/sub/again"]
	if first.Again != "" {
		first, again = again, first
	}
	if !first.File || again.File || again.Again != first.Path || !slices.Equal(first.Attrs, want) {
		t.Errorf("%+v and %+v", first, again)
	}
}
