package boottest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
	"github.com/musterdr/muster/internal/vm"
)

const (
	maxRestarts  = 4                      // of a guest during one attendance: a relabelling, an update, a driver
	checksAtOnce = 8                      // the customer's
	checkGrace   = 20 * time.Second       // beyond a check's own limit, for its answer to arrive
	samples      = 3                      // alike, of a machine that is stable
	briefEvery   = 700 * time.Millisecond // between samples of one that is not
)

// Attend waits until a machine that runs is booted and stable, compares it with the baseline, and asks the customer's
// checks. It never stops the machine. A guest that does not come up is a result with a code and no error; the error is
// *Unheld, or ctx's.
func Attend(ctx context.Context, machine vm.Machine, q Questions, report dr.Progress) (Attendance, error) {
	q.Limits = q.Limits.filled()
	if q.Began.IsZero() {
		q.Began = time.Now()
	}
	total := failed(dr.CodeTimeout, "the whole test took longer than %s", q.Limits.Total)
	ctx, cancel := context.WithTimeoutCause(ctx, q.Limits.Total, total)
	defer cancel()
	inner, end := context.WithCancelCause(ctx)
	w := &watch{
		machine: machine, limits: q.Limits, began: q.Began, diskError: q.DiskError, report: report,
		console: console{path: machine.SerialLog(), off: q.SerialFrom},
	}
	var watching sync.WaitGroup
	watching.Go(func() { w.run(inner, end) })

	a := &attendance{Questions: q, machine: machine, watch: w, report: report}
	var err error
	for restarts := 0; ; restarts++ {
		err = a.visit(inner)
		if !errors.Is(err, probe.ErrRestarted) {
			break
		}
		if restarts == maxRestarts {
			err = failed(dr.CodeDied, "the guest started %d times over", restarts+1)
			break
		}
		a.results = nil
	}
	if cause := context.Cause(inner); cause != nil && err != nil {
		err = cause // whatever the question under way made of it
	}
	end(errOver)
	watching.Wait()
	return a.close(ctx, err)
}

// attendance is one Attend.
type attendance struct {
	Questions
	machine vm.Machine
	watch   *watch
	report  dr.Progress

	hello    *probe.Hello
	helloAt  time.Time
	status   *probe.Status
	stableAt time.Time
	doneAt   time.Time
	garbage  int64
	results  []dr.CheckResult
}

// visit is one conversation: it ends with the answers, with the machine starting again, or with a reason.
func (a *attendance) visit(ctx context.Context) error {
	ctx, restart := context.WithCancelCause(ctx)
	defer restart(errOver)
	a.hello, a.status, a.stableAt, a.doneAt = nil, nil, time.Time{}, time.Time{}
	talk := probe.Dial(ctx, a.ports()...)
	defer func() {
		a.garbage += talk.Garbage()
		talk.Close()
	}()
	a.watch.visit(talk, restart)
	if err := a.greet(ctx, talk); err != nil {
		return err
	}
	clock := watchClock()
	answers, settled, err := a.settle(ctx, talk)
	if err != nil {
		return err
	}
	a.doneAt = time.Now()
	a.status = answers.status
	a.results = append(a.results, a.identity())
	if r := machineID(a.Baseline, *a.hello); r.State != "" {
		a.results = append(a.results, r)
	}
	a.results = append(a.results, compare(a.Questions, *answers.status, answers.offset, clock.stepped())...)
	a.results = append(a.results, settled)
	a.results = append(a.results, answers.checks...)
	return nil
}

// ports are the agent's ports, the one that pre-recovery expects it on first.
func (a *attendance) ports() (open []probe.Open) {
	ports := []dr.GuestPort{dr.PortVirtio, dr.PortISA}
	if a.Hardware.Channel == dr.PortISA {
		slices.Reverse(ports)
	}
	for _, p := range ports {
		open = append(open, func(ctx context.Context) (probe.Channel, error) {
			limited, cancel := context.WithTimeout(ctx, callLimit)
			defer cancel()
			return a.machine.Channel(limited, p)
		})
	}
	return open
}

// greet waits until the agent has repeated the challenge.
func (a *attendance) greet(ctx context.Context, talk *probe.Conversation) error {
	limited, cancel := context.WithTimeoutCause(ctx, a.Limits.Boot, errLate)
	defer cancel()
	hello, err := talk.Hello(limited)
	switch {
	case errors.Is(err, probe.ErrGarbage):
		return failed(dr.CodeBadAnswer, "the guest sent %d bytes of garbage on the test agent's port", talk.Garbage())
	case errors.Is(err, errLate):
		if up, _ := talk.Connected(); !up {
			return noAgent(talk, fmt.Sprintf("%s have passed", a.Limits.Boot))
		}
		return failed(dr.CodeTimeout, "the test agent did not answer within %s", a.Limits.Boot)
	case err != nil:
		return err
	}
	if a.SourceBoot != "" && hello.BootID == a.SourceBoot {
		return failed(dr.CodeBadAnswer, "the boot id is that of the source when it was captured: this is no new boot")
	}
	a.hello, a.helloAt = &hello, time.Now()
	a.watch.greet()
	return nil
}

var errLate = errors.New("the time limit has passed")

func (a *attendance) identity() dr.CheckResult {
	return dr.CheckResult{
		Name: nameBoot, State: dr.CheckPass, Want: always[nameBoot],
		Got:      fmt.Sprintf("boot %s of machine %s, kernel %s, up for %s", a.hello.BootID, a.hello.Machine, a.hello.Kernel, a.hello.Uptime.Round(time.Second)),
		Duration: a.helloAt.Sub(a.Began),
	}
}

// close makes the result of an attendance from how it ended.
func (a *attendance) close(ctx context.Context, err error) (Attendance, error) {
	if a.doneAt.IsZero() {
		a.doneAt = time.Now()
	}
	a.watch.measure(context.WithoutCancel(ctx), time.Now())
	out := Attendance{Phases: a.phases(), Garbage: a.garbage, Waited: a.watch.meter.waited(), Screen: a.photograph(ctx)}
	out.Hello, out.Status = a.hello, a.status
	if a.hello != nil {
		out.BootID = a.hello.BootID
	}
	var guest *failure
	var ours *Unheld
	switch {
	case err == nil:
		out.Results = a.results
	case errors.As(err, &guest):
		took := a.doneAt.Sub(a.Began)
		out.Results, err = []dr.CheckResult{guest.result(nameBoot, took)}, nil
		if a.hello != nil {
			out.Results = []dr.CheckResult{a.identity(), guest.result(nameStay, took)}
		}
	case errors.As(err, &ours):
	case ctx.Err() == nil:
		err = &Unheld{dr.CodeInfrastructure, err.Error()}
	}
	return out, err
}

// photograph gives the screen as it is now, or as it was seen last.
func (a *attendance) photograph(ctx context.Context) []byte {
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), callLimit)
	defer cancel()
	a.watch.photograph(limited)
	return a.watch.screen
}

// phases tells where the time went. Where the serial port did not show the kernel, the guest's own clock says when it
// started.
func (a *attendance) phases() (phases []dr.Phase) {
	kernel, first := a.watch.kernelAt, a.watch.initAt
	if a.hello != nil {
		if own := a.helloAt.Add(-a.hello.Uptime); kernel.IsZero() && own.After(a.Began) {
			kernel = own
		}
	}
	if a.hello != nil && first.After(a.helloAt) {
		first = time.Time{} // read from the log only after the agent had answered
	}
	from := a.Began
	for _, p := range []struct {
		name string
		end  time.Time
	}{
		{dr.PhaseFirmware, kernel}, {dr.PhaseKernel, first}, {dr.PhaseUserspace, a.helloAt},
		{dr.PhaseStable, a.stableAt}, {dr.PhaseChecks, a.doneAt},
	} {
		if p.end.Before(from) {
			continue // not seen, or over before the one before it
		}
		phases = append(phases, dr.Phase{Name: p.name, Duration: p.end.Sub(from)})
		from = p.end
	}
	return phases
}

// clock notices when the host's clock is set while a guest's is compared with it.
type clock struct{ start time.Time }

func watchClock() clock { return clock{time.Now()} }

func (c clock) stepped() time.Duration {
	now := time.Now()
	return now.Round(0).Sub(c.start.Round(0)) - now.Sub(c.start)
}
