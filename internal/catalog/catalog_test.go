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
)

func TestMain(m *testing.M) { catalogtest.Main(m) }

func sqliteFile(t *testing.T) string { return filepath.Join(t.TempDir(), "catalog.db") }

func TestSQLite(t *testing.T) {
	t.Parallel()
	catalogtest.Run(t, sqliteFile)
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
