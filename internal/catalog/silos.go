package catalog

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/uptrace/bun"

	"github.com/musterdr/muster/internal/dr"
)

type siloRow struct {
	bun.BaseModel `bun:"table:silos"`
	Name          string `bun:",pk"`
	State         dr.SiloState
	Beats         int64
	Seen          int64
	Data          string
}

func (row siloRow) silo() (dr.Silo, error) {
	s, err := parse[dr.Silo](row.Data)
	s.State, s.Beats, s.Seen = row.State, row.Beats, instant(row.Seen)
	return s, err
}

func (t *tx) silo(name string) (siloRow, error) {
	var rows []siloRow
	err := t.NewSelect().Model(&rows).Where("name = ?", name).Scan(t.ctx)
	if err == nil && len(rows) == 0 {
		err = fmt.Errorf("silo %s: %w", name, ErrNotFound)
	}
	if err != nil {
		return siloRow{}, err
	}
	return rows[0], nil
}

// Beat records that a silo was heard of, and what it says of itself. One that is not known joins; one that was lost is back, and
// back says so. Its leases are renewed until the given instant. Its state is otherwise not its own to say.
func (c *Catalog) Beat(ctx context.Context, s dr.Silo, until time.Time) (now dr.Silo, back bool, err error) {
	err = c.write(ctx, "hear of silo "+s.Name, func(t *tx) error {
		now, back = s, false
		if err := s.Validate(); err != nil {
			return err
		}
		before, err := t.silo(s.Name)
		switch {
		case errors.Is(err, ErrNotFound):
			now.State, back = dr.SiloActive, true
			if _, err := t.event(t.now, "silo.joined", "", "", s.Name, "silo %s joined: %s", s.Name, s.Describe()); err != nil {
				return err
			}
		case err != nil:
			return err
		case before.State == dr.SiloLost:
			now.State, back = dr.SiloActive, true
			if _, err := t.event(t.now, "silo.back", "", "", s.Name, "silo %s is back", s.Name); err != nil {
				return err
			}
		default:
			now.State = before.State
		}
		now.Beats, now.Seen = before.Beats+1, t.now.UTC()
		if err := t.putSilo(now); err != nil {
			return err
		}
		return t.do(`UPDATE leases SET expires = ? WHERE silo = ? AND expires <> 0`, stamp(until), s.Name)
	})
	return now, back, err
}

func (t *tx) putSilo(s dr.Silo) error {
	data, err := text(s)
	if err != nil {
		return err
	}
	return t.do(`INSERT INTO silos (name, state, beats, seen, data) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET state = excluded.state, beats = excluded.beats, seen = excluded.seen, data = excluded.data`,
		s.Name, s.State, s.Beats, stamp(s.Seen), data)
}

// Silos gives every silo, by name.
func (c *Catalog) Silos(ctx context.Context) ([]dr.Silo, error) {
	var rows []siloRow
	if err := c.db.NewSelect().Model(&rows).Order("name").Scan(ctx); err != nil {
		return nil, fmt.Errorf("list silos: %w", err)
	}
	return parseAll(rows, siloRow.silo)
}

// Drain lets a silo take no new work, or work again. One that is lost is not known to do either: ErrInUse.
func (c *Catalog) Drain(ctx context.Context, name string, drain bool, why string) error {
	return c.write(ctx, "drain silo "+name, func(t *tx) error {
		row, err := t.silo(name)
		if err != nil {
			return err
		}
		to, kind, message := dr.SiloActive, "silo.resumed", "silo %s takes work again%s"
		if drain {
			to, kind, message = dr.SiloDraining, "silo.draining", "silo %s takes no new work%s"
		}
		switch row.State {
		case to:
			return nil
		case dr.SiloLost:
			return fmt.Errorf("silo %s is lost: %w", name, ErrInUse)
		}
		if err := t.do(`UPDATE silos SET state = ? WHERE name = ?`, to, name); err != nil {
			return err
		}
		if why != "" {
			why = ": " + why
		}
		_, err = t.event(t.now, kind, "", "", name, message, name, why)
		return err
	})
}

// RemoveSilo forgets a silo. ErrInUse while it has leases.
func (c *Catalog) RemoveSilo(ctx context.Context, name string) error {
	return c.write(ctx, "remove silo "+name, func(t *tx) error {
		if _, err := t.silo(name); err != nil {
			return err
		}
		leases, err := t.leases("silo = ?", name)
		if err != nil {
			return err
		}
		if len(leases) > 0 {
			return fmt.Errorf("silo %s has %s %s of %s: %w", name, leases[0].Work.Kind, leases[0].Work.ID, leases[0].Work.Server, ErrInUse)
		}
		for _, query := range []string{`DELETE FROM deltas WHERE silo = ?`, `DELETE FROM silos WHERE name = ?`} {
			if err := t.do(query, name); err != nil {
				return err
			}
		}
		_, err = t.event(t.now, "silo.removed", "", "", name, "silo %s was removed", name)
		return err
	})
}

// LoseSilo records that a silo is lost, unless it was heard of since beats. Its tests and pre-recoveries are free to be given to
// others, once: they are taken. What it runs for real stays its own, and is left. Said again it does nothing.
func (c *Catalog) LoseSilo(ctx context.Context, name string, beats int64) (taken, left []dr.Lease, err error) {
	err = c.write(ctx, "lose silo "+name, func(t *tx) error {
		taken, left = nil, nil
		row, err := t.silo(name)
		if err != nil || row.Beats != beats || row.State == dr.SiloLost {
			return err
		}
		if err := t.do(`UPDATE silos SET state = ? WHERE name = ?`, dr.SiloLost, name); err != nil {
			return err
		}
		leases, err := t.leases("silo = ?", name)
		if err != nil {
			return err
		}
		if _, err := t.event(t.now, "silo.lost", "", "", name, "silo %s was last heard of at %s: it is lost, with %d pieces of work", name,
			instant(row.Seen).Format(time.RFC3339), len(leases)); err != nil {
			return err
		}
		for _, l := range leases {
			if !l.Work.Kind.TakenOver() {
				left = append(left, l)
				continue
			}
			taken = append(taken, l)
			if err := t.do(`DELETE FROM leases WHERE work = ?`, l.Work.ID); err != nil {
				return err
			}
			if err := t.leaseEvent("lease.taken", l, "%s of %s was taken from silo %s, which is lost", l.Work.Kind, l.Work.Server, name); err != nil {
				return err
			}
		}
		return nil
	})
	return taken, left, err
}

// RecordDeltas records that a silo holds the deltas of a pre-recovery, with the digest of their content.
func (c *Catalog) RecordDeltas(ctx context.Context, pre, snapshot, silo, digest string) error {
	return c.write(ctx, "record deltas of "+pre, func(t *tx) error {
		return t.do(`INSERT INTO deltas (pre_recovery, silo, snapshot_id, digest) VALUES (?, ?, ?, ?)
			ON CONFLICT (pre_recovery, silo) DO UPDATE SET digest = excluded.digest`, pre, silo, snapshot, digest)
	})
}

// ForgetDeltas records that a silo does not hold them, or not as they were.
func (c *Catalog) ForgetDeltas(ctx context.Context, pre, silo string) error {
	return c.write(ctx, "forget deltas of "+pre, func(t *tx) error {
		return t.do(`DELETE FROM deltas WHERE pre_recovery = ? AND silo = ?`, pre, silo)
	})
}

// Where says which silos hold the deltas of these pre-recoveries, each with their digest.
func (c *Catalog) Where(ctx context.Context, pres ...string) (map[string]map[string]string, error) {
	out := map[string]map[string]string{}
	for part := range slices.Chunk(pres, MaxList) {
		var rows []struct{ PreRecovery, Silo, Digest string }
		err := c.db.NewRaw(`SELECT pre_recovery, silo, digest FROM deltas WHERE pre_recovery IN (?)`, bun.List(part)).Scan(ctx, &rows)
		if err != nil {
			return nil, fmt.Errorf("look for deltas: %w", err)
		}
		for _, row := range rows {
			if out[row.PreRecovery] == nil {
				out[row.PreRecovery] = map[string]string{}
			}
			out[row.PreRecovery][row.Silo] = row.Digest
		}
	}
	return out, nil
}

// Held counts the last-known-goods of which each silo holds the deltas.
func (c *Catalog) Held(ctx context.Context) (map[string]int, error) {
	var rows []struct {
		Silo string
		N    int
	}
	err := c.db.NewRaw(`SELECT d.silo AS silo, COUNT(DISTINCT s.id) AS n FROM servers s JOIN deltas d ON d.snapshot_id = s.lkg
		WHERE s.removed = 0 AND s.lkg <> '' GROUP BY d.silo`).Scan(ctx, &rows)
	if err != nil {
		return nil, fmt.Errorf("count deltas: %w", err)
	}
	out := map[string]int{}
	for _, row := range rows {
		out[row.Silo] = row.N
	}
	return out, nil
}

// Thin is a last-known-good whose deltas fewer than dr.DeltaCopies active silos hold.
type Thin struct {
	ServerID    string
	SnapshotID  string
	PreRecovery string
}

// Thin lists them.
func (c *Catalog) Thin(ctx context.Context) ([]Thin, error) {
	var rows []Thin
	err := c.db.NewRaw(`SELECT s.id AS server_id, s.lkg AS snapshot_id, v.pre_recovery AS pre_recovery
		FROM servers s JOIN verdicts v ON v.snapshot_id = s.lkg AND v.outcome = ?
		WHERE s.removed = 0 AND s.lkg <> ''
		AND v.seq = (SELECT MAX(seq) FROM verdicts WHERE snapshot_id = s.lkg AND outcome = ?)
		AND (SELECT COUNT(*) FROM deltas d JOIN silos x ON x.name = d.silo WHERE d.pre_recovery = v.pre_recovery AND x.state = ?) < ?
		ORDER BY s.id`, dr.Pass, dr.Pass, dr.SiloActive, dr.DeltaCopies).Scan(ctx, &rows)
	if err != nil {
		return nil, fmt.Errorf("look for deltas that few hold: %w", err)
	}
	return rows, nil
}
