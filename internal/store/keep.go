package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sort"
	"time"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotfs"

	"github.com/musterdr/muster/internal/dr"
)

// Attachment gives a file that was attached to a snapshot when it was written. One that was not is ErrNotFound.
func (s *Store) Attachment(ctx context.Context, snapshotID, name string) ([]byte, error) {
	ctx, done := s.bind(ctx)
	defer done()
	f, err := s.find(ctx, snapshotID)
	var data []byte
	if err == nil {
		data, err = s.attachment(ctx, f, name)
	}
	if err != nil {
		return nil, fmt.Errorf("read attachment %s of %s: %w", name, snapshotID, s.explain(err))
	}
	return data, nil
}

func (s *Store) attachment(ctx context.Context, f *found, name string) ([]byte, error) {
	if _, ok := f.doc.Attachments[name]; !ok {
		return nil, ErrNotFound
	}
	e, err := f.root.Child(ctx, attachmentsDir)
	if err != nil {
		return nil, damaged(err)
	}
	dir, ok := e.(fs.Directory)
	if !ok {
		return nil, fmt.Errorf("%w: %s is no folder", ErrDamaged, attachmentsDir)
	}
	var buf bytes.Buffer
	err = s.copyFile(ctx, dir, name, &buf, MaxAttachment)
	return buf.Bytes(), err
}

// KeptFile is a file added to a snapshot after it was kept.
type KeptFile struct {
	Name string
	Size int64
	At   time.Time
}

// Keep adds a file to a kept snapshot: a delta, the evidence of a test. It is forgotten with the snapshot; kept again
// under the same name it replaces the first. Collect waits for it as for a snapshot being written.
func (s *Store) Keep(ctx context.Context, snapshotID, name string, r io.Reader) error {
	err := errors.Join(dr.ValidateID(snapshotID), validateFileName(name))
	if err == nil {
		err = s.keep(ctx, snapshotID, name, r)
	}
	if err != nil {
		return fmt.Errorf("keep %s with %s: %w", name, snapshotID, s.explain(err))
	}
	return nil
}

func (s *Store) keep(ctx context.Context, snapshotID, name string, r io.Reader) error {
	ctx, done := s.bind(ctx)
	defer done()
	unlock, err := s.lock(ctx, lockIngest, false)
	if err != nil {
		return err
	}
	defer unlock()
	defer s.Pin(snapshotID)()
	if err := s.rep.Refresh(ctx); err != nil {
		return err
	}
	id, size, err := s.putFile(ctx, name, r)
	if err != nil {
		return err
	}
	return s.mutate(ctx, "keep", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		there, err := exists(ctx, w, snapshotID)
		if err != nil {
			return damaged(err)
		}
		if !there {
			return ErrNotFound
		}
		if err := dropKept(ctx, w, snapshotID, name); err != nil {
			return err
		}
		now := fs.UTCTimestampFromTime(s.now())
		_, err = snapshot.SaveSnapshot(ctx, w, &snapshot.Manifest{
			Source:      snapshotSource(snapshotID, "/"+name),
			Description: "muster " + name + " of " + snapshotID,
			StartTime:   now, EndTime: now,
			RootEntry: &snapshot.DirEntry{Name: name, Type: snapshot.EntryTypeFile, Permissions: 0o600, FileSize: size, ModTime: now, ObjectID: id},
			Stats:     snapshot.Stats{TotalFileCount: 1, TotalFileSize: size},
			Tags:      map[string]string{tagKind: kindKept, tagSnapshot: snapshotID, tagName: name},
		})
		return err
	})
}

// Drop forgets a file added with Keep before its snapshot is forgotten. One that is not there is no error.
func (s *Store) Drop(ctx context.Context, snapshotID, name string) error {
	ctx, done := s.bind(ctx)
	defer done()
	err := errors.Join(dr.ValidateID(snapshotID), validateFileName(name))
	if err == nil {
		err = s.mutate(ctx, "drop", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			return dropKept(ctx, w, snapshotID, name)
		})
	}
	if err != nil {
		return fmt.Errorf("drop %s of %s: %w", name, snapshotID, s.explain(err))
	}
	return nil
}

func dropKept(ctx context.Context, w repo.RepositoryWriter, snapshotID, name string) error {
	old, err := w.FindManifests(ctx, keptLabels(snapshotID, name))
	if err != nil {
		return damaged(err)
	}
	for _, e := range old {
		if err := w.DeleteManifest(ctx, e.ID); err != nil {
			return err
		}
	}
	return nil
}

func keptLabels(snapshotID, name string) map[string]string {
	return map[string]string{manifestTypeKey: snapshot.ManifestType, tagKind: kindKept, tagSnapshot: snapshotID, tagName: name}
}

// putFile writes a file's content so that it is on the medium.
func (s *Store) putFile(ctx context.Context, name string, r io.Reader) (object.ID, int64, error) {
	ctx, w, err := s.rep.NewDirectWriter(ctx, repo.WriteSessionOptions{Purpose: "keep"})
	if err != nil {
		return object.EmptyID, 0, err
	}
	defer w.Close(ctx) //nolint:errcheck // gives back a reference
	o := w.NewObjectWriter(ctx, object.WriterOptions{
		Description: name, Splitter: "FIXED-1M", Compressor: compressorFast, MetadataCompressor: compressorFast,
	})
	defer o.Close() //nolint:errcheck // gives back memory
	n, err := io.Copy(o, io.LimitReader(r, MaxKept+1))
	if err != nil {
		return object.EmptyID, 0, err
	}
	if n > MaxKept {
		return object.EmptyID, 0, fmt.Errorf("it has more than %d bytes", int64(MaxKept))
	}
	id, err := o.Result()
	if err != nil {
		return object.EmptyID, 0, err
	}
	return id, n, w.Flush(ctx)
}

// keptManifests gives the files added to a snapshot by name.
func (s *Store) keptManifests(ctx context.Context, snapshotID string) (map[string]*snapshot.Manifest, error) {
	entries, err := findManifests(ctx, s.rep, kindKept, snapshotID)
	if err != nil {
		return nil, damaged(err)
	}
	out := map[string]*snapshot.Manifest{}
	for _, e := range entries { // in the order of time: the newest of a name wins
		m, err := snapshot.LoadSnapshot(ctx, s.rep, e.ID)
		if errors.Is(err, snapshot.ErrSnapshotNotFound) {
			continue
		}
		if err != nil {
			return nil, damaged(err)
		}
		if name := e.Labels[tagName]; validateFileName(name) == nil && m.RootEntry != nil {
			out[name] = m
		}
	}
	return out, nil
}

// Kept lists the files added to a kept snapshot, by name.
func (s *Store) Kept(ctx context.Context, snapshotID string) ([]KeptFile, error) {
	ctx, done := s.bind(ctx)
	defer done()
	all, err := s.keptManifests(ctx, snapshotID)
	if err != nil {
		return nil, fmt.Errorf("list files kept with %s: %w", snapshotID, s.explain(err))
	}
	var out []KeptFile
	for name, m := range all {
		out = append(out, KeptFile{Name: name, Size: m.RootEntry.FileSize, At: m.StartTime.ToTime()})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

// Fetch writes a file added with Keep to w. One that is not there is ErrNotFound.
func (s *Store) Fetch(ctx context.Context, snapshotID, name string, w io.Writer) error {
	ctx, done := s.bind(ctx)
	defer done()
	defer s.Pin(snapshotID)()
	all, err := s.keptManifests(ctx, snapshotID)
	if err == nil {
		m, ok := all[name]
		if !ok {
			return fmt.Errorf("fetch %s of %s: %w", name, snapshotID, ErrNotFound)
		}
		err = copyEntry(ctx, snapshotfs.EntryFromDirEntry(s.rep, m.RootEntry), w, MaxKept)
	}
	if err != nil {
		return fmt.Errorf("fetch %s of %s: %w", name, snapshotID, s.explain(err))
	}
	return nil
}
