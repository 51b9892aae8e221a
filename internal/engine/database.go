package engine

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
	_ "github.com/dbos-inc/dbos-transact-golang/dbos/driver/sqlite" // registers modernc.org/sqlite with the library
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/sethvargo/go-retry"
	"golang.org/x/sys/unix"

	store "github.com/musterdr/muster/internal/database"
)

// database is the only place that knows which database holds the runs.
type database struct {
	sql  *sql.DB
	lock *os.File      // SQLite only: held while the engine is open
	dsn  string        // PostgreSQL only
	pool *pgxpool.Pool // PostgreSQL only: the library's connections
	host *host         // PostgreSQL only: this process among those that share the database
}

// preparing is the number under which one process makes the tables while others that start wait.
const preparing = 0x6d75737465720001 // "muster", 1

// openDatabase opens a file path as SQLite, which keeps every other process out, or a postgres:// URL as PostgreSQL.
func openDatabase(dsn, name string, lease time.Duration) (*database, error) {
	if store.IsPostgres(dsn) {
		return openPostgres(dsn, name, lease)
	}
	path, err := filepath.Abs(dsn)
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
	handle, err := store.SQLite(path)
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	handle.SetMaxOpenConns(8)
	handle.SetMaxIdleConns(8)
	return &database{sql: handle, lock: lock}, nil
}

// Connections of one process to PostgreSQL, at most.
const (
	ownConnections     = 8
	libraryConnections = 20
)

// openPostgres prepares two pools, of ours and of the library. Every connection bears the host's name and is refused
// once the host is fenced: see host.
func openPostgres(dsn, name string, lease time.Duration) (*database, error) {
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, err
	}
	db := &database{dsn: dsn, host: newHost(name, lease)}
	config.ConnConfig.RuntimeParams["application_name"] = db.host.session()
	config.ConnConfig.ConnectTimeout = 10 * time.Second
	config.MaxConns = libraryConnections
	config.AfterConnect = db.host.admit
	db.sql = stdlib.OpenDB(*config.ConnConfig.Copy(), stdlib.OptionAfterConnect(db.host.admit))
	db.sql.SetMaxOpenConns(ownConnections)
	db.sql.SetMaxIdleConns(2)
	if db.pool, err = pgxpool.NewWithConfig(context.Background(), config); err != nil {
		return nil, errors.Join(err, db.sql.Close())
	}
	return db, nil
}

// shared says whether other processes may have the database open too.
func (db *database) shared() bool { return db.host != nil }

// prepare makes the tables, and then has the library make its own, while no other process does.
func (db *database) prepare(ctx context.Context, library func() error) error {
	if !db.shared() {
		if err := db.migrate(ctx, db.sql); err != nil {
			return err
		}
		return library()
	}
	return store.Exclusive(ctx, db.dsn, preparing, func(ctx context.Context, conn *pgx.Conn) error {
		plain, err := sql.Open("pgx", db.dsn) // the host's own connections are refused until it has joined
		if err != nil {
			return err
		}
		defer plain.Close()
		if err := db.migrate(ctx, plain); err != nil {
			return err
		}
		if err := db.host.join(ctx, conn); err != nil {
			return fmt.Errorf("join the masters: %w", err)
		}
		return library()
	})
}

// configure tells the workflow library where its rows are and who works on them.
func (db *database) configure(c *dbos.Config) {
	if db.shared() {
		c.SystemDBPool, c.ExecutorID = db.pool, db.host.id
		return
	}
	c.SQLiteSystemDB = db.sql
	c.ExecutorID = newHost("", 0).id // never that of an earlier process
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
	if db.pool != nil {
		db.pool.Close()
	}
	err := db.sql.Close()
	if db.lock != nil {
		// Not by closing alone: a program that is being started has the file as well until it runs.
		err = errors.Join(err, unix.Flock(int(db.lock.Fd()), unix.LOCK_UN), db.lock.Close())
	}
	return err
}

// The engine's own rows, in SQL that both databases speak: the last term given out, how often each run was started, and
// which runs are being carried out, on which key, by which host.
// The library counts attempts too, but a resumed run starts from nought there.
var schema = []string{
	`CREATE TABLE IF NOT EXISTS muster_engine_term (id INTEGER PRIMARY KEY, term BIGINT NOT NULL)`,
	`INSERT INTO muster_engine_term (id, term) VALUES (1, 0) ON CONFLICT (id) DO NOTHING`,
	`CREATE TABLE IF NOT EXISTS muster_engine_starts (run TEXT PRIMARY KEY, starts BIGINT NOT NULL, term BIGINT NOT NULL)`,
	`CREATE TABLE IF NOT EXISTS muster_engine_work (run TEXT PRIMARY KEY, key TEXT, host TEXT NOT NULL, term BIGINT NOT NULL,
		doing TEXT NOT NULL DEFAULT '')`,
	`CREATE UNIQUE INDEX IF NOT EXISTS muster_engine_work_key ON muster_engine_work (key)`,
	`CREATE TABLE IF NOT EXISTS muster_engine_hosts (id TEXT PRIMARY KEY, name TEXT NOT NULL, term BIGINT NOT NULL,
		lease BIGINT NOT NULL, beat BIGINT NOT NULL, fenced BIGINT NOT NULL)`,
}

// format numbers the form of the database: these rows and the library's. It grows when a release changes either so that the one
// before could not go on with it.
const format = 1

var formatSchema = []string{
	`CREATE TABLE IF NOT EXISTS muster_engine_format (id INTEGER PRIMARY KEY, format BIGINT NOT NULL)`,
	`INSERT INTO muster_engine_format (id, format) VALUES (1, 0) ON CONFLICT (id) DO NOTHING`,
}

func (db *database) migrate(ctx context.Context, handle *sql.DB) error {
	if err := execute(ctx, handle, formatSchema...); err != nil {
		return err
	}
	var has int64
	if err := handle.QueryRowContext(ctx, `SELECT format FROM muster_engine_format WHERE id = 1`).Scan(&has); err != nil {
		return fmt.Errorf("prepare the database of runs: %w", err)
	}
	if has > format {
		return fmt.Errorf("%w: its form is number %d, and this release knows %d", ErrNewer, has, format)
	}
	return execute(ctx, handle, append(schema, fmt.Sprintf(`UPDATE muster_engine_format SET format = %d WHERE id = 1`, format))...)
}

func execute(ctx context.Context, handle *sql.DB, statements ...string) error {
	for _, statement := range statements {
		if _, err := handle.ExecContext(ctx, statement); err != nil {
			return fmt.Errorf("prepare the database of runs: %w", err)
		}
	}
	return nil
}

var placeholder = regexp.MustCompile(`\$(\d+)`)

// q makes a statement with $1, $2 one for the database at hand.
func (db *database) q(statement string) string {
	if db.shared() {
		return statement
	}
	return placeholder.ReplaceAllString(statement, "?$1")
}

// term gives out the next term. The row is locked until the transaction ends: starts of runs follow each other.
func nextTerm(ctx context.Context, tx *sql.Tx) (term int64, err error) {
	err = tx.QueryRowContext(ctx, `UPDATE muster_engine_term SET term = term + 1 WHERE id = 1 RETURNING term`).Scan(&term)
	return term, err
}

// begin records one more start of a run and gives it its term, if nobody else carries it out and its key is free.
// Otherwise it says which run has to end first; that is the run itself if another host is still at it.
func (db *database) begin(ctx context.Context, run, key string) (term, starts int64, holder string, err error) {
	err = db.inTx(ctx, func(tx *sql.Tx) error {
		var err error
		if term, err = nextTerm(ctx, tx); err != nil {
			return err
		}
		if holder, err = db.holder(ctx, tx, run, key); err != nil || holder != "" {
			return err
		}
		if _, err := tx.ExecContext(ctx, db.q(`DELETE FROM muster_engine_work WHERE run = $1`), run); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, db.q(`INSERT INTO muster_engine_work (run, key, host, term) VALUES ($1, $2, $3, $4)`),
			run, sql.NullString{String: key, Valid: key != ""}, db.hostID(), term)
		if err != nil {
			return err
		}
		row := tx.QueryRowContext(ctx, db.q(`INSERT INTO muster_engine_starts (run, starts, term) VALUES ($1, 1, $2)
			ON CONFLICT (run) DO UPDATE SET starts = muster_engine_starts.starts + 1, term = excluded.term RETURNING starts`), run, term)
		return row.Scan(&starts)
	})
	return term, starts, holder, err
}

// holder says which run keeps another one from being carried out now.
func (db *database) holder(ctx context.Context, tx *sql.Tx, run, key string) (string, error) {
	rows, err := tx.QueryContext(ctx, db.q(`SELECT w.run, w.host, (SELECT count(*) FROM muster_engine_hosts h WHERE h.id = w.host AND h.fenced = 0)
		FROM muster_engine_work w WHERE w.run = $1 OR w.key = $2`), run, key)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	holder := ""
	for rows.Next() {
		var other, host string
		var alive int64
		if err := rows.Scan(&other, &host, &alive); err != nil {
			return "", err
		}
		if other != run || alive > 0 && host != db.hostID() {
			holder = other
		}
	}
	return holder, rows.Err()
}

func (db *database) hostID() string {
	if db.host == nil {
		return ""
	}
	return db.host.id
}

// end says that a run is no longer carried out, and its key free. term 0: whoever carried it out.
func (db *database) end(ctx context.Context, run string, term int64) error {
	return db.again(ctx, func() error {
		_, err := db.sql.ExecContext(ctx, db.q(`DELETE FROM muster_engine_work WHERE run = $1 AND (term = $2 OR $2 = 0)`), run, term)
		return err
	})
}

// inTx carries out a transaction, again if the database was restarted meanwhile.
func (db *database) inTx(ctx context.Context, do func(tx *sql.Tx) error) error {
	return db.again(ctx, func() error {
		tx, err := db.sql.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer func() { _ = tx.Rollback() }()
		if err := do(tx); err != nil {
			return err
		}
		return tx.Commit()
	})
}

// again repeats what failed because the database was out of reach, until it is back, ctx ends or this host is fenced.
func (db *database) again(ctx context.Context, do func() error) error {
	return retry.Do(ctx, retry.WithCappedDuration(time.Second, retry.NewExponential(20*time.Millisecond)), func(context.Context) error {
		err := do()
		if db.shared() && !errors.Is(err, errFenced) && store.Transient(err) {
			return retry.RetryableError(err)
		}
		return err
	})
}

// alone does something while no other process does it for the same subject. Its caller makes sure that this one does not.
func (db *database) alone(ctx context.Context, subject string, do func() error) error {
	if !db.shared() {
		return do()
	}
	tx, err := db.sql.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // gives the lock back
	if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock($1, hashtext($2))`, aloneClass, subject); err != nil {
		return err
	}
	return do()
}

// aloneClass keeps our locks apart from those of others.
const aloneClass = 0x6d757374 // "must"

// standing is what our own rows say of a run.
type standing struct {
	starts, term int64
	host         string // name of the host that carries it out, "" for none or for this process alone
	doing        doing
}

// doing is how far a run has come, as other hosts see it.
type doing struct {
	Step     string    `json:"step,omitempty"`
	Waiting  string    `json:"waiting,omitempty"`
	Progress *Progress `json:"progress,omitempty"`
}

// stands gives how often a run was started, its present term, and what it is doing on another host.
func (db *database) stands(ctx context.Context, run string) (st standing, err error) {
	var host, text sql.NullString
	err = db.again(ctx, func() error {
		row := db.sql.QueryRowContext(ctx, db.q(`SELECT s.starts, s.term, h.name, w.doing FROM muster_engine_starts s
			LEFT JOIN muster_engine_work w ON w.run = s.run LEFT JOIN muster_engine_hosts h ON h.id = w.host WHERE s.run = $1`), run)
		if err := row.Scan(&st.starts, &st.term, &host, &text); err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		return nil
	})
	if err != nil {
		return standing{}, err
	}
	st.host = host.String
	if text.String != "" {
		err = json.Unmarshal([]byte(text.String), &st.doing)
	}
	return st, err
}

// doings gives what all runs are doing on other hosts.
func (db *database) doings(ctx context.Context) (map[string]standing, error) {
	out := map[string]standing{}
	if !db.shared() {
		return out, nil
	}
	err := db.again(ctx, func() error {
		rows, err := db.sql.QueryContext(ctx, `SELECT w.run, w.doing, h.name FROM muster_engine_work w JOIN muster_engine_hosts h ON h.id = w.host`)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var run, text string
			var st standing
			if err := rows.Scan(&run, &text, &st.host); err != nil {
				return err
			}
			if text != "" {
				if err := json.Unmarshal([]byte(text), &st.doing); err != nil {
					return err
				}
			}
			out[run] = st
		}
		return rows.Err()
	})
	return out, err
}

// tell lets other hosts see how far a run has come. A run that is no longer ours stays as it is.
func (db *database) tell(ctx context.Context, run string, term int64, d doing) error {
	text, err := json.Marshal(d)
	if err != nil {
		return err
	}
	_, err = db.sql.ExecContext(ctx, db.q(`UPDATE muster_engine_work SET doing = $1 WHERE run = $2 AND term = $3`), string(text), run, term)
	return err
}

func (db *database) forget(ctx context.Context, run string) error {
	return db.again(ctx, func() error {
		_, err := db.sql.ExecContext(ctx, db.q(`DELETE FROM muster_engine_starts WHERE run = $1`), run)
		return err
	})
}
