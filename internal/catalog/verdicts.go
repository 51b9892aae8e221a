package catalog

import (
	"context"
	"errors"
	"fmt"

	"github.com/musterdr/muster/internal/dr"
)

// Judged is what a verdict led to.
type Judged struct {
	Moved    bool       // last-known-good moved to the tested snapshot
	Previous string     // what it was before, if it moved; "" none
	Ticket   *dr.Ticket // the open problem the verdict stands for, as it is now; nil for none
}

// RecordVerdict records a verdict and all that follows from it, or nothing: the state of the snapshot, last-known-good,
// tickets opened, seen again and closed, and the events. Recorded again it changes nothing and says the same.
//
// A PASS must name a pre-recovery that is recorded: without it there would be nothing to run.
func (c *Catalog) RecordVerdict(ctx context.Context, v dr.Verdict) (Judged, error) {
	var judged Judged
	err := c.write(ctx, "record verdict "+v.ID, func(t *tx) error {
		before, err := one[verdictRow](t.ctx, t, "verdict", v.ID)
		switch {
		case err == nil && before.SnapshotID != v.SnapshotID:
			return fmt.Errorf("verdict on snapshot %s: %w", before.SnapshotID, ErrExists)
		case err == nil:
			judged, err = t.judged(before)
			return err
		case !errors.Is(err, ErrNotFound):
			return err
		}
		judged, err = t.judge(v, true)
		return err
	})
	return judged, err
}

// judge is the transaction of the design: it records the verdict with what it proves. Adopt, which records what was
// judged long ago, raises no tickets.
func (t *tx) judge(v dr.Verdict, raise bool) (Judged, error) {
	var judged Judged
	if err := dr.ValidateID(v.ID); err != nil {
		return judged, err
	}
	row, err := one[snapshotRow](t.ctx, t, "snapshot", v.SnapshotID)
	if err != nil {
		return judged, err
	}
	server, err := one[serverRow](t.ctx, t, "server", row.ServerID)
	if err != nil {
		return judged, err
	}
	if err := t.sound(v, row); err != nil {
		return judged, err
	}
	recent, err := t.recent(row.ServerID, max(dr.InconclusiveLimit, dr.RetestLimit))
	if err != nil {
		return judged, err
	}
	if err := t.storeVerdict(v, row, server); err != nil {
		return judged, err
	}
	if row.Taken >= server.ShownAt { // it is the newest
		if err := t.do(`UPDATE servers SET retest = ? WHERE id = ?`, stamp(dr.Retest(v, recent, t.now)), server.ID); err != nil {
			return judged, err
		}
	}
	if judged.Moved, judged.Previous, err = t.promote(v, row, server); err != nil || !raise {
		return judged, err
	}
	problem := dr.ProblemAfter(v, recent)
	if v.Outcome == dr.Pass {
		if err := t.passed(v, row, problem); err != nil {
			return judged, err
		}
	}
	var ticket dr.Ticket
	if v.Outcome == dr.Pass && row.HeldBy != "" {
		if ticket, err = t.stay(row, server); err != nil {
			return judged, err
		}
	}
	if problem == "" {
		return judged, t.note(&judged, v, ticket)
	}
	ticket, err = t.openTicket(dr.Ticket{ServerID: server.ID, Server: server.Name, Problem: problem,
		Title: title(server.Name, problem), Detail: v.Summary, Snapshot: row.ID}, t.now)
	if err != nil {
		return judged, err
	}
	return judged, t.note(&judged, v, ticket)
}

// note writes down to which ticket a verdict led, if to any.
func (t *tx) note(judged *Judged, v dr.Verdict, ticket dr.Ticket) error {
	if ticket.ID == "" {
		return nil
	}
	judged.Ticket = &ticket
	return t.do(`UPDATE verdicts SET ticket = ? WHERE id = ?`, ticket.ID, v.ID)
}

// sound refuses a verdict that cannot be one on this snapshot.
func (t *tx) sound(v dr.Verdict, row snapshotRow) error {
	if row.State == dr.Expired {
		return dr.Follow(row.State, dr.Verified)
	}
	ruling, err := row.ruling()
	if err != nil {
		return err
	}
	if after := dr.StateAfter(v, row.State, ruling); after != row.State {
		if err := dr.Follow(row.State, after); err != nil {
			return err
		}
	}
	if v.Outcome != dr.Pass {
		return nil
	}
	pre, err := one[preRecoveryRow](t.ctx, t, "pre-recovery", v.PreRecovery)
	if err == nil && pre.SnapshotID != v.SnapshotID {
		return fmt.Errorf("pre-recovery %s is of snapshot %s", pre.ID, pre.SnapshotID)
	}
	return err
}

// storeVerdict writes the verdict and what it proves of its snapshot.
func (t *tx) storeVerdict(v dr.Verdict, row snapshotRow, server serverRow) error {
	data, err := text(v)
	if err != nil {
		return err
	}
	brief, err := text(briefVerdict(v))
	if err != nil {
		return err
	}
	seq, err := t.event(t.now, "verdict.recorded", server.ID, server.Name, v.ID, "boot test of %s: %s %s: %s",
		row.ID, v.Outcome, v.Code, v.Summary)
	if err != nil {
		return err
	}
	_, err = t.NewInsert().Model(&verdictRow{ID: v.ID, SnapshotID: row.ID, ServerID: server.ID, Seq: seq, Outcome: v.Outcome,
		PreRecovery: v.PreRecovery, Brief: brief, Data: data}).Exec(t.ctx)
	if err != nil {
		return err
	}
	if err := t.do(`UPDATE servers SET outcome = ? WHERE id = ?`, v.Outcome, server.ID); err != nil {
		return err
	}
	if err := t.bookTest(server, v); err != nil {
		return err
	}
	ruling, err := row.ruling()
	if err != nil {
		return err
	}
	after := dr.StateAfter(v, row.State, ruling)
	if err := t.do(`UPDATE snapshots SET state = ?, verdict = ? WHERE id = ?`, after, v.ID, row.ID); err != nil {
		return err
	}
	if after == row.State {
		return nil
	}
	_, err = t.event(t.now, "snapshot."+string(after), server.ID, server.Name, row.ID, "snapshot %s of %s is %s", row.ID, server.Name, after)
	return err
}

// promote moves last-known-good if the verdict does.
func (t *tx) promote(v dr.Verdict, row snapshotRow, server serverRow) (moved bool, previous string, err error) {
	tested := dr.Snapshot{ID: row.ID, Taken: instant(row.Taken)}
	var present *dr.Snapshot
	if server.LKG != "" {
		lkg, err := one[snapshotRow](t.ctx, t, "snapshot", server.LKG)
		if err != nil {
			return false, "", err
		}
		present = &dr.Snapshot{ID: lkg.ID, Taken: instant(lkg.Taken)}
	}
	if !dr.Promotes(v, tested, row.HeldBy, present) {
		return false, "", nil
	}
	from := "nothing"
	if server.LKG != "" {
		from = server.LKG
	}
	seq, err := t.event(t.now, "lkg.moved", server.ID, server.Name, row.ID, "last-known-good of %s moved from %s to %s", server.Name, from, row.ID)
	if err != nil {
		return false, "", err
	}
	promotion := promotionRow{Seq: seq, ServerID: server.ID, SnapshotID: row.ID, Previous: server.LKG, VerdictID: v.ID, At: stamp(t.now)}
	if _, err := t.NewInsert().Model(&promotion).Exec(t.ctx); err != nil {
		return false, "", err
	}
	return true, server.LKG, t.do(`UPDATE servers SET lkg = ?, lkg_at = ? WHERE id = ?`, row.ID, row.Taken, server.ID)
}

// passed closes the tickets that a passing test proves gone: not the one it stands for itself, and none about a snapshot
// newer than the one that passed.
func (t *tx) passed(v dr.Verdict, row snapshotRow, still dr.Problem) error {
	return t.closeTickets(row.ServerID, t.now, "the boot test of "+row.ID+" passed", func(ticket ticketRow) (bool, error) {
		if !ticket.Problem.ClosedByPass() || ticket.Problem == still || ticket.Snapshot == "" {
			return ticket.Problem.ClosedByPass() && ticket.Problem != still, nil
		}
		about, err := one[snapshotRow](t.ctx, t, "snapshot", ticket.Snapshot)
		if errors.Is(err, ErrNotFound) { // one that was never kept
			return true, nil
		}
		return err == nil && about.Taken <= row.Taken, err
	})
}

// judged reads back what a recorded verdict led to.
func (t *tx) judged(row verdictRow) (Judged, error) {
	var judged Judged
	var promotions []promotionRow
	if err := t.NewSelect().Model(&promotions).Where("verdict_id = ?", row.ID).Scan(t.ctx); err != nil {
		return judged, err
	}
	if len(promotions) > 0 {
		judged.Moved, judged.Previous = true, promotions[0].Previous
	}
	if row.Ticket == "" {
		return judged, nil
	}
	ticket, err := one[ticketRow](t.ctx, t, "ticket", row.Ticket)
	if err != nil {
		return judged, err
	}
	out := ticket.ticket()
	judged.Ticket = &out
	return judged, nil
}

// recent gives a server's verdicts, newest first.
func (t *tx) recent(serverID string, n int64) ([]dr.Verdict, error) {
	var rows []verdictRow
	err := t.NewSelect().Model(&rows).Column("brief").Where("server_id = ?", serverID).Order("seq DESC").Limit(n).Scan(t.ctx)
	if err != nil {
		return nil, err
	}
	return parseAll(rows, func(row verdictRow) (dr.Verdict, error) { return parse[dr.Verdict](row.Brief) })
}

// Verdict gives one verdict, in full.
func (c *Catalog) Verdict(ctx context.Context, id string) (dr.Verdict, error) {
	row, err := one[verdictRow](ctx, c.db, "verdict", id)
	if err != nil {
		return dr.Verdict{}, err
	}
	return parse[dr.Verdict](row.Data)
}

// Verdicts gives the last verdicts on a server, newest first, in full: at most limit, or MaxList.
func (c *Catalog) Verdicts(ctx context.Context, serverID string, limit int) ([]dr.Verdict, error) {
	var rows []verdictRow
	err := c.db.NewSelect().Model(&rows).Column("data").Where("server_id = ?", serverID).Order("seq DESC").Limit(limited(limit)).Scan(ctx)
	if err != nil {
		return nil, fmt.Errorf("list verdicts on %s: %w", serverID, err)
	}
	return parseAll(rows, func(row verdictRow) (dr.Verdict, error) { return parse[dr.Verdict](row.Data) })
}

// Promotions gives every move of last-known-good of a server, newest first.
func (c *Catalog) Promotions(ctx context.Context, serverID string) ([]dr.Promotion, error) {
	var rows []promotionRow
	if err := c.db.NewSelect().Model(&rows).Where("server_id = ?", serverID).Order("seq DESC").Scan(ctx); err != nil {
		return nil, fmt.Errorf("list promotions of %s: %w", serverID, err)
	}
	return parseAll(rows, func(row promotionRow) (dr.Promotion, error) {
		return dr.Promotion{ServerID: row.ServerID, SnapshotID: row.SnapshotID, Previous: row.Previous,
			VerdictID: row.VerdictID, At: instant(row.At)}, nil
	})
}
