package fileset

import (
	"bytes"
	"errors"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
)

var entries = []Entry{
	{Kind: Folder, Path: "/srv", Mode: 0o755, Mtime: Time{Sec: -1, Nsec: 999_999_999}, Dev: math.MaxUint64, Inode: 2},
	{Kind: File, Path: "/srv/a\xff\n", Mode: 0o4711, UID: math.MaxUint32, GID: 7, Size: 5, Ctime: Time{Sec: 9}, Recent: true,
		Attrs: []Attr{{"security.selinux", "a\x00"}, {"user.x=y", ""}}},
	{Kind: File, Path: "/srv/b", Size: 1 << 40, Sparse: true, Data: []Extent{{0, 1}, {4096, 4096}, {1<<40 - 1, 1}}, Unstable: true},
	{Kind: File, Path: "/srv/c", Size: 1 << 40, Sparse: true},
	{Kind: Link, Path: "/srv/d", Target: "/srv/b"},
	{Kind: Symlink, Path: "/srv/e", Target: "../../\x01"},
	{Kind: CharDev, Path: "/srv/f", Major: 1, Minor: 1 << 19},
	{Kind: NamedPipe, Path: "/srv/g"},
	{Kind: Folder, Path: "/srv/h", Edge: true},
}

func TestAnEntryReadsBackAsItWas(t *testing.T) {
	var all []byte
	for i := range entries {
		all = entries[i].AppendBinary(all)
	}
	c := Checker{Set: Set{Roots: []string{"/srv"}}}
	for i := range entries {
		e, rest, err := Decode(all)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(e, entries[i]) {
			t.Errorf("read back %+v, want %+v", e, entries[i])
		}
		if err := c.Next(&e); err != nil {
			t.Error(err)
		}
		for cut := range len(all) - len(rest) {
			if _, _, err := Decode(all[:cut]); !errors.Is(err, ErrBad) {
				t.Fatalf("%d bytes of %q were taken for whole: %v", cut, e.Path, err)
			}
		}
		all = rest
	}
	if got := entries[2].Stored(); got != 4098 {
		t.Errorf("a sparse file has %d bytes of content", got)
	}
}

func TestTheOrderIsThatOfAWalk(t *testing.T) {
	want := []string{"/a", "/a/b", "/a/b/c", "/a/b.x", "/a/bb", "/a\x01", "/a-", "/b"}
	got := slices.Clone(want)
	slices.Reverse(got)
	slices.SortFunc(got, Compare)
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestWhatIsNoTreeIsRefused(t *testing.T) {
	root := Entry{Kind: Folder, Path: "/srv"}
	for name, bad := range map[string][]Entry{
		"below a link":            {root, {Kind: Symlink, Path: "/srv/a", Target: "/etc"}, {Kind: File, Path: "/srv/a/passwd"}},
		"below a file":            {root, {Kind: File, Path: "/srv/a"}, {Kind: File, Path: "/srv/a/b"}},
		"below an edge":           {root, {Kind: Folder, Path: "/srv/a", Edge: true}, {Kind: File, Path: "/srv/a/b"}},
		"outside":                 {{Kind: File, Path: "/etc/passwd"}},
		"twice":                   {root, {Kind: File, Path: "/srv/a"}, {Kind: File, Path: "/srv/a"}},
		"backwards":               {root, {Kind: File, Path: "/srv/b"}, {Kind: File, Path: "/srv/a"}},
		"no root":                 {{Kind: File, Path: "/srv/a"}},
		"root is a link":          {{Kind: Symlink, Path: "/srv", Target: "/etc"}},
		"link to what is outside": {root, {Kind: Link, Path: "/srv/a", Target: "/etc/shadow"}},
		"link forward":            {root, {Kind: Link, Path: "/srv/a", Target: "/srv/b"}},
	} {
		c := Checker{Set: Set{Roots: []string{"/srv"}}}
		var err error
		for i := range bad {
			err = errors.Join(err, c.Next(&bad[i]))
		}
		if !errors.Is(err, ErrBad) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, p := range []string{"", "srv", "/srv/", "/srv//a", "/srv/../etc", "/srv/.", "/a\x00", "/" + strings.Repeat("x", 256)} {
		e := Entry{Kind: File, Path: p}
		if _, _, err := Decode(e.AppendBinary(nil)); !errors.Is(err, ErrBad) {
			t.Errorf("path %q: %v", p, err)
		}
	}
}

func TestAChangeOfAnythingButTheTimeOfReadingChangesTheIdentity(t *testing.T) {
	e := Entry{Kind: File, Path: "/srv/a", Mode: 0o644, Size: 3, Mtime: Time{Sec: 1}, Ctime: Time{Sec: 2}, Dev: 1, Inode: 9}
	for name, change := range map[string]func(*Entry){
		"path": func(e *Entry) { e.Path = "/srv/b" }, "kind": func(e *Entry) { e.Kind = NamedPipe }, "mode": func(e *Entry) { e.Mode = 0 },
		"owner": func(e *Entry) { e.UID = 1 }, "group": func(e *Entry) { e.GID = 1 }, "size": func(e *Entry) { e.Size++ },
		"mtime": func(e *Entry) { e.Mtime.Nsec++ }, "ctime": func(e *Entry) { e.Ctime.Nsec++ }, "inode": func(e *Entry) { e.Inode++ },
		"device": func(e *Entry) { e.Dev++ }, "recent": func(e *Entry) { e.Recent = true },
	} {
		other := e
		if change(&other); other.Identity() == e.Identity() {
			t.Errorf("%s: the identity stayed", name)
		}
	}
	if e.Identity() == (Identity{}) {
		t.Error("an identity is zero")
	}
}

func TestSetsAreChecked(t *testing.T) {
	if err := (Set{Roots: []string{"/srv", "/var/lib/app"}, Exclude: []string{"*.tmp", "/srv/cache", "[a-c]?"}}).Validate(); err != nil {
		t.Error(err)
	}
	for _, bad := range []Set{{}, {Roots: []string{"srv"}}, {Roots: []string{"/"}}, {Roots: []string{"/srv", "/srv"}}, {Roots: []string{"/srv", "/srv/a"}},
		{Roots: []string{"/srv/"}}, {Roots: []string{"/srv"}, Exclude: []string{"["}}, {Roots: []string{"/srv"}, Exclude: []string{"a/b"}},
		{Roots: []string{"/srv"}, Exclude: []string{"/srv/cache/"}}} {
		if bad.Validate() == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
	s := Set{Roots: []string{"/srv"}, Exclude: []string{"*.tmp", "/srv/*/cache"}}
	for p, want := range map[string]bool{"/srv/a.tmp": true, "/srv/\xff.tmp": true, "/srv/x/cache": true, "/srv/cache": false, "/srv/x/y/cache": false, "/srv/a": false} {
		if s.Excluded(p) != want {
			t.Errorf("%s: excluded %v", p, !want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for i := range entries {
		f.Add(entries[i].AppendBinary(nil))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		e, rest, err := Decode(in)
		if err != nil {
			return
		}
		again, _, err := Decode(e.AppendBinary(nil))
		if err != nil || !e.Equal(&again) {
			t.Fatalf("%+v is read back as %+v, %v", e, again, err)
		}
		if len(rest) >= len(in) || e.Stored() > e.Size || bytes.IndexByte([]byte(e.Path), 0) >= 0 || !strings.HasPrefix(e.Path, "/") {
			t.Fatalf("%+v", e)
		}
	})
}
