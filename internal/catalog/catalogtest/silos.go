package catalogtest

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

func host(name string, gib int) dr.Silo {
	return dr.Silo{Name: name, Hypervisor: dr.HypervisorKVM, Memory: gib << 10, Cores: 8, Space: 1 << 40}
}

func piece(kind dr.WorkKind, id string, gib int) dr.Work {
	return dr.Work{ID: id, Kind: kind, Server: "shop1", Memory: gib << 10, Cores: 1, Since: epoch}
}

// beat has a silo heard of.
func (w *world) beat(s dr.Silo) (now dr.Silo, back bool) {
	w.t.Helper()
	now, back, err := w.Beat(w.ctx, s, w.clock.now().Add(dr.LeaseTime))
	w.must(err)
	return now, back
}

func (w *world) grant(work dr.Work, silo string, run int64) dr.Lease {
	w.t.Helper()
	l, err := w.Grant(w.ctx, work, silo, run, w.clock.now().Add(dr.LeaseTime))
	w.must(err)
	return l
}

// kinds lists the kinds of the events that there are.
func (w *world) kinds() (out []string) {
	w.t.Helper()
	all, err := w.Events(w.ctx, 0, 0, "")
	w.must(err)
	for _, e := range all {
		out = append(out, e.Kind)
	}
	return out
}

func siloLife(w *world) {
	if _, back := w.beat(host("a", 8)); !back {
		w.t.Error("a silo that joins is not new")
	}
	now, back := w.beat(host("a", 16))
	if back || now.Beats != 2 || now.State != dr.SiloActive {
		w.t.Errorf("the second time: %+v, %v", now, back)
	}
	w.must(w.Drain(w.ctx, "a", true, "new disks"))
	if now, _ = w.beat(host("a", 16)); now.State != dr.SiloDraining {
		w.t.Errorf("a silo that drains says it is %s", now.State)
	}
	w.must(w.Drain(w.ctx, "a", false, ""))
	if _, _, err := w.LoseSilo(w.ctx, "a", 1); err != nil { // it was heard of since
		w.t.Error(err)
	}
	all, err := w.Silos(w.ctx)
	if err != nil || len(all) != 1 || all[0].State != dr.SiloActive || all[0].Memory != 16<<10 || all[0].Beats != 3 {
		w.t.Fatalf("%+v, %v", all, err)
	}
	_, _, err = w.LoseSilo(w.ctx, "a", 3)
	w.must(err)
	w.is(w.Drain(w.ctx, "a", true, ""), catalog.ErrInUse)
	if now, back = w.beat(host("a", 16)); !back || now.State != dr.SiloActive {
		w.t.Errorf("back: %+v, %v", now, back)
	}
	w.must(w.RemoveSilo(w.ctx, "a"))
	w.is(w.RemoveSilo(w.ctx, "a"), catalog.ErrNotFound)
	_, _, err = w.Beat(w.ctx, dr.Silo{Name: "../etc"}, epoch)
	w.refused("a hostile name", err)
	want := []string{"silo.joined", "silo.draining", "silo.resumed", "silo.lost", "silo.back", "silo.removed"}
	if got := w.kinds(); !slices.Equal(got, want) {
		w.t.Errorf("events %v, want %v", got, want)
	}
}

func leaseGranted(w *world) {
	w.beat(host("a", 8))
	w.beat(host("b", 8))
	first := w.grant(piece(dr.WorkTest, "verdict-1", 6), "a", 7)
	second := w.grant(piece(dr.WorkTest, "verdict-2", 6), "b", 7)
	if second.Term <= first.Term {
		w.t.Errorf("terms %d, %d", first.Term, second.Term)
	}
	_, err := w.Grant(w.ctx, piece(dr.WorkTest, "verdict-3", 6), "a", 7, epoch)
	w.is(err, catalog.ErrInUse) // no memory
	_, err = w.Grant(w.ctx, piece(dr.WorkTest, "verdict-1", 1), "b", 7, epoch)
	w.is(err, catalog.ErrStale) // it is a's
	again := w.grant(piece(dr.WorkTest, "verdict-1", 6), "a", 8)
	if again.Term <= second.Term {
		w.t.Errorf("the term of a lease given again is %d", again.Term)
	}
	_, err = w.Grant(w.ctx, piece(dr.WorkTest, "verdict-1", 6), "a", 7, epoch)
	w.is(err, catalog.ErrStale) // a run that has been started again since
	w.must(w.Drain(w.ctx, "a", true, ""))
	w.grant(piece(dr.WorkTest, "verdict-1", 6), "a", 9) // it finishes what it has
	_, err = w.Grant(w.ctx, piece(dr.WorkTest, "verdict-4", 1), "a", 7, epoch)
	w.is(err, catalog.ErrInUse)
	w.must(w.EndLease(w.ctx, "verdict-1", first.Term)) // not its term
	w.is(w.RemoveSilo(w.ctx, "a"), catalog.ErrInUse)
	l, ok, err := w.LeaseOf(w.ctx, "verdict-1")
	if err != nil || !ok || l.Silo != "a" || l.Run != 9 || l.Work.Memory != 6<<10 {
		w.t.Errorf("lease %+v, %v, %v", l, ok, err)
	}
	w.must(w.EndLease(w.ctx, "verdict-1", l.Term))
	w.must(w.RemoveSilo(w.ctx, "a"))
	_, err = w.Grant(w.ctx, piece(dr.WorkTest, "verdict-4", 1), "a", 7, epoch)
	w.is(err, catalog.ErrNotFound)
}

func leaseFences(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	s := w.kept(1)
	w.beat(host("a", 8))
	w.beat(host("b", 8))
	v := verdict(s, 1, dr.Pass)
	old := w.grant(piece(dr.WorkTest, v.ID, 1), "a", 1)
	_, _, err := w.LoseSilo(w.ctx, "a", 1)
	w.must(err)
	_, err = w.Under(old).RecordVerdict(w.ctx, v) // it wakes before it was given away
	w.is(err, catalog.ErrStale)
	now := w.grant(piece(dr.WorkTest, v.ID, 1), "b", 1)
	_, err = w.Under(old).RecordVerdict(w.ctx, v)
	w.is(err, catalog.ErrStale)
	w.lkg("")
	if j, err := w.Under(now).RecordVerdict(w.ctx, v); err != nil || !j.Moved {
		w.t.Errorf("the one who has it: %+v, %v", j, err)
	}
	w.lkg(s.ID)
}

func siloLost(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	w.beat(host("a", 64))
	for _, work := range []dr.Work{piece(dr.WorkTest, "verdict-1", 1), piece(dr.WorkPreRecovery, "pre-1", 1), piece(dr.WorkInvocation, "inv-1", 1)} {
		w.grant(work, "a", 1)
	}
	var takers sync.WaitGroup
	var mu sync.Mutex
	var taken, left []string
	for range 4 { // as many masters
		takers.Go(func() {
			t, l, err := w.LoseSilo(w.ctx, "a", 1)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				w.t.Error(err)
			}
			for _, lease := range t {
				taken = append(taken, lease.Work.ID)
			}
			for _, lease := range l {
				left = append(left, lease.Work.ID)
			}
		})
	}
	takers.Wait()
	if !slices.Equal(taken, []string{"pre-1", "verdict-1"}) || !slices.Equal(left, []string{"inv-1"}) {
		w.t.Errorf("taken %v, left %v: each once", taken, left)
	}
	_, err := w.Grant(w.ctx, piece(dr.WorkInvocation, "inv-1", 1), "b", 2, epoch)
	w.refused("a running machine's lease for another silo", err)
	if told, err := w.Events(w.ctx, 0, 0, "shop1"); err != nil || len(told) != 3 { // it was added, and two pieces were taken
		w.t.Errorf("events of the server: %+v, %v", told, err)
	}
}

func leasesSwapped(w *world) {
	w.beat(host("a", 8))
	w.beat(host("b", 8))
	machine, room := w.grant(piece(dr.WorkInvocation, "inv-1", 6), "a", 1), w.grant(piece(dr.WorkMove, "move-1", 6), "b", 1)
	where := func(machine, room string) (now []dr.Lease) {
		now, err := w.Leases(w.ctx)
		w.must(err)
		if len(now) != 2 || now[0].Silo != machine || now[1].Silo != room || !now[0].Expires.IsZero() || !now[1].Expires.IsZero() {
			w.t.Errorf("leases %+v", now)
		}
		return now
	}
	w.must(w.Drain(w.ctx, "a", true, "")) // it keeps the room though it takes nothing new
	w.must(w.SwapLeases(w.ctx, machine, room))
	now := where("b", "a")
	if now[0].Term <= room.Term || now[1].Term <= room.Term {
		w.t.Errorf("terms %d and %d after %d", now[0].Term, now[1].Term, room.Term)
	}
	w.is(w.SwapLeases(w.ctx, machine, now[1]), catalog.ErrStale)
	w.is(w.SwapLeases(w.ctx, now[0], room), catalog.ErrStale)
	where("b", "a")
	w.clock.advance(time.Hour) // neither runs out, heard of or not
	_, left, err := w.LoseSilo(w.ctx, "a", 1)
	if err != nil || len(left) != 1 {
		w.t.Errorf("left %+v, %v", left, err)
	}
	w.must(w.SwapLeases(w.ctx, now[0], now[1]))
	where("a", "b")
}

func leaseRenewed(w *world) {
	w.beat(host("a", 8))
	w.grant(piece(dr.WorkTest, "verdict-1", 1), "a", 1)
	w.grant(piece(dr.WorkInvocation, "inv-1", 1), "a", 1)
	w.clock.advance(time.Minute)
	w.beat(host("a", 8))
	all, err := w.Leases(w.ctx)
	w.must(err)
	if len(all) != 2 || !all[0].Expires.IsZero() || !all[1].Expires.Equal(w.clock.now().Add(dr.LeaseTime)) {
		w.t.Errorf("leases %+v", all)
	}
}

func grantsAtOnce(w *world) {
	w.beat(host("a", 8))
	var grants sync.WaitGroup
	for i := range 12 {
		grants.Go(func() { _, _ = w.Grant(w.ctx, piece(dr.WorkTest, fmt.Sprintf("verdict-%d", i), 3), "a", 1, epoch) })
	}
	grants.Wait()
	if all, err := w.Leases(w.ctx); err != nil || len(all) != 2 {
		w.t.Errorf("8 GiB gave %d leases of 3 GiB: %v", len(all), err)
	}
}

func deltasHeld(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	s, older := w.kept(2), w.kept(1)
	pre := preRecovery(s, 0).ID
	w.judge(s, 1, dr.Pass)
	w.beat(host("a", 8))
	w.beat(host("b", 8))
	thin := func(want int) {
		w.t.Helper()
		list, err := w.Thin(w.ctx)
		w.must(err)
		if len(list) != want || want == 1 && (list[0].PreRecovery != pre || list[0].SnapshotID != s.ID) {
			w.t.Errorf("held by too few: %+v, want %d", list, want)
		}
	}
	w.must(w.RecordDeltas(w.ctx, pre, s.ID, "a", "d1"))
	w.must(w.RecordDeltas(w.ctx, preRecovery(older, 0).ID, older.ID, "b", "d2"))
	thin(1)
	w.must(w.RecordDeltas(w.ctx, pre, s.ID, "b", "d1"))
	thin(0)
	where, err := w.Where(w.ctx, pre, "pre-x")
	if err != nil || len(where) != 1 || where[pre]["a"] != "d1" || where[pre]["b"] != "d1" {
		w.t.Errorf("where %v, %v", where, err)
	}
	_, _, err = w.LoseSilo(w.ctx, "b", 1)
	w.must(err)
	thin(1)
	w.beat(host("b", 8))
	thin(0)
	w.must(w.ForgetDeltas(w.ctx, pre, "b"))
	thin(1)
	w.must(w.Expire(w.ctx, older.ID))
	if where, err = w.Where(w.ctx, preRecovery(older, 0).ID); err != nil || len(where) != 0 {
		w.t.Errorf("deltas of an expired snapshot: %v, %v", where, err)
	}
}

func toldAgain(w *world) {
	joined := dr.Event{Kind: "node.joined", Subject: "box", At: epoch, Message: "appliance box joined"}
	later := joined
	later.At = epoch.Add(time.Nanosecond)
	other := joined
	other.Subject = "silo"
	for _, e := range []dr.Event{joined, other, joined, later, later} {
		w.must(w.AddEventOnce(w.ctx, e))
	}
	events, err := w.Events(w.ctx, 0, 0, "")
	w.must(err)
	if len(events) != 3 || events[0].Subject != "box" || events[1].Subject != "silo" || !events[2].At.Equal(later.At) {
		w.t.Errorf("written down are %+v", events)
	}
}
