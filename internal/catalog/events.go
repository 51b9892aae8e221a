package catalog

import (
	"context"
	"errors"
	"fmt"

	"github.com/musterdr/muster/internal/dr"
)

// AddEvent writes down something that happened and is no change of a state here. Its number is given, not taken; its
// Server is a name or an id, its time, where it has none, the clock's.
func (c *Catalog) AddEvent(ctx context.Context, e dr.Event) error {
	return c.write(ctx, "add event "+e.Kind, func(t *tx) error { return t.addEvent(e) })
}

func (t *tx) addEvent(e dr.Event) error {
	if e.Kind == "" {
		return errors.New("it has no kind")
	}
	if e.At.IsZero() {
		e.At = t.now
	}
	var serverID string
	if e.Server != "" {
		var err error
		if serverID, err = anyServerID(t.ctx, t, e.Server); err != nil {
			return err
		}
		if row, err := one[serverRow](t.ctx, t, "server", serverID); err == nil {
			e.Server = row.Name
		}
	}
	_, err := t.event(e.At, e.Kind, serverID, e.Server, e.Subject, "%s", e.Message)
	return err
}

// AddEventOnce is AddEvent of what is told until it is heard: if the server has an event of that kind and subject, it does
// nothing. What is of no server may happen to its subject again: there the time has to be the same too.
func (c *Catalog) AddEventOnce(ctx context.Context, e dr.Event) error {
	return c.write(ctx, "add event "+e.Kind, func(t *tx) error {
		q := t.NewSelect().Model((*eventRow)(nil)).Where("kind = ? AND subject = ?", e.Kind, e.Subject)
		if e.Server == "" {
			q = q.Where("server_id = '' AND at = ?", stamp(e.At))
		} else {
			id, err := anyServerID(t.ctx, t, e.Server)
			if err != nil {
				return err
			}
			q = q.Where("server_id = ?", id)
		}
		known, err := q.Count(t.ctx)
		if err != nil || known > 0 {
			return err
		}
		return t.addEvent(e)
	})
}

// Events gives events in the order in which they happened, from the one after the number given: at most limit, or
// MaxList. server is a name or an id, also a removed one's; "" for all.
func (c *Catalog) Events(ctx context.Context, after int64, limit int, server string) ([]dr.Event, error) {
	var rows []eventRow
	q := c.db.NewSelect().Model(&rows).Where("seq > ?", after).Order("seq").Limit(limited(limit))
	if server != "" {
		id, err := anyServerID(ctx, c.db, server)
		if err != nil || id == "" {
			return nil, err
		}
		q = q.Where("server_id = ?", id)
	}
	if err := q.Scan(ctx); err != nil {
		return nil, fmt.Errorf("list events: %w", err)
	}
	return parseAll(rows, func(row eventRow) (dr.Event, error) { return row.event(), nil })
}

func (row eventRow) event() dr.Event {
	return dr.Event{Seq: row.Seq, At: instant(row.At), Kind: row.Kind, Server: row.Server, Subject: row.Subject, Message: row.Message}
}
