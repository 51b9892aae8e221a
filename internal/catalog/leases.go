package catalog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/uptrace/bun"

	"github.com/musterdr/muster/internal/dr"
)

// ErrStale is given to whoever acts for work that was given to somebody else meanwhile.
var ErrStale = errors.New("this work was given to somebody else meanwhile")

type leaseRow struct {
	bun.BaseModel `bun:"table:leases"`
	Work          string `bun:",pk"`
	Silo          string
	Kind          dr.WorkKind
	Term          int64
	Run           int64
	Granted       int64
	Expires       int64
	Data          string
}

func (row leaseRow) lease() (dr.Lease, error) {
	w, err := parse[dr.Work](row.Data)
	return dr.Lease{Work: w, Silo: row.Silo, Term: row.Term, Run: row.Run, Granted: instant(row.Granted), Expires: instant(row.Expires)}, err
}

func (t *tx) leases(where string, args ...any) ([]dr.Lease, error) {
	var rows []leaseRow
	if err := t.NewSelect().Model(&rows).Where(where, args...).Order("work").Scan(t.ctx); err != nil {
		return nil, err
	}
	return parseAll(rows, leaseRow.lease)
}

func (t *tx) leaseEvent(kind string, l dr.Lease, format string, args ...any) error {
	serverID, err := anyServerID(t.ctx, t, l.Work.Server)
	if err != nil {
		return err
	}
	_, err = t.event(t.now, kind, serverID, l.Work.Server, l.Work.ID, format, args...)
	return err
}

// Grant gives a silo a piece of work under a new term, the highest there ever was. It asks again what placement decided from a
// state that may have passed: the silo takes work and has room beside its leases (else ErrInUse). A lease that the work has
// already is replaced if the silo is the same; another silo's, of the same run or a later one, is not: ErrStale. That of an
// earlier run is taken, unless it is an invocation's.
func (c *Catalog) Grant(ctx context.Context, w dr.Work, silo string, run int64, until time.Time) (dr.Lease, error) {
	var lease dr.Lease
	err := c.write(ctx, "grant "+w.ID+" to silo "+silo, func(t *tx) error {
		row, err := t.silo(silo)
		if err != nil {
			return err
		}
		s, err := row.silo()
		if err != nil {
			return err
		}
		before, err := t.leases("work = ?", w.ID)
		if err != nil {
			return err
		}
		again := len(before) == 1 && before[0].Silo == silo
		switch {
		case len(before) == 0:
		case before[0].Run > run, !again && (before[0].Run == run || !w.Kind.TakenOver()):
			return fmt.Errorf("silo %s has it under term %d: %w", before[0].Silo, before[0].Term, ErrStale)
		}
		if !again { // else it has the room, and finishes what it has though it drains
			others, err := t.leases("silo = ?", silo)
			if err != nil {
				return err
			}
			if err := dr.Fits(w, s, others); err != nil {
				return fmt.Errorf("%w: %w", err, ErrInUse)
			}
		}
		lease = dr.Lease{Work: w, Silo: silo, Run: run, Granted: t.now.UTC(), Expires: until}
		if !w.Kind.TakenOver() {
			lease.Expires = time.Time{}
		}
		return t.putLease(&lease)
	})
	return lease, err
}

func (t *tx) putLease(l *dr.Lease) error {
	if err := t.NewRaw(`SELECT value FROM counters WHERE name = 'lease'`).Scan(t.ctx, &l.Term); err != nil {
		return err
	}
	l.Term++
	if err := t.do(`UPDATE counters SET value = ? WHERE name = 'lease'`, l.Term); err != nil {
		return err
	}
	data, err := text(l.Work)
	if err != nil {
		return err
	}
	return t.do(`INSERT INTO leases (work, silo, kind, term, run, granted, expires, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (work) DO UPDATE SET silo = excluded.silo, term = excluded.term, run = excluded.run, granted = excluded.granted,
		expires = excluded.expires, data = excluded.data`,
		l.Work.ID, l.Silo, l.Work.Kind, l.Term, l.Run, stamp(l.Granted), stamp(l.Expires), data)
}

// SwapLeases lets two pieces of work change their silos, both under new terms, or neither: ErrStale if one of the leases is over.
func (c *Catalog) SwapLeases(ctx context.Context, a, b dr.Lease) error {
	return c.write(ctx, "swap "+a.Work.ID+" and "+b.Work.ID, func(t *tx) error {
		a, b := a, b
		a.Silo, b.Silo = b.Silo, a.Silo
		for _, l := range []*dr.Lease{&a, &b} {
			if err := t.holds(*l); err != nil {
				return err
			}
			l.Granted = t.now.UTC()
			if err := t.putLease(l); err != nil {
				return err
			}
		}
		return nil
	})
}

// EndLease gives a lease back. One that is not there any more, or has another term, is left as it is.
func (c *Catalog) EndLease(ctx context.Context, work string, term int64) error {
	return c.write(ctx, "end lease of "+work, func(t *tx) error {
		return t.do(`DELETE FROM leases WHERE work = ? AND term = ?`, work, term)
	})
}

// Leases gives every lease.
func (c *Catalog) Leases(ctx context.Context) ([]dr.Lease, error) {
	var rows []leaseRow
	if err := c.db.NewSelect().Model(&rows).Order("work").Scan(ctx); err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	return parseAll(rows, leaseRow.lease)
}

// LeaseOf gives the lease of a piece of work; false if it has none.
func (c *Catalog) LeaseOf(ctx context.Context, work string) (dr.Lease, bool, error) {
	var rows []leaseRow
	err := c.db.NewSelect().Model(&rows).Where("work = ?", work).Scan(ctx)
	if err != nil || len(rows) == 0 {
		return dr.Lease{}, false, err
	}
	l, err := rows[0].lease()
	return l, err == nil, err
}

// Under gives a view of the catalog that writes only as long as a lease holds: a verb of one whose work was given to somebody else
// meanwhile is ErrStale and changes nothing. That is asked in the verb's own transaction.
func (c *Catalog) Under(l dr.Lease) *Catalog {
	view := *c
	view.under = &l
	return &view
}

// holds refuses a transaction under a lease that is over.
func (t *tx) holds(l dr.Lease) error {
	now, err := t.leases("work = ?", l.Work.ID)
	if err != nil {
		return err
	}
	if len(now) == 0 || now[0].Term != l.Term {
		return fmt.Errorf("act for %s under term %d: %w", l.Work.ID, l.Term, ErrStale)
	}
	return nil
}
