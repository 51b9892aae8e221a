package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/storetest"
)

// fixture is a store written by the release that introduced its format, and what was in it. It must open for ever.
const (
	fixture         = "testdata/store-1"
	fixturePassword = "a fixture"
)

func fixtureDisks() (full, inc *storetest.Disk) {
	full = storetest.NewDisk(300<<10+77, 1)
	inc = &storetest.Disk{Data: bytes.Clone(full.Data)}
	storetest.Noise(inc.Data[20<<10:22<<10], 2)
	return full, inc
}

func TestStoreOfEveryReleaseOpens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	if err := os.CopyFS(path, os.DirFS(fixture)); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), folder.Driver{Path: path}, fixturePassword)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close(context.Background()) //nolint:errcheck // only read
	full, inc := fixtureDisks()
	for id, d := range map[string]*storetest.Disk{"snap-full": full, "snap-inc": inc} {
		if r, err := s.Verify(t.Context(), id, nil); err != nil || r.Blocks == 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		m, err := s.Image(t.Context(), id, 0)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, m.Size())
		if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, d.Data) {
			t.Errorf("%s differs: %v", id, err)
		}
		_ = m.Close()
	}
	if a, err := s.Attachment(t.Context(), "snap-inc", "note"); err != nil || string(a) != "attached" {
		t.Errorf("attachment %q, %v", a, err)
	}
	var kept bytes.Buffer
	if err := s.Fetch(t.Context(), "snap-inc", "delta", &kept); err != nil || kept.String() != "kept" {
		t.Errorf("kept %q, %v", kept.String(), err)
	}
	if m, err := s.LKG(t.Context()); err != nil || m["srv-1"] != "snap-inc" {
		t.Errorf("last-known-good %v, %v", m, err)
	}
	n := 0
	err = s.Records(t.Context(), "server", func(id string, raw json.RawMessage) error { n++; return nil })
	if err != nil || n != 1 {
		t.Errorf("%d records, %v", n, err)
	}
	// A new release goes on where the old one stopped.
	w, err := s.Begin(t.Context(), "snap-new", "snap-inc")
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(t.Context(), "sda", inc.Size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Ingest(t.Context(), inc, []image.Extent{{Length: 1}}, nil); err != nil {
		t.Fatal(err)
	}
	snap, err := w.Commit(t.Context(), dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Now()})
	if err != nil || snap.Stats.Changed != 0 {
		t.Errorf("an unchanged block was not found again: %+v, %v", snap.Stats, err)
	}
}

// TestWriteFixture writes the fixture anew. Only a new format needs that, under a new name beside the old one.
func TestWriteFixture(t *testing.T) {
	if os.Getenv("MUSTER_WRITE_FIXTURE") == "" {
		t.Skip("set MUSTER_WRITE_FIXTURE=1 to write a fixture of a new format")
	}
	drv := folder.Driver{Path: fixture}
	if err := store.Create(t.Context(), drv, fixturePassword); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), drv, fixturePassword)
	if err != nil {
		t.Fatal(err)
	}
	full, inc := fixtureDisks()
	parent := ""
	for _, x := range []struct {
		id   string
		disk *storetest.Disk
	}{{"snap-full", full}, {"snap-inc", inc}} {
		w, err := s.Begin(t.Context(), x.id, parent)
		if err != nil {
			t.Fatal(err)
		}
		parent = x.id
		d, err := w.Disk(t.Context(), "sda", x.disk.Size(), map[string]int{"snap-full": 16 << 10}[x.id])
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Ingest(t.Context(), x.disk, nil, nil); err != nil {
			t.Fatal(err)
		}
		w.Attach("note", []byte("attached"))
		if _, err := w.Commit(t.Context(), dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		s.Keep(t.Context(), "snap-inc", "delta", bytes.NewReader([]byte("kept"))),
		s.SetLKG(t.Context(), "srv-1", "snap-inc"),
		s.PutRecord(t.Context(), "server", "srv-1", dr.Server{ID: "srv-1", Name: "shop"}),
		s.Close(t.Context()),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestKopiaCacheVariableDoesNoHarm(t *testing.T) {
	t.Setenv("KOPIA_CACHE_DIRECTORY", t.TempDir())
	path := filepath.Join(t.TempDir(), "store")
	if err := os.CopyFS(path, os.DirFS(fixture)); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(t.Context(), folder.Driver{Path: path}, fixturePassword)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verify(t.Context(), "snap-full", nil); err != nil {
		t.Error(err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := s.Snapshot(t.Context(), "snap-full"); err == nil {
		t.Error("a closed store answers")
	}
	if err := s.Close(t.Context()); err != nil {
		t.Errorf("closed again: %v", err)
	}
}

func digest(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}
