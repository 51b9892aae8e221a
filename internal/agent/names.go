//go:build linux

package agent

import (
	"context"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/signs"
)

// list lists the files of the server, beside the first live pass.
func (r *run) list(ctx context.Context) {
	r.listed = make(chan struct{})
	if !r.plan.Names {
		close(r.listed)
		return
	}
	open := r.open() // as they are now: how they are read may be chosen meanwhile
	go func() {
		defer close(r.listed)
		lister := signs.NewLister()
		if err := linux.Names(ctx, open, lister.Add); err != nil {
			r.noNames = err.Error()
			return
		}
		listing := lister.Listing()
		r.listing = &listing
	}()
}

// tellNames sends the listing.
func (r *run) tellNames() error {
	if r.listing == nil {
		return nil
	}
	return r.w.Message(wire.KindNames, r.listing)
}
