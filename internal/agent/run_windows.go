package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/time/rate"

	"github.com/musterdr/muster/internal/capture/windows"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// maxAttempts is how often the disks are read until nobody wrote beside the shadow copies.
const maxAttempts = 3

// errMoved is that something beside the shadow copies was written to.
var errMoved = errors.New("the disks were written to beside the volumes that have shadow copies (partition table, boot partitions, volumes without a letter)")

// run is one capture.
type run struct {
	w      *wire.Writer
	plan   wire.Plan
	disks  []*disk
	rate   *rate.Limiter // nil: no limit
	read   int64
	passes int
}

func newRun(w *wire.Writer, plan wire.Plan, _ Agent, disks []*disk) *run {
	r := &run{w: w, plan: plan, disks: disks}
	if plan.Rate > 0 {
		r.rate = rate.NewLimiter(rate.Limit(plan.Rate), chunk)
	}
	return r
}

// all reads the disks and says what that came to.
func (r *run) all(ctx context.Context) error {
	for attempt := 1; ; attempt++ {
		since, err := r.shadowed(ctx)
		if err == nil {
			return r.done(since)
		}
		if !errors.Is(err, errMoved) || attempt == maxAttempts {
			return fmt.Errorf("read the disks at one instant, attempt %d: %w", attempt, err)
		}
	}
}

// shadowed reads what no shadow copy will hold, makes the shadow copies, and reads it again: what was the same before and
// after was so at that instant. Then it reads the shadow copies.
func (r *run) shadowed(ctx context.Context) (since time.Time, err error) {
	var open []*device
	for _, d := range r.disks {
		d.view = nil
		open = append(open, d.device)
	}
	shadows, err := windows.Plan(open)
	if err != nil {
		return since, err
	}
	defer func() { err = errors.Join(err, shadows.Remove()) }()
	for _, d := range r.disks {
		d.only(shadows.Rest(d.device))
	}
	if _, err := r.once(ctx, false); err != nil {
		return since, err
	}
	views, err := shadows.Take()
	if err != nil {
		return since, err
	}
	for i, d := range r.disks {
		d.view = views[i]
	}
	again, err := r.once(ctx, true)
	if err != nil {
		return since, err
	}
	if again.differed > 0 {
		return since, errMoved
	}
	for _, d := range r.disks {
		d.others()
	}
	_, err = r.once(ctx, false)
	return shadows.Since, err
}

func (r *run) once(ctx context.Context, frozen bool) (found, error) {
	if err := r.announce(frozen); err != nil {
		return found{}, err
	}
	return r.pass(ctx, nil)
}

// done says what the capture came to.
func (r *run) done(since time.Time) error {
	d := wire.Done{Age: time.Since(since), Consistency: dr.FilesystemConsistent, Read: r.read, Passes: r.passes, Provider: dr.ProviderVSS,
		PassedOver: []dr.PassedOver{{Provider: dr.ProviderTracking, Reason: "this release does not track Windows"}}}
	report(&d, r.disks)
	return r.w.Message(wire.KindDone, d)
}

// files reads folders file by file, on Linux.
func (Agent) files(context.Context, *wire.Reader, *wire.Writer, wire.FilesPlan) error {
	return errors.New("capture files: agents for Windows capture whole disks only; set the tier of this server to image")
}
