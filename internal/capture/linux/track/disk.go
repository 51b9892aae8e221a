package track

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cilium/ebpf"
)

// Disk is one tracked whole disk.
type Disk struct {
	t       *Tracker
	name    string
	refused *Unknown // it is not tracked, for this reason
	rec     *recordOfDisk

	current, taken *ebpf.Map
	stat, inflight *os.File
	told           bool               // that it is not known what changed since the last kept snapshot
	unproved       bool               // extents were given since the last Prove
	given          map[operation]bool // those whose range is among them
}

// diskEntry is struct disk of the programs.
type diskEntry struct {
	Slot   uint32
	Shift  uint32
	Coarse uint32
	Bios   uint32
}

func currentPin(slot uint32) string { return fmt.Sprintf("current-%d", slot) }
func takenPin(slot uint32) string   { return fmt.Sprintf("taken-%d", slot) }

// Mark gives what the last Kept was told: which snapshot it is that changes are counted from. "" before the first.
func (d *Disk) Mark() string {
	if d.rec == nil {
		return ""
	}
	return d.rec.Mark
}

// Granule gives the size in bytes of the smallest part that is told apart; 0 of a disk that is not tracked.
func (d *Disk) Granule() int64 {
	if d.rec == nil {
		return 0
	}
	return d.rec.Granule
}

// Take gives where something was written: the first since the last kept snapshot, every further one since the one before.
// The extents are in order, do not overlap and end at the end of the disk at most. What they cover must be read after
// Take has returned.
//
// If it is not known what changed the error is an *Unknown and the disk has to be compared as a whole, by reading it after Take
// has returned; the next Take gives what was written since this one.
func (d *Disk) Take() ([]Extent, error) {
	if d.refused != nil {
		return nil, d.refused
	}
	u, err := d.look()
	if err != nil {
		return nil, err
	}
	if u == nil && d.rec.Unknown != "" && !d.told {
		u = &Unknown{d.name, d.rec.Unknown, d.rec.Detail}
	}
	if u != nil {
		return nil, d.afresh(u)
	}
	var out []Extent
	begun, err := d.underway()
	if err != nil {
		return nil, err
	}
	err = d.words(func(current, taken []uint64) {
		d.markUnderway(begun, current)
		out = d.layout().move(current, taken)
	})
	if err != nil {
		return nil, err
	}
	for _, o := range begun {
		d.given[o] = true
	}
	d.unproved = true
	return out, nil
}

// Prove says whether every write since the tracker began with this disk was seen: nil, or an *Unknown after which the disk has
// to be compared as a whole, as after Take. It needs a moment in which nothing is written and waits half a second
// for one at most, so it is best called while the file systems stand still, after the last Take.
func (d *Disk) Prove() error {
	if d.refused != nil {
		return d.refused
	}
	u, err := d.look()
	if err != nil {
		return err
	}
	if u != nil {
		return d.afresh(u)
	}
	var lost []operation
	left := func() (n uint64, err error) {
		lost, err = d.underway()
		return sectors(lost), err
	}
	v, missing, err := d.rec.Base.prove(d.kernelLast, left, d.rec.Device.Bios, proveLimit, stillLimit)
	if err != nil {
		return err
	}
	if v == recovered && slices.ContainsFunc(lost, func(o operation) bool { return o.Kind == nowhereKind }) {
		return d.afresh(&Unknown{d.name, Missed, "the end of a discard of many ranges was not told"})
	}
	if v == recovered {
		if err := d.settle(lost); err != nil {
			return err
		}
		v = balanced
	}
	if v == balanced {
		// What happened during the proof counts as well.
		if u, err = d.look(); err != nil {
			return err
		}
		if u == nil {
			d.unproved = false
			clear(d.given)
			return nil
		}
		return d.afresh(u)
	}
	if v == restless {
		return d.afresh(&Unknown{d.name, Busy, fmt.Sprintf("its counters were never still long enough to compare them; the difference was %d sectors", missing)})
	}
	primaries, twins := d.t.kernel.misses()
	u = &Unknown{d.name, Unbalanced, fmt.Sprintf("the kernel counted %d sectors written or discarded that were not seen (program runs skipped: %d and %d)", missing, primaries, twins)}
	if missing > 0 && primaries > 0 && twins > 0 {
		u.Reason = Missed
	}
	return d.afresh(u)
}

// Kept says that the snapshot for which this disk was taken is safe. What was taken is forgotten, and with it why nothing was
// known before. The mark, of at most 1024 bytes, comes back from Mark. Extents that were given must have been proved.
func (d *Disk) Kept(mark string) error {
	switch {
	case d.refused != nil:
		return nil
	case d.unproved:
		return fmt.Errorf("keep what was taken of %s: it was not proved; call Prove after the last Take", d.name)
	case d.rec.Unknown != "" && !d.told:
		return fmt.Errorf("keep what was taken of %s: nothing was; call Take first", d.name)
	case len(mark) > maxText:
		return fmt.Errorf("keep what was taken of %s: a mark of %d bytes is too long", d.name, len(mark))
	}
	// First the record: dying in between puts back too much, never too little.
	d.rec.Unknown, d.rec.Detail, d.rec.Mark = "", "", mark
	if err := d.t.save(); err != nil {
		return err
	}
	d.told = false
	return d.words(func(_, taken []uint64) { wipe(taken) })
}

// Restore puts back what was taken, because the snapshot was not kept: the next Take gives it again.
func (d *Disk) Restore() error {
	if d.refused != nil {
		return nil
	}
	return d.putBack()
}

func (d *Disk) putBack() error {
	d.told, d.unproved = false, false
	clear(d.given)
	return d.words(d.layout().putBack)
}

func (d *Disk) layout() layout { return newLayout(d.rec.Device.Size, d.t.rec.Bytes) }

// look says why it cannot be known what changed, as far as that shows without comparing counters; nil if nothing shows.
func (d *Disk) look() (*Unknown, error) {
	if err := attached(d.t.pins(), d.t.rec); err != nil {
		return &Unknown{d.name, Detached, err.Error()}, nil
	}
	now, err := identify(d.name)
	if err != nil {
		var u *Unknown
		if errors.As(err, &u) {
			return u, nil
		}
		return nil, err
	}
	if u := d.rec.Device.differs(now, d.name); u != nil {
		return u, nil
	}
	s, err := slept()
	if err != nil {
		return nil, err
	}
	if more := s - time.Duration(d.rec.Slept); more > awake || more < -awake {
		return &Unknown{d.name, Slept, fmt.Sprintf("the machine was suspended for %s", more.Round(time.Second))}, nil
	}
	r, err := d.tally()
	if err != nil {
		return nil, err
	}
	return d.rec.Base.exceeded(r, d.name), nil
}

// afresh begins again: nothing before this moment is known, everything after it is. It gives the reason as an error, or what
// went wrong in beginning again.
func (d *Disk) afresh(u *Unknown) error {
	if u.Reason == Detached {
		return d.t.reinstall(d, u)
	}
	now, err := identify(d.name)
	if err != nil {
		d.leave()
		if errors.As(err, &d.refused) {
			return errors.Join(d.refused, d.t.save())
		}
		return err
	}
	if changed := d.rec.Device.differs(now, d.name); changed != nil {
		if err := d.enter(now, *u); err != nil {
			return err
		}
	} else if err := d.restart(*u); err != nil {
		return err
	}
	d.told, d.unproved = true, false
	clear(d.given)
	return u
}

// restart forgets all marks of a disk.
func (d *Disk) restart(u Unknown) error {
	d.rec.Unknown, d.rec.Detail = u.Reason, clip(u.Detail)
	// The reason is written down before the marks are gone.
	if err := d.t.save(); err != nil {
		return err
	}
	if err := d.rebase(); err != nil {
		return err
	}
	if err := d.words(func(current, taken []uint64) { wipe(current); wipe(taken) }); err != nil {
		return err
	}
	return d.t.save()
}

// rebase begins to count.
func (d *Disk) rebase() error {
	s, err := slept()
	if err != nil {
		return err
	}
	d.rec.Slept = int64(s)
	d.rec.Base, err = begin(d.kernelFirst, d.rec.Device.Bios, baseLimit)
	return err
}

// reinstall replaces programs that are gone. Nothing is known of any disk then; this one is told.
func (t *Tracker) reinstall(d *Disk, u *Unknown) error {
	now, err := thisBoot()
	if err != nil {
		return err
	}
	now.Bytes, now.Bios = t.rec.Bytes, t.rec.Bios
	old := t.rec
	if err := t.install(now, old, Detached, clip(u.Detail)); err != nil {
		return err
	}
	for _, r := range slices.Clone(t.rec.Disks) {
		other := t.disks[r.Name]
		other.rec = r
		i, err := identify(r.Name)
		if err != nil {
			other.leave()
			if !errors.As(err, &other.refused) {
				return err
			}
			continue
		}
		if err := other.enter(i, Unknown{r.Name, Detached, u.Detail}); err != nil {
			return err
		}
	}
	if err := t.save(); err != nil {
		return err
	}
	d.told = true
	return u
}

// leave takes a disk out of the record.
func (d *Disk) leave() {
	d.close()
	d.t.rec.Disks = slices.DeleteFunc(d.t.rec.Disks, func(r *recordOfDisk) bool { return r == d.rec })
	d.rec = nil
}

// enter gives a device maps of its own, counts from now on, and remembers why nothing is known of the time before.
func (d *Disk) enter(now identity, u Unknown) error {
	d.close()
	fresh := recordOfDisk{
		Name: d.name, Device: now, Granule: newLayout(now.Size, d.t.rec.Bytes).granule,
		Unknown: u.Reason, Detail: clip(u.Detail),
	}
	if d.rec == nil {
		slot, ok := d.t.freeSlot()
		if !ok {
			d.refused = &Unknown{d.name, Untrackable, fmt.Sprintf("%d disks are tracked already", maxDisks)}
			return nil
		}
		fresh.Slot = slot
		d.rec = &recordOfDisk{}
		d.t.rec.Disks = append(d.t.rec.Disks, d.rec)
	} else {
		fresh.Mark = d.rec.Mark
		if fresh.Slot = d.rec.Slot; d.rec.Current == 0 {
			fresh.Slot, _ = d.t.freeSlot()
		} else if err := d.t.kernel.disks.Delete(d.rec.Device.Number); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("stop tracking the former %s: %w", d.name, err)
		}
	}
	*d.rec = fresh
	if err := d.makeMaps(); err != nil {
		return fmt.Errorf("track %s: %w", d.name, err)
	}
	d.told, d.unproved = false, false
	return d.rebase()
}

// freeSlot gives a slot that no disk has; there may be none.
func (t *Tracker) freeSlot() (uint32, bool) {
	for slot := range uint32(maxDisks) {
		if !slices.ContainsFunc(t.rec.Disks, func(r *recordOfDisk) bool { return r.Current != 0 && r.Slot == slot }) {
			return slot, true
		}
	}
	return 0, false
}

// makeMaps makes and pins the maps of a disk and lets the programs know of it, which is what begins to track it.
func (d *Disk) makeMaps() (err error) {
	l := d.layout()
	k, slot := d.t.kernel, d.rec.Slot
	if err := d.t.vacate(slot); err != nil {
		return err
	}
	if err := d.openCounters(); err != nil {
		return err
	}
	for name, m := range map[string]**ebpf.Map{currentPin(slot): &d.current, takenPin(slot): &d.taken} {
		flags := uint32(unix.BPF_F_MMAPABLE | unix.BPF_F_INNER_MAP)
		if *m, err = ebpf.NewMap(&ebpf.MapSpec{Name: "words", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: uint32(l.words()), Flags: flags}); err != nil {
			return fmt.Errorf("make a map of %d KiB: %w", l.words()/128, err)
		}
		if err := (*m).Pin(filepath.Join(d.t.pins(), name)); err != nil {
			return fmt.Errorf("pin its map: %w", err)
		}
	}
	if err := k.current.Put(slot, d.current); err != nil {
		return fmt.Errorf("hand its map to the programs: %w", err)
	}
	entry := diskEntry{Slot: slot, Shift: l.shift(), Coarse: uint32(l.coarse()), Bios: number(d.rec.Device.Bios)}
	if err := k.disks.Put(d.rec.Device.Number, entry); err != nil {
		return fmt.Errorf("let the programs know of it: %w", err)
	}
	if d.rec.Current, err = mapID(d.current); err != nil {
		return err
	}
	d.rec.Taken, err = mapID(d.taken)
	return err
}

// load finds the maps of a disk that was tracked by an earlier process.
func (d *Disk) load() (err error) {
	slot := d.rec.Slot
	if err := d.openCounters(); err != nil {
		return err
	}
	if d.current, err = pinnedMap(d.t.pins(), currentPin(slot), d.rec.Current); err != nil {
		return err
	}
	if d.taken, err = pinnedMap(d.t.pins(), takenPin(slot), d.rec.Taken); err != nil {
		return err
	}
	var entry diskEntry
	var marked id
	l := d.layout()
	want := diskEntry{Slot: slot, Shift: l.shift(), Coarse: uint32(l.coarse()), Bios: number(d.rec.Device.Bios)}
	if err := d.t.kernel.disks.Lookup(d.rec.Device.Number, &entry); err != nil || entry != want {
		return errors.New("the programs do not know of it any more")
	}
	if err := d.t.kernel.current.Lookup(slot, &marked); err != nil || marked != d.rec.Current {
		return errors.New("the programs mark another map")
	}
	return nil
}

func (d *Disk) openCounters() (err error) {
	if d.stat, err = os.Open(filepath.Join("/sys/block", d.name, "stat")); err != nil {
		return err
	}
	d.inflight, err = os.Open(filepath.Join("/sys/block", d.name, "inflight"))
	return err
}

func (d *Disk) close() {
	d.current.Close()
	d.taken.Close()
	d.stat.Close()
	d.inflight.Close()
	d.current, d.taken, d.stat, d.inflight = nil, nil, nil, nil
}

// kernelFirst and kernelLast read both counts of the disk, in that order; see begin.
func (d *Disk) kernelFirst() (reading, error) {
	k, err := readCounters(d.stat, d.inflight)
	if err != nil {
		return reading{}, err
	}
	c, err := d.tally()
	return reading{k, c}, err
}

func (d *Disk) kernelLast() (reading, error) {
	c, err := d.tally()
	if err != nil {
		return reading{}, err
	}
	k, err := readCounters(d.stat, d.inflight)
	return reading{k, c}, err
}

// tally sums what the programs counted.
func (d *Disk) tally() (sum tally, err error) {
	var each []tally
	if err := d.t.kernel.counts.Lookup(d.rec.Slot, &each); err != nil {
		return tally{}, fmt.Errorf("read what was counted on %s: %w", d.name, err)
	}
	for _, c := range each {
		sum.Sectors += c.Sectors
		sum.Passthrough += c.Passthrough
		sum.Overflow += c.Overflow
	}
	return sum, nil
}

// words shows both maps of the disk as memory. They are mapped no longer than needed, so that an idle agent stays small.
func (d *Disk) words(do func(current, taken []uint64)) error {
	current, drop, err := mapped(d.current, d.layout().words())
	if err != nil {
		return fmt.Errorf("look at the marks of %s: %w", d.name, err)
	}
	defer drop()
	taken, drop, err := mapped(d.taken, d.layout().words())
	if err != nil {
		return fmt.Errorf("look at what was taken of %s: %w", d.name, err)
	}
	defer drop()
	do(current, taken)
	return nil
}

func mapped(m *ebpf.Map, words int64) ([]uint64, func(), error) {
	if int64(m.MaxEntries()) != words || m.ValueSize() != 8 {
		return nil, nil, fmt.Errorf("the map has %d words instead of %d: %w", m.MaxEntries(), words, fs.ErrInvalid)
	}
	b, err := unix.Mmap(m.FD(), 0, int(words*8), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, err
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), words), func() { _ = unix.Munmap(b) }, nil
}

// clip shortens a text to what the record takes.
func clip(s string) string {
	if len(s) > maxText {
		return s[:maxText]
	}
	return s
}
