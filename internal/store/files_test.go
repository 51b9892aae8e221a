package store

import (
	"reflect"
	"testing"

	"github.com/kopia/kopia/repo/object"

	"github.com/musterdr/muster/internal/fileset"
)

const aContent = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func aLeaf(t testing.TB) ([]byte, leafRef) {
	t.Helper()
	id, err := object.ParseID(aContent)
	if err != nil {
		t.Fatal(err)
	}
	var b []byte
	b = appendLeafEntry(b, &fileset.Entry{Kind: fileset.Folder, Path: "/srv"}, Content{})
	b = appendLeafEntry(b, &fileset.Entry{Kind: fileset.File, Path: "/srv/a", Size: 5}, Content{object: id, Length: 5})
	return b, leafRef{list: id, data: id, count: 2, bytes: 5, first: "/srv"}
}

func TestAListingThatIsNotTheOneItsIndexNamesIsRefused(t *testing.T) {
	b, ref := aLeaf(t)
	if got, err := decodeLeaf(b, ref); err != nil || len(got) != 2 || got[1].Content.Length != 5 {
		t.Fatal(got, err)
	}
	for name, change := range map[string]func(r *leafRef){
		"fewer": func(r *leafRef) { r.count-- }, "more": func(r *leafRef) { r.count++ }, "bytes": func(r *leafRef) { r.bytes++ },
		"less": func(r *leafRef) { r.bytes-- }, "first": func(r *leafRef) { r.first = "/srw" },
	} {
		other := ref
		if change(&other); name != "" {
			if _, err := decodeLeaf(b, other); err == nil {
				t.Errorf("%s: taken", name)
			}
		}
	}
	for cut := range len(b) {
		if _, err := decodeLeaf(b[:cut], ref); err == nil {
			t.Fatalf("%d bytes were taken for whole", cut)
		}
	}
}

func FuzzDecodeLeaf(f *testing.F) {
	b, ref := aLeaf(f)
	f.Add(b, ref.count, ref.bytes)
	f.Fuzz(func(t *testing.T, in []byte, count, bytes int64) {
		ref := leafRef{count: min(max(count, 1), leafMax), bytes: max(bytes, 0), first: "/srv"}
		got, err := decodeLeaf(in, ref)
		if err != nil {
			return
		}
		var total int64
		for _, e := range got {
			total += e.Content.Length
		}
		if int64(len(got)) != ref.count || total != ref.bytes {
			t.Fatalf("%d entries of %d bytes, want %d of %d", len(got), total, ref.count, ref.bytes)
		}
	})
}

func FuzzDecodeIndex(f *testing.F) {
	_, ref := aLeaf(f)
	b := []byte(filesFormat)
	b = appendText(b, ref.list.String())
	b = appendText(b, ref.data.String())
	b = append(b, 2, 5)
	b = appendText(b, ref.first)
	f.Add(b)
	if got, err := decodeIndex(b); err != nil || !reflect.DeepEqual(got, []leafRef{ref}) {
		f.Fatal(got, err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := decodeIndex(in)
		if err == nil && len(got) == 0 {
			t.Fatal("an index of nothing")
		}
		for i, l := range got {
			if l.count < 1 || l.bytes < 0 || i > 0 && fileset.Compare(got[i-1].first, l.first) >= 0 {
				t.Fatalf("%+v", got)
			}
		}
	})
}
