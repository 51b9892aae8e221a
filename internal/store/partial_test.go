package store

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/snapshot"
)

// partialOf keeps a partial of a server with a disk of one block.
func partialOf(t *testing.T, s *Store, server string) {
	t.Helper()
	w, err := s.Begin(t.Context(), "snap-part", "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort(t.Context()) //nolint:errcheck // never fails
	d, err := w.Disk(t.Context(), "sda", MinBlockSize, MinBlockSize)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(d.Write(t.Context(), 0, bytes.Repeat([]byte("x"), MinBlockSize)), w.KeepPartial(t.Context(), server, "shop", nil))
	if err != nil {
		t.Fatal(err)
	}
}

// goesOn says whether there is a partial to go on with.
func goesOn(t *testing.T, s *Store, server string) bool {
	t.Helper()
	w, err := s.Begin(t.Context(), "snap-next", "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort(t.Context()) //nolint:errcheck // never fails
	resumed, err := w.GoOn(t.Context(), server, func(*Partial) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	return resumed
}

// partials counts them.
func partials(t *testing.T, s *Store) int {
	t.Helper()
	all, err := findPartials(t.Context(), s.rep, "")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func TestAPartialIsLetGoWhenNobodyGoesOnWithIt(t *testing.T) {
	s := openCopy(t)
	for name, end := range map[string]func(){
		"by a collection": func() {
			if err := s.sortPartials(t.Context()); err != nil { // all of it does not run with a clock that is so far off
				t.Fatal(err)
			}
		},
		"by who would go on": func() {
			if goesOn(t, s, "srv-1") {
				t.Error("it is gone on with a partial that is too old")
			}
		},
	} {
		partialOf(t, s, "srv-1")
		kept := s.now()
		s.raiseFloor(kept.Add(PartialLife - time.Minute))
		if !goesOn(t, s, "srv-1") || goesOn(t, s, "srv-2") {
			t.Errorf("%s: a young partial is not gone on with, or by another server", name)
		}
		s.raiseFloor(kept.Add(PartialLife + time.Minute))
		if end(); partials(t, s) != 0 {
			t.Errorf("%s: an old partial is still there", name)
		}
	}
}

func TestADamagedPartialStopsNoCollectionAndNoCapture(t *testing.T) {
	s := openCopy(t)
	broken := func() {
		t.Helper()
		err := s.mutate(t.Context(), "test", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			now := fs.UTCTimestampFromTime(s.now())
			id, err := putObject(ctx, w, []byte("no folder"), "", compressorFast, objectSplitter)
			if err != nil {
				return err
			}
			_, err = snapshot.SaveSnapshot(ctx, w, &snapshot.Manifest{
				Source: snapshotSource("shop", "/srv-1"), StartTime: now, EndTime: now,
				RootEntry: &snapshot.DirEntry{Name: "", Type: snapshot.EntryTypeDirectory, ObjectID: id},
				Tags:      map[string]string{tagKind: kindPartial, tagServer: "srv-1"},
			})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	broken()
	if goesOn(t, s, "srv-1") || partials(t, s) != 0 {
		t.Error("it is gone on with a damaged partial, or it is still there")
	}
	broken()
	if _, err := s.Collect(t.Context(), CollectOptions{}, nil); err != nil || partials(t, s) != 0 {
		t.Errorf("%d partials, %v", partials(t, s), err)
	}
}

func TestOnlyAFullSnapshotOfDisksHasAPartial(t *testing.T) {
	s := openCopy(t)
	w, err := s.Begin(t.Context(), "snap-inc-2", "snap-inc")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort(t.Context()) //nolint:errcheck // never fails
	if _, err := w.GoOn(t.Context(), "srv-1", func(*Partial) error { return nil }); err == nil {
		t.Error("an increment goes on with a partial")
	}
	if _, err := w.Disk(t.Context(), "sda", MinBlockSize, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.KeepPartial(t.Context(), "srv-1", "shop", nil); err == nil || partials(t, s) != 0 {
		t.Error("an increment kept a partial")
	}
}
