// Package appliance is the role of the box at the customer's site: it captures servers into a store, and gives single files
// back. In this release it runs in the same process as the master; it has never heard of a virtual machine, and asks no
// master about files.
//
// Knows: sources, and the store they are captured into.
// Must not know: the catalog, hypervisors, why a snapshot is taken.
package appliance

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/files"
	"github.com/musterdr/muster/internal/store"
)

// Appliance captures servers. Its methods may be called from many goroutines.
type Appliance struct {
	Store *store.Store
	// Open connects to a source. It is given by the program, which knows the ways there are.
	Open func(ctx context.Context, source dr.Source) (capture.Source, error)
	// Browser looks into snapshots.
	Browser *files.Browser
	// Journal hears of files that were put back; nil while there is no master.
	Journal api.Journal

	mu        sync.Mutex
	restoring map[string]bool // file restores under way
}

var (
	_ api.Appliance = (*Appliance)(nil)
	_ api.Files     = (*Appliance)(nil)
)

// Snapshot implements api.Appliance.
func (a *Appliance) Snapshot(ctx context.Context, task api.SnapshotTask, report dr.Progress) (dr.Snapshot, error) {
	kept, err := a.Store.Snapshot(ctx, task.ID)
	if err == nil {
		return kept, nil // an earlier attempt finished
	}
	if !errors.Is(err, store.ErrNotFound) {
		return dr.Snapshot{}, fmt.Errorf("look for snapshot %s: %w", task.ID, err)
	}
	if _, err := a.Store.Snapshot(ctx, task.Parent); err != nil {
		task.Parent = "" // the parent is gone from the store: a full snapshot is always right
	}
	src, err := a.Open(ctx, task.Server.Source)
	if err != nil {
		return dr.Snapshot{}, err
	}
	defer src.Close()
	if task.Image != "" {
		return capture.TakeFiles(ctx, src, a.Store, task, report)
	}
	return capture.Take(ctx, src, a.Store, task, report)
}

// Contact implements api.Appliance.
func (a *Appliance) Contact(ctx context.Context, source dr.Source) (api.Contact, error) {
	src, err := a.Open(ctx, source)
	if err != nil {
		return api.Contact{}, err
	}
	defer src.Close()
	return src.Contact(ctx)
}

// Forget implements api.Appliance.
func (a *Appliance) Forget(ctx context.Context, source dr.Source) error {
	src, err := a.Open(ctx, source)
	if err != nil {
		return err
	}
	defer src.Close()
	return src.Forget(ctx)
}
