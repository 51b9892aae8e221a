package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/store"
)

// paper is a file of a set: an entry, and its content without holes.
type paper struct {
	fileset.Entry
	data []byte
}

// papers makes a set of many small files, empty ones, a sparse one, one of several pieces and a link.
func papers(n int) (out []paper) {
	out = append(out, paper{Entry: fileset.Entry{Kind: fileset.Folder, Path: "/srv", Mode: 0o755}})
	file := func(path string, data []byte) {
		out = append(out, paper{fileset.Entry{Kind: fileset.File, Path: path, Mode: 0o644, Size: int64(len(data))}, data})
	}
	for i := range n {
		file(fmt.Sprintf("/srv/a%06d\xff", i), []byte(strings.Repeat(fmt.Sprintf("file %d\n", i), i%40)))
	}
	large := make([]byte, 700<<10)
	Noise(large, 71)
	file("/srv/b", large)
	sparse := fileset.Entry{Kind: fileset.File, Path: "/srv/c", Size: 1 << 40, Sparse: true, Data: []fileset.Extent{{Offset: 5, Length: 3}, {Offset: 1<<40 - 4, Length: 4}}}
	out = append(out, paper{sparse, []byte("thedata")})
	return append(out, paper{Entry: fileset.Entry{Kind: fileset.Link, Path: "/srv/d", Target: "/srv/b"}})
}

// writeFiles keeps a set of files; what the parent has in the same form is taken from it.
func writeFiles(ctx context.Context, s *store.Store, id, parent, image string, set []paper) (dr.Snapshot, error) {
	w, err := s.Begin(ctx, id, parent)
	if err != nil {
		return dr.Snapshot{}, err
	}
	defer w.Abort(ctx) //nolint:errcheck // never fails
	f, err := w.Files(ctx, image, fileset.Set{Roots: []string{"/srv"}})
	if err != nil {
		return dr.Snapshot{}, err
	}
	known := map[string]*store.FileEntry{}
	if parent != "" {
		before, err := s.Files(ctx, parent)
		if err != nil {
			return dr.Snapshot{}, err
		}
		defer before.Close()
		for all := before.All(); ; {
			e, err := all.Next(ctx)
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return dr.Snapshot{}, err
			}
			known[e.Path] = e
		}
	}
	for i := range set {
		if err := addPaper(ctx, f, &set[i], known[set[i].Path]); err != nil {
			return dr.Snapshot{}, err
		}
	}
	return w.Commit(ctx, snapshotOf())
}

func addPaper(ctx context.Context, f *store.FilesWriter, p *paper, known *store.FileEntry) error {
	if known != nil && known.Equal(&p.Entry) {
		return f.Add(ctx, &p.Entry, known.Content, true)
	}
	c := f.Content()
	defer c.Close()
	if _, err := c.Write(p.data); err != nil {
		return err
	}
	content, err := c.Result()
	if err != nil {
		return err
	}
	return f.Add(ctx, &p.Entry, content, false)
}

// sameFiles requires kept files to be a set: in order, in full, and found by their paths.
func sameFiles(t *testing.T, s *store.Store, id string, set []paper) {
	t.Helper()
	f, err := s.Files(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all := f.All()
	for i := range set {
		e, err := all.Next(t.Context())
		if err != nil || !e.Equal(&set[i].Entry) {
			t.Fatalf("entry %d of %s is %+v, %v; want %+v", i, id, e, err, set[i].Entry)
		}
		if i%97 == 0 || len(set[i].data) > 10000 || e.Sparse {
			if e, err = f.Find(t.Context(), set[i].Path); err != nil {
				t.Fatal(err)
			}
		}
		r, err := f.Data(t.Context(), e)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, set[i].data) {
			t.Fatalf("content of %q differs: %v", e.Path, err)
		}
	}
	if _, err := all.Next(t.Context()); !errors.Is(err, io.EOF) {
		t.Fatalf("%s goes on: %v", id, err)
	}
	_, err = f.Find(t.Context(), "/srv/a0x")
	want(t, err, store.ErrNotFound)
}

func (x *suite) fileSets(t *testing.T) {
	ctx := t.Context()
	image, first, second, third := x.id(), x.id(), x.id(), x.id()
	_, err := writeFiles(ctx, x.s, first, "", image, papers(3))
	want(t, err, store.ErrNotFound) // without an image there is nothing that it could go onto
	write(t, x.s, image, "", NewDisk(1<<20, 70), nil)
	set := papers(3000)
	snap, err := writeFiles(ctx, x.s, first, "", image, set)
	if err != nil {
		t.Fatal(err)
	}
	if !snap.IsData() || snap.Image != image || snap.Files.Entries != int64(len(set)) || snap.Files.Changed != int64(len(set)) || len(snap.Disks) > 0 {
		t.Fatalf("kept as %+v, %+v", snap, snap.Files)
	}
	sameFiles(t, x.s, first, set)
	_, err = x.s.Image(ctx, first, 0)
	want(t, err, store.ErrNotFound)
	if _, err := x.s.Files(ctx, image); !errors.Is(err, store.ErrNotFound) {
		t.Fatalf("an image has files: %v", err)
	}
	if _, err := writeFiles(ctx, x.s, third, "", first, set); err == nil {
		t.Fatal("data went onto data")
	}

	// What did not change costs next to nothing, and a content that is there already none at all.
	set[1500].Mtime.Sec++
	set[1500].data = []byte("changed")
	set[1500].Size = 7
	set[2500].data, set[2500].Size = set[3001].data, set[3001].Size
	next, err := writeFiles(ctx, x.s, second, first, image, set)
	if err != nil {
		t.Fatal(err)
	}
	if next.Files.Changed != 2 || next.Stats.New != 7 || next.Stats.Changed != 7+set[2500].Size || next.Stats.Stored > snap.Stats.Stored/4 {
		t.Errorf("two of %d files changed: %+v, %+v; the first took %d", len(set), next.Files, next.Stats, snap.Stats.Stored)
	}
	sameFiles(t, x.s, second, set)

	// The image stays as long as data goes onto it; a collection takes nothing that is named.
	want(t, x.s.Forget(ctx, image), store.ErrPinned)
	if err := x.s.Forget(ctx, first); err != nil {
		t.Fatal(err)
	}
	if _, err := x.s.Collect(ctx, store.CollectOptions{Immediate: true}, nil); err != nil {
		t.Fatal(err)
	}
	sameFiles(t, x.s, second, set)
	if r, err := x.s.Verify(ctx, second, nil); err != nil || r.Bytes < next.Files.Bytes {
		t.Fatalf("verify: %+v, %v", r, err)
	}
	if err := x.s.Forget(ctx, second); err != nil {
		t.Fatal(err)
	}
	if err := x.s.Forget(ctx, image); err != nil {
		t.Fatal(err)
	}
}

// filePowerCuts cuts the power before every change of the medium that keeping files makes.
func (x *suite) filePowerCuts(t *testing.T) {
	image, id := x.id(), x.id()
	write(t, x.s, image, "", NewDisk(1<<20, 72), nil)
	set := papers(200)
	large := len(set) - 3
	step := 1
	if raceEnabled {
		step = 5
	}
	for n := 1; n < 100; n += step {
		s, err := store.Open(t.Context(), x.drv, password)
		if err != nil {
			t.Fatalf("open after a cut before change %d: %v", n-step, err)
		}
		if _, err := s.Snapshot(t.Context(), id); err == nil {
			x.finishFiles(t, s, id, set)
			return
		} else if !errors.Is(err, store.ErrNotFound) {
			t.Fatalf("after a cut before change %d: %v", n-step, err)
		}
		Noise(set[large].data, uint64(2000+n)) // anew each time: what a cut left behind must not help
		ctx, cancel := context.WithCancel(t.Context())
		x.drv.CutAt(n, cancel)
		_, err = writeFiles(ctx, s, id, "", image, set)
		x.drv.CutAt(0, nil)
		if err == nil {
			x.finishFiles(t, s, id, set)
			return
		}
		_ = s.Close(context.WithoutCancel(ctx)) // a process that lost its store
	}
	t.Fatal("it never goes through")
}

func (x *suite) finishFiles(t *testing.T, s *store.Store, id string, set []paper) {
	t.Helper()
	defer s.Close(context.Background()) //nolint:errcheck // only read
	sameFiles(t, s, id, set)
	if _, err := s.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Verify(t.Context(), id, nil); err != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := x.s.Refresh(t.Context()); err != nil { // one that was open all the time
		t.Fatal(err)
	}
	sameFiles(t, x.s, id, set)
}

// flippedFile damages what one file's content lies in.
func (x *suite) flippedFile(t *testing.T) {
	ctx := t.Context()
	p, err := x.drv.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close(ctx) //nolint:errcheck // only for the test
	image, id := x.id(), x.id()
	write(t, x.s, image, "", NewDisk(1<<20, 73), nil)
	before, err := Packs(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, m := range before {
		known[string(m.BlobID)] = true
	}
	data := make([]byte, 3<<20)
	Noise(data, 74)
	set := []paper{{Entry: fileset.Entry{Kind: fileset.Folder, Path: "/srv"}}, {fileset.Entry{Kind: fileset.File, Path: "/srv/a", Size: int64(len(data))}, data}}
	if _, err := writeFiles(ctx, x.s, id, "", image, set); err != nil {
		t.Fatal(err)
	}
	packs, err := Packs(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range packs {
		if !known[string(m.BlobID)] {
			if err := FlipByte(ctx, p, m.BlobID, m.Length/2); err != nil {
				t.Fatal(err)
			}
		}
	}
	r, err := x.s.Verify(ctx, id, nil)
	want(t, err, store.ErrDamaged)
	if r.Damaged != 1 || r.Damages[0].Disk != -1 || r.Damages[0].Name != `"/srv/a"` {
		t.Fatalf("the report says %+v", r)
	}
}
