package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"sort"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotfs"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
)

// The versions of snapshot.json and of partial.json. A reader refuses any other, and either in place of the other.
const (
	manifestFormat = "muster-snapshot-1"
	partialFormat  = "muster-partial-1"
)

// Names in the folder that a snapshot is for Kopia.
const (
	manifestFile    = "snapshot.json"
	partialFile     = "partial.json"
	mapFile         = "disk.map"
	segmentsDir     = "disk.segs"
	zeroBlockFile   = "zero.block"
	zeroTailFile    = "zero.tail"
	attachmentsDir  = "attachments"
	kindSnapshot    = "snapshot"
	kindKept        = "kept"
	kindPartial     = "partial"
	tagKind         = "tag:muster"
	tagSnapshot     = "tag:snapshot"
	tagName         = "tag:name"
	tagServer       = "tag:server" // of a partial
	tagImage        = "tag:image"  // of data: the image that it goes onto
	manifestTypeKey = manifest.TypeLabelKey
)

func diskDir(i int) string              { return fmt.Sprintf("disk%d", i) }
func listFile(i int) string             { return fmt.Sprintf("%08d.list", i) }
func dataFile(i int) string             { return fmt.Sprintf("%08d.data", i) }
func segmentFile(i int64) string        { return fmt.Sprintf("%08d.seg", i) }
func describe(id, server string) string { return "muster " + id + " of " + server }

// document is snapshot.json, or partial.json.
type document struct {
	Format      string           `json:"format"`
	Snapshot    dr.Snapshot      `json:"snapshot"`
	Zeros       []zeros          `json:"zeros"` // one a disk
	Attachments map[string]int64 `json:"attachments,omitempty"`
}

var fileNameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@+-]{0,199}$`)

// validateFileName accepts names that are safe as a file's name anywhere.
func validateFileName(name string) error {
	if !fileNameRE.MatchString(name) {
		return fmt.Errorf("file name %q: use 1 to 200 of letters, digits and . _ @ + -, starting with a letter or digit", name)
	}
	return nil
}

// decodeDocument reads and validates a document of a format. It comes from a store that somebody else may have written to.
func decodeDocument(data []byte, format string) (*document, error) {
	if len(data) > MaxManifest {
		return nil, fmt.Errorf("the manifest has %d bytes; the most is %d", len(data), MaxManifest)
	}
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, err
	}
	if d.Format != format {
		return nil, fmt.Errorf("the manifest has format %.40q; this release reads %q", d.Format, format)
	}
	s := d.Snapshot
	if err := dr.ValidateID(s.ID); err != nil {
		return nil, err
	}
	if s.Parent != "" {
		if err := dr.ValidateID(s.Parent); err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
	}
	if err := validateKind(&d); err != nil {
		return nil, err
	}
	if len(d.Attachments) > MaxAttachments {
		return nil, fmt.Errorf("the manifest lists %d attachments; the most is %d", len(d.Attachments), MaxAttachments)
	}
	for i, disk := range s.Disks {
		if err := validateDisk(disk); err != nil {
			return nil, fmt.Errorf("disk %d: %w", i, err)
		}
	}
	for name, size := range d.Attachments {
		if err := validateFileName(name); err != nil || size < 0 || size > MaxAttachment {
			return nil, fmt.Errorf("attachment %.200q of %d bytes is not allowed", name, size)
		}
	}
	return &d, nil
}

// validateKind requires disks of an image and files of data.
func validateKind(d *document) error {
	s := d.Snapshot
	switch s.Kind {
	case "", dr.SnapshotImage:
		if len(s.Disks) == 0 || len(s.Disks) > MaxDisks || len(d.Zeros) != len(s.Disks) {
			return fmt.Errorf("the manifest lists %d disks and %d maps; there must be as many of both, 1 to %d", len(s.Disks), len(d.Zeros), MaxDisks)
		}
		if s.Files != nil || s.Image != "" {
			return errors.New("the manifest of an image lists files")
		}
		return nil
	case dr.SnapshotData:
	default:
		return fmt.Errorf("the manifest is of kind %.40q, which this release does not know", s.Kind)
	}
	if s.Files == nil || len(s.Disks) > 0 || len(d.Zeros) > 0 {
		return errors.New("the manifest of data lists no files, or disks")
	}
	if err := dr.ValidateID(s.Image); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if err := (fileset.Set{Roots: s.Files.Roots, Exclude: s.Files.Exclude}).Validate(); err != nil {
		return err
	}
	if _, err := object.ParseID(s.Files.Index); err != nil || s.Files.Entries < 1 || s.Files.Bytes < 0 {
		return fmt.Errorf("the manifest lists %d files in %.80q", s.Files.Entries, s.Files.Index)
	}
	return nil
}

func validateDisk(d dr.SnapshotDisk) error {
	if _, err := newGeometry(d.Size, d.BlockSize); err != nil {
		return err
	}
	if d.Data < 0 || d.Data > d.Size {
		return fmt.Errorf("%d of its %d bytes hold data", d.Data, d.Size)
	}
	id, err := object.ParseID(d.Root)
	if err != nil {
		return fmt.Errorf("root %.80q: %w", d.Root, err)
	}
	if _, ok := id.IndexObjectID(); !ok {
		return fmt.Errorf("root %.80q is not a map", d.Root)
	}
	return nil
}

// found is a snapshot found in the store.
type found struct {
	manifest *snapshot.Manifest
	doc      *document
	root     fs.Directory
}

// findManifests gives Kopia's manifests of one snapshot, or of all with snapshotID "".
func findManifests(ctx context.Context, rep repo.Repository, kind, snapshotID string) ([]*manifest.EntryMetadata, error) {
	labels := map[string]string{manifestTypeKey: snapshot.ManifestType, tagKind: kind}
	if snapshotID != "" {
		labels[tagSnapshot] = snapshotID
	}
	return rep.FindManifests(ctx, labels)
}

func exists(ctx context.Context, rep repo.Repository, snapshotID string) (bool, error) {
	entries, err := findManifests(ctx, rep, kindSnapshot, snapshotID)
	return len(entries) > 0, err
}

// find reads the manifest of a snapshot.
func (s *Store) find(ctx context.Context, snapshotID string) (*found, error) {
	if err := dr.ValidateID(snapshotID); err != nil {
		return nil, err
	}
	entries, err := findManifests(ctx, s.rep, kindSnapshot, snapshotID)
	if err != nil {
		return nil, damaged(err)
	}
	if len(entries) == 0 {
		return nil, fmt.Errorf("snapshot %s is %w", snapshotID, ErrNotFound)
	}
	f, err := s.load(ctx, entries[0].ID, manifestFile, manifestFormat)
	if err != nil {
		return nil, err
	}
	if f.doc.Snapshot.ID != snapshotID {
		return nil, fmt.Errorf("%w: the manifest of %s says that it is %s", ErrDamaged, snapshotID, f.doc.Snapshot.ID)
	}
	return f, nil
}

// load reads one of Kopia's manifests, and the document of that name and format in its folder.
func (s *Store) load(ctx context.Context, id manifest.ID, name, format string) (*found, error) {
	rep := s.rep
	m, err := snapshot.LoadSnapshot(ctx, rep, id)
	if errors.Is(err, snapshot.ErrSnapshotNotFound) {
		return nil, fmt.Errorf("manifest %s is %w", id, ErrNotFound)
	}
	if err != nil {
		return nil, damaged(err)
	}
	entry, err := snapshotfs.SnapshotRoot(rep, m)
	if err != nil {
		return nil, damaged(err)
	}
	root, ok := entry.(fs.Directory)
	if !ok {
		return nil, fmt.Errorf("%w: manifest %s is of a file", ErrDamaged, id)
	}
	var buf bytes.Buffer
	if err := s.copyFile(ctx, root, name, &buf, MaxManifest); err != nil {
		return nil, err
	}
	doc, err := decodeDocument(buf.Bytes(), format)
	if err != nil {
		return nil, fmt.Errorf("%w: read manifest %s: %w", ErrDamaged, id, err)
	}
	return &found{manifest: m, doc: doc, root: root}, nil
}

// copyFile copies a file of a folder in the store, at most limit bytes.
func (s *Store) copyFile(ctx context.Context, dir fs.Directory, name string, w io.Writer, limit int64) error {
	e, err := dir.Child(ctx, name)
	if errors.Is(err, fs.ErrEntryNotFound) {
		return fmt.Errorf("file %s is %w", name, ErrNotFound)
	}
	if err != nil {
		return damaged(err)
	}
	return copyEntry(ctx, e, w, limit)
}

func copyEntry(ctx context.Context, e fs.Entry, w io.Writer, limit int64) error {
	f, ok := e.(fs.File)
	if !ok {
		return fmt.Errorf("%w: %s is no file", ErrDamaged, e.Name())
	}
	if f.Size() > limit {
		return fmt.Errorf("%w: %s has %d bytes; the most is %d", ErrDamaged, e.Name(), f.Size(), limit)
	}
	r, err := f.Open(ctx)
	if err != nil {
		return damaged(fmt.Errorf("open %s: %w", e.Name(), err))
	}
	defer r.Close() //nolint:errcheck // only read
	c := &sourceError{r: r}
	n, err := io.Copy(w, io.LimitReader(c, f.Size()+1))
	switch {
	case c.err != nil:
		return damaged(fmt.Errorf("read %s: %w", e.Name(), c.err))
	case err != nil:
		return err
	case n != f.Size():
		return fmt.Errorf("%w: %s has not the %d bytes it should", ErrDamaged, e.Name(), f.Size())
	}
	return nil
}

// sourceError remembers whether it was the reading that went wrong.
type sourceError struct {
	r   io.Reader
	err error
}

func (s *sourceError) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// damaged says of an error from reading that the store is damaged, unless it was only that we stopped.
func damaged(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrClosed) || errors.Is(err, ErrDamaged) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrDamaged, err)
}

// Snapshot gives a kept snapshot.
func (s *Store) Snapshot(ctx context.Context, id string) (dr.Snapshot, error) {
	ctx, done := s.bind(ctx)
	defer done()
	f, err := s.find(ctx, id)
	if err != nil {
		return dr.Snapshot{}, s.explain(err)
	}
	return f.doc.Snapshot, nil
}

// Snapshots gives every kept snapshot, oldest first. A manifest that cannot be read is an error that says which;
// the others are given all the same.
func (s *Store) Snapshots(ctx context.Context) ([]dr.Snapshot, error) {
	ctx, done := s.bind(ctx)
	defer done()
	entries, err := findManifests(ctx, s.rep, kindSnapshot, "")
	if err != nil {
		return nil, s.explain(fmt.Errorf("list snapshots: %w", damaged(err)))
	}
	out := make([]dr.Snapshot, 0, len(entries))
	var errs []error
	for _, e := range entries {
		f, err := s.load(ctx, e.ID, manifestFile, manifestFormat)
		if errors.Is(err, ErrNotFound) { // forgotten just now
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("snapshot %s: %w", e.Labels[tagSnapshot], err))
			if ctx.Err() != nil {
				break
			}
			continue
		}
		out = append(out, f.doc.Snapshot)
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].Taken.Before(out[j].Taken) })
	return out, s.explain(errors.Join(errs...))
}
