package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"slices"
	"sort"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"

	"github.com/musterdr/muster/internal/fileset"
)

// A set of files is a listing and contents. The listing is cut into leaves, at places that depend on the names alone, so that
// a change touches one leaf; each leaf is two objects: its entries, and one indirect object that names their contents, so that
// a collection sees them. An index lists the leaves. docs/formats/files.md has every byte of it.

const (
	filesFormat    = "muster-files-1\n"
	leafMin        = 128     // entries of a leaf, but for the last
	leafMax        = 4096    // entries
	leafBytes      = 1 << 20 // of entries: a leaf ends when it has so many
	leafOneIn      = 512     // of the names may a leaf begin at
	maxLeafBytes   = leafBytes + fileset.MaxEntryBytes + 1<<10
	maxObjectName  = 200
	MaxFilesIndex  = 64 << 20     // bytes of an index: about 150 million entries
	contentPieces  = "FIXED-128K" // how contents are cut: what is written in place changes one piece
	filesSeenHint  = 1 << 16
	filesIndexFile = "index"
	filesDir       = "files"
	noContent      = "" // what an entry names that has none
)

// FilesWriter is the set of files of a snapshot being written. It is used by one goroutine; contents may be written by others.
type FilesWriter struct {
	w       *Writer
	image   string
	set     fileset.Set
	check   fileset.Checker
	leaf    leaf
	leaves  []leafRef
	entries int64
	bytes   int64
	changed int64
	gone    int64
	differs int64 // bytes of content of entries that are new or changed
	seen    *filter
	fresh   int64
}

// leaf is some entries that follow one another.
type leaf struct {
	first   string
	count   int64
	entries []byte
	node    contentNode
}

// contentNode is Kopia's indirect object over contents of any length.
type contentNode struct {
	entries []object.IndirectObjectEntry
	length  int64
}

// leafRef is a leaf that is kept.
type leafRef struct {
	list   object.ID
	listed int64     // bytes of it; only while it is written
	data   object.ID // empty if its entries have no content
	count  int64
	bytes  int64 // of content
	first  string
}

// Content is the content of one file in the store, holes left out.
type Content struct {
	object object.ID
	Length int64
}

// Files makes the snapshot one of files, which go onto an image that must be kept and cannot be forgotten before they are.
func (w *Writer) Files(ctx context.Context, image string, set fileset.Set) (*FilesWriter, error) {
	if err := w.usable(ctx); err != nil {
		return nil, fmt.Errorf("begin files: %w", err)
	}
	if err := set.Validate(); err != nil {
		return nil, fmt.Errorf("begin files: %w", err)
	}
	unlock, err := w.s.lock(ctx, lockPin+image, false)
	if err != nil {
		return nil, fmt.Errorf("begin files: %w", err)
	}
	w.mu.Lock()
	w.release = append(w.release, unlock)
	w.mu.Unlock()
	f, err := w.s.find(ctx, image)
	if err == nil && f.doc.Snapshot.IsData() {
		err = errors.New("it is not an image")
	}
	if err != nil {
		return nil, fmt.Errorf("begin files: image %s: %w", image, w.s.explain(err))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.disks) > 0 || w.files != nil {
		return nil, errors.New("begin files: the snapshot has disks or files already")
	}
	w.files = &FilesWriter{w: w, image: image, set: set, check: fileset.Checker{Set: set}, seen: newFilter(filesSeenHint)}
	return w.files, nil
}

// ContentWriter writes the content of one file. It must be closed.
type ContentWriter struct {
	f    *FilesWriter
	o    object.Writer
	size int64
}

// Content begins the content of a file, holes left out. Contents may be written by many goroutines, each by one.
func (f *FilesWriter) Content() *ContentWriter {
	return &ContentWriter{f: f, o: f.w.session.NewObjectWriter(f.w.ctx, object.WriterOptions{
		Compressor: compressorName(compressorFast), MetadataCompressor: compressorName(compressorFast), Splitter: contentPieces,
	})}
}

// Write writes more of it.
func (c *ContentWriter) Write(p []byte) (int, error) {
	n, err := c.o.Write(p)
	c.size += int64(n)
	return n, c.f.w.s.explain(err)
}

// Size is how many bytes were written.
func (c *ContentWriter) Size() int64 { return c.size }

// Result ends the content. What the store has already takes no room.
func (c *ContentWriter) Result() (Content, error) {
	if c.size == 0 {
		return Content{}, nil
	}
	id, err := c.o.Result()
	if err == nil {
		err = c.f.w.flushSome()
	}
	if err != nil {
		return Content{}, c.f.w.fail(fmt.Errorf("write a content: %w", c.f.w.s.explain(err)))
	}
	return Content{object: id, Length: c.size}, nil
}

// Close gives back what an unfinished content takes. It may be called after Result.
func (c *ContentWriter) Close() { _ = c.o.Close() }

// Add adds an entry, in fileset.Compare's order, with its content, which must be as long as the entry says. same says that the
// parent has it just so.
func (f *FilesWriter) Add(ctx context.Context, e *fileset.Entry, c Content, same bool) error {
	if err := f.w.usable(ctx); err != nil {
		return err
	}
	if c.Length != e.Stored() || (c.Length > 0) == (c.object == object.EmptyID) {
		return f.w.fail(fmt.Errorf("add %.200q: it has %d bytes of content, and %d were written", e.Path, e.Stored(), c.Length))
	}
	if err := f.check.Next(e); err != nil {
		return f.w.fail(fmt.Errorf("add to the files: %w", err))
	}
	if f.cuts(e.Path) {
		if err := f.endLeaf(); err != nil {
			return err
		}
	}
	if f.leaf.count == 0 {
		f.leaf.first = e.Path
	}
	f.leaf.entries = appendLeafEntry(f.leaf.entries, e, c)
	f.leaf.count++
	f.entries++
	if c.Length > 0 {
		f.leaf.node.entries = append(f.leaf.node.entries, object.IndirectObjectEntry{Start: f.leaf.node.length, Length: c.Length, Object: c.object})
		f.leaf.node.length += c.Length
		f.bytes += c.Length
	}
	if !same {
		f.changed++
		return f.count(c)
	}
	return nil
}

// Gone counts an entry that the parent has and this has not.
func (f *FilesWriter) Gone() { f.gone++ }

// count notes what of a content is new in the store.
func (f *FilesWriter) count(c Content) error {
	f.differs += c.Length
	ids, err := f.pieces(c)
	if err != nil {
		return f.w.fail(err)
	}
	for _, id := range ids {
		info, err := f.w.session.ContentInfo(f.w.ctx, id)
		if err != nil {
			return f.w.fail(f.w.s.explain(err))
		}
		if f.w.isMine(info.PackBlobID) && f.seen.add(id.Hash()) {
			f.fresh += int64(info.OriginalLength)
		}
	}
	return nil
}

// pieces gives what a content consists of, without order.
func (f *FilesWriter) pieces(c Content) ([]content.ID, error) {
	if c.Length == 0 {
		return nil, nil
	}
	if id, _, ok := c.object.ContentID(); ok {
		return []content.ID{id}, nil
	}
	ids, err := f.w.session.VerifyObject(f.w.ctx, c.object)
	if err != nil {
		return nil, f.w.s.explain(err)
	}
	return slices.DeleteFunc(ids, content.ID.HasPrefix), nil // with a prefix: what lists the others
}

// Changed counts the blocks of DefaultBlockSize of a content that another one, of this snapshot or an earlier one, does not have.
func (f *FilesWriter) Changed(before, now Content) (blocks int64, err error) {
	if before == now {
		return 0, nil
	}
	was, err := f.pieces(before)
	if err != nil {
		return 0, fmt.Errorf("compare contents: %w", err)
	}
	is, err := f.pieces(now)
	if err != nil {
		return 0, fmt.Errorf("compare contents: %w", err)
	}
	there := make(map[content.ID]bool, len(was))
	for _, id := range was {
		there[id] = true
	}
	for _, id := range is {
		if !there[id] {
			blocks++
		}
	}
	return blocks, nil
}

// cuts says whether a leaf ends before a path. It depends on names and not on what was there before, so that equal runs of
// entries come to lie in equal leaves.
func (f *FilesWriter) cuts(path string) bool {
	switch {
	case f.leaf.count >= leafMax || len(f.leaf.entries) >= leafBytes:
		return true
	case f.leaf.count < leafMin:
		return false
	}
	h := fnv.New64a()
	_, _ = io.WriteString(h, path)
	return h.Sum64()%leafOneIn == 0
}

// endLeaf keeps the entries gathered so far.
func (f *FilesWriter) endLeaf() error {
	l := &f.leaf
	if l.count == 0 {
		return nil
	}
	ref := leafRef{listed: int64(len(l.entries)), count: l.count, bytes: l.node.length, first: l.first}
	var err error
	if ref.list, err = f.w.put(l.entries, "", compressorSmall); err == nil && l.node.length > 0 {
		ref.data, err = f.w.putNode(l.node.entries)
	}
	if err != nil {
		return f.w.fail(fmt.Errorf("write a listing: %w", f.w.s.explain(err)))
	}
	f.leaves = append(f.leaves, ref)
	f.leaf = leaf{entries: l.entries[:0], node: contentNode{entries: l.node.entries[:0]}}
	return nil
}

// seal ends the listing and keeps its index.
func (f *FilesWriter) seal() (index object.ID, size int64, err error) {
	if err := f.endLeaf(); err != nil {
		return index, 0, err
	}
	if f.entries == 0 {
		return index, 0, errors.New("it has no file, not even a folder")
	}
	b := []byte(filesFormat)
	for _, l := range f.leaves {
		b = appendText(b, l.list.String())
		b = appendText(b, l.data.String())
		b = binary.AppendUvarint(b, uint64(l.count))
		b = binary.AppendUvarint(b, uint64(l.bytes))
		b = appendText(b, l.first)
	}
	if len(b) > MaxFilesIndex {
		return index, 0, fmt.Errorf("it has too many files: %d", f.entries)
	}
	index, err = f.w.put(b, "", compressorSmall)
	return index, int64(len(b)), err
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendLeafEntry(b []byte, e *fileset.Entry, c Content) []byte {
	b = e.AppendBinary(b)
	if c.Length == 0 {
		return appendText(b, noContent)
	}
	return appendText(b, c.object.String())
}

// cutText reads what appendText wrote from the front of b.
func cutText(b []byte, limit int) (s string, rest []byte, ok bool) {
	n, used := binary.Uvarint(b)
	if used <= 0 || n > uint64(limit) || n > uint64(len(b)-used) {
		return "", nil, false
	}
	return string(b[used : used+int(n)]), b[used+int(n):], true
}

// decodeIndex reads an index. It comes from a store that somebody else may have written to.
func decodeIndex(b []byte) ([]leafRef, error) {
	if len(b) < len(filesFormat) || string(b[:len(filesFormat)]) != filesFormat {
		return nil, errors.New("the index of the files has a format that this release does not read")
	}
	b = b[len(filesFormat):]
	bad := errors.New("the index of the files is no index")
	var out []leafRef
	for len(b) > 0 {
		var l leafRef
		list, rest, ok := cutText(b, maxObjectName)
		data, rest, ok2 := cutText(rest, maxObjectName)
		count, used := binary.Uvarint(rest)
		if !ok || !ok2 || used <= 0 || count < 1 || count > leafMax {
			return nil, bad
		}
		bytes, used2 := binary.Uvarint(rest[used:])
		if used2 <= 0 || bytes > 1<<62 {
			return nil, bad
		}
		first, rest, ok := cutText(rest[used+used2:], fileset.MaxPath)
		if !ok || len(out) > 0 && fileset.Compare(out[len(out)-1].first, first) >= 0 {
			return nil, bad
		}
		l.count, l.bytes, l.first, b = int64(count), int64(bytes), first, rest
		var err error
		if l.list, err = object.ParseID(list); err != nil {
			return nil, bad
		}
		if data != "" {
			if l.data, err = object.ParseID(data); err != nil {
				return nil, bad
			}
		}
		if (l.bytes > 0) != (data != "") {
			return nil, bad
		}
		out = append(out, l)
	}
	if len(out) == 0 {
		return nil, bad
	}
	return out, nil
}

// decodeLeaf reads the entries of a leaf.
func decodeLeaf(b []byte, ref leafRef) ([]FileEntry, error) {
	out := make([]FileEntry, 0, ref.count)
	var bytes int64
	for len(b) > 0 {
		e, rest, err := fileset.Decode(b)
		if err != nil {
			return nil, err
		}
		name, rest, ok := cutText(rest, maxObjectName)
		if !ok || int64(len(out)) >= ref.count {
			return nil, fmt.Errorf("the listing goes on after its end, or an entry names no content")
		}
		f := FileEntry{Entry: e, Content: Content{Length: e.Stored()}}
		if name != noContent {
			if f.Content.object, err = object.ParseID(name); err != nil {
				return nil, fmt.Errorf("content %.80q of %.100q: %w", name, e.Path, err)
			}
		}
		if (f.Content.Length > 0) != (name != noContent) || f.Content.Length > ref.bytes-bytes {
			return nil, fmt.Errorf("%.100q has another content than its entry says", e.Path)
		}
		bytes += f.Content.Length
		out, b = append(out, f), rest
	}
	if int64(len(out)) != ref.count || bytes != ref.bytes || out[0].Path != ref.first {
		return nil, errors.New("the listing is not the one that its index names")
	}
	return out, nil
}

// FileEntry is an entry with its content.
type FileEntry struct {
	fileset.Entry
	Content Content
}

// Files is the set of files of a kept snapshot, open. While it is open the snapshot cannot be forgotten. It may be used from
// many goroutines.
type Files struct {
	s       *Store
	id      string
	set     fileset.Set
	leaves  []leafRef
	release func()
}

// Files opens the files of a snapshot. One that has none is ErrNotFound.
func (s *Store) Files(ctx context.Context, snapshotID string) (*Files, error) {
	ctx, done := s.bind(ctx)
	defer done()
	release := s.Pin(snapshotID)
	f, err := s.find(ctx, snapshotID)
	var out *Files
	if err == nil {
		out, err = s.openFiles(ctx, f)
	}
	if err != nil {
		release()
		return nil, fmt.Errorf("open files of %s: %w", snapshotID, s.explain(err))
	}
	out.release = release
	return out, nil
}

func (s *Store) openFiles(ctx context.Context, f *found) (*Files, error) {
	files := f.doc.Snapshot.Files
	if files == nil {
		return nil, fmt.Errorf("files of an image are %w", ErrNotFound)
	}
	id, err := object.ParseID(files.Index)
	if err != nil {
		return nil, damaged(err)
	}
	b, err := s.object(ctx, id, MaxFilesIndex)
	if err != nil {
		return nil, err
	}
	leaves, err := decodeIndex(b)
	if err != nil {
		return nil, damaged(err)
	}
	return &Files{s: s, id: f.doc.Snapshot.ID, set: fileset.Set{Roots: files.Roots, Exclude: files.Exclude}, leaves: leaves, release: func() {}}, nil
}

// object reads a whole object of at most limit bytes.
func (s *Store) object(ctx context.Context, id object.ID, limit int64) ([]byte, error) {
	r, err := s.rep.OpenObject(ctx, id)
	if err != nil {
		return nil, damaged(err)
	}
	defer r.Close() //nolint:errcheck // only read
	if r.Length() > limit {
		return nil, damaged(fmt.Errorf("object %s has %d bytes; the most is %d", id, r.Length(), limit))
	}
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, damaged(err)
	}
	return b, nil
}

// Close lets the snapshot go.
func (f *Files) Close() { f.release() }

// Set is what was asked for.
func (f *Files) Set() fileset.Set { return f.set }

// Cursor gives entries one after another, with one leaf of them in memory. It is used by one goroutine.
type Cursor struct {
	f     *Files
	check fileset.Checker
	next  int // leaf
	now   []FileEntry
}

// All gives every entry, in fileset.Compare's order.
func (f *Files) All() *Cursor { return &Cursor{f: f, check: fileset.Checker{Set: f.set}} }

// Next gives the next entry; io.EOF after the last. What is not in order or in no folder is ErrDamaged.
func (c *Cursor) Next(ctx context.Context) (*FileEntry, error) {
	for len(c.now) == 0 {
		if c.next == len(c.f.leaves) {
			return nil, io.EOF
		}
		var err error
		if c.now, err = c.f.leaf(ctx, c.next); err != nil {
			return nil, fmt.Errorf("read files of %s: %w", c.f.id, c.f.s.explain(err))
		}
		c.next++
	}
	e := &c.now[0]
	c.now = c.now[1:]
	if err := c.check.Next(&e.Entry); err != nil {
		return nil, fmt.Errorf("read files of %s: %w", c.f.id, damaged(err))
	}
	return e, nil
}

func (f *Files) leaf(ctx context.Context, n int) ([]FileEntry, error) {
	ctx, done := f.s.bind(ctx)
	defer done()
	b, err := f.s.object(ctx, f.leaves[n].list, maxLeafBytes)
	if err != nil {
		return nil, err
	}
	out, err := decodeLeaf(b, f.leaves[n])
	if err != nil {
		return nil, damaged(err)
	}
	return out, nil
}

// Find gives the entry of one path. One that is not there is ErrNotFound.
func (f *Files) Find(ctx context.Context, path string) (*FileEntry, error) {
	n := sort.Search(len(f.leaves), func(i int) bool { return fileset.Compare(f.leaves[i].first, path) > 0 }) - 1
	if n >= 0 {
		entries, err := f.leaf(ctx, n)
		if err != nil {
			return nil, fmt.Errorf("find %.200q in %s: %w", path, f.id, f.s.explain(err))
		}
		i := sort.Search(len(entries), func(i int) bool { return fileset.Compare(entries[i].Path, path) >= 0 })
		if i < len(entries) && entries[i].Path == path {
			return &entries[i], nil
		}
	}
	return nil, fmt.Errorf("find %.200q in %s: %w", path, f.id, ErrNotFound)
}

// Data reads the content of a file, holes left out. Close it.
func (f *Files) Data(ctx context.Context, e *FileEntry) (io.ReadCloser, error) {
	if e.Content.Length == 0 {
		return io.NopCloser(eof{}), nil
	}
	r, err := f.s.rep.OpenObject(ctx, e.Content.object)
	if err == nil && r.Length() != e.Content.Length {
		err = errors.Join(fmt.Errorf("it has %d bytes, not %d", r.Length(), e.Content.Length), r.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("read %.200q of %s: %w", e.Path, f.id, f.s.explain(damaged(err)))
	}
	return r, nil
}

// eof is a content of nothing.
type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }
