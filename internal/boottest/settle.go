package boottest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
)

// How long nothing must have changed before it is taken that nothing will, although the machine is not as expected.
const (
	quietRescue = 5 * time.Second   // it is in rescue or emergency mode
	quietJobs   = 15 * time.Second  // every port of the baseline listens, but init still waits for something
	quietFailed = 20 * time.Second  // a port is missing, and a unit that failed explains it
	quietStart  = time.Minute       // init still waits for something, and there is no baseline to go by
	quietPorts  = 120 * time.Second // a port is missing for no known reason: a large application may be loading
)

// answers are what was asked of a machine that seemed stable.
type answers struct {
	status *probe.Status
	offset time.Duration // of the guest's clock
	checks []dr.CheckResult
}

// round is the asking of everything, under way while the stability is being confirmed.
type round struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
	stale  bool // the machine was not stable after all: it is to be asked again
	got    answers
	err    error
}

// settle takes samples until the machine is stable, and asks everything as soon as it seems so. It gives the answers of
// the time at which it was stable, and how it came to be.
func (a *attendance) settle(ctx context.Context, talk *probe.Conversation) (answers, dr.CheckResult, error) {
	began := time.Now()
	limit := time.After(a.Limits.Stabilise)
	var s sampler
	var asked *round
	defer func() {
		if asked != nil {
			asked.cancel(errOver)
			<-asked.done
		}
	}()
	for {
		now, err := a.sample(ctx, talk)
		if err != nil {
			return answers{}, dr.CheckResult{}, err
		}
		alike, why := s.take(a.Questions, now, time.Now())
		switch {
		case asked != nil && alike <= 1:
			asked.stale = true
		case asked == nil && alike > 0:
			asked = a.ask(ctx, talk)
		}
		over := why != ""
		pause := briefEvery
		if alike > 0 {
			pause = a.Limits.Sample
		}
		if alike < samples && !over {
			select {
			case <-ctx.Done():
				return answers{}, dr.CheckResult{}, context.Cause(ctx)
			case <-limit:
				over, why = true, fmt.Sprintf("not stable after %s", a.Limits.Stabilise)
			case <-time.After(pause):
				continue
			}
		}
		a.stableAt = time.Now()
		if asked != nil && asked.stale {
			<-asked.done // not cancelled: inside it would go on, and the new questions be too many
			asked = nil
		}
		if asked == nil {
			asked = a.ask(ctx, talk)
		}
		<-asked.done
		return asked.got, settledResult(now, over, why, a.stableAt.Sub(began)), asked.err
	}
}

func settledResult(now probe.Status, over bool, why string, took time.Duration) dr.CheckResult {
	r := dr.CheckResult{Name: "stable", State: dr.CheckPass, Want: "no start job is left and the same ports listen in 3 samples", Duration: took,
		Got: fmt.Sprintf("init is %s, %d sockets listen", orUnknown(now.InitState), len(now.Listening))}
	if over {
		// What is missing fails where it is compared; here is only told that it was waited for.
		r.State, r.Got = dr.CheckWarn, why
	}
	return r
}

// sample asks for a brief status.
func (a *attendance) sample(ctx context.Context, talk *probe.Conversation) (probe.Status, error) {
	answer, err := a.once(ctx, talk, probe.Ask{Ask: probe.AskStatus, Brief: true}, a.Limits.Answer)
	if err != nil {
		return probe.Status{}, err
	}
	return *answer.Status, nil
}

// once asks one question and tells whose fault it is if there is no answer.
func (a *attendance) once(ctx context.Context, talk *probe.Conversation, ask probe.Ask, limit time.Duration) (probe.Answer, error) {
	limited, cancel := context.WithTimeoutCause(ctx, limit, errLate)
	defer cancel()
	answer, err := talk.Ask(limited, ask)
	up, why := talk.Connected()
	switch {
	case err == nil:
		return answer, nil
	case errors.Is(err, probe.ErrGarbage):
		return answer, failed(dr.CodeBadAnswer, "the guest sent %d bytes of garbage on the test agent's port", talk.Garbage())
	case errors.Is(err, errLate) && !up:
		return answer, &Unheld{dr.CodeInfrastructure, fmt.Sprintf("the test agent's port was lost and could not be connected again: %v", why)}
	case errors.Is(err, errLate):
		return answer, failed(dr.CodeBadAnswer, "the test agent answered hello, but not %s within %s", ask.Ask, limit)
	case answer.Error != "":
		return answer, failed(dr.CodeBadAnswer, "%s", probe.Clean(err.Error(), maxText))
	}
	return answer, err
}

// ask asks for the whole status and the customer's checks, all at once.
func (a *attendance) ask(ctx context.Context, talk *probe.Conversation) *round {
	ctx, cancel := context.WithCancelCause(ctx)
	r := &round{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		all, ctx := errgroup.WithContext(ctx)
		all.SetLimit(checksAtOnce)
		all.Go(func() error {
			answer, err := a.once(ctx, talk, probe.Ask{Ask: probe.AskStatus}, a.Limits.Answer)
			if err == nil {
				r.got.status, r.got.offset = answer.Status, time.Until(answer.Status.Now)
			}
			return err
		})
		r.got.checks = make([]dr.CheckResult, len(a.Checks))
		for i, c := range a.Checks {
			all.Go(func() (err error) {
				r.got.checks[i], err = a.check(ctx, talk, c)
				a.report.Report("checks", int64(i+1), int64(len(a.Checks)), "checks")
				return err
			})
		}
		r.err = all.Wait()
	}()
	return r
}

// check asks one check. Of the answer only what the agent saw is taken: what it means is said here.
func (a *attendance) check(ctx context.Context, talk *probe.Conversation, c dr.Check) (dr.CheckResult, error) {
	began := time.Now()
	r := dr.CheckResult{Name: c.Name, Want: wanted(c), State: dr.CheckFail, Code: dr.CodeCheckFailed}
	answer, err := a.once(ctx, talk, probe.Ask{Ask: probe.AskCheck, Check: &c}, c.Limit()+checkGrace)
	r.Duration = time.Since(began)
	var guest *failure
	switch {
	case errors.As(err, &guest) && !errors.Is(err, probe.ErrGarbage):
		r.Code, r.Got = guest.code, guest.text // the other questions may still be answered
		return r, nil
	case err != nil:
		return r, err
	}
	r.Got = answer.Result.Got
	switch answer.Result.State {
	case dr.CheckPass:
		r.State, r.Code = dr.CheckPass, dr.CodeNone
	case dr.CheckFail:
	default:
		r.Code, r.Got = dr.CodeBadAnswer, fmt.Sprintf("the test agent answered %q, which is neither pass nor fail", answer.Result.State)
	}
	return r, nil
}

// wanted says in words what a check expects. It names no password.
func wanted(c dr.Check) string {
	matching := func(what, re string) string {
		if re == "" {
			return ""
		}
		return fmt.Sprintf(", %s matches %q", what, re)
	}
	switch c.Kind {
	case dr.CheckHTTP:
		status := c.Status
		if status == 0 {
			status = 200
		}
		return fmt.Sprintf("%s answers %d", c.URL, status) + matching("the body", c.Body)
	case dr.CheckTCP:
		return c.Address + " takes a connection" + matching("what it says", c.Banner)
	case dr.CheckPostgres, dr.CheckMySQL:
		return fmt.Sprintf("%q answers %q", c.Query, c.Expect)
	case dr.CheckCommand:
		return fmt.Sprintf("%s exits with %d", strings.Join(c.Command, " "), c.Exit) + matching("the output", c.Expect)
	}
	return ""
}

// sampler judges samples: how many in a row were those of a stable machine, and whether it is no use to wait for more.
type sampler struct {
	last    string
	changed time.Time
	alike   int
}

// take gives the number of samples alike, 0 if this one is not of a stable machine, and why waiting is over although it
// is not, "" if it is not over.
func (s *sampler) take(q Questions, now probe.Status, at time.Time) (alike int, why string) {
	ports := portSet(now.Listening)
	missing := missingPorts(q.Baseline.Listening, now.Listening)
	state := fmt.Sprint(ports, now.Jobs, now.InitState, now.FailedUnits)
	if state != s.last {
		s.last, s.changed, s.alike = state, at, 0
	}
	quiet := at.Sub(s.changed)
	starting := now.Jobs > 0 || now.InitState == "starting" || now.InitState == "initializing"
	known := len(portSet(q.Baseline.Listening)) > 0
	switch {
	case now.InitState == "maintenance":
		if quiet >= quietRescue {
			return 0, "the system is in rescue or emergency mode"
		}
	case !starting && len(missing) == 0:
		s.alike++
		return s.alike, ""
	case starting && len(missing) == 0 && known && quiet >= quietJobs, starting && quiet >= quietStart:
		return 0, fmt.Sprintf("init is %s with %d start jobs left, and nothing has changed for %s", now.InitState, now.Jobs, quiet.Round(time.Second))
	case len(missing) > 0 && !starting && len(unexpected(q, now.FailedUnits)) > 0 && quiet >= quietFailed, len(missing) > 0 && !starting && quiet >= quietPorts:
		return 0, fmt.Sprintf("nothing has changed for %s, and %s do not listen", quiet.Round(time.Second), strings.Join(missing, ", "))
	}
	return 0, ""
}

// portSet names the ports that a stable machine keeps, in order.
func portSet(list []dr.Listener) []string {
	var out []string
	for _, l := range list {
		if name := portName(l); lasting(l) && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}
