package catalog

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	"github.com/pressly/goose/v3"
	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/pgdialect"
	"github.com/uptrace/bun/dialect/sqlitedialect"
	_ "modernc.org/sqlite" // the driver "sqlite"
)

//go:embed migrations/*.sql
var migrations embed.FS

// openDatabase is the only place that knows which database holds the catalog: a file path is SQLite, a postgres:// URL
// is PostgreSQL. lock is the statement with which a write transaction keeps others out; "" where the database does.
func openDatabase(ctx context.Context, dsn string) (db *bun.DB, lock string, err error) {
	if strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://") {
		handle, err := sql.Open("pgx", dsn)
		if err != nil {
			return nil, "", err
		}
		if err := migrate(ctx, handle, goose.DialectPostgres); err != nil {
			return nil, "", errors.Join(err, handle.Close())
		}
		return bun.NewDB(handle, pgdialect.New()), `SELECT value FROM counters WHERE name = 'event' FOR UPDATE`, nil
	}
	handle, err := openSQLite(dsn)
	if err != nil {
		return nil, "", err
	}
	if err := migrate(ctx, handle, goose.DialectSQLite3); err != nil {
		return nil, "", errors.Join(err, handle.Close())
	}
	return bun.NewDB(handle, sqlitedialect.New()), "", nil
}

// openSQLite opens a file. Without these options most contended transactions fail, and the last ones may be gone after
// a power cut.
func openSQLite(path string) (*sql.DB, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	// Checks may hold passwords, so the file is the owner's alone; what SQLite puts beside it takes after it.
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := file.Close(); err != nil {
		return nil, err
	}
	options := "_txlock=immediate&_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)" +
		"&_pragma=foreign_keys(1)&_pragma=synchronous(FULL)"
	return sql.Open("sqlite", (&url.URL{Scheme: "file", Path: path, RawQuery: options}).String())
}

func migrate(ctx context.Context, handle *sql.DB, dialect goose.Dialect) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	provider, err := goose.NewProvider(dialect, handle, files)
	if err != nil {
		return err
	}
	// An older release would write what a newer one no longer reads.
	has, knows, err := provider.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("look at the tables: %w", err)
	}
	if has > knows {
		return fmt.Errorf("%w: its tables are of version %d, and this release knows %d", ErrNewer, has, knows)
	}
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("bring the tables up to date: %w", err)
	}
	return nil
}

// stamp and instant turn a time into a column's value and back. The zero time is 0.
func stamp(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func instant(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}
