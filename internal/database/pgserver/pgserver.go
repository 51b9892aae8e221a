// Package pgserver starts a PostgreSQL of one's own, for tests and measurements: on a unix socket in a temporary folder, run by
// a user without rights, gone when it is stopped or this process ends, also if that is killed.
//
//	Server   a PostgreSQL with as many empty databases as are asked for
//	ForTest  the same for a test, which is skipped where there is none
//
// Knows: how Debian's PostgreSQL is started, as a user who may.
// Must not know: what is kept in it.
package pgserver

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
)

// ErrNotInstalled is what Start gives where there is no PostgreSQL.
var ErrNotInstalled = errors.New("PostgreSQL is not installed: run scripts/deps test")

// Config says how a server runs.
type Config struct {
	// Parent is the folder in which one for the server is made, "" for the usual place of temporary files. A socket's path must be
	// short, and so must Parent's.
	Parent string
	// Env is added to its environment.
	Env []string
	// Hasty: it survives its own crash, but no power cut. Nothing is synced, and what is written into a table that was made in
	// the same transaction is not logged.
	Hasty bool
}

// hasty are the settings of a server that is in a hurry.
var hasty = []string{"fsync=off", "full_page_writes=off", "autovacuum=off", "shared_buffers=32MB", "wal_level=minimal", "max_wal_senders=0", "max_wal_size=4GB"}

// Limits of a server.
const (
	patience    = 60 * time.Second // for it to answer
	readyEvery  = 20 * time.Millisecond
	connections = 400
	saidLimit   = 8 << 10 // bytes that are shown of what it said
)

// Server is a PostgreSQL that runs until Stop.
type Server struct {
	Config
	dir   string
	bin   string
	as    *syscall.Credential
	main  *exec.Cmd
	log   bytes.Buffer // to be read while it does not run
	admin *sql.DB
	made  atomic.Int64
}

// Installed says whether Start can start a server.
func Installed() bool { return len(installed()) > 0 }

func installed() []string {
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	return bins
}

// Start makes an empty cluster and serves it, which takes about a second.
func Start(ctx context.Context, c Config) (*Server, error) {
	bins := installed()
	if len(bins) == 0 {
		return nil, ErrNotInstalled
	}
	dir, err := os.MkdirTemp(c.Parent, "pg")
	if err != nil {
		return nil, err
	}
	s := &Server{Config: c, dir: dir, bin: bins[len(bins)-1]}
	if err := s.start(ctx); err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w; it said: %s", err, s.Stop())
	}
	return s, nil
}

func (s *Server) start(ctx context.Context) (err error) {
	if os.Getuid() == 0 { // PostgreSQL does not run as root
		if s.as, err = ids("postgres"); err != nil {
			return err
		}
		if err := os.Chown(s.dir, int(s.as.Uid), int(s.as.Gid)); err != nil {
			return err
		}
	}
	out, err := s.command("initdb", "-D", s.data(), "-U", "muster", "--auth=trust", "-E", "UTF8", "--no-sync", "--no-instructions").CombinedOutput()
	if err != nil {
		return fmt.Errorf("initdb: %w: %s", err, out)
	}
	if s.admin, err = sql.Open("pgx", s.address("postgres")); err != nil {
		return err
	}
	return s.run(ctx)
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) address(database string) string {
	return fmt.Sprintf("postgres://muster@/%s?host=%s", database, s.dir)
}

func (s *Server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT, Credential: s.as}
	cmd.Dir, cmd.Env = s.dir, append(os.Environ(), s.Env...)
	return cmd
}

// run starts the server's process and waits until it answers.
func (s *Server) run(ctx context.Context) error {
	args := []string{"-D", s.data(), "-k", s.dir, "-c", "listen_addresses=", "-c", fmt.Sprint("max_connections=", connections)}
	if s.Hasty {
		for _, set := range hasty {
			args = append(args, "-c", set)
		}
	}
	s.main = s.command("postgres", args...)
	s.main.Stderr = &s.log
	if err := s.main.Start(); err != nil {
		s.main = nil
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(readyEvery)
	defer tick.Stop()
	for {
		err := s.admin.PingContext(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("it does not answer: %w", err)
		}
	}
}

// end ends the server's process by a signal, and gives the end of what it said.
func (s *Server) end(by os.Signal) (said []byte) {
	if s.main != nil {
		_ = s.main.Process.Signal(by)
		_ = s.main.Wait() // its exit code says that it was killed
		s.main = nil
	}
	said = s.log.Bytes()
	return said[max(0, len(said)-saidLimit):]
}

// Restart ends the server at once, as a crash would, and starts it again.
func (s *Server) Restart(ctx context.Context) error {
	s.end(syscall.SIGQUIT)
	return s.run(ctx)
}

// Settle ends a hasty server in order and starts it as it would run in earnest. Who is connected loses that.
func (s *Server) Settle(ctx context.Context) error {
	s.end(os.Interrupt)
	syscall.Sync() // what it did not sync
	s.Hasty = false
	return s.run(ctx)
}

// Stop ends the server at once and removes its folder. It gives the end of what the server said.
func (s *Server) Stop() (said []byte) {
	if s.admin != nil {
		_ = s.admin.Close()
	}
	said = s.end(syscall.SIGQUIT)
	_ = os.RemoveAll(s.dir)
	return said
}

// Database makes an empty database and gives its address.
func (s *Server) Database(ctx context.Context) (string, error) { return s.make(ctx, "template1") }

// Copy makes a database like another one, to which nobody may be connected.
func (s *Server) Copy(ctx context.Context, address string) (string, error) {
	name, _, _ := strings.Cut(strings.TrimPrefix(address, "postgres://muster@/"), "?")
	return s.make(ctx, name)
}

func (s *Server) make(ctx context.Context, template string) (string, error) {
	name := fmt.Sprintf("test%d", s.made.Add(1))
	if _, err := s.admin.ExecContext(ctx, "CREATE DATABASE "+name+" TEMPLATE "+template); err != nil {
		return "", fmt.Errorf("make a database: %w", err)
	}
	return s.address(name), nil
}

// Clock is what the server's clock shows.
func (s *Server) Clock(ctx context.Context) (now time.Time, err error) {
	err = s.admin.QueryRowContext(ctx, "SELECT clock_timestamp()").Scan(&now)
	return now, err
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
