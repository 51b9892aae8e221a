package catalog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Standing is where a protected server stands, in what can be counted and timed.
type Standing struct {
	Server  dr.Server
	LKG     time.Time  // the instant that last-known-good shows; zero: there is none
	Newest  time.Time  // the instant that the newest snapshot shows which has not expired; zero: there is none
	Outcome dr.Outcome // of the last boot test; "" none was held
}

// Standings gives where every protected server stands, by name, in one query.
func (c *Catalog) Standings(ctx context.Context) ([]Standing, error) {
	var rows []struct {
		Data    string
		LKG     int64 `bun:"lkg"`
		Newest  int64
		Outcome dr.Outcome
	}
	err := c.db.NewRaw(`SELECT r.data,
			COALESCE((SELECT l.taken FROM snapshots AS l WHERE l.id = r.lkg), 0) AS lkg,
			COALESCE((SELECT s.taken FROM snapshots AS s WHERE s.server_id = r.id AND s.state <> ? ORDER BY s.taken DESC LIMIT 1), 0) AS newest,
			COALESCE((SELECT v.outcome FROM verdicts AS v WHERE v.server_id = r.id ORDER BY v.seq DESC LIMIT 1), '') AS outcome
		FROM servers AS r WHERE r.removed = 0 ORDER BY r.name`, dr.Expired).Scan(ctx, &rows)
	if err != nil {
		return nil, fmt.Errorf("list where servers stand: %w", err)
	}
	out := make([]Standing, 0, len(rows))
	for _, row := range rows {
		s, err := parse[dr.Server](row.Data)
		if err != nil {
			return nil, err
		}
		out = append(out, Standing{Server: s, LKG: instant(row.LKG), Newest: instant(row.Newest), Outcome: row.Outcome})
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
	Promotions  int64
	Expired     int64
	Invocations int64 // that came to run
}

// SnapshotTally is how many snapshots were recorded, and what they cost in bytes.
type SnapshotTally struct {
	N                                int64
	Read, Changed, Sent, New, Stored int64
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
	for _, count := range []func(context.Context, int64, int64, *Tally) error{c.tallyEvents, c.tallyVerdicts, c.tallySnapshots} {
		if err := count(ctx, t.Seq, to, &out); err != nil {
			return t, fmt.Errorf("count what happened since event %d: %w", t.Seq, err)
		}
	}
	out.Seq = to
	return out, nil
}

func (t Tally) clone() Tally {
	out := t
	out.Verdicts, out.Snapshots = map[dr.Outcome]int64{}, map[dr.SnapshotKind]SnapshotTally{}
	for k, v := range t.Verdicts {
		out.Verdicts[k] = v
	}
	for k, v := range t.Snapshots {
		out.Snapshots[k] = v
	}
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

// tallySnapshots reads rows in pages: after a long time without anybody who asks there may be many.
func (c *Catalog) tallySnapshots(ctx context.Context, after, to int64, t *Tally) error {
	for {
		var rows []struct {
			Seq  int64
			Kind dr.SnapshotKind
			Data string
		}
		err := c.db.NewRaw(`SELECT e.seq, s.kind, s.data FROM events AS e JOIN snapshots AS s ON s.id = e.subject
			WHERE e.seq > ? AND e.seq <= ? AND e.kind = 'snapshot.kept' ORDER BY e.seq LIMIT ?`, after, to, MaxList).Scan(ctx, &rows)
		if err != nil {
			return err
		}
		for _, row := range rows {
			s, err := parse[dr.Snapshot](row.Data)
			if err != nil {
				return err
			}
			sum, st := t.Snapshots[row.Kind], s.Stats
			sum.N++
			sum.Read += st.Read
			sum.Changed += st.Changed
			sum.Sent += st.Sent
			sum.New += st.New
			sum.Stored += st.Stored
			t.Snapshots[row.Kind] = sum
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
