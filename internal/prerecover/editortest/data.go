package editortest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/prerecover"
)

func testData(ctx context.Context, t *testing.T, g prerecover.Guest) {
	walk := func(folder string) (names []string) {
		t.Helper()
		all, err := g.Walk(ctx, folder)
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range all {
			if i > 0 && fileset.Compare(all[i-1].Path, e.Path) >= 0 {
				t.Errorf("%q comes after %q", e.Path, all[i-1].Path)
			}
			names = append(names, e.Path)
			if e.Kind == 0 {
				t.Errorf("nothing is told of %q", e.Path)
			}
			if e.Path == "/etc/plain" && (e.Size != 6 || e.Mode != 0o644) {
				t.Errorf("%+v", e)
			}
		}
		return names
	}
	walk("/etc")
	got := walk("/hostile")
	for _, h := range Hostile {
		if !slices.Contains(got, "/hostile/"+h) {
			t.Errorf("walk does not give %q", h)
		}
	}

	var stream bytes.Buffer
	w := tar.NewWriter(&stream)
	at := time.Unix(1_000_000_000, 0)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeDir, Name: "srv/", Mode: 0o750, Uid: 7, ModTime: at},
		{Typeflag: tar.TypeReg, Name: "srv/\xff\n", Mode: 0o640, Uid: 33, Gid: 44, Size: 3, ModTime: at, PAXRecords: map[string]string{"SCHILY.xattr.user.note": "x"}},
		{Typeflag: tar.TypeLink, Name: "srv/link", Linkname: "srv/\xff\n", ModTime: at},
		{Typeflag: tar.TypeSymlink, Name: "srv/to", Linkname: "../../../etc", ModTime: at},
	} {
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte("abc")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := g.Unpack(ctx, &stream); err != nil {
		t.Fatal(err)
	}
	if got, err := g.Read(ctx, "/srv/link", 10); err != nil || string(got) != "abc" {
		t.Errorf("a link to what was unpacked holds %q, %v", got, err)
	}
	if s, err := g.Lstat(ctx, "/srv/\xff\n"); err != nil || s.Mode.Perm() != 0o640 || s.UID != 33 || s.GID != 44 {
		t.Errorf("unpacked as %+v, %v", s, err)
	}
	if s, err := g.Lstat(ctx, "/srv/to"); err != nil || s.Link != "../../../etc" {
		t.Errorf("unpacked as %+v, %v", s, err)
	}
	if v, err := g.Xattr(ctx, "/srv/\xff\n", "user.note"); err != nil || v != "x" {
		t.Errorf("attribute %q, %v", v, err)
	}
	if all, err := g.Walk(ctx, "/srv"); err != nil || len(all) != 4 || all[0].Mtime.Sec != at.Unix() || all[0].Mode != 0o750 {
		t.Errorf("walk gives %+v, %v", all, err)
	}
	for range 2 { // nothing there is no error
		if err := g.RemoveAll(ctx, "/srv"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := g.Lstat(ctx, "/srv"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was removed is there: %v", err)
	}
	if _, err := g.Read(ctx, "/etc/plain", 100); err != nil {
		t.Errorf("what a link led to was removed: %v", err)
	}
	// A stream that breaks off is an error, and nobody waits.
	if err := g.Unpack(ctx, io.MultiReader(strings.NewReader("x"), broken{})); err == nil {
		t.Error("a broken stream was unpacked")
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("the store is damaged") }
