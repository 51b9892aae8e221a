package engine_test

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/musterdr/muster/internal/database/pgserver"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/engine/enginetest"
)

func TestMain(m *testing.M) { enginetest.Main(m) }

// fresh is an empty database of runs, as a file's content: making its tables takes longer than most tests.
var fresh = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "engine")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	ctx, path := context.Background(), filepath.Join(dir, "runs.db")
	e, err := engine.Open(ctx, engine.Config{DSN: path, Version: "1"})
	if err != nil {
		return nil, err
	}
	if err := e.Close(ctx); err != nil {
		return nil, err
	}
	return os.ReadFile(path)
})

func sqliteFile(t *testing.T) string {
	t.Helper()
	content, err := fresh()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "runs.db")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSQLite(t *testing.T) {
	t.Parallel()
	enginetest.Run(t, sqliteFile)
	t.Run("a second process is kept out", func(t *testing.T) {
		t.Parallel()
		enginetest.Exclusive(t, sqliteFile(t))
	})
}

func TestPostgres(t *testing.T) {
	t.Parallel()
	server := pgserver.ForTest(t)
	dsn := prepared(t, server)
	enginetest.Run(t, dsn)
	enginetest.Hosts(t, dsn, func(t *testing.T) string { return server.Database(t) })
	t.Run("terms go on when it takes the place of a file", func(t *testing.T) {
		t.Parallel()
		enginetest.Moves(t, sqliteFile(t), dsn(t))
	})
	t.Run("terms go on when a file takes its place", func(t *testing.T) {
		t.Parallel()
		enginetest.Moves(t, dsn(t), sqliteFile(t))
	})
}

// prepared gives empty databases of runs, with their tables.
func prepared(t *testing.T, server pgserver.Tested) func(t *testing.T) string {
	t.Helper()
	made := server.Database(t)
	e, err := engine.Open(t.Context(), engine.Config{DSN: made, Version: "1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	return func(t *testing.T) string { return server.Copy(t, made) }
}

func TestACancelledRunKilledAtEveryPointIsUndoneAndNothingIsRepeated(t *testing.T) {
	t.Parallel()
	enginetest.Crash(t, sqliteFile(t), "cancel")
}

func TestADatabaseOfANewerReleaseIsRefusedAndLeftAlone(t *testing.T) {
	t.Parallel()
	path := sqliteFile(t)
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(`UPDATE muster_engine_format SET format = 99999`); err != nil {
		t.Fatal(err)
	}
	if _, err := engine.Open(context.Background(), engine.Config{DSN: path, Version: "1"}); !errors.Is(err, engine.ErrNewer) {
		t.Errorf("opening it: %v", err)
	}
	var has int64
	if err := db.QueryRow(`SELECT format FROM muster_engine_format`).Scan(&has); err != nil || has != 99999 {
		t.Errorf("it was changed: %d, %v", has, err)
	}
}
