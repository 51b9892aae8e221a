package catalogtest

import (
	"fmt"
	"reflect"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

func passPromotes(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	w.lkg("")
	a, b := w.kept(1), w.kept(2)
	first := w.judge(a, 1, dr.Pass)
	if !first.Moved || first.Previous != "" || first.Ticket != nil {
		w.t.Errorf("first pass: %+v", first)
	}
	w.state(a.ID, dr.Verified)
	w.lkg(a.ID)
	second := w.judge(b, 1, dr.Pass)
	if !second.Moved || second.Previous != a.ID {
		w.t.Errorf("second pass: %+v", second)
	}
	if again := w.judge(a, 1, dr.Pass); !reflect.DeepEqual(again, first) { // recorded again, late
		w.t.Errorf("the first pass again: %+v, was %+v", again, first)
	}
	w.lkg(b.ID)
	if repeated := w.judge(b, 2, dr.Pass); repeated.Moved {
		w.t.Errorf("a second pass of the same snapshot: %+v", repeated)
	}
	promotions, err := w.Promotions(w.ctx, "srv-1")
	if err != nil || len(promotions) != 2 || promotions[0].SnapshotID != b.ID || promotions[0].Previous != a.ID ||
		promotions[1].VerdictID != "verdict-snap-1-1-1" || !promotions[1].At.Equal(epoch) {
		w.t.Errorf("promotions %+v, %v", promotions, err)
	}
}

func passOlder(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	old, newer := w.kept(1), w.kept(2)
	w.judge(newer, 1, dr.Pass)
	if j := w.judge(old, 1, dr.Pass); j.Moved {
		w.t.Error("last-known-good moved back")
	}
	w.state(old.ID, dr.Verified)
	w.lkg(newer.ID)
}

func failKeeps(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	w.judge(w.kept(1), 1, dr.Pass)
	var ids []string
	for n := 2; n <= 4; n++ {
		s := w.kept(n)
		w.clock.advance(time.Hour)
		j := w.judge(s, 1, dr.Fail)
		if j.Moved || j.Ticket == nil || j.Ticket.Problem != "test-failed/kernel-panic" || j.Ticket.Count != n-1 || j.Ticket.Snapshot != s.ID {
			w.t.Fatalf("fail %d: %+v", n, j)
		}
		w.state(s.ID, dr.Rejected)
		ids = append(ids, j.Ticket.ID)
	}
	if ids[0] != ids[1] || ids[1] != ids[2] {
		w.t.Errorf("three nights, tickets %v", ids)
	}
	ticket := w.open("test-failed/kernel-panic")[0]
	if ticket.Server != "shop1" || ticket.Detail != "so it went" || !ticket.LastSeen.After(ticket.Opened) {
		w.t.Errorf("ticket %+v", ticket)
	}
	w.lkg("snap-1-1")
	again, err := w.RecordVerdict(w.ctx, verdict(snapshot(1, 4), 1, dr.Fail))
	if err != nil || again.Ticket == nil || again.Ticket.Count != 3 {
		w.t.Errorf("recorded again: %+v, %v", again, err)
	}
}

func passCloses(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	old, bad, good := w.kept(1), w.kept(2), w.kept(3)
	w.judge(bad, 1, dr.Fail)
	for _, p := range []dr.Problem{dr.ProblemStore, dr.ProblemTestMissing} {
		_, err := w.OpenTicket(w.ctx, "srv-1", p, "t", "d", "", epoch)
		w.must(err)
	}
	w.judge(old, 1, dr.Pass) // says nothing about the newer one that failed
	w.open(dr.ProblemStore, "test-failed/kernel-panic")
	w.judge(good, 1, dr.Pass)
	w.open(dr.ProblemStore)
	all, err := w.Tickets(w.ctx, catalog.TicketFilter{ServerID: "srv-1", Closed: true})
	if err != nil || len(all) != 3 || all[2].Closed == nil || all[2].Reason == "" {
		w.t.Errorf("all tickets %+v, %v", all, err)
	}
	w.judge(w.kept(4), 1, dr.Fail) // the problem is back: a new ticket
	if back := w.open("test-failed/kernel-panic", dr.ProblemStore)[0]; back.ID == all[2].ID || back.Count != 1 {
		w.t.Errorf("back again: %+v", back)
	}
}

func missedObjective(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	late := false
	for n := 1; n <= 2; n++ {
		v := verdict(w.kept(n), 1, dr.Pass)
		v.RTOMet = &late
		j, err := w.RecordVerdict(w.ctx, v)
		if err != nil || !j.Moved || j.Ticket == nil || j.Ticket.Problem != "rto-missed" || j.Ticket.Count != n {
			w.t.Errorf("pass %d that took too long: %+v, %v", n, j, err)
		}
	}
	w.open("rto-missed")
	w.judge(w.kept(3), 1, dr.Pass)
	w.open()
}

func inconclusive(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	a, b := w.kept(1), w.kept(2)
	if j := w.judge(a, 1, dr.Inconclusive); j.Ticket != nil {
		w.t.Errorf("the first raised %+v", j.Ticket)
	}
	w.state(a.ID, dr.PreRecovered)
	w.judge(a, 2, dr.Pass)
	w.judge(b, 1, dr.Inconclusive) // not in a row with the first
	w.open()
	if j := w.judge(b, 2, dr.Inconclusive); j.Ticket == nil || j.Ticket.Problem != "test-inconclusive" {
		w.t.Errorf("the second in a row: %+v", j)
	}
	w.lkg(a.ID)
}

func retests(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	a := w.kept(1)
	due := func(after time.Duration, want string) {
		w.t.Helper()
		list, err := w.Retests(w.ctx, w.clock.now().Add(after))
		w.must(err)
		got := ""
		for _, s := range list {
			got += s.Newest.Snapshot.ID
		}
		if got != want {
			w.t.Errorf("to be tested again in %s: %q, not %q", after, got, want)
		}
	}
	w.judge(a, 1, dr.Inconclusive)
	due(9*time.Minute, "")
	due(time.Hour, a.ID)
	standing, err := w.Standing(w.ctx, "srv-1")
	if w.must(err); standing.Retest.IsZero() {
		w.t.Error("nobody is told that it is tested again")
	}
	w.must(w.Retested(w.ctx, standing))
	due(time.Hour, "")
	w.judge(a, 2, dr.Inconclusive)
	due(19*time.Minute, "")
	due(time.Hour, a.ID)
	b := w.kept(2) // which has a test of its own
	due(time.Hour, "")
	w.judge(b, 1, dr.Inconclusive)
	w.judge(a, 3, dr.Pass) // says nothing of the newest
	due(time.Hour, b.ID)
	w.judge(a, 4, dr.Inconclusive)
	due(time.Hour, b.ID)
	w.judge(b, 2, dr.Fail)
	due(100*time.Hour, "")
	w.judge(b, 3, dr.Inconclusive)
	w.must(w.RemoveServer(w.ctx, "srv-1"))
	due(time.Hour, "")
}

func verdictRefused(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	raw := snapshot(1, 1)
	w.must(w.RecordSnapshot(w.ctx, raw))
	_, err := w.RecordVerdict(w.ctx, verdict(raw, 1, dr.Pass))
	w.refused("a pass of a snapshot nobody prepared", err)
	_, err = w.RecordVerdict(w.ctx, verdict(snapshot(1, 9), 1, dr.Pass))
	w.is(err, catalog.ErrNotFound)
	a, b := w.kept(2), w.kept(3)
	foreign := verdict(a, 1, dr.Pass)
	foreign.PreRecovery = preRecovery(b, 0).ID
	_, err = w.RecordVerdict(w.ctx, foreign)
	w.refused("a pass with another snapshot's rescue image", err)
	w.judge(a, 1, dr.Pass)
	other := verdict(b, 1, dr.Pass)
	other.ID = verdict(a, 1, dr.Pass).ID
	_, err = w.RecordVerdict(w.ctx, other)
	w.is(err, catalog.ErrExists)
	w.state(raw.ID, dr.Kept)
	if verdicts, err := w.Verdicts(w.ctx, "srv-1", 0); err != nil || len(verdicts) != 1 {
		w.t.Errorf("verdicts %+v, %v", verdicts, err)
	}
	if j, err := w.RecordVerdict(w.ctx, verdict(raw, 2, dr.Fail)); err != nil || j.Ticket == nil { // it could not be prepared
		w.t.Errorf("%+v, %v", j, err)
	}
}

func lkgAsTested(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	s := w.kept(1)
	w.judge(s, 1, dr.Pass)
	w.must(w.RecordPreRecovery(w.ctx, preRecovery(s, 1))) // prepared anew, by a newer release
	v := verdict(s, 2, dr.Fail)
	v.PreRecovery = preRecovery(s, 1).ID
	_, err := w.RecordVerdict(w.ctx, v)
	w.must(err)
	if now := w.state(s.ID, dr.Rejected); now.PreRecovery.ID != preRecovery(s, 1).ID || now.Verdict.ID != v.ID || !now.LKG {
		w.t.Errorf("as it is now: %+v", now)
	}
	r, ok, err := w.LKG(w.ctx, "srv-1")
	if err != nil || !ok || r.PreRecovery == nil || r.PreRecovery.ID != preRecovery(s, 0).ID || r.Verdict.Outcome != dr.Pass ||
		len(r.PreRecovery.Edits) != 1 || r.Snapshot.Inventory.Hostname != "shop" {
		w.t.Errorf("last-known-good: %+v, %v", r, err)
	}
	if _, _, err := w.LKG(w.ctx, "srv-9"); err == nil {
		w.t.Error("last-known-good of no server")
	}
}

func ticketOnce(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	a, err := w.OpenTicket(w.ctx, "srv-1", dr.ProblemCapture, "t", "first", "", epoch)
	w.must(err)
	b, err := w.OpenTicket(w.ctx, "srv-1", dr.ProblemCapture, "t", "second", "", epoch.Add(time.Hour))
	w.must(err)
	if a.ID != b.ID || b.Count != 2 || b.Detail != "second" || !b.Opened.Equal(epoch) || !b.LastSeen.Equal(epoch.Add(time.Hour)) {
		w.t.Errorf("seen again: %+v", b)
	}
	host, err := w.OpenTicket(w.ctx, "", dr.ProblemHost, "t", "d", "", epoch)
	w.must(err)
	w.open(dr.ProblemHost, dr.ProblemCapture)
	w.must(w.CloseTicket(w.ctx, a.ID, "mended", epoch))
	w.must(w.CloseTicket(w.ctx, a.ID, "twice", epoch))
	w.is(w.CloseTicket(w.ctx, "ticket-x", "", epoch), catalog.ErrNotFound)
	w.open(dr.ProblemHost)
	_, err = w.OpenTicket(w.ctx, "srv-9", dr.ProblemCapture, "t", "d", "", epoch)
	w.is(err, catalog.ErrNotFound)
	all, err := w.Tickets(w.ctx, catalog.TicketFilter{Closed: true})
	if err != nil || len(all) != 2 || all[0].ID != host.ID || all[1].Reason != "mended" {
		w.t.Errorf("all tickets %+v, %v", all, err)
	}
}

func invocationStates(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	s := w.kept(1)
	inv := dr.Invocation{ID: "inv-1", ServerID: "srv-1", Server: "shop1", SnapshotID: s.ID, By: "ada", State: dr.Invoking}
	w.refused("an invocation of what has not passed", w.RecordInvocation(w.ctx, inv))
	w.judge(s, 1, dr.Pass)
	inv.State = dr.Running
	w.refused("an invocation that begins as running", w.RecordInvocation(w.ctx, inv))
	inv.State = dr.Invoking
	w.must(w.RecordInvocation(w.ctx, inv))
	w.must(w.RecordInvocation(w.ctx, inv))
	second := inv
	second.ID = "inv-2"
	w.is(w.RecordInvocation(w.ctx, second), catalog.ErrInUse)
	inv.Steps = append(inv.Steps, dr.StepRecord{Name: "boot"})
	w.must(w.RecordInvocation(w.ctx, inv))
	inv.State = dr.Running
	w.must(w.RecordInvocation(w.ctx, inv))
	if got, ok, err := w.ActiveInvocation(w.ctx, "srv-1"); err != nil || !ok || got.State != dr.Running || len(got.Steps) != 1 {
		w.t.Errorf("active %+v, %v", got, err)
	}
	inv.State = dr.Invoking
	w.refused("running to invoking", w.RecordInvocation(w.ctx, inv))
	inv.State = dr.Ended
	w.must(w.RecordInvocation(w.ctx, inv))
	inv.State = dr.Running
	w.refused("ended to running", w.RecordInvocation(w.ctx, inv))
	if _, ok, err := w.ActiveInvocation(w.ctx, "srv-1"); err != nil || ok {
		w.t.Errorf("active when ended: %v", err)
	}
	w.must(w.RecordInvocation(w.ctx, second))
	for all, want := range map[bool]int{false: 1, true: 2} {
		if got, err := w.Invocations(w.ctx, all); err != nil || len(got) != want || got[0].ID != "inv-2" {
			w.t.Errorf("invocations, all %v: %+v, %v", all, got, err)
		}
	}
	if got, err := w.Invocation(w.ctx, "inv-1"); err != nil || got.State != dr.Ended || got.By != "ada" {
		w.t.Errorf("%+v, %v", got, err)
	}
}

func events(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	w.must(w.AddServer(w.ctx, server(2)))
	s := w.kept(1)
	w.judge(s, 1, dr.Pass)
	w.judge(w.kept(2), 1, dr.Fail)
	w.must(w.Expire(w.ctx, "snap-1-2"))
	w.must(w.AddEvent(w.ctx, dr.Event{Kind: "master.started", Message: "here we are", At: epoch.Add(time.Hour)}))
	w.must(w.AddEvent(w.ctx, dr.Event{Kind: "server.contacted", Server: "srv-2"}))
	_ = w.Expire(w.ctx, s.ID) // refused: no event
	all, err := w.Events(w.ctx, 0, 0, "")
	w.must(err)
	var kinds []string
	for i, e := range all {
		if e.Seq != int64(i+1) || e.At.IsZero() {
			w.t.Errorf("event %d: %+v", i+1, e)
		}
		kinds = append(kinds, e.Kind)
	}
	want := "[server.added server.added snapshot.kept snapshot.pre-recovered verdict.recorded snapshot.verified lkg.moved " +
		"snapshot.kept snapshot.pre-recovered verdict.recorded snapshot.rejected ticket.opened snapshot.expired master.started server.contacted]"
	if fmt.Sprint(kinds) != want {
		w.t.Errorf("events %v\nwant   %s", kinds, want)
	}
	page, err := w.Events(w.ctx, 3, 2, "")
	if err != nil || len(page) != 2 || page[0].Seq != 4 {
		w.t.Errorf("a page %+v, %v", page, err)
	}
	for _, by := range []string{"srv-2", "shop2"} {
		if of, err := w.Events(w.ctx, 0, 0, by); err != nil || len(of) != 2 || of[1].Server != "shop2" {
			w.t.Errorf("of one server by %s: %+v, %v", by, of, err)
		}
	}
	if of, err := w.Events(w.ctx, 0, 0, "nobody"); err != nil || len(of) != 0 {
		w.t.Errorf("of nobody: %+v, %v", of, err)
	}
}

func clockBack(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	w.judge(w.kept(1), 1, dr.Pass)
	w.clock.advance(-365 * 24 * time.Hour)
	w.judge(w.kept(2), 1, dr.Fail)
	w.judge(w.kept(3), 1, dr.Pass)
	w.lkg("snap-1-3")
	w.open()
	verdicts, err := w.Verdicts(w.ctx, "srv-1", 1)
	if err != nil || verdicts[0].SnapshotID != "snap-1-3" {
		w.t.Errorf("the newest verdict: %+v, %v", verdicts, err)
	}
	promotions, err := w.Promotions(w.ctx, "srv-1")
	if err != nil || len(promotions) != 2 || promotions[0].SnapshotID != "snap-1-3" {
		w.t.Errorf("promotions %+v, %v", promotions, err)
	}
	all, err := w.Events(w.ctx, 0, 0, "")
	if err != nil || all[len(all)-1].At.After(all[0].At) || all[len(all)-1].Seq != int64(len(all)) {
		w.t.Errorf("the last event %+v, %v", all[len(all)-1], err)
	}
}

func concurrent(w *world) {
	const n = 8
	w.must(w.AddServer(w.ctx, server(1)))
	var wg sync.WaitGroup
	errs := make(chan error, 3*n)
	for i := 1; i <= n; i++ {
		wg.Go(func() {
			s := snapshot(1, i)
			errs <- w.RecordSnapshot(w.ctx, s)
			errs <- w.RecordPreRecovery(w.ctx, preRecovery(s, 0))
			_, err := w.RecordVerdict(w.ctx, verdict(s, 1, dr.Pass))
			errs <- err
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		w.must(err)
	}
	w.lkg(fmt.Sprintf("snap-1-%d", n))
	promotions, err := w.Promotions(w.ctx, "srv-1")
	w.must(err)
	all, err := w.Events(w.ctx, 0, 0, "")
	if want := 1 + 4*n + len(promotions); err != nil || len(all) != want || all[want-1].Seq != int64(want) {
		w.t.Errorf("%d events, want %d, %v", len(all), want, err)
	}
}

func adopt(w *world) {
	a, b, c := snapshot(1, 1), snapshot(1, 2), snapshot(1, 3)
	servers := []dr.Server{server(1), server(2)}
	snaps := []dr.Snapshot{c, a, b, snapshot(2, 1)}
	pres := []dr.PreRecovery{preRecovery(b, 0), preRecovery(a, 0), preRecovery(c, 0)}
	verdicts := []dr.Verdict{verdict(c, 1, dr.Fail), verdict(b, 1, dr.Pass), verdict(a, 1, dr.Pass)}
	lkg := map[string]string{"srv-1": b.ID}
	done, err := w.Adopt(w.ctx, servers, snaps, pres, verdicts, nil, lkg)
	want := catalog.Adopted{Servers: 2, Snapshots: 4, PreRecoveries: 3, Verdicts: 3, LKG: 1}
	if err != nil || !reflect.DeepEqual(done, want) {
		w.t.Errorf("adopted %+v, %v", done, err)
	}
	w.state(a.ID, dr.Verified)
	w.state(c.ID, dr.Rejected)
	w.state("snap-2-1", dr.Kept)
	w.lkg(b.ID)
	w.open() // what was judged long ago raises nothing now
	if last, ok, err := w.LastSnapshot(w.ctx, "srv-1", ""); err != nil || !ok || last.Snapshot.ID != c.ID {
		w.t.Errorf("last %+v, %v", last, err)
	}
	done, err = w.Adopt(w.ctx, servers, snaps, pres, verdicts, nil, lkg)
	if err != nil || !reflect.DeepEqual(done, catalog.Adopted{}) {
		w.t.Errorf("adopted again %+v, %v", done, err)
	}
	w.judge(w.kept(4), 1, dr.Pass) // and life goes on
	w.lkg("snap-1-4")
}

func adoptLeaves(w *world) {
	a, b := snapshot(1, 1), snapshot(1, 2)
	twin := server(2)
	twin.Name = "shop1"
	done, err := w.Adopt(w.ctx, []dr.Server{server(1), twin}, []dr.Snapshot{a, b, snapshot(7, 1)}, []dr.PreRecovery{preRecovery(a, 0)},
		[]dr.Verdict{verdict(a, 1, dr.Pass), verdict(b, 1, dr.Pass)}, nil, map[string]string{"srv-1": b.ID})
	if err != nil || done.Servers != 1 || done.Snapshots != 2 || done.Verdicts != 1 || len(done.Left) != 4 {
		w.t.Errorf("adopted %+v, %v", done, err)
	}
	w.state(b.ID, dr.Kept) // its pass names a rescue image nobody has
	w.lkg(a.ID)
	all, err := w.Events(w.ctx, 0, 0, "")
	if err != nil || all[len(all)-1].Seq != int64(len(all)) {
		w.t.Errorf("events have gaps: %+v, %v", all, err)
	}
}
