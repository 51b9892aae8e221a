package agent

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"time"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/hooks"
	"github.com/musterdr/muster/internal/dr"
)

// lockSlack is by how much a lock of an application may outlast the watchdog.
const lockSlack = 2 * time.Second

// applications are those of the server, which a keeper holds at rest. Without a keeper there are none.
type applications struct {
	command  []string // that runs the keeper
	settings dr.Hooks
	keeper   *hooks.Keeper
	report   hooks.Report
	lost     error // why the keeper cannot be relied on
}

// begin does what is slow and holds nobody up, and says whether that may have written much. Here and below an error means
// that there shall be no snapshot.
func (a *applications) begin(ctx context.Context) (wrote bool, err error) {
	if len(a.command) == 0 || a.settings.Off {
		return false, nil
	}
	a.settings.Limit = min(cmp.Or(a.settings.Limit, dr.DefaultHookLimit), dr.MaxHookLimit)
	linux.Hurry() // or what the keeper starts would come last, for which others wait
	a.keeper, a.lost = hooks.Start(a.command)
	linux.Yield()
	if a.lost == nil {
		a.report, a.lost = a.keeper.Begin(ctx, a.settings.Limit)
	}
	return len(a.report.Applications) > 0, a.judge(ctx)
}

// ready runs the server's own hooks, and says whether that may have written much.
func (a *applications) ready(ctx context.Context) (wrote bool, err error) {
	if a.keeper == nil || a.lost != nil {
		return false, nil
	}
	before := len(a.report.Applications)
	a.report, a.lost = a.keeper.Ready(ctx)
	return len(a.report.Applications) > before, a.judge(ctx)
}

// lock lets nobody write in the databases until unlock or end, but for not much longer than the freeze may take.
func (a *applications) lock(ctx context.Context, freeze time.Duration) error {
	if a.keeper == nil || a.lost != nil {
		return nil
	}
	a.report, a.lost = a.keeper.Lock(ctx, freeze+lockSlack)
	return a.judge(ctx)
}

// unlock ends a lock that came to nothing.
func (a *applications) unlock() {
	if a.keeper != nil && a.lost == nil {
		a.report, a.lost = a.keeper.Unlock()
	}
}

// end lets everything go, and does not wait for it.
func (a *applications) end() {
	if a.keeper != nil && a.lost == nil {
		a.lost = a.keeper.End()
	}
}

// last gives what became of the applications, once all of them are let go.
func (a *applications) last(ctx context.Context) (hooks.Report, error) {
	if a.keeper != nil && a.lost == nil {
		a.report, a.lost = a.keeper.Last(ctx)
	}
	if a.lost != nil {
		for i := range a.report.Applications {
			a.report.Applications[i].AtRest, a.report.Applications[i].Reason = false, a.lost.Error()
		}
		a.report.Notes = append(a.report.Notes, a.lost.Error())
	}
	return a.report, a.judge(ctx)
}

// judge is where a failure is an error, if the settings say so.
func (a *applications) judge(ctx context.Context) error {
	why := a.report.Failed()
	if a.lost != nil {
		why = a.lost.Error()
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case why == "" || !a.settings.Required:
		return nil
	}
	return fmt.Errorf("bring the applications to rest: %s; no snapshot was taken, because this server's hooks are required", why)
}

// thaw is to be kept open until everything is thawed; nil if nobody waits for it.
func (a *applications) thaw() *os.File {
	if a.keeper == nil {
		return nil
	}
	return a.keeper.Thaw()
}

func (a *applications) close() {
	if a.keeper != nil {
		a.keeper.Close()
	}
}
