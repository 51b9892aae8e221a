package agent

import (
	"context"
	"fmt"

	"github.com/musterdr/muster/internal/capture/windows"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// device is a disk of this system.
type device = windows.Disk

// DefaultTrackDir is unused: nobody notes what is written to the disks of Windows.
const DefaultTrackDir = ""

func openDisk(name string) (*device, error) { return windows.OpenDisk(name) }

func inventory(_ context.Context, disks []string) dr.Inventory { return windows.Inventory(disks) }

// tidy removes what captures that were killed have left.
func tidy(context.Context) error { return windows.RemoveShadows() }

// available is the memory that is free, in bytes.
func available() int64 { return windows.Available() }

// written is not known on Windows.
func written([]*disk) int64 { return 0 }

// choose gives the named disks, or every disk with a volume that programs reach.
func choose(names []string) ([]string, error) {
	var err error
	if len(names) == 0 {
		names, err = windows.InUse()
	}
	if err == nil && (len(names) == 0 || len(names) > wire.MaxDisks) {
		err = fmt.Errorf("choose disks: there are %d: give 1 to %d explicitly", len(names), wire.MaxDisks)
	}
	return names, err
}

// follower is nothing on Windows.
type follower struct{}

// follow says that nothing is tracked, where that was asked for.
func follow(_ string, plan wire.Plan, disks []*disk) (stop func(), err error) {
	for _, d := range disks {
		if plan.Track {
			d.reason = "this release does not track Windows"
		}
	}
	return func() {}, nil
}

func settle([]*disk, string) error { return nil }

// due is what the next pass reads.
func (d *disk) due() pieces {
	if d.stage != nil {
		return *d.stage
	}
	return all(d.swap, int64(d.block), d.Size)
}

// left gives how many bytes the next pass reads.
func (d *disk) left() int64 { return d.due().total }
