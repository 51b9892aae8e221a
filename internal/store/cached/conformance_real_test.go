package cached_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/cached"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/storetest"
)

func TestACachedPlaceKeepsThePromisesOfAStore(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("takes half a minute: set MUSTER_REAL=1")
	}
	storetest.Run(t, func(t *testing.T) store.Driver {
		return cached.Driver{Driver: folder.Driver{Path: filepath.Join(t.TempDir(), "store")}, Dir: filepath.Join(t.TempDir(), "cache"), Limit: 256 << 20}
	})
}
