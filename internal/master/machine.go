package master

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
)

// What work needs that is not written anywhere.
const (
	preRecoverMemory = 1024    // MiB of the appliance that looks into an image
	testSpace        = 1 << 30 // bytes that a boot test or a pre-recovery may write
	invokeSpace      = 8 << 30 // bytes that an invoked machine may write in its first days; it gets a silo with less if there is no other
)

// preRecoverWork is a pre-recovery as placement sees it. It goes to where last-known-good is: much of what it reads was read there.
func (m *Master) preRecoverWork(ctx context.Context, id string, s dr.Server) dr.Work {
	w := dr.Work{ID: id, Kind: dr.WorkPreRecovery, Customer: s.Customer, Server: s.Name, Memory: preRecoverMemory, Cores: 1, Space: testSpace}
	if lkg, ok, err := m.Catalog.LKG(ctx, s.ID); err == nil && ok {
		w.Near = lkg.PreRecovery.ID
	}
	return w
}

func testWork(id string, s dr.Server, pre dr.PreRecovery) dr.Work {
	return dr.Work{ID: id, Kind: dr.WorkTest, Customer: s.Customer, Server: s.Name, Memory: pre.Hardware.Memory, Cores: pre.Hardware.CPUs,
		Space: testSpace, Near: pre.ID}
}

func invokeWork(inv dr.Invocation, task api.InvokeTask) dr.Work {
	w := testWork(inv.ID, task.Server, task.PreRecovery)
	w.Kind, w.Space = dr.WorkInvocation, invokeSpace
	if inv.Network.Kind == dr.NetworkBridge {
		w.Network = inv.Network.Bridge
	}
	return w
}

// access gives what a silo needs to open the store of a server's customer.
func (m *Master) access(ctx context.Context, s dr.Server) (*api.Access, error) {
	if m.Access == nil {
		return nil, nil
	}
	return m.Access(ctx, s)
}

// startMachine finds a silo for an invocation and has it start the machine there.
func (m *Master) startMachine(ctx context.Context, r *engine.Run, inv *dr.Invocation, task api.InvokeTask) error {
	// What is booted must stay in the store, whether or not anything reads it just now.
	st, err := m.storeOf(ctx, task.Server)
	if err != nil {
		return err
	}
	if err := st.Hold(ctx, task.Snapshot.ID, inv.ID); err != nil {
		return fmt.Errorf("hold snapshot %s: %w", task.Snapshot.ID, err)
	}
	w := invokeWork(*inv, task)
	w.Since = m.Now()
	for moves := 0; ; moves++ {
		if err := m.freeToMove(ctx, *inv); err != nil {
			return err
		}
		l, err := m.lease(ctx, r, w, invokeLimit)
		if err != nil {
			return err
		}
		inv.Silo = l.Silo
		err = m.under(ctx, r, l, bootLimit, task.Server, func(ctx context.Context, silo api.Silo, _ dr.Lease, g api.Grant) error {
			task.Grant = g
			started, err := silo.Invoke(ctx, task, r.Report)
			if err == nil {
				inv.Machine, inv.Addresses, inv.Network.Bridge = started.Machine, started.Addresses, started.Bridge
			}
			return err
		})
		if err == nil || api.KindOf(err) != api.Unavailable || ctx.Err() != nil || !mayMove(*inv) || moves >= maxMoves {
			return err
		}
		m.Log.WarnContext(ctx, "silo went away", "silo", l.Silo, "work", inv.ID, "error", err)
		m.moveAway(ctx, l)
		w.Avoid = append(w.Avoid, l.Silo)
	}
}

// mayMove says whether an invocation that is still beginning may be begun again on another silo although nobody knows whether the
// first one has started its machine. Nobody was told of that machine and, unless it was to be on a bridge that leads anywhere, nobody
// but its own host could reach it: there are no two truths. When its silo is heard of again it is removed there.
func mayMove(inv dr.Invocation) bool {
	return inv.State == dr.Invoking && inv.Network.Kind != dr.NetworkBridge
}

// freeToMove gives back the lease that an earlier start of the run had from a silo that is lost by now.
func (m *Master) freeToMove(ctx context.Context, inv dr.Invocation) error {
	l, had, err := m.Catalog.LeaseOf(ctx, inv.ID)
	if err == nil && had && mayMove(inv) && m.lost(ctx, l.Silo) {
		m.moveAway(ctx, l)
	}
	return err
}

// suspect has a silo asked to remove what is not its own, when it is heard of again.
func (m *Master) suspect(silo string) {
	m.farm.mu.Lock()
	defer m.farm.mu.Unlock()
	m.farm.suspect[silo] = true
}

func (m *Master) moveAway(ctx context.Context, l dr.Lease) {
	m.suspect(l.Silo)
	m.event(ctx, "invocation.moved", l.Work.Server, l.Work.ID, "silo "+l.Silo+" went away while it started the machine: another one does")
	m.endLease(ctx, l)
}

// machine gives the silo that has an invocation's machine, and what to ask it with.
func (m *Master) machine(ctx context.Context, id string) (api.Silo, api.InvokeTask, error) {
	_, task, err := m.invocationTask(ctx, id)
	if err != nil {
		return nil, task, err
	}
	l, had, err := m.Catalog.LeaseOf(ctx, id)
	if err != nil {
		return nil, task, err
	}
	switch {
	case had:
	case m.Home != "": // begun by a release that knew only this one
		l.Silo, l.Work.Kind = m.Home, dr.WorkInvocation
	default:
		return nil, task, api.Errorf(api.NotFound, "no silo has the machine of %s", id)
	}
	return m.reach(ctx, l, task)
}

// reach gives the silo of a lease, and a task with what it is asked with under that.
func (m *Master) reach(ctx context.Context, l dr.Lease, task api.InvokeTask) (api.Silo, api.InvokeTask, error) {
	access, err := m.access(ctx, task.Server)
	if err != nil {
		return nil, task, err
	}
	task.Grant = m.grantOf(l, access)
	silo, err := m.Silos.Silo(l.Silo)
	return silo, task, err
}

// endMachine stops an invocation's machine, under a new term so that nothing that was asked before can start it again.
func (m *Master) endMachine(ctx context.Context, inv dr.Invocation, run int64, keep bool) (kept string, err error) {
	before, had, err := m.Catalog.LeaseOf(ctx, inv.ID)
	if err != nil {
		return "", err
	}
	if had || m.Home != "" {
		l := before
		if had {
			if l, err = m.regrant(ctx, inv, before, run); err != nil {
				return "", err
			}
		}
		silo, task, err := m.machine(ctx, inv.ID)
		if err != nil {
			return "", err
		}
		if kept, err = silo.EndInvocation(ctx, task, keep); err != nil {
			return "", err
		}
		if had {
			m.endLease(ctx, l)
		}
	}
	st, err := m.storeOfID(ctx, inv.ServerID)
	if err != nil {
		return kept, err
	}
	if err := dropMoved(ctx, st, inv); err != nil {
		return kept, err
	}
	return kept, st.Unhold(ctx, inv.SnapshotID, inv.ID)
}

// regrant gives the silo of an invoked machine a new term, so that nothing that was asked under the old one can be done any more.
func (m *Master) regrant(ctx context.Context, inv dr.Invocation, l dr.Lease, run int64) (dr.Lease, error) {
	if m.lost(ctx, l.Silo) {
		return l, engine.Permanent(api.Errorf(api.Unavailable, "silo %s is lost, and with it the machine of %s: bring it back, or make sure that it cannot run and say so with 'muster invocation end %s --abandon --reason …'", l.Silo, inv.Server, inv.Server))
	}
	return m.Catalog.Grant(ctx, l.Work, l.Silo, max(run, l.Run), time.Time{})
}

// stopMachine takes back what an invocation that did not come to run has started. On a silo that is lost nothing can be; unless
// its machine was to be on a network that leads anywhere, that is no reason to wait: it is stopped when the silo is back.
func (m *Master) stopMachine(ctx context.Context, inv dr.Invocation, run int64) error {
	l, had, err := m.Catalog.LeaseOf(ctx, inv.ID)
	if err != nil {
		return err
	}
	if had && m.lost(ctx, l.Silo) && inv.Network.Kind != dr.NetworkBridge {
		return nil
	}
	_, err = m.endMachine(ctx, inv, run, false)
	return err
}

func (m *Master) lost(ctx context.Context, silo string) bool {
	all, err := m.Catalog.Silos(ctx)
	if err != nil {
		return false
	}
	for _, s := range all {
		if s.Name == silo {
			return s.State == dr.SiloLost
		}
	}
	return false
}

// AbandonInvocation implements api.Operator.
func (m *Master) AbandonInvocation(ctx context.Context, id string, request api.AbandonRequest) (dr.Invocation, error) {
	inv, err := m.Invocation(ctx, id)
	if err != nil {
		return inv, err
	}
	switch l, had, err := m.Catalog.LeaseOf(ctx, inv.ID); {
	case err != nil:
		return inv, err
	case request.By == "" || request.Reason == "":
		return inv, api.Errorf(api.Invalid, "say who gives the machine up, and how it was made sure that it cannot run")
	case len(request.By)+len(request.Reason) > dr.MaxReason:
		return inv, api.Errorf(api.Invalid, "the reason is longer than %d bytes", dr.MaxReason)
	case !inv.Active():
		return inv, api.Errorf(api.Conflict, "invocation %s has %s already", inv.ID, inv.State)
	case !had || !m.lost(ctx, l.Silo):
		return inv, api.Errorf(api.Refused, "silo %s is not lost: end the invocation with --keep or --discard", l.Silo)
	}
	if err := m.startedAlready(ctx, inv); err != nil {
		return inv, err
	}
	ended := m.Now().UTC()
	inv.State, inv.Ended = dr.Ended, &ended
	inv.Failure = fmt.Sprintf("its silo %s was lost; %s gave its machine up: %s", inv.Silo, request.By, request.Reason)
	if err := m.Catalog.RecordInvocation(ctx, inv); err != nil {
		return inv, err
	}
	return inv, m.closeTickets(ctx, inv, "the machine was given up", dr.ProblemSiloLost, dr.ProblemInvoked, dr.ProblemStopped)
}

// adoptInvocations gives the machines that run a lease where a release that knew only one silo gave none, and lets go of
// snapshots that ended ones held.
func (m *Master) adoptInvocations(ctx context.Context) error {
	active, err := m.Catalog.Invocations(ctx, false)
	if err != nil {
		return err
	}
	runs := map[string]bool{}
	for _, inv := range active {
		runs[inv.ID] = true
		_, had, err := m.Catalog.LeaseOf(ctx, inv.ID)
		if err != nil {
			return err
		}
		if had || inv.State != dr.Running || m.Home == "" {
			continue
		}
		_, task, err := m.invocationTask(ctx, inv.ID)
		if err == nil {
			w := invokeWork(inv, task)
			w.Network = "" // it is plugged in already
			_, err = m.Catalog.Grant(ctx, w, m.Home, 0, time.Time{})
		}
		if err != nil {
			m.Log.ErrorContext(ctx, "take over invocation", "invocation", inv.ID, "error", err)
		}
	}
	leases, err := m.Catalog.Leases(ctx)
	if err != nil {
		return err
	}
	for _, l := range leases {
		runs[l.Work.ID] = true // given up, and not yet stopped: it may still be read
	}
	err = m.eachStore(ctx, func(st oneStore) error {
		holds, err := st.Holds(ctx)
		errs := []error{err}
		for snapshot, owners := range holds {
			for _, owner := range owners {
				if !runs[owner] {
					errs = append(errs, st.Unhold(ctx, snapshot, owner))
				}
			}
		}
		return errors.Join(errs...)
	})
	if err != nil { // a customer's store that is away must not keep the others from being recovered; it keeps more than it has to
		m.Log.ErrorContext(ctx, "let go of snapshots that nobody holds any more", "error", err)
	}
	return nil
}
