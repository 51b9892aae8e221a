package master

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/store"
)

// carryLimit is how long a machine's live layers may take to be kept, and to be fetched.
const carryLimit = 6 * time.Hour

// moveWork is the input of move.
type moveWork struct {
	ID   string `json:"id"`           // of the invocation
	Move string `json:"move"`         // of the room that it has on the other silo, too
	From string `json:"from"`         // silo
	To   string `json:"to,omitempty"` // silo; "": the one that placement chooses
	By   string `json:"by"`
	Why  string `json:"why,omitempty"`
}

// MoveInvocation implements api.Operator.
func (m *Master) MoveInvocation(ctx context.Context, id string, request api.MoveRequest) (api.Operation, error) {
	inv, err := m.Invocation(ctx, id)
	if err != nil {
		return api.Operation{}, err
	}
	l, had, err := m.Catalog.LeaseOf(ctx, inv.ID)
	switch {
	case err != nil:
		return api.Operation{}, err
	case request.By == "":
		return api.Operation{}, api.Errorf(api.Invalid, "say who moves the machine")
	case len(request.By)+len(request.Reason) > dr.MaxReason:
		return api.Operation{}, api.Errorf(api.Invalid, "the reason is longer than %d bytes", dr.MaxReason)
	case inv.State != dr.Running || !had:
		return api.Operation{}, api.Errorf(api.Conflict, "invocation %s is %s: only one that runs can be moved", inv.ID, inv.State)
	case request.To == l.Silo:
		return api.Operation{}, api.Errorf(api.Conflict, "%s runs on silo %s already", inv.Server, l.Silo)
	case m.lost(ctx, l.Silo):
		return api.Operation{}, api.Errorf(api.Refused, "silo %s is lost, and with it what the machine wrote: bring it back; or give the machine up with 'muster invocation end %s --abandon --reason …' and invoke again", l.Silo, inv.Server)
	}
	if err := m.canGo(ctx, request.To, l.Silo); err != nil {
		return api.Operation{}, err
	}
	in := moveWork{ID: inv.ID, Move: dr.NewID("move"), From: l.Silo, To: request.To, By: request.By, Why: request.Reason}
	return begin(ctx, m, kindMove, inv.Server, inv.ID+"."+in.Move, in, engine.StartOptions{Key: "invocation/" + inv.ID, Refuse: true})
}

// canGo refuses what would only be waited for in vain.
func (m *Master) canGo(ctx context.Context, to, from string) error {
	silos, err := m.Catalog.Silos(ctx)
	if err != nil {
		return err
	}
	if to == "" {
		if !slices.ContainsFunc(silos, func(s dr.Silo) bool { return s.State == dr.SiloActive && s.Name != from }) {
			return api.Errorf(api.Refused, "there is no other silo that takes work: see 'muster silo list'")
		}
		return nil
	}
	n := slices.IndexFunc(silos, func(s dr.Silo) bool { return s.Name == to })
	switch {
	case n < 0:
		return noSilo(to)
	case silos[n].State != dr.SiloActive:
		return api.Errorf(api.Refused, "silo %s is %s: it takes no work", to, silos[n].State)
	}
	return nil
}

// move brings an invoked machine to another silo. Room is made there first; then the machine is shut down, what it wrote goes into its
// customer's store, both silos change their leases in one transaction, and it boots. Until it runs there, whatever goes wrong ends in its
// running where it was: its live layers stay there until then.
func (m *Master) move(r *engine.Run, in moveWork) error {
	r.OnUndo("put back", func(ctx context.Context) error { return m.putBack(ctx, in) })
	to, err := engine.Step(r, "reserve", engine.StepOptions{Limit: invokeLimit + holdLimit, Attempts: 3}, func(ctx context.Context) (string, error) {
		return m.reserve(ctx, r, in)
	})
	if err != nil {
		return err
	}
	_, err = engine.Step(r, "leave", engine.StepOptions{Limit: carryLimit, Attempts: 3}, func(ctx context.Context) (string, error) {
		return m.journal(ctx, in.ID, "leave", func(inv *dr.Invocation) (string, error) { return m.leave(ctx, r, in, *inv) })
	})
	if err != nil {
		return err
	}
	_, err = engine.Step(r, "change over", engine.StepOptions{Limit: recordLimit, Attempts: 3}, func(ctx context.Context) (string, error) {
		return to, m.changeOver(ctx, in, to)
	})
	if err != nil {
		return err
	}
	_, err = engine.Step(r, "boot", engine.StepOptions{Limit: carryLimit + bootLimit, Attempts: 3}, func(ctx context.Context) (string, error) {
		return m.journal(ctx, in.ID, "boot", func(inv *dr.Invocation) (string, error) {
			if err := m.startWhereItIs(ctx, r.Report, inv); err != nil {
				return "", err
			}
			return fmt.Sprintf("machine %s runs on silo %s; it stood still for %s", inv.Machine, inv.Silo, stoodStill(*inv, m.Now()).Round(time.Second)), nil
		})
	})
	if err != nil {
		return err
	}
	_, err = engine.Step(r, "check", engine.StepOptions{Limit: checkLimit, Attempts: 2}, func(ctx context.Context) (string, error) {
		return m.journal(ctx, in.ID, "check", func(inv *dr.Invocation) (string, error) { return m.check(ctx, r, inv) })
	})
	if err := m.handOver(r, in.ID, err); err != nil {
		return err
	}
	_, err = engine.Step(r, "clear", engine.StepOptions{Limit: endLimit, Attempts: 3}, func(ctx context.Context) (string, error) {
		inv, err := m.Catalog.Invocation(ctx, in.ID)
		if err != nil {
			return "", err
		}
		if err := m.clearMove(ctx, in, inv); err != nil {
			return "", err
		}
		m.event(ctx, "invocation.moved", inv.Server, inv.ID, strings.TrimSuffix(fmt.Sprintf("%s moved the machine of %s from silo %s to silo %s: %s", in.By, inv.Server, in.From, to, in.Why), ": "))
		return to, nil
	})
	return err
}

// stoodStill is how long a machine that boots now was away.
func stoodStill(inv dr.Invocation, now time.Time) time.Duration {
	for _, s := range slices.Backward(inv.Steps) {
		if s.Name == "leave" && s.Error == "" {
			return now.Sub(s.Started)
		}
	}
	return 0
}

// reserve finds a silo with room for the machine, and has it fetch what can be fetched while the machine runs.
func (m *Master) reserve(ctx context.Context, r *engine.Run, in moveWork) (string, error) {
	inv, task, err := m.invocationTask(ctx, in.ID)
	if err != nil {
		return "", err
	}
	l, had, err := m.Catalog.LeaseOf(ctx, in.ID)
	if err != nil {
		return "", err
	}
	if !had || l.Silo != in.From || inv.State != dr.Running {
		return "", engine.Permanent(api.Errorf(api.Conflict, "the machine of %s does not run on silo %s any more", inv.Server, in.From))
	}
	w := invokeWork(inv, task)
	w.ID, w.Kind, w.Only, w.Not, w.Since = in.Move, dr.WorkMove, in.To, in.From, m.Now()
	room, err := m.lease(ctx, r, w, invokeLimit)
	if err != nil {
		return "", err
	}
	s, task, err := m.reach(ctx, room, task)
	if err != nil {
		return "", err
	}
	// Nothing that is left there of an earlier stay is what is brought now.
	if _, err := s.EndInvocation(ctx, task, false); err != nil {
		return "", err
	}
	_, err = s.HoldDeltas(ctx, api.DeltasTask{Grant: task.Grant, Snapshot: task.Snapshot, PreRecovery: task.PreRecovery})
	return room.Silo, err
}

// leave has the machine stopped and what it wrote kept.
func (m *Master) leave(ctx context.Context, r *engine.Run, in moveWork, inv dr.Invocation) (string, error) {
	before, err := m.leaseOf(ctx, inv)
	if err == nil {
		_, err = m.regrant(ctx, inv, before, r.Term())
	}
	if err != nil {
		return "", err
	}
	s, task, err := m.machine(ctx, in.ID)
	if err != nil {
		return "", err
	}
	task.Moved = in.Move
	left, err := s.Leave(ctx, task, r.Report)
	if err != nil {
		return "", err
	}
	how := "shut down"
	if !left.Clean {
		how = "did not shut down in time, and its plug was pulled"
	}
	return fmt.Sprintf("the machine on silo %s %s; %d MiB that it wrote are in the store", in.From, how, left.Size>>20), nil
}

// changeOver lets the silos change their leases: from here on the other one has the machine.
func (m *Master) changeOver(ctx context.Context, in moveWork, to string) error {
	inv, err := m.Catalog.Invocation(ctx, in.ID)
	if err != nil {
		return err
	}
	inv.Moved = in.Move
	if err := m.Catalog.RecordInvocation(ctx, inv); err != nil {
		return err
	}
	l, room, err := m.leasesOf(ctx, in)
	if err != nil || l.Silo == to {
		return err
	}
	return m.Catalog.SwapLeases(ctx, l, room)
}

func (m *Master) leasesOf(ctx context.Context, in moveWork) (l, room dr.Lease, err error) {
	l, had, err := m.Catalog.LeaseOf(ctx, in.ID)
	if err != nil {
		return l, room, err
	}
	room, reserved, err := m.Catalog.LeaseOf(ctx, in.Move)
	if err == nil && (!had || !reserved) {
		err = engine.Permanent(api.Errorf(api.Conflict, "move %s is over", in.Move))
	}
	return l, room, err
}

func (m *Master) leaseOf(ctx context.Context, inv dr.Invocation) (dr.Lease, error) {
	l, had, err := m.Catalog.LeaseOf(ctx, inv.ID)
	if err == nil && !had {
		err = api.Errorf(api.Conflict, "no silo has the machine of %s any more", inv.Server)
	}
	return l, err
}

// startWhereItIs has the silo that has a machine's lease start it, if it does not run.
func (m *Master) startWhereItIs(ctx context.Context, report dr.Progress, inv *dr.Invocation) error {
	l, err := m.leaseOf(ctx, *inv)
	if err != nil {
		return err
	}
	s, task, err := m.machine(ctx, inv.ID)
	if err != nil {
		return err
	}
	started, err := s.Invoke(ctx, task, report)
	if err != nil {
		return err
	}
	inv.Silo, inv.Machine, inv.Addresses, inv.Network.Bridge = l.Silo, started.Machine, started.Addresses, started.Bridge
	m.mu.Lock()
	delete(m.warned, inv.ID)
	m.mu.Unlock()
	return m.closeTickets(ctx, *inv, "it runs again", dr.ProblemStopped)
}

// putBack ends a move that did not come to its end: the machine runs where it was or, if it had been started there, where it was to go.
func (m *Master) putBack(ctx context.Context, in moveWork) error {
	inv, err := m.Catalog.Invocation(ctx, in.ID)
	if err != nil || !inv.Active() {
		return err
	}
	l, room, err := m.leasesOf(ctx, in)
	if api.KindOf(err) == api.Conflict {
		return nil // nothing was begun
	}
	if err != nil {
		return err
	}
	if l.Silo != inv.Silo { // nobody knows whether it was started there
		if err := m.stopThere(ctx, inv, l); err != nil {
			return err
		}
		if err := m.Catalog.SwapLeases(ctx, l, room); err != nil {
			return err
		}
	}
	_, err = m.journal(ctx, in.ID, "put back", func(inv *dr.Invocation) (string, error) {
		if err := m.startWhereItIs(ctx, nil, inv); err != nil {
			return "", err
		}
		return "machine " + inv.Machine + " runs on silo " + inv.Silo, nil
	})
	if err != nil {
		return err
	}
	return m.clearMove(ctx, in, inv)
}

// stopThere makes sure that a machine which may have been started on a silo does not run. Of one that nobody can reach but its own
// host that may wait until the silo is back: nobody was told of it.
func (m *Master) stopThere(ctx context.Context, inv dr.Invocation, l dr.Lease) error {
	s, task, err := m.machine(ctx, inv.ID)
	if err == nil {
		_, err = s.EndInvocation(ctx, task, false)
	}
	if api.KindOf(err) != api.Unavailable {
		return err
	}
	if inv.Network.Kind == dr.NetworkBridge {
		return fmt.Errorf("the machine of %s may run on silo %s, which does not answer: bring that back: %w", inv.Server, l.Silo, err)
	}
	m.suspect(l.Silo)
	return nil
}

// clearMove gives back the room on the other silo and removes what is left there and in the store. One that does not answer does so when it
// is back.
func (m *Master) clearMove(ctx context.Context, in moveWork, inv dr.Invocation) error {
	room, reserved, err := m.Catalog.LeaseOf(ctx, in.Move)
	if err != nil {
		return err
	}
	if reserved {
		_, task, err := m.invocationTask(ctx, inv.ID)
		if err != nil {
			return err
		}
		task.Grant = m.grantOf(room, nil)
		s, err := m.Silos.Silo(room.Silo)
		if err == nil {
			_, err = s.EndInvocation(ctx, task, false)
		}
		if err != nil {
			if api.KindOf(err) != api.Unavailable {
				return err
			}
			m.suspect(room.Silo)
		}
		m.endLease(ctx, room)
	}
	st, err := m.storeOfID(ctx, inv.ServerID)
	if err != nil {
		return err
	}
	return dropMoved(ctx, st, inv)
}

// dropMoved removes from a store what a machine wrote and a move had brought there.
func dropMoved(ctx context.Context, st *store.Store, inv dr.Invocation) error {
	kept, err := st.Kept(ctx, inv.SnapshotID)
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range kept {
		if strings.HasPrefix(f.Name, api.KeptPrefix(inv.ID)) {
			errs = append(errs, st.Drop(ctx, inv.SnapshotID, f.Name))
		}
	}
	return errors.Join(errs...)
}
