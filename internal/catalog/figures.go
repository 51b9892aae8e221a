package catalog

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Figures are where a protected server stands, in what can be counted and timed.
type Figures struct {
	Server  dr.Server
	LKG     time.Time  // the instant that last-known-good shows; zero: there is none
	Newest  time.Time  // the instant that the newest snapshot shows which has not expired; zero: there is none
	Outcome dr.Outcome // of the last boot test; "" none was held
}

// Figures gives where every protected server stands, by name, in one query.
func (c *Catalog) Figures(ctx context.Context) ([]Figures, error) {
	var rows []serverRow
	err := c.db.NewSelect().Model(&rows).Column("data", "lkg_at", "shown_at", "outcome").Where("removed = 0").Order("name").Scan(ctx)
	if err != nil {
		return nil, fmt.Errorf("list where servers stand: %w", err)
	}
	out := make([]Figures, 0, len(rows))
	for _, row := range rows {
		s, err := parse[dr.Server](row.Data)
		if err != nil {
			return nil, err
		}
		out = append(out, Figures{Server: s, LKG: instant(row.LKGAt), Newest: instant(row.ShownAt), Outcome: row.Outcome})
	}
	return out, nil
}

// OpenProblems counts the open tickets by the kind of their problem: what stands before its first slash.
func (c *Catalog) OpenProblems(ctx context.Context) (map[string]int, error) {
	var rows []struct {
		Problem string
		N       int
	}
	if err := c.db.NewRaw(`SELECT problem, COUNT(*) AS n FROM tickets WHERE closed = 0 GROUP BY problem`).Scan(ctx, &rows); err != nil {
		return nil, fmt.Errorf("count open tickets: %w", err)
	}
	out := map[string]int{}
	for _, row := range rows {
		kind, _, _ := strings.Cut(row.Problem, "/")
		out[kind] += row.N
	}
	return out, nil
}

// Tally is what happened after one event and up to another.
type Tally struct {
	Seq         int64 // of the last event that is in it
	Verdicts    map[dr.Outcome]int64
	Snapshots   map[dr.SnapshotKind]SnapshotTally
	Arrivals    map[dr.SnapshotKind]ArrivalTally
	Promotions  int64
	Expired     int64
	Invocations int64 // that came to run
}

// SnapshotTally is how many snapshots were recorded, and what they cost in bytes.
type SnapshotTally struct {
	N                                int64
	Read, Changed, Sent, New, Stored int64
}

// ArrivalTally is how many snapshots came into the far store over the line.
type ArrivalTally struct {
	N       int64
	Changed int64 // bytes of them that differed from the snapshot before
	Sent    int64 // bytes that crossed the line for them
}

// LastEvent gives the number of the last event.
func (c *Catalog) LastEvent(ctx context.Context) (seq int64, err error) {
	if err := c.db.NewRaw(`SELECT value FROM counters WHERE name = 'event'`).Scan(ctx, &seq); err != nil {
		return 0, fmt.Errorf("find the last event: %w", err)
	}
	return seq, nil
}

// Tally adds to a tally what happened since its last event. It reads only that.
func (c *Catalog) Tally(ctx context.Context, t Tally) (Tally, error) {
	to, err := c.LastEvent(ctx)
	if err != nil || to <= t.Seq {
		return t, err
	}
	out := t.clone()
	for _, count := range []func(context.Context, int64, int64, *Tally) error{c.tallyEvents, c.tallyVerdicts, c.tallySnapshots, c.tallyArrivals} {
		if err := count(ctx, t.Seq, to, &out); err != nil {
			return t, fmt.Errorf("count what happened since event %d: %w", t.Seq, err)
		}
	}
	out.Seq = to
	return out, nil
}

func (t Tally) clone() Tally {
	out := t
	out.Verdicts, out.Snapshots, out.Arrivals = map[dr.Outcome]int64{}, map[dr.SnapshotKind]SnapshotTally{}, map[dr.SnapshotKind]ArrivalTally{}
	maps.Copy(out.Verdicts, t.Verdicts)
	maps.Copy(out.Snapshots, t.Snapshots)
	maps.Copy(out.Arrivals, t.Arrivals)
	return out
}

func (c *Catalog) tallyEvents(ctx context.Context, after, to int64, t *Tally) error {
	var rows []struct {
		Kind string
		N    int64
	}
	err := c.db.NewRaw(`SELECT kind, COUNT(*) AS n FROM events WHERE seq > ? AND seq <= ?
		AND kind IN ('lkg.moved', 'snapshot.expired', 'invocation.running') GROUP BY kind`, after, to).Scan(ctx, &rows)
	for _, row := range rows {
		switch row.Kind {
		case "lkg.moved":
			t.Promotions += row.N
		case "snapshot.expired":
			t.Expired += row.N
		case "invocation.running":
			t.Invocations += row.N
		}
	}
	return err
}

func (c *Catalog) tallyVerdicts(ctx context.Context, after, to int64, t *Tally) error {
	var rows []struct {
		Outcome dr.Outcome
		N       int64
	}
	err := c.db.NewRaw(`SELECT v.outcome, COUNT(*) AS n FROM events AS e JOIN verdicts AS v ON v.id = e.subject
		WHERE e.seq > ? AND e.seq <= ? AND e.kind = 'verdict.recorded' GROUP BY v.outcome`, after, to).Scan(ctx, &rows)
	for _, row := range rows {
		t.Verdicts[row.Outcome] += row.N
	}
	return err
}

func (c *Catalog) tallySnapshots(ctx context.Context, after, to int64, t *Tally) error {
	return c.eachSnapshot(ctx, "snapshot.kept", after, to, func(kind dr.SnapshotKind, st dr.CaptureStats, _ int64) {
		sum := t.Snapshots[kind]
		sum.N++
		sum.Read += st.Read
		sum.Changed += st.Changed
		sum.Sent += st.Sent
		sum.New += st.New
		sum.Stored += st.Stored
		t.Snapshots[kind] = sum
	})
}

func (c *Catalog) tallyArrivals(ctx context.Context, after, to int64, t *Tally) error {
	return c.eachSnapshot(ctx, "snapshot.replicated", after, to, func(kind dr.SnapshotKind, st dr.CaptureStats, line int64) {
		sum := t.Arrivals[kind]
		sum.N++
		sum.Changed += st.Changed
		sum.Sent += line
		t.Arrivals[kind] = sum
	})
}

// eachSnapshot calls for every snapshot to which an event of a kind happened, with the bytes that crossed the line for it. It reads
// rows in pages: after a long time without anybody who asks there may be many.
func (c *Catalog) eachSnapshot(ctx context.Context, event string, after, to int64, each func(kind dr.SnapshotKind, st dr.CaptureStats, line int64)) error {
	for {
		var rows []struct {
			Seq  int64
			Kind dr.SnapshotKind
			Sent int64
			Data string
		}
		err := c.db.NewRaw(`SELECT e.seq, s.kind, s.sent, s.data FROM events AS e JOIN snapshots AS s ON s.id = e.subject
			WHERE e.seq > ? AND e.seq <= ? AND e.kind = ? ORDER BY e.seq LIMIT ?`, after, to, event, MaxList).Scan(ctx, &rows)
		if err != nil {
			return err
		}
		for _, row := range rows {
			s, err := parse[dr.Snapshot](row.Data)
			if err != nil {
				return err
			}
			each(row.Kind, s.Stats, row.Sent)
			after = row.Seq
		}
		if len(rows) < MaxList {
			return nil
		}
	}
}

// Check writes, changing nothing, and says why that did not work.
func (c *Catalog) Check(ctx context.Context) error {
	err := c.write(ctx, "write to the catalog", func(t *tx) error {
		return t.do(`UPDATE counters SET value = value WHERE name = 'event'`)
	})
	if err != nil && ctx.Err() != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	return err
}
