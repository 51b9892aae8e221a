// Package appliance is the role of the box at the customer's site: it captures servers into a store, and gives single files
// back. It has never heard of a virtual machine, and asks no master about files.
//
//	Appliance  does what it is asked; the master's own process has one
//	Node       an Appliance that is a process of its own: it has a schedule, an engine, a near store and a far one
//
// What a Node does goes through runs of its engine, each step of which may be repeated after a crash:
//
//	protect.SERVER.SNAPSHOT         (capture image →) capture → make room     when a server is due, or somebody asks
//	replicate.SERVER.SNAPSHOT.SEND  send → note                               one at a time, in the order of dr.NextToSend
//
// What it remembers is in the near store (ledger), so that losing the engine costs only runs under way. It tells its
// master how things stand, and not what happened: nothing has to be told in an order, or only once.
//
// Knows: sources, the stores they are captured into and sent to, when that is due.
// Must not know: the catalog, hypervisors, what becomes of a snapshot.
package appliance

import (
	"context"
	"errors"
	"fmt"

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
