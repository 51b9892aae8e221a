package guest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
)

func real(t *testing.T) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to test with real servers")
	}
	if os.Geteuid() != 0 {
		t.Skip("the agent runs as root")
	}
}

// folder makes a folder that another user owns and may reach.
func folder(t *testing.T, owner *user.User) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "guest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	uid, _ := strconv.Atoi(owner.Uid)
	gid, _ := strconv.Atoi(owner.Gid)
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// as runs a program as another user until it ends.
func as(t *testing.T, owner *user.User, argv ...string) *exec.Cmd {
	t.Helper()
	uid, _ := strconv.ParseUint(owner.Uid, 10, 32)
	gid, _ := strconv.ParseUint(owner.Gid, 10, 32)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	return cmd
}

// serve starts a server and stops it with the test.
func serve(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGQUIT) // at once, for PostgreSQL and MariaDB
		time.AfterFunc(5*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(out.String())
		}
	})
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func TestPostgreSQLIsAskedAsItsOwnUser(t *testing.T) {
	real(t)
	postgres, err := user.Lookup("postgres")
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		t.Skip("PostgreSQL is not installed")
	}
	bin, dir, port := filepath.Dir(found[0]), folder(t, postgres), freePort(t)
	data := filepath.Join(dir, "data")
	password := filepath.Join(dir, "password")
	if err := os.WriteFile(password, []byte("secret\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := as(t, postgres, found[0], "-D", data, "--auth-local=peer", "--auth-host=scram-sha-256", "-N", "--pwfile="+password).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// The checks are asked before the server is ready: they wait for it.
	serve(t, as(t, postgres, filepath.Join(bin, "postgres"), "-D", data, "-k", dir, "-p", port, "-h", "127.0.0.1", "-c", "fsync=off"))
	local := dr.Check{Kind: dr.CheckPostgres, Address: dir, User: "postgres", Query: "select count(*), 'x' from pg_database", Expect: `^3$`, Timeout: 30 * time.Second}
	ask(t, local, dr.CheckPass, `"3"`)
	tcp := local
	tcp.Address, tcp.Password = "127.0.0.1:"+port, "secret"
	ask(t, tcp, dr.CheckPass, `"3"`)

	wrong := tcp
	wrong.Password, wrong.Timeout = "wrong", time.Second
	ask(t, wrong, dr.CheckFail, "password authentication failed")
	for query, words := range map[string]string{
		"select 4":                     `does not match "^3$": "4"`,
		"select 1 where false":         "no row",
		"create table t (x int)":       "read-only transaction",
		"selec":                        "syntax error",
		"select null":                  `""`,
		"select repeat('y', 10000000)": "yyy",
		"select 3 from generate_series(1,5000000)": `"3"`,
	} {
		c := local
		c.Query, c.Timeout = query, 2*time.Second
		state := dr.CheckFail
		if strings.HasPrefix(query, "select 3") {
			state = dr.CheckPass // only the first row is read
		}
		ask(t, c, state, words)
	}
	nobody := local
	nobody.User, nobody.Timeout = "nobody", time.Second
	ask(t, nobody, dr.CheckFail, "nobody")
}

func TestMySQLIsAskedAsItsOwnUser(t *testing.T) {
	real(t)
	mysql, err := user.Lookup("mysql")
	server, found := exec.LookPath("mariadbd")
	if err != nil || found != nil {
		t.Skip("MariaDB is not installed")
	}
	dir, port := folder(t, mysql), freePort(t)
	data := filepath.Join(dir, "data")
	install := as(t, mysql, "mariadb-install-db", "--no-defaults", "--datadir="+data, "--auth-root-authentication-method=socket", "--auth-root-socket-user=mysql", "--skip-test-db")
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	serve(t, as(t, mysql, server, "--no-defaults", "--datadir="+data, "--socket="+filepath.Join(dir, "mysqld.sock"), "--port="+port, "--bind-address=127.0.0.1", "--pid-file="+filepath.Join(dir, "pid")))
	local := dr.Check{Kind: dr.CheckMySQL, Address: dir, User: "mysql", Query: "select 40+2, 'x'", Expect: `^42$`, Timeout: 30 * time.Second}
	ask(t, local, dr.CheckPass, `"42"`)
	byPath := local
	byPath.Address = filepath.Join(dir, "mysqld.sock")
	ask(t, byPath, dr.CheckPass, `"42"`)

	for query, words := range map[string]string{
		"select 4":                       "does not match",
		"select 1 from dual where false": "no row",
		"create database shop":           "READ ONLY",
		"selec":                          "syntax",
	} {
		c := local
		c.Query, c.Timeout = query, time.Second
		ask(t, c, dr.CheckFail, words)
	}
	tcp := local
	tcp.Address, tcp.User, tcp.Password, tcp.Timeout = "127.0.0.1:"+port, "shop", "wrong", time.Second
	ask(t, tcp, dr.CheckFail, "Access denied")
}

// The whole agent as a process, on a serial port that is the only device it has.
func TestTheAgentAnswersAsAProcess(t *testing.T) {
	real(t)
	dir := t.TempDir()
	binary := filepath.Join(dir, "muster-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, "github.com/musterdr/muster/cmd/muster-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("file", "-b", binary).Output(); err == nil && !strings.Contains(string(out), "statically linked") {
		t.Errorf("it is %s", out)
	}
	master, path := terminal(t)
	dev := filepath.Join(dir, "dev")
	// A mount namespace whose /dev holds nothing but the port and null.
	script := `set -e
mkdir "$D"; touch "$D/ttyS1" "$D/null"
mount -t tmpfs none "$D"; touch "$D/ttyS1" "$D/null"
mount --bind "$P" "$D/ttyS1"; mount --bind /dev/null "$D/null"
mount --rbind "$D" /dev
exec "$B"`
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "D=" + dev, "P=" + path, "B=" + binary}
	serve(t, cmd)

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	talk := probe.Dial(ctx, func(context.Context) (probe.Channel, error) { return wire{master}, master.SetReadDeadline(time.Time{}) })
	defer talk.Close()
	hello, err := talk.Hello(ctx) // it announces itself
	if err != nil || hello.BootID == "" || hello.Kernel == "" || hello.Uptime <= 0 {
		t.Fatalf("%+v, %v", hello, err)
	}
	answer, err := talk.Ask(ctx, probe.Ask{Ask: probe.AskStatus})
	if err != nil || len(answer.Status.Mounts) == 0 || answer.Status.Kernel != hello.Kernel { // on a lab host no process need be anybody else's
		t.Fatalf("%+v, %v", answer.Status, err)
	}
	for i := range 20 {
		c := dr.Check{Name: fmt.Sprint(i), Kind: dr.CheckCommand, Command: []string{"echo", strconv.Itoa(i)}, Expect: fmt.Sprintf(`^%d\b`, i)}
		if a, err := talk.Ask(ctx, probe.Ask{Ask: probe.AskCheck, Check: &c}); err != nil || a.Result.State != dr.CheckPass {
			t.Fatalf("%+v, %v", a, err)
		}
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err == nil {
		for line := range strings.Lines(string(info)) {
			if strings.HasPrefix(line, "VmHWM") {
				t.Log("memory ", strings.TrimSpace(line))
			}
		}
	}
}
