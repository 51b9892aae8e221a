package catalogtest

import (
	"context"
	"errors"
	"testing"

	"github.com/musterdr/muster/internal/catalog/pgserver"
)

// Postgres starts a PostgreSQL of the test's own and stops it when the test is over. What it returns gives the address of
// an empty database, another one at each call. The test is skipped where PostgreSQL is not installed.
func Postgres(t *testing.T) func(t *testing.T) string {
	t.Helper()
	server, err := pgserver.Start(context.Background(), "")
	if errors.Is(err, pgserver.ErrNotInstalled) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if said := server.Stop(); t.Failed() {
			t.Logf("PostgreSQL said: %s", said)
		}
	})
	return func(t *testing.T) string {
		t.Helper()
		address, err := server.Database(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		return address
	}
}
