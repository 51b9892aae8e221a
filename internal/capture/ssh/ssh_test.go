package ssh

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/capturetest"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// shared is one store for all tests: making one costs more than a capture.
var shared *store.Store

// built is the agent's program.
var built []byte

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "muster")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", filepath.Join(dir, "muster-agent"), "github.com/musterdr/muster/cmd/muster-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		panic(fmt.Sprintf("build the agent: %v\n%s", err, out))
	}
	if built, err = os.ReadFile(filepath.Join(dir, "muster-agent")); err != nil {
		panic(err)
	}
	place := folder.Driver{Path: filepath.Join(dir, "store")}
	if err := store.Create(ctx, place, "password"); err != nil {
		panic(err)
	}
	if shared, err = store.Open(ctx, place, "password"); err != nil {
		panic(err)
	}
	defer shared.Close(ctx)
	return m.Run()
}

func newKey(t *testing.T) (ssh.Signer, string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return signer, path
}

// host is an SSH server in this process, which runs what it is asked to as a child of its own.
type host struct {
	t       *testing.T
	listen  net.Listener
	hostKey ssh.Signer
	login   ssh.PublicKey // the key it accepts
	bin     string        // folder of commands that come before the system's
	cache   string

	came, left atomic.Int64 // bytes that commands wrote, and that they may still write if there is a limit
	limited    atomic.Bool

	mu    sync.Mutex
	conns []net.Conn
	work  sync.WaitGroup
}

// newHost gives a server and a source that may log in to it.
func newHost(t *testing.T) (*host, dr.SSHSource) {
	t.Helper()
	hostKey, _ := newKey(t)
	login, keyFile := newKey(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	h := &host{t: t, listen: l, hostKey: hostKey, login: login.PublicKey(), bin: filepath.Join(dir, "bin"), cache: filepath.Join(dir, "cache", "muster")}
	if err := os.Mkdir(h.bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() != 0 {
		h.fake("id", "echo 0")
	}
	h.work.Go(h.serve)
	t.Cleanup(func() {
		l.Close()
		h.cut()
		h.work.Wait()
	})
	return h, dr.SSHSource{
		User: "root", Host: "127.0.0.1", Port: l.Addr().(*net.TCPAddr).Port, KeyFile: keyFile,
		HostKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(hostKey.PublicKey()))),
	}
}

// fake puts a command before the system's own.
func (h *host) fake(name, script string) {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.bin, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		h.t.Fatal(err)
	}
}

// cut drops every connection, as if the host had gone down.
func (h *host) cut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.conns {
		c.Close()
	}
}

func (h *host) serve() {
	config := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if string(key.Marshal()) != string(h.login.Marshal()) {
			return nil, errors.New("unknown key")
		}
		return nil, nil
	}}
	config.AddHostKey(h.hostKey)
	for {
		c, err := h.listen.Accept()
		if err != nil {
			return
		}
		h.mu.Lock()
		h.conns = append(h.conns, c)
		h.mu.Unlock()
		h.work.Go(func() {
			defer c.Close()
			_, channels, requests, err := ssh.NewServerConn(c, config)
			if err != nil {
				return
			}
			h.work.Go(func() { ssh.DiscardRequests(requests) })
			for ch := range channels {
				h.work.Go(func() { h.session(ch) })
			}
		})
	}
}

func (h *host) session(nc ssh.NewChannel) {
	ch, requests, err := nc.Accept()
	if err != nil {
		return
	}
	defer ch.Close()
	for req := range requests {
		if req.Type != "exec" {
			_ = req.Reply(false, nil)
			continue
		}
		var ask struct{ Command string }
		_ = ssh.Unmarshal(req.Payload, &ask)
		_ = req.Reply(true, nil)
		h.work.Go(func() { ssh.DiscardRequests(requests) })
		status := struct{ Status uint32 }{h.exec(ask.Command, ch)}
		_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(&status))
		return
	}
}

// line ends what commands write after so many bytes, or never; it says how many they wrote since it was last called.
func (h *host) line(after int64) (came int64) {
	h.left.Store(after)
	h.limited.Store(after > 0)
	return h.came.Swap(0)
}

// metered is what a command writes to.
type metered struct {
	ssh.Channel
	h *host
}

func (m metered) Write(p []byte) (int, error) {
	if m.h.limited.Load() {
		if left := m.h.left.Add(-int64(len(p))); left < 0 {
			p = p[:max(0, int64(len(p))+left)]
			n, _ := m.Channel.Write(p)
			m.h.came.Add(int64(n))
			return n, io.ErrClosedPipe
		}
	}
	n, err := m.Channel.Write(p)
	m.h.came.Add(int64(n))
	return n, err
}

// exec runs a command as sshd does: when the channel goes, so do its pipes.
func (h *host) exec(command string, ch ssh.Channel) uint32 {
	cmd := exec.Command("sh", "-c", command)
	cmd.Env = append(os.Environ(), "PATH="+h.bin+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = metered{ch, h}, ch.Stderr()
	in, err := cmd.StdinPipe()
	if err != nil {
		return 255
	}
	go func() {
		_, _ = io.Copy(in, ch)
		in.Close()
	}()
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return uint32(exit.ExitCode())
		}
		return 255
	}
	return 0
}

// program is the agent for this machine, whatever is asked for.
func program(string, string) ([]byte, error) { return built, nil }

func (h *host) open(t *testing.T, source dr.SSHSource) *Source {
	t.Helper()
	s, err := Open(t.Context(), source, program)
	if err != nil {
		t.Fatal(err)
	}
	s.cache = h.cache
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func newDisk(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "disk.img")
	capturetest.Fill(t, path, 1)
	return path
}

func TestSource(t *testing.T) {
	capturetest.Run(t, func(t *testing.T) *capturetest.Bench {
		h, source := newHost(t)
		source.Disks = []string{newDisk(t)}
		return &capturetest.Bench{Store: shared, Disks: source.Disks, Sends: true, Cut: h.line,
			Open: func(t *testing.T) capture.Source { return h.open(t, source) }}
	})
}

func take(ctx context.Context, src capture.Source, report dr.Progress) (dr.Snapshot, error) {
	return capture.Take(ctx, src, shared, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: "srv-1", Name: "web"}}, report)
}

func TestAWrongHostKeyIsAnErrorWithBothFingerprints(t *testing.T) {
	h, source := newHost(t)
	other, _ := newKey(t)
	source.HostKey = string(ssh.MarshalAuthorizedKey(other.PublicKey()))
	_, err := Open(t.Context(), source, program)
	for _, want := range []string{ssh.FingerprintSHA256(other.PublicKey()), ssh.FingerprintSHA256(h.hostKey.PublicKey()), "--host-key"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: does not mention %s", err, want)
		}
	}
}

func TestAHostKeyOfAnotherKindIsAnErrorWithBothFingerprints(t *testing.T) {
	h, source := newHost(t)
	// A key from RFC 5656's curve, well-formed and not the server's.
	source.HostKey = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBGsX0fLhLEJH+Lzm5WOkQPJ3A32BLeszoPShOUXYmMKWT+NC4v4af5uO5+tKfA+eFivOM1drMV7Oy7ZAaDe/UfU="
	_, err := Open(t.Context(), source, program)
	for _, want := range []string{"ecdsa-sha2-nistp256 SHA256:", ssh.FingerprintSHA256(h.hostKey.PublicKey())} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: does not mention %s", err, want)
		}
	}
}

func TestAServerWithoutARecordedKeyIsContactedAndNotCaptured(t *testing.T) {
	h, source := newHost(t)
	known := source.HostKey
	source.HostKey, source.Disks = "", []string{newDisk(t)}
	s := h.open(t, source)
	about, err := s.Contact(t.Context())
	if err != nil || about.HostKey != known || about.Fingerprint != ssh.FingerprintSHA256(h.hostKey.PublicKey()) || about.Inventory.Kernel != "" {
		t.Errorf("contact: key %q, fingerprint %q, kernel %q (nothing may run before the key is confirmed), %v", about.HostKey, about.Fingerprint, about.Inventory.Kernel, err)
	}
	if _, err := os.Stat(h.cache); err == nil {
		t.Error("contact left its folder behind")
	}
	if _, err := take(t.Context(), s, nil); err == nil || !strings.Contains(err.Error(), "confirmed") {
		t.Errorf("captured without a confirmed host key: %v", err)
	}
}

func TestWhatKeepsPeopleFromConnectingIsSaid(t *testing.T) {
	_, source := newHost(t)
	with := func(change func(*dr.SSHSource)) dr.SSHSource {
		s := source
		change(&s)
		return s
	}
	_, stranger := newKey(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	garbage := filepath.Join(t.TempDir(), "garbage")
	_ = os.WriteFile(garbage, []byte("not a key"), 0o600)
	for name, c := range map[string]struct {
		source dr.SSHSource
		want   string
	}{
		"wrong key":       {with(func(s *dr.SSHSource) { s.KeyFile = stranger }), "authorized_keys"},
		"no key":          {with(func(s *dr.SSHSource) { s.KeyFile = "/nowhere/key" }), "read SSH key"},
		"no private key":  {with(func(s *dr.SSHSource) { s.KeyFile = garbage }), "not a private key"},
		"nobody listens":  {with(func(s *dr.SSHSource) { s.Port = free.Addr().(*net.TCPAddr).Port }), "see that the server is up"},
		"broken host key": {with(func(s *dr.SSHSource) { s.HostKey = "ssh-ed25519" }), "host key on record"},
	} {
		if _, err := Open(t.Context(), c.source, program); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", name, err, c.want)
		}
	}
}

func TestAServerThatCannotBeCapturedSaysWhy(t *testing.T) {
	for name, c := range map[string]struct {
		command, script, want string
	}{
		"not root":              {"id", "echo 1000", "log in as root"},
		"not Linux":             {"uname", "if test $1 = -s; then echo FreeBSD; else echo amd64; fi", "FreeBSD"},
		"other hardware":        {"uname", "if test $1 = -s; then echo Linux; else echo riscv64; fi", "riscv64"},
		"disk full":             {"cat", "echo cat: write error: No space left on device >&2; exit 1", "No space left on device: make room"},
		"changed on the way":    {"cat", "head -c 1000", "not the one that was sent"},
		"folder cannot be made": {"mkdir", "echo read-only file system >&2; exit 1", "cannot be made: read-only"},
		"noexec":                {"chmod", `if test $1 = 700 -a -f $2; then exec /bin/chmod 600 $2; fi; exec /bin/chmod "$@"`, "noexec"},
	} {
		t.Run(name, func(t *testing.T) {
			h, source := newHost(t)
			h.fake(c.command, c.script)
			source.Disks = []string{newDisk(t)}
			if _, err := take(t.Context(), h.open(t, source), nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q in it", err, c.want)
			}
		})
	}
}

func TestAnotherFolderInThePlaceOfTheCacheIsLeftAlone(t *testing.T) {
	h, source := newHost(t)
	elsewhere := t.TempDir()
	if err := errors.Join(os.MkdirAll(filepath.Dir(h.cache), 0o755), os.Symlink(elsewhere, h.cache)); err != nil {
		t.Fatal(err)
	}
	source.Disks = []string{newDisk(t)}
	if _, err := take(t.Context(), h.open(t, source), nil); err == nil || !strings.Contains(err.Error(), "belongs to root alone") {
		t.Errorf("a link in the place of the cache folder: %v", err)
	}
	if left, _ := os.ReadDir(elsewhere); len(left) != 0 {
		t.Error("something was written behind the link")
	}
}

func TestOnlyTheAgentIsLeftAndOldOnesAreRemoved(t *testing.T) {
	h, source := newHost(t)
	if err := os.MkdirAll(h.cache, 0o700); err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(h.cache, "agent-0123")
	if err := os.WriteFile(old, []byte("an older release"), 0o700); err != nil {
		t.Fatal(err)
	}
	source.Disks = []string{newDisk(t)}
	s := h.open(t, source)
	if _, err := take(t.Context(), s, nil); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(built)
	left, err := os.ReadDir(h.cache)
	if err != nil || len(left) != 1 || left[0].Name() != "agent-"+hex.EncodeToString(sum[:]) {
		t.Errorf("left: %v, %v", left, err)
	}
	// A copy that was tampered with is replaced, not run.
	agentFile := filepath.Join(h.cache, left[0].Name())
	if err := os.WriteFile(agentFile, []byte("#!/bin/sh\ntouch "+h.cache+"/ran\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := take(t.Context(), s, nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(h.cache + "/ran"); err == nil {
		t.Error("a strange program was run")
	}
	if err := s.Forget(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(h.cache); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Forget: %v", err)
	}
}

func TestAConnectionCutInTheMiddleLeavesNoSnapshotAndNoAgent(t *testing.T) {
	h, source := newHost(t)
	source.Disks = []string{newDisk(t)}
	s := h.open(t, source)
	_, err := take(t.Context(), s, func(part string, _, _ int64, _ string) {
		if strings.HasPrefix(part, "read") {
			h.cut()
		}
	})
	if err == nil {
		t.Fatal("a capture survived the loss of its connection")
	}
	s.Close()
	h.listen.Close()
	ended := make(chan struct{})
	go func() {
		h.work.Wait() // for every command that the server runs
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("the agent is still there")
	}
}

func TestAServerThatFallsSilentIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		w := &watched{Conn: ours}
		began := time.Now()
		if _, err := w.Read(make([]byte, 1)); err == nil {
			t.Fatal("read something from a server that says nothing")
		}
		if took := time.Since(began); took != silence || !w.silent.Load() {
			t.Errorf("given up after %s, want %s", took, silence)
		}
		if _, err := w.Write([]byte("x")); err == nil {
			t.Error("whoever writes does not notice")
		}
	})
}
