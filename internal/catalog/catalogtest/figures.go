package catalogtest

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

func figures(w *world) {
	n := 200
	if os.Getenv("MUSTER_REAL") != "" {
		n = 2_000
	}
	for k := 1; k <= n; k++ {
		w.must(w.AddServer(w.ctx, server(k)))
	}
	w.must(w.RemoveServer(w.ctx, "srv-2"))
	good := w.kept(1)
	w.judge(good, 1, dr.Pass)
	bad := w.kept(5)
	w.judge(bad, 1, dr.Fail)
	gone := w.kept(9)
	w.judge(gone, 1, dr.Fail)
	w.must(w.Expire(w.ctx, gone.ID))
	start := time.Now()
	list, err := w.Figures(w.ctx)
	w.must(err)
	w.t.Logf("%d servers in %s", len(list), time.Since(start))
	if took := time.Since(start); took > 5*time.Second {
		w.t.Errorf("it took %s", took)
	}
	if len(list) != n-1 {
		w.t.Fatalf("%d servers, want %d", len(list), n-1)
	}
	for _, s := range list {
		switch {
		case s.Server.ID != "srv-1":
			if !s.LKG.IsZero() || !s.Newest.IsZero() || s.Outcome != "" {
				w.t.Fatalf("of %s, of which nothing was kept: %+v", s.Server.Name, s)
			}
		case !s.LKG.Equal(good.Taken) || !s.Newest.Equal(bad.Taken) || s.Outcome != dr.Fail:
			w.t.Errorf("of %s: %+v", s.Server.Name, s)
		}
	}
}

func tallied(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	w.judge(w.kept(1), 1, dr.Pass) // before anybody counted
	from, err := w.LastEvent(w.ctx)
	w.must(err)
	tally := catalog.Tally{Seq: from}
	for range 2 { // the second time adds nothing
		tally, err = w.Tally(w.ctx, tally)
		w.must(err)
		if len(tally.Verdicts) != 0 || tally.Promotions != 0 || tally.Snapshots[dr.SnapshotImage].N != 0 {
			w.t.Errorf("before anything happened: %+v", tally)
		}
	}
	costly := snapshot(1, 2)
	costly.Stats = dr.CaptureStats{Read: 10, Changed: 8, Sent: 6, New: 4, Stored: 2}
	w.must(w.RecordSnapshot(w.ctx, costly))
	w.must(w.RecordPreRecovery(w.ctx, preRecovery(costly, 0)))
	w.judge(costly, 1, dr.Pass)
	_, err = w.RecordReplicated(w.ctx, snapshot(1, 1), 50) // told again, and verified long since
	w.must(err)
	before := tally
	tally, err = w.Tally(w.ctx, tally)
	w.must(err)
	bad := w.kept(3)
	w.judge(bad, 1, dr.Fail)
	w.must(w.Expire(w.ctx, bad.ID))
	came := snapshot(1, 4)
	came.Stats.Changed = 8
	_, err = w.RecordReplicated(w.ctx, came, 3)
	w.must(err)
	tally, err = w.Tally(w.ctx, tally)
	w.must(err)
	want := catalog.SnapshotTally{N: 3, Read: 10, Changed: 16, Sent: 6, New: 4, Stored: 2}
	if tally.Snapshots[dr.SnapshotImage] != want || tally.Verdicts[dr.Pass] != 1 || tally.Verdicts[dr.Fail] != 1 || tally.Promotions != 1 || tally.Expired != 1 {
		w.t.Errorf("tally %+v", tally)
	}
	if got := tally.Arrivals[dr.SnapshotImage]; got != (catalog.ArrivalTally{N: 1, Changed: 8, Sent: 3}) {
		w.t.Errorf("arrived: %+v", got)
	}
	if len(before.Verdicts) != 0 {
		w.t.Errorf("an earlier tally was changed: %+v", before)
	}
	if last, _ := w.LastEvent(w.ctx); tally.Seq != last {
		w.t.Errorf("counted up to %d of %d", tally.Seq, last)
	}
}

func problems(w *world) {
	for n := 1; n <= 2; n++ {
		w.must(w.AddServer(w.ctx, server(n)))
		for _, p := range []dr.Problem{"test-failed/kernel-panic", "test-failed/timeout", dr.ProblemCapture} {
			_, err := w.OpenTicket(w.ctx, fmt.Sprintf("srv-%d", n), p, "t", "", "", epoch)
			w.must(err)
		}
	}
	w.must(w.RemoveServer(w.ctx, "srv-2")) // which closes its tickets
	got, err := w.OpenProblems(w.ctx)
	if err != nil || len(got) != 2 || got["test-failed"] != 2 || got["capture-failed"] != 1 {
		w.t.Errorf("open: %v, %v", got, err)
	}
}

func checked(w *world) {
	before, err := w.LastEvent(w.ctx)
	w.must(err)
	w.must(w.Check(w.ctx))
	if after, err := w.LastEvent(w.ctx); err != nil || after != before {
		w.t.Errorf("a check wrote an event: %d, %d, %v", before, after, err)
	}
	w.must(w.Close())
	w.refused("writing to a catalog that is closed", w.Check(w.ctx))
}

func told(w *world) {
	var heard []dr.Event
	w.Told = func(_ context.Context, e dr.Event) { heard = append(heard, e) }
	w.must(w.AddServer(w.ctx, server(1)))
	w.judge(w.kept(1), 1, dr.Pass)
	w.refused("a verdict on nothing", func() error {
		_, err := w.RecordVerdict(w.ctx, verdict(snapshot(1, 99), 1, dr.Pass))
		return err
	}())
	written, err := w.Events(w.ctx, 0, 0, "")
	w.must(err)
	if fmt.Sprint(heard) != fmt.Sprint(written) || len(heard) < 5 {
		w.t.Errorf("told   %v\nwritten %v", heard, written)
	}
}

// metered: the sums are dr's, this is whether they are told of everything, and of what there was at the end.
func metered(w *world) {
	s := server(1)
	s.Customer = "acme"
	w.must(w.AddServer(w.ctx, s))
	prepared := func(n int) dr.Snapshot {
		snap := snapshot(1, n)
		snap.Stats.Stored = 100
		w.must(w.RecordSnapshot(w.ctx, snap))
		p := preRecovery(snap, 0)
		p.Hardware.Memory, p.Hardware.CPUs = 1024, 2
		w.must(w.RecordPreRecovery(w.ctx, p))
		return snap
	}
	first, second := prepared(1), prepared(2)
	for range 2 { // told twice, it came once
		_, err := w.RecordReplicated(w.ctx, snapshot(1, 3), 77)
		w.must(err)
	}
	for _, snap := range []dr.Snapshot{first, second} {
		v := verdict(snap, 1, dr.Pass)
		v.Phases = []dr.Phase{{Name: dr.PhaseKernel, Duration: time.Minute}}
		_, err := w.RecordVerdict(w.ctx, v)
		w.must(err)
	}
	inv := dr.Invocation{ID: "inv-1", ServerID: "srv-1", Server: "shop1", SnapshotID: second.ID, PreRecovery: preRecovery(second, 0).ID, State: dr.Invoking, Requested: epoch.Add(3 * time.Hour)}
	w.must(w.RecordInvocation(w.ctx, inv))
	ended := epoch.Add(5 * time.Hour)
	inv.State, inv.Ended = dr.Failed, &ended
	w.must(w.RecordInvocation(w.ctx, inv))
	w.clock.advance(40 * 24 * time.Hour)
	w.must(w.Expire(w.ctx, first.ID)) // it was kept at the end of the month
	w.clock.advance(time.Second)
	m, err := dr.NewMeter("2026-03", w.clock.now())
	w.must(err)
	w.must(w.Meter(w.ctx, m))
	want := dr.Metered{Month: "2026-03", Customer: "acme", Servers: 1, Protected: second.Size(), Stored: 200, Added: 200, Replicated: 77, Snapshots: 3,
		Tests:       dr.Capacity{Machines: 2, Seconds: 120, Memory: 120 * 1024, CPUs: 240},
		Invocations: dr.Capacity{Machines: 1, Seconds: 7200, Memory: 7200 * 1024, CPUs: 14400}}
	if got := m.Result(); len(got) != 1 || got[0] != want {
		w.t.Errorf("metered %+v\nwant    %+v", got, want)
	}
	next, err := dr.NewMeter("2026-04", w.clock.now())
	w.must(err)
	w.must(w.Meter(w.ctx, next))
	if got := next.Result(); len(got) != 1 || got[0].Stored != 100 || got[0].Added != 0 || got[0].Replicated != 0 || got[0].Tests.Machines != 0 {
		w.t.Errorf("the month after: %+v", got)
	}
}
