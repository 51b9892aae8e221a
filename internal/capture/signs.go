package capture

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/signs"
	"github.com/musterdr/muster/internal/store"
)

// signsName is the name under which what the cells of a disk hold is attached to a snapshot; namesName that of the listing.
func signsName(disk int) string { return fmt.Sprintf("signs-%d", disk) }

const namesName = "names"

// watch looks for signs of tampering in what is written to a snapshot. It never makes a capture fail: what cannot be
// compared is said not to have been.
type watch struct {
	maps  []*signs.Map // one a disk
	last  *base
	bases []*base // last, and the one before the suspicion if there is one; nil for those that are not there
}

// base is an earlier snapshot that today's is compared with.
type base struct {
	id    string
	maps  []*signs.Map // of today's disks; nil: it did not have that one
	names *signs.Listing
	// What is known besides, of more than the maps show: the store knows every block that differs, the maps those that show it.
	changed  int64 // blocks
	readable int64 // bytes
}

// newBase reads what an earlier snapshot has of today's disks, by their names or else their places: a server of which the
// disks were renamed, added to or made larger is compared all the same. nil if it has nothing.
func newBase(ctx context.Context, st *store.Store, id string, disks []Disk) *base {
	if id == "" {
		return nil
	}
	snap, err := st.Snapshot(ctx, id)
	if err != nil {
		return nil
	}
	return readBase(id, snap.Disks, disks, attachedTo(ctx, st, id))
}

// readBase reads it from what was attached to disks that were written before.
func readBase(id string, before []dr.SnapshotDisk, disks []Disk, with attached) *base {
	b := &base{id: id, maps: make([]*signs.Map, len(disks)), names: with.names()}
	any := b.names != nil
	for i, now := range disks {
		j := slices.IndexFunc(before, func(d dr.SnapshotDisk) bool { return d.Name == now.Name })
		if j < 0 {
			j = i
		}
		b.maps[i] = with.signs(j)
		any = any || b.maps[i] != nil
	}
	if !any {
		return nil
	}
	return b
}

// attached gives what was attached to a snapshot, or to a partial.
type attached func(name string) ([]byte, error)

func attachedTo(ctx context.Context, st *store.Store, id string) attached {
	return func(name string) ([]byte, error) { return st.Attachment(ctx, id, name) }
}

// signs reads what the cells of a disk held, or of all files; nil if that was not kept.
func (a attached) signs(disk int) *signs.Map {
	raw, err := a(signsName(disk))
	if err != nil {
		return nil
	}
	m, err := signs.UnmarshalMap(raw)
	if err != nil {
		return nil
	}
	return m
}

// names reads the listing of a snapshot; nil if none was kept.
func (a attached) names() *signs.Listing {
	raw, err := a(namesName)
	if err != nil {
		return nil
	}
	var l signs.Listing
	if json.Unmarshal(raw, &l) != nil || l.Check() != nil {
		return nil
	}
	return &l
}

// at gives the map of a disk, if there is one of its shape.
func (b *base) at(disk, block int, size int64) *signs.Map {
	if b == nil || b.maps[disk] == nil || !b.maps[disk].Fits(block, size) {
		return nil
	}
	return b.maps[disk]
}

// begin starts the map of the next disk: as it is known where blocks that are not written stay, else empty.
func (w *watch) begin(disk, block int, size int64, known *base) error {
	for _, b := range w.bases {
		if b.maps[disk] != nil && b.maps[disk].BlockSize() != block {
			b.maps[disk] = nil // its cells are others
		}
	}
	if before := known.at(disk, block, size); before != nil {
		w.maps = append(w.maps, before.Clone())
		return nil
	}
	m, err := signs.NewMap(block, size)
	w.maps = append(w.maps, m)
	return err
}

func (w *watch) look(disk int, block int64, data []byte) {
	if w.maps == nil {
		return
	}
	var befores [2]*signs.Map
	n := 0
	for _, b := range w.bases {
		befores[n] = b.maps[disk]
		n++
	}
	w.maps[disk].Look(block, data, befores[:n]...)
}

func (w *watch) zero(disk int, first, count int64) {
	if w.maps != nil {
		w.maps[disk].Zero(first, count)
	}
}

// looked is an image of which every block that is read is looked at.
type looked struct {
	image.Image
	watch *watch
	disk  int
	block int64
}

// ReadAt reads whole blocks, as an ingest does.
func (l looked) ReadAt(p []byte, off int64) (int, error) {
	n, err := l.Image.ReadAt(p, off)
	for at := int64(0); off%l.block == 0 && at < int64(n); at += l.block {
		l.watch.look(l.disk, (off+at)/l.block, p[at:min(at+l.block, int64(n))])
	}
	return n, err
}

// keepSigns attaches what the next snapshot is compared with, and says what this one shows.
func (k *Sink) keepSigns(out Outcome) (*dr.Signs, error) {
	w := &k.watch
	if w.maps == nil {
		return nil, nil //nolint:nilnil // none were looked for
	}
	if out.Names == nil && out.NoNames == "" {
		out.NoNames = "this source shows no names of files, only blocks"
	}
	if w.last != nil && w.last.id == k.parent {
		var err error
		if w.last.changed, err = k.writer.Changed(); err != nil {
			return nil, err
		}
	}
	return w.found(k.writer, k.task, out.Names, out.NoNames)
}

// attach attaches what the next snapshot is compared with of what blocks hold.
func (w *watch) attach(to func(name string, data []byte)) error {
	for i, m := range w.maps {
		b, err := m.MarshalBinary()
		if err != nil {
			return err
		}
		to(signsName(i), b)
	}
	return nil
}

// found attaches what the next snapshot is compared with, and says what this one shows.
func (w *watch) found(writer *store.Writer, task api.SnapshotTask, names *signs.Listing, noNames string) (*dr.Signs, error) {
	found := &dr.Signs{NoNames: noNames}
	if err := w.attach(writer.Attach); err != nil {
		return nil, err
	}
	for _, m := range w.maps {
		m.Content(&found.Content)
		found.Took += m.Took()
	}
	if names != nil {
		b, err := json.Marshal(names)
		if err != nil {
			return nil, err
		}
		writer.Attach(namesName, b)
		found.Files = names.Files
	}
	for _, b := range w.bases {
		c := w.change(b, names)
		c.Found = c.Judge(task.Server.Signs, task.Usual)
		if b == w.last {
			found.Last = c
		} else {
			found.Trusted = c
		}
	}
	return found, nil
}

// change compares with an earlier snapshot.
func (w *watch) change(b *base, names *signs.Listing) *dr.Change {
	c := &dr.Change{Against: b.id}
	for i, m := range w.maps {
		if b.maps[i] == nil {
			continue
		}
		if c.Blocks == nil {
			c.Blocks = &dr.BlockChange{}
		}
		m.Compare(b.maps[i], c.Blocks)
	}
	if c.Blocks != nil {
		c.Blocks.Changed, c.Blocks.Readable = max(c.Blocks.Changed, b.changed), max(c.Blocks.Readable, b.readable)
	}
	if names != nil && b.names != nil {
		c.Names = names.Compare(*b.names)
	}
	return c
}

// listing takes what an agent says of its names.
func listing(payload []byte) (*signs.Listing, error) {
	var l signs.Listing
	if err := wire.Decode(payload, &l); err != nil {
		return nil, err
	}
	if err := l.Check(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, wire.ErrGarbage)
	}
	return &l, nil
}
