//go:build linux

package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/dr"
)

// choose decides how the disks are seen at one instant, best first, and notes why what is better is not used.
func (r *run) choose(ctx context.Context) {
	over := func(p dr.Provider, format string, args ...any) {
		r.passedOver = append(r.passedOver, dr.PassedOver{Provider: p, Reason: fmt.Sprintf(format, args...)})
	}
	if r.followed() {
		r.provider = dr.ProviderTracking
		return
	}
	over(dr.ProviderTracking, "%s", r.untracked())
	snapshots, err := linux.PlanSnapshots(ctx, r.open())
	switch {
	case err != nil:
		over(dr.ProviderLVM, "%s", err)
	case !r.plan.Volumes:
		over(dr.ProviderLVM, "snapshots of %s are possible, but not allowed on this server, because they write to its volume groups (--allow-snapshots)", snapshots.Describe())
	case r.someFollowed():
		over(dr.ProviderLVM, "some of the disks are tracked, and those are read as they are")
	default:
		r.volumes, r.provider = snapshots, dr.ProviderLVM
		return
	}
	r.withoutVolumes()
}

// withoutVolumes has the disks themselves read.
func (r *run) withoutVolumes() {
	r.volumes, r.provider = nil, dr.ProviderFreeze
	for _, d := range r.disks {
		d.view, d.stage = nil, nil
	}
	if linux.ZFS("/") {
		r.passedOver = append(r.passedOver, dr.PassedOver{Provider: dr.ProviderZFS, Reason: "this release compares the disks below ZFS as a whole"})
	}
}

// untracked says why not every disk is tracked.
func (r *run) untracked() string {
	if !r.plan.Track {
		return "not asked for: nothing is to stay on this server (--resident)"
	}
	var why []string
	for _, d := range r.disks {
		if d.track == nil {
			why = append(why, d.Name+": "+d.reason)
		}
	}
	return strings.Join(why, "; ")
}

// apart is what a freeze leaves to snapshots.
func (r *run) apart() linux.Apart { return r.volumes.Apart() }

// snapshot makes the snapshots, if there are to be any, while everything stands still: from then on only the rest of the
// disks has to be read before it moves again.
func (r *run) snapshot(ctx context.Context) error {
	if r.volumes == nil {
		return nil
	}
	views, err := r.volumes.Take(ctx)
	if err != nil {
		return err
	}
	for i, d := range r.disks {
		d.view = views[i]
		d.only(views[i].Rest())
	}
	return nil
}

// byVolumes reads the rest of the disks, once while the server lives to see how long it takes and once while everything
// stands still, makes the snapshots in between, and reads them afterwards. If the snapshots cannot be made the error is
// linux.ErrSnapshot, and nothing has happened.
func (r *run) byVolumes(ctx context.Context) (held linux.Held, err error) {
	// Whoever asked may be gone; the snapshots must go all the same.
	snapshots := r.volumes
	defer func() {
		if left := snapshots.Remove(context.WithoutCancel(ctx)); left != nil {
			held.Notes = append(held.Notes, "the next capture will try again to "+left.Error())
		}
	}()
	for _, d := range r.disks {
		d.only(r.volumes.Rest(d.device))
	}
	last, err := r.live(ctx)
	if err != nil {
		return linux.Held{}, err
	}
	if err := linux.Sync(ctx, r.open()); err != nil {
		return linux.Held{}, err
	}
	if held, err = r.frozen(ctx, last.expected); err != nil {
		return linux.Held{}, err
	}
	for _, d := range r.disks {
		d.others()
	}
	if err := r.announce(false); err != nil {
		return linux.Held{}, err
	}
	if _, err := r.pass(ctx, nil); err != nil {
		return linux.Held{}, errors.Join(err, r.volumes.Check(ctx))
	}
	if err := r.volumes.Check(ctx); err != nil {
		return linux.Held{}, err
	}
	// The volumes were frozen by whoever made the snapshots, and everything else by us around it.
	held.Since, held.Frozen = r.volumes.Since, max(held.Frozen, r.volumes.Took)
	if held.Whole {
		held.Consistency = dr.FilesystemConsistent
	}
	return held, nil
}
