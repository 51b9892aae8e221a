package catalog

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/musterdr/muster/internal/dr"
)

// invocationFollows says where an invocation's state may go; see dr.InvocationState. One that never came to run can
// also be ended by hand: what started it may have died before it could say that it failed.
var invocationFollows = map[dr.InvocationState][]dr.InvocationState{
	dr.Invoking: {dr.Running, dr.Failed, dr.Ended},
	dr.Running:  {dr.Ended},
}

// RecordInvocation records an invocation, or what became of it: its state goes only where it may. A new one begins as
// invoking, of a snapshot that has passed a test and is not expired; ErrInUse if another of the server is active.
func (c *Catalog) RecordInvocation(ctx context.Context, i dr.Invocation) error {
	return c.write(ctx, "record invocation "+i.ID, func(t *tx) error {
		before, err := one[invocationRow](t.ctx, t, "invocation", i.ID)
		if errors.Is(err, ErrNotFound) {
			return t.beginInvocation(i)
		}
		if err != nil {
			return err
		}
		return t.changeInvocation(before, i)
	})
}

func (t *tx) beginInvocation(i dr.Invocation) error {
	if err := dr.ValidateID(i.ID); err != nil {
		return err
	}
	if i.State != dr.Invoking {
		return fmt.Errorf("a new invocation is %s, not %s", dr.Invoking, i.State)
	}
	server, err := t.server(i.ServerID)
	if err != nil {
		return err
	}
	row, err := one[snapshotRow](t.ctx, t, "snapshot", i.SnapshotID)
	if err != nil {
		return err
	}
	passes, err := t.NewSelect().Model((*verdictRow)(nil)).Where("snapshot_id = ? AND outcome = ?", row.ID, dr.Pass).Count(t.ctx)
	if err != nil {
		return err
	}
	if row.ServerID != server.ID || row.State == dr.Expired || passes == 0 {
		return fmt.Errorf("snapshot %s is not one of %s that has passed a test: test it first", row.ID, server.Name)
	}
	active, err := t.active(server.ID)
	if err != nil {
		return err
	}
	if len(active) > 0 {
		return fmt.Errorf("invocation %s of %s is active: %w", active[0].ID, server.Name, ErrInUse)
	}
	data, err := text(i)
	if err != nil {
		return err
	}
	seq, err := t.event(t.now, "invocation.invoking", server.ID, server.Name, i.ID, "%s invokes %s from %s: %s", i.By, server.Name, row.ID, i.Reason)
	if err != nil {
		return err
	}
	_, err = t.NewInsert().Model(&invocationRow{ID: i.ID, Seq: seq, ServerID: server.ID, SnapshotID: row.ID, State: i.State, Data: data}).Exec(t.ctx)
	return err
}

func (t *tx) changeInvocation(before invocationRow, i dr.Invocation) error {
	if before.ServerID != i.ServerID || before.SnapshotID != i.SnapshotID {
		return fmt.Errorf("invocation of snapshot %s of server %s: %w", before.SnapshotID, before.ServerID, ErrExists)
	}
	if before.State != i.State && !slices.Contains(invocationFollows[before.State], i.State) {
		return fmt.Errorf("an invocation that is %s cannot become %s", before.State, i.State)
	}
	data, err := text(i)
	if err != nil || data == before.Data {
		return err
	}
	if err := t.do(`UPDATE invocations SET state = ?, data = ? WHERE id = ?`, i.State, data, i.ID); err != nil || before.State == i.State {
		return err
	}
	message := fmt.Sprintf("the invocation of %s is %s", i.Server, i.State)
	if i.Failure != "" {
		message += ": " + i.Failure
	}
	_, err = t.event(t.now, "invocation."+string(i.State), i.ServerID, i.Server, i.ID, "%s", message)
	return err
}

// active gives the active invocations of a server: none or one.
func (t *tx) active(serverID string) ([]invocationRow, error) {
	var rows []invocationRow
	err := t.NewSelect().Model(&rows).Where("server_id = ? AND state IN ('invoking', 'running')", serverID).Scan(t.ctx)
	return rows, err
}

// Invocation gives one invocation.
func (c *Catalog) Invocation(ctx context.Context, id string) (dr.Invocation, error) {
	row, err := one[invocationRow](ctx, c.db, "invocation", id)
	if err != nil {
		return dr.Invocation{}, err
	}
	return parse[dr.Invocation](row.Data)
}

// ActiveInvocation gives the active invocation of a server; false if there is none.
func (c *Catalog) ActiveInvocation(ctx context.Context, serverID string) (dr.Invocation, bool, error) {
	var rows []invocationRow
	err := c.db.NewSelect().Model(&rows).Where("server_id = ? AND state IN ('invoking', 'running')", serverID).Scan(ctx)
	if err != nil || len(rows) == 0 {
		return dr.Invocation{}, false, err
	}
	i, err := parse[dr.Invocation](rows[0].Data)
	return i, err == nil, err
}

// Invocations gives the active invocations, or all of them, the last first: at most MaxList.
func (c *Catalog) Invocations(ctx context.Context, all bool) ([]dr.Invocation, error) {
	var rows []invocationRow
	q := c.db.NewSelect().Model(&rows).Order("seq DESC").Limit(MaxList)
	if !all {
		q = q.Where("state IN ('invoking', 'running')")
	}
	if err := q.Scan(ctx); err != nil {
		return nil, fmt.Errorf("list invocations: %w", err)
	}
	return parseAll(rows, func(row invocationRow) (dr.Invocation, error) { return parse[dr.Invocation](row.Data) })
}
