package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// What the agent needs of the system it runs on. It is told apart by files and not by an interface: one program holds one
// system, and an interface would have one implementation wherever it is built.

// device is a disk of this system.
type device = linux.Disk

func openDisk(name string) (*device, error) { return linux.OpenDisk(name) }

func inventory(ctx context.Context, disks []string) dr.Inventory { return linux.Inventory(ctx, disks) }

// tidy removes what captures that were killed have left, and that would grow.
func tidy(ctx context.Context) error { return linux.RemoveSnapshots(ctx) }

// available is the memory that is free, in bytes.
func available() int64 { return linux.Available("/") }

// written counts what was ever written to the disks, in bytes.
func written(disks []*disk) int64 {
	var open []*device
	for _, d := range disks {
		open = append(open, d.device)
	}
	return linux.Written(open)
}

// choose gives the named disks, or every disk in use.
func choose(names []string) ([]string, error) {
	if len(names) == 0 {
		if err := linux.Refuse("/"); err != nil {
			return nil, err
		}
		var err error
		if names, err = linux.InUse("/"); err != nil {
			return nil, err
		}
		if len(names) == 0 {
			return nil, errors.New("find the disks in use: there are none; name the disks of this server explicitly")
		}
	}
	if len(names) > wire.MaxDisks {
		return nil, fmt.Errorf("choose disks: %d of them: the most is %d; name those to capture explicitly", len(names), wire.MaxDisks)
	}
	return names, nil
}
