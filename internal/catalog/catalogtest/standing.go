package catalogtest

import (
	"database/sql"
	"fmt"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

func standings(w *world) {
	for n := range 5 {
		w.must(w.AddServer(w.ctx, server(n)))
	}
	w.must(w.RemoveServer(w.ctx, "srv-3"))
	a := w.kept(1)
	w.judge(a, 1, dr.Pass)
	b := w.kept(2)
	_, err := w.OpenTicket(w.ctx, "srv-2", dr.ProblemStore, "t", "d", "", epoch)
	w.must(err)
	w.must(w.RecordInvocation(w.ctx, dr.Invocation{ID: "inv-1", ServerID: "srv-1", SnapshotID: a.ID, State: dr.Invoking}))
	var names []string
	for after := ""; ; {
		page, err := w.Standings(w.ctx, after, 2)
		w.must(err)
		for _, s := range page {
			names = append(names, s.Server.Name)
			switch s.Server.ID {
			case "srv-1":
				if idOf(s.Newest) != b.ID || idOf(s.LKG) != a.ID || s.LKG.Verdict == nil || s.Invocation == nil || s.Invocation.ID != "inv-1" || s.Tickets != 0 {
					w.t.Errorf("srv-1 stands at %+v", s)
				}
			case "srv-2":
				if s.Newest != nil || s.LKG != nil || s.Tickets != 1 || s.Invocation != nil || s.Taken != (dr.Taken{}) {
					w.t.Errorf("srv-2 stands at %+v", s)
				}
			}
		}
		if len(page) < 2 {
			break
		}
		after = page[len(page)-1].Server.Name
	}
	if fmt.Sprint(names) != "[shop0 shop1 shop2 shop4]" {
		w.t.Errorf("pages show %v", names)
	}
	_, err = w.Standing(w.ctx, "shop3")
	w.is(err, catalog.ErrNotFound)
	if due := dueAt(w.t, w.Catalog, w.clock.now()); fmt.Sprint(due) != "[srv-0 srv-2 srv-4]" { // never captured; srv-1 is invoked
		w.t.Errorf("due: %v", due)
	}
}

func fromTheFuture(w *world) {
	for n := 1; n <= 2; n++ {
		s := server(n)
		if n == 2 {
			s.Appliance = "box" // which captures it, and dated a snapshot by a clock that is wrong
		}
		w.must(w.AddServer(w.ctx, s))
		w.must(w.RecordSnapshot(w.ctx, snapshot(n, 100)))
	}
	if due := dueAt(w.t, w.Catalog, w.clock.now()); fmt.Sprint(due) != "[srv-1]" {
		w.t.Errorf("due: %v", due)
	}
}

func expected(w *world) {
	for n := 1; n <= 3; n++ {
		s := server(n)
		if n < 3 {
			s.Appliance = "box"
		}
		w.must(w.AddServer(w.ctx, s))
	}
	newer, older := snapshot(1, 2), snapshot(1, 1)
	for _, s := range []dr.Snapshot{newer, older} { // the newest is sent first
		_, err := w.RecordReplicated(w.ctx, s, 1)
		w.must(err)
	}
	w.must(w.RecordSnapshot(w.ctx, snapshot(1, 3))) // has not arrived
	w.must(w.RecordSnapshot(w.ctx, snapshot(3, 1)))
	_, err := w.OpenTicket(w.ctx, "srv-2", dr.ProblemArrival, "t", "d", "", epoch)
	w.must(err)
	list, err := w.Expected(w.ctx, "")
	if w.must(err); len(list) != 2 || !list[0].Arrived.Image.Equal(newer.Taken) || !list[0].Arrived.Data.IsZero() || list[0].Missing || list[0].Server.Appliance != "box" ||
		!list[1].Arrived.Image.IsZero() || !list[1].Missing {
		w.t.Errorf("%+v", list)
	}
	data := snapshot(1, 4)
	data.Kind, data.Image = dr.SnapshotData, newer.ID
	_, err = w.RecordReplicated(w.ctx, data, 1)
	w.must(err)
	w.must(w.RemoveServer(w.ctx, "srv-2"))
	if list, err = w.Expected(w.ctx, ""); err != nil || len(list) != 1 || !list[0].Arrived.Data.Equal(data.Taken) || !list[0].Arrived.Image.Equal(newer.Taken) {
		w.t.Errorf("%+v, %v", list, err)
	}
	if of, err := w.ServersOf(w.ctx, "box"); err != nil || len(of) != 1 || of[0].Server.ID != "srv-1" || of[0].LKG != "" {
		w.t.Errorf("its servers %+v, %v", of, err)
	}
	w.must(w.RecordPreRecovery(w.ctx, preRecovery(newer, 0)))
	w.judge(newer, 1, dr.Pass)
	moved := server(1)
	moved.Appliance = "crate"
	w.must(w.UpdateServer(w.ctx, moved))
	for appliance, n := range map[string]int{"box": 0, "crate": 1, "": 1} {
		if of, err := w.ServersOf(w.ctx, appliance); err != nil || len(of) != n || appliance == "crate" && of[0].LKG != newer.ID {
			w.t.Errorf("servers of %q: %+v, %v", appliance, of, err)
		}
	}
	if list, err = w.Expected(w.ctx, "srv-1"); err != nil || len(list) != 0 {
		w.t.Errorf("after it %+v, %v", list, err)
	}
}

// planned takes away what this release keeps with a server, as if an older one had recorded it.
func planned(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	w.must(w.AddServer(w.ctx, server(2)))
	w.kept(1)
	db, err := sql.Open(driver(w.dsn), w.dsn)
	w.must(err)
	defer db.Close()
	_, err = db.Exec(`UPDATE servers SET image_at = 0, data_at = 0, last_at = 0, newest_at = 0, due = -1`)
	w.must(err)
	again, err := catalog.Open(w.ctx, w.dsn)
	w.must(err)
	defer again.Close()
	taken := epoch.Add(time.Hour)
	for id, at := range map[string]time.Time{"srv-1": taken.Add(dr.DefaultEvery), "srv-2": epoch} {
		checkStanding(w.t, again, id, at.Add(-1))
		checkStanding(w.t, again, id, at)
	}
}

func driver(dsn string) string {
	if strings.HasPrefix(dsn, "postgres://") {
		return "pgx"
	}
	return "sqlite"
}
