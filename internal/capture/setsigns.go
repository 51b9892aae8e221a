package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/signs"
	"github.com/musterdr/muster/internal/store"
)

// contentBlock is what contents are looked at in: the pieces in which the store keeps them.
const contentBlock = store.DefaultBlockSize

func blocksOf(c store.Content) int64 { return (c.Length + contentBlock - 1) / contentBlock }

// setWatch looks for signs of tampering in a set of files as watch does in disks. Its one map is of the contents one after another,
// in the set's order, each from a block of its own on. What earlier sets had of the same files is brought into that order while
// the set is written, so that one map can be compared with the other. A file is compared with what lay under its name.
type setWatch struct {
	watch
	beside []*earlier // those of bases
	lister *signs.Lister
	many   bool   // there are more names than are listed
	blind  bool   // there are more blocks than are looked at, now or last time
	used   int64  // blocks of the contents whose entries have come
	part   []byte // of a block of the content whose entry is to come
	notes  []string
}

func newSetWatch() (*setWatch, error) {
	m, err := signs.NewMap(contentBlock, 0)
	return &setWatch{watch: watch{maps: []*signs.Map{m}}, lister: signs.NewLister()}, err
}

// earlier is an earlier set, walked over beside the one that is being written.
type earlier struct {
	base
	files  *store.Files
	cursor *store.Cursor
	head   *store.FileEntry // what was not dealt with yet; nil at the end
	at     int64            // block of kept at which the head's content begins
	kept   *signs.Map       // nil: it has none
	lost   bool             // it cannot be compared with any more
}

func openEarlier(ctx context.Context, st *store.Store, id string, set fileset.Set) (*earlier, error) {
	files, err := st.Files(ctx, id)
	if err != nil {
		return nil, err
	}
	e := &earlier{base: base{id: id, maps: []*signs.Map{nil}}, files: files, cursor: files.All()}
	was := files.Set()
	if slices.Equal(was.Roots, set.Roots) && slices.Equal(was.Exclude, set.Exclude) {
		e.names = attachedTo(ctx, st, id).names() // those of other folders came and went because somebody said so
	}
	if m := attachedTo(ctx, st, id).signs(0); m != nil && m.BlockSize() == contentBlock {
		var is dr.Content
		m.Content(&is)
		e.kept, e.readable = m, is.Readable
	}
	if err := e.advance(ctx); err != nil {
		files.Close()
		return nil, err
	}
	return e, nil
}

// advance takes the next entry.
func (e *earlier) advance(ctx context.Context) (err error) {
	if e.head != nil {
		e.at += blocksOf(e.head.Content)
	}
	e.head = nil
	if e.cursor == nil {
		return nil
	}
	if e.head, err = e.cursor.Next(ctx); errors.Is(err, io.EOF) {
		e.head, e.cursor, err = nil, nil, nil
	}
	return err
}

// meet brings what the set had under a name into the order of today's map, at a block, and counts the blocks that differ. Of a
// content that it had just so nothing is measured anew.
func (e *earlier) meet(ctx context.Context, w *store.FilesWriter, path string, now store.Content, today *signs.Map, at int64) error {
	for e.head != nil && fileset.Compare(e.head.Path, path) < 0 {
		if err := e.advance(ctx); err != nil {
			return err
		}
	}
	if e.maps[0] == nil {
		return nil
	}
	if err := e.maps[0].Resize(at + blocksOf(now)); err != nil {
		return err
	}
	var was store.Content
	if e.head != nil && e.head.Path == path {
		was = e.head.Content
		if e.at+blocksOf(was) > e.kept.Blocks() {
			return errors.New("what its files held was not kept")
		}
		e.maps[0].Copy(at, e.kept, e.at, min(blocksOf(was), blocksOf(now)))
		if was == now {
			today.Copy(at, e.kept, e.at, blocksOf(now))
			return nil
		}
	}
	n, err := w.Changed(was, now)
	e.changed += n
	return err
}

// against has the set compared with an earlier one: the last, or another one.
func (w *setWatch) against(e *earlier, last bool) error {
	if e.kept != nil {
		m, err := signs.NewMap(contentBlock, 0)
		if err != nil {
			return err
		}
		e.maps[0] = m
	}
	w.beside, w.bases = append(w.beside, e), append(w.bases, &e.base)
	if last {
		w.last = &e.base
	}
	return nil
}

// piece looks at a piece of the content whose entry is to come.
func (w *setWatch) piece(data []byte) {
	for len(data) > 0 && !w.blind {
		if len(w.part) == 0 && len(data) >= contentBlock {
			w.look(data[:contentBlock])
			data = data[contentBlock:]
			continue
		}
		n := min(contentBlock-len(w.part), len(data))
		w.part, data = append(w.part, data[:n]...), data[n:]
		if len(w.part) == contentBlock {
			w.rest()
		}
	}
}

// rest looks at what is less than a block, if there is anything.
func (w *setWatch) rest() {
	if len(w.part) > 0 {
		w.look(w.part)
		w.part = w.part[:0]
	}
}

func (w *setWatch) look(data []byte) {
	m := w.maps[0]
	number := m.Blocks()
	if err := m.Resize(number + 1); err != nil {
		w.giveUp()
		return
	}
	if len(w.bases) > 0 {
		m.LookClosely(number, data) // whose content it is comes after it
	} else {
		m.Look(number, data)
	}
}

// again forgets the pieces since the last entry.
func (w *setWatch) again() {
	w.part = w.part[:0]
	_ = w.maps[0].Resize(w.used) // it was larger
}

// giveUp looks at no more blocks. The set is kept with a map of none.
func (w *setWatch) giveUp() {
	w.blind, w.used, w.part = true, 0, nil
	_ = w.maps[0].Resize(0) // it was larger
	for _, e := range w.beside {
		e.maps[0] = nil
	}
	w.notes = append(w.notes, "what the files hold is not looked at for signs of tampering: there are too many, or they are too large")
}

// same takes the content of the next entry from what is known.
func (w *setWatch) same(known *earlier) {
	if w.blind {
		return
	}
	n := blocksOf(known.head.Content)
	if known.at+n > known.kept.Blocks() || w.maps[0].Resize(w.used+n) != nil {
		w.giveUp()
		return
	}
	w.maps[0].Copy(w.used, known.kept, known.at, n)
}

// entry takes an entry after its content.
func (w *setWatch) entry(ctx context.Context, files *store.FilesWriter, e *fileset.Entry, c store.Content) {
	if e.Kind == fileset.File || e.Kind == fileset.Link {
		i := strings.LastIndexByte(e.Path, '/')
		w.many = !w.lister.Add(e.Path[:i], e.Path[i+1:]) || w.many
	}
	for _, b := range w.beside {
		if b.lost {
			continue
		}
		if err := b.meet(ctx, files, e.Path, c, w.maps[0], w.used); err != nil {
			w.drop(b, err)
		}
	}
	if !w.blind {
		w.used += blocksOf(c)
	}
}

// close lets the earlier sets go.
func (w *setWatch) close() {
	for _, e := range w.beside {
		e.files.Close()
	}
}

// drop compares with an earlier set no more. It may still be what this one is built on.
func (w *setWatch) drop(e *earlier, cause error) {
	e.lost = true
	slog.Warn("snapshot cannot be compared with", "snapshot", e.id, "error", cause)
	w.notes = append(w.notes, fmt.Sprintf("signs of tampering were not looked for against %s: %v", e.id, plain(cause.Error())))
	w.bases = slices.DeleteFunc(w.bases, func(b *base) bool { return b == &e.base })
}

// keep attaches what the next set is compared with, and says what this one shows.
func (w *setWatch) keep(writer *store.Writer, task api.SnapshotTask) (*dr.Signs, error) {
	if w.many {
		return w.found(writer, task, nil, fmt.Sprintf("there are more than %d", signs.MaxFiles))
	}
	l := w.lister.Listing()
	return w.found(writer, task, &l, "")
}
