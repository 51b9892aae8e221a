package engine

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
	_ "github.com/dbos-inc/dbos-transact-golang/dbos/driver/sqlite" // registers modernc.org/sqlite with the library
	_ "github.com/jackc/pgx/v5/stdlib"                              // the driver "pgx"
	"golang.org/x/sys/unix"
)

// database is the only place that knows which database holds the runs.
type database struct {
	sql   *sql.DB
	lock  *os.File  // SQLite only: held while the engine is open
	url   string    // PostgreSQL only: the library has connections of its own
	guard *sql.Conn // PostgreSQL only: the session that holds the advisory lock
}

// advisoryLock is the key of the PostgreSQL lock that one process holds on a database of runs.
const advisoryLock = 0x6d75737465720001 // "muster", 1

// openDatabase opens a file path as SQLite, a postgres:// URL as PostgreSQL, and keeps every other process out.
func openDatabase(ctx context.Context, dsn string) (*database, error) {
	var db *database
	var err error
	if strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://") {
		db, err = openPostgres(ctx, dsn)
	} else {
		db, err = openSQLite(dsn)
	}
	if err != nil {
		return nil, err
	}
	if err := db.migrate(ctx); err != nil {
		return nil, errors.Join(err, db.close())
	}
	return db, nil
}

// openSQLite opens a file. The options matter: without them most contended transactions fail, and a power cut may
// take what Start said was durable (synchronous=FULL).
func openSQLite(path string) (*database, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("%w: %s", ErrLocked, path)
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600) // inputs of runs are nobody else's business
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	_ = file.Close()
	options := "_txlock=immediate&_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)" +
		"&_pragma=foreign_keys(1)&_pragma=synchronous(FULL)"
	handle, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: path, RawQuery: options}).String())
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	handle.SetMaxOpenConns(8)
	handle.SetMaxIdleConns(8)
	return &database{sql: handle, lock: lock}, nil
}

func openPostgres(ctx context.Context, dsn string) (*database, error) {
	handle, err := sql.Open("pgx", dsn)
	if err != nil {
		return nil, err
	}
	db := &database{sql: handle, url: dsn}
	if db.guard, err = db.sql.Conn(ctx); err != nil {
		return nil, errors.Join(err, db.close())
	}
	held, err := db.takeLock(ctx)
	if err != nil {
		return nil, errors.Join(err, db.close())
	}
	if !held {
		return nil, errors.Join(ErrLocked, db.close())
	}
	return db, nil
}

// lockPatience is how long the server is given to notice that the last process is gone.
const lockPatience = 3 * time.Second

// takeLock takes the advisory lock, which the guard's session holds until it ends.
func (db *database) takeLock(ctx context.Context) (held bool, err error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(lockPatience); ; {
		err := db.guard.QueryRowContext(ctx, "SELECT pg_try_advisory_lock($1)", int64(advisoryLock)).Scan(&held)
		if err != nil || held {
			return held, err
		}
		select {
		case <-tick.C:
		case <-end:
			return false, nil
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

// configure tells the workflow library where its rows are.
func (db *database) configure(c *dbos.Config) {
	if db.url != "" {
		c.DatabaseURL = db.url
		return
	}
	c.SQLiteSystemDB = db.sql
}

// held says whether this process still has the database to itself. Only a PostgreSQL session can be lost.
func (db *database) held(ctx context.Context) error {
	if db.guard == nil {
		return nil
	}
	return db.guard.PingContext(ctx)
}

// answers asks the database something that it has to look up.
func (db *database) answers(ctx context.Context) error {
	var term int64
	if err := db.sql.QueryRowContext(ctx, `SELECT term FROM muster_engine_term WHERE id = 1`).Scan(&term); err != nil {
		return fmt.Errorf("ask the database of runs: %w", err)
	}
	return nil
}

func (db *database) close() error {
	var errs []error
	if db.guard != nil {
		_, _ = db.guard.ExecContext(context.Background(), "SELECT pg_advisory_unlock_all()")
		errs = append(errs, db.guard.Close())
	}
	errs = append(errs, db.sql.Close())
	if db.lock != nil {
		errs = append(errs, db.lock.Close()) // gives the flock back
	}
	return errors.Join(errs...)
}

// The engine's own rows, in SQL that both databases speak: the last term given out, and how often each run was started.
// The library counts attempts too, but a resumed run starts from nought there.
var schema = []string{
	`CREATE TABLE IF NOT EXISTS muster_engine_term (id INTEGER PRIMARY KEY, term BIGINT NOT NULL)`,
	`INSERT INTO muster_engine_term (id, term) VALUES (1, 0) ON CONFLICT (id) DO NOTHING`,
	`CREATE TABLE IF NOT EXISTS muster_engine_starts (run TEXT PRIMARY KEY, starts BIGINT NOT NULL, term BIGINT NOT NULL)`,
}

// format numbers the form of the database: these rows and the library's. It grows when a release changes either so that the one
// before could not go on with it.
const format = 1

var formatSchema = []string{
	`CREATE TABLE IF NOT EXISTS muster_engine_format (id INTEGER PRIMARY KEY, format BIGINT NOT NULL)`,
	`INSERT INTO muster_engine_format (id, format) VALUES (1, 0) ON CONFLICT (id) DO NOTHING`,
}

func (db *database) migrate(ctx context.Context) error {
	if err := db.execute(ctx, formatSchema...); err != nil {
		return err
	}
	var has int64
	if err := db.sql.QueryRowContext(ctx, `SELECT format FROM muster_engine_format WHERE id = 1`).Scan(&has); err != nil {
		return fmt.Errorf("prepare the database of runs: %w", err)
	}
	if has > format {
		return fmt.Errorf("%w: its form is number %d, and this release knows %d", ErrNewer, has, format)
	}
	return db.execute(ctx, append(schema, fmt.Sprintf(`UPDATE muster_engine_format SET format = %d WHERE id = 1`, format))...)
}

func (db *database) execute(ctx context.Context, statements ...string) error {
	for _, statement := range statements {
		if _, err := db.sql.ExecContext(ctx, statement); err != nil {
			return fmt.Errorf("prepare the database of runs: %w", err)
		}
	}
	return nil
}

var placeholder = regexp.MustCompile(`\$\d+`)

// q makes a statement with $1, $2 in order one for the database at hand.
func (db *database) q(statement string) string {
	if db.url != "" {
		return statement
	}
	return placeholder.ReplaceAllString(statement, "?")
}

// begin records one more start of a run and gives it its term.
func (db *database) begin(ctx context.Context, run string) (term, starts int64, err error) {
	tx, err := db.sql.BeginTx(ctx, nil)
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = tx.Rollback() }()
	row := tx.QueryRowContext(ctx, `UPDATE muster_engine_term SET term = term + 1 WHERE id = 1 RETURNING term`)
	if err := row.Scan(&term); err != nil {
		return 0, 0, err
	}
	row = tx.QueryRowContext(ctx, db.q(`INSERT INTO muster_engine_starts (run, starts, term) VALUES ($1, 1, $2)
		ON CONFLICT (run) DO UPDATE SET starts = muster_engine_starts.starts + 1, term = excluded.term RETURNING starts`), run, term)
	if err := row.Scan(&starts); err != nil {
		return 0, 0, err
	}
	return term, starts, tx.Commit()
}

// starts gives how often a run was started, and its present term.
func (db *database) starts(ctx context.Context, run string) (starts, term int64, err error) {
	row := db.sql.QueryRowContext(ctx, db.q(`SELECT starts, term FROM muster_engine_starts WHERE run = $1`), run)
	if err := row.Scan(&starts, &term); err != nil && !errors.Is(err, sql.ErrNoRows) {
		return 0, 0, err
	}
	return starts, term, nil
}

func (db *database) forget(ctx context.Context, run string) error {
	_, err := db.sql.ExecContext(ctx, db.q(`DELETE FROM muster_engine_starts WHERE run = $1`), run)
	return err
}

// guardEvery is how often it is checked that this process still has the database to itself.
const guardEvery = 5 * time.Second
