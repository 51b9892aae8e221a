package catalogtest

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

// failer is what both a test and a rapid test can do.
type failer interface {
	Helper()
	Fatalf(format string, args ...any)
}

// checkInvariants checks what must hold after every transaction.
func checkInvariants(t failer, c *catalog.Catalog) {
	t.Helper()
	ctx := context.Background()
	fine := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v", err)
		}
	}
	lastEvent(t, c, 0)
	servers, err := c.Servers(ctx)
	fine(err)
	for _, s := range servers {
		checkServer(t, c, s)
	}
	open, err := c.Tickets(ctx, catalog.TicketFilter{})
	fine(err)
	seen := map[string]bool{}
	for _, ticket := range open {
		key := ticket.ServerID + " " + string(ticket.Problem)
		if seen[key] || ticket.Closed != nil {
			t.Fatalf("two open tickets for %s", key)
		}
		seen[key] = true
	}
}

// lastEvent gives the number of the last event, and checks that there is no gap after the one given.
func lastEvent(t failer, c *catalog.Catalog, after int64) int64 {
	t.Helper()
	for {
		page, err := c.Events(context.Background(), after, 0, "")
		if err != nil {
			t.Fatalf("%v", err)
		}
		for _, e := range page {
			if after++; e.Seq != after {
				t.Fatalf("event %d has number %d", after, e.Seq)
			}
		}
		if len(page) == 0 {
			return after
		}
	}
}

func checkServer(t failer, c *catalog.Catalog, s dr.Server) {
	t.Helper()
	ctx := context.Background()
	records, err := c.Snapshots(ctx, s.ID)
	if err != nil {
		t.Fatalf("%v", err)
	}
	taken := map[string]time.Time{}
	var marked []string
	for _, r := range records {
		taken[r.Snapshot.ID] = r.Snapshot.Taken
		if r.LKG {
			marked = append(marked, r.Snapshot.ID)
		}
	}
	promotions, err := c.Promotions(ctx, s.ID)
	if err != nil {
		t.Fatalf("%v", err)
	}
	slices.Reverse(promotions)
	at := ""
	for _, p := range promotions {
		v, err := c.Verdict(ctx, p.VerdictID)
		if err != nil || v.Outcome != dr.Pass || v.SnapshotID != p.SnapshotID {
			t.Fatalf("%s was promoted by %+v, %v", p.SnapshotID, v, err)
		}
		if p.Previous != at || (at != "" && !taken[p.SnapshotID].After(taken[at])) {
			t.Fatalf("last-known-good moved from %q, said to be %q, to %s", at, p.Previous, p.SnapshotID)
		}
		at = p.SnapshotID
	}
	lkg, ok, err := c.LKG(ctx, s.ID)
	if err != nil || ok != (at != "") || lkg.Snapshot.ID != at {
		t.Fatalf("last-known-good is %q, its history ends at %q, %v", lkg.Snapshot.ID, at, err)
	}
	if !ok {
		return
	}
	if lkg.State == dr.Expired || lkg.Verdict.Outcome != dr.Pass || lkg.PreRecovery.ID != lkg.Verdict.PreRecovery {
		t.Fatalf("last-known-good %s is %s by %+v", at, lkg.State, lkg.Verdict)
	}
	if len(marked) != 1 || marked[0] != at {
		t.Fatalf("marked as last-known-good: %v, it is %s", marked, at)
	}
}

// checkStanding checks that what is kept with a server is what its snapshots, tickets and invocations say.
func checkStanding(t failer, c *catalog.Catalog, id string, now time.Time) {
	t.Helper()
	ctx := context.Background()
	fine := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v", err)
		}
	}
	got, err := c.Standing(ctx, id)
	fine(err)
	var want dr.Taken
	for kind, at := range map[dr.SnapshotKind]*time.Time{dr.SnapshotImage: &want.Image, dr.SnapshotData: &want.Data, "": &want.Last} {
		last, ok, err := c.LastSnapshot(ctx, id, kind)
		fine(err)
		if ok {
			*at = last.Snapshot.Taken
		}
	}
	if got.Taken != want {
		t.Fatalf("%s was taken %+v, its snapshots say %+v", id, got.Taken, want)
	}
	records, err := c.Snapshots(ctx, id)
	fine(err)
	newest, lkg := "", ""
	for _, r := range records {
		if newest == "" && r.State != dr.Expired {
			newest = r.Snapshot.ID
		}
		if r.LKG {
			lkg = r.Snapshot.ID
		}
	}
	checkFigures(t, c, id, records)
	tickets, err := c.Tickets(ctx, catalog.TicketFilter{ServerID: id})
	fine(err)
	if idOf(got.Newest) != newest || idOf(got.LKG) != lkg || got.Tickets != len(tickets) {
		t.Fatalf("%s stands at newest %q, last-known-good %q, %d tickets; it has %q, %q, %d", id, idOf(got.Newest), idOf(got.LKG), got.Tickets, newest, lkg, len(tickets))
	}
	_, invoked, err := c.ActiveInvocation(ctx, id)
	fine(err)
	if invoked != (got.Invocation != nil) {
		t.Fatalf("%s is invoked: %v, it stands as %+v", id, invoked, got.Invocation)
	}
	due := !invoked && !got.Server.Dues(want, now).Next().After(now)
	if listed := slices.Contains(dueAt(t, c, now), id); listed != due {
		t.Fatalf("%s, taken %+v, is due at %s: %v; listed as due: %v", id, want, now, due, listed)
	}
}

// checkFigures checks that what metrics say of a server is what its snapshots, newest first, and verdicts say.
func checkFigures(t failer, c *catalog.Catalog, id string, records []dr.Record) {
	t.Helper()
	var want catalog.Figures
	for _, r := range records {
		if want.Newest.IsZero() && r.State != dr.Expired {
			want.Newest = r.Snapshot.Taken
		}
		if r.LKG {
			want.LKG = r.Snapshot.Taken
		}
	}
	verdicts, err := c.Verdicts(context.Background(), id, 1)
	if err != nil {
		t.Fatalf("%v", err)
	}
	for _, v := range verdicts {
		want.Outcome = v.Outcome
	}
	list, err := c.Figures(context.Background())
	if err != nil {
		t.Fatalf("%v", err)
	}
	for _, got := range list {
		if got.Server.ID == id && (!got.Newest.Equal(want.Newest) || !got.LKG.Equal(want.LKG) || got.Outcome != want.Outcome) {
			t.Fatalf("the figures of %s are %s, %s, %s; it has %s, %s, %s", id, got.Newest, got.LKG, got.Outcome, want.Newest, want.LKG, want.Outcome)
		}
	}
}

func idOf(r *dr.Record) string {
	if r == nil {
		return ""
	}
	return r.Snapshot.ID
}

// dueAt gives the servers that are due, page by page.
func dueAt(t failer, c *catalog.Catalog, now time.Time) (ids []string) {
	t.Helper()
	var last *catalog.Due
	for {
		page, err := c.Due(context.Background(), now, last)
		if err != nil {
			t.Fatalf("%v", err)
		}
		for _, d := range page {
			ids = append(ids, d.Server.ID)
		}
		if len(page) < catalog.MaxList {
			return ids
		}
		last = &page[len(page)-1]
	}
}

// sequences carries out verbs at random and checks the invariants after each. Most verbs are refused at times; what is
// never allowed is that one leaves the catalog in a state it must not be in.
func sequences(w *world) {
	w.must(w.AddServer(w.ctx, server(0)))
	round := 0
	rapid.Check(w.t, func(t *rapid.T) {
		round++ // each round has a server of its own: the database is made once
		m := &machine{world: w, srv: round, before: map[string]dr.State{}}
		if err := w.AddServer(w.ctx, m.server()); err != nil {
			t.Fatal(err)
		}
		t.Repeat(map[string]func(*rapid.T){
			"snapshot":  m.snapshot,
			"arrive":    m.arrive,
			"prepare":   m.prepare,
			"verdict":   m.verdict,
			"repeat":    m.repeat,
			"expire":    m.expire,
			"invoke":    m.invoke,
			"finish":    m.finish,
			"ticket":    m.ticket,
			"clock":     m.stepClock,
			"change":    m.change,
			"":          m.check,
			"adopt all": m.adopt,
		})
		checkBooks(t, w.Catalog, m.server())
		_ = w.RemoveServer(w.ctx, m.id()) // unless it is invoked
	})
}

type machine struct {
	*world
	srv, made int
	taken     []int
	last      dr.Verdict
	events    int64               // number of the last one seen
	before    map[string]dr.State // states at the last check
}

func (m *machine) id() string { return server(m.srv).ID }

func (m *machine) server() dr.Server {
	s := server(m.srv)
	s.Customer = s.ID
	return s
}

func (m *machine) pick(t *rapid.T) dr.Snapshot {
	if len(m.taken) == 0 {
		t.Skip("no snapshot yet")
	}
	return monthly(m.srv, rapid.SampledFrom(m.taken).Draw(t, "of"))
}

func (m *machine) snapshot(t *rapid.T) {
	n := rapid.IntRange(1, 30).Draw(t, "taken") // in any order: the source's clock may step back
	if err := m.RecordSnapshot(m.ctx, monthly(m.srv, n)); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(m.taken, n) {
		m.taken = append(m.taken, n)
	}
}

func (m *machine) arrive(t *rapid.T) {
	if _, err := m.RecordReplicated(m.ctx, m.pick(t), line); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) prepare(t *rapid.T) {
	s := m.pick(t)
	_ = m.RecordPreRecovery(m.ctx, preRecovery(s, rapid.IntRange(0, 2).Draw(t, "pre")))
}

func (m *machine) verdict(t *rapid.T) {
	s := m.pick(t)
	m.made++
	v := verdict(s, m.made, rapid.SampledFrom([]dr.Outcome{dr.Pass, dr.Pass, dr.Fail, dr.Inconclusive, dr.Blocked}).Draw(t, "outcome"))
	v.PreRecovery = preRecovery(s, rapid.IntRange(0, 2).Draw(t, "pre")).ID
	if _, err := m.PreRecovery(m.ctx, v.PreRecovery); err == nil && rapid.Bool().Draw(t, "started") { // no machine starts of what was not made
		v.Phases = []dr.Phase{{Name: dr.PhaseKernel, Duration: time.Duration(m.made) * time.Second}}
	}
	if rapid.Bool().Draw(t, "late") {
		late := false
		v.RTOMet = &late
	}
	if _, err := m.RecordVerdict(m.ctx, v); err == nil {
		m.last = v
	}
}

func (m *machine) repeat(t *rapid.T) {
	if m.last.ID == "" {
		t.Skip("no verdict yet")
	}
	m.events = lastEvent(t, m.Catalog, m.events)
	_, err := m.RecordVerdict(m.ctx, m.last)
	if after := lastEvent(t, m.Catalog, m.events); err != nil || after != m.events {
		t.Fatalf("a verdict recorded again wrote %d events, %v", after-m.events, err)
	}
}

func (m *machine) expire(t *rapid.T) { _ = m.Expire(m.ctx, m.pick(t).ID) }

func (m *machine) invoke(t *rapid.T) {
	m.made++
	_ = m.RecordInvocation(m.ctx, dr.Invocation{ID: fmt.Sprintf("inv-%d-%d", m.srv, m.made), ServerID: m.id(), SnapshotID: m.pick(t).ID, State: dr.Invoking})
}

func (m *machine) finish(t *rapid.T) {
	inv, ok, err := m.ActiveInvocation(m.ctx, m.id())
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		t.Skip("nothing is invoked")
	}
	inv.State = rapid.SampledFrom([]dr.InvocationState{dr.Invoking, dr.Running, dr.Ended, dr.Failed}).Draw(t, "state")
	_ = m.RecordInvocation(m.ctx, inv)
}

func (m *machine) ticket(t *rapid.T) {
	p := rapid.SampledFrom([]dr.Problem{dr.ProblemCapture, dr.ProblemStore, dr.ProblemTestMissing}).Draw(t, "problem")
	if _, err := m.OpenTicket(m.ctx, m.id(), p, "t", "d", "", m.clock.now()); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) stepClock(t *rapid.T) {
	m.clock.advance(time.Duration(rapid.IntRange(-480, 480).Draw(t, "hours")) * time.Hour)
}

func (m *machine) adopt(t *rapid.T) {
	var snaps []dr.Snapshot
	var pres []dr.PreRecovery
	for _, n := range m.taken {
		snaps = append(snaps, monthly(m.srv, n))
		pres = append(pres, preRecovery(snapshot(m.srv, n), 0))
	}
	if _, err := m.Adopt(m.ctx, []dr.Server{m.server()}, snaps, pres, nil, nil, nil); err != nil {
		t.Fatal(err)
	}
}

// change changes what is captured of the server, and how often.
func (m *machine) change(t *rapid.T) {
	s := m.server()
	s.Schedule.Every = time.Duration(rapid.IntRange(1, 48).Draw(t, "every")) * time.Hour
	s.Data.Every = time.Duration(rapid.IntRange(1, 48).Draw(t, "data every")) * time.Hour
	s.Tier = rapid.SampledFrom([]dr.Tier{dr.TierImage, dr.TierImageData, dr.TierData}).Draw(t, "tier")
	if err := m.UpdateServer(m.ctx, s); err != nil {
		t.Fatal(err)
	}
}

// check checks the server of this round; that states went only where they may; and that what is over is over.
func (m *machine) check(t *rapid.T) {
	checkServer(t, m.Catalog, server(m.srv))
	checkStanding(t, m.Catalog, m.id(), m.clock.now())
	records, err := m.Snapshots(m.ctx, m.id())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		was, known := m.before[r.Snapshot.ID]
		if known && was != r.State && dr.Follow(was, r.State) != nil {
			t.Fatalf("%s went from %s to %s", r.Snapshot.ID, was, r.State)
		}
		m.before[r.Snapshot.ID] = r.State
	}
	open, err := m.Tickets(m.ctx, catalog.TicketFilter{ServerID: m.id()})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[dr.Problem]bool{}
	for _, ticket := range open {
		if seen[ticket.Problem] {
			t.Fatalf("two open tickets for %s", ticket.Problem)
		}
		seen[ticket.Problem] = true
	}
}

var _ failer = (*testing.T)(nil)
