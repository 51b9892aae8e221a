package catalog

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// OpenTicket says that a problem is there. If its ticket is open already it is counted and brought up to date; otherwise
// one is opened. A problem of the installation rather than of a server has no serverID.
func (c *Catalog) OpenTicket(ctx context.Context, serverID string, problem dr.Problem, title, detail, snapshot string, at time.Time) (dr.Ticket, error) {
	var ticket dr.Ticket
	err := c.write(ctx, "open ticket "+string(problem), func(t *tx) error {
		if problem == "" {
			return fmt.Errorf("it has no problem")
		}
		want := dr.Ticket{ServerID: serverID, Problem: problem, Title: title, Detail: detail, Snapshot: snapshot}
		if serverID != "" {
			server, err := t.server(serverID)
			if err != nil {
				return err
			}
			want.Server = server.Name
		}
		var err error
		ticket, err = t.openTicket(want, at)
		return err
	})
	return ticket, err
}

func (t *tx) openTicket(want dr.Ticket, at time.Time) (dr.Ticket, error) {
	var rows []ticketRow
	err := t.NewSelect().Model(&rows).Where("server_id = ? AND problem = ? AND closed = 0", want.ServerID, want.Problem).Scan(t.ctx)
	if err != nil {
		return dr.Ticket{}, err
	}
	if len(rows) > 0 {
		row := rows[0]
		row.Title, row.Detail, row.Snapshot, row.LastSeen = want.Title, want.Detail, want.Snapshot, stamp(at)
		row.Count++
		if _, err := t.NewUpdate().Model(&row).WherePK().Exec(t.ctx); err != nil {
			return dr.Ticket{}, err
		}
		_, err := t.event(at, "ticket.seen", row.ServerID, row.Server, row.ID, "%s (seen %d times)", row.Title, row.Count)
		return row.ticket(), err
	}
	row := ticketRow{ID: dr.NewID("ticket"), ServerID: want.ServerID, Server: want.Server, Problem: want.Problem, Title: want.Title,
		Detail: want.Detail, Snapshot: want.Snapshot, Opened: stamp(at), LastSeen: stamp(at), Count: 1}
	if row.Seq, err = t.event(at, "ticket.opened", row.ServerID, row.Server, row.ID, "%s", row.Title); err != nil {
		return dr.Ticket{}, err
	}
	_, err = t.NewInsert().Model(&row).Exec(t.ctx)
	return row.ticket(), err
}

// title names a problem that a verdict stands for.
func title(server string, p dr.Problem) string {
	kind, code, _ := strings.Cut(string(p), "/")
	switch kind {
	case "test-failed":
		return fmt.Sprintf("The boot test of %s failed: %s", server, code)
	case "test-inconclusive":
		return fmt.Sprintf("The boot test of %s could not be held %d times in a row", server, dr.InconclusiveLimit)
	case string(dr.ProblemTampering):
		return fmt.Sprintf("%s may have been tampered with: its last-known-good does not move until somebody looks", server)
	case "rto-missed":
		return fmt.Sprintf("%s took longer to recover than its RTO", server)
	case "rpo-missed":
		return fmt.Sprintf("The data of %s was older than its RPO", server)
	}
	return fmt.Sprintf("%s: %s", server, p)
}

// CloseTicket closes a ticket with a reason. One already closed is left as it is.
func (c *Catalog) CloseTicket(ctx context.Context, id, reason string, at time.Time) error {
	return c.write(ctx, "close ticket "+id, func(t *tx) error {
		row, err := one[ticketRow](t.ctx, t, "ticket", id)
		if err != nil || row.Closed != 0 {
			return err
		}
		return t.closeTicket(row, at, reason)
	})
}

func (t *tx) closeTicket(row ticketRow, at time.Time, reason string) error {
	closed := max(stamp(at), 1) // 0 would mean that it is open
	if err := t.do(`UPDATE tickets SET closed = ?, reason = ? WHERE id = ?`, closed, reason, row.ID); err != nil {
		return err
	}
	_, err := t.event(at, "ticket.closed", row.ServerID, row.Server, row.ID, "%s: closed, %s", row.Title, reason)
	return err
}

// closeTickets closes the open tickets of a server that which picks.
func (t *tx) closeTickets(serverID string, at time.Time, reason string, which func(ticketRow) (bool, error)) error {
	var rows []ticketRow
	err := t.NewSelect().Model(&rows).Where("server_id = ? AND closed = 0", serverID).Order("seq").Scan(t.ctx)
	if err != nil {
		return err
	}
	for _, row := range rows {
		ok, err := which(row)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if err := t.closeTicket(row, at, reason); err != nil {
			return err
		}
	}
	return nil
}

// TicketFilter narrows Tickets.
type TicketFilter struct {
	ServerID string // "" all
	Closed   bool   // closed ones too
}

// Tickets gives tickets, the ones opened last first: at most MaxList.
func (c *Catalog) Tickets(ctx context.Context, f TicketFilter) ([]dr.Ticket, error) {
	var rows []ticketRow
	q := c.db.NewSelect().Model(&rows).Order("seq DESC").Limit(MaxList)
	if f.ServerID != "" {
		q = q.Where("server_id = ?", f.ServerID)
	}
	if !f.Closed {
		q = q.Where("closed = 0")
	}
	if err := q.Scan(ctx); err != nil {
		return nil, fmt.Errorf("list tickets: %w", err)
	}
	return parseAll(rows, func(row ticketRow) (dr.Ticket, error) { return row.ticket(), nil })
}

func (row ticketRow) ticket() dr.Ticket {
	out := dr.Ticket{ID: row.ID, ServerID: row.ServerID, Server: row.Server, Problem: row.Problem, Title: row.Title, Detail: row.Detail,
		Snapshot: row.Snapshot, Opened: instant(row.Opened), LastSeen: instant(row.LastSeen), Count: row.Count, Reason: row.Reason}
	if row.Closed != 0 {
		closed := instant(row.Closed)
		out.Closed = &closed
	}
	return out
}
