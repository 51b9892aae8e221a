package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/uptrace/bun"

	"github.com/musterdr/muster/internal/dr"
)

// RecordSnapshot records a snapshot that is kept, and closes the server's ticket about captures that failed. If it is
// held it opens the ticket about that; if it ends a hold it closes it. Recorded again it does nothing.
func (c *Catalog) RecordSnapshot(ctx context.Context, s dr.Snapshot) error {
	return c.write(ctx, "record snapshot "+s.ID, func(t *tx) error {
		added, err := t.recordSnapshot(s)
		if err != nil || !added {
			return err
		}
		if err := t.hold(s); err != nil {
			return err
		}
		return t.closeTickets(s.ServerID, t.now, "snapshot "+s.ID+" was kept", func(row ticketRow) (bool, error) {
			return row.Problem == dr.ProblemCapture, nil
		})
	})
}

func (t *tx) recordSnapshot(s dr.Snapshot) (added bool, err error) {
	if err := dr.ValidateID(s.ID); err != nil {
		return false, err
	}
	before, err := one[snapshotRow](t.ctx, t, "snapshot", s.ID)
	switch {
	case err == nil && before.ServerID != s.ServerID:
		return false, fmt.Errorf("snapshot of server %s: %w", before.ServerID, ErrExists)
	case err == nil:
		return false, nil
	case !errors.Is(err, ErrNotFound):
		return false, err
	}
	// The server may have been removed while it was captured: what is kept is recorded all the same.
	server, err := one[serverRow](t.ctx, t, "server", s.ServerID)
	if err != nil {
		return false, err
	}
	inventory, err := text(s.Inventory)
	if err != nil {
		return false, err
	}
	s.Inventory = dr.Inventory{}
	data, err := text(s)
	if err != nil {
		return false, err
	}
	what := "snapshot"
	if s.IsData() {
		what = "data onto " + s.Image
	}
	seq, err := t.event(t.now, "snapshot.kept", s.ServerID, server.Name, s.ID, "%s of %s kept, %s consistent, %d bytes",
		what, server.Name, s.Consistency, s.Size())
	if err != nil {
		return false, err
	}
	if s.Kind == "" {
		s.Kind = dr.SnapshotImage
	}
	row := snapshotRow{ID: s.ID, ServerID: s.ServerID, Seq: seq, Taken: stamp(s.Taken), Recorded: stamp(t.now), State: dr.Kept, Kind: s.Kind, Image: s.Image,
		Data: data, Inventory: inventory}
	if row.Carries, err = t.carries(s); err != nil {
		return false, err
	}
	if _, err = t.NewInsert().Model(&row).Exec(t.ctx); err != nil {
		return false, err
	}
	if err := t.book(server, func(b *dr.Books) error { b.Snapshot(s); return nil }); err != nil {
		return false, err
	}
	if err := t.do(`UPDATE servers SET retest = 0 WHERE id = ? AND retest <> 0`, s.ServerID); err != nil { // it is the one to be tested now
		return false, err
	}
	return true, t.plan(s.ServerID)
}

// carries notes with the image of a new snapshot of data that it has some, and says whether a new image has: data may be recorded
// before its image.
func (t *tx) carries(s dr.Snapshot) (int64, error) {
	if s.Image != "" {
		return 0, t.do(`UPDATE snapshots SET carries = 1 WHERE id = ? AND carries = 0`, s.Image)
	}
	n, err := t.NewSelect().Model((*snapshotRow)(nil)).Where("image <> '' AND image = ?", s.ID).Limit(1).Count(t.ctx)
	return min(n, 1), err
}

// RecordReplicated records that a snapshot, which is recorded if need be, is in the far store, and how many bytes crossed the line
// for it. It says whether that is news.
func (c *Catalog) RecordReplicated(ctx context.Context, s dr.Snapshot, sent int64) (fresh bool, err error) {
	err = c.write(ctx, "record replicated snapshot "+s.ID, func(t *tx) error {
		fresh = false // a transaction may be tried again
		added, err := t.recordSnapshot(s)
		if err != nil {
			return err
		}
		if added {
			if err := t.hold(s); err != nil {
				return err
			}
		}
		row, err := one[snapshotRow](t.ctx, t, "snapshot", s.ID)
		if err != nil || row.State != dr.Kept {
			return err
		}
		server, err := one[serverRow](t.ctx, t, "server", s.ServerID)
		if err != nil {
			return err
		}
		if _, err := t.event(t.now, "snapshot.replicated", server.ID, server.Name, s.ID, "snapshot %s of %s is in the far store, %d bytes crossed the line", s.ID, server.Name, sent); err != nil {
			return err
		}
		fresh = true
		if err := t.do(`UPDATE snapshots SET state = ?, arrived = ?, sent = ? WHERE id = ?`, dr.Replicated, stamp(t.now), sent, s.ID); err != nil {
			return err
		}
		if err := t.book(server, func(b *dr.Books) error { b.Arrival(t.now, sent); return nil }); err != nil {
			return err
		}
		return t.closeTickets(s.ServerID, t.now, "snapshot "+s.ID+" arrived", func(row ticketRow) (bool, error) {
			return row.Problem == dr.ProblemCapture || row.Problem == dr.ProblemSend, nil
		})
	})
	return fresh, err
}

// RecordPreRecovery records that a rescue image was made of a snapshot. Recorded again it does nothing.
func (c *Catalog) RecordPreRecovery(ctx context.Context, p dr.PreRecovery) error {
	return c.write(ctx, "record pre-recovery "+p.ID, func(t *tx) error {
		_, err := t.recordPreRecovery(p)
		return err
	})
}

func (t *tx) recordPreRecovery(p dr.PreRecovery) (added bool, err error) {
	if err := dr.ValidateID(p.ID); err != nil {
		return false, err
	}
	before, err := one[preRecoveryRow](t.ctx, t, "pre-recovery", p.ID)
	switch {
	case err == nil && before.SnapshotID != p.SnapshotID:
		return false, fmt.Errorf("pre-recovery of snapshot %s: %w", before.SnapshotID, ErrExists)
	case err == nil:
		return false, nil
	case !errors.Is(err, ErrNotFound):
		return false, err
	}
	snapshot, err := one[snapshotRow](t.ctx, t, "snapshot", p.SnapshotID)
	if err != nil {
		return false, err
	}
	if err := dr.Follow(snapshot.State, dr.PreRecovered); err != nil {
		return false, err
	}
	data, err := text(p)
	if err != nil {
		return false, err
	}
	brief, err := text(briefPreRecovery(p))
	if err != nil {
		return false, err
	}
	server, err := one[serverRow](t.ctx, t, "server", snapshot.ServerID)
	if err != nil {
		return false, err
	}
	seq, err := t.event(t.now, "snapshot.pre-recovered", server.ID, server.Name, p.SnapshotID,
		"rescue image of %s made: %d overlays, %d edits", server.Name, len(p.Overlays), len(p.Edits))
	if err != nil {
		return false, err
	}
	row := preRecoveryRow{ID: p.ID, SnapshotID: p.SnapshotID, Seq: seq, Brief: brief, Data: data}
	if _, err := t.NewInsert().Model(&row).Exec(t.ctx); err != nil {
		return false, err
	}
	return true, t.do(`UPDATE snapshots SET state = ?, pre_recovery = ? WHERE id = ?`, dr.PreRecovered, p.ID, p.SnapshotID)
}

// briefPreRecovery leaves out what grows with the image.
func briefPreRecovery(p dr.PreRecovery) dr.PreRecovery {
	p.Edits, p.Facts, p.Notes, p.Hardware.Reasons = nil, dr.Facts{}, nil, nil
	return p
}

// briefVerdict leaves out the answers and the evidence.
func briefVerdict(v dr.Verdict) dr.Verdict {
	v.Results, v.Evidence = nil, nil
	return v
}

// Expire records that snapshots are given up, all of them or none. ErrInUse for a last-known-good, for a snapshot
// that an active invocation runs, and for an image that data goes onto. One already expired is no error.
func (c *Catalog) Expire(ctx context.Context, snapshotIDs ...string) error {
	return c.write(ctx, "expire snapshots", func(t *tx) error {
		for _, id := range snapshotIDs {
			if err := t.expire(id); err != nil {
				return fmt.Errorf("snapshot %s: %w", id, err)
			}
		}
		return nil
	})
}

func (t *tx) expire(id string) error {
	row, err := one[snapshotRow](t.ctx, t, "snapshot", id)
	if err != nil || row.State == dr.Expired {
		return err
	}
	server, err := one[serverRow](t.ctx, t, "server", row.ServerID)
	if err != nil {
		return err
	}
	if server.LKG == id {
		return fmt.Errorf("it is last-known-good of %s: %w", server.Name, ErrInUse)
	}
	active, err := t.active(row.ServerID)
	if err != nil {
		return err
	}
	for _, a := range active {
		if a.SnapshotID == id {
			return fmt.Errorf("invocation %s runs it: %w", a.ID, ErrInUse)
		}
	}
	data, err := t.NewSelect().Model((*snapshotRow)(nil)).Where("image <> '' AND image = ? AND state <> ?", id, dr.Expired).Count(t.ctx)
	if err != nil {
		return err
	}
	if data > 0 {
		return fmt.Errorf("data of %d snapshots goes onto it: %w", data, ErrInUse)
	}
	if err := dr.Follow(row.State, dr.Expired); err != nil {
		return err
	}
	if err := t.do(`UPDATE snapshots SET state = ? WHERE id = ?`, dr.Expired, id); err != nil {
		return err
	}
	if err := t.do(`DELETE FROM deltas WHERE snapshot_id = ?`, id); err != nil {
		return err
	}
	if err := t.bookExpired(server, row); err != nil {
		return err
	}
	if _, err := t.event(t.now, "snapshot.expired", server.ID, server.Name, id, "snapshot %s of %s expired", id, server.Name); err != nil {
		return err
	}
	return t.plan(server.ID)
}

// listed is a snapshot's row together with what a listing shows of it.
type listed struct {
	snapshotRow  `bun:",extend"`
	PreBrief     string
	VerdictBrief string
	ServerLKG    string
}

// listing selects snapshots for a list: their inventories, edits and answers stay on disk.
func (c *Catalog) listing(rows *[]listed) *bun.SelectQuery {
	return c.db.NewSelect().Model(rows).ModelTableExpr("snapshots AS s").
		ColumnExpr("s.id, s.server_id, s.seq, s.taken, s.recorded, s.state, s.pre_recovery, s.verdict, s.data, s.held_by, s.ruling").
		ColumnExpr("COALESCE(p.brief, '') AS pre_brief, COALESCE(v.brief, '') AS verdict_brief, r.lkg AS server_lkg").
		Join("JOIN servers AS r ON r.id = s.server_id").
		Join("LEFT JOIN pre_recoveries AS p ON p.id = s.pre_recovery").
		Join("LEFT JOIN verdicts AS v ON v.id = s.verdict")
}

func (row listed) record() (dr.Record, error) {
	r := dr.Record{State: row.State, LKG: row.ServerLKG == row.ID, HeldBy: row.HeldBy}
	var err error
	if r.Ruling, err = row.ruling(); err != nil {
		return r, err
	}
	if r.Snapshot, err = parse[dr.Snapshot](row.Data); err != nil {
		return r, err
	}
	if row.PreBrief != "" {
		p, err := parse[dr.PreRecovery](row.PreBrief)
		if err != nil {
			return r, err
		}
		r.PreRecovery = &p
	}
	if row.VerdictBrief != "" {
		v, err := parse[dr.Verdict](row.VerdictBrief)
		if err != nil {
			return r, err
		}
		r.Verdict = &v
	}
	return r, nil
}

// Snapshots gives all snapshots of a server, expired ones too, newest first by the instant their disks show. Inventory,
// the edits and facts of pre-recovery, and the results and evidence of verdicts are left out: Snapshot has them.
func (c *Catalog) Snapshots(ctx context.Context, serverID string) ([]dr.Record, error) {
	var rows []listed
	if err := c.listing(&rows).Where("s.server_id = ?", serverID).OrderExpr("s.taken DESC, s.seq DESC").Scan(ctx); err != nil {
		return nil, fmt.Errorf("list snapshots of %s: %w", serverID, err)
	}
	return parseAll(rows, listed.record)
}

// TestsOverdue gives the snapshots of protected servers that were kept longer than grace before now and have no verdict
// at all, oldest first: their test did not run (R72). An image that data goes onto is tested with the data; one that arrived
// from an appliance after a newer one is not tested. They are given as Snapshots gives them, at most MaxList.
func (c *Catalog) TestsOverdue(ctx context.Context, now time.Time, grace time.Duration) ([]dr.Record, error) {
	var rows []listed
	err := c.listing(&rows).Where("s.verdict = '' AND s.carries = 0 AND s.state IN ('kept', 'replicated', 'pre-recovered')").
		Where("NOT (s.state = 'replicated' AND EXISTS (SELECT 1 FROM snapshots AS n WHERE n.server_id = s.server_id AND n.kind = s.kind"+
			" AND n.taken > s.taken AND n.state <> 'expired'))").
		Where("s.recorded <= ?", stamp(now.Add(-grace))).Where("r.removed = 0").
		OrderExpr("s.recorded, s.seq").Limit(MaxList).Scan(ctx)
	if err != nil {
		return nil, fmt.Errorf("list overdue tests: %w", err)
	}
	return parseAll(rows, listed.record)
}

// Snapshot gives all that is known of a snapshot.
func (c *Catalog) Snapshot(ctx context.Context, id string) (dr.Record, error) {
	row, err := one[snapshotRow](ctx, c.db, "snapshot", id)
	if err != nil {
		return dr.Record{}, err
	}
	return c.record(ctx, row, row.PreRecovery, row.Verdict)
}

// record reads a snapshot with a pre-recovery and a verdict, each in full; "" for none.
func (c *Catalog) record(ctx context.Context, row snapshotRow, pre, verdict string) (dr.Record, error) {
	r := dr.Record{State: row.State, HeldBy: row.HeldBy}
	server, err := one[serverRow](ctx, c.db, "server", row.ServerID)
	if err != nil {
		return r, err
	}
	r.LKG = server.LKG == row.ID
	if r.Ruling, err = row.ruling(); err != nil {
		return r, err
	}
	if r.Snapshot, err = parse[dr.Snapshot](row.Data); err != nil {
		return r, err
	}
	if r.Snapshot.Inventory, err = parse[dr.Inventory](row.Inventory); err != nil {
		return r, err
	}
	if pre != "" {
		made, err := c.PreRecovery(ctx, pre)
		if err != nil {
			return r, err
		}
		r.PreRecovery = &made
	}
	if verdict != "" {
		v, err := c.Verdict(ctx, verdict)
		if err != nil {
			return r, err
		}
		r.Verdict = &v
	}
	return r, nil
}

// PreRecovery gives one pre-recovery in full.
func (c *Catalog) PreRecovery(ctx context.Context, id string) (dr.PreRecovery, error) {
	row, err := one[preRecoveryRow](ctx, c.db, "pre-recovery", id)
	if err != nil {
		return dr.PreRecovery{}, err
	}
	return parse[dr.PreRecovery](row.Data)
}

// LastSnapshot gives the snapshot of a server that was recorded last and has not expired, in full; false if there is
// none. With a kind it gives the last of that kind. It is the last one in fact, also where a clock that was stepped back says otherwise.
func (c *Catalog) LastSnapshot(ctx context.Context, serverID string, kind dr.SnapshotKind) (dr.Record, bool, error) {
	var row snapshotRow
	find := c.db.NewSelect().Model(&row).Where("server_id = ? AND state <> ?", serverID, dr.Expired)
	if kind != "" {
		find = find.Where("kind = ?", kind)
	}
	err := find.Order("seq DESC").Limit(1).Scan(ctx)
	if errors.Is(err, sql.ErrNoRows) {
		return dr.Record{}, false, nil
	}
	if err != nil {
		return dr.Record{}, false, fmt.Errorf("look up the last snapshot of %s: %w", serverID, err)
	}
	r, err := c.record(ctx, row, row.PreRecovery, row.Verdict)
	return r, err == nil, err
}

// LKG gives last-known-good of a server, in full; false if it has none. Its pre-recovery and verdict are those of its
// last PASS: what was prepared or tested anew since, and did not pass, is not what is to be run.
func (c *Catalog) LKG(ctx context.Context, serverID string) (dr.Record, bool, error) {
	server, err := one[serverRow](ctx, c.db, "server", serverID)
	if err != nil || server.LKG == "" {
		return dr.Record{}, false, err
	}
	row, err := one[snapshotRow](ctx, c.db, "snapshot", server.LKG)
	if err != nil {
		return dr.Record{}, false, err
	}
	var pass verdictRow
	err = c.db.NewSelect().Model(&pass).Where("snapshot_id = ? AND outcome = ?", row.ID, dr.Pass).
		Order("seq DESC").Limit(1).Scan(ctx)
	if err != nil {
		return dr.Record{}, false, fmt.Errorf("look up the verdict of last-known-good %s: %w", row.ID, err)
	}
	r, err := c.record(ctx, row, pass.PreRecovery, pass.ID)
	return r, err == nil, err
}
