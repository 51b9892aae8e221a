package fileset_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/capture/linux/files"
	"github.com/musterdr/muster/internal/fileset"
)

// paxCase is an entry, its data without holes, and what it is when it is read back.
type paxCase struct {
	e    fileset.Entry
	data string
	back string
}

var paxCases = []paxCase{
	{fileset.Entry{Kind: fileset.Folder, Path: "/srv", Mode: 0o3775, Mtime: fileset.Time{Sec: 7}}, "", ""},
	{fileset.Entry{Kind: fileset.File, Path: "/srv/\xff\n=" + strings.Repeat("n", 250), Mode: 0o6755, UID: 4294967294, GID: 70000, Size: 5,
		Mtime: fileset.Time{Sec: -3, Nsec: 250_000_000}, Attrs: []fileset.Attr{{Name: "user.a=b%", Value: "x\x00\xff\n"}, {Name: "user.c"}}}, "hello", "hello"},
	{fileset.Entry{Kind: fileset.File, Path: "/srv/empty"}, "", ""},
	{fileset.Entry{Kind: fileset.File, Path: "/srv/acl", Mode: 0o660, Attrs: []fileset.Attr{{Name: "security.selinux", Value: "a:b:c:s0"}, {Name: "system.posix_acl_access", Value: paxACL}}}, "", ""},
	{fileset.Entry{Kind: fileset.Folder, Path: "/srv/default", Mode: 0o750, Attrs: []fileset.Attr{{Name: "system.posix_acl_default", Value: paxACL}}}, "", ""},
	{fileset.Entry{Kind: fileset.File, Path: "/srv/hole", Size: 3000, Sparse: true}, "", strings.Repeat("\x00", 3000)},
	{fileset.Entry{Kind: fileset.File, Path: "/srv/sparse", Size: 10, Sparse: true, Data: []fileset.Extent{{Offset: 1, Length: 2}, {Offset: 6, Length: 1}}}, "abc", "\x00ab\x00\x00\x00c\x00\x00\x00"},
	{fileset.Entry{Kind: fileset.File, Path: "/srv/sparse2", Size: 4, Sparse: true, Data: []fileset.Extent{{Offset: 2, Length: 2}}}, "ab", "\x00\x00ab"},
	{fileset.Entry{Kind: fileset.File, Path: "/srv/sparse3", Size: 5000, Sparse: true, Data: []fileset.Extent{{Offset: 600, Length: 10}, {Offset: 1000, Length: 2}, {Offset: 4096, Length: 904}}}, "0123456789ab" + strings.Repeat("x", 904),
		strings.Repeat("\x00", 600) + "0123456789" + strings.Repeat("\x00", 390) + "ab" + strings.Repeat("\x00", 3094) + strings.Repeat("x", 904)},
	{fileset.Entry{Kind: fileset.Link, Path: "/srv/t", Target: "/srv/sparse"}, "", ""},
	{fileset.Entry{Kind: fileset.Symlink, Path: "/srv/u", Target: "/etc/\xfe" + strings.Repeat("x", 300)}, "", ""},
	{fileset.Entry{Kind: fileset.CharDev, Path: "/srv/v", Major: 4095, Minor: 1<<20 - 1}, "", ""},
	{fileset.Entry{Kind: fileset.NamedPipe, Path: "/srv/w", Mode: 0o622}, "", ""},
}

const paxACL = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\x21\x00\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x06\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"

func paxStream(t *testing.T, cases []paxCase) []byte {
	t.Helper()
	var b bytes.Buffer
	p := fileset.NewTarWriter(&b)
	for i := range cases {
		if err := p.Entry(&cases[i].e, strings.NewReader(cases[i].data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.End(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestATarStreamHoldsAllOfAnEntry(t *testing.T) {
	r := tar.NewReader(bytes.NewReader(paxStream(t, paxCases)))
	for _, c := range paxCases {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		e := c.e
		if err != nil || "/"+h.Name != e.Path || string(data) != c.back || h.Mode != int64(e.Mode) || h.Uid != int(e.UID) || h.Gid != int(e.GID) ||
			!h.ModTime.Equal(time.Unix(e.Mtime.Sec, int64(e.Mtime.Nsec))) || e.Kind == fileset.File && h.Size != e.Size ||
			e.Kind == fileset.Symlink && h.Linkname != e.Target || e.Kind == fileset.Link && "/"+h.Linkname != e.Target ||
			h.Devmajor != int64(e.Major) && e.Major < 1<<20 || h.Devminor != int64(e.Minor) {
			t.Errorf("%q is read back as %+v %q, %v", e.Path, h, data, err)
		}
		for _, a := range e.Attrs {
			key := "SCHILY.xattr." + strings.NewReplacer("%", "%25", "=", "%3D").Replace(a.Name)
			if got, ok := h.PAXRecords[key]; !ok && a.Value != "" || got != a.Value {
				t.Errorf("attribute %s of %q is %q", a.Name, e.Path, got)
			}
		}
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// out gathers what a walk finds.
type out struct {
	all   []fileset.Entry
	data  map[string]string
	piece string
}

func (o *out) Same(int64) error     { return nil }
func (o *out) Gone(int64) error     { return nil }
func (o *out) Piece(b []byte) error { o.piece += string(b); return nil }
func (o *out) Again() error         { o.piece = ""; return nil }
func (o *out) Entry(e *fileset.Entry) error {
	o.all, o.data[e.Path], o.piece = append(o.all, *e), o.piece, ""
	return nil
}

func walkTop(t *testing.T, top string) *out {
	t.Helper()
	o := &out{data: map[string]string{}}
	w := &files.Walk{Top: top, Set: fileset.Set{Roots: []string{"/srv"}}, Out: o, Known: func() (files.Known, bool, error) { return files.Known{}, false, nil }}
	if err := w.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	return o
}

// What GNU tar, which the guest's appliance unpacks with, makes of the stream is read back by the walk that captures.
func TestWhatGNUTarUnpacksIsWhatWasCaptured(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may make devices")
	}
	top := t.TempDir()
	stream := paxStream(t, paxCases)
	cmd := exec.Command("tar", "-C", top, "--xattrs", "--xattrs-include=*", "-xf", "-")
	cmd.Env = append(os.Environ(), "LANG=C", "LC_ALL=C")
	cmd.Stdin = bytes.NewReader(stream)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	got := walkTop(t, top)
	found := map[string]fileset.Entry{}
	for _, e := range got.all {
		found[e.Path] = e
	}
	for _, c := range paxCases {
		e, want := found[c.e.Path], c.e
		if e.Kind == fileset.File {
			e.Sparse, e.Data, want.Sparse, want.Data = false, nil, false, nil // holes of less than a block cannot be
		}
		e.Ctime, e.Inode, e.Dev, e.Recent = fileset.Time{}, 0, 0, false
		if e.Kind == fileset.Link || e.Kind == fileset.Symlink {
			e.Mode, want.Mode = 0, 0
		}
		if e.Kind == fileset.Link {
			e.Mtime, e.UID = want.Mtime, want.UID
		}
		if !e.Equal(&want) {
			t.Errorf("%q is\n%+v, want\n%+v", c.e.Path, e, want)
		}
		if e.Kind != fileset.File {
			continue
		}
		if content, err := os.ReadFile(top + c.e.Path); err != nil || string(content) != c.back {
			t.Errorf("%q holds %q, %v", c.e.Path, content, err)
		}
	}
}
