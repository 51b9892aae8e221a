package hooks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/capture/linux/hooks/hookstest"
)

func real(t *testing.T) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root and database servers: set MUSTER_REAL=1")
	}
}

// hold starts a keeper, with a folder of hooks.
func hold(t *testing.T, dir string) *Keeper {
	t.Helper()
	t.Setenv("MUSTER_TEST_HOOKS", dir)
	t.Setenv("MUSTER_TEST_ROOT", "/")
	k, err := Start([]string{"/proc/self/exe", "hooks"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

func (k *Keeper) locked(t *testing.T) Report {
	t.Helper()
	r, err := k.Lock(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (k *Keeper) ended(t *testing.T) Report {
	t.Helper()
	if err := k.End(); err != nil {
		t.Fatal(err)
	}
	r, err := k.Last(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// about gives what a report says of the application at a socket.
func (r Report) about(t *testing.T, socket string) Application {
	t.Helper()
	for _, a := range r.Applications {
		if strings.Contains(a.Name, socket) {
			return a
		}
	}
	t.Fatalf("nothing is said about %s: %+v", socket, r)
	return Application{}
}

// await waits until something is so, by asking.
func await(t *testing.T, what string, so func() bool) {
	t.Helper()
	for limit := time.Now().Add(20 * time.Second); !so(); <-time.After(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("it never came to it that %s", what)
		}
	}
}

// free waits until a database has no session of ours.
func free(t *testing.T, d *hookstest.Database, ask string) {
	t.Helper()
	await(t, "our sessions are gone", func() bool { return d.Ask(t, ask) == "0" })
}

const (
	postgresSessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'muster';"
	mariaSessions    = "SELECT COUNT(*) FROM INFORMATION_SCHEMA.PROCESSLIST WHERE USER = 'mysql';"
)

func TestRealDatabasesAreAtRestWhileHeldAndGoOnAfterwards(t *testing.T) {
	real(t)
	pg, maria := hookstest.Postgres(t, filepath.Join(t.TempDir(), "pg")), hookstest.MariaDB(t, filepath.Join(t.TempDir(), "my"))
	pw, mw := pg.Write(t), maria.Write(t)
	before := pg.Ask(t, "SELECT checkpoint_lsn FROM pg_control_checkpoint();")
	k := hold(t, "")
	if r := k.begun(t, 30*time.Second); r.Failed() != "" || len(r.Applications) != 2 || r.Rested() {
		t.Fatalf("after begin: %+v", r)
	}
	if pg.Ask(t, "SELECT checkpoint_lsn FROM pg_control_checkpoint();") == before {
		t.Error("no checkpoint was made")
	}
	pw.Await(t, 3)
	mw.Await(t, 3)
	for range 2 { // a freeze that did not hold is tried again
		k.locked(t)
		at, began := mw.Acked(), time.Now()
		pw.Await(t, 20)
		if now := mw.Acked(); now > at+1 || mw.Still() < time.Since(began) {
			t.Errorf("MariaDB went on from %d to %d while it was held", at, now)
		}
		if r, err := k.Unlock(); err != nil || r.Rested() {
			t.Errorf("after unlock: %+v, %v", r, err)
		}
		mw.Await(t, 3)
	}
	k.locked(t)
	r := k.ended(t)
	if !r.Rested() || r.Failed() != "" || len(r.Notes) != 0 {
		t.Errorf("at the end: %+v", r)
	}
	if a := r.about(t, pg.Socket); !strings.HasPrefix(a.Name, "PostgreSQL 1") || a.Still != 0 {
		t.Errorf("PostgreSQL: %+v", a)
	}
	if a := r.about(t, maria.Socket); !strings.HasPrefix(a.Name, "MariaDB 1") || a.Still <= 0 || a.Still > 5*time.Second {
		t.Errorf("MariaDB: %+v", a)
	}
	free(t, pg, postgresSessions)
	free(t, maria, mariaSessions)
	if log := pg.Log(); strings.Contains(log, "aborting backup") {
		t.Errorf("backup mode did not end in an orderly way:\n%s", log)
	}
}

// touched waits for a file that a hook writes.
func touched(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func install(t *testing.T, dir, name, body string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRealNothingIsLeftWhateverEndsAtWhateverStep(t *testing.T) {
	real(t)
	pg, maria := hookstest.Postgres(t, filepath.Join(t.TempDir(), "pg")), hookstest.MariaDB(t, filepath.Join(t.TempDir(), "my"))
	pw, mw := pg.Write(t), maria.Write(t)
	steps := []struct {
		name string
		to   func(t *testing.T, k *Keeper)
	}{
		{"in begin", func(t *testing.T, k *Keeper) {
			go func() { _, _ = k.Begin(context.Background(), 30*time.Second) }()
			await(t, "begin is under way", func() bool { return pg.Ask(t, postgresSessions) != "0" })
		}},
		{"begun", func(t *testing.T, k *Keeper) { k.begun(t, 30*time.Second) }},
		{"locked", func(t *testing.T, k *Keeper) { k.begun(t, 30*time.Second); k.locked(t) }},
		{"unlocked", func(t *testing.T, k *Keeper) {
			k.begun(t, 30*time.Second)
			k.locked(t)
			if _, err := k.Unlock(); err != nil {
				t.Fatal(err)
			}
		}},
		{"ending", func(t *testing.T, k *Keeper) {
			k.begun(t, 30*time.Second)
			k.locked(t)
			if err := k.End(); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, step := range steps {
		for _, who := range []string{"agent", "keeper"} {
			t.Run(step.name+", then the "+who+" is gone", func(t *testing.T) {
				dir, mark := filepath.Join(t.TempDir(), "hooks.d"), filepath.Join(t.TempDir(), "mark")
				install(t, dir, "app", "echo $1 >>"+mark)
				k := hold(t, dir)
				step.to(t, k)
				began := touched(mark)
				switch who {
				case "keeper":
					_ = k.cmd.Process.Kill()
				default: // all that is left of a killed agent
					k.to.Close()
					k.thaw.Close()
				}
				free(t, pg, postgresSessions)
				free(t, maria, mariaSessions)
				pw.Await(t, 2)
				mw.Await(t, 2)
				if who == "agent" && began {
					await(t, "the hook was run with post", func() bool {
						b, _ := os.ReadFile(mark)
						return string(b) == "pre\npost\n"
					})
				}
			})
		}
	}
}

func TestRealADatabaseThatRefusesUsSaysWhatToGrant(t *testing.T) {
	real(t)
	pg, maria := hookstest.Postgres(t, filepath.Join(t.TempDir(), "pg")), hookstest.MariaDB(t, filepath.Join(t.TempDir(), "my"))
	if err := os.WriteFile(filepath.Join(pg.Dir, "pg_hba.conf"), []byte("local all all scram-sha-256\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pg.PID(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	await(t, "PostgreSQL has read its settings", func() bool { return strings.Contains(pg.Log(), "reloading") })
	maria.Ask(t, "DROP USER mysql@localhost;")
	k := hold(t, "")
	r := k.begun(t, 10*time.Second)
	if a := r.about(t, pg.Socket); !strings.Contains(a.Reason, "pg_hba.conf") || !strings.Contains(a.Reason, "no password supplied") {
		t.Errorf("PostgreSQL: %+v", a)
	}
	if a := r.about(t, maria.Socket); !strings.Contains(a.Reason, "CREATE USER mysql@localhost IDENTIFIED WITH unix_socket") || !strings.Contains(a.Reason, "Access denied") {
		t.Errorf("MariaDB: %+v", a)
	}
	k.locked(t)
	if r := k.ended(t); r.Rested() || r.Failed() == "" {
		t.Errorf("at the end: %+v", r)
	}
}

func TestRealALockThatIsNotGotIsGivenUpSoThatNobodyWaits(t *testing.T) {
	real(t)
	maria := hookstest.MariaDB(t, filepath.Join(t.TempDir(), "my"))
	w := maria.Write(t)
	maria.Ask(t, "CREATE TABLE shop.report (n INT) ENGINE=MyISAM;")
	other := maria.Open(t)
	if err := other.Do("LOCK TABLES shop.report WRITE;"); err != nil {
		t.Fatal(err)
	}
	k := hold(t, "")
	k.begun(t, 10*time.Second)
	r := k.locked(t)
	if a := r.about(t, maria.Socket); a.Reason == "" || a.Still < time.Second || a.Still > 2*lockLimit {
		t.Errorf("under a long lock: %+v", a)
	} else {
		t.Log(a.Reason)
	}
	w.Await(t, 5) // although we are still there
	if err := other.Do("UNLOCK TABLES;"); err != nil {
		t.Fatal(err)
	}
	if r := k.locked(t); r.Failed() != "" {
		t.Errorf("tried again: %+v", r)
	}
	if r := k.ended(t); !r.Rested() {
		t.Errorf("at the end: %+v", r)
	}
}

// MySQL, and MariaDB before 10.4, are held by FLUSH TABLES WITH READ LOCK; today's MariaDB knows it as well.
func TestRealServersWithoutBackupStagesAreHeldByAGlobalLock(t *testing.T) {
	real(t)
	maria := hookstest.MariaDB(t, filepath.Join(t.TempDir(), "my"))
	w := maria.Write(t)
	found := find("/")
	if len(found) != 1 {
		t.Fatalf("found: %+v", found)
	}
	m := &mysql{server: found[0]}
	if err := m.begin(t.Context(), time.Second); err != nil {
		t.Fatal(err)
	}
	m.stages = false
	if err := m.lock(t.Context(), lockLimit); err != nil {
		t.Fatal(err)
	}
	at := w.Acked()
	maria.Ask(t, "SELECT COUNT(*) FROM shop.acked;") // who reads may
	if w.Acked() > at+1 {
		t.Error("somebody writes under the lock")
	}
	if err := m.unlock(t.Context()); err != nil {
		t.Error(err)
	}
	w.Await(t, 3)
	// A long query: whoever flushes tables behind it makes everybody wait for it.
	other := maria.Open(t)
	if err := other.Begin("SELECT SLEEP(15) FROM (SELECT n FROM shop.loose LIMIT 1) AS t;"); err != nil {
		t.Fatal(err)
	}
	await(t, "the query is a long one", func() bool {
		return maria.Ask(t, "SELECT COUNT(*) FROM INFORMATION_SCHEMA.PROCESSLIST WHERE INFO LIKE 'SELECT SLEEP%' AND TIME > 1;") == "1"
	})
	if err := m.lock(t.Context(), lockLimit); err == nil || !strings.Contains(err.Error(), "queries are running") {
		t.Errorf("behind a long query: %v", err)
	}
	w.Await(t, 3)
	other.Close()
	if err := m.end(t.Context(), time.Second); err != nil {
		t.Error(err)
	}
}

func TestRealAStandbyIsHeldLikeItsPrimary(t *testing.T) {
	real(t)
	dir := t.TempDir()
	pg := hookstest.Postgres(t, filepath.Join(dir, "primary"))
	w := pg.Write(t)
	copyOf := filepath.Join(dir, "standby")
	if out, err := exec.Command("install", "-d", "-o", "postgres", "-m", "700", copyOf).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// As a standby is made: a base backup, which follows its primary over the socket.
	if out, err := exec.Command("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "pg_basebackup", "-h", filepath.Dir(pg.Socket), "-D", copyOf, "-R", "-c", "fast").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	standby := hookstest.Postgres(t, copyOf)
	if standby.Ask(t, "SELECT pg_is_in_recovery();") != "t" {
		t.Fatal("the copy is no standby")
	}
	k := hold(t, "")
	if r := k.begun(t, 20*time.Second); r.Failed() != "" {
		t.Fatalf("%+v", r)
	}
	k.locked(t)
	w.Await(t, 3)
	if r := k.ended(t); len(r.Applications) != 2 || !r.Rested() {
		t.Errorf("%+v", r)
	}
}

// impostor runs a copy of a program under a server's name, as nobody.
func impostor(t *testing.T, program, name string, args ...string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "mh")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if out, err := exec.Command("cp", program, filepath.Join(dir, name)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, "DIR", dir)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	await(t, "it is found", func() bool { return len(find("/")) > 0 })
}

func TestRealADatabaseInAContainerIsNamedAndLeftAlone(t *testing.T) {
	real(t)
	impostor(t, "/bin/sleep", "mysqld", "unshare", "--pid", "--fork", "--kill-child", "DIR/mysqld", "1000")
	k := hold(t, "")
	k.begun(t, time.Second)
	k.locked(t)
	r := k.ended(t)
	if len(r.Applications) != 1 || !r.Applications[0].Uncovered || !strings.Contains(r.Applications[0].Reason, "container") || r.Rested() || r.Failed() != "" {
		t.Errorf("%+v", r)
	}
}

func TestRealAServerThatNeverAnswersCostsNoMoreThanItsLimit(t *testing.T) {
	real(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	impostor(t, self, "postgres", "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "DIR/postgres", "listen", "DIR/.s.PGSQL.5432")
	await(t, "it listens", func() bool { return find("/")[0].uncovered == "" })
	began := time.Now()
	k := hold(t, "")
	r := k.begun(t, time.Minute)
	if took := time.Since(began); len(r.Applications) != 1 || r.Failed() == "" || took > 2*connectLimit {
		t.Errorf("after %s: %+v", took, r)
	}
	k.locked(t)
	if r := k.ended(t); r.Rested() {
		t.Errorf("%+v", r)
	}
}

func TestRealAnApplicationWhoseHoldWasTakenAwayWasNotAtRest(t *testing.T) {
	real(t)
	pg, maria := hookstest.Postgres(t, filepath.Join(t.TempDir(), "pg")), hookstest.MariaDB(t, filepath.Join(t.TempDir(), "my"))
	w := maria.Write(t)
	k := hold(t, "")
	k.begun(t, 20*time.Second)
	if r := k.locked(t); r.Failed() != "" {
		t.Fatalf("%+v", r)
	}
	pg.Ask(t, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'muster';")
	maria.Ask(t, "KILL "+maria.Ask(t, "SELECT MAX(ID) FROM INFORMATION_SCHEMA.PROCESSLIST WHERE USER = 'mysql';")+";")
	w.Await(t, 2)
	r := k.ended(t)
	for _, socket := range []string{pg.Socket, maria.Socket} {
		if a := r.about(t, socket); a.AtRest || !strings.Contains(a.Reason, "not held until the end") {
			t.Errorf("%+v", a)
		}
	}
}

func TestRealAClusterThatArchivesNothingStillGetsItsCheckpoint(t *testing.T) {
	real(t)
	pg := hookstest.Postgres(t, filepath.Join(t.TempDir(), "pg"), "wal_level=minimal", "max_wal_senders=0")
	k := hold(t, "")
	k.begun(t, 20*time.Second)
	k.locked(t)
	if r := k.ended(t); !r.Rested() || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "WAL level") {
		t.Errorf("%+v", r)
	}
	free(t, pg, postgresSessions)
}

func TestRealACheckpointThatTakesTooLongIsGivenUp(t *testing.T) {
	real(t)
	pg := hookstest.Postgres(t, filepath.Join(t.TempDir(), "pg"))
	checkpointer := pg.Ask(t, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer';")
	var pid int
	if _, err := fmt.Sscan(checkpointer, &pid); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil { // a disk that is too busy
		t.Fatal(err)
	}
	began := time.Now()
	k := hold(t, "")
	r := k.begun(t, 2*time.Second)
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if a := r.about(t, pg.Socket); !strings.Contains(a.Reason, "checkpoint took longer than 2s") || time.Since(began) > 10*time.Second {
		t.Errorf("after %s: %+v", time.Since(began), a)
	}
	if r := k.ended(t); r.Rested() {
		t.Errorf("%+v", r)
	}
	free(t, pg, postgresSessions)
}
