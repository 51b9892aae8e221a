package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/musterdr/muster/internal/capture/linux"
)

// frozen reads the disks while their file systems stand still. ErrVoid if they did not until the end; what was sent is of
// use all the same, because the next pass replaces what is wrong.
func (r *run) frozen(ctx context.Context, last found) (linux.Held, error) {
	linux.Hurry() // and with it the watchdog, which begins now
	defer linux.Yield()
	f, err := linux.Prepare(r.open(), r.plan.FreezeLimit, r.watchdog, r.apps.thaw())
	if err != nil {
		return linux.Held{}, err
	}
	defer f.Close()
	if !f.Needed() {
		return r.instant(ctx, f, nil)
	}
	if r.tooLong(last.expected) {
		return linux.Held{}, fmt.Errorf("%w: about %s at the speed measured just now, too close to the %s for which file systems may stand still: raise the freeze limit of this server, or choose a quieter time or fewer disks; nothing was frozen",
			errTooLong, last.expected.Round(100*time.Millisecond), r.plan.FreezeLimit)
	}
	if err := r.prepare(last.left); err != nil {
		return linux.Held{}, err
	}
	return r.instant(ctx, f, r.hold)
}

// quiet reads the disks without a freeze, in a moment in which nobody wrote to them while they were read. ErrVoid if there was
// none: where what was written is tracked such a moment is short, and many are tried.
func (r *run) quiet(ctx context.Context) (held linux.Held, err error) {
	tries := 1
	if r.followed() {
		tries = maxQuiet
	}
	linux.Hurry()
	defer linux.Yield()
	if err := r.prepare(maxHold); err != nil {
		return held, err
	}
	for range tries {
		if err = linux.Sync(ctx, r.open()); err != nil {
			return held, err
		}
		var f *linux.Freeze
		if f, err = linux.Watch(r.open()); err != nil {
			return held, err
		}
		if held, err = r.instant(ctx, f, r.hold); !errors.Is(err, linux.ErrVoid) {
			return held, err
		}
		select {
		case <-ctx.Done():
			return held, context.Cause(ctx)
		case <-time.After(rand.N(quietPause)):
		}
	}
	return held, err
}

// instant makes the pass that counts, while f holds. What it finds goes into a hold, so that a slow line does not lengthen it.
func (r *run) instant(ctx context.Context, f *linux.Freeze, into *hold) (linux.Held, error) {
	if err := errors.Join(r.announce(true), f.Sync(ctx)); err != nil {
		return linux.Held{}, err
	}
	// From Hold to Release the program touches no file system and takes no memory that it does not have yet.
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	if f.Needed() { // otherwise nothing stands still, and applications need not either
		if err := r.apps.lock(ctx, r.plan.FreezeLimit); err != nil {
			return linux.Held{}, err
		}
	}
	if err := f.Hold(); err != nil {
		r.apps.unlock()
		return linux.Held{}, err
	}
	passErr := r.rest()
	if passErr == nil {
		passErr = r.readStill(ctx, into)
	}
	if passErr == nil {
		passErr = prove(r.disks)
	}
	held, err := f.Release()
	if err == nil && passErr == nil {
		r.apps.end()
	} else {
		r.apps.unlock()
	}
	if ctx.Err() != nil {
		return linux.Held{}, context.Cause(ctx)
	}
	if sendErr := into.send(r.w, r.disks); sendErr != nil {
		return linux.Held{}, sendErr
	}
	return held, errors.Join(err, passErr)
}

// rest asks the trackers what was written until everything stood still.
func (r *run) rest() error {
	if now := linux.SwapState(); now != r.swapped {
		r.swapped = now
		for _, d := range r.disks {
			d.whole, d.todo, d.swap = true, nil, d.swapping()
		}
		return fmt.Errorf("swap was switched on or off meanwhile: %w", linux.ErrVoid) // and data may lie there now
	}
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

// readStill makes the pass; into a hold within the freeze limit.
func (r *run) readStill(ctx context.Context, into *hold) error {
	if into == nil {
		_, err := r.pass(ctx, nil)
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, r.plan.FreezeLimit)
	defer cancel()
	_, err := r.pass(bounded, into)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("not everything was read within %s: %w", r.plan.FreezeLimit, linux.ErrVoid)
	}
	return err
}

// prepare takes the memory for a pass that is expected to find so many bytes, and keeps it.
func (r *run) prepare(expected int64) error {
	if r.hold == nil {
		r.hold = newHold(min(holdSize(), max(minHold, 2*expected)), r.disks)
	}
	for _, d := range r.disks {
		d.prepare()
	}
	return linux.Lock()
}
