package engine_test

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

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
