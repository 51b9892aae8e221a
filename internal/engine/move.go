package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
)

// ErrUnfinished says that a database of runs cannot be left: there is work under way.
var ErrUnfinished = errors.New("there are unfinished runs")

// termGap is added to the last term known when a database of runs is a copy, which may not be the newest: its terms must
// be above any that was given out since.
const termGap = 1 << 32

// Follow makes the database of runs at to, which may have no runs, one that follows the one at from: its terms go on above
// those given out there. Runs stay where they are: finished ones are history, and unfinished ones are refused, because a
// run that is half done belongs to the steps that were recorded of it. Nobody may have either database open.
func Follow(ctx context.Context, from, to string) error {
	if err := follow(ctx, from, to); err != nil {
		return fmt.Errorf("move runs: %w", err)
	}
	return nil
}

func follow(ctx context.Context, from, to string) error {
	term, err := idle(ctx, from)
	if err != nil {
		return err
	}
	return withClosed(ctx, to, func(e *Engine) error {
		if runs, err := e.List(ctx, Filter{Limit: 1}); err != nil || len(runs) > 0 {
			return errors.Join(err, when(len(runs) > 0, errors.New("there are runs already where they are to go")))
		}
		return e.db.raise(ctx, term)
	})
}

func when(so bool, err error) error {
	if so {
		return err
	}
	return nil
}

// idle gives the last term of a database in which nothing is unfinished.
func idle(ctx context.Context, dsn string) (term int64, err error) {
	err = withClosed(ctx, dsn, func(e *Engine) error {
		runs, err := e.List(ctx, Filter{Unfinished: true})
		if err != nil {
			return err
		}
		if len(runs) > 0 {
			var ids []string
			for _, r := range runs {
				ids = append(ids, r.ID)
			}
			return fmt.Errorf("%w: %s", ErrUnfinished, strings.Join(ids, ", "))
		}
		return e.db.sql.QueryRowContext(ctx, `SELECT term FROM muster_engine_term WHERE id = 1`).Scan(&term)
	})
	return term, err
}

// withClosed does something with an engine that carries out nothing. Others that share its database must be gone.
func withClosed(ctx context.Context, dsn string, do func(e *Engine) error) error {
	e, err := Open(ctx, Config{DSN: dsn, Version: "none", Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	err = func() error {
		if others, err := e.db.others(ctx); err != nil || len(others) > 0 {
			return errors.Join(err, when(len(others) > 0, fmt.Errorf("%w: stop %s", ErrLocked, strings.Join(others, ", "))))
		}
		return do(e)
	}()
	return errors.Join(err, e.Close(ctx))
}

// others names the other hosts that are connected.
func (db *database) others(ctx context.Context) ([]string, error) {
	if !db.shared() {
		return nil, nil
	}
	rows, err := db.sql.QueryContext(ctx, `SELECT DISTINCT COALESCE(NULLIF(h.name, ''), h.id) FROM muster_engine_hosts h
		JOIN pg_stat_activity a ON a.application_name = $1 || h.id WHERE h.id <> $2`, sessionPrefix, db.host.id)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return nil, err
		}
		out = append(out, name)
	}
	return out, rows.Err()
}

// raise makes the next term higher than one.
func (db *database) raise(ctx context.Context, term int64) error {
	_, err := db.sql.ExecContext(ctx, db.q(`UPDATE muster_engine_term SET term = $1 WHERE id = 1 AND term < $1`), term)
	return err
}

// Restored makes a database of runs that was put back from a copy ready to be used: whatever was begun after the copy was
// made has a lower term than what is begun now. Nobody may have it open.
func Restored(ctx context.Context, dsn string) error {
	err := withClosed(ctx, dsn, func(e *Engine) error {
		_, err := e.db.sql.ExecContext(ctx, e.db.q(`UPDATE muster_engine_term SET term = term + $1 WHERE id = 1`), termGap)
		return err
	})
	if err != nil {
		return fmt.Errorf("take over restored runs: %w", err)
	}
	return nil
}

// HostTable is the table of hosts, which no copy of the database needs: whoever was alive then is not of the copy.
const HostTable = "muster_engine_hosts"

// LibrarySchema is the schema in which the workflow library keeps its tables in PostgreSQL, and LibraryVersions the table
// in it that says which release made them.
const (
	LibrarySchema   = "dbos"
	LibraryVersions = "dbos_migrations"
)
