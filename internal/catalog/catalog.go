package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/uptrace/bun"

	"github.com/musterdr/muster/internal/dr"
)

// Errors of this package, matched with errors.Is.
var (
	ErrNotFound = errors.New("the catalog has no such thing")
	ErrExists   = errors.New("it exists already")
	ErrInUse    = errors.New("it is in use")
	ErrNewer    = errors.New("a newer release of Muster has written to it: install that one again, or go back to a copy from before")
)

// MaxList is the most rows a listing with a limit gives; it is also what a limit of 0 means.
const MaxList = 1000

// Catalog is an open catalog. Its methods may be called from many goroutines.
type Catalog struct {
	// Now is the clock for what carries no time of its own. It may step back: nothing is ordered by it.
	Now func() time.Time
	// Told, if set, is called with every event after the transaction that wrote it has taken effect, with the context of its
	// verb. It is set before the first verb, and must not call the catalog.
	Told func(ctx context.Context, e dr.Event)

	db    *bun.DB
	lock  string
	under *dr.Lease // see Under
}

// Open opens the catalog in a SQLite file, given by its path, or in a PostgreSQL database, given by its postgres:// URL.
// It makes or updates the tables; ErrNewer if a later release has updated them further, a *MovedError if it is kept
// elsewhere now.
func Open(ctx context.Context, dsn string) (*Catalog, error) {
	if dsn == "" {
		return nil, errors.New("open catalog: give the path of a file or a postgres:// URL")
	}
	db, lock, err := openDatabase(ctx, dsn)
	if err != nil {
		return nil, fmt.Errorf("open catalog: %w", err)
	}
	if err := moved(ctx, db, lock != ""); err != nil {
		return nil, errors.Join(fmt.Errorf("open catalog: %w", err), db.Close())
	}
	c := &Catalog{Now: time.Now, db: db, lock: lock}
	for _, work := range []func(context.Context) error{c.planAll, c.bookAll} { // what an older release did not keep
		if err := work(ctx); err != nil {
			return nil, errors.Join(fmt.Errorf("open catalog: %w", err), db.Close())
		}
	}
	return c, nil
}

// Close closes the catalog.
func (c *Catalog) Close() error { return c.db.Close() }

// tx is one write transaction. No other one is under way.
type tx struct {
	bun.Tx
	ctx context.Context
	seq int64 // the number last given to an event or row
	now time.Time

	events []dr.Event
}

// write carries out one verb: all of it or nothing.
func (c *Catalog) write(ctx context.Context, what string, verb func(t *tx) error) error {
	var events []dr.Event
	err := c.db.RunInTx(ctx, nil, func(ctx context.Context, inner bun.Tx) error {
		t := &tx{Tx: inner, ctx: ctx, now: c.Now()}
		if c.lock != "" {
			if _, err := t.ExecContext(ctx, c.lock); err != nil {
				return err
			}
		}
		if err := t.NewRaw(`SELECT value FROM counters WHERE name = 'event'`).Scan(ctx, &t.seq); err != nil {
			return err
		}
		if c.under != nil {
			if err := t.holds(*c.under); err != nil {
				return err
			}
		}
		before := t.seq
		if err := verb(t); err != nil {
			return err
		}
		if t.seq == before {
			return nil
		}
		events = t.events
		return t.do(`UPDATE counters SET value = ? WHERE name = 'event'`, t.seq)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if c.Told != nil {
		for _, e := range events {
			c.Told(ctx, e)
		}
	}
	return nil
}

func (t *tx) do(query string, args ...any) error {
	_, err := t.NewRaw(query, args...).Exec(t.ctx)
	return err
}

// event writes down what happened, and gives its number, by which what was written with it is ordered too.
func (t *tx) event(at time.Time, kind, serverID, server, subject, format string, args ...any) (int64, error) {
	t.seq++
	row := eventRow{Seq: t.seq, At: stamp(at), Kind: kind, ServerID: serverID, Server: server, Subject: subject,
		Message: fmt.Sprintf(format, args...)}
	t.events = append(t.events, row.event())
	_, err := t.NewInsert().Model(&row).Exec(t.ctx)
	return t.seq, err
}

// one reads one row by its id. ErrNotFound names what was looked for.
func one[Row any](ctx context.Context, db bun.IDB, what, id string) (Row, error) {
	var row Row
	err := db.NewSelect().Model(&row).Where("id = ?", id).Scan(ctx)
	if errors.Is(err, sql.ErrNoRows) {
		return row, fmt.Errorf("%s %s: %w", what, id, ErrNotFound)
	}
	return row, err
}

func parse[T any](data string) (T, error) {
	var v T
	if err := json.Unmarshal([]byte(data), &v); err != nil {
		return v, fmt.Errorf("read a row of the catalog: %w", err)
	}
	return v, nil
}

func text(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}

func limited(n int) int64 {
	if n <= 0 || n > MaxList {
		return MaxList
	}
	return int64(n)
}

// The rows of the tables.
type (
	serverRow struct {
		bun.BaseModel `bun:"table:servers"`
		ID            string `bun:",pk"`
		Name          string
		Data          string
		Appliance     string
		LKG           string `bun:"lkg"`
		LKGAt         int64  `bun:"lkg_at"`
		ShownAt       int64  // by the newest snapshot
		Outcome       dr.Outcome
		Removed       int64
		ImageAt       int64
		DataAt        int64
		LastAt        int64
		NewestAt      int64
		Due           int64
		Retest        int64 // when the inconclusive test of the newest snapshot is to be held again; 0: not
		Booked        int64 // 1: its history is in its books
	}
	snapshotRow struct {
		bun.BaseModel `bun:"table:snapshots"`
		ID            string `bun:",pk"`
		ServerID      string
		Seq           int64
		Taken         int64
		Recorded      int64
		Arrived       int64 // 0: it did not come over the line
		Sent          int64 // bytes that crossed the line for it
		State         dr.State
		Kind          dr.SnapshotKind
		Image         string
		Carries       int64 // 1: data goes onto it
		PreRecovery   string
		Verdict       string
		Data          string
		Inventory     string
		HeldBy        string
		Ruling        string
	}
	preRecoveryRow struct {
		bun.BaseModel `bun:"table:pre_recoveries"`
		ID            string `bun:",pk"`
		SnapshotID    string
		Seq           int64
		Brief         string
		Data          string
	}
	verdictRow struct {
		bun.BaseModel `bun:"table:verdicts"`
		ID            string `bun:",pk"`
		SnapshotID    string
		ServerID      string
		Seq           int64
		Outcome       dr.Outcome
		PreRecovery   string
		Ticket        string
		Brief         string
		Data          string
	}
	promotionRow struct {
		bun.BaseModel `bun:"table:promotions"`
		Seq           int64 `bun:",pk"`
		ServerID      string
		SnapshotID    string
		Previous      string
		VerdictID     string
		At            int64
	}
	ticketRow struct {
		bun.BaseModel `bun:"table:tickets"`
		ID            string `bun:",pk"`
		Seq           int64
		ServerID      string
		Server        string
		Problem       dr.Problem
		Title         string
		Detail        string
		Snapshot      string
		Opened        int64
		LastSeen      int64
		Count         int
		Closed        int64
		Reason        string
	}
	invocationRow struct {
		bun.BaseModel `bun:"table:invocations"`
		ID            string `bun:",pk"`
		Seq           int64
		ServerID      string
		SnapshotID    string
		State         dr.InvocationState
		Data          string
	}
	eventRow struct {
		bun.BaseModel `bun:"table:events"`
		Seq           int64 `bun:",pk"`
		At            int64
		Kind          string
		ServerID      string
		Server        string
		Subject       string
		Message       string
	}
)
