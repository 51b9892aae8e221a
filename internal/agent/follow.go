//go:build linux

package agent

import (
	"errors"
	"fmt"
	"slices"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/track"
	"github.com/musterdr/muster/internal/capture/view"
	"github.com/musterdr/muster/internal/capture/wire"
)

// DefaultTrackDir is where the tracker lives on a server: in memory, because it must not outlive the boot.
const DefaultTrackDir = "/run/muster-agent/track"

// follower is what is known of where a disk was written to.
type follower struct {
	track *track.Disk // nil: nobody notes it
}

// follow gives every disk its tracker, and if the appliance wants what was written to be known from one capture to the next,
// where the disk was written to since a snapshot whose content the appliance has. Otherwise the trackers are there for this
// capture, so that what is written while it goes on need not be looked for under freeze. That a disk cannot be tracked is no
// error: it says why, and is compared.
func follow(dir string, plan wire.Plan, disks []*disk) (stop func(), err error) {
	stop = func() {}
	var names []string
	for _, d := range disks {
		if d.Kernel != "" {
			names = append(names, d.Kernel)
		} else {
			d.reason = "it is a file: only the writes to disks are tracked"
		}
	}
	if dir == "" || len(names) == 0 {
		return stop, nil
	}
	if !plan.Track {
		_ = track.Remove(dir) // what is left of another time; if somebody uses it Start says so
	}
	tracker, err := track.Start(dir, names)
	if err != nil {
		if errors.Is(err, track.ErrBusy) && plan.Track {
			return stop, fmt.Errorf("start tracking: %w: another capture of this server is running", err)
		}
		for _, d := range disks {
			if d.Kernel != "" {
				d.reason = err.Error()
			}
		}
		return stop, nil
	}
	stop = func() { _ = tracker.Close() } // what was not kept is put back by the next start
	if !plan.Track {
		stop = func() {
			_ = tracker.Close()
			_ = track.Remove(dir) // or the next capture does
		}
	}
	for _, d := range disks {
		if d.Kernel == "" {
			continue
		}
		d.track = tracker.Disk(d.Kernel)
		if err := d.since(plan.Since); err != nil {
			stop()
			return func() {}, err
		}
	}
	return stop, nil
}

// since looks whether it is known where a disk was written to since one of the snapshots.
func (d *disk) since(snapshots []string) error {
	mark := d.track.Mark()
	switch err := d.take(); {
	case err != nil:
		return err
	case d.whole && d.reason != "":
	case mark == "" || !slices.Contains(snapshots, mark):
		d.whole, d.reason = true, "what was written is known since a snapshot that the appliance does not build on"
	default:
		d.tracked = true
	}
	return nil
}

// take adds to what the next pass has to read where the disk was written to since it was asked last. Where that is not
// known it is everything.
func (d *disk) take() error {
	extents, err := d.track.Take()
	if unknown := d.unknown(err); unknown != nil {
		if unknown.Reason == track.Untrackable {
			d.track = nil // now and in every later pass
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("ask what was written to %s: %w", d.Name, err)
	}
	if !d.whole {
		for _, e := range extents {
			d.todo = append(d.todo, view.Range(e))
		}
	}
	return nil
}

// unknown has the next pass read everything if a tracker's error says that it is not known what was written, and gives it
// then; nil for any other error and none.
func (d *disk) unknown(err error) *track.Unknown {
	var unknown *track.Unknown
	if errors.As(err, &unknown) {
		d.whole, d.todo, d.reason = true, nil, string(unknown.Reason)+": "+unknown.Detail
	}
	return unknown
}

// left gives how many bytes the next pass reads, at most.
func (d *disk) left() int64 {
	if d.stage == nil && (d.track == nil || d.whole) {
		return d.Size
	}
	return d.due().total
}

// due is what the next pass reads.
func (d *disk) due() pieces {
	switch {
	case d.stage != nil:
		return *d.stage
	case d.track != nil && !d.whole:
		return only(d.todo, d.swap, int64(d.block), d.Size)
	case d.track != nil:
		return d.used()
	}
	return all(d.swap, int64(d.block), d.Size)
}

// swapping gives where the kernel swaps to on a disk.
func (d *disk) swapping() []view.Range {
	if d.Kernel == "" {
		return nil
	}
	return linux.Swapping(d.Kernel)
}

// prove says whether every write to the tracked disks was seen. What was not is read as a whole by the next pass, and the
// error is linux.ErrVoid.
func prove(disks []*disk) error {
	var void error
	for _, d := range disks {
		if d.track == nil {
			continue
		}
		err := d.track.Prove()
		switch {
		case d.unknown(err) != nil:
			void = errors.Join(void, fmt.Errorf("%w: %w", linux.ErrVoid, err))
		case err != nil:
			return fmt.Errorf("prove that every write to %s was seen: %w", d.Name, err)
		}
	}
	return void
}

// settle tells the trackers that the snapshot is safe: what is written from its instant on counts for the next one.
func settle(disks []*disk, snapshot string) error {
	var errs []error
	for _, d := range disks {
		if d.track != nil {
			errs = append(errs, d.track.Kept(snapshot))
		}
	}
	return errors.Join(errs...)
}

// used is everything but what file systems say is free, and swap. What is free may be left out only where it is noted what is
// written from now on: it may be in use before the capture ends.
func (d *disk) used() pieces {
	free, _ := linux.Free(d.Kernel) // one that cannot be asked has nothing free
	return all(append(free, d.swap...), int64(d.block), d.Size)
}
