package agent

import (
	"context"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/signs"
)

// names lists the files of the server, beside the live passes; nobody walks over a file system that stands still.
func (r *run) names(ctx context.Context) (wait func()) {
	if !r.plan.Names {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		lister := signs.NewLister()
		if err := linux.Names(ctx, r.open(), lister.Add); err != nil {
			r.noNames = err.Error()
			return
		}
		listing := lister.Listing()
		r.listing = &listing
	}()
	return func() { <-done }
}

// tellNames sends the listing.
func (r *run) tellNames() error {
	if r.listing == nil {
		return nil
	}
	return r.w.Message(wire.KindNames, r.listing)
}
