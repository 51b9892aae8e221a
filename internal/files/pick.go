package files

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/store"
)

// maxPicked is how many entries are read at once.
const maxPicked = 4 << 20

// Pick reads what lies at paths of a snapshot and below them, entry by entry, folders first, with everything that Linux keeps of
// each. content gives that of a file, holes left out, and is read before each returns. A further name of a file that came
// before is a Link to that. The folders above a path come first, with above; a path that is not there is api.NotFound.
func (b *Browser) Pick(ctx context.Context, snap dr.Snapshot, paths []string, each func(e *fileset.Entry, above bool, content io.Reader) error) error {
	picked, h, err := b.pick(ctx, snap, paths)
	if err != nil {
		return err
	}
	if snap.IsData() {
		return b.fromSet(ctx, snap, picked, each)
	}
	return b.withGuest(ctx, snap, func(g *guest, fresh bool) error {
		if fresh {
			if _, err := g.Mount(ctx, h.Mounts); err != nil {
				return fmt.Errorf("mount the file systems of %s: %w", snap.ID, err)
			}
		}
		return b.fromGuest(ctx, g, picked, paths, each)
	})
}

// chosen is an entry that is read.
type chosen struct {
	*Item
	above bool
}

// pick finds what lies at paths and below, and the folders above.
func (b *Browser) pick(ctx context.Context, snap dr.Snapshot, paths []string) (out []chosen, h Header, err error) {
	found := map[string]bool{}
	names := map[[2]uint64]string{} // of files by what they are, where that says it
	h, err = b.items(ctx, snap, true, func(i *Item) error {
		in, above := false, false
		for _, p := range paths {
			found[p] = found[p] || i.Path == p
			in, above = in || fileset.Below(i.Path, p), above || fileset.Below(p, i.Path)
		}
		if !in && !above {
			return nil
		}
		if len(out) >= maxPicked {
			return api.Errorf(api.Refused, "more than %d files at once: choose fewer", maxPicked)
		}
		if in && i.Kind == fileset.File && !snap.IsData() && i.Inode != 0 {
			id := [2]uint64{i.Dev, i.Inode}
			if first, again := names[id]; again {
				i.Kind, i.Target, i.Size, i.Sparse, i.Data = fileset.Link, first, 0, false, nil
			} else {
				names[id] = i.Path
			}
		}
		out = append(out, chosen{i, !in})
		return nil
	})
	for _, p := range paths {
		if err == nil && !found[p] {
			err = api.Errorf(api.NotFound, "snapshot %s has no %s", snap.ID, Text(p))
		}
	}
	return out, h, err
}

// fromSet reads from a file set.
func (b *Browser) fromSet(ctx context.Context, snap dr.Snapshot, picked []chosen, each func(*fileset.Entry, bool, io.Reader) error) error {
	f, err := b.Store.Files(ctx, snap.ID)
	if err != nil {
		return err
	}
	defer f.Close()
	gave := map[string]string{} // of files: under which name they were given
	for _, c := range picked {
		e, stored := c.Entry, c.stored
		if e.Kind == fileset.Link {
			if first, ok := gave[e.Target]; ok {
				e.Target = first
			} else { // the first name was not asked for
				if stored, err = f.Find(ctx, e.Target); err != nil {
					return err
				}
				whole := stored.Entry
				whole.Path = e.Path
				gave[e.Target] = e.Path
				e = &whole
			}
		} else if e.Kind == fileset.File {
			gave[e.Path] = e.Path
		}
		if err := giveStored(ctx, f, e, stored, c.above, each); err != nil {
			return err
		}
	}
	return nil
}

func giveStored(ctx context.Context, f *store.Files, e *fileset.Entry, stored *store.FileEntry, above bool, each func(*fileset.Entry, bool, io.Reader) error) error {
	if e.Stored() == 0 {
		return each(e, above, bytes.NewReader(nil))
	}
	r, err := f.Data(ctx, stored)
	if err != nil {
		return err
	}
	return errors.Join(each(e, above, r), r.Close())
}

// fewFiles is how many files are read one by one: opening a folder for them would take longer.
const fewFiles = 8

// fromGuest reads from an image: folders with many files at once, the rest one by one.
func (b *Browser) fromGuest(ctx context.Context, g *guest, picked []chosen, paths []string, each func(*fileset.Entry, bool, io.Reader) error) error {
	f := folders{byPath: make(map[string]*chosen, len(picked)), given: map[string]bool{}, names: map[[2]uint64]string{}, each: each}
	below := map[string]int{} // files
	for i := range picked {
		c := &picked[i]
		f.byPath[c.Path] = c
		for _, p := range paths {
			if c.Kind == fileset.File && p != c.Path && fileset.Below(c.Path, p) {
				below[p]++
			}
		}
	}
	var above []chosen
	for _, c := range picked {
		if c.above {
			above = append(above, c)
		}
	}
	if err := b.oneByOne(ctx, g, above, f.pass); err != nil {
		return err
	}
	for _, p := range paths {
		if below[p] <= fewFiles || f.given[p] {
			continue
		}
		if err := g.Folder(ctx, p, func(m Member, content io.Reader) error { return f.member(m, content) }); err != nil {
			return fmt.Errorf("read %.200q: %w", p, err)
		}
	}
	rest := slices.DeleteFunc(picked, func(c chosen) bool { return c.above || f.given[c.Path] })
	f.link(rest)
	return b.oneByOne(ctx, g, rest, f.pass)
}

// folders puts together what comes out of folders with what the index says.
type folders struct {
	byPath map[string]*chosen
	given  map[string]bool
	names  map[[2]uint64]string // under which a file was given
	each   func(*fileset.Entry, bool, io.Reader) error
}

// member gives one name of a folder. What the index does not know, or knows otherwise, is left to be read by itself.
func (f *folders) member(m Member, content io.Reader) error {
	c := f.byPath[m.Path]
	if c == nil || f.given[m.Path] {
		return nil
	}
	if above := path.Dir(m.Path); above != m.Path && f.byPath[above] != nil && !f.given[above] {
		return nil // a folder comes before what is in it; / is in none
	}
	e := c.Entry
	file := e.Kind == fileset.File || e.Kind == fileset.Link
	if file != (m.File || m.Again != "") {
		return nil
	}
	whole := e
	if file {
		if whole = f.file(c); whole == nil || m.Again != "" && !f.given[m.Again] {
			return nil
		}
	}
	id := [2]uint64{e.Dev, e.Inode}
	if first, again := f.names[id]; file && again {
		link := *e
		link.Kind, link.Target, link.Size, link.Sparse, link.Data, link.Attrs = fileset.Link, first, 0, false, nil, nil
		return f.pass(&link, false, bytes.NewReader(nil))
	}
	if m.Again != "" || file && m.Size != whole.Size {
		return nil
	}
	entry := *whole
	entry.Path, entry.Attrs = e.Path, m.Attrs
	if !file || entry.Size == 0 {
		entry.Sparse, entry.Data = false, nil
		return f.pass(&entry, false, bytes.NewReader(nil))
	}
	if entry.Sparse {
		return giveSparse(&entry, func(w io.Writer) error { _, err := io.Copy(w, content); return err }, false, f.pass)
	}
	return f.pass(&entry, false, content)
}

// link makes of a file of which another name was given a link to that.
func (f *folders) link(rest []chosen) {
	for _, c := range rest {
		if first, given := f.names[[2]uint64{c.Dev, c.Inode}]; given && c.Kind == fileset.File {
			c.Kind, c.Target, c.Size, c.Sparse, c.Data = fileset.Link, first, 0, false, nil
		}
	}
}

// file is the file that a name stands for, as the index has it under the first of its names.
func (f *folders) file(c *chosen) *fileset.Entry {
	if c.Kind == fileset.File {
		return c.Entry
	}
	if first := f.byPath[c.Target]; first != nil && first.Kind == fileset.File {
		return first.Entry
	}
	return nil
}

// pass gives an entry on, and remembers that.
func (f *folders) pass(e *fileset.Entry, above bool, content io.Reader) error {
	f.given[e.Path] = true
	if e.Kind == fileset.File && e.Inode != 0 {
		f.names[[2]uint64{e.Dev, e.Inode}] = e.Path
	}
	return f.each(e, above, content)
}

// oneByOne reads entry by entry.
func (b *Browser) oneByOne(ctx context.Context, g *guest, picked []chosen, each func(*fileset.Entry, bool, io.Reader) error) error {
	inside := map[string][]*fileset.Entry{} // by folder: attributes are asked for together
	for _, c := range picked {
		dir := path.Dir(c.Path)
		inside[dir] = append(inside[dir], c.Entry)
	}
	for _, c := range picked {
		if dir := path.Dir(c.Path); inside[dir] != nil {
			if err := g.Attrs(ctx, inside[dir]); err != nil {
				return err
			}
			delete(inside, dir)
		}
		if err := b.giveRead(ctx, g, c, each); err != nil {
			return err
		}
	}
	return nil
}

// giveRead gives an entry of an image with its content. Of one with holes these have to be found first.
func (b *Browser) giveRead(ctx context.Context, g *guest, c chosen, each func(*fileset.Entry, bool, io.Reader) error) error {
	e := c.Entry
	if e.Kind != fileset.File || e.Size == 0 {
		e.Sparse, e.Data = false, nil
		return each(e, c.above, bytes.NewReader(nil))
	}
	if e.Sparse {
		return giveSparse(e, func(w io.Writer) error { return g.Read(ctx, e.Path, w) }, c.above, each)
	}
	r, w := io.Pipe()
	read := make(chan error, 1)
	go func() {
		err := g.Read(ctx, e.Path, w)
		w.CloseWithError(orEOF(err))
		read <- err
	}()
	err := each(e, c.above, r)
	if err == nil {
		_, err = io.Copy(io.Discard, r) // so that the guest is at the end of what it was asked
	}
	r.CloseWithError(orEOF(err))
	return errors.Join(err, <-read)
}

func orEOF(err error) error {
	if err == nil {
		return io.EOF
	}
	return err
}

// giveSparse reads a file with holes into a file of the host's, which has them too.
func giveSparse(e *fileset.Entry, read func(io.Writer) error, above bool, each func(*fileset.Entry, bool, io.Reader) error) error {
	f, err := os.CreateTemp("", "muster-sparse-")
	if err != nil {
		return fmt.Errorf("read %.200q: %w", e.Path, err)
	}
	defer f.Close()
	os.Remove(f.Name())
	w := &holes{f: f}
	if err := read(w); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return fmt.Errorf("read %.200q: %w", e.Path, err)
	}
	if w.at != e.Size {
		return fmt.Errorf("read %.200q: it has %d bytes, not %d", e.Path, w.at, e.Size)
	}
	e.Data = w.data
	var parts []io.Reader
	for _, x := range e.Data {
		parts = append(parts, io.NewSectionReader(f, x.Offset, x.Length))
	}
	return each(e, above, io.MultiReader(parts...))
}

// holeSize is the smallest hole that is looked for, in bytes.
const holeSize = 4 << 10

// holes writes a file and leaves out blocks of zeros.
type holes struct {
	f    *os.File
	at   int64 // bytes taken, those of block not included until they are written
	data []fileset.Extent
	part []byte // of a block
}

func (h *holes) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		take := min(len(b), holeSize-len(h.part))
		h.part = append(h.part, b[:take]...)
		b = b[take:]
		if len(h.part) == holeSize {
			if err := h.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

var zeros [holeSize]byte

func (h *holes) flush() error {
	at, length := h.at, int64(len(h.part))
	h.at += length
	if length == 0 || bytes.Equal(h.part, zeros[:length]) {
		h.part = h.part[:0]
		return nil
	}
	if _, err := h.f.WriteAt(h.part, at); err != nil {
		return err
	}
	h.part = h.part[:0]
	if n := len(h.data); n > 0 && (h.data[n-1].Offset+h.data[n-1].Length == at || n == fileset.MaxExtents) {
		h.data[n-1].Length = at + length - h.data[n-1].Offset // what lies between reads as zeros
		return nil
	}
	h.data = append(h.data, fileset.Extent{Offset: at, Length: length})
	return nil
}

// Get writes the content of a file, holes as zeros, or with tar a file or folder as a tar stream whose names begin with the last
// name of the path.
func (b *Browser) Get(ctx context.Context, q api.GetQuery, w io.Writer) error {
	p, err := ParsePath(q.Path)
	if err != nil {
		return api.Errorf(api.Invalid, "%w", err)
	}
	snap, err := b.Snapshot(ctx, q.Server, q.Snapshot, p)
	if err != nil {
		return err
	}
	if q.Tar {
		return b.tar(ctx, snap, p, w)
	}
	if err := b.readable(ctx, snap, p); err != nil {
		return err
	}
	return b.Pick(ctx, snap, []string{p}, func(e *fileset.Entry, above bool, content io.Reader) error {
		if above {
			return nil
		}
		return whole(w, e, content)
	})
}

// readable says why a path has no content, if it has none, before an image is opened for it.
func (b *Browser) readable(ctx context.Context, snap dr.Snapshot, p string) error {
	var why error
	_, err := b.items(ctx, snap, true, func(i *Item) error {
		switch {
		case i.Path != p:
			return nil
		case i.Kind == fileset.Folder:
			why = api.Errorf(api.Invalid, "%s is a folder: get it with --tar", Text(p))
		case i.Kind == fileset.Symlink:
			why = api.Errorf(api.Invalid, "%s is a symbolic link to %s: get that, or the link with --tar", Text(p), Text(i.Target))
		case i.Kind != fileset.File && i.Kind != fileset.Link:
			why = api.Errorf(api.Invalid, "%s is a %s and has no content", Text(p), kinds[i.Kind])
		}
		return errStop
	})
	return errors.Join(err, why)
}

// whole writes a content with zeros for its holes.
func whole(w io.Writer, e *fileset.Entry, content io.Reader) error {
	runs, at := e.Data, int64(0)
	if !e.Sparse {
		runs = []fileset.Extent{{Length: e.Size}}
	}
	fill := func(to int64) error {
		for at < to {
			n, err := w.Write(zeros[:min(to-at, holeSize)])
			if at += int64(n); err != nil {
				return err
			}
		}
		return nil
	}
	for _, r := range runs {
		if err := fill(r.Offset); err != nil {
			return err
		}
		n, err := io.CopyN(w, content, r.Length)
		if at += n; err != nil {
			return fmt.Errorf("read %.200q: %w", e.Path, err)
		}
	}
	return fill(e.Size)
}

func (b *Browser) tar(ctx context.Context, snap dr.Snapshot, p string, w io.Writer) error {
	t := fileset.NewTarWriter(w)
	strip := path.Dir(p)
	cut := func(name string) string {
		if strip == "/" {
			return name
		}
		return name[len(strip):]
	}
	err := b.Pick(ctx, snap, []string{p}, func(e *fileset.Entry, above bool, content io.Reader) error {
		if above || e.Path == "/" {
			return nil
		}
		named := *e
		if named.Path = cut(e.Path); e.Kind == fileset.Link {
			named.Target = cut(e.Target)
		}
		if err := t.Entry(&named, content); err != nil {
			return fmt.Errorf("write %.200q: %w", e.Path, err)
		}
		return nil
	})
	if err == nil {
		err = t.End()
	}
	return err
}
