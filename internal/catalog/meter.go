package catalog

import (
	"context"
	"fmt"

	"github.com/musterdr/muster/internal/dr"
)

// Meter tells a meter everything that was recorded before the end of its month. It reads the servers' books, and no snapshot.
func (c *Catalog) Meter(ctx context.Context, m *dr.Meter) error {
	for _, tell := range []func(ctx context.Context, m *dr.Meter) error{c.meterServers, c.meterBooks, c.meterInvocations} {
		if err := tell(ctx, m); err != nil {
			return fmt.Errorf("meter: %w", err)
		}
	}
	return nil
}

func (c *Catalog) meterServers(ctx context.Context, m *dr.Meter) error {
	var rows []serverRow
	if err := c.db.NewSelect().Model(&rows).Column("id", "data").Scan(ctx); err != nil {
		return err
	}
	for _, row := range rows {
		s, err := parse[struct{ Customer string }](row.Data)
		if err != nil {
			return err
		}
		m.Server(row.ID, s.Customer)
	}
	return nil
}

// meterBooks tells of each server how its books stood at the end of the month.
func (c *Catalog) meterBooks(ctx context.Context, m *dr.Meter) error {
	var rows []struct {
		bookRow `bun:",extend"`
		Kept    int64
	}
	err := c.db.NewRaw(`SELECT b.*, g.kept FROM (SELECT server_id, MAX(month) AS month, CAST(SUM(stored) AS BIGINT) AS kept FROM books WHERE month <= ? GROUP BY server_id) AS g
		JOIN books AS b ON b.server_id = g.server_id AND b.month = g.month`, m.Month()).Scan(ctx, &rows)
	if err != nil {
		return err
	}
	for _, row := range rows {
		m.Book(row.ServerID, row.book(), row.Kept)
	}
	return nil
}

func (c *Catalog) meterInvocations(ctx context.Context, m *dr.Meter) error {
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
