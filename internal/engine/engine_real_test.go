package engine_test

import (
	"os"
	"testing"

	"github.com/musterdr/muster/internal/catalog/catalogtest"
	"github.com/musterdr/muster/internal/engine/enginetest"
)

func TestPostgres(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to run it against a real PostgreSQL")
	}
	dsn := catalogtest.Postgres(t)
	enginetest.Run(t, dsn)
	for _, mode := range []string{"succeed", "fail", "cancel"} {
		t.Run("killed at every point, "+mode, func(t *testing.T) { enginetest.Crash(t, dsn(t), mode) })
	}
	t.Run("killed at any instant", func(t *testing.T) { enginetest.Kills(t, dsn(t), 30) })
}

func TestSQLiteKilledAtEveryPointOfEveryMode(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to kill some dozen processes")
	}
	for _, mode := range []string{"succeed", "fail", "cancel"} {
		t.Run(mode, func(t *testing.T) { enginetest.Crash(t, sqliteFile(t), mode) })
	}
	t.Run("any instant", func(t *testing.T) { enginetest.Kills(t, sqliteFile(t), 30) })
}
