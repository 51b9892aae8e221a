package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// ErrNotHeld is a ruling on a snapshot about which there is nothing to decide.
var ErrNotHeld = errors.New("it is not held")

// Rule records what a person says of a held snapshot, and all that follows from it, or nothing: holds that end, what
// becomes last-known-good for it, the ticket, the events. A ruling may be changed by another one. Recorded again it
// changes nothing.
func (c *Catalog) Rule(ctx context.Context, ruling dr.Ruling) error {
	return c.write(ctx, "rule on snapshot "+ruling.SnapshotID, func(t *tx) error {
		row, err := one[snapshotRow](t.ctx, t, "snapshot", ruling.SnapshotID)
		if err != nil {
			return err
		}
		if same, err := t.ruled(row, ruling); same || err != nil {
			return err
		}
		return t.rule(row, ruling)
	})
}

// ruled says whether a ruling is recorded already, and why it cannot be.
func (t *tx) ruled(row snapshotRow, ruling dr.Ruling) (same bool, err error) {
	before, err := row.ruling()
	switch {
	case err != nil:
		return false, err
	case before != nil && before.Accept == ruling.Accept && before.By == ruling.By && before.Reason == ruling.Reason && before.At.Equal(ruling.At):
		return true, nil
	case row.State == dr.Expired:
		return false, dr.Follow(row.State, dr.Verified)
	case before == nil && row.HeldBy == "":
		return false, ErrNotHeld
	}
	server, err := one[serverRow](t.ctx, t, "server", row.ServerID)
	if err == nil && !ruling.Accept && server.LKG == row.ID {
		err = fmt.Errorf("it is last-known-good of %s: %w", server.Name, ErrInUse)
	}
	return false, err
}

func (t *tx) rule(row snapshotRow, ruling dr.Ruling) error {
	server, err := one[serverRow](t.ctx, t, "server", row.ServerID)
	if err != nil {
		return err
	}
	said, state := "accepted", row.State
	if !ruling.Accept {
		said, state = "refused", dr.Rejected
	} else if state == dr.Rejected {
		if v, err := t.newest(row.Verdict); err != nil {
			return err
		} else if v.Outcome == dr.Pass {
			state = dr.Verified
		}
	}
	if err := t.noteRuling(row.ID, ruling, state); err != nil {
		return err
	}
	if _, err := t.event(ruling.At, "snapshot."+said, server.ID, server.Name, row.ID, "%s %s by %s: %s", row.ID, said, ruling.By, ruling.Reason); err != nil {
		return err
	}
	released, held, err := t.rehold(server.ID)
	if err != nil {
		return err
	}
	if err := t.promoteReleased(released, server.ID); err != nil {
		return err
	}
	if held != "" {
		return nil
	}
	return t.closeTampering(server.ID, fmt.Sprintf("%s was %s by %s: %s", row.ID, said, ruling.By, ruling.Reason))
}

func (t *tx) noteRuling(id string, ruling dr.Ruling, state dr.State) error {
	data, err := text(ruling)
	if err != nil {
		return err
	}
	return t.do(`UPDATE snapshots SET ruling = ?, state = ? WHERE id = ?`, data, state, id)
}

// newest gives a verdict in brief; the zero one for "".
func (t *tx) newest(id string) (dr.Verdict, error) {
	if id == "" {
		return dr.Verdict{}, nil
	}
	row, err := one[verdictRow](t.ctx, t, "verdict", id)
	if err != nil {
		return dr.Verdict{}, err
	}
	return parse[dr.Verdict](row.Brief)
}

// rehold brings the holds of a server's snapshots up to date. It gives those that were held and are not any more, oldest
// first, and what the newest one is held by.
func (t *tx) rehold(serverID string) (released []snapshotRow, newest string, err error) {
	var rows []snapshotRow
	err = t.NewSelect().Model(&rows).Column("id", "server_id", "taken", "state", "verdict", "data", "held_by", "ruling").
		Where("server_id = ?", serverID).Order("seq").Scan(t.ctx)
	if err != nil {
		return nil, "", err
	}
	records := make([]dr.Record, len(rows))
	for i, row := range rows {
		if records[i].Snapshot, err = parse[dr.Snapshot](row.Data); err != nil {
			return nil, "", err
		}
		if records[i].Ruling, err = row.ruling(); err != nil {
			return nil, "", err
		}
	}
	holds := dr.Holds(records)
	for _, row := range rows {
		if row.State != dr.Expired {
			newest = holds[row.ID]
		}
		if row.HeldBy == holds[row.ID] {
			continue
		}
		if err := t.do(`UPDATE snapshots SET held_by = ? WHERE id = ?`, holds[row.ID], row.ID); err != nil {
			return nil, "", err
		}
		if holds[row.ID] == "" {
			row.HeldBy = ""
			released = append(released, row)
		}
	}
	return released, newest, nil
}

// promoteReleased moves last-known-good as the passes of released snapshots would have, had they not been held.
func (t *tx) promoteReleased(released []snapshotRow, serverID string) error {
	for _, row := range released {
		if row.State != dr.Verified {
			continue
		}
		var pass verdictRow
		err := t.NewSelect().Model(&pass).Where("snapshot_id = ? AND outcome = ?", row.ID, dr.Pass).Order("seq DESC").Limit(1).Scan(t.ctx)
		if errors.Is(err, sql.ErrNoRows) {
			continue
		}
		if err != nil {
			return err
		}
		server, err := one[serverRow](t.ctx, t, "server", serverID)
		if err != nil {
			return err
		}
		v, err := parse[dr.Verdict](pass.Brief)
		if err != nil {
			return err
		}
		if _, _, err := t.promote(v, row, server); err != nil {
			return err
		}
	}
	return nil
}

// hold looks what a snapshot that was just kept means for its server: the ticket that a person has to decide, or the end of it.
func (t *tx) hold(s dr.Snapshot) error {
	_, newest, err := t.rehold(s.ServerID)
	if err != nil {
		return err
	}
	row, err := one[snapshotRow](t.ctx, t, "snapshot", s.ID)
	if err != nil {
		return err
	}
	if row.HeldBy == "" {
		if newest == "" {
			return t.closeTampering(s.ServerID, "snapshot "+s.ID+" shows no more of it")
		}
		return nil
	}
	server, err := one[serverRow](t.ctx, t, "server", row.ServerID)
	if err != nil {
		return err
	}
	if _, err := t.event(t.now, "snapshot.held", server.ID, server.Name, row.ID, "snapshot %s of %s waits for a person: %s", row.ID, server.Name, evidence(s)); err != nil {
		return err
	}
	_, err = t.tampering(row, server, s, true)
	return err
}

// tampering gives the open ticket about a held snapshot; seen brings one that is open already up to date.
func (t *tx) tampering(row snapshotRow, server serverRow, s dr.Snapshot, seen bool) (dr.Ticket, error) {
	if !seen {
		var open []ticketRow
		err := t.NewSelect().Model(&open).Where("server_id = ? AND problem = ? AND closed = 0", server.ID, dr.ProblemTampering).Scan(t.ctx)
		if err != nil || len(open) > 0 {
			if err != nil {
				return dr.Ticket{}, err
			}
			return open[0].ticket(), nil
		}
	}
	detail := evidence(s)
	if row.HeldBy != row.ID {
		detail = fmt.Sprintf("it builds on %s, which nobody has accepted; %s", row.HeldBy, detail)
	}
	return t.openTicket(dr.Ticket{ServerID: server.ID, Server: server.Name, Problem: dr.ProblemTampering, Title: title(server.Name, dr.ProblemTampering),
		Detail:   detail + fmt.Sprintf(". Last-known-good stays until it is decided: 'muster snapshot accept %s' or 'muster snapshot refuse %s'", row.HeldBy, row.HeldBy),
		Snapshot: row.HeldBy}, t.now)
}

func evidence(s dr.Snapshot) string {
	var out []string
	for _, sign := range s.Evidence() {
		out = append(out, sign.Text)
	}
	if out == nil {
		return "it shows nothing new"
	}
	return strings.Join(out, "; ")
}

func (t *tx) closeTampering(serverID, reason string) error {
	return t.closeTickets(serverID, t.now, reason, func(row ticketRow) (bool, error) { return row.Problem == dr.ProblemTampering, nil })
}

// stay says that a snapshot passed and last-known-good stays all the same.
func (t *tx) stay(row snapshotRow, server serverRow) (dr.Ticket, error) {
	_, err := t.event(t.now, "lkg.held", server.ID, server.Name, row.ID, "snapshot %s of %s passed its test and does not become last-known-good: %s waits for a person", row.ID, server.Name, row.HeldBy)
	if err != nil {
		return dr.Ticket{}, err
	}
	s, err := parse[dr.Snapshot](row.Data)
	if err != nil {
		return dr.Ticket{}, err
	}
	return t.tampering(row, server, s, false)
}

func (row snapshotRow) ruling() (*dr.Ruling, error) {
	if row.Ruling == "" {
		return nil, nil //nolint:nilnil // nobody said anything
	}
	r, err := parse[dr.Ruling](row.Ruling)
	return &r, err
}
