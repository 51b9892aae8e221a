package s3_test

import (
	"os"
	"testing"

	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/storetest"
)

func TestS3KeepsThePromisesOfAStore(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("takes a minute: set MUSTER_REAL=1")
	}
	g := start(t, t.TempDir())
	storetest.Run(t, func(t *testing.T) store.Driver { return g.bucket(t, false) })
}
