package master

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
)

// Limits on the steps of an invocation.
const (
	bootLimit  = 15 * time.Minute
	checkLimit = 30 * time.Minute
	endLimit   = 6 * time.Hour // keeping what was written copies whole disks
)

// invocationWork is the input of invoke and end.
type invocationWork struct {
	ID   string `json:"id"`
	Keep bool   `json:"keep,omitempty"`
}

// Invoke implements api.Operator. Only last-known-good is ever invoked.
func (m *Master) Invoke(ctx context.Context, request api.InvokeRequest) (api.Operation, error) {
	s, err := m.server(ctx, request.Server)
	if err != nil {
		return api.Operation{}, err
	}
	lkg, ok, err := m.Catalog.LKG(ctx, s.ID)
	if err != nil {
		return api.Operation{}, err
	}
	if !ok {
		return api.Operation{}, api.Errorf(api.Refused, "server %s has no last-known-good: no image of it has passed a test yet; see 'muster snapshots %s' and 'muster tickets'", s.Name, s.Name)
	}
	if inv, active, err := m.Catalog.ActiveInvocation(ctx, s.ID); err != nil {
		return api.Operation{}, err
	} else if active {
		return api.Operation{}, api.Errorf(api.Conflict, "server %s is invoked already (%s, %s): end that first with 'muster invocation end %s'", s.Name, inv.ID, inv.State, s.Name)
	}
	if request.Network.Kind == "" {
		request.Network.Kind = dr.NetworkHostOnly
	}
	now := m.Now().UTC()
	inv := dr.Invocation{ID: dr.NewID("inv"), ServerID: s.ID, Server: s.Name, SnapshotID: lkg.Snapshot.ID,
		PreRecovery: lkg.PreRecovery.ID, By: request.By, Reason: request.Reason, State: dr.Invoking, Network: request.Network, Requested: now}
	if err := m.Catalog.RecordInvocation(ctx, inv); err != nil {
		return api.Operation{}, err
	}
	return begin(ctx, m, kindInvoke, s.Name, inv.ID, invocationWork{ID: inv.ID}, engine.StartOptions{})
}

// invocationTask gathers what a silo needs to know of an invocation.
func (m *Master) invocationTask(ctx context.Context, id string) (dr.Invocation, api.InvokeTask, error) {
	inv, err := m.Catalog.Invocation(ctx, id)
	if err != nil {
		return inv, api.InvokeTask{}, err
	}
	s, err := m.Catalog.Server(ctx, inv.ServerID)
	if err != nil {
		return inv, api.InvokeTask{}, err
	}
	rec, err := m.Catalog.Snapshot(ctx, inv.SnapshotID)
	if err != nil {
		return inv, api.InvokeTask{}, err
	}
	pre, err := m.Catalog.PreRecovery(ctx, inv.PreRecovery)
	if err != nil {
		return inv, api.InvokeTask{}, err
	}
	snap, err := m.whole(ctx, rec.Snapshot)
	return inv, api.InvokeTask{ID: id, Server: s, Snapshot: snap, PreRecovery: pre, Network: inv.Network, Moved: inv.Moved}, err
}

// invoke runs an invocation. Until the machine runs, whatever goes wrong is undone. Once it runs it is never taken
// away again: on the day of a disaster a machine with a failing check is better than none.
func (m *Master) invoke(r *engine.Run, in invocationWork) error {
	r.OnUndo("undo boot", func(ctx context.Context) error { return m.undoBoot(ctx, in, r.Term()) })
	_, err := engine.Step(r, "boot", engine.StepOptions{Limit: invokeLimit + bootLimit, Attempts: 3}, func(ctx context.Context) (string, error) {
		return m.journal(ctx, in.ID, "boot", func(inv *dr.Invocation) (string, error) {
			_, task, err := m.invocationTask(ctx, in.ID)
			if err != nil {
				return "", err
			}
			if err := m.startMachine(ctx, r, inv, task); err != nil {
				return "", err
			}
			said := "machine " + inv.Machine + " runs on silo " + inv.Silo + " from " + inv.SnapshotID
			if len(task.PreRecovery.Hardware.NICs) == 0 && inv.Network.Kind != dr.NetworkNone {
				said += "; it has no network card, because nothing is known of the original's: a disk image does not say"
			}
			return said, nil
		})
	})
	if err != nil {
		return m.invocationFailed(r, in, err)
	}
	_, err = engine.Step(r, "check", engine.StepOptions{Limit: checkLimit, Attempts: 2}, func(ctx context.Context) (string, error) {
		return m.journal(ctx, in.ID, "check", func(inv *dr.Invocation) (string, error) { return m.check(ctx, r, inv) })
	})
	return m.handOver(r, in.ID, err)
}

func (m *Master) check(ctx context.Context, r *engine.Run, inv *dr.Invocation) (string, error) {
	silo, task, err := m.machine(ctx, inv.ID)
	if err != nil {
		return "", err
	}
	results, err := silo.CheckInvoked(ctx, task, r.Report)
	if err != nil {
		return "", err
	}
	inv.Results = results
	if inv.Served == nil { // else it was moved since
		served := m.Now().UTC()
		inv.Served = &served
		inv.RTA = served.Sub(inv.Requested)
		inv.RPA = inv.Requested.Sub(task.Snapshot.Taken)
	}
	outcome, _, summary := dr.Judge(results)
	return string(outcome) + ": " + summary, nil
}

// handOver ends the runbook: the machine is the user's, with a ticket if a check failed.
func (m *Master) handOver(r *engine.Run, id string, checkErr error) error {
	_, err := engine.Step(r, "hand over", engine.StepOptions{Limit: recordLimit, Attempts: 3}, func(ctx context.Context) (string, error) {
		inv, err := m.Catalog.Invocation(ctx, id)
		if err != nil {
			return "", err
		}
		inv.State, inv.Failure = dr.Running, ""
		if checkErr != nil {
			inv.Failure = "it runs, but could not be checked: " + checkErr.Error()
		} else if outcome, _, summary := dr.Judge(inv.Results); outcome != dr.Pass {
			inv.Failure = "it runs, but " + summary
		}
		if err := m.Catalog.RecordInvocation(ctx, inv); err != nil {
			return "", err
		}
		if inv.Failure == "" {
			err = m.closeTickets(ctx, inv, shownOtherwise(inv), dr.ProblemInvocation, dr.ProblemInvoked)
		} else {
			_, err = m.Catalog.OpenTicket(ctx, inv.ServerID, dr.ProblemInvoked, "the invoked machine does not pass its checks", inv.Failure, inv.SnapshotID, m.Now())
		}
		return inv.Failure, err
	})
	return err
}

func shownOtherwise(inv dr.Invocation) string { return "invocation " + inv.ID + " has shown otherwise" }

// closeTickets closes what is proven gone.
func (m *Master) closeTickets(ctx context.Context, inv dr.Invocation, why string, problems ...dr.Problem) error {
	open, err := m.Catalog.Tickets(ctx, catalog.TicketFilter{ServerID: inv.ServerID})
	if err != nil {
		return err
	}
	for _, t := range open {
		if slices.Contains(problems, t.Problem) {
			if err := m.Catalog.CloseTicket(ctx, t.ID, why, m.Now()); err != nil && !errors.Is(err, catalog.ErrNotFound) {
				return err
			}
		}
	}
	return nil
}

// journal runs one step of an invocation and writes it into the invocation's record, however it ended.
func (m *Master) journal(ctx context.Context, id, name string, do func(inv *dr.Invocation) (string, error)) (string, error) {
	inv, err := m.Catalog.Invocation(ctx, id)
	if err != nil {
		return "", err
	}
	start := m.Now()
	detail, err := do(&inv)
	record := dr.StepRecord{Name: name, Started: start.UTC(), Duration: m.Now().Sub(start), Detail: detail}
	if err != nil {
		record.Error = err.Error()
	}
	inv.Steps = append(inv.Steps, record)
	if werr := m.Catalog.RecordInvocation(context.WithoutCancel(ctx), inv); werr != nil {
		return detail, errors.Join(err, werr)
	}
	return detail, err
}

// undoBoot takes back a machine that was not handed over.
func (m *Master) undoBoot(ctx context.Context, in invocationWork, run int64) error {
	inv, err := m.Catalog.Invocation(ctx, in.ID)
	if err != nil || inv.State != dr.Invoking {
		return err // a machine that was handed over is never taken away
	}
	if err := m.stopMachine(ctx, inv, run); err != nil {
		return err
	}
	inv.State = dr.Failed
	ended := m.Now().UTC()
	inv.Ended = &ended
	if inv.Failure == "" {
		inv.Failure = "cancelled before it ran"
	}
	return m.Catalog.RecordInvocation(ctx, inv)
}

// invocationFailed records why an invocation did not come to run; what it has started is undone when the run ends.
func (m *Master) invocationFailed(r *engine.Run, in invocationWork, cause error) error {
	_, err := engine.Step(r, "fail", engine.StepOptions{Limit: recordLimit, Attempts: 3}, func(ctx context.Context) (string, error) {
		inv, err := m.Catalog.Invocation(ctx, in.ID)
		if err != nil {
			return "", err
		}
		inv.Failure = cause.Error()
		if err := m.Catalog.RecordInvocation(ctx, inv); err != nil {
			return "", err
		}
		if !errors.Is(cause, engine.ErrCancelled) {
			_, err = m.Catalog.OpenTicket(ctx, inv.ServerID, dr.ProblemInvocation, "an invocation did not come to run", cause.Error(), inv.SnapshotID, m.Now())
		}
		return "", err
	})
	if err != nil {
		m.Log.ErrorContext(r.Context(), "record failed invocation", "operation", r.ID(), "invocation", in.ID, "error", err)
	}
	return cause
}

// Invocation implements api.Operator.
func (m *Master) Invocation(ctx context.Context, id string) (dr.Invocation, error) {
	if strings.HasPrefix(id, "inv-") {
		inv, err := m.Catalog.Invocation(ctx, id)
		if !errors.Is(err, catalog.ErrNotFound) {
			return inv, err
		}
	}
	s, err := m.server(ctx, id)
	if err != nil {
		return dr.Invocation{}, api.Errorf(api.NotFound, "there is no invocation or server %q: see 'muster invocation list --all'", id)
	}
	inv, active, err := m.Catalog.ActiveInvocation(ctx, s.ID)
	if err == nil && !active {
		err = api.Errorf(api.NotFound, "server %s is not invoked: see 'muster invocation list --all'", s.Name)
	}
	return inv, err
}

// Invocations implements api.Operator.
func (m *Master) Invocations(ctx context.Context, all bool) ([]dr.Invocation, error) {
	return m.Catalog.Invocations(ctx, all)
}

// EndInvocation implements api.Operator.
func (m *Master) EndInvocation(ctx context.Context, id string, keep bool) (api.Operation, error) {
	inv, err := m.Invocation(ctx, id)
	if err != nil {
		return api.Operation{}, err
	}
	if !inv.Active() {
		return api.Operation{}, api.Errorf(api.Conflict, "invocation %s has %s already", inv.ID, inv.State)
	}
	if err := m.startedAlready(ctx, inv); err != nil {
		return api.Operation{}, err
	}
	// Each wish to end is an operation of its own: one that failed may be repeated.
	subject := inv.ID + "." + dr.NewID("end")
	return begin(ctx, m, kindEnd, inv.Server, subject, invocationWork{ID: inv.ID, Keep: keep}, engine.StartOptions{Key: "invocation/" + inv.ID, Refuse: true})
}

// startedAlready refuses to end what is still beginning.
func (m *Master) startedAlready(ctx context.Context, inv dr.Invocation) error {
	op, err := m.Operation(ctx, operationID(kindInvoke, inv.Server, inv.ID), 0, 0)
	if err == nil && !op.State.Finished() {
		return api.Errorf(api.Conflict, "invocation %s is still starting: wait for it, or cancel it with 'muster operation cancel %s'", inv.ID, op.ID)
	}
	return nil
}

func (m *Master) end(r *engine.Run, in invocationWork) error {
	_, err := engine.Step(r, "end", engine.StepOptions{Limit: endLimit, Attempts: 5}, func(ctx context.Context) (string, error) {
		inv, err := m.Catalog.Invocation(ctx, in.ID)
		if err != nil {
			return "", err
		}
		if !inv.Active() {
			return inv.KeptAt, nil
		}
		kept, err := m.endMachine(ctx, inv, r.Term(), in.Keep)
		if err != nil {
			return "", err
		}
		ended := m.Now().UTC()
		inv.State, inv.Ended, inv.Kept, inv.KeptAt = dr.Ended, &ended, kept != "", kept
		if err := m.Catalog.RecordInvocation(ctx, inv); err != nil {
			return "", err
		}
		return kept, m.closeTickets(ctx, inv, shownOtherwise(inv), dr.ProblemInvoked, dr.ProblemStopped)
	})
	return err
}

// tend makes active invocations whole again and says so if one has died. One that an operation is working on is that
// operation's business.
func (m *Master) tend(ctx context.Context) {
	leases, err := m.Catalog.Leases(ctx) // before what is running: the operation that one is for was begun before it
	if err != nil {
		m.Log.ErrorContext(ctx, "tend invocations", "error", err)
		return
	}
	running, err := m.running(ctx)
	if err != nil {
		m.Log.ErrorContext(ctx, "tend invocations", "error", err)
		return
	}
	for _, l := range leases {
		if _, busy := running[l.Work.Server]; !busy && l.Work.Kind == dr.WorkMove { // of a move that nobody carried to its end
			m.suspect(l.Silo)
			m.endLease(ctx, l)
		}
	}
	active, err := m.Catalog.Invocations(ctx, false)
	if err != nil {
		m.Log.ErrorContext(ctx, "look for active invocations", "error", err)
		return
	}
	for _, inv := range active {
		if _, busy := running[inv.Server]; busy || inv.State != dr.Running {
			continue
		}
		silo, task, err := m.machine(ctx, inv.ID)
		if err != nil {
			m.Log.ErrorContext(ctx, "tend invocation", "invocation", inv.ID, "server", inv.Server, "snapshot", inv.SnapshotID, "error", err)
			continue
		}
		running, err := silo.Tend(ctx, task)
		if err != nil {
			m.Log.ErrorContext(ctx, "tend invocation", "invocation", inv.ID, "server", inv.Server, "snapshot", inv.SnapshotID, "error", err)
			continue
		}
		if !running && m.warnOnce(inv.ID) {
			detail := "the machine " + inv.Machine + " is gone: it shut down or died. What it wrote is still there: end the invocation with --keep or --discard"
			if _, err := m.Catalog.OpenTicket(ctx, inv.ServerID, dr.ProblemStopped, "an invoked machine has stopped", detail, inv.SnapshotID, m.Now()); err != nil {
				m.Log.ErrorContext(ctx, "open ticket", "server", inv.Server, "snapshot", inv.SnapshotID, "error", err)
			}
		}
	}
}

// warnOnce says whether nobody was warned of an invocation's machine yet, and that somebody is now.
func (m *Master) warnOnce(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	first := !m.warned[id]
	m.warned[id] = true
	return first
}
