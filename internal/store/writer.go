package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotfs"

	"github.com/musterdr/muster/internal/dr"
)

// flushEvery is how many new blocks are held in memory, about 0.6 KB each, before the index of them is written.
const flushEvery = 64 << 10

// Writer is a snapshot being written. Nothing of it can be seen before Commit. Methods may be called from many
// goroutines, but none together with Commit or Abort.
type Writer struct {
	s        *Store
	id       string
	parentID string
	parent   *found // what disks start with; nil for zeros
	resumed  bool   // parent is a partial, and the snapshot a full one
	began    time.Time
	blockCmp string // compressor of blocks

	ctx     context.Context // of the write session; ends with the store
	cancel  context.CancelFunc
	session repo.DirectRepositoryWriter
	mine    *sessions
	release []func() // locks and pins, in the order they were taken

	pending  atomic.Int64 // new blocks since the last flush
	uploaded atomic.Int64

	mu     sync.Mutex
	disks  []*DiskWriter
	files  *FilesWriter // of a snapshot of files
	attach map[string][]byte
	zero   map[int64]object.ID // by length
	failed error               // the first failure; after it nothing is written
	closed bool
}

// Begin starts a snapshot. With a parent, disks start with the parent's content and only what differs is written.
//
// A snapshot that is kept already is ErrExists, a parent that is not is ErrNotFound, one that somebody else is writing
// is ErrBusy. While a collection runs, Begin waits for its end or that of ctx.
func (s *Store) Begin(ctx context.Context, snapshotID, parentID string) (*Writer, error) {
	w := &Writer{s: s, id: snapshotID, parentID: parentID, began: time.Now(), mine: &sessions{}, blockCmp: compressorFast,
		attach: map[string][]byte{}, zero: map[int64]object.ID{}}
	if err := dr.ValidateID(snapshotID); err != nil {
		return nil, fmt.Errorf("begin snapshot: %w", err)
	}
	if err := w.begin(ctx); err != nil {
		w.end()
		return nil, fmt.Errorf("begin snapshot %s: %w", snapshotID, s.explain(err))
	}
	return w, nil
}

func (w *Writer) begin(ctx context.Context) error {
	s := w.s
	ctx, done := s.bind(ctx)
	defer done()
	unlock, taken, err := s.place.TryLock(lockWrite+w.id, true)
	if err != nil {
		return err
	}
	if !taken {
		return fmt.Errorf("%w: somebody is writing this snapshot", ErrBusy)
	}
	w.release = append(w.release, unlock)
	if unlock, err = s.lock(ctx, lockIngest, false); err != nil {
		return err
	}
	w.release = append(w.release, unlock)
	if w.parentID != "" {
		if unlock, err = s.lock(ctx, lockPin+w.parentID, false); err != nil {
			return err
		}
		w.release = append(w.release, unlock)
	}
	// Blocks that another process forgot and collected must not be taken for present.
	if err := s.rep.Refresh(ctx); err != nil {
		return err
	}
	if there, err := exists(ctx, s.rep, w.id); err != nil {
		return damaged(err)
	} else if there {
		return ErrExists
	}
	if w.parentID != "" {
		// An increment is small and kept long: it is worth compressing harder.
		w.blockCmp = compressorSmall
		if w.parent, err = s.find(ctx, w.parentID); err != nil {
			return fmt.Errorf("parent: %w", err)
		}
	}
	w.ctx, w.cancel = context.WithCancel(context.WithValue(s.life, sessionsKey{}, w.mine))
	_, w.session, err = s.rep.NewDirectWriter(w.ctx, repo.WriteSessionOptions{
		Purpose:  "snapshot",
		OnUpload: func(n int64) { w.uploaded.Add(n) },
	})
	return err
}

// end gives up everything the writer holds. It is safe to call again.
func (w *Writer) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.session != nil {
		_ = w.session.Close(context.WithoutCancel(w.ctx)) // gives back a reference; what was not flushed is dropped
		w.session = nil
	}
	if w.cancel != nil {
		w.cancel()
	}
	for i := len(w.release) - 1; i >= 0; i-- {
		w.release[i]()
	}
	w.release = nil
}

// Abort gives the snapshot up. It may be called more than once, and after Commit, when it does nothing.
func (w *Writer) Abort(context.Context) error {
	w.end()
	return nil
}

// Attach adds a file to be kept with the snapshot: what the capture of the next one needs, for example. The name is
// of letters, digits and . _ @ + -; attached again it replaces the first. What is wrong with it, Commit says.
func (w *Writer) Attach(name string, data []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch _, again := w.attach[name]; {
	case validateFileName(name) != nil:
		w.failed = errors.Join(w.failed, fmt.Errorf("attach: %w", validateFileName(name)))
	case len(data) > MaxAttachment:
		w.failed = errors.Join(w.failed, fmt.Errorf("attach %s: %d bytes; the most is %d", name, len(data), MaxAttachment))
	case !again && len(w.attach) >= MaxAttachments:
		w.failed = errors.Join(w.failed, fmt.Errorf("attach %s: %d files are attached already", name, MaxAttachments))
	default:
		w.attach[name] = append([]byte(nil), data...)
	}
}

// usable says whether more can be written.
func (w *Writer) usable(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.failed != nil:
		return w.failed
	case w.closed:
		return errors.New("the snapshot was committed or aborted")
	}
	return w.s.explain(w.ctx.Err())
}

// fail remembers the first failure: what follows would only hide it.
func (w *Writer) fail(err error) error {
	if err == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed == nil {
		w.failed = err
	}
	return err
}

// put writes one object in one piece and gives its identifier.
func (w *Writer) put(data []byte, prefix, compressor string) (object.ID, error) {
	return putObject(w.ctx, w.session, data, prefix, compressor, objectSplitter)
}

// putNode writes an indirect object over objects of any length.
func (w *Writer) putNode(entries []object.IndirectObjectEntry) (object.ID, error) {
	b, err := json.Marshal(struct {
		Stream  string                       `json:"stream"`
		Entries []object.IndirectObjectEntry `json:"entries"`
	}{mapStream, entries})
	if err != nil {
		return object.EmptyID, err
	}
	node, err := w.put(b, mapPrefix, compressorMap)
	if err != nil {
		return object.EmptyID, err
	}
	return indirect(node)
}

// isMine says whether a pack was written by this snapshot.
func (w *Writer) isMine(pack blob.ID) bool { return w.mine.has(content.SessionIDFromBlobID(pack)) }

func putObject(ctx context.Context, session repo.RepositoryWriter, data []byte, prefix, compressor, splitter string) (object.ID, error) {
	o := session.NewObjectWriter(ctx, object.WriterOptions{
		Prefix: contentPrefix(prefix), Compressor: compressorName(compressor), MetadataCompressor: compressorName(compressor),
		Splitter: splitter,
	})
	defer o.Close() //nolint:errcheck // gives back memory
	if _, err := o.Write(data); err != nil {
		return object.EmptyID, err
	}
	return o.Result()
}

// zeroBlock gives the object that holds that many zeros.
func (w *Writer) zeroBlock(length int64) (object.ID, error) {
	w.mu.Lock()
	id, ok := w.zero[length]
	w.mu.Unlock()
	if ok {
		return id, nil
	}
	id, err := w.put(make([]byte, length), "", compressorFast)
	if err != nil {
		return id, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.zero[length] = id
	return id, nil
}

// flushSome writes the index of new blocks now and then, so that it does not pile up in memory.
func (w *Writer) flushSome() error {
	if n := w.pending.Add(1); n%flushEvery != 0 {
		return nil
	}
	return w.session.Flush(w.ctx)
}

// Changed is how many blocks written so far differ from the parent's, or hold anything where there is none.
func (w *Writer) Changed() (blocks int64, err error) {
	for _, d := range w.disks {
		n, err := d.changedBlocks()
		if err != nil {
			return 0, fmt.Errorf("count the changed blocks of disk %s: %w", d.name, w.s.explain(err))
		}
		blocks += n
	}
	return blocks, nil
}

// Commit completes the snapshot and publishes it: when it returns without an error the snapshot is on the medium,
// was read back, and is visible; otherwise there is none, unless the medium failed right after publishing: then Begin
// says ErrExists. It fills in ID, Parent, Disks and the Changed, Resumed, New and
// Stored of Stats, where Stored counts all but the manifest itself, and returns the snapshot as kept.
func (w *Writer) Commit(ctx context.Context, snap dr.Snapshot) (dr.Snapshot, error) {
	if err := w.usable(ctx); err != nil {
		return dr.Snapshot{}, fmt.Errorf("commit snapshot %s: %w", w.id, err)
	}
	stop := context.AfterFunc(ctx, w.cancel)
	defer stop()
	defer w.end()
	snap.ID, snap.Parent = w.id, w.parentID
	out, err := w.commit(ctx, snap)
	if err != nil {
		return dr.Snapshot{}, fmt.Errorf("commit snapshot %s: %w", w.id, w.s.explain(err))
	}
	return out, nil
}

func (w *Writer) commit(ctx context.Context, snap dr.Snapshot) (dr.Snapshot, error) {
	if len(w.disks) == 0 && w.files == nil {
		return snap, errors.New("it has no disk")
	}
	doc := document{Format: manifestFormat, Snapshot: snap}
	c, err := w.seal(ctx, &doc, w.attach)
	if err != nil {
		return snap, err
	}
	doc.Snapshot.Stats.Stored = w.uploaded.Load()
	return doc.Snapshot, w.publish(ctx, doc, c)
}

// contents are what the document of a snapshot describes: all of it on the medium, and named by nothing yet.
type contents struct {
	disks     []*diskMap
	files     map[string]object.ID // attached
	filesSize int64                // of the index of a set of files
}

// seal writes out everything written so far, and describes it in the document.
func (w *Writer) seal(ctx context.Context, doc *document, attach map[string][]byte) (c contents, err error) {
	snap := &doc.Snapshot
	snap.Disks, doc.Attachments = nil, map[string]int64{}
	snap.Stats.Changed, snap.Stats.New, snap.Stats.Resumed = 0, 0, 0
	for i, d := range w.disks {
		m, err := d.seal()
		if err != nil {
			return c, fmt.Errorf("disk %d: %w", i, err)
		}
		c.disks = append(c.disks, m)
		snap.Disks = append(snap.Disks, dr.SnapshotDisk{
			Name: d.name, Size: d.geo.size, BlockSize: int(d.geo.block), Root: m.root.String(), Data: m.data,
		})
		snap.Stats.Changed += m.changed
		snap.Stats.Resumed += m.resumed
		snap.Stats.New += d.fresh.Load()
		doc.Zeros = append(doc.Zeros, m.zeros)
	}
	if c.filesSize, err = w.sealFiles(snap); err != nil {
		return c, err
	}
	c.files = make(map[string]object.ID, len(attach))
	for name, data := range attach {
		id, err := putObject(w.ctx, w.session, data, "", compressorSmall, attachedSplitter)
		if err != nil {
			return c, fmt.Errorf("attach %s: %w", name, err)
		}
		c.files[name], doc.Attachments[name] = id, int64(len(data))
	}
	if err := w.session.Flush(w.ctx); err != nil {
		return c, err
	}
	return c, w.s.place.Sync(ctx)
}

// sealFiles completes the files, if the snapshot is one of files, and says how long their index is.
func (w *Writer) sealFiles(snap *dr.Snapshot) (indexSize int64, err error) {
	f := w.files
	snap.Kind, snap.Image, snap.Files = dr.SnapshotImage, "", nil
	if f == nil {
		return 0, nil
	}
	index, size, err := f.seal()
	if err != nil {
		return 0, fmt.Errorf("files: %w", err)
	}
	snap.Kind, snap.Image = dr.SnapshotData, f.image
	snap.Files = &dr.SnapshotFiles{Roots: f.set.Roots, Exclude: f.set.Exclude, Index: index.String(), Entries: f.entries, Bytes: f.bytes,
		Changed: f.changed, Gone: f.gone}
	snap.Stats.Changed, snap.Stats.New = f.differs, f.fresh
	return size, nil
}

// publish writes the folder that names everything, and the manifest that names the folder, in one flush.
func (w *Writer) publish(ctx context.Context, doc document, c contents) error {
	data, err := encodeDocument(doc)
	if err != nil {
		return err
	}
	return w.s.mutate(ctx, "publish", func(ctx context.Context, rw repo.DirectRepositoryWriter) error {
		if there, err := exists(ctx, rw, w.id); err != nil {
			return err
		} else if there {
			return ErrExists
		}
		tags := map[string]string{tagKind: kindSnapshot, tagSnapshot: w.id}
		if image := doc.Snapshot.Image; image != "" {
			if there, err := exists(ctx, rw, image); err != nil {
				return err
			} else if !there {
				return fmt.Errorf("image %s is %w", image, ErrNotFound)
			}
			tags[tagImage] = image
		}
		if w.files == nil && doc.Snapshot.ServerID != "" {
			if err := dropPartials(ctx, rw, doc.Snapshot.ServerID); err != nil {
				return err
			}
		}
		m, err := w.describe(ctx, rw, doc, manifestFile, data, c)
		if err != nil {
			return err
		}
		m.Description, m.Tags = describe(w.id, doc.Snapshot.Server), tags
		_, err = snapshot.SaveSnapshot(ctx, rw, m)
		return err
	})
}

// encodeDocument writes a document. What could not be read must not be written.
func encodeDocument(doc document) ([]byte, error) {
	data, err := json.Marshal(doc)
	if err == nil {
		_, err = decodeDocument(data, doc.Format)
	}
	return data, err
}

// describe writes the folder that names everything, the document among it, and gives Kopia's manifest of it.
func (w *Writer) describe(ctx context.Context, rw repo.RepositoryWriter, doc document, name string, data []byte, c contents) (*snapshot.Manifest, error) {
	t := tree{ctx: ctx, rw: rw, taken: fs.UTCTimestampFromTime(doc.Snapshot.Taken)}
	var entries []*snapshot.DirEntry
	for i, m := range c.disks {
		entries = append(entries, t.dir(diskDir(i), t.disk(m)))
	}
	if w.files != nil {
		entries = append(entries, t.dir(filesDir, t.files(w.files, doc.Snapshot.Files.Index, c.filesSize)))
	}
	if len(c.files) > 0 {
		var list []*snapshot.DirEntry
		for name, id := range maps.All(c.files) {
			list = append(list, t.file(name, doc.Attachments[name], id))
		}
		entries = append(entries, t.dir(attachmentsDir, list))
	}
	entries = append(entries, t.data(name, data))
	root := t.dir("", entries)
	if t.err != nil {
		return nil, t.err
	}
	return &snapshot.Manifest{
		Source:    snapshotSource(doc.Snapshot.Server, "/"+doc.Snapshot.ServerID),
		StartTime: t.taken,
		EndTime:   t.taken,
		RootEntry: root,
		Stats:     snapshot.Stats{TotalFileCount: int32(root.DirSummary.TotalFileCount), TotalFileSize: root.DirSummary.TotalFileSize},
	}, nil
}

// snapshotSource is what a stock kopia shows as the origin of a snapshot. Every field must hold something.
func snapshotSource(server, path string) snapshot.SourceInfo {
	if server == "" {
		server = "unnamed"
	}
	return snapshot.SourceInfo{UserName: ownerUser, Host: server, Path: path}
}

// tree writes the folders of a snapshot. The first error sticks.
type tree struct {
	ctx   context.Context
	rw    repo.RepositoryWriter
	taken fs.UTCTimestamp
	err   error
}

func (t *tree) file(name string, size int64, id object.ID) *snapshot.DirEntry {
	return &snapshot.DirEntry{Name: name, Type: snapshot.EntryTypeFile, Permissions: 0o600, FileSize: size, ModTime: t.taken, ObjectID: id}
}

func (t *tree) data(name string, data []byte) *snapshot.DirEntry {
	if t.err != nil {
		return nil
	}
	id, err := putObject(t.ctx, t.rw, data, "", compressorSmall, objectSplitter)
	t.err = err
	return t.file(name, int64(len(data)), id)
}

func (t *tree) dir(name string, entries []*snapshot.DirEntry) *snapshot.DirEntry {
	if t.err != nil {
		return nil
	}
	var b snapshotfs.DirManifestBuilder
	for _, e := range entries {
		b.AddEntry(e)
	}
	m := b.Build(t.taken, "")
	id, err := snapshotfs.WriteDirManifest(t.ctx, t.rw, name, m, compressorSmall)
	t.err = err
	return &snapshot.DirEntry{Name: name, Type: snapshot.EntryTypeDirectory, Permissions: 0o700, ModTime: t.taken, ObjectID: id, DirSummary: m.Summary}
}

// files lists the index, the listings and the contents of a set of files, each as a file.
func (t *tree) files(f *FilesWriter, index string, size int64) []*snapshot.DirEntry {
	id, err := object.ParseID(index)
	if err != nil {
		t.err = err
		return nil
	}
	out := []*snapshot.DirEntry{t.file(filesIndexFile, size, id)}
	for i, l := range f.leaves {
		out = append(out, t.file(listFile(i), l.listed, l.list))
		if l.bytes > 0 {
			out = append(out, t.file(dataFile(i), l.bytes, l.data))
		}
	}
	return out
}

// disk lists the map, the segments and the zero blocks of one disk, each as a file.
func (t *tree) disk(m *diskMap) []*snapshot.DirEntry {
	segs := make([]*snapshot.DirEntry, len(m.segments))
	for i, id := range m.segments {
		segs[i] = t.file(segmentFile(int64(i)), m.geo.segmentLen(int64(i)), id)
	}
	return []*snapshot.DirEntry{
		t.file(mapFile, m.nodeSize, m.node),
		t.dir(segmentsDir, segs),
		// Named so that they are not collected: the map may not name them, but the manifest does.
		t.file(zeroBlockFile, m.geo.block, m.zeroBlock),
		t.file(zeroTailFile, m.geo.blockLen(m.geo.blocks()-1), m.zeroTail),
	}
}
