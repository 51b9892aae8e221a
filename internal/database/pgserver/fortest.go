package pgserver

import (
	"errors"
	"testing"
	"time"
)

// Tested is a server of a test's own: what does not work fails the test.
type Tested struct{ server *Server }

// ForTest starts a hasty server and stops it when the test is over. The test is skipped where PostgreSQL is not installed. env is
// added to the environment of the server.
func ForTest(t testing.TB, env ...string) Tested {
	t.Helper()
	s, err := Start(t.Context(), Config{Env: env, Hasty: true})
	if errors.Is(err, ErrNotInstalled) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if said := s.Stop(); t.Failed() {
			t.Logf("PostgreSQL said: %s", said)
		}
	})
	return Tested{s}
}

// Database makes an empty database and gives its address.
func (s Tested) Database(t testing.TB) string {
	t.Helper()
	address, err := s.server.Database(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return address
}

// Copy makes a database like another one, to which nobody may be connected.
func (s Tested) Copy(t testing.TB, address string) string {
	t.Helper()
	address, err := s.server.Copy(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	return address
}

// Clock is what the server's clock shows.
func (s Tested) Clock(t testing.TB) time.Time {
	t.Helper()
	now, err := s.server.Clock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// Restart ends the server at once, as a crash would, and starts it again.
func (s Tested) Restart(t testing.TB) {
	t.Helper()
	if err := s.server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}
