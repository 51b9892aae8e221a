package engine_test

import (
	"path/filepath"
	"testing"

	"github.com/musterdr/muster/internal/engine/enginetest"
)

func sqliteFile(t *testing.T) string { return filepath.Join(t.TempDir(), "runs.db") }

func TestSQLite(t *testing.T) { enginetest.Run(t, sqliteFile) }
