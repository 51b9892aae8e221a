package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot/snapshotfs"

	"github.com/musterdr/muster/internal/dr"
)

// maxDamages is how many damages a report lists; all are counted.
const maxDamages = 100

// VerifyReport says what was read back and what was wrong with it.
type VerifyReport struct {
	SnapshotID string   `json:"snapshot_id"`
	Blocks     int64    `json:"blocks"` // blocks read back, decrypted, hashed and found right
	Bytes      int64    `json:"bytes"`  // in them
	Zero       int64    `json:"zero"`   // blocks of zeros, of which there is nothing to read
	Files      int      `json:"files"`  // manifest, attachments and files kept later, read back
	Damaged    int64    `json:"damaged"`
	Damages    []Damage `json:"damages,omitempty"` // the first ones, by disk and offset
}

// Damage is one place that cannot be read back.
type Damage struct {
	Disk   int    `json:"disk"` // -1: a file
	Name   string `json:"name"` // of the disk or file
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Reason string `json:"reason"`
}

func (d Damage) String() string {
	if d.Disk < 0 {
		return fmt.Sprintf("file %s: %s", d.Name, d.Reason)
	}
	return fmt.Sprintf("disk %d (%s), %d bytes at %d: %s", d.Disk, d.Name, d.Length, d.Offset, d.Reason)
}

// Verify reads every block of every disk of a snapshot back from the medium, decrypts and decompresses it and hashes
// it anew. Damage is ErrDamaged, and the report says where. A snapshot with nothing to verify is an error, too.
func (s *Store) Verify(ctx context.Context, snapshotID string, progress dr.Progress) (VerifyReport, error) {
	ctx, done := s.bind(ctx)
	defer done()
	v := &verifier{s: s, progress: progress, report: VerifyReport{SnapshotID: snapshotID}, evicted: map[blob.ID]bool{}}
	err := dr.ValidateID(snapshotID)
	if err == nil {
		defer s.Pin(snapshotID)()
		err = v.run(ctx, snapshotID)
	}
	sort.SliceStable(v.report.Damages, func(i, j int) bool {
		a, b := v.report.Damages[i], v.report.Damages[j]
		if a.Disk != b.Disk {
			return a.Disk < b.Disk
		}
		return a.Offset < b.Offset
	})
	if len(v.report.Damages) > maxDamages {
		v.report.Damages = v.report.Damages[:maxDamages]
	}
	switch {
	case err != nil:
		err = s.explain(err)
	case v.report.Damaged > 0:
		err = fmt.Errorf("%w: %d places cannot be read back, first %s", ErrDamaged, v.report.Damaged, v.report.Damages[0])
	case v.report.Blocks+v.report.Zero == 0 && v.report.Files < 2: // a set of empty files has no blocks, but a listing
		err = errors.New("there was nothing to verify")
	}
	if err != nil {
		return v.report, fmt.Errorf("verify snapshot %s: %w", snapshotID, err)
	}
	return v.report, nil
}

type verifier struct {
	s        *Store
	progress dr.Progress
	session  repo.DirectRepositoryWriter // to hash with; nothing is ever written through it
	total    int64
	done     atomic.Int64

	mu      sync.Mutex
	report  VerifyReport
	evicted map[blob.ID]bool
}

func (v *verifier) run(ctx context.Context, snapshotID string) error {
	if err := v.s.Refresh(ctx); err != nil {
		return err
	}
	var err error
	_, v.session, err = v.s.rep.NewDirectWriter(ctx, repo.WriteSessionOptions{Purpose: "verify"})
	if err != nil {
		return err
	}
	defer v.session.Close(ctx) //nolint:errcheck // gives back a reference
	f, err := v.s.find(ctx, snapshotID)
	if err != nil {
		return err
	}
	v.report.Files++
	for _, d := range f.doc.Snapshot.Disks {
		v.total += d.Size
	}
	for i, d := range f.doc.Snapshot.Disks {
		if err := v.disk(ctx, f, i); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			v.damage(Damage{Disk: i, Name: d.Name, Length: d.Size, Reason: err.Error()})
		}
	}
	if files := f.doc.Snapshot.Files; files != nil {
		v.total = files.Bytes
		if err := v.fileset(ctx, f); err != nil && ctx.Err() == nil {
			v.damage(Damage{Disk: -1, Name: filesDir, Reason: err.Error()})
		}
	}
	v.files(ctx, f)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (v *verifier) damage(d Damage) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Damaged++
	if len(v.report.Damages) < 4*maxDamages { // workers run ahead of one another; the first are chosen at the end
		v.report.Damages = append(v.report.Damages, d)
	}
}

// disk verifies one disk, segment by segment. An error is one of the map's root; all else is noted.
func (v *verifier) disk(ctx context.Context, f *found, i int) error {
	m, err := v.s.newImage(ctx, f, i)
	if err != nil {
		return err
	}
	defer m.Close() //nolint:errcheck // only read
	name := f.doc.Snapshot.Disks[i].Name
	type job struct {
		block int64
		id    content.ID
	}
	jobs := make(chan job, 64)
	var wg sync.WaitGroup
	for range 2 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for j := range jobs {
				if ctx.Err() != nil {
					continue
				}
				length := m.geo.blockLen(j.block)
				if err := v.block(ctx, j.id, length); err != nil && ctx.Err() == nil {
					v.damage(Damage{Disk: i, Name: name, Offset: j.block * m.geo.block, Length: length, Reason: err.Error()})
				}
				v.progress.Report("verify", v.done.Add(length), v.total, "bytes")
			}
		})
	}
	for n := range m.geo.segments() {
		if ctx.Err() != nil {
			break
		}
		length := m.geo.segmentLen(n)
		if m.segments[n] == object.EmptyID {
			v.zero(int64(m.geo.segmentBlocks(n)), length)
			continue
		}
		blocks, err := m.segment(ctx, n)
		if err != nil {
			v.damage(Damage{Disk: i, Name: name, Offset: n * SegmentSize, Length: length, Reason: err.Error()})
			v.done.Add(length)
			continue
		}
		for k, id := range blocks {
			b := n*m.geo.perSegment() + int64(k)
			if id == content.EmptyID {
				v.zero(1, m.geo.blockLen(b))
				continue
			}
			jobs <- job{block: b, id: id}
		}
	}
	close(jobs)
	wg.Wait()
	return nil
}

func (v *verifier) zero(blocks, bytes int64) {
	v.mu.Lock()
	v.report.Zero += blocks
	v.mu.Unlock()
	v.progress.Report("verify", v.done.Add(bytes), v.total, "bytes")
}

// block reads one block back; length is what it must have, -1 for any. Writing it again, into a session that is thrown away, makes Kopia hash it: the same
// bytes give the same identifier and, since that is there already, nothing else happens.
func (v *verifier) block(ctx context.Context, id content.ID, length int64) error {
	info, err := v.s.rep.ContentInfo(ctx, id)
	if err != nil {
		return err
	}
	if info.Deleted {
		return errors.New("it is marked as deleted although the snapshot names it")
	}
	v.evict(ctx, info.PackBlobID)
	data, err := v.s.rep.ContentReader().GetContent(ctx, id)
	if err != nil {
		return err
	}
	if length < 0 {
		length = int64(len(data))
	}
	if int64(len(data)) != length {
		return fmt.Errorf("it has %d bytes, not %d", len(data), length)
	}
	again, err := putObject(withoutWriting(ctx), v.session, data, string(id.Prefix()), "", objectSplitter)
	if err != nil || again != object.DirectObjectID(id) {
		return errors.New("its bytes do not have the hash by which they are named")
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.report.Blocks++
	v.report.Bytes += length
	return nil
}

// evict makes a pack be read from the medium and not from memory, once.
func (v *verifier) evict(ctx context.Context, id blob.ID) {
	v.mu.Lock()
	defer v.mu.Unlock() // nobody reads of it before that is done
	if !v.evicted[id] {
		v.evicted[id] = true
		v.s.place.Evict(ctx, id)
	}
}

// fileset verifies a set of files: every listing, and every piece of every content. An error is one of the listings; all else
// is noted.
func (v *verifier) fileset(ctx context.Context, f *found) error {
	files, err := v.s.openFiles(ctx, f)
	if err != nil {
		return err
	}
	jobs := make(chan *FileEntry, 64)
	var wg sync.WaitGroup
	for range 2 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for e := range jobs {
				if ctx.Err() != nil {
					continue
				}
				if err := v.content(ctx, e.Content); err != nil && ctx.Err() == nil {
					v.damage(Damage{Disk: -1, Name: fmt.Sprintf("%.300q", e.Path), Length: e.Content.Length, Reason: err.Error()})
				}
				v.progress.Report("verify", v.done.Add(e.Content.Length), v.total, "bytes")
			}
		})
	}
	defer wg.Wait()
	defer close(jobs)
	var entries, bytes int64
	for all := files.All(); ; entries++ {
		e, err := all.Next(ctx)
		switch {
		case errors.Is(err, io.EOF) && (entries != f.doc.Snapshot.Files.Entries || bytes != f.doc.Snapshot.Files.Bytes):
			return fmt.Errorf("the listings have %d entries with %d bytes, not %d with %d", entries, bytes, f.doc.Snapshot.Files.Entries, f.doc.Snapshot.Files.Bytes)
		case errors.Is(err, io.EOF):
			v.mu.Lock()
			v.report.Files += 1 + len(files.leaves)
			v.mu.Unlock()
			return nil
		case err != nil:
			return err
		}
		if bytes += e.Content.Length; e.Content.Length > 0 {
			jobs <- e
		}
	}
}

// content reads every piece of a content back.
func (v *verifier) content(ctx context.Context, c Content) error {
	ids, err := v.s.rep.VerifyObject(ctx, c.object)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := v.block(ctx, id, -1); err != nil {
			return err
		}
	}
	r, err := v.s.rep.OpenObject(ctx, c.object)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // only read
	if r.Length() != c.Length {
		return fmt.Errorf("it has %d bytes, not %d", r.Length(), c.Length)
	}
	return nil
}

// files reads the attachments and the files kept later.
func (v *verifier) files(ctx context.Context, f *found) {
	check := func(name string, read func() error) {
		if err := read(); err != nil {
			if ctx.Err() == nil {
				v.damage(Damage{Disk: -1, Name: name, Reason: err.Error()})
			}
			return
		}
		v.report.Files++
	}
	for name := range f.doc.Attachments {
		check(name, func() error {
			_, err := v.s.attachment(ctx, f, name)
			return err
		})
	}
	all, err := v.s.keptManifests(ctx, f.doc.Snapshot.ID)
	if err != nil {
		v.damage(Damage{Disk: -1, Name: "kept files", Reason: err.Error()})
	}
	for name, m := range all {
		check(name, func() error {
			var e fs.Entry = snapshotfs.EntryFromDirEntry(v.s.rep, m.RootEntry)
			return copyEntry(ctx, e, io.Discard, MaxKept)
		})
	}
}

// blobs counts the blobs and their bytes.
func (s *Store) blobs(ctx context.Context) (bytes int64, count int, err error) {
	err = s.place.ListBlobs(ctx, "", func(m blob.Metadata) error {
		bytes += m.Length
		count++
		return ctx.Err()
	})
	return bytes, count, err
}
