package catalog_test

import (
	"os"
	"testing"

	"github.com/musterdr/muster/internal/catalog/catalogtest"
	"github.com/musterdr/muster/internal/database/pgserver"
)

func TestCatalogsKilledOftenWhileTheyWriteAreWhole(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to kill some dozen processes")
	}
	t.Run("SQLite", func(t *testing.T) { catalogtest.Crash(t, sqliteFile(t), 60) })
	t.Run("PostgreSQL", func(t *testing.T) { catalogtest.Crash(t, pgserver.ForTest(t).Database(t), 30) })
}
