package catalog_test

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/catalog/catalogtest"
	"github.com/musterdr/muster/internal/database/pgserver"
)

func TestMain(m *testing.M) { catalogtest.Main(m) }

func sqliteFile(t *testing.T) string { return filepath.Join(t.TempDir(), "catalog.db") }

func TestSQLite(t *testing.T) {
	t.Parallel()
	catalogtest.Run(t, sqliteFile)
}

func TestPostgres(t *testing.T) {
	t.Parallel()
	server := pgserver.ForTest(t)
	made := server.Database(t) // with its tables; making them takes longer than most tests
	c, err := catalog.Open(context.Background(), made)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	catalogtest.Run(t, func(t *testing.T) string { return server.Copy(t, made) })
	t.Run("it comes from SQLite in full or not at all", func(t *testing.T) {
		t.Parallel()
		catalogtest.Copies(t, sqliteFile(t), server.Copy(t, made))
	})
	t.Run("it goes to SQLite in full or not at all", func(t *testing.T) {
		t.Parallel()
		catalogtest.Copies(t, server.Copy(t, made), sqliteFile(t))
	})
	t.Run("processes that start and write at once", func(t *testing.T) {
		t.Parallel()
		catalogtest.Processes(t, server.Database(t))
	})
}

func TestACatalogKilledWhileItWritesIsWhole(t *testing.T) {
	t.Parallel()
	catalogtest.Crash(t, sqliteFile(t), 5)
}

func TestTheFileIsTheOwnersAlone(t *testing.T) {
	t.Parallel()
	path := sqliteFile(t)
	c, err := catalog.Open(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, name := range []string{path, path + "-wal"} { // checks may hold passwords
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

func TestACatalogOfANewerReleaseIsRefusedAndLeftAlone(t *testing.T) {
	t.Parallel()
	path := sqliteFile(t)
	c, err := catalog.Open(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, 1)`); err != nil {
		t.Fatal(err)
	}
	if _, err := catalog.Open(context.Background(), path); !errors.Is(err, catalog.ErrNewer) || !strings.Contains(err.Error(), "99999") {
		t.Errorf("opening it: %v", err)
	}
}
