package catalog

import (
	"context"
	"fmt"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Meter tells a meter everything that was recorded before the end of its month. It reads every snapshot's row once.
func (c *Catalog) Meter(ctx context.Context, m *dr.Meter) error {
	from, to := m.Span()
	for _, tell := range []func(ctx context.Context, m *dr.Meter, from, to time.Time) error{
		c.meterServers, c.meterSnapshots, c.meterTests, c.meterInvocations} {
		if err := tell(ctx, m, from, to); err != nil {
			return fmt.Errorf("meter: %w", err)
		}
	}
	return nil
}

func (c *Catalog) meterServers(ctx context.Context, m *dr.Meter, _, _ time.Time) error {
	var rows []serverRow
	if err := c.db.NewSelect().Model(&rows).Column("data").Scan(ctx); err != nil {
		return err
	}
	for _, row := range rows {
		s, err := parse[dr.Server](row.Data)
		if err != nil {
			return err
		}
		m.Server(s)
	}
	return nil
}

// meterSnapshots goes through the snapshots by their identifiers, so that it holds few of them at once.
func (c *Catalog) meterSnapshots(ctx context.Context, m *dr.Meter, _, to time.Time) error {
	var later []string // what has expired since, and was kept at the end
	err := c.db.NewRaw(`SELECT subject FROM events WHERE kind = 'snapshot.expired' AND at >= ?`, stamp(to)).Scan(ctx, &later)
	if err != nil {
		return err
	}
	since := make(map[string]bool, len(later))
	for _, id := range later {
		since[id] = true
	}
	for last := ""; ; {
		var rows []snapshotRow
		err := c.db.NewSelect().Model(&rows).Column("id", "server_id", "arrived", "sent", "state", "data").Where("id > ? AND taken < ?", last, stamp(to)).
			Order("id").Limit(MaxList).Scan(ctx)
		if err != nil {
			return err
		}
		for _, row := range rows {
			s, err := parse[dr.Snapshot](row.Data)
			if err != nil {
				return err
			}
			m.Snapshot(s, row.State != dr.Expired || since[row.ID])
			if row.Arrived > 0 {
				m.Arrival(row.ServerID, instant(row.Arrived), row.Sent)
			}
			last = row.ID
		}
		if len(rows) < MaxList {
			return nil
		}
	}
}

// meterTests finds the month's verdicts by their events.
func (c *Catalog) meterTests(ctx context.Context, m *dr.Meter, from, to time.Time) error {
	const grace = 24 * time.Hour // a verdict is recorded when the test is over: later than it began
	for last := int64(0); ; {
		var rows []struct {
			Seq      int64
			ServerID string
			Verdict  string
			Hardware string
		}
		err := c.db.NewRaw(`SELECT e.seq, v.server_id, v.brief AS verdict, p.brief AS hardware FROM events AS e
			JOIN verdicts AS v ON v.id = e.subject JOIN pre_recoveries AS p ON p.id = v.pre_recovery
			WHERE e.seq > ? AND e.kind = 'verdict.recorded' AND e.at >= ? AND e.at < ? ORDER BY e.seq LIMIT ?`,
			last, stamp(from), stamp(to.Add(grace)), MaxList).Scan(ctx, &rows)
		if err != nil {
			return err
		}
		for _, row := range rows {
			v, err := parse[dr.Verdict](row.Verdict)
			if err != nil {
				return err
			}
			p, err := parse[dr.PreRecovery](row.Hardware)
			if err != nil {
				return err
			}
			m.Test(row.ServerID, v, p.Hardware)
			last = row.Seq
		}
		if len(rows) < MaxList {
			return nil
		}
	}
}

func (c *Catalog) meterInvocations(ctx context.Context, m *dr.Meter, _, _ time.Time) error {
	var rows []invocationRow
	err := c.db.NewSelect().Model(&rows).Column("data").Scan(ctx)
	if err != nil {
		return err
	}
	for _, row := range rows {
		i, err := parse[dr.Invocation](row.Data)
		if err != nil {
			return err
		}
		var p dr.PreRecovery
		if i.PreRecovery != "" {
			p, err = c.PreRecovery(ctx, i.PreRecovery)
		}
		if err != nil {
			return err
		}
		m.Invocation(i, p.Hardware)
	}
	return nil
}
