package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
)

// The test is its own child, as the agent is.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == AskAs {
		in, _ := io.ReadAll(os.Stdin)
		os.Stdout.Write(AnswerAs(context.Background(), in))
		return
	}
	os.Exit(m.Run())
}

func ask(t *testing.T, c dr.Check, state dr.CheckState, words string) dr.CheckResult {
	t.Helper()
	if c.Timeout == 0 && state == dr.CheckFail {
		c.Timeout = time.Second // it takes all of it
	}
	c.Name = "it"
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	r := Check(t.Context(), c)
	if r.State != state || !strings.Contains(r.Got, words) {
		t.Fatalf("%s: %s", r.State, r.Got)
	}
	return r
}

func TestHTTPIsAskedUntilItAnswersWell(t *testing.T) {
	t.Parallel()
	var n atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/gone":
			http.Redirect(w, r, "/", http.StatusFound)
		case n.Add(1) < 3:
			w.WriteHeader(http.StatusBadGateway) // the application behind it is still starting
		default:
			fmt.Fprint(w, "Orders: 17\n")
		}
	}))
	defer s.Close()
	ask(t, dr.Check{Kind: dr.CheckHTTP, URL: s.URL, Body: `Orders: \d+`, Timeout: 5 * time.Second}, dr.CheckPass, "200")
	ask(t, dr.Check{Kind: dr.CheckHTTP, URL: s.URL, Body: `Orders: 18`}, dr.CheckFail, `does not match "Orders: 18": "Orders: 17"`)
	ask(t, dr.Check{Kind: dr.CheckHTTP, URL: s.URL + "/gone", Status: 302}, dr.CheckPass, "302")
	ask(t, dr.Check{Kind: dr.CheckHTTP, URL: s.URL + "/gone"}, dr.CheckFail, "302 instead of 200")
	s.Close()
	ask(t, dr.Check{Kind: dr.CheckHTTP, URL: s.URL}, dr.CheckFail, "connection refused")
}

func TestACertificateIsVerifiedUnlessTheCheckSaysNo(t *testing.T) {
	t.Parallel()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	ask(t, dr.Check{Kind: dr.CheckHTTP, URL: s.URL}, dr.CheckFail, "certificate")
	ask(t, dr.Check{Kind: dr.CheckHTTP, URL: s.URL, InsecureTLS: true}, dr.CheckPass, "200")
}

func TestTCPReadsABanner(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for _, part := range []string{"220 mail", ".example.org ES", "MTP\r\n"} { // in pieces
					fmt.Fprint(c, part)
					time.Sleep(time.Millisecond)
				}
				_, _ = io.Copy(io.Discard, c)
			}()
		}
	}()
	at := l.Addr().String()
	ask(t, dr.Check{Kind: dr.CheckTCP, Address: at}, dr.CheckPass, "connected")
	ask(t, dr.Check{Kind: dr.CheckTCP, Address: at, Banner: `^220 .* ESMTP`}, dr.CheckPass, "220 mail.example.org ESMTP")
	ask(t, dr.Check{Kind: dr.CheckTCP, Address: at, Banner: `^SSH-`}, dr.CheckFail, "220 mail")
}

func TestACommandIsBoundedInTimeAndOutput(t *testing.T) {
	t.Parallel()
	ask(t, dr.Check{Kind: dr.CheckCommand, Command: []string{"sh", "-c", "echo 42; exit 3"}, Exit: 3, Expect: "^42"}, dr.CheckPass, "42")
	ask(t, dr.Check{Kind: dr.CheckCommand, Command: []string{"echo", "yes"}, Expect: "^yes$"}, dr.CheckPass, "yes")
	ask(t, dr.Check{Kind: dr.CheckCommand, Command: []string{"sh", "-c", "echo no >&2; exit 1"}}, dr.CheckFail, "exit code 1 instead of 0")
	ask(t, dr.Check{Kind: dr.CheckCommand, Command: []string{"/nowhere/at/all"}}, dr.CheckFail, "no such file")
	ask(t, dr.Check{Kind: dr.CheckCommand, Command: []string{"yes"}}, dr.CheckFail, "killed")
	r := ask(t, dr.Check{Kind: dr.CheckCommand, Command: []string{"sh", "-c", "printf '\\033[2J%05000d' 7"}, Expect: "7"}, dr.CheckPass, "exit code 0")
	if len(r.Got) > maxGot || strings.Contains(r.Got, "\x1b") {
		t.Errorf("%d bytes: %q", len(r.Got), r.Got)
	}
	// What it started dies with it, also when it has let go of it.
	mark := filepath.Join(t.TempDir(), "pid")
	began := time.Now()
	ask(t, dr.Check{Kind: dr.CheckCommand, Command: []string{"sh", "-c", "sleep 600 & echo $! > " + mark + "; wait"}}, dr.CheckFail, "killed")
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %s", took)
	}
	pid, _ := os.ReadFile(mark)
	for end := time.Now().Add(5 * time.Second); ; { // it is killed, but may not have died yet
		state, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
		if err != nil || strings.Contains(string(state), ") Z ") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it left %s", state)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestNoDatabaseIsAFailWithAReason(t *testing.T) {
	t.Parallel()
	empty := t.TempDir()
	ask(t, dr.Check{Kind: dr.CheckPostgres, Address: empty, Query: "select 1", Expect: "1"}, dr.CheckFail, "no server's socket")
	ask(t, dr.Check{Kind: dr.CheckMySQL, Address: empty, Query: "select 1", Expect: "1"}, dr.CheckFail, "no server's socket")
	ask(t, dr.Check{Kind: dr.CheckPostgres, Address: "127.0.0.1:1", Query: "select 1", Expect: "1", Password: "secret"}, dr.CheckFail, "connect to PostgreSQL")
	r := ask(t, dr.Check{Kind: dr.CheckMySQL, Address: "127.0.0.1:1", Query: "select 1", Expect: "1", Password: "secret"}, dr.CheckFail, "connect to MySQL")
	if strings.Contains(r.Got, "secret") {
		t.Error("it told the password")
	}
}

func TestFstabIsReadAsInitReadsIt(t *testing.T) {
	t.Parallel()
	entries, ro := readFstab(`# comment
UUID=1 / ext4 errors=remount-ro 0 1
UUID=2 none swap sw 0 0
/dev/sdb1 /data xfs defaults,nofail 0 2
/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0
host:/export /net/my\040share nfs ro,x-systemd.automount
LABEL=x /old
broken
`)
	want := []probe.FstabEntry{
		{Spec: "UUID=1", Mount: "/", Type: "ext4"}, {Spec: "/dev/sdb1", Mount: "/data", Type: "xfs", Nofail: true},
		{Spec: "host:/export", Mount: "/net/my share", Type: "nfs", Nofail: true}, {Spec: "LABEL=x", Mount: "/old", Type: "auto"},
	}
	if !reflect.DeepEqual(entries, want) || !reflect.DeepEqual(ro, []string{"/net/my share"}) {
		t.Errorf("%+v, %v", entries, ro)
	}
}

func TestOnlyUnwantedReadOnlyMountsAreTold(t *testing.T) {
	t.Parallel()
	table := []linux.Mount{
		{Mount: "/", Device: "/dev/vda1", Type: "ext4", Super: "ro,errors=remount-ro", Options: "ro"},
		{Mount: "/data", Device: "/dev/vdb1", Type: "xfs", Super: "rw", Options: "rw"},
		{Mount: "/arch", Device: "/dev/vdc1", Type: "ext4", Super: "ro", Options: "ro"},
		{Mount: "/snap/x/1", Device: "/dev/loop0", Type: "squashfs", Super: "ro", Options: "ro"},
		{Mount: "/sys", Device: "sysfs", Type: "sysfs", Super: "ro", Options: "ro"},
	}
	fstab := []probe.FstabEntry{{Mount: "/"}, {Mount: "/data"}, {Mount: "/arch"}}
	if got := readOnly(table, fstab, []string{"/arch"}); !reflect.DeepEqual(got, []string{"/"}) {
		t.Errorf("%v", got)
	}
}

func TestLogsAreReadWhateverIsInThem(t *testing.T) {
	t.Parallel()
	lines := readJournal(`{"MESSAGE":"boom\u001b[31m","PRIORITY":"3","_SYSTEMD_UNIT":"init.scope","UNIT":"nginx.service"}
{"MESSAGE":[255,254,27],"PRIORITY":"2","SYSLOG_IDENTIFIER":"kernel"}
not json
{"MESSAGE":null}
`)
	if len(lines) != 3 || lines[0].Unit != "nginx.service" || strings.Contains(lines[0].Text, "\x1b") || lines[1].Priority != 2 || lines[1].Text == "" {
		t.Errorf("%+v", lines)
	}
	for record, told := range map[string]bool{
		"4,100,5000,-;nginx[312]: segfault at 0 ip 0 sp 0 error 4\n SUBSYSTEM=x\n": true,
		"6,101,5001,-;Linux version 6.1.0\n":                                       false,
		"12,102,5002,-;Out of memory, says a program\n":                            false,
		"6,103,5003,-;XFS (vda1): Ending clean mount\n":                            false,
		"1,104,5004,-;XFS (vda1): Metadata corruption detected\n":                  true,
		"garbage": false,
	} {
		if line, ok := trouble([]byte(record)); ok != told {
			t.Errorf("%q: %q", record, line)
		}
	}
}

func TestAMachineThatStartsIsNotLookedAtMoreThanItCanBear(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		looks, state := 0, "starting"
		look := func(context.Context, bool) probe.Status {
			looks++
			time.Sleep(200 * time.Millisecond)
			return probe.Status{InitState: state}
		}
		var m memo
		ask := func(brief bool, want int) {
			t.Helper()
			if s := m.status(t.Context(), look, brief); looks != want || s.InitState == "" {
				t.Errorf("%d looks, want %d; %+v", looks, want, s)
			}
		}
		ask(true, 1)
		ask(true, 1)
		ask(false, 2) // everything is asked for: nothing is remembered
		time.Sleep(time.Second)
		ask(true, 2)
		time.Sleep(time.Second)
		state = "running"
		ask(true, 3)
		ask(true, 4) // of a machine that is up every look counts
	})
}

func TestStatusOfThisMachineFitsALine(t *testing.T) {
	t.Parallel()
	// What the agent started itself is not the server's: only a session of its own is, and a container may have no other.
	other := exec.CommandContext(t.Context(), "sleep", "60")
	other.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Process.Kill(); _ = other.Wait() })
	s := Status(t.Context(), false)
	if s.Kernel == "" || s.Hostname == "" || s.Uptime <= 0 || !slices.Contains(s.Processes, "sleep") {
		t.Errorf("%+v", s)
	}
	if err := probe.Write(io.Discard, probe.Answer{Answer: probe.AskStatus, Status: &s}); err != nil {
		t.Error(err)
	}
	brief := Status(t.Context(), true)
	if brief.Kernel != "" || brief.Now.IsZero() || brief.Processes != nil {
		t.Errorf("%+v", brief)
	}
}

// master and slave are the two ends of a terminal: a serial port with a cable.
func terminal(t *testing.T) (*os.File, string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skip("no terminals here: ", err)
	}
	t.Cleanup(func() { _ = master.Close() })
	var number int
	conn, _ := master.SyscallConn()
	_ = conn.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return master, fmt.Sprintf("/dev/pts/%d", number)
}

func TestASerialPortIsAPlainStream(t *testing.T) {
	t.Parallel()
	master, path := terminal(t)
	port, err := OpenTTY(path)
	if err != nil {
		t.Fatal(err)
	}
	defer port.Close()
	// Characters that a terminal would eat, echo or turn into signals.
	in := []byte("{\"a\":\"\x03\x04\x11\x13\x7f\"}\r\n")
	if _, err := master.Write(in); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(in))
	if _, err := io.ReadFull(port, got); err != nil || !bytes.Equal(got, in) {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := port.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	back := make([]byte, 16)
	n, err := master.Read(back)
	if err != nil || string(back[:n]) != "\n" {
		t.Fatalf("it echoed %q, %v", back[:n], err)
	}
}

func TestAVirtioPortIsFoundBeforeUdevNamesIt(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	class := filepath.Join(root, "sys/class/virtio-ports/vport1p1")
	for _, err := range []error{
		os.MkdirAll(class, 0o755), os.MkdirAll(filepath.Join(root, "dev"), 0o755),
		os.WriteFile(filepath.Join(class, "name"), []byte(probe.PortName+"\n"), 0o600),
		unix.Mkfifo(filepath.Join(root, "dev/vport1p1"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	port, err := OpenVirtio(root, probe.PortName)
	if err != nil {
		t.Fatal(err)
	}
	_ = port.Close()
	if _, err := OpenVirtio(root, "another"); err == nil {
		t.Error("it opened a port of another name")
	}
}

func TestTheAgentSurvivesAHostThatHangsUp(t *testing.T) {
	t.Parallel()
	master, path := terminal(t)
	agent := &Agent{Version: "1", Who: func() probe.Hello { return probe.Hello{BootID: "b"} }}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		agent.Run(ctx, func() (io.ReadWriteCloser, error) { return OpenTTY(path) },
			func() (io.ReadWriteCloser, error) { return nil, os.ErrNotExist })
	}()
	defer func() { cancel(); <-done }()
	for range 3 {
		// A new conversation a time, after half a question of the one before.
		talk := probe.Dial(ctx, func(context.Context) (probe.Channel, error) { return wire{master}, master.SetReadDeadline(time.Time{}) })
		talk.Wake()
		hello, err := talk.Hello(ctx)
		if err != nil || hello.BootID != "b" || hello.Agent == "" || hello.Version != "1" {
			t.Fatalf("%+v, %v", hello, err)
		}
		a, err := talk.Ask(ctx, probe.Ask{Ask: probe.AskCheck, Check: &dr.Check{Name: "x", Kind: dr.CheckCommand, Command: []string{"true"}}})
		if err != nil || a.Result.State != dr.CheckPass {
			t.Fatalf("%+v, %v", a, err)
		}
		if _, err := talk.Ask(ctx, probe.Ask{Ask: probe.AskCheck, Check: &dr.Check{Name: "x", Kind: "other"}}); err == nil {
			t.Fatal("it took a check that is none")
		}
		talk.Close()
		if _, err := master.Write([]byte(`{"ask":"sta`)); err != nil {
			t.Fatal(err)
		}
	}
}

// wire is a terminal that is not closed with the conversation over it: its reader only lets go.
type wire struct{ *os.File }

func (w wire) Close() error { return w.SetReadDeadline(time.Now()) }

func TestAQuestionInPiecesNeverStopsTheAgent(t *testing.T) {
	t.Parallel()
	host, inside := net.Pipe()
	agent := &Agent{Who: func() probe.Hello { return probe.Hello{BootID: "b"} }}
	done := make(chan error, 1)
	go func() { done <- agent.Serve(t.Context(), inside) }()
	go func() {
		for _, junk := range []string{"\x00\xff{{{", strings.Repeat("x", 2*probe.MaxLine), "\n{\"ask\":\"what\",\"id\":1}\n", `{"ask":"check","id":2}` + "\n"} {
			_, _ = host.Write([]byte(junk))
		}
	}()
	in := probe.NewReader(host, 0)
	errs := map[int64]string{}
	for len(errs) < 2 {
		a, err := in.Answer()
		if err != nil {
			t.Fatal(err)
		}
		if a.Answer != probe.SayReady {
			errs[a.ID] = a.Error
		}
	}
	if errs[1] == "" || errs[2] == "" {
		t.Errorf("%v", errs)
	}
	_ = host.Close()
	if err := <-done; err == nil {
		t.Error("it ended without a reason")
	}
}

func TestAFullStatusOfTheLargestServerFits(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("\x01", maxLogText) // six bytes each on the wire
	s := probe.Status{}
	for i := range 5000 {
		name := fmt.Sprintf("%s-%d", long[:100], i)
		s.Processes, s.ActiveUnits, s.FailedUnits = append(s.Processes, name), append(s.ActiveUnits, name), append(s.FailedUnits, name)
		s.Mounts = append(s.Mounts, dr.Filesystem{Device: name, Mount: name, Options: long[:200]})
		s.Listening = append(s.Listening, dr.Listener{Proto: "tcp", Address: "::", Port: i, Process: name})
		s.Journal = append(s.Journal, probe.LogLine{Text: long})
		s.Oops = append(s.Oops, long)
	}
	var out bytes.Buffer
	m := &mouth{port: &out}
	if err := m.say(probe.Answer{Answer: probe.AskStatus, Status: &s}); err != nil {
		t.Fatal(err)
	}
	var back probe.Answer
	if err := json.Unmarshal(out.Bytes(), &back); err != nil || len(back.Status.Listening) == 0 {
		t.Fatal(err)
	}
}
