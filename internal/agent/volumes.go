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
	if r.followed() {
		r.provider = dr.ProviderTracking
		return
	}
	r.over(dr.ProviderTracking, "%s", r.untracked())
	snapshots, err := linux.PlanSnapshots(ctx, r.open())
	if err == nil {
		err = r.mayUse(snapshots.Describe())
	}
	if err != nil {
		r.withoutVolumes(err)
		return
	}
	r.volumes, r.provider = snapshots, dr.ProviderLVM
}

// mayUse says why snapshots that are possible are not made.
func (r *run) mayUse(volumes string) error {
	if !r.plan.Volumes {
		return fmt.Errorf("snapshots of %s are possible, but not allowed on this server, because they write to its volume groups (--allow-snapshots)", volumes)
	}
	if r.someFollowed() {
		return errors.New("some of the disks are tracked, and those are read as they are")
	}
	return nil
}

// over notes why a provider is not used.
func (r *run) over(p dr.Provider, format string, args ...any) {
	r.passedOver = append(r.passedOver, dr.PassedOver{Provider: p, Reason: fmt.Sprintf(format, args...)})
}

// withoutVolumes has the disks themselves read, for a reason.
func (r *run) withoutVolumes(why error) {
	r.over(dr.ProviderLVM, "%s", why)
	if linux.ZFS("/") {
		r.over(dr.ProviderZFS, "this release compares the disks below ZFS as a whole")
	}
	r.volumes, r.provider = nil, dr.ProviderFreeze
	for _, d := range r.disks {
		d.view, d.stage = nil, nil
	}
}

// untracked says why not every disk is tracked.
func (r *run) untracked() string {
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
// stands still, makes the snapshots in between, and reads them afterwards. After an error nothing of it is left, and the disks
// can be read in another way.
func (r *run) byVolumes(ctx context.Context) (held linux.Held, err error) {
	snapshots := r.volumes
	defer func() {
		// Whoever asked may be gone; the snapshots must go all the same.
		if left := snapshots.Remove(context.WithoutCancel(ctx)); left != nil {
			held.Notes = append(held.Notes, "the next capture will try again to "+left.Error())
		}
	}()
	for _, d := range r.disks {
		d.only(snapshots.Rest(d.device))
	}
	last, err := r.live(ctx)
	if err != nil {
		return held, err
	}
	if err := linux.Sync(ctx, r.open()); err != nil {
		return held, err
	}
	if held, err = r.frozen(ctx, last); err != nil {
		return held, err
	}
	for _, d := range r.disks {
		d.others()
	}
	if err := r.announce(false); err != nil {
		return held, err
	}
	_, err = r.pass(ctx, nil)
	if err = errors.Join(err, snapshots.Check(ctx)); err != nil {
		return held, err
	}
	// The volumes were frozen by whoever made the snapshots, and everything else by us around it.
	held.Since, held.Frozen = snapshots.Since, max(held.Frozen, snapshots.Took)
	if held.Whole {
		held.Consistency = dr.FilesystemConsistent
	}
	return held, nil
}
