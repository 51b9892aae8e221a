// Package hookstest starts real database servers in a test's folder, writes to them, and proves that a copy of their files
// holds what they acknowledged.
package hookstest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// patience is how long a server may take to start, stop or answer.
const patience = 60 * time.Second

// Database is a running server. It runs as its package's own user.
type Database struct {
	Dir    string // its files
	Socket string
	user   *user.User
	cmd    *exec.Cmd
	client []string // program and arguments; statements on standard input
	ready  string   // a statement that answers once it is up
	over   sync.Once
}

// postgresBin is where the programs of PostgreSQL are.
func postgresBin(t *testing.T) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(found) == 0 {
		t.Fatal("no PostgreSQL server is installed: see scripts/deps")
	}
	return found[len(found)-1]
}

// Postgres makes a cluster in dir and starts it, or starts the one that is there.
func Postgres(t *testing.T, dir string, settings ...string) *Database {
	t.Helper()
	d := &Database{Dir: dir, ready: "SELECT 1;"}
	sockets, bin := d.prepare(t, "postgres"), postgresBin(t)
	if _, err := os.Stat(filepath.Join(dir, "PG_VERSION")); err != nil {
		d.run(t, filepath.Join(bin, "initdb"), "--auth=peer", "--no-instructions", "--no-sync", "--encoding=UTF8", "--locale=C", "-D", dir)
	}
	args := []string{"-D", dir, "-k", sockets, "-c", "listen_addresses=", "-c", "shared_buffers=16MB", "-c", "max_connections=20",
		"-c", "max_wal_size=64MB", "-c", "min_wal_size=32MB"}
	for _, s := range settings {
		args = append(args, "-c", s)
	}
	d.Socket = filepath.Join(sockets, ".s.PGSQL.5432")
	d.client = []string{filepath.Join(bin, "psql"), "-X", "-q", "-A", "-t", "-w", "-h", sockets, "-p", "5432", "-U", "postgres", "-d", "postgres"}
	d.start(t, exec.Command(filepath.Join(bin, "postgres"), args...))
	return d
}

// MariaDB makes a server in dir and starts it, or starts the one that is there.
func MariaDB(t *testing.T, dir string, settings ...string) *Database {
	t.Helper()
	d := &Database{Dir: dir, ready: "SELECT 1;"}
	sockets := d.prepare(t, "mysql")
	small := []string{"--innodb-log-file-size=8M", "--innodb-buffer-pool-size=16M", "--innodb-data-file-path=ibdata1:12M:autoextend"}
	if _, err := os.Stat(filepath.Join(dir, "mysql")); err != nil {
		d.run(t, "mariadb-install-db", append([]string{"--no-defaults", "--datadir=" + dir, "--auth-root-authentication-method=socket",
			"--user=mysql", "--skip-test-db"}, small...)...)
	}
	d.Socket = filepath.Join(sockets, "m.sock")
	args := append([]string{"--no-defaults", "--datadir=" + dir, "--socket=" + d.Socket, "--pid-file=" + filepath.Join(sockets, "pid"), "--skip-networking",
		"--tmpdir=" + sockets}, small...)
	d.client = []string{"mariadb", "--no-defaults", "--protocol=socket", "--socket=" + d.Socket, "--user=root", "--batch", "--skip-column-names", "--unbuffered", "--force"}
	d.start(t, exec.Command("mariadbd", append(args, settings...)...))
	return d
}

// prepare gives the folder to the server's user, and makes another for sockets, whose paths have to be short.
func (d *Database) prepare(t *testing.T, name string) (sockets string) {
	t.Helper()
	var err error
	if d.user, err = user.Lookup(name); err != nil {
		t.Fatalf("%v: see scripts/deps", err)
	}
	sockets, err = os.MkdirTemp("/tmp", "mh")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	uid, gid := d.ids()
	err = errors.Join(os.MkdirAll(d.Dir, 0o700), os.Chown(d.Dir, uid, gid), os.Chmod(d.Dir, 0o700), os.Chown(sockets, uid, gid), os.Chmod(sockets, 0o755))
	if err != nil {
		t.Fatal(err)
	}
	for up := filepath.Dir(d.Dir); len(up) > len(os.TempDir()); up = filepath.Dir(up) { // it has to get there
		if err := os.Chmod(up, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return sockets
}

func (d *Database) ids() (uid, gid int) {
	uid, _ = strconv.Atoi(d.user.Uid)
	gid, _ = strconv.Atoi(d.user.Gid)
	return uid, gid
}

func (d *Database) as(cmd *exec.Cmd) *exec.Cmd {
	uid, gid := d.ids()
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, Pdeathsig: syscall.SIGTERM}
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "HOME=/"}
	return cmd
}

func (d *Database) run(t *testing.T, program string, args ...string) string {
	t.Helper()
	out, err := d.as(exec.Command(program, args...)).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (d *Database) start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	log, err := os.Create(filepath.Join(filepath.Dir(d.Socket), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	d.cmd = d.as(cmd)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Stop(t) })
	for limit := time.Now().Add(patience); ; <-time.After(20 * time.Millisecond) {
		out, err := d.try(d.ready)
		if err == nil && strings.TrimSpace(out) == "1" {
			return
		}
		if time.Now().After(limit) || d.cmd.Process.Signal(syscall.Signal(0)) != nil {
			said := d.Log()
			t.Fatalf("the server in %s does not come up: %s %v\n%s", d.Dir, out, err, said[max(0, len(said)-2000):])
		}
	}
}

// Log gives what the server has logged.
func (d *Database) Log() string {
	b, _ := os.ReadFile(filepath.Join(filepath.Dir(d.Socket), "log"))
	return string(b)
}

// PID is that of the server.
func (d *Database) PID() int { return d.cmd.Process.Pid }

// Stop ends the server, in an orderly way if it can.
func (d *Database) Stop(t *testing.T) {
	d.over.Do(func() {
		_ = d.cmd.Process.Signal(map[bool]syscall.Signal{true: syscall.SIGINT, false: syscall.SIGTERM}[d.user.Username == "postgres"])
		killed := time.AfterFunc(patience, func() { _ = d.cmd.Process.Kill() })
		_ = d.cmd.Wait()
		if !killed.Stop() {
			t.Errorf("the server in %s had to be killed", d.Dir)
		}
	})
}

// speak is a client, as the database's administrator: of MariaDB that is root.
func (d *Database) speak() *exec.Cmd {
	cmd := exec.Command(d.client[0], d.client[1:]...)
	if d.user.Username == "postgres" {
		d.as(cmd)
	}
	return cmd
}

func (d *Database) try(statement string) (string, error) {
	cmd := d.speak()
	cmd.Stdin = strings.NewReader(statement + "\n")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Ask carries out a statement in a session of its own.
func (d *Database) Ask(t *testing.T, statement string) string {
	t.Helper()
	out, err := d.try(statement)
	if err != nil || strings.Contains(out, "ERROR") {
		t.Fatalf("%s: %v\n%s", statement, err, out)
	}
	return strings.TrimSpace(out)
}

// Session is a client of the database that stays.
type Session struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	over sync.Once
}

// Open opens a session.
func (d *Database) Open(t *testing.T) *Session {
	t.Helper()
	s := &Session{cmd: d.speak()}
	in, err := s.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	s.in, s.out = in, bufio.NewReader(r)
	s.cmd.Stdout, s.cmd.Stderr = w, w
	err = s.cmd.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Close ends the session at once.
func (s *Session) Close() {
	s.over.Do(func() {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	})
}

// Begin sends statements and does not wait for their end.
func (s *Session) Begin(statements string) error {
	_, err := io.WriteString(s.in, statements+"\n")
	return err
}

// Do carries out statements and waits for their end.
func (s *Session) Do(statements string) error {
	if err := s.Begin(statements + "\nSELECT 'did-it';"); err != nil {
		return err
	}
	for {
		line, err := s.out.ReadString('\n')
		switch {
		case err != nil:
			return err
		case line == "did-it\n":
			return nil
		case strings.Contains(line, "ERROR"):
			return errors.New(line)
		}
	}
}

// Writer adds numbers, each in a transaction of its own, one after the other.
type Writer struct {
	acked   atomic.Int64
	beat    atomic.Int64
	longest atomic.Int64
	stop    chan struct{}
	ended   chan error
}

// tables are those that a writer writes to, by the engine that keeps them.
func (d *Database) tables() map[string]string {
	if d.user.Username == "postgres" {
		return map[string]string{"acked": ""}
	}
	return map[string]string{"acked": " ENGINE=InnoDB", "loose": " ENGINE=MyISAM", "aria": " ENGINE=Aria TRANSACTIONAL=0"}
}

// Schema is where a writer's tables are.
const Schema = "shop"

// Write begins to write.
func (d *Database) Write(t *testing.T) *Writer {
	t.Helper()
	d.Ask(t, "CREATE SCHEMA "+Schema+";")
	add := ""
	for name, engine := range d.tables() {
		d.Ask(t, "CREATE TABLE "+Schema+"."+name+" (n BIGINT PRIMARY KEY, v VARCHAR(200))"+engine+";")
		add += fmt.Sprintf("INSERT INTO %s.%s VALUES (%%[1]d, '%s');\n", Schema, name, strings.Repeat("x", 100))
	}
	w := &Writer{stop: make(chan struct{}), ended: make(chan error, 1)}
	w.beat.Store(time.Now().UnixNano())
	session := d.Open(t)
	go func() {
		for n := int64(1); ; n++ {
			select {
			case <-w.stop:
				w.ended <- nil
				return
			default:
			}
			if err := session.Do(fmt.Sprintf(add, n)); err != nil {
				w.ended <- err
				return
			}
			w.acked.Store(n)
			now := time.Now().UnixNano()
			w.longest.Store(max(w.longest.Load(), now-w.beat.Swap(now)))
		}
	}()
	t.Cleanup(func() {
		close(w.stop)
		select {
		case err := <-w.ended:
			if err != nil {
				t.Errorf("write to the database: %v", err)
			}
		case <-time.After(patience):
			t.Error("the writer to the database hangs")
		}
	})
	w.Await(t, 3)
	return w
}

// Acked is the number of the last transaction that was acknowledged.
func (w *Writer) Acked() int64 { return w.acked.Load() }

// Longest is the longest time that a transaction took.
func (w *Writer) Longest() time.Duration { return time.Duration(w.longest.Load()) }

// Still is how long nothing has been acknowledged.
func (w *Writer) Still() time.Duration { return time.Since(time.Unix(0, w.beat.Load())) }

// Await waits until the writer got on by some transactions.
func (w *Writer) Await(t *testing.T, steps int64) {
	t.Helper()
	for from, limit := w.Acked(), time.Now().Add(patience); w.Acked() < from+steps; <-time.After(2 * time.Millisecond) {
		select {
		case err := <-w.ended:
			w.ended <- err
			t.Fatalf("the writer to the database ended: %v", err)
		default:
		}
		if time.Now().After(limit) {
			t.Fatalf("the writer to the database does not get on: %d", w.Acked())
		}
	}
}

// Held checks a copy of the database's files: started, it has every transaction that was acknowledged before the copy,
// and none that was not begun after it.
func (d *Database) Held(t *testing.T, dir string, before, after int64) {
	t.Helper()
	var c *Database
	if d.user.Username == "postgres" {
		_ = os.Remove(filepath.Join(dir, "postmaster.pid")) // of the original, as after a reboot
		c = Postgres(t, dir)
	} else {
		c = MariaDB(t, dir)
	}
	defer c.Stop(t)
	for name := range d.tables() {
		got := strings.Fields(c.Ask(t, "SELECT CONCAT(COUNT(*), ' ', MIN(n), ' ', MAX(n)) FROM "+Schema+"."+name+";"))
		if len(got) != 3 || got[0] != got[2] || got[1] != "1" {
			t.Errorf("%s of the copy has gaps: %v", name, got)
			continue
		}
		if n, _ := strconv.ParseInt(got[2], 10, 64); n < before || n > after+1 {
			t.Errorf("%s of the copy ends at %d; %d were acknowledged before it, %d after it", name, n, before, after)
		}
	}
}

// Clean says what is wrong with the tables of a copy that no log is there to repair; "" if nothing. No server has been
// started on it.
func (d *Database) Clean(dir string) string {
	at := filepath.Join(dir, Schema)
	var wrong []string
	for program, args := range map[string][]string{
		"myisamchk": {"--silent", "--check", filepath.Join(at, "loose.MYI")},
		"aria_chk":  {"--silent", "--check", "--datadir=" + dir, "--ignore-control-file", filepath.Join(at, "aria.MAI")},
	} {
		if out, err := exec.Command(program, args...).CombinedOutput(); err != nil || strings.Contains(string(out), "warning") || strings.Contains(string(out), "error") {
			wrong = append(wrong, fmt.Sprintf("%s: %v: %s", program, err, out))
		}
	}
	return strings.Join(wrong, "\n")
}
