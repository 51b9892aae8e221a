package catalog

import (
	"context"
	"fmt"

	"github.com/uptrace/bun"

	"github.com/musterdr/muster/internal/dr"
)

// AddServer adds a server. ErrExists if one of that name is protected, or the id was ever used for another; the same
// server added again is no error.
func (c *Catalog) AddServer(ctx context.Context, s dr.Server) error {
	return c.write(ctx, "add server "+s.Name, func(t *tx) error {
		_, err := t.addServer(s)
		return err
	})
}

func (t *tx) addServer(s dr.Server) (added bool, err error) {
	if err := dr.ValidateID(s.ID); err != nil {
		return false, err
	}
	data, err := text(s)
	if err != nil {
		return false, err
	}
	var same []serverRow
	if err := t.NewSelect().Model(&same).Where("id = ? OR (name = ? AND removed = 0)", s.ID, s.Name).Scan(t.ctx); err != nil {
		return false, err
	}
	if len(same) > 0 {
		row := same[0]
		if row.ID == s.ID && row.Data == data && row.Removed == 0 {
			return false, nil
		}
		return false, fmt.Errorf("server %s (%s): %w", row.Name, row.ID, ErrExists)
	}
	if _, err := t.NewInsert().Model(&serverRow{ID: s.ID, Name: s.Name, Data: data, Booked: 1}).Exec(t.ctx); err != nil {
		return false, err
	}
	if _, err := t.event(t.now, "server.added", s.ID, s.Name, s.ID, "server %s is protected: %s", s.Name, s.Source); err != nil {
		return false, err
	}
	return true, t.plan(s.ID)
}

// UpdateServer replaces a server's definition. ErrExists if its new name is another server's.
func (c *Catalog) UpdateServer(ctx context.Context, s dr.Server) error {
	return c.write(ctx, "update server "+s.Name, func(t *tx) error {
		row, err := t.server(s.ID)
		if err != nil {
			return err
		}
		data, err := text(s)
		if err != nil || data == row.Data {
			return err
		}
		if s.Name != row.Name {
			n, err := t.NewSelect().Model((*serverRow)(nil)).Where("name = ? AND removed = 0", s.Name).Count(t.ctx)
			if err != nil {
				return err
			}
			if n > 0 {
				return fmt.Errorf("server %s: %w", s.Name, ErrExists)
			}
		}
		if err := t.do(`UPDATE servers SET name = ?, data = ? WHERE id = ?`, s.Name, data, s.ID); err != nil {
			return err
		}
		if _, err := t.event(t.now, "server.changed", s.ID, s.Name, s.ID, "the definition of server %s was changed", s.Name); err != nil {
			return err
		}
		return t.plan(s.ID)
	})
}

// RemoveServer stops protecting a server. Its snapshots, verdicts and events stay, its open tickets are closed, and its
// name may be given to another. ErrInUse while an invocation of it is active.
func (c *Catalog) RemoveServer(ctx context.Context, id string) error {
	return c.write(ctx, "remove server "+id, func(t *tx) error {
		row, err := t.server(id)
		if err != nil {
			return err
		}
		active, err := t.active(id)
		if err != nil {
			return err
		}
		if len(active) > 0 {
			return fmt.Errorf("invocation %s is active, end it first: %w", active[0].ID, ErrInUse)
		}
		seq, err := t.event(t.now, "server.removed", id, row.Name, id, "server %s is no longer protected", row.Name)
		if err != nil {
			return err
		}
		// Any number but 0 says that it is gone; the event's cannot be 0, as a stepped-back clock's could.
		if err := t.do(`UPDATE servers SET removed = ? WHERE id = ?`, seq, id); err != nil {
			return err
		}
		return t.closeTickets(id, t.now, "the server was removed", func(ticketRow) (bool, error) { return true, nil })
	})
}

// server reads the row of a protected server.
func (t *tx) server(id string) (serverRow, error) {
	row, err := one[serverRow](t.ctx, t, "server", id)
	if err == nil && row.Removed != 0 {
		return row, fmt.Errorf("server %s was removed: %w", row.Name, ErrNotFound)
	}
	return row, err
}

// Server gives a protected server by its id or its name. Where one is named like another's id, the id is meant.
func (c *Catalog) Server(ctx context.Context, nameOrID string) (dr.Server, error) {
	var rows []serverRow
	err := c.db.NewSelect().Model(&rows).Where("removed = 0 AND (id = ? OR name = ?)", nameOrID, nameOrID).Scan(ctx)
	if err != nil {
		return dr.Server{}, fmt.Errorf("look up server %s: %w", nameOrID, err)
	}
	for _, row := range rows {
		if row.ID == nameOrID || len(rows) == 1 {
			return parse[dr.Server](row.Data)
		}
	}
	return dr.Server{}, fmt.Errorf("server %s: %w", nameOrID, ErrNotFound)
}

// Servers gives every protected server, by name.
func (c *Catalog) Servers(ctx context.Context) ([]dr.Server, error) {
	var rows []serverRow
	if err := c.db.NewSelect().Model(&rows).Where("removed = 0").Order("name").Scan(ctx); err != nil {
		return nil, fmt.Errorf("list servers: %w", err)
	}
	return parseAll(rows, func(row serverRow) (dr.Server, error) { return parse[dr.Server](row.Data) })
}

// Captured is a server that an appliance elsewhere captures.
type Captured struct {
	Server dr.Server
	LKG    string // its last-known-good; "" none
}

// ServersOf gives the protected servers that an appliance captures, by name.
func (c *Catalog) ServersOf(ctx context.Context, appliance string) ([]Captured, error) {
	var rows []serverRow
	if err := c.db.NewSelect().Model(&rows).Column("data", "lkg").Where("removed = 0 AND appliance = ?", appliance).Order("name").Scan(ctx); err != nil {
		return nil, fmt.Errorf("list servers of appliance %s: %w", appliance, err)
	}
	return parseAll(rows, func(row serverRow) (Captured, error) {
		s, err := parse[dr.Server](row.Data)
		return Captured{s, row.LKG}, err
	})
}

func parseAll[Row, T any](rows []Row, one func(Row) (T, error)) ([]T, error) {
	out := make([]T, 0, len(rows))
	for _, row := range rows {
		v, err := one(row)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// anyServerID gives the id of a server, also of a removed one, by id or name; "" if there never was one.
func anyServerID(ctx context.Context, db bun.IDB, nameOrID string) (string, error) {
	var rows []serverRow
	err := db.NewSelect().Model(&rows).Where("id = ? OR name = ?", nameOrID, nameOrID).Scan(ctx)
	best := serverRow{Removed: -1}
	for _, row := range rows {
		switch {
		case row.ID == nameOrID:
			return row.ID, err
		case best.ID == "" || row.Removed == 0 || (best.Removed != 0 && row.Removed > best.Removed):
			best = row
		}
	}
	return best.ID, err
}
