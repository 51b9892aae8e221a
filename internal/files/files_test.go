package files

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/musterdr/muster/internal/fileset"
)

var some = []fileset.Entry{
	{Kind: fileset.Folder, Path: "/", Mode: 0o755, Inode: 2},
	{Kind: fileset.File, Path: "/a\n\xff", Mode: 0o4755, UID: 7, Size: 5, Mtime: fileset.Time{Sec: -1, Nsec: 5}, Dev: 9, Inode: 3},
	{Kind: fileset.File, Path: "/b", Size: 1 << 40, Sparse: true, Data: []fileset.Extent{{Length: 4096}}},
	{Kind: fileset.Symlink, Path: "/c", Target: "../../etc"},
}

func indexOf(t testing.TB, h Header, entries []fileset.Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := writeIndex(&b, h, entries); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestAnIndexReadsBackAsItWas(t *testing.T) {
	h := Header{Made: time.Unix(1, 0).UTC(), Mounts: []Mount{{Device: "/dev/sda1", At: "/", Type: "ext4"}}, Notes: []string{"x"}, Entries: 4}
	raw := indexOf(t, h, some)
	var got []fileset.Entry
	back, err := readIndex(bytes.NewReader(raw), func(e *fileset.Entry) error { got = append(got, *e); return nil })
	if err != nil || !reflect.DeepEqual(back, h) || !reflect.DeepEqual(got, some) {
		t.Errorf("%+v %+v, %v", back, got, err)
	}
	for cut := range raw {
		if _, err := readIndex(bytes.NewReader(raw[:cut]), func(*fileset.Entry) error { return nil }); err == nil {
			t.Fatalf("%d of %d bytes were taken for whole", cut, len(raw))
		}
	}
	if _, err := readIndex(bytes.NewReader(raw), func(*fileset.Entry) error { return errStop }); !errors.Is(err, errStop) {
		t.Error(err)
	}
}

func TestAnIndexThatIsNoTreeInOrderIsRefused(t *testing.T) {
	for name, bad := range map[string][]fileset.Entry{
		"backwards": {some[2], some[1]}, "twice": {some[1], some[1]}, "climbs": {{Kind: fileset.File, Path: "/a/../b"}},
	} {
		if _, err := readIndex(bytes.NewReader(indexOf(t, Header{}, bad)), func(*fileset.Entry) error { return nil }); !errors.Is(err, errIndex) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzReadIndex(f *testing.F) {
	f.Add(indexOf(f, Header{}, some))
	f.Add([]byte(indexMagic))
	f.Fuzz(func(t *testing.T, in []byte) {
		last := ""
		_, _ = readIndex(bytes.NewReader(in), func(e *fileset.Entry) error {
			if !strings.HasPrefix(e.Path, "/") || strings.Contains(e.Path+"/", "/../") || last != "" && fileset.Compare(last, e.Path) >= 0 {
				t.Fatalf("%q after %q", e.Path, last)
			}
			last = e.Path
			return nil
		})
	})
}

func TestANameIsShownAsNothingButAName(t *testing.T) {
	for name, want := range map[string]string{"/a b/ü": "/a b/ü", "/a\\n": `/a\\n`, "/\x1b[31m\n\xff": `/\x1b[31m\x0a\xff`, "/\u202eexe.txt": `/\xe2\x80\xaeexe.txt`, "/\xef\xbf\xbd": "/\ufffd"} {
		if got := Text(name); got != want {
			t.Errorf("%q is shown as %s, want %s", name, got, want)
		}
	}
	for _, bad := range []string{`a\`, `a\x`, `a\x1`, `a\xzz`, `a\n`} {
		if got, err := FromText(bad); err == nil {
			t.Errorf("%s was read as %q", bad, got)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("/a\\\x00\xff\n")
	f.Fuzz(func(t *testing.T, name string) {
		text := Text(name)
		if back, err := FromText(text); err != nil || back != name {
			t.Fatalf("%q is shown as %q and read as %q, %v", name, text, back, err)
		}
		if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Fatalf("%q", text)
		}
		if p, err := ParsePath(name); err == nil && (!strings.HasPrefix(p, "/") || strings.Contains(p+"/", "/../") || strings.Contains(p, "//") || strings.IndexByte(p, 0) >= 0) {
			t.Fatalf("%q is path %q", name, p)
		}
	})
}

func TestPathsThatClimbAreRefused(t *testing.T) {
	for text, want := range map[string]string{"": "/", "srv/": "/srv", "/a//b/./c": "/a/b/c", `/a\x0a`: "/a\n", "/..a": "/..a"} {
		if got, err := ParsePath(text); err != nil || got != want {
			t.Errorf("%q is %q, %v", text, got, err)
		}
	}
	for _, bad := range []string{"..", "/a/..", "/a/../b", `/a/\x2e./b`, `/a\x00`, "/" + strings.Repeat("x", 5000)} {
		if got, err := ParsePath(bad); err == nil {
			t.Errorf("%q was taken for %q", bad, got)
		}
	}
}

func TestAPatternIsOfANameOrOfAPath(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{{"*.xls", "/a/b.xls", true}, {"b.xls", "/a/b.xls", true}, {"b", "/a/b.xls", false}, {"/a/*", "/a/b.xls", true}, {"/*", "/a/b.xls", false}, {"*", "/a\xff", true}} {
		p, err := ParsePattern(c.pattern)
		if err != nil || p.Match(c.path) != c.want {
			t.Errorf("%s and %s: %v", c.pattern, c.path, err)
		}
	}
	for _, bad := range []string{"", "[", "a/b"} {
		if _, err := ParsePattern(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestHolesAreFoundInWhatIsRead(t *testing.T) {
	for name, content := range map[string][]byte{"empty": nil, "zeros": make([]byte, 3*holeSize+5), "short": []byte("abc"),
		"middle":    append(append(make([]byte, 2*holeSize), "data"...), make([]byte, 5*holeSize)...),
		"two":       slices.Concat(bytes.Repeat([]byte{1}, holeSize), make([]byte, holeSize), bytes.Repeat([]byte{2}, 100)),
		"too often": bytes.Repeat(slices.Concat(bytes.Repeat([]byte{1}, holeSize), make([]byte, holeSize)), 40),
	} {
		f, err := os.Create(filepath.Join(t.TempDir(), "f"))
		if err != nil {
			t.Fatal(err)
		}
		h := &holes{f: f}
		for part := range slices.Chunk(content, 1000) {
			if _, err := h.Write(part); err != nil {
				t.Fatal(err)
			}
		}
		if err := h.flush(); err != nil {
			t.Fatal(err)
		}
		e := &fileset.Entry{Kind: fileset.File, Path: "/f", Size: h.at, Sparse: true, Data: h.data}
		var parts []io.Reader
		for _, x := range h.data {
			parts = append(parts, io.NewSectionReader(f, x.Offset, x.Length))
		}
		var back bytes.Buffer
		if err := whole(&back, e, io.MultiReader(parts...)); err != nil || !bytes.Equal(back.Bytes(), content) {
			t.Errorf("%s: %d bytes in %d runs are read back as %d, %v", name, len(content), len(h.data), back.Len(), err)
		}
		if _, _, err := fileset.Decode(e.AppendBinary(nil)); err != nil || name == "zeros" && len(h.data) > 0 || name == "middle" && e.Stored() != holeSize {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
		f.Close()
	}
}
