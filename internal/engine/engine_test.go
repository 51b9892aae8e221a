package engine_test

import (
	"path/filepath"
	"testing"

	"github.com/musterdr/muster/internal/engine/enginetest"
)

func TestMain(m *testing.M) { enginetest.Main(m) }

func sqliteFile(t *testing.T) string { return filepath.Join(t.TempDir(), "runs.db") }

func TestSQLite(t *testing.T) {
	t.Parallel()
	enginetest.Run(t, sqliteFile)
}

func TestARunKilledAtEveryPointIsUndoneAndNothingIsRepeated(t *testing.T) {
	t.Parallel()
	enginetest.Crash(t, sqliteFile(t), "fail")
}
