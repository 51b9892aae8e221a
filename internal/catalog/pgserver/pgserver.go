// Package pgserver starts a PostgreSQL of one's own, on a unix socket in a temporary folder, for tests and measurements.
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
	"sync/atomic"
	"syscall"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
)

// ErrNotInstalled is what Start gives where there is no PostgreSQL.
var ErrNotInstalled = errors.New("PostgreSQL is not installed")

// Server is a PostgreSQL that runs until Stop, or until this process ends.
type Server struct {
	dir   string
	bin   string
	as    *syscall.SysProcAttr
	main  *exec.Cmd
	log   bytes.Buffer
	admin *sql.DB
	made  atomic.Int64
}

// Start makes an empty cluster in a new folder below parent, "" for the usual place of temporary files, and serves it. A
// socket's path must be short, and so must parent's.
func Start(ctx context.Context, parent string) (*Server, error) {
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(bins) == 0 {
		return nil, ErrNotInstalled
	}
	dir, err := os.MkdirTemp(parent, "pg")
	if err != nil {
		return nil, err
	}
	s := &Server{dir: dir, bin: bins[len(bins)-1], as: &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT}}
	if err := s.start(ctx); err != nil {
		s.Stop()
		return nil, fmt.Errorf("start PostgreSQL: %w; it said: %s", err, s.log.Bytes())
	}
	return s, nil
}

func (s *Server) start(ctx context.Context) (err error) {
	if os.Getuid() == 0 { // PostgreSQL does not run as root
		if s.as.Credential, err = ids("postgres"); err != nil {
			return err
		}
		if err := os.Chown(s.dir, int(s.as.Credential.Uid), int(s.as.Credential.Gid)); err != nil {
			return err
		}
	}
	data := filepath.Join(s.dir, "data")
	if out, err := s.command("initdb", "-D", data, "-U", "muster", "--auth=trust", "-E", "UTF8", "--no-sync").CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, out)
	}
	server := s.command("postgres", "-D", data, "-k", s.dir, "-c", "listen_addresses=", "-c", "max_connections=200")
	server.Stderr = &s.log
	if err := server.Start(); err != nil {
		return err
	}
	s.main = server
	if s.admin, err = sql.Open("pgx", s.address("postgres")); err != nil {
		return err
	}
	return s.ready(ctx)
}

func (s *Server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.SysProcAttr, cmd.Dir = s.as, s.dir
	return cmd
}

func (s *Server) address(database string) string {
	return fmt.Sprintf("postgres://muster@/%s?host=%s", database, s.dir)
}

// patience is how long a new server is given to answer.
const patience = 30 * time.Second

// ready waits until the server answers.
func (s *Server) ready(ctx context.Context) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	end := time.After(patience)
	for {
		err := s.admin.PingContext(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-end:
			return fmt.Errorf("it does not answer: %w", err)
		}
	}
}

// Database makes an empty database and gives its address.
func (s *Server) Database(ctx context.Context) (string, error) {
	name := fmt.Sprintf("test%d", s.made.Add(1))
	if _, err := s.admin.ExecContext(ctx, "CREATE DATABASE "+name); err != nil {
		return "", err
	}
	return s.address(name), nil
}

// Stop ends the server at once and removes its folder. It gives what the server said.
func (s *Server) Stop() (said []byte) {
	if s.admin != nil {
		_ = s.admin.Close()
	}
	if s.main != nil {
		_ = s.main.Process.Signal(syscall.SIGQUIT)
		_ = s.main.Wait()
	}
	_ = os.RemoveAll(s.dir)
	return s.log.Bytes()
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
