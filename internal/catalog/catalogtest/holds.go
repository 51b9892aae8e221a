package catalogtest

import (
	"reflect"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

// suspicious is the nth snapshot of server 1, with a sign of what happened since the one before it.
func suspicious(n int) dr.Snapshot {
	s := snapshot(1, n)
	s.Signs = &dr.Signs{Last: &dr.Change{Against: snapshot(1, n-1).ID, Found: []dr.Sign{{Kind: dr.SignBlocks, Text: "61 % of the changed blocks became random"}}}}
	return s
}

// since is the nth snapshot of server 1, compared with an earlier one as well: the damage is there still, or undone.
func since(n, trusted int, undone bool) dr.Snapshot {
	s := snapshot(1, n)
	s.Signs = &dr.Signs{Last: &dr.Change{Against: snapshot(1, n-1).ID}, Trusted: &dr.Change{Against: snapshot(1, trusted).ID, Blocks: &dr.BlockChange{}}}
	if !undone {
		s.Signs.Trusted.Found = suspicious(n).Signs.Last.Found
	}
	return s
}

func (w *world) keep(s dr.Snapshot) dr.Snapshot {
	w.t.Helper()
	w.must(w.RecordSnapshot(w.ctx, s))
	w.must(w.RecordPreRecovery(w.ctx, preRecovery(s, 0)))
	return s
}

func (w *world) held(id, by string) {
	w.t.Helper()
	r, err := w.Snapshot(w.ctx, id)
	w.must(err)
	if r.HeldBy != by {
		w.t.Errorf("%s is held by %q, want %q", id, r.HeldBy, by)
	}
}

func ruling(s dr.Snapshot, accept bool) dr.Ruling {
	return dr.Ruling{SnapshotID: s.ID, Accept: accept, By: "ann", Reason: "I looked", At: epoch.Add(9 * time.Hour)}
}

// attacked is a server with a good first snapshot and a suspicious second one, both of which passed.
func (w *world) attacked() (good, bad dr.Snapshot) {
	w.t.Helper()
	w.must(w.AddServer(w.ctx, server(1)))
	good = w.kept(1)
	w.judge(good, 1, dr.Pass)
	bad = w.keep(suspicious(2))
	if j := w.judge(bad, 1, dr.Pass); j.Moved || j.Ticket == nil || j.Ticket.Problem != dr.ProblemTampering {
		w.t.Errorf("a suspicious pass led to %+v", j)
	}
	return good, bad
}

func heldWaits(w *world) {
	good, bad := w.attacked()
	w.state(bad.ID, dr.Verified)
	w.held(bad.ID, bad.ID)
	w.lkg(good.ID)
	tickets := w.open(dr.ProblemTampering)
	if len(tickets) == 1 && (tickets[0].Snapshot != bad.ID || !strings.Contains(tickets[0].Detail, "61 %") || tickets[0].Count != 1) {
		w.t.Errorf("ticket %+v", tickets[0])
	}
	if j := w.judge(bad, 2, dr.Pass); j.Moved {
		w.t.Error("tested again it was promoted")
	}
	w.must(w.CloseTicket(w.ctx, tickets[0].ID, "go away", w.clock.now()))
	w.judge(bad, 3, dr.Pass)
	w.lkg(good.ID)
	w.open(dr.ProblemTampering) // closing a ticket decides nothing
}

func heldInherited(w *world) {
	good, bad := w.attacked()
	for n := 3; n <= 5; n++ {
		s := w.keep(since(n, 1, false))
		if j := w.judge(s, 1, dr.Pass); j.Moved {
			w.t.Errorf("%s was promoted", s.ID)
		}
		w.held(s.ID, bad.ID)
	}
	w.lkg(good.ID)
	if tickets := w.open(dr.ProblemTampering); len(tickets) == 1 && (tickets[0].Count != 4 || tickets[0].Snapshot != bad.ID) {
		w.t.Errorf("ticket %+v, want one seen four times", tickets[0])
	}
}

func acceptPromotes(w *world) {
	_, bad := w.attacked()
	later := w.keep(since(3, 1, false))
	w.judge(later, 1, dr.Pass)
	failed := w.keep(since(4, 1, false))
	w.judge(failed, 1, dr.Fail)
	w.must(w.Rule(w.ctx, ruling(bad, true)))
	w.held(bad.ID, "")
	w.held(later.ID, "")
	w.lkg(later.ID)
	w.state(failed.ID, dr.Rejected)
	w.open("test-failed/kernel-panic")
	promotions, err := w.Promotions(w.ctx, "srv-1")
	if err != nil || len(promotions) != 3 || promotions[1].SnapshotID != bad.ID {
		w.t.Errorf("promotions %+v, %v", promotions, err)
	}
	events, err := w.Events(w.ctx, 0, 0, "")
	w.must(err)
	w.must(w.Rule(w.ctx, ruling(bad, true))) // again
	if again, err := w.Events(w.ctx, 0, 0, ""); err != nil || len(again) != len(events) {
		w.t.Errorf("the same ruling again wrote %d events, %v", len(again)-len(events), err)
	}
	if r := w.state(bad.ID, dr.Verified); r.Ruling == nil || !reflect.DeepEqual(*r.Ruling, ruling(bad, true)) {
		w.t.Errorf("ruling %+v", r.Ruling)
	}
	w.judge(w.kept(5), 1, dr.Pass) // nothing repeats
	w.lkg("snap-1-5")
	w.open()
}

func refuseRejects(w *world) {
	good, bad := w.attacked()
	w.must(w.Rule(w.ctx, ruling(bad, false)))
	w.state(bad.ID, dr.Rejected)
	w.lkg(good.ID)
	if j := w.judge(bad, 2, dr.Pass); j.Moved {
		w.t.Error("a refused snapshot was promoted")
	}
	w.state(bad.ID, dr.Rejected)
	later := w.keep(since(3, 1, false))
	w.judge(later, 1, dr.Pass)
	w.held(later.ID, bad.ID)
	w.lkg(good.ID)
	w.open(dr.ProblemTampering) // the server is as it was
	changed := ruling(bad, true)
	w.must(w.Rule(w.ctx, changed)) // somebody thought better of it
	w.state(bad.ID, dr.Verified)
	w.lkg(later.ID)
	w.open()
}

func heldUndone(w *world) {
	_, bad := w.attacked()
	fine := w.keep(since(3, 1, true))
	w.held(fine.ID, "")
	w.open()
	w.judge(fine, 1, dr.Pass)
	w.lkg(fine.ID)
	w.held(bad.ID, bad.ID)
}

func ruleRefused(w *world) {
	good, bad := w.attacked()
	w.is(w.Rule(w.ctx, ruling(good, true)), catalog.ErrNotHeld)
	w.is(w.Rule(w.ctx, ruling(snapshot(1, 9), true)), catalog.ErrNotFound)
	w.must(w.Rule(w.ctx, ruling(bad, true)))
	w.is(w.Rule(w.ctx, ruling(bad, false)), catalog.ErrInUse) // it is last-known-good now
	w.lkg(bad.ID)
}

func adoptHolds(w *world) {
	good, bad, later := snapshot(1, 1), suspicious(2), since(3, 1, false)
	snaps := []dr.Snapshot{good, bad, later}
	pres := []dr.PreRecovery{preRecovery(good, 0), preRecovery(bad, 0), preRecovery(later, 0)}
	passes := []dr.Verdict{verdict(good, 1, dr.Pass), verdict(bad, 1, dr.Pass), verdict(later, 1, dr.Pass)}
	_, err := w.Adopt(w.ctx, []dr.Server{server(1)}, snaps, pres, passes, nil, map[string]string{"srv-1": good.ID})
	w.must(err)
	w.lkg(good.ID)
	w.held(later.ID, bad.ID)
	w.open(dr.ProblemTampering)

	twice := func() []dr.Snapshot { // the same of another server
		var out []dr.Snapshot
		for _, s := range snaps {
			s.ID, s.ServerID, s.Server = strings.Replace(s.ID, "snap-1", "snap-2", 1), "srv-2", "shop2"
			if s.Signs != nil && s.Signs.Trusted != nil {
				trusted := *s.Signs.Trusted
				trusted.Against = "snap-2-1"
				s.Signs = &dr.Signs{Last: s.Signs.Last, Trusted: &trusted}
			}
			out = append(out, s)
		}
		return out
	}()
	pres, passes = nil, nil
	for _, s := range twice {
		pres, passes = append(pres, preRecovery(s, 0)), append(passes, verdict(s, 1, dr.Pass))
	}
	done, err := w.Adopt(w.ctx, []dr.Server{server(2)}, twice, pres, passes, []dr.Ruling{ruling(twice[1], true), ruling(snapshot(7, 7), true)}, nil)
	w.must(err)
	if r, ok, err := w.LKG(w.ctx, "srv-2"); err != nil || !ok || r.Snapshot.ID != twice[2].ID || done.Rulings != 1 {
		w.t.Errorf("accepted and adopted: last-known-good is %s, %+v, %v", r.Snapshot.ID, done, err)
	}
	again, err := w.Adopt(w.ctx, []dr.Server{server(2)}, twice, pres, passes, []dr.Ruling{ruling(twice[1], true)}, nil)
	if err != nil || !reflect.DeepEqual(again, catalog.Adopted{}) {
		w.t.Errorf("adopted again %+v, %v", again, err)
	}
}
