package catalogtest

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

// checkBooks checks that what a server's books say of each month is what its snapshots and verdicts say, and the events about them. No
// other server has its customer.
func checkBooks(t failer, c *catalog.Catalog, s dr.Server) {
	t.Helper()
	months, want := booksOf(t, c, s)
	for _, month := range months {
		m, err := dr.NewMeter(fmt.Sprintf("%04d-%02d", month/12, month%12+1), epoch.AddDate(10, 0, 0))
		if err != nil {
			t.Fatalf("%v", err)
		}
		if err := c.Meter(context.Background(), m); err != nil {
			t.Fatalf("%v", err)
		}
		got := dr.Metered{}
		for _, sum := range m.Result() {
			if sum.Customer == s.Customer {
				got = sum
			}
		}
		got.Month, got.Customer, got.Invocations = "", "", dr.Capacity{}
		if w := want(month); got != w {
			t.Fatalf("of month %d the books of %s say\n%+v, its rows\n%+v", month, s.ID, got, w)
		}
	}
}

// booksOf goes through all that happened to a server, and gives the months of which there is something to say, and what.
func booksOf(t failer, c *catalog.Catalog, s dr.Server) (months []dr.Month, of func(dr.Month) dr.Metered) {
	t.Helper()
	ctx := context.Background()
	events, err := c.Events(ctx, 0, 0, s.ID)
	if err != nil || len(events) == catalog.MaxList {
		t.Fatalf("%d events, %v", len(events), err)
	}
	type snap struct {
		dr.Snapshot
		taken, lost dr.Month // lost 0: kept
	}
	var snaps []snap
	var tests []dr.Verdict
	arrived := map[dr.Month]int64{}
	last := dr.Month(0)
	note := func(m dr.Month) dr.Month {
		last = max(last, m)
		months = append(months, m, m+1)
		return m
	}
	for _, e := range events {
		switch e.Kind {
		case "snapshot.kept":
			r, err := c.Snapshot(ctx, e.Subject)
			if err != nil {
				t.Fatalf("%v", err)
			}
			snaps = append(snaps, snap{Snapshot: r.Snapshot, taken: note(dr.MonthOf(r.Snapshot.Taken))})
		case "snapshot.replicated":
			arrived[note(dr.MonthOf(e.At))] += line
		case "snapshot.expired":
			for i := range snaps {
				if snaps[i].ID == e.Subject {
					snaps[i].lost = note(max(last, dr.MonthOf(e.At)))
				}
			}
		case "verdict.recorded":
			v, err := c.Verdict(ctx, e.Subject)
			if err != nil {
				t.Fatalf("%v", err)
			}
			if _, err := c.PreRecovery(ctx, v.PreRecovery); err == nil && len(v.Phases) > 0 {
				note(dr.MonthOf(v.Started))
				tests = append(tests, v)
			}
		}
	}
	return months, func(month dr.Month) (out dr.Metered) {
		out.Replicated = arrived[month]
		var newest [2]dr.Snapshot
		for _, s := range snaps {
			if s.taken == month {
				out.Snapshots++
				out.Added += s.Stats.Stored
				out.Sent += s.Stats.Sent
			}
			if s.taken > month || s.lost != 0 && s.lost <= month {
				continue
			}
			out.Stored += s.Stats.Stored
			kind := 0
			if s.IsData() {
				kind = 1
			}
			if s.Taken.After(newest[kind].Taken) {
				newest[kind] = s.Snapshot
			}
			out.Servers = 1
		}
		out.Protected = newest[0].Size() + newest[1].Size()
		for _, v := range tests {
			if dr.MonthOf(v.Started) == month {
				out.Tests.Machines++
				out.Tests.Seconds += int64(v.Phases[0].Duration / time.Second)
			}
		}
		return out
	}
}

// booked takes the books away, as if an older release had recorded everything.
func booked(w *world) {
	var servers []dr.Server
	for n := 1; n <= 2; n++ {
		s := server(n)
		s.Customer = s.ID
		w.must(w.AddServer(w.ctx, s))
		servers = append(servers, s)
	}
	for n := 1; n <= 30; n++ {
		s := monthly(1, n)
		w.must(w.RecordSnapshot(w.ctx, s))
		w.clock.advance(40 * time.Hour)
		if n > 5 {
			w.must(w.Expire(w.ctx, monthly(1, n-5).ID))
		}
		_, err := w.RecordReplicated(w.ctx, s, line)
		w.must(err)
		if n == 7 {
			w.must(w.RecordPreRecovery(w.ctx, preRecovery(s, 0)))
			w.judge(s, 1, dr.Fail)
			v := verdict(s, 2, dr.Fail)
			v.Phases = []dr.Phase{{Name: dr.PhaseKernel, Duration: time.Minute}}
			_, err := w.RecordVerdict(w.ctx, v)
			w.must(err)
		}
	}
	for _, s := range servers {
		checkBooks(w.t, w.Catalog, s)
	}
	db, err := sql.Open(driver(w.dsn), w.dsn)
	w.must(err)
	defer db.Close()
	kept := dump(w, db)
	for _, statement := range []string{`DELETE FROM books`, `UPDATE servers SET booked = 0`} {
		_, err = db.Exec(statement)
		w.must(err)
	}
	w.must(w.RecordSnapshot(w.ctx, monthly(1, 31))) // before anybody has added them up
	again, err := catalog.Open(w.ctx, w.dsn)
	w.must(err)
	defer again.Close()
	for _, s := range servers {
		checkBooks(w.t, again, s)
	}
	if len(dump(w, db)) < len(kept) || len(kept) < 2 {
		w.t.Errorf("%d months were kept, %d were added up", len(kept), len(dump(w, db)))
	}
}

// line is how many bytes cross the line for every snapshot that arrives.
const line = 77

// dump gives the months that books have.
func dump(w *world, db *sql.DB) (months []int64) {
	rows, err := db.Query(`SELECT month FROM books ORDER BY server_id, month`)
	w.must(err)
	defer rows.Close()
	for rows.Next() {
		var m int64
		w.must(rows.Scan(&m))
		months = append(months, m)
	}
	w.must(rows.Err())
	return months
}

// monthly is the nth snapshot of a server that is captured every 40 hours: every third is of data, and no two are of one size.
func monthly(srv, n int) dr.Snapshot {
	s := snapshot(srv, n)
	s.Taken = epoch.Add(time.Duration(n) * 40 * time.Hour)
	s.Stats = dr.CaptureStats{Stored: int64(1) << n, Sent: int64(n)}
	s.Disks[0].Size += int64(n) << 20
	if n%3 == 0 {
		s.Kind = dr.SnapshotData
	}
	return s
}
