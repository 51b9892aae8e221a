package files

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"testing"

	"github.com/musterdr/muster/internal/fileset"
)

// tree is a guest whose files are in memory. Asked for a folder it gives the last name first, as a file system may, so that of
// a file with several names another one comes first than in the index; and it leaves out what left says.
type tree struct {
	Guest
	content map[string]string // by name
	inode   map[string]uint64
	left    func(name string) bool
	asked   int    // for single files
	top     string // the folder that is asked for
}

func (t *tree) Attrs(_ context.Context, entries []*fileset.Entry) error {
	for _, e := range entries {
		e.Attrs = attrsOf(e.Inode)
	}
	return nil
}

func attrsOf(inode uint64) []fileset.Attr {
	return []fileset.Attr{{Name: "user.inode", Value: fmt.Sprint(inode)}}
}

func (t *tree) Read(_ context.Context, name string, w io.Writer) error {
	t.asked++
	_, err := io.WriteString(w, t.content[name])
	return err
}

func (t *tree) Folder(_ context.Context, top string, each func(Member, io.Reader) error) error {
	names := slices.Sorted(maps.Keys(t.inode))
	slices.Reverse(names)
	given := map[uint64]string{}
	for _, name := range append([]string{"/", "/srv", "/srv/a"}, names...) { // the folder before what is in it
		if t.left(name) || !fileset.Below(name, top) {
			continue
		}
		inode, file := t.inode[name]
		m := Member{Path: name, File: file, Size: int64(len(t.content[name])), Attrs: attrsOf(inode)}
		if first, again := given[inode]; again && file {
			m.Again, m.File, m.Size = first, false, 0
		}
		given[inode] = name
		if err := each(m, bytes.NewReader([]byte(t.content[name]))); err != nil {
			return err
		}
	}
	return nil
}

// index lists what is in the tree, as Browser.pick gives it.
func (t *tree) index() (out []chosen) {
	for _, name := range []string{"/", "/srv", "/srv/a"} {
		out = append(out, chosen{&Item{Entry: &fileset.Entry{Kind: fileset.Folder, Path: name}}, !fileset.Below(name, t.top)})
	}
	first := map[uint64]string{}
	for _, name := range slices.Sorted(maps.Keys(t.inode)) {
		e := &fileset.Entry{Kind: fileset.File, Path: name, Size: int64(len(t.content[name])), Inode: t.inode[name], Dev: 1, Sparse: len(t.content[name]) > holeSize}
		if f, again := first[e.Inode]; again {
			e.Kind, e.Target, e.Size, e.Sparse = fileset.Link, f, 0, false
		} else {
			first[e.Inode] = name
		}
		out = append(out, chosen{&Item{Entry: e}, false})
	}
	return out
}

// picked reads everything and says of each name which file it is: its content, and all names that are linked.
func (t *tree) picked(tt *testing.T) map[string]string {
	tt.Helper()
	out := map[string]string{}
	err := new(Browser).fromGuest(tt.Context(), &guest{Guest: t}, t.index(), []string{t.top}, func(e *fileset.Entry, above bool, content io.Reader) error {
		var whole bytes.Buffer
		data, err := io.ReadAll(io.LimitReader(content, e.Stored()))
		if err != nil {
			return err
		}
		if _, there := out[path.Dir(e.Path)]; !there && !above && e.Path != "/" {
			tt.Errorf("%s came before its folder", e.Path)
		}
		if _, twice := out[e.Path]; twice {
			tt.Errorf("%s came twice", e.Path)
		}
		switch {
		case e.Kind == fileset.Link:
			first, there := out[e.Target]
			if !there {
				tt.Errorf("%s is a link to %s, which did not come before", e.Path, e.Target)
			}
			out[e.Path] = first
			return nil
		case e.Kind == fileset.File && (len(e.Attrs) != 1 || e.Attrs[0].Value != fmt.Sprint(e.Inode)):
			tt.Errorf("%s has %v", e.Path, e.Attrs)
		}
		out[e.Path] = fmt.Sprintf("%v %v", e.Kind, above)
		if e.Kind != fileset.File {
			return nil
		}
		err = wholeOf(&whole, e, data)
		out[e.Path] += fmt.Sprintf(" %x inode %d, %d stored", whole.Bytes(), e.Inode, e.Stored())
		return err
	})
	if err != nil {
		tt.Fatal(err)
	}
	return out
}

func wholeOf(w io.Writer, e *fileset.Entry, data []byte) error {
	return whole(w, e, bytes.NewReader(data))
}

func TestAFolderReadAtOnceIsTheSameAsFileByFile(t *testing.T) {
	for _, top := range []string{"/srv/a", "/srv", "/"} {
		t.Run(top, func(t *testing.T) { readAtOnce(t, top) })
	}
}

func readAtOnce(t *testing.T, top string) {
	t.Helper()
	tr := &tree{top: top, content: map[string]string{}, inode: map[string]uint64{}}
	add := func(name string, inode uint64, content string) { tr.content[name], tr.inode[name] = content, inode }
	for i := range 20 {
		add(fmt.Sprintf("/srv/a/%02d", i), uint64(10+i), fmt.Sprintf("file %d", i))
	}
	for i, name := range []string{"/srv/a/first", "/srv/a/second", "/srv/a/third"} {
		add(name, 5, "many names")
		add(name+"x", uint64(50+i), "")
	}
	add("/srv/a/hole", 7, "a"+string(make([]byte, 5*holeSize))+"z")
	slow := *tr
	slow.left = func(string) bool { return true }
	want := slow.picked(t)
	if slow.asked < 20 || len(want) != len(tr.inode)+3 {
		t.Fatalf("%d files were read, %d names", slow.asked, len(want))
	}
	for what, left := range map[string]func(string) bool{
		"all of it":            func(string) bool { return false },
		"but a first name":     func(n string) bool { return n == "/srv/a/first" },
		"but another name":     func(n string) bool { return n == "/srv/a/third" },
		"but some":             func(n string) bool { return n == "/srv/a/second" || n == "/srv/a/hole" || n == "/srv/a/07" },
		"but the folder":       func(n string) bool { return n == "/srv/a" },
		"but all those linked": func(n string) bool { return tr.inode[n] == 5 },
	} {
		fast := *tr
		fast.left = left
		if got := fast.picked(t); !maps.Equal(got, want) {
			t.Errorf("%s:\n%v\nwant\n%v", what, got, want)
		}
		if fast.asked > 3 && what != "but the folder" {
			t.Errorf("%s: %d files were read one by one", what, fast.asked)
		}
	}
}
