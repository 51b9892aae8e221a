//go:build linux

package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/time/rate"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/signs"
)

// Limits of one capture.
const (
	maxLive     = 8                      // passes while the server lives
	maxFrozen   = 3                      // freezes: those after the first only if the one before did not hold
	maxQuiet    = 20                     // moments without a freeze
	quietPause  = 300 * time.Millisecond // between two of them, at most
	worthwhile  = 0.7                    // another live pass must be expected to find less than this part of the last one
	frozenShare = 0.8                    // of the freeze limit that the expected frozen pass may take
	enough      = 4 << 20                // bytes left to read on tracked disks for which nothing has to be read once more before the freeze
)

// run is one capture.
type run struct {
	w        *wire.Writer
	plan     wire.Plan
	watchdog []string
	apps     applications
	disks    []*disk
	hold     *hold
	swapped  string        // linux.SwapState for which the disks' swap is known
	rate     *rate.Limiter // of passes while the server lives; nil: no limit
	read     int64
	passes   int
	listed   chan struct{}  // closed when it is known which of the next two there is
	listing  *signs.Listing // of names; nil: noNames says why not
	noNames  string

	provider   dr.Provider
	passedOver []dr.PassedOver
	volumes    *linux.Snapshots // nil: the disks themselves are read
}

func newRun(w *wire.Writer, plan wire.Plan, a Agent, disks []*disk) *run {
	r := &run{w: w, plan: plan, watchdog: a.Watchdog, apps: applications{command: a.Hooks, settings: plan.Hooks}, disks: disks, swapped: linux.SwapState()}
	for _, d := range disks {
		d.swap = d.swapping() // after the state: a change in between is found
	}
	if plan.Rate > 0 {
		r.rate = rate.NewLimiter(rate.Limit(plan.Rate), chunk)
	}
	return r
}

// errTooLong is a freeze that was not begun because it would not have ended in time.
var errTooLong = errors.New("it would take too long")

// all makes the passes and says what they came to: under freeze, or if that fails again and again, in a moment in which nobody
// happened to write.
func (r *run) all(ctx context.Context) error {
	defer r.apps.close()
	linux.Yield()
	r.list(ctx)
	r.choose(ctx)
	if r.volumes != nil {
		held, err := r.byVolumes(ctx)
		if err == nil {
			return r.done(ctx, held)
		}
		if ctx.Err() != nil {
			return err
		}
		r.withoutVolumes(err)
	}
	var frozen error
	for range maxFrozen {
		var last found
		live, err := linux.Writable(r.open())
		if err == nil && live && (frozen == nil || r.followed()) {
			last, err = r.live(ctx)
		}
		if err != nil {
			return err
		}
		<-r.listed // nobody walks over a file system that stands still
		if frozen == nil && live {
			if last, err = r.quiesce(ctx, last); err != nil {
				return err
			}
		}
		held, err := r.frozen(ctx, last)
		if err == nil {
			return r.done(ctx, held)
		}
		if frozen = err; errors.Is(err, errTooLong) {
			break // how long it takes was found out in many passes
		}
		if !errors.Is(err, linux.ErrVoid) {
			return err
		}
	}
	held, err := r.quiet(ctx)
	if errors.Is(err, linux.ErrVoid) {
		return fmt.Errorf("read the disks at one instant: %w; and somebody wrote whenever they were read without a freeze (%w)", frozen, err)
	}
	if err != nil {
		return err
	}
	r.over(r.provider, "%s", frozen)
	r.provider = dr.ProviderCrash
	held.Notes = append(held.Notes, fmt.Sprintf("crash-consistent, read in a moment in which nobody wrote, because the file systems could not be frozen: %v", frozen))
	return r.done(ctx, held)
}

// followed says whether it is known of every disk what is written to it from now on.
func (r *run) followed() bool {
	return !slices.ContainsFunc(r.disks, func(d *disk) bool { return d.track == nil })
}

// someFollowed says whether it is known of any disk.
func (r *run) someFollowed() bool {
	return slices.ContainsFunc(r.disks, func(d *disk) bool { return d.track != nil })
}

// live reads the disks while the server goes on, again and again until what is left for the frozen pass is small enough
// and the time it will take is known.
func (r *run) live(ctx context.Context) (found, error) {
	room := holdSize()
	var last found
	for n := 1; n <= maxLive; n++ {
		if err := r.announce(false); err != nil {
			return found{}, err
		}
		now, err := r.pass(ctx, nil)
		if err != nil {
			return found{}, err
		}
		<-r.listed // before it is asked what was written meanwhile
		if err := r.advance(ctx, &now); err != nil {
			return found{}, err
		}
		stuck := n > 1 && float64(now.left) > worthwhile*float64(last.left)
		last = now
		switch {
		case now.left > room && !stuck:
			continue // too much was written meanwhile to be held in memory; a shorter pass leaves less
		case r.followed() && now.left > enough && !stuck:
			continue // the next pass is shorter than this one, and the freeze shorter for it
		case now.sending && r.tooLong(now.expected):
			continue // measure again without sending before giving up
		}
		break
	}
	return last, nil
}

// quiesce brings the applications near to rest: first what is slow, then what somebody may wait for. What that wrote is not
// left for the freeze.
func (r *run) quiesce(ctx context.Context, last found) (found, error) {
	for _, step := range []func(context.Context) (bool, error){r.apps.begin, r.apps.ready} {
		wrote, err := step(ctx)
		if err != nil {
			return found{}, err
		}
		if !wrote || !r.followed() {
			continue
		}
		last = found{}
		if err = r.advance(ctx, &last); err == nil && last.left > enough {
			last, err = r.live(ctx)
		}
		if err != nil {
			return found{}, err
		}
	}
	return last, nil
}

// advance has what is in memory written, asks what was written since the pass, and reckons how long reading it will take.
func (r *run) advance(ctx context.Context, f *found) error {
	if r.someFollowed() {
		if err := linux.Sync(ctx, r.open()); err != nil {
			return err
		}
	}
	var todo int64
	for _, d := range r.disks {
		took := time.Duration(d.busy.Load() / int64(len(d.readers)))
		if d.track == nil {
			f.expected = max(f.expected, took)
			f.left = max(f.left, f.written)
			continue
		}
		if err := d.take(); err != nil {
			return err
		}
		left := d.left()
		todo += left
		f.expected = max(f.expected, time.Duration(float64(took)*float64(left)/float64(max(d.now.total, enough))))
	}
	f.left += todo
	return nil
}

func (r *run) tooLong(expected time.Duration) bool {
	return float64(expected) > frozenShare*float64(r.plan.FreezeLimit)
}

func (r *run) open() []*device {
	var out []*device
	for _, d := range r.disks {
		out = append(out, d.device)
	}
	return out
}

// done says what the capture came to.
func (r *run) done(ctx context.Context, held linux.Held) error {
	apps, err := r.apps.last(ctx)
	if err != nil {
		return err
	}
	d := wire.Done{
		Provider: r.provider, PassedOver: r.passedOver,
		Age: time.Since(held.Since), Consistency: held.Consistency, Frozen: held.Frozen, Read: r.read, Passes: r.passes,
		Applications: apps.All(), Notes: append(held.Notes, apps.Notes...),
		NoNames: r.noNames,
	}
	switch {
	case d.Consistency == "":
		d.Consistency = dr.CrashConsistent
	case d.Consistency == dr.FilesystemConsistent && apps.Rested():
		d.Consistency = dr.ApplicationConsistent
	}
	if r.provider == dr.ProviderFreeze && held.Frozen == 0 {
		d.Provider = dr.ProviderCrash
		d.PassedOver = append(d.PassedOver, dr.PassedOver{Provider: dr.ProviderFreeze, Reason: "no file system on these disks is mounted for writing"})
	}
	report(&d, r.disks)
	if err := r.tellNames(); err != nil {
		return err
	}
	return r.w.Message(wire.KindDone, d)
}
