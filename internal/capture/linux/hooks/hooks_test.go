package hooks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The test binary is a keeper as well.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "listen" { // and a server that accepts and never answers
		l, err := net.Listen("unix", os.Args[2])
		if err == nil {
			_, err = l.Accept()
		}
		if err == nil {
			_, err = io.Copy(io.Discard, os.Stdin)
		}
		fmt.Println(err)
		os.Exit(0)
	}
	if len(os.Args) == 2 && os.Args[1] == "hooks" {
		if err := keep(os.Getenv("MUSTER_TEST_ROOT"), os.Getenv("MUSTER_TEST_HOOKS"), os.Stdin, os.Stdout, os.NewFile(3, "thaw")); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// system is a fixture of /proc and what lies around it.
type system struct {
	t    *testing.T
	root string
}

func newSystem(t *testing.T) *system {
	s := &system{t: t, root: t.TempDir()}
	s.link("proc/self/ns/pid", "pid:[1]")
	return s
}

func (s *system) file(path, content string) {
	s.t.Helper()
	path = filepath.Join(s.root, path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		s.t.Fatal(err)
	}
}

func (s *system) link(path, to string) {
	s.t.Helper()
	path = filepath.Join(s.root, path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(to, path)); err != nil {
		s.t.Fatal(err)
	}
}

// process adds one with listening sockets.
func (s *system) process(pid, parent, uid int, exe, namespace, root string, sockets ...string) {
	dir := "proc/" + strconv.Itoa(pid) + "/"
	s.link(dir+"exe", exe)
	s.file(dir+"status", fmt.Sprintf("Name:\tx\nPPid:\t%d\nUid:\t%d\t%d\t%d\t%d\nGid:\t7\t7\t7\t7\nGroups:\t7 8 \n", parent, uid, uid, uid, uid))
	s.link(dir+"ns/pid", namespace)
	s.link(dir+"root", root)
	s.link(dir+"cwd", "/srv/data")
	table := "Num       RefCount Protocol Flags    Type St Inode Path\n"
	for i, path := range sockets {
		inode := pid*100 + i
		s.link(dir+"fd/"+strconv.Itoa(i+3), fmt.Sprintf("socket:[%d]", inode))
		table += fmt.Sprintf("0000000000000000: 00000002 00000000 00010000 0001 01 %d %s\n", inode, path)
	}
	// Connections, and the sockets of others, are no listeners of its own.
	table += "0000000000000000: 00000003 00000000 00000000 0001 03 1 /run/other\n0000000000000000: 00000002 00000000 00010000 0001 01 2 /run/foreign\n"
	s.file(dir+"net/unix", table)
}

func TestDatabasesAreFoundByTheirProcessesAndSockets(t *testing.T) {
	s := newSystem(t)
	elsewhere := t.TempDir()
	s.file("run/postgresql/.s.PGSQL.5433", "")
	s.file("run/mysqld/my sql.sock", "")
	s.file("srv/data/odd.sock", "")
	s.file("tmp/mysql.sock", "")
	s.process(100, 1, 5, "/usr/lib/postgresql/15/bin/postgres (deleted)", "pid:[1]", s.root, "/run/postgresql/.s.PGSQL.5433", "/run/postgresql/other")
	s.process(101, 100, 5, "/usr/lib/postgresql/15/bin/postgres", "pid:[1]", s.root)
	s.process(200, 1, 6, "/usr/sbin/mariadbd", "pid:[1]", s.root, "/run/mysqld/my sql.sock", "/run/mysqld/mysqlx.sock", "@abstract")
	s.process(201, 1, 6, "/usr/sbin/mysqld", "pid:[1]", s.root, "odd.sock")
	s.process(300, 1, 5, "/usr/bin/postgres", "pid:[9]", s.root, "/run/postgresql/.s.PGSQL.5433")
	s.process(301, 1, 5, "/usr/bin/postgres", "pid:[1]", elsewhere, "/run/postgresql/.s.PGSQL.5433")
	s.process(302, 1, 6, "/usr/sbin/mysqld", "pid:[1]", s.root)
	s.process(303, 1, 6, "/usr/sbin/mysqld", "pid:[1]", s.root, "/run/not-there.sock")
	s.process(400, 1, 0, "/usr/bin/sleep", "pid:[1]", s.root, "/run/postgresql/.s.PGSQL.5433")
	s.file("proc/500/status", "rubbish")
	s.link("proc/500/exe", "/usr/bin/postgres")
	type line struct {
		pid       int
		socket    string
		uncovered string
	}
	var got []line
	for _, f := range find(s.root) {
		word, _, _ := strings.Cut(f.uncovered, ":")
		got = append(got, line{f.pid, f.socket, word})
		if f.gid != 7 || !slices.Equal(f.groups, []uint32{7, 8}) {
			t.Errorf("%d has groups %d, %d", f.pid, f.gid, f.groups)
		}
	}
	container := "it runs in a container or a changed root, where this release reaches no database"
	want := []line{
		{100, "/run/postgresql/.s.PGSQL.5433", ""}, {200, "/run/mysqld/my sql.sock", ""}, {201, "/srv/data/odd.sock", ""},
		{300, "", container}, {301, "", container},
		{302, "", "it listens on no unix socket, over which it would be spoken to"},
		{303, "/run/not-there.sock", "its socket /run/not-there.sock is in a folder that only the server itself sees (PrivateTmp of its systemd unit?)"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("found\n%+v\nwant\n%+v", got, want)
	}
}

// say is a client that is no database's: the mark comes back as it was sent, and so as a client gives it, when the
// statement says so.
func say(t *testing.T, script string) *session {
	t.Helper()
	c, err := dial(server{uid: uint32(os.Getuid()), gid: uint32(os.Getgid())}, "/bin/sh", []string{"-c", script}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

// echo answers like a client: each statement's words, then the mark.
const echo = `while read -r line; do case $line in SELECT\ *muster-mark*) line=${line#*\'}; echo "${line%%\'*}";; *) eval "$line";; esac; done`

func TestASessionGivesTheAnswerToEachStatementAndNoMore(t *testing.T) {
	c := say(t, echo)
	for i := range 3 {
		answer, err := c.ask(t.Context(), 5*time.Second, fmt.Sprintf("echo one %d; echo two >&2", i))
		if want := []string{fmt.Sprintf("one %d", i), "two"}; err != nil || !slices.Equal(answer, want) {
			t.Errorf("%q, %v, want %q", answer, err, want)
		}
	}
	if answer, err := c.ask(t.Context(), 5*time.Second, `i=0; while test $i -lt 5000; do echo line; i=$((i+1)); done`); err != nil || len(answer) != maxAnswer {
		t.Errorf("of a flood %d lines were kept, %v", len(answer), err)
	}
	if _, err := c.ask(t.Context(), 5*time.Second, "echo ERROR no >&2; exit 1"); !errors.Is(err, errGone) || !strings.Contains(err.Error(), "ERROR no") {
		t.Errorf("a client that ends: %v", err)
	}
	if _, err := c.ask(t.Context(), 5*time.Second, "echo"); !errors.Is(err, errGone) {
		t.Errorf("a client that has ended: %v", err)
	}
}

func TestASessionThatHangsIsKilledAtItsLimitWithAllItStarted(t *testing.T) {
	c := say(t, echo)
	answer, err := c.ask(t.Context(), 5*time.Second, "sleep 1000 & echo $!")
	if err != nil || len(answer) != 1 {
		t.Fatal(answer, err)
	}
	child, _ := strconv.Atoi(answer[0])
	if _, err := c.ask(t.Context(), 50*time.Millisecond, "sleep 1000"); err == nil || !strings.Contains(err.Error(), "no answer within") {
		t.Errorf("a client that hangs: %v", err)
	}
	awaitEnd(t, child)
	endless := say(t, "head -c 1000000 /dev/zero; sleep 1000") // no line at all
	if _, err := endless.ask(t.Context(), 5*time.Second, "x"); err == nil {
		t.Error("a line without end is an answer")
	}
}

// awaitEnd waits until a process is gone, or dead and not yet collected by whoever inherited it.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	for limit := time.Now().Add(10 * time.Second); ; <-time.After(5 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(limit) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			t.Fatalf("process %d lives on", pid)
		}
	}
}

func write(t *testing.T, path, body string, mode os.FileMode) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), mode), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
}

func TestOnlyHooksThatNobodyElseCouldHaveWrittenAreRun(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "20-second"), "", 0o755)
	write(t, filepath.Join(dir, "10-first"), "", 0o700)
	write(t, filepath.Join(dir, "30-open"), "", 0o775)
	write(t, filepath.Join(dir, "40-text"), "", 0o644)
	write(t, filepath.Join(dir, "50-backup~"), "", 0o755)
	if err := os.Mkdir(filepath.Join(dir, "60-folder"), 0o755); err != nil {
		t.Fatal(err)
	}
	got, ignored := scripts(dir)
	if len(got) != 2 || got[0].String() != "hook 10-first" || got[1].String() != "hook 20-second" {
		t.Errorf("run: %v", got)
	}
	if len(ignored) != 3 || !strings.Contains(ignored[0], "may write") || !strings.Contains(ignored[1], "not executable") || !strings.Contains(ignored[2], "no regular file") {
		t.Errorf("ignored: %q", ignored)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if got, ignored := scripts(dir); len(got) != 0 || len(ignored) != 1 {
		t.Errorf("from a folder that is open to all: %v, %q", got, ignored)
	}
	if got, ignored := scripts(filepath.Join(dir, "none")); len(got)+len(ignored) != 0 {
		t.Errorf("without a folder: %v, %q", got, ignored)
	}
}

func TestAHookThatHangsIsKilledAtItsLimitWithItsWholeGroup(t *testing.T) {
	dir := t.TempDir()
	pid := filepath.Join(dir, "pid")
	write(t, filepath.Join(dir, "hang"), "sleep 1000 & echo $! >"+pid+"; echo waiting; wait", 0o755)
	s := &script{path: filepath.Join(dir, "hang")}
	began := time.Now()
	err := s.begin(t.Context(), 300*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "killed, because it was not done within 300ms") || time.Since(began) > 5*time.Second {
		t.Errorf("after %s: %v", time.Since(began), err)
	}
	if len(s.said) != 1 || s.said[0] != "hook hang pre: waiting" {
		t.Errorf("it said %q", s.said)
	}
	b, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	child, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	awaitEnd(t, child)
}

func TestWhatAHookSaysIsLimited(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "loud"), "yes 'a\033[31mb' | head -c 10000000; exit 3", 0o755)
	s := &script{path: filepath.Join(dir, "loud")}
	err := s.begin(t.Context(), 20*time.Second)
	if err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("%v", err)
	}
	if len(s.said) != 1 || len([]rune(s.said[0])) > maxReason+50 || strings.ContainsAny(s.said[0], "\033\n") {
		t.Errorf("it said %q", s.said)
	}
}

// held is a keeper over a folder of hooks and no databases.
func held(t *testing.T, dir string) *Keeper {
	t.Helper()
	t.Setenv("MUSTER_TEST_HOOKS", dir)
	t.Setenv("MUSTER_TEST_ROOT", t.TempDir())
	k, err := Start([]string{"/proc/self/exe", "hooks"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

func (k *Keeper) begun(t *testing.T, limit time.Duration) Report {
	t.Helper()
	if _, err := k.Begin(t.Context(), limit); err != nil {
		t.Fatal(err)
	}
	r, err := k.Ready(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func lines(path string) string {
	b, _ := os.ReadFile(path)
	return strings.Join(strings.Fields(string(b)), " ")
}

func awaitLines(t *testing.T, path, want string) {
	t.Helper()
	for limit := time.Now().Add(10 * time.Second); lines(path) != want; <-time.After(5 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("hooks wrote %q, want %q", lines(path), want)
		}
	}
}

func folder(t *testing.T, bodies ...string) (dir, log string) {
	t.Helper()
	dir, log = filepath.Join(t.TempDir(), "hooks.d"), filepath.Join(t.TempDir(), "log")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, body := range bodies {
		write(t, filepath.Join(dir, strconv.Itoa(i)), "echo "+strconv.Itoa(i)+"$1 >>"+log+"\n"+body, 0o755)
	}
	return dir, log
}

func TestHooksRunInOrderBeforeAndInReverseAfter(t *testing.T) {
	dir, log := folder(t, "", "test $1 = post && exit 4 || true", "")
	k := held(t, dir)
	if r := k.begun(t, 10*time.Second); r.Failed() != "" {
		t.Fatalf("%+v", r)
	}
	if _, err := k.Lock(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := k.End(); err != nil {
		t.Fatal(err)
	}
	r, err := k.Last(t.Context())
	if got := lines(log); err != nil || got != "0pre 1pre 2pre 2post 1post 0post" {
		t.Errorf("%q, %v", got, err)
	}
	for _, a := range r.Applications {
		if !a.AtRest || a.Still <= 0 {
			t.Errorf("%+v", a)
		}
	}
	if len(r.Applications) != 3 || !slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "1 post: exit status 4") }) {
		t.Errorf("%+v", r)
	}
}

func TestAHookThatFailedBeforeIsRunAfterAsWell(t *testing.T) {
	dir, log := folder(t, "test $1 = post || exit 9", "")
	k := held(t, dir)
	if r := k.begun(t, 10*time.Second); !strings.Contains(r.Failed(), "hook 0: 0 pre: exit status 9") {
		t.Errorf("%q", r.Failed())
	}
	if err := k.End(); err != nil {
		t.Fatal(err)
	}
	if r, err := k.Last(t.Context()); err != nil || r.Rested() || lines(log) != "0pre 1pre 1post 0post" {
		t.Errorf("%q, %+v, %v", lines(log), r, err)
	}
}

func TestAfterAnAgentThatIsGoneHooksWaitForTheThaw(t *testing.T) {
	dir, log := folder(t, "", "test $1 = post || exec sleep 1000")
	k := held(t, dir)
	frozen, err := syscall.Dup(int(k.Thaw().Fd())) // what a watchdog inherits
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	begun := make(chan error, 1)
	go func() {
		_, err := k.Begin(ctx, time.Minute)
		if err == nil {
			_, err = k.Ready(ctx)
		}
		begun <- err
	}()
	awaitLines(t, log, "0pre 1pre") // the second hangs
	k.to.Close()
	k.thaw.Close()
	cancel()
	if err := <-begun; err == nil {
		t.Error("ready was answered")
	}
	select {
	case <-time.After(300 * time.Millisecond): // long enough for a keeper that does not wait to be caught
	case <-k.from:
		t.Error("the keeper ended before the thaw")
	}
	if got := lines(log); got != "0pre 1pre" {
		t.Errorf("before the thaw hooks wrote %q", got)
	}
	if err := syscall.Close(frozen); err != nil {
		t.Fatal(err)
	}
	awaitLines(t, log, "0pre 1pre 1post 0post")
}

func TestAKeeperThatIsToldRubbishLetsGo(t *testing.T) {
	dir, log := folder(t, "")
	k := held(t, dir)
	k.begun(t, 10*time.Second)
	if _, err := k.to.Write([]byte("rubbish\n")); err != nil {
		t.Fatal(err)
	}
	k.thaw.Close()
	awaitLines(t, log, "0pre 0post")
	if _, err := k.Unlock(); err == nil {
		t.Error("a keeper that has ended answers")
	}
}
