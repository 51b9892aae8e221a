package track

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Limits of the continuity record.
const (
	maxRecord = 1 << 20 // bytes
	maxText   = 1024    // bytes of a name, a detail, a mark
)

const recordVersion = 2

// record is what must still be true for tracking to have gone on without a gap. docs/formats/tracking.md describes it.
type record struct {
	Version int             `json:"version"`
	Boot    string          `json:"boot"`   // the kernel's identifier of this boot
	Object  string          `json:"object"` // which programs these are
	Slept   int64           `json:"slept"`  // nanoseconds that the machine has slept since it was started
	Bytes   bool            `json:"bytes"`  // a byte a granule
	Bios    bool            `json:"bios"`   // the programs for bio-based disks run as well
	Links   map[string]id   `json:"links"`  // by program
	Runs    map[string]id   `json:"runs"`   // the programs themselves
	Maps    map[string]id   `json:"maps"`
	Disks   []*recordOfDisk `json:"disks"`
}

// id is a number that the kernel gives to a program, a link or a map, once in a boot.
type id uint32

// recordOfDisk is one tracked disk.
type recordOfDisk struct {
	Name    string   `json:"name"`
	Device  identity `json:"device"`
	Slot    uint32   `json:"slot"`
	Granule int64    `json:"granule"`
	Current id       `json:"current"`
	Taken   id       `json:"taken"`
	Base    base     `json:"base"`
	Slept   int64    `json:"slept"` // nanoseconds that the machine had slept when counting began
	// Unknown is why everything has to be compared; "" if it is known what changed since Kept.
	Unknown Reason `json:"unknown,omitempty"`
	Detail  string `json:"detail,omitempty"`
	// Mark is what was given to Kept.
	Mark string `json:"mark,omitempty"`
}

// identity is which device has a name.
type identity struct {
	Number uint32 `json:"number"` // major << 20 | minor
	Size   int64  `json:"size"`   // bytes
	Seq    uint64 `json:"seq"`    // rises with every medium that any disk gets; 0 before Linux 5.15
	Bios   bool   `json:"bios"`   // bio-based
}

// base is where counting began.
type base struct {
	Kernel  uint64 `json:"kernel"` // sectors written and discarded, as the kernel counts them
	Exact   bool   `json:"exact"`  // both were read while nothing was written
	Since   uint64 `json:"since"`  // CLOCK_MONOTONIC, nanoseconds: what begins later is certainly not in either
	Counted tally  `json:"counted"`
}

// tally is what the programs counted on a disk, summed over the CPUs. Its order is that of struct counts.
type tally struct {
	Sectors     uint64 `json:"sectors"`
	Passthrough uint64 `json:"passthrough"`
	Overflow    uint64 `json:"overflow"`
}

func decodeRecord(r io.Reader) (*record, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxRecord+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxRecord {
		return nil, fmt.Errorf("it has more than %d bytes", maxRecord)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	rec := &record{}
	if err := dec.Decode(rec); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows it")
	}
	return rec, rec.check()
}

// check refuses what no tracker has written.
func (rec *record) check() error {
	if rec.Version != recordVersion {
		return fmt.Errorf("its version is %d, not %d", rec.Version, recordVersion)
	}
	if len(rec.Disks) > maxDisks {
		return fmt.Errorf("it has %d disks, more than %d", len(rec.Disks), maxDisks)
	}
	slots, names, numbers := map[uint32]bool{}, map[string]bool{}, map[uint32]bool{}
	for _, d := range rec.Disks {
		if d == nil {
			return errors.New("it has a disk that is nothing")
		}
		if slots[d.Slot] || names[d.Name] || numbers[d.Device.Number] {
			return fmt.Errorf("it has disk %.40q twice", d.Name)
		}
		slots[d.Slot], names[d.Name], numbers[d.Device.Number] = true, true, true
		if err := d.check(rec.Bytes); err != nil {
			return fmt.Errorf("disk %.40q: %w", d.Name, err)
		}
	}
	return nil
}

func (d *recordOfDisk) check(bytes bool) error {
	switch {
	case !goodName(d.Name):
		return errors.New("that is no name of a disk")
	case len(d.Detail) > maxText || len(d.Mark) > maxText:
		return errors.New("it has a text that is too long")
	case d.Slot >= maxDisks:
		return fmt.Errorf("there is no slot %d", d.Slot)
	case d.Device.Size <= 0 || d.Device.Size > maxSize:
		return fmt.Errorf("%d bytes is no size", d.Device.Size)
	case d.Granule != newLayout(d.Device.Size, bytes).granule:
		return fmt.Errorf("granules of %d bytes do not fit its size", d.Granule)
	case d.Unknown != "" && !reasons[d.Unknown]:
		return fmt.Errorf("%.40q is no reason", d.Unknown)
	}
	return nil
}

// goodName says whether a name can be a kernel's name of a disk, and a file name.
func goodName(name string) bool {
	return name != "" && len(name) <= maxText && name == filepath.Base(name) && name != "." && name != ".." && name != "/" &&
		!bytes.ContainsRune([]byte(name), 0)
}

func readRecord(path string) (*record, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return decodeRecord(f)
}

// write replaces the record, whole or not at all.
func (rec *record) write(path string) error {
	b, err := json.MarshalIndent(rec, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
