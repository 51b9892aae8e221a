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

func TestTheCacheKeepsToItsLimit(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("writes more than a cache holds: set MUSTER_REAL=1")
	}
	f := newFar(t, 40<<20, cached.MinLimit)
	for range 2 {
		f.read(t)
		if _, total := f.files(t); total > cached.MinLimit || total < cached.MinLimit/2 {
			t.Errorf("%d bytes are kept of %d", total, cached.MinLimit)
		}
	}
}
