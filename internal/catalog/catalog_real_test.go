package catalog_test

import (
	"os"
	"testing"

	"github.com/musterdr/muster/internal/catalog/catalogtest"
)

func TestPostgres(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to run it against a real PostgreSQL")
	}
	dsn := catalogtest.Postgres(t)
	catalogtest.Run(t, dsn)
	t.Run("killed while it writes", func(t *testing.T) { catalogtest.Crash(t, dsn(t), 30) })
}

func TestSQLiteKilledOftenWhileItWrites(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to kill some dozen processes")
	}
	catalogtest.Crash(t, sqliteFile(t), 60)
}
