//go:build linux

package agent

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// Limits of one capture.
const (
	maxLive     = 8       // passes while the server lives
	maxFrozen   = 2       // passes under freeze: one, and one more if the first did not hold
	worthwhile  = 0.7     // another live pass must be expected to find less than this part of the last one
	frozenShare = 0.8     // of the freeze limit that the expected frozen pass may take
	enough      = 4 << 20 // bytes left to read on tracked disks for which nothing has to be read once more before the freeze
)

// run is one capture.
type run struct {
	w        *wire.Writer
	plan     wire.Plan
	watchdog []string
	disks    []*disk
	hold     *hold
	read     int64
	passes   int

	provider   dr.Provider
	passedOver []dr.PassedOver
	volumes    *linux.Snapshots // nil: the disks themselves are read
}

func newRun(w *wire.Writer, plan wire.Plan, watchdog []string, disks []*disk) *run {
	return &run{w: w, plan: plan, watchdog: watchdog, disks: disks}
}

// all makes the passes and says what they came to.
func (r *run) all(ctx context.Context) error {
	r.choose(ctx)
	for attempt := 1; ; attempt++ {
		held, err := r.attempt(ctx, attempt)
		if err == nil {
			return r.done(held)
		}
		if errors.Is(err, linux.ErrSnapshot) && r.volumes != nil {
			r.passedOver = append(r.passedOver, dr.PassedOver{Provider: r.provider, Reason: err.Error()})
			r.withoutVolumes()
			attempt = 0
			continue
		}
		if !errors.Is(err, linux.ErrVoid) {
			return err
		}
		if attempt == maxFrozen {
			return fmt.Errorf("read the disks at one instant, %d attempts: %w", attempt, err)
		}
	}
}

// attempt makes the passes once.
func (r *run) attempt(ctx context.Context, number int) (linux.Held, error) {
	if r.volumes != nil {
		return r.byVolumes(ctx)
	}
	var last found
	live, err := linux.Writable(r.open())
	if err == nil && live && (number == 1 || r.followed()) {
		last, err = r.live(ctx)
	}
	if err != nil {
		return linux.Held{}, err
	}
	return r.frozen(ctx, last.expected)
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

// frozen reads the disks while their file systems stand still. ErrVoid if they did not until the end; what was sent is of
// use all the same, because the next pass replaces what is wrong.
func (r *run) frozen(ctx context.Context, expected time.Duration) (linux.Held, error) {
	f, err := linux.PrepareApart(r.open(), r.apart(), r.plan.FreezeLimit, r.watchdog)
	if err != nil {
		return linux.Held{}, err
	}
	defer f.Close()
	if f.Needed() {
		if r.tooLong(expected) {
			return linux.Held{}, fmt.Errorf("read the disks at one instant: it would take about %s at the speed measured just now, too close to the %s for which file systems may stand still: raise the freeze limit of this server, or choose a quieter time or fewer disks; nothing was frozen",
				expected.Round(100*time.Millisecond), r.plan.FreezeLimit)
		}
		if err := r.prepare(); err != nil {
			return linux.Held{}, err
		}
	}
	if err := errors.Join(r.announce(true), f.Sync(ctx)); err != nil {
		return linux.Held{}, err
	}
	// From Hold to Release the program touches no file system and takes no memory that it does not have yet.
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	if err := f.Hold(); err != nil {
		return linux.Held{}, err
	}
	passErr := errors.Join(r.snapshot(ctx), r.rest())
	if passErr == nil {
		passErr = r.readStill(ctx, f.Needed())
	}
	if passErr == nil {
		passErr = prove(r.disks)
	}
	held, err := f.Release()
	if ctx.Err() != nil {
		return linux.Held{}, context.Cause(ctx)
	}
	if sendErr := r.hold.send(r.w, r.disks); sendErr != nil {
		return linux.Held{}, sendErr
	}
	return held, errors.Join(err, passErr)
}

// rest asks the trackers what was written until everything stood still.
func (r *run) rest() error {
	for _, d := range r.disks {
		if d.track == nil {
			continue
		}
		known := !d.whole
		if err := d.take(); err != nil {
			return err
		}
		if known && d.whole {
			return fmt.Errorf("%s: %s: %w", d.Name, d.reason, linux.ErrVoid) // reading all of it would be too long for a freeze
		}
	}
	return nil
}

// readStill makes the pass that counts; under freeze within the limit, and into the hold.
func (r *run) readStill(ctx context.Context, frozen bool) error {
	if !frozen {
		_, err := r.pass(ctx, nil)
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, r.plan.FreezeLimit)
	defer cancel()
	_, err := r.pass(bounded, r.hold)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("not everything was read within %s: %w", r.plan.FreezeLimit, linux.ErrVoid)
	}
	return err
}

// prepare takes the memory that a pass under freeze needs, and keeps it.
func (r *run) prepare() error {
	if r.hold == nil {
		r.hold = newHold(holdSize(), r.disks)
	}
	for _, d := range r.disks {
		d.prepare()
	}
	return linux.Lock()
}

func (r *run) open() []*device {
	var out []*device
	for _, d := range r.disks {
		out = append(out, d.device)
	}
	return out
}

// done says what the capture came to.
func (r *run) done(held linux.Held) error {
	d := wire.Done{
		Age: time.Since(held.Since), Consistency: held.Consistency, Frozen: held.Frozen, Read: r.read, Passes: r.passes, Notes: held.Notes,
		Provider: r.provider, PassedOver: r.passedOver,
	}
	if d.Consistency == "" {
		d.Consistency = dr.CrashConsistent
	}
	if r.provider == dr.ProviderFreeze && held.Frozen == 0 {
		d.Provider = dr.ProviderCrash
		d.PassedOver = append(d.PassedOver, dr.PassedOver{Provider: dr.ProviderFreeze, Reason: "no file system on these disks is mounted for writing"})
	}
	for _, disk := range r.disks {
		var digest []byte
		if disk.sums != nil {
			digest = disk.sums.Digest()
		}
		d.Digests = append(d.Digests, digest)
		d.Sent = append(d.Sent, disk.sent.Load())
		d.Reasons = append(d.Reasons, disk.reason)
	}
	return r.w.Message(wire.KindDone, d)
}
