// Package pgtest is a PostgreSQL of a test's own: on a unix socket in a temporary folder, run by a user without rights,
// gone when the test is over, also if the test is killed.
package pgtest

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
)

// patience is how long a server is given to answer, or to end.
const patience = 60 * time.Second

// Server is a PostgreSQL of a test's own.
type Server struct {
	dir   string
	bin   string
	as    *syscall.Credential
	env   []string
	admin *sql.DB
	made  atomic.Int64

	cmd *exec.Cmd
	log bytes.Buffer
}

// Start starts a server, which takes about a second, and stops it when the test is over. The test is skipped where
// PostgreSQL is not installed. env is added to the environment of the server.
func Start(t testing.TB, env ...string) *Server {
	t.Helper()
	bins := installed()
	if len(bins) == 0 {
		t.Skip("PostgreSQL is not installed: run scripts/deps test")
	}
	dir, err := os.MkdirTemp("", "pg") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &Server{dir: dir, bin: bins[len(bins)-1], env: env}
	if os.Getuid() == 0 { // PostgreSQL does not run as root
		if s.as, err = ids("postgres"); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, int(s.as.Uid), int(s.as.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	out, err := s.command("initdb", "-D", s.data(), "-U", "muster", "--auth=trust", "-E", "UTF8", "--no-sync", "--no-instructions").CombinedOutput()
	if err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
	if s.admin, err = sql.Open("pgx", s.address("postgres")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.admin.Close() })
	s.run(t)
	t.Cleanup(func() {
		s.Stop(t)
		if t.Failed() {
			t.Logf("PostgreSQL said: %s", tail(s.log.Bytes()))
		}
	})
	return s
}

// Installed says whether Start can start a server.
func Installed() bool { return len(installed()) > 0 }

func installed() []string {
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	return bins
}

// tail is the end of what a server said.
func tail(said []byte) []byte { return said[max(0, len(said)-8<<10):] }

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) address(database string) string {
	return fmt.Sprintf("postgres://muster@/%s?host=%s", database, s.dir)
}

func (s *Server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT, Credential: s.as}
	cmd.Dir, cmd.Env = s.dir, append(os.Environ(), s.env...)
	return cmd
}

// run starts the server's process and waits until it answers. It survives its own crash, but no power cut: nothing is
// synced.
func (s *Server) run(t testing.TB) {
	t.Helper()
	s.cmd = s.command("postgres", "-D", s.data(), "-k", s.dir, "-c", "listen_addresses=", "-c", "max_connections=400",
		"-c", "fsync=off", "-c", "full_page_writes=off", "-c", "autovacuum=off", "-c", "shared_buffers=32MB")
	s.cmd.Stderr = &s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.After(patience)
	for {
		err := s.admin.PingContext(context.Background())
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("PostgreSQL does not answer: %v: %s", err, tail(s.log.Bytes()))
		}
	}
}

// Stop ends the server at once, as a crash would. Its databases stay.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGQUIT)
	_ = s.cmd.Wait() // its exit code says that it was killed
	s.cmd = nil
}

// Restart ends the server at once and starts it again.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	s.Stop(t)
	s.run(t)
}

// Clock is what the server's clock shows.
func (s *Server) Clock(t testing.TB) (now time.Time) {
	t.Helper()
	if err := s.admin.QueryRow("SELECT clock_timestamp()").Scan(&now); err != nil {
		t.Fatal(err)
	}
	return now
}

// Database makes an empty database and gives its address.
func (s *Server) Database(t testing.TB) string { return s.make(t, "template1") }

// Copy makes a database like another one, to which nobody may be connected.
func (s *Server) Copy(t testing.TB, address string) string {
	t.Helper()
	name, _, _ := strings.Cut(strings.TrimPrefix(address, "postgres://muster@/"), "?")
	return s.make(t, name)
}

func (s *Server) make(t testing.TB, template string) string {
	t.Helper()
	name := fmt.Sprintf("test%d", s.made.Add(1))
	if _, err := s.admin.Exec("CREATE DATABASE " + name + " TEMPLATE " + template); err != nil {
		t.Fatal(err)
	}
	return s.address(name)
}

func ids(name string) (*syscall.Credential, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}
