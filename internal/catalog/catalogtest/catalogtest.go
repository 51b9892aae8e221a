// Package catalogtest is what a catalog promises, as one suite for whatever database it is kept in.
//
// Knows: the promises of catalog.
// Must not know: which database is behind a DSN.
package catalogtest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

// Run runs the suite. dsn gives the address of an empty database, another one at each call. The test binary calls Main
// first, which the crash test needs.
func Run(t *testing.T, dsn func(t *testing.T) string) {
	for name, test := range map[string]func(w *world){
		"a server is found by name and by id":                               serverFound,
		"a name is one server's, and free once it is removed":               serverNames,
		"a removed server leaves its history":                               serverRemoved,
		"a snapshot is recorded once":                                       snapshotOnce,
		"a snapshot that is kept closes the capture ticket":                 snapshotClosesCapture,
		"lists are newest first and leave out what is large":                snapshotLists,
		"the last snapshot is the last recorded":                            lastSnapshot,
		"a pass verifies, promotes and says so, once":                       passPromotes,
		"a pass on an older snapshot does not move back":                    passOlder,
		"a fail rejects, keeps last-known-good, opens one ticket":           failKeeps,
		"a pass closes what it proves gone and nothing newer":               passCloses,
		"a missed objective is one ticket however often":                    missedObjective,
		"what appliances bring is known by the instant it shows":            expected,
		"a snapshot from the future makes only what is to be taken due":     fromTheFuture,
		"an inconclusive test of the newest snapshot is due again, once":    retests,
		"two inconclusive tests in a row raise a ticket":                    inconclusive,
		"a verdict that cannot be is refused whole":                         verdictRefused,
		"last-known-good comes with what was tested":                        lkgAsTested,
		"a problem has one open ticket":                                     ticketOnce,
		"a suspicious snapshot that passes waits for a person":              heldWaits,
		"what builds on a suspicious snapshot waits too":                    heldInherited,
		"an accepted snapshot is promoted, and those after it":              acceptPromotes,
		"a refused snapshot never becomes last-known-good":                  refuseRejects,
		"damage that is undone ends the hold":                               heldUndone,
		"there is nothing to decide where nothing is held":                  ruleRefused,
		"adopting loses neither a hold nor what a person said":              adoptHolds,
		"an invocation goes only where it may":                              invocationStates,
		"last-known-good and what runs are never expired":                   expireRefused,
		"a test that did not run is found":                                  overdue,
		"what arrives is recorded once, and only the newest is owed a test": arrivals,
		"every change writes an event, without gaps":                        events,
		"a clock stepped back changes no order":                             clockBack,
		"a lost catalog is rebuilt, and adopting again is nothing":          adopt,
		"what does not fit is left and said":                                adoptLeaves,
		"verbs at once do not disturb each other":                           concurrent,
		"whatever the sequence of verbs the invariants hold":                sequences,
		"a long history is listed quickly":                                  many,
		"servers are listed page by page":                                   standings,
		"what an older release recorded is due when it should be":           planned,
		"what an older release recorded is in the books":                    booked,
		"where servers stand is told at once":                               figures,
		"what happened since is counted, and only that":                     tallied,
		"open tickets are counted by kind":                                  problems,
		"a check changes nothing, and fails where writing does":             checked,
		"whoever is told hears of what took effect, in order":               told,
		"a month is metered from the record":                                metered,
		"a silo joins, drains, is lost and comes back":                      siloLife,
		"work has one lease, each new one a higher term":                    leaseGranted,
		"what comes under an old term is refused":                           leaseFences,
		"the work of a lost silo is taken once, but no invocation":          siloLost,
		"two leases change their silos, or neither does":                    leasesSwapped,
		"a silo that is heard of keeps its leases":                          leaseRenewed,
		"grants at once do not overcommit memory":                           grantsAtOnce,
		"deltas are known where they are held":                              deltasHeld,
		"what is told again is written down once":                           toldAgain,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(newWorld(t, dsn(t)))
		})
	}
}

// world is an open catalog, a clock, and short ways of saying things.
type world struct {
	*catalog.Catalog
	t     *testing.T
	ctx   context.Context
	clock *clock
	dsn   string
}

type clock struct{ nanos atomic.Int64 }

func (c *clock) now() time.Time          { return time.Unix(0, c.nanos.Load()).UTC() }
func (c *clock) advance(d time.Duration) { c.nanos.Add(int64(d)) }

var epoch = time.Date(2026, 3, 1, 2, 0, 0, 0, time.UTC)

func newWorld(t *testing.T, dsn string) *world {
	t.Helper()
	c, err := catalog.Open(context.Background(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	w := &world{Catalog: c, t: t, ctx: context.Background(), clock: &clock{}, dsn: dsn}
	w.clock.nanos.Store(epoch.UnixNano())
	c.Now = w.clock.now
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) is(err, want error) {
	w.t.Helper()
	if !errors.Is(err, want) {
		w.t.Errorf("error %v, want %v", err, want)
	}
}

func (w *world) refused(what string, err error) {
	w.t.Helper()
	if err == nil {
		w.t.Errorf("%s was taken", what)
	}
}

func server(n int) dr.Server {
	return dr.Server{ID: fmt.Sprintf("srv-%d", n), Name: fmt.Sprintf("shop%d", n), Created: epoch,
		Source: dr.Source{Disks: []string{"/srv/shop.img"}}, Schedule: dr.Schedule{Every: dr.DefaultEvery}}
}

// snapshot is the nth of a server, taken n hours after the epoch.
func snapshot(srv, n int) dr.Snapshot {
	return dr.Snapshot{ID: fmt.Sprintf("snap-%d-%d", srv, n), ServerID: fmt.Sprintf("srv-%d", srv), Server: fmt.Sprintf("shop%d", srv),
		Taken: epoch.Add(time.Duration(n) * time.Hour), Consistency: dr.FilesystemConsistent,
		Disks:     []dr.SnapshotDisk{{Name: "sda", Size: 4 << 30, BlockSize: 64 << 10, Root: "k01"}},
		Inventory: dr.Inventory{Hostname: "shop", Processes: []string{"nginx"}}}
}

func preRecovery(s dr.Snapshot, n int) dr.PreRecovery {
	return dr.PreRecovery{ID: fmt.Sprintf("pre-%s-%d", s.ID, n), SnapshotID: s.ID, Hardware: dr.Hardware{Firmware: dr.BIOS, DiskBus: dr.BusVirtio},
		Overlays: []string{"serial@1"}, Edits: []dr.Edit{{Overlay: "serial@1", Action: "write", Path: "/etc/x"}},
		Facts: dr.Facts{Hostname: "shop"}, Deltas: []string{"/var/lib/d.qcow2"}}
}

func verdict(s dr.Snapshot, n int, o dr.Outcome) dr.Verdict {
	v := dr.Verdict{ID: fmt.Sprintf("verdict-%s-%d", s.ID, n), SnapshotID: s.ID, PreRecovery: preRecovery(s, 0).ID, Outcome: o,
		Summary: "so it went", Started: s.Taken.Add(time.Minute), Results: []dr.CheckResult{{Name: "http", State: dr.CheckPass}},
		Evidence: []dr.Evidence{{Kind: "screenshot", Path: "/x.png", Size: 1}}}
	if o == dr.Fail {
		v.Code = dr.CodePanic
	}
	return v
}

// kept records the nth snapshot of server 1, prepared: it is ready to be tested.
func (w *world) kept(n int) dr.Snapshot {
	w.t.Helper()
	s := snapshot(1, n)
	w.must(w.RecordSnapshot(w.ctx, s))
	w.must(w.RecordPreRecovery(w.ctx, preRecovery(s, 0)))
	return s
}

func (w *world) judge(s dr.Snapshot, n int, o dr.Outcome) catalog.Judged {
	w.t.Helper()
	j, err := w.RecordVerdict(w.ctx, verdict(s, n, o))
	w.must(err)
	return j
}

func (w *world) state(id string, want dr.State) dr.Record {
	w.t.Helper()
	r, err := w.Snapshot(w.ctx, id)
	w.must(err)
	if r.State != want {
		w.t.Errorf("%s is %s, want %s", id, r.State, want)
	}
	return r
}

func (w *world) lkg(want string) {
	w.t.Helper()
	r, ok, err := w.LKG(w.ctx, "srv-1")
	w.must(err)
	if ok != (want != "") || r.Snapshot.ID != want {
		w.t.Errorf("last-known-good is %q, want %q", r.Snapshot.ID, want)
	}
}

// open gives the problems of the open tickets, the last opened first.
func (w *world) open(want ...dr.Problem) []dr.Ticket {
	w.t.Helper()
	tickets, err := w.Tickets(w.ctx, catalog.TicketFilter{})
	w.must(err)
	var got []dr.Problem
	for _, ticket := range tickets {
		got = append(got, ticket.Problem)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		w.t.Errorf("open tickets %v, want %v", got, want)
	}
	return tickets
}

func serverFound(w *world) {
	want := server(1)
	w.must(w.AddServer(w.ctx, want))
	for _, by := range []string{"srv-1", "shop1"} {
		if got, err := w.Server(w.ctx, by); err != nil || got.ID != "srv-1" || !got.Created.Equal(want.Created) {
			w.t.Errorf("by %s: %+v, %v", by, got, err)
		}
	}
	_, err := w.Server(w.ctx, "shop2")
	w.is(err, catalog.ErrNotFound)
	cheat := server(2)
	cheat.Name = "srv-1" // named like the other's id: the id wins
	w.must(w.AddServer(w.ctx, cheat))
	if got, err := w.Server(w.ctx, "srv-1"); err != nil || got.ID != "srv-1" {
		w.t.Errorf("by an id that is also a name: %+v, %v", got, err)
	}
}

func serverNames(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	w.must(w.AddServer(w.ctx, server(1))) // repeated
	other := server(2)
	other.Name = "shop1"
	w.is(w.AddServer(w.ctx, other), catalog.ErrExists)
	w.must(w.AddServer(w.ctx, server(2)))
	w.is(w.UpdateServer(w.ctx, other), catalog.ErrExists)
	moved := server(1)
	moved.Name = "store"
	w.must(w.UpdateServer(w.ctx, moved))
	w.must(w.UpdateServer(w.ctx, other)) // the name is free now
	w.must(w.RemoveServer(w.ctx, "srv-2"))
	third := server(3)
	third.Name = "shop1"
	w.must(w.AddServer(w.ctx, third))
	w.is(w.AddServer(w.ctx, server(2)), catalog.ErrExists) // an id is never used again
	w.is(w.UpdateServer(w.ctx, server(2)), catalog.ErrNotFound)
	all, err := w.Servers(w.ctx)
	if err != nil || len(all) != 2 || all[0].Name != "shop1" || all[1].Name != "store" {
		w.t.Errorf("servers %+v, %v", all, err)
	}
}

func serverRemoved(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	s := w.kept(1)
	w.judge(s, 1, dr.Pass)
	_, err := w.OpenTicket(w.ctx, "srv-1", dr.ProblemStore, "x", "y", "", epoch)
	w.must(err)
	inv := dr.Invocation{ID: "inv-1", ServerID: "srv-1", Server: "shop1", SnapshotID: s.ID, State: dr.Invoking}
	w.must(w.RecordInvocation(w.ctx, inv))
	w.is(w.RemoveServer(w.ctx, "srv-1"), catalog.ErrInUse)
	inv.State = dr.Failed
	w.must(w.RecordInvocation(w.ctx, inv))
	w.must(w.RemoveServer(w.ctx, "srv-1"))
	w.open()
	w.is(w.RemoveServer(w.ctx, "srv-1"), catalog.ErrNotFound)
	_, err = w.Server(w.ctx, "srv-1")
	w.is(err, catalog.ErrNotFound)
	w.state(s.ID, dr.Verified)
	w.lkg(s.ID)
	if happened, err := w.Events(w.ctx, 0, 0, "shop1"); err != nil || len(happened) == 0 {
		w.t.Errorf("events of the removed one: %v, %v", happened, err)
	}
	w.must(w.RecordSnapshot(w.ctx, snapshot(1, 2))) // its capture was under way
}

func snapshotOnce(w *world) {
	w.is(w.RecordSnapshot(w.ctx, snapshot(1, 1)), catalog.ErrNotFound) // no such server
	w.must(w.AddServer(w.ctx, server(1)))
	w.must(w.AddServer(w.ctx, server(2)))
	s := w.kept(1)
	w.must(w.RecordSnapshot(w.ctx, s))
	w.must(w.RecordPreRecovery(w.ctx, preRecovery(s, 0)))
	r := w.state(s.ID, dr.PreRecovered) // not kept again
	if r.Snapshot.Inventory.Hostname != "shop" || r.PreRecovery == nil || len(r.PreRecovery.Edits) != 1 || r.LKG {
		w.t.Errorf("record %+v", r)
	}
	s.ServerID = "srv-2"
	w.is(w.RecordSnapshot(w.ctx, s), catalog.ErrExists)
	s.ID = "../../etc"
	w.refused("a hostile id", w.RecordSnapshot(w.ctx, s))
}

func snapshotClosesCapture(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	for _, p := range []dr.Problem{dr.ProblemCapture, dr.ProblemStore} {
		_, err := w.OpenTicket(w.ctx, "srv-1", p, "t", "d", "", epoch)
		w.must(err)
	}
	w.kept(1)
	w.open(dr.ProblemStore)
}

func snapshotLists(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	for n := 1; n <= 3; n++ {
		w.judge(w.kept(n), 1, dr.Pass)
	}
	list, err := w.Snapshots(w.ctx, "srv-1")
	w.must(err)
	if len(list) != 3 || list[0].Snapshot.ID != "snap-1-3" || list[2].Snapshot.ID != "snap-1-1" || !list[0].LKG || list[1].LKG {
		w.t.Fatalf("list %+v", list)
	}
	r := list[0]
	if r.Snapshot.Inventory.Hostname != "" || r.PreRecovery == nil || r.PreRecovery.Edits != nil || r.Verdict == nil || r.Verdict.Results != nil {
		w.t.Errorf("a listed record is not brief: %+v", r)
	}
	if r.Verdict.Outcome != dr.Pass || r.PreRecovery.Hardware.DiskBus != dr.BusVirtio || len(r.Snapshot.Disks) != 1 {
		w.t.Errorf("a listed record lacks something: %+v", r)
	}
	verdicts, err := w.Verdicts(w.ctx, "srv-1", 2)
	if err != nil || len(verdicts) != 2 || verdicts[0].SnapshotID != "snap-1-3" || len(verdicts[0].Results) != 1 {
		w.t.Errorf("verdicts %+v, %v", verdicts, err)
	}
}

func lastSnapshot(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	if _, ok, err := w.LastSnapshot(w.ctx, "srv-1", ""); ok || err != nil {
		w.t.Errorf("a last snapshot of none: %v", err)
	}
	w.kept(9) // the clock was ahead
	w.kept(2)
	if r, ok, err := w.LastSnapshot(w.ctx, "srv-1", ""); !ok || err != nil || r.Snapshot.ID != "snap-1-2" || r.Snapshot.Inventory.Hostname != "shop" {
		w.t.Errorf("last %+v, %v", r, err)
	}
	w.must(w.Expire(w.ctx, "snap-1-2"))
	if r, ok, err := w.LastSnapshot(w.ctx, "srv-1", ""); !ok || err != nil || r.Snapshot.ID != "snap-1-9" {
		w.t.Errorf("last that is not expired %+v, %v", r, err)
	}
}

func expireRefused(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	a, b, c := w.kept(1), w.kept(2), w.kept(3)
	w.judge(a, 1, dr.Pass)
	w.must(w.RecordInvocation(w.ctx, dr.Invocation{ID: "inv-1", ServerID: "srv-1", SnapshotID: a.ID, State: dr.Invoking}))
	w.judge(b, 1, dr.Pass)
	w.is(w.Expire(w.ctx, c.ID, b.ID), catalog.ErrInUse) // last-known-good
	w.is(w.Expire(w.ctx, c.ID, a.ID), catalog.ErrInUse) // it runs
	w.state(c.ID, dr.PreRecovered)                      // all or none
	w.must(w.Expire(w.ctx, c.ID))
	w.must(w.Expire(w.ctx, c.ID))
	w.state(c.ID, dr.Expired)
	w.is(w.Expire(w.ctx, "snap-x"), catalog.ErrNotFound)
	_, err := w.RecordVerdict(w.ctx, verdict(c, 1, dr.Inconclusive))
	w.refused("a verdict on an expired snapshot", err)
	w.refused("a pre-recovery of an expired snapshot", w.RecordPreRecovery(w.ctx, preRecovery(c, 7)))
}

func arrivals(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	_, err := w.OpenTicket(w.ctx, "srv-1", dr.ProblemSend, "a snapshot could not be sent", "", "", w.clock.now())
	w.must(err)
	newest, older := snapshot(1, 2), snapshot(1, 1)
	for i, s := range []dr.Snapshot{newest, older, newest} {
		fresh, err := w.RecordReplicated(w.ctx, s, 100)
		w.must(err)
		if fresh != (i < 2) {
			w.t.Errorf("arrival %d is news: %t", i, fresh)
		}
		w.state(s.ID, dr.Replicated)
	}
	open, err := w.Tickets(w.ctx, catalog.TicketFilter{})
	if w.must(err); len(open) != 0 {
		w.t.Errorf("tickets after it arrived: %v", open)
	}
	w.clock.advance(2 * time.Hour)
	late, err := w.TestsOverdue(w.ctx, w.clock.now(), time.Hour)
	if w.must(err); len(late) != 1 || late[0].Snapshot.ID != newest.ID {
		w.t.Errorf("%d tests are overdue: only that of the newest is", len(late))
	}
	w.must(w.RecordPreRecovery(w.ctx, preRecovery(newest, 0)))
	w.judge(newest, 1, dr.Pass)
	_, err = w.RecordReplicated(w.ctx, newest, 100)
	w.must(err)
	w.state(newest.ID, dr.Verified)
	kept := snapshot(1, 3)
	w.must(w.RecordSnapshot(w.ctx, kept))
	if fresh, err := w.RecordReplicated(w.ctx, kept, 100); err != nil || !fresh {
		w.t.Errorf("one that was recorded before is news: %t, %v", fresh, err)
	}
	_, err = w.RecordReplicated(w.ctx, snapshot(9, 1), 100)
	w.is(err, catalog.ErrNotFound)
}

func overdue(w *world) {
	w.must(w.AddServer(w.ctx, server(1)))
	w.must(w.AddServer(w.ctx, server(2)))
	w.kept(1)
	w.judge(w.kept(2), 1, dr.Inconclusive) // held, with a ticket of its own
	w.must(w.RecordSnapshot(w.ctx, snapshot(2, 1)))
	for i, order := range [][2]int{{0, 1}, {1, 0}} { // an image is tested with its data, whichever is recorded first
		image, data := snapshot(1, 10+2*i), snapshot(1, 11+2*i)
		data.Kind, data.Image = dr.SnapshotData, image.ID
		for _, n := range order {
			w.must(w.RecordSnapshot(w.ctx, []dr.Snapshot{image, data}[n]))
		}
		w.must(w.RecordPreRecovery(w.ctx, preRecovery(data, 0)))
		w.judge(data, 1, dr.Fail)
	}
	w.clock.advance(2 * time.Hour)
	w.kept(3)
	w.must(w.RemoveServer(w.ctx, "srv-2"))
	late, err := w.TestsOverdue(w.ctx, w.clock.now(), time.Hour)
	if err != nil || len(late) != 1 || late[0].Snapshot.ID != "snap-1-1" {
		w.t.Errorf("overdue %+v, %v", late, err)
	}
}

// fill copies the row of the first snapshot n times, each taken an hour earlier.
func (w *world) fill(n int) {
	w.t.Helper()
	db, err := sql.Open(driver(w.dsn), w.dsn)
	w.must(err)
	defer db.Close()
	_, err = db.Exec(fmt.Sprintf(`INSERT INTO snapshots
		(id, server_id, seq, taken, recorded, state, pre_recovery, verdict, data, inventory)
		WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		SELECT 'snap-filled-' || i, server_id, -i, taken - i * 3600000000000, recorded, state, pre_recovery, verdict, data, inventory
		FROM snapshots, n WHERE id = 'snap-1-1'`, n))
	w.must(err)
}

func many(w *world) {
	n := 1000
	if os.Getenv("MUSTER_REAL") != "" {
		n = 10_000
	}
	w.must(w.AddServer(w.ctx, server(1)))
	w.judge(w.kept(1), 1, dr.Pass)
	w.fill(n)
	start := time.Now()
	list, err := w.Snapshots(w.ctx, "srv-1")
	w.must(err)
	took := time.Since(start)
	if len(list) != n+1 {
		w.t.Errorf("%d snapshots", len(list))
	}
	start = time.Now()
	for range 100 {
		if _, ok, err := w.LastSnapshot(w.ctx, "srv-1", ""); !ok || err != nil {
			w.t.Fatal(err)
		}
		if _, ok, err := w.LKG(w.ctx, "srv-1"); !ok || err != nil {
			w.t.Fatal(err)
		}
	}
	w.t.Logf("%d snapshots listed in %s, last and last-known-good in %s", n, took, time.Since(start)/100)
	if took > 5*time.Second || time.Since(start) > 5*time.Second {
		w.t.Error("that is too slow")
	}
}
