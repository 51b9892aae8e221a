package engine_test

import (
	"os"
	"testing"

	"github.com/musterdr/muster/internal/database/pgtest"
	"github.com/musterdr/muster/internal/engine/enginetest"
)

func TestKilledAtEveryPointOfEveryMode(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to kill some dozen processes")
	}
	server := pgtest.Start(t)
	for kind, dsn := range map[string]func() string{"SQLite": func() string { return sqliteFile(t) }, "PostgreSQL": func() string { return server.Database(t) }} {
		for _, mode := range []string{"succeed", "fail", "cancel"} {
			t.Run(kind+", "+mode, func(t *testing.T) { enginetest.Crash(t, dsn(), mode) })
		}
		t.Run(kind+", any instant", func(t *testing.T) { enginetest.Kills(t, dsn(), 30) })
	}
}

func TestOneOfTwoHostsKilledAtEveryPoint(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to kill some dozen processes")
	}
	enginetest.KillOne(t, prepared(t, pgtest.Start(t)))
}
