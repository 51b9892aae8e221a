package engine_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/database/pgserver"
	"github.com/musterdr/muster/internal/engine/enginetest"
)

func TestKilledAtEveryPointOfEveryMode(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to kill some dozen processes")
	}
	server := pgserver.ForTest(t)
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
	enginetest.KillOne(t, prepared(t, pgserver.ForTest(t)))
}

func TestPostgresRestartedInTheMiddle(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to restart a server while others work")
	}
	server := pgserver.ForTest(t)
	enginetest.Disturb(t, server.Database(t), func() { server.Restart(t) })
}

// No host compares its clock with the database's or another's: it is the same to them whose clock is wrong.
func TestAClockIsTurnedByHours(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to turn the clock of a server")
	}
	libraries, _ := filepath.Glob("/usr/lib/*/faketime/libfaketime.so.1")
	if len(libraries) == 0 {
		t.Skip("libfaketime is not installed: run scripts/deps test")
	}
	ahead := filepath.Join(t.TempDir(), "ahead")
	set := func(hours int) {
		if err := os.WriteFile(ahead, fmt.Appendf(nil, "%+dh\n", hours), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	set(0)
	for dir := filepath.Dir(ahead); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil { // the server is another user's
			t.Fatal(err)
		}
	}
	server := pgserver.ForTest(t, "LD_PRELOAD="+libraries[0], "FAKETIME_TIMESTAMP_FILE="+ahead, "FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1")
	hours := []int{1, -1, 2, 0, -3}
	var seen []time.Duration
	turn := 0
	dsn := server.Database(t)
	enginetest.Disturb(t, dsn, func() {
		set(hours[turn%len(hours)])
		seen = append(seen, time.Until(server.Clock(t)).Round(time.Hour))
		if seen[turn] != time.Duration(hours[turn%len(hours)])*time.Hour {
			t.Errorf("the server's clock is %s ahead", seen[turn])
		}
		turn++
	})
}
