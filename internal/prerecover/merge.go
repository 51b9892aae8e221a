package prerecover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
)

// Data is a set of files to be put into an image: what differs is written, what the set does not have any more is removed.
type Data struct {
	Snapshot string
	Taken    time.Time
	Image    string    // the snapshot of the image
	Before   time.Time // when that was taken
	Set      fileset.Set
	// Each calls each for every entry, in fileset.Compare's order; open gives the content of a file, holes left out. It is
	// called twice.
	Each func(ctx context.Context, each func(e *fileset.Entry, open func() (io.ReadCloser, error)) error) error
}

// merge is the work of putting data into a guest.
type merge struct {
	g       Guest
	data    *Data
	view    *View
	there   []fileset.Entry // what the image has below the roots, in order
	at      int             // of there: what was not dealt with yet
	skip    string          // below it the image keeps what it has
	write   []bool          // of each entry of the data: it is written
	remove  []string        // topmost paths, in order
	need    map[string]*room
	stack   []folderEntry // folders that lead to the present entry
	entries int64
	done    dr.MergedData
}

// room is what a file system must have left.
type room struct {
	bytes, inodes int64
}

// folderEntry is a folder of the data, by the number of its entry.
type folderEntry struct {
	path   string
	number int
}

// mergeData puts data into a guest whose file systems are mounted.
func mergeData(ctx context.Context, g Guest, view *View, blind []string, data *Data, report dr.Progress) (dr.MergedData, error) {
	m := &merge{g: g, data: data, view: view, need: map[string]*room{}}
	m.done = dr.MergedData{Snapshot: data.Snapshot, Taken: data.Taken, Image: data.Image, ImageTaken: data.Before, Roots: data.Set.Roots}
	for _, step := range []func(context.Context) error{func(ctx context.Context) error { return m.roots(ctx, blind) }, m.look, m.plan, m.space} {
		if err := step(ctx); err != nil {
			return m.done, fmt.Errorf("merge data %s: %w", data.Snapshot, err)
		}
	}
	for i, p := range m.remove {
		report.Report(PartData, int64(i), int64(len(m.remove)), "removed")
		if err := g.RemoveAll(ctx, p); err != nil {
			return m.done, fmt.Errorf("merge data %s: remove %.200q: %w", data.Snapshot, p, err)
		}
	}
	if err := m.unpack(ctx, report); err != nil {
		return m.done, fmt.Errorf("merge data %s: %w", data.Snapshot, err)
	}
	return m.done, nil
}

// roots sees to it that every root is a folder in the image, reached through nothing but folders.
func (m *merge) roots(ctx context.Context, blind []string) error {
	for _, root := range m.data.Set.Roots {
		for _, at := range blind {
			if fileset.Below(root, at) || fileset.Below(at, root) {
				return fmt.Errorf("%w: the file system of %s could not be mounted, and what is put below it would be hidden", ErrNotRescuable, at)
			}
		}
		for p := root; p != "/"; p = path.Dir(p) {
			s, err := m.g.Lstat(ctx, p)
			switch {
			case errors.Is(err, fs.ErrNotExist):
			case err != nil:
				return err
			case !s.Mode.IsDir():
				return fmt.Errorf("%w: %s, where the data belongs, is a link or no folder in the image", ErrNotRescuable, p)
			}
		}
	}
	return nil
}

// look lists what the image has below the roots.
func (m *merge) look(ctx context.Context) error {
	roots := slices.Clone(m.data.Set.Roots)
	slices.SortFunc(roots, fileset.Compare)
	for _, root := range roots {
		if _, err := m.g.Lstat(ctx, root); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		found, err := m.g.Walk(ctx, root)
		if err != nil {
			return fmt.Errorf("list %s in the image: %w", root, err)
		}
		m.there = append(m.there, found...)
	}
	return nil
}

// plan compares the data with what the image has.
func (m *merge) plan(ctx context.Context) error {
	check := fileset.Checker{Set: m.data.Set}
	err := m.data.Each(ctx, func(e *fileset.Entry, _ func() (io.ReadCloser, error)) error {
		// The order and the folders are what keeps names inside of the roots.
		if err := check.Next(e); err != nil {
			return err
		}
		m.compare(e)
		return nil
	})
	for ; err == nil && m.at < len(m.there); m.at++ {
		m.surplus(&m.there[m.at])
	}
	m.done.Entries, m.done.Removed = m.entries, int64(len(m.remove))
	return err
}

// compare plans what is to be done for an entry of the data, and for what the image has before it.
func (m *merge) compare(e *fileset.Entry) {
	for ; m.at < len(m.there) && fileset.Compare(m.there[m.at].Path, e.Path) < 0; m.at++ {
		m.surplus(&m.there[m.at])
	}
	for len(m.stack) > 0 && !fileset.Below(e.Path, m.stack[len(m.stack)-1].path) {
		m.stack = m.stack[:len(m.stack)-1]
	}
	number := len(m.write)
	m.write, m.entries = append(m.write, false), m.entries+1
	var old *fileset.Entry
	if m.at < len(m.there) && m.there[m.at].Path == e.Path {
		old = &m.there[m.at]
		m.at++
	}
	if old == nil || !unchanged(e, old) {
		m.replaces(e, old)
		m.write[number] = true
		if n := len(m.stack); n > 0 { // its times change with what is in it, and are set again
			m.write[m.stack[n-1].number] = true
		}
	}
	if e.Kind == fileset.Folder {
		m.stack = append(m.stack, folderEntry{e.Path, number})
		if e.Edge {
			m.skip = e.Path
		}
	}
}

// replaces counts what writing an entry takes, and has what is of another kind removed before.
func (m *merge) replaces(e, old *fileset.Entry) {
	m.count(e.Path, e, 1)
	if e.Kind == fileset.File {
		m.done.Written++
		m.done.Bytes += e.Stored()
	}
	if old == nil {
		return
	}
	m.count(e.Path, old, -1)
	if (e.Kind == fileset.Folder) != (old.Kind == fileset.Folder) {
		m.remove = append(m.remove, e.Path)
		for ; m.at < len(m.there) && fileset.Below(m.there[m.at].Path, e.Path); m.at++ {
			m.count(e.Path, &m.there[m.at], -1)
		}
	}
}

// surplus plans to remove what the image has and the data has not, unless it was left out when the data was captured.
func (m *merge) surplus(old *fileset.Entry) {
	last := ""
	if n := len(m.remove); n > 0 {
		last = m.remove[n-1]
	}
	switch {
	case last != "" && fileset.Below(old.Path, last):
		m.count(old.Path, old, -1)
		return
	case m.skip != "" && fileset.Below(old.Path, m.skip):
		return
	case m.data.Set.Excluded(old.Path):
		m.skip = old.Path
		return
	}
	m.remove = append(m.remove, old.Path)
	m.count(old.Path, old, -1)
	for i := len(m.stack) - 1; i >= 0; i-- { // the folder in which it lay changes its times
		if fileset.Below(old.Path, m.stack[i].path) {
			m.write[m.stack[i].number] = true
			break
		}
	}
}

// unchanged says whether the image has an entry just so: it was captured with the same system that the data is of, and
// nothing happened to the file since. What the image cannot tell is taken for changed.
func unchanged(e, old *fileset.Entry) bool {
	kind := e.Kind
	if kind == fileset.Link {
		kind = fileset.File
	}
	return !e.Unstable && kind == old.Kind && e.Inode == old.Inode && e.Inode != 0 && e.Mode == old.Mode && e.UID == old.UID && e.GID == old.GID &&
		e.Mtime == old.Mtime && e.Ctime == old.Ctime && (e.Kind != fileset.File || e.Size == old.Size)
}

// count adds what an entry takes on its file system, or gives back.
func (m *merge) count(p string, e *fileset.Entry, sign int64) {
	at := mountOf(m.view, p)
	r := m.need[at]
	if r == nil {
		r = &room{}
		m.need[at] = r
	}
	size := int64(0)
	switch {
	case e.Kind == fileset.Folder, e.Kind == fileset.Symlink:
		size = perFile
	case e.Kind == fileset.File:
		size = e.Stored()
	}
	r.inodes += sign
	r.bytes += sign * ((size + perFile - 1) / perFile * perFile)
}

// perFile is what a file's content is rounded up to; what a folder takes.
const perFile = 4 << 10

// space refuses to begin what would not fit.
func (m *merge) space(ctx context.Context) error {
	for _, at := range slices.Sorted(maps.Keys(m.need)) {
		need := m.need[at]
		s, err := m.g.Space(ctx, at)
		if err != nil {
			return err
		}
		if need.bytes > 0 && s.Free < need.bytes+spareBytes {
			return fmt.Errorf("%w: the data does not fit into the image: the file system at %s has %d MiB free, and %d MiB more are needed; take a newer image "+
				"('muster snapshot'), or leave something out", ErrNotRescuable, at, s.Free>>20, (need.bytes+spareBytes)>>20)
		}
		if need.inodes > 0 && s.Inodes >= 0 && s.Inodes < need.inodes+spareInodes {
			return fmt.Errorf("%w: the data does not fit into the image: the file system at %s has only %d inodes left, and %d are needed", ErrNotRescuable,
				at, s.Inodes, need.inodes+spareInodes)
		}
	}
	return nil
}

// unpack writes what was planned.
func (m *merge) unpack(ctx context.Context, report dr.Progress) error {
	if !slices.Contains(m.write, true) {
		return nil
	}
	for _, root := range m.data.Set.Roots {
		if err := m.g.Mkdir(ctx, root); err != nil {
			return fmt.Errorf("make %s: %w", root, err)
		}
	}
	pr, pw := io.Pipe()
	go func() { pw.CloseWithError(m.stream(ctx, pw, report)) }()
	err := m.g.Unpack(ctx, pr)
	// Whoever stops reading early must not leave the other waiting.
	_ = pr.CloseWithError(errors.New("the guest stopped reading"))
	return err
}

// stream writes the planned entries as a tar archive.
func (m *merge) stream(ctx context.Context, w io.Writer, report dr.Progress) error {
	p := fileset.NewTarWriter(w)
	number, wrote := 0, int64(0)
	err := m.data.Each(ctx, func(e *fileset.Entry, open func() (io.ReadCloser, error)) error {
		if number++; number > len(m.write) || !m.write[number-1] {
			return nil
		}
		var content io.Reader = strings.NewReader("")
		if e.Stored() > 0 {
			r, err := open()
			if err != nil {
				return err
			}
			defer r.Close()
			content = r
		}
		if err := p.Entry(e, content); err != nil {
			return fmt.Errorf("write %.200q: %w", e.Path, err)
		}
		wrote += e.Stored()
		report.Report(PartData, wrote, m.done.Bytes, "bytes")
		return nil
	})
	if err == nil && number != len(m.write) {
		err = errors.New("the data is not the same when it is read again")
	}
	if err == nil {
		err = p.End()
	}
	return err
}
