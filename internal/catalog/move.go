package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/uptrace/bun"

	"github.com/musterdr/muster/internal/database"
)

// ErrNotEmpty says that a catalog cannot be copied to where another one is.
var ErrNotEmpty = errors.New("there is another catalog already")

// Copy copies a catalog, whatever database it is in, to an empty one of the same release: all of it, compared row by row,
// or nothing. Nobody may write into the old one meanwhile; it stays as it is. Where the same catalog is already, nothing is
// done: a copy that was made once need not be made again.
func Copy(ctx context.Context, from, to *Catalog, progress func(t database.Table)) ([]database.Table, error) {
	tables, err := copied(ctx, from)
	if err != nil {
		return nil, fmt.Errorf("copy catalog: %w", err)
	}
	there, err := copied(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("copy catalog: %w", err)
	}
	// Those of the new one are in the order in which it can take them.
	if a, b := slices.Sorted(slices.Values(tables)), slices.Sorted(slices.Values(there)); !slices.Equal(a, b) {
		return nil, fmt.Errorf("copy catalog: the tables are %s here and %s there: bring both to one release", strings.Join(a, ", "), strings.Join(b, ", "))
	}
	tables = there
	// One transaction on each side: what is read is of one instant, and what is written is there in full or not at all.
	source, err := from.db.BeginTx(ctx, &sql.TxOptions{Isolation: from.snapshot()})
	if err != nil {
		return nil, fmt.Errorf("copy catalog: %w", err)
	}
	defer func() { _ = source.Rollback() }()
	target, err := to.db.BeginTx(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("copy catalog: %w", err)
	}
	defer func() { _ = target.Rollback() }()
	a, b := database.Side{Querier: source.Tx, Postgres: from.postgres()}, database.Side{Querier: target.Tx, Postgres: to.postgres()}
	if done, err := same(ctx, a, b, tables); done != nil || err != nil {
		return done, err
	}
	// What every new catalog begins with.
	if _, err := target.Tx.ExecContext(ctx, `DELETE FROM counters`); err != nil {
		return nil, fmt.Errorf("copy catalog: %w", err)
	}
	out, err := database.Copy(ctx, a, b, tables, progress)
	if err != nil {
		return nil, fmt.Errorf("copy catalog: %w", err)
	}
	if err := target.Commit(); err != nil {
		return nil, fmt.Errorf("copy catalog: %w", err)
	}
	return out, nil
}

// same says what there is if both sides hold the same already, and refuses a target that holds anything else.
func same(ctx context.Context, from, to database.Side, tables []string) ([]database.Table, error) {
	equal, empty := true, true
	var out []database.Table
	for _, name := range tables {
		columns, err := database.Columns(ctx, to, name)
		if err != nil {
			return nil, err
		}
		a, err := database.Sum(ctx, from, name, columns)
		if err != nil {
			return nil, err
		}
		b, err := database.Sum(ctx, to, name, columns)
		if err != nil {
			return nil, err
		}
		equal = equal && a.Same(b)
		empty = empty && (b.Rows == 0 || name == "counters")
		out = append(out, b)
	}
	switch {
	case equal:
		return out, nil
	case empty:
		return nil, nil
	}
	return nil, fmt.Errorf("copy catalog: %w", ErrNotEmpty)
}

// copied lists the catalog's own tables: not that of the migrations, which the other side has, nor the engine's, which
// may be beside them in one database.
func copied(ctx context.Context, c *Catalog) ([]string, error) {
	all, err := database.Tables(ctx, database.Side{Querier: c.db.DB, Postgres: c.postgres()}, "")
	return slices.DeleteFunc(all, func(name string) bool {
		return name == "goose_db_version" || strings.HasPrefix(name, "muster_")
	}), err
}

func (c *Catalog) postgres() bool { return c.lock != "" }

// snapshot is the isolation in which all reads of a transaction see one instant. SQLite has no other.
func (c *Catalog) snapshot() sql.IsolationLevel {
	if c.postgres() {
		return sql.LevelRepeatableRead
	}
	return sql.LevelDefault
}

// MovedError says that a catalog is kept elsewhere now.
type MovedError struct{ Place string }

func (m *MovedError) Error() string { return "this catalog has moved to " + m.Place }

// Leave marks a catalog as moved: Open refuses it from now on, and says where it went. Nothing else of it changes.
func (c *Catalog) Leave(ctx context.Context, where string) error {
	err := c.db.RunInTx(ctx, nil, func(ctx context.Context, t bun.Tx) error {
		if _, err := t.ExecContext(ctx, `CREATE TABLE muster_moved (place TEXT NOT NULL)`); err != nil {
			return err
		}
		_, err := t.NewRaw(`INSERT INTO muster_moved (place) VALUES (?)`, where).Exec(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("mark catalog as moved: %w", err)
	}
	return nil
}

// moved says where a catalog went, if it did.
func moved(ctx context.Context, db *bun.DB, postgres bool) error {
	tables, err := database.Tables(ctx, database.Side{Querier: db.DB, Postgres: postgres}, "")
	if err != nil || !slices.Contains(tables, "muster_moved") {
		return err
	}
	var m MovedError
	if err := db.NewRaw(`SELECT place FROM muster_moved`).Scan(ctx, &m.Place); err != nil {
		return err
	}
	return &m
}

// Empty says whether nothing was ever written into a catalog.
func (c *Catalog) Empty(ctx context.Context) (bool, error) {
	tables, err := copied(ctx, c)
	if err != nil {
		return false, fmt.Errorf("look into catalog: %w", err)
	}
	for _, name := range tables {
		var n int
		if name == "counters" {
			continue
		}
		if err := c.db.NewRaw(`SELECT count(*) FROM ?`, bun.Ident(name)).Scan(ctx, &n); err != nil {
			return false, fmt.Errorf("look into catalog: %w", err)
		}
		if n > 0 {
			return false, nil
		}
	}
	return true, nil
}
