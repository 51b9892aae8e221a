package track

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/cilium/ebpf"
)

// ErrBusy is that another process uses the tracker.
var ErrBusy = errors.New("another process is using the tracker")

// Tracker is what tracks the disks of this machine. One process at a time has it, and in it one goroutine; tracking goes
// on without either.
type Tracker struct {
	dir    string
	lock   *os.File
	rec    *record
	kernel *kernel
	disks  map[string]*Disk
}

// Names in the tracker's folder.
const (
	lockFile   = "lock"
	recordFile = "record.json"
	pinFolder  = "bpf"
)

// Start begins to track whole disks, given by their kernel names, or goes on where an earlier process left off; what that one
// took and did not keep is put back. Disks that are tracked already and not named stay tracked; those that are no more are
// forgotten. The folder is the tracker's own, /run/muster-agent/track say; it is made if need be, and a memory file system is
// mounted on it if it does not lie in memory, because it must not outlive the boot and is written to while disks are frozen.
//
// A disk that cannot be tracked is no error here: its Take says why. The error is ErrBusy if another process has the
// tracker.
func Start(dir string, disks []string) (*Tracker, error) {
	return start(dir, disks, needsBytes)
}

func start(dir string, names []string, byteMode func() bool) (*Tracker, error) {
	t := &Tracker{dir: dir, disks: map[string]*Disk{}}
	if err := t.settle(); err != nil {
		return nil, fmt.Errorf("prepare the tracker's folder: %w", err)
	}
	if err := t.begin(names, byteMode); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (t *Tracker) record() string { return filepath.Join(t.dir, recordFile) }
func (t *Tracker) pins() string   { return filepath.Join(t.dir, pinFolder, t.rec.Object) }

// settle makes the folder and takes its lock.
func (t *Tracker) settle() error {
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return err
	}
	var where unix.Statfs_t
	if err := unix.Statfs(t.dir, &where); err != nil {
		return err
	}
	if where.Type != unix.TMPFS_MAGIC && where.Type != unix.RAMFS_MAGIC {
		if err := unix.Mount("muster-track", t.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=8m,mode=700"); err != nil {
			return fmt.Errorf("mount a tmpfs on %s: %w", t.dir, err)
		}
	}
	var err error
	if t.lock, err = takeLock(t.dir); err != nil {
		return err
	}
	bpf := filepath.Join(t.dir, pinFolder)
	if err := os.MkdirAll(bpf, 0o700); err != nil {
		return err
	}
	if err := unix.Statfs(bpf, &where); err != nil {
		return err
	}
	if where.Type != unix.BPF_FS_MAGIC {
		if err := unix.Mount("muster-track", bpf, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=700"); err != nil {
			return fmt.Errorf("mount a bpf file system on %s: %w", bpf, err)
		}
	}
	return nil
}

func takeLock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrBusy
		}
		return nil, err
	}
	return f, nil
}

// begin finds or installs the programs and sees to every disk.
func (t *Tracker) begin(names []string, byteMode func() bool) error {
	old, err := readRecord(t.record())
	if err != nil {
		old = &record{Version: -1} // unreadable: something was here, and it is not known what
	}
	now, err := thisBoot()
	if err != nil {
		return err
	}
	found := map[string]identity{}
	for _, name := range append(recorded(old), names...) {
		if i, err := identify(name); err == nil {
			found[name] = i
			now.Bios = now.Bios || i.Bios
		}
	}
	if reason, detail := old.broken(now); reason != "" {
		now.Bytes = byteMode()
		if err := t.install(now, old, reason, detail); err != nil {
			return err
		}
	} else if t.rec = old; true {
		if t.kernel, err = adopt(t.pins(), old); err != nil {
			now.Bytes = old.Bytes
			if err := t.install(now, old, Detached, err.Error()); err != nil {
				return err
			}
		}
	}
	return t.open(names, found)
}

// thisBoot gives a record of what is so now, without programs and disks.
func thisBoot() (*record, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	return &record{Version: recordVersion, Boot: boot, Object: objectName()}, nil
}

func recorded(rec *record) []string {
	var names []string
	if rec != nil {
		for _, d := range rec.Disks {
			names = append(names, d.Name)
		}
	}
	return names
}

// broken says why what a record tells cannot have gone on until now; "" if it can. The machine's sleep is every disk's own
// affair, because disks begin at different times.
func (rec *record) broken(now *record) (Reason, string) {
	switch {
	case rec == nil:
		return FirstContact, "nothing was tracked before"
	case rec.Version != recordVersion:
		return Detached, "the record of what was tracked cannot be read"
	case rec.Boot != now.Boot:
		return Rebooted, "the server was started since the last snapshot"
	case rec.Object != now.Object:
		return Upgraded, "the tracking programs are of another version than before"
	case now.Bios && !rec.Bios:
		return Upgraded, "a disk was added that needs other tracking programs"
	}
	return "", ""
}

// install removes what is there and installs anew. Of every disk of the old record nothing is known then, for the reason.
func (t *Tracker) install(now, old *record, reason Reason, detail string) error {
	for _, d := range t.disks {
		d.close()
	}
	if t.kernel != nil {
		t.kernel.close()
		t.kernel = nil
	}
	// Before anything else: a record that is left over must not be believed.
	if err := os.Remove(t.record()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget what was tracked: %w", err)
	}
	if err := unpinAll(filepath.Join(t.dir, pinFolder)); err != nil {
		return fmt.Errorf("remove the tracking programs: %w", err)
	}
	t.rec = now
	if old != nil {
		for _, d := range old.Disks {
			t.rec.Disks = append(t.rec.Disks, &recordOfDisk{Name: d.Name, Mark: d.Mark, Unknown: reason, Detail: detail})
		}
	}
	var err error
	t.kernel, err = install(t.pins(), t.rec)
	return err
}

// unpinAll removes what trackers of any version have pinned. Files beside are the kernel's own.
func unpinAll(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// open sees to every disk that was tracked or is to be.
func (t *Tracker) open(names []string, found map[string]identity) error {
	kept := t.rec.Disks
	t.rec.Disks = nil
	for _, d := range kept {
		if _, ok := found[d.Name]; ok {
			t.rec.Disks = append(t.rec.Disks, d)
		}
	}
	if err := t.tidy(); err != nil {
		return err
	}
	for _, r := range slices.Clone(t.rec.Disks) {
		if err := t.reopen(r, found[r.Name]); err != nil {
			return err
		}
	}
	for _, name := range names {
		if t.disks[name] != nil {
			continue
		}
		d := &Disk{t: t, name: name, given: map[operation]bool{}}
		t.disks[name] = d
		if i, err := identify(name); err != nil {
			if !errors.As(err, &d.refused) {
				return err
			}
			continue
		} else if err := d.enter(i, Unknown{name, FirstContact, "this disk was never tracked before"}); err != nil {
			return err
		}
	}
	return t.save()
}

// reopen goes on with a recorded disk, or begins it afresh.
func (t *Tracker) reopen(r *recordOfDisk, now identity) error {
	d := &Disk{t: t, name: r.Name, rec: r, given: map[operation]bool{}}
	t.disks[r.Name] = d
	if r.Current == 0 { // of an installation that is gone
		return d.enter(now, Unknown{r.Name, r.Unknown, r.Detail})
	}
	if err := d.load(); err != nil {
		return d.enter(now, Unknown{r.Name, Detached, err.Error()})
	}
	if u := r.Device.differs(now, r.Name); u != nil {
		return d.enter(now, *u)
	}
	return d.putBack()
}

// tidy removes the entries of disks that the record does not know: of disks that are gone, or of a process that was killed
// in between.
func (t *Tracker) tidy() error {
	var key uint32
	var value diskEntry
	var stray []uint32
	for all := t.kernel.disks.Iterate(); all.Next(&key, &value); {
		if !slices.ContainsFunc(t.rec.Disks, func(d *recordOfDisk) bool {
			return d.Current != 0 && d.Device.Number == key && d.Slot == value.Slot
		}) {
			stray = append(stray, key)
		}
	}
	for _, key := range stray {
		if err := t.kernel.disks.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("stop tracking a disk that is gone: %w", err)
		}
	}
	for slot := range uint32(maxDisks) {
		if !slices.ContainsFunc(t.rec.Disks, func(d *recordOfDisk) bool { return d.Current != 0 && d.Slot == slot }) {
			if err := t.vacate(slot); err != nil {
				return err
			}
		}
	}
	return nil
}

// vacate frees the memory of a slot.
func (t *Tracker) vacate(slot uint32) error {
	for _, name := range []string{currentPin(slot), takenPin(slot)} {
		if err := os.Remove(filepath.Join(t.pins(), name)); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return fmt.Errorf("free the map %s: %w", name, err)
		}
	}
	if err := t.kernel.current.Delete(slot); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("free the map of slot %d: %w", slot, err)
	}
	return nil
}

func (t *Tracker) save() error {
	if err := t.rec.write(t.record()); err != nil {
		return fmt.Errorf("write down what is tracked: %w", err)
	}
	return nil
}

// Disk gives a disk that Start was told of, or that was tracked before. A name that it does not know gives a disk whose
// Take says so.
func (t *Tracker) Disk(name string) *Disk {
	if d := t.disks[name]; d != nil {
		return d
	}
	return &Disk{t: t, name: name, refused: &Unknown{name, Untrackable, "the tracker was not started for this disk"}}
}

// Close lets go of the tracker; tracking goes on. What was taken and not kept will be put back by the next Start.
func (t *Tracker) Close() error {
	for _, d := range t.disks {
		d.close()
	}
	if t.kernel != nil {
		t.kernel.close()
	}
	if t.lock != nil {
		return t.lock.Close()
	}
	return nil
}

// Remove ends tracking and leaves nothing behind. With nothing there it does nothing. The error is ErrBusy if a process
// has the tracker.
func Remove(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := takeLock(dir)
	if err != nil {
		return fmt.Errorf("remove the tracker: %w", err)
	}
	defer lock.Close()
	err = os.Remove(filepath.Join(dir, recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	bpf := filepath.Join(dir, pinFolder)
	if _, missing := os.Stat(bpf); missing == nil {
		err = errors.Join(err, unpinAll(bpf))
		_ = unix.Unmount(bpf, unix.MNT_DETACH) // an error means that it was not mounted
		err = errors.Join(err, os.Remove(bpf))
	}
	if err == nil {
		err = os.Remove(filepath.Join(dir, lockFile))
	}
	if err == nil {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		err = os.Remove(dir)
	}
	if err != nil {
		return fmt.Errorf("remove the tracker: %w", err)
	}
	return nil
}
