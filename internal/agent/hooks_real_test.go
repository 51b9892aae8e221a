//go:build linux

package agent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/capture/linux/hooks/hookstest"
	"github.com/musterdr/muster/internal/capture/linux/track"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// shop is a volume with two databases on it that are written to, and a folder with hooks.
type shop struct {
	v          *volume
	pg, maria  *hookstest.Database
	pw, mw     *hookstest.Writer
	file       string // the image as it was received
	image      []byte // the same
	sums       *wire.Sums
	kept       []string
	hooks, log string // folder of the hooks, and what they have done, on the volume
}

func newShop(t *testing.T, size int64) *shop {
	t.Helper()
	s := &shop{v: newVolume(t, "ext4", size), hooks: filepath.Join(t.TempDir(), "hooks.d"), file: filepath.Join(t.TempDir(), "image")}
	s.log = filepath.Join(s.v.mount, "hooks.log")
	if err := errors.Join(os.Mkdir(s.hooks, 0o755), os.WriteFile(s.file, nil, 0o600), os.Truncate(s.file, size)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("MUSTER_TEST_HOOKS", s.hooks)
	t.Cleanup(func() {
		if err := track.Remove(trackDir()); err != nil {
			t.Error(err)
		}
	})
	f, err := os.OpenFile(s.file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if s.image, err = unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(s.image) })
	s.pg, s.maria = hookstest.Postgres(t, filepath.Join(s.v.mount, "pg")), hookstest.MariaDB(t, filepath.Join(s.v.mount, "my"))
	s.pw, s.mw = s.pg.Write(t), s.maria.Write(t)
	s.sums = s.v.sums(t)
	return s
}

// hook installs a hook that notes that it ran, on the volume itself, and does something more.
func (s *shop) hook(t *testing.T, name, more string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.hooks, name), []byte("#!/bin/sh\necho "+name+" $1 >>"+s.log+"\n"+more+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (s *shop) ran() string {
	b, _ := os.ReadFile(s.log)
	return strings.Join(strings.Split(strings.TrimSpace(string(b)), "\n"), ", ")
}

// acked is how far the writers are.
type acked struct{ pg, maria int64 }

func (s *shop) acked() acked { return acked{s.pw.Acked(), s.mw.Acked()} }

// capture takes a snapshot, which is kept.
func (s *shop) capture(t *testing.T, plan wire.Plan) (done wire.Done, before, after acked) {
	t.Helper()
	agent := startIn(t, trackDir())
	id := "snap-" + string(rune('a'+len(s.kept)))
	plan.Disks, plan.Track, plan.Snapshot, plan.Since = []string{s.v.device}, true, id, s.kept
	before = s.acked()
	agent.follow(t, plan, s.sums)
	_, done = agent.receive(t, s.image, s.sums)
	after = s.acked()
	if err := agent.w.Kept(); err != nil {
		t.Fatal(err)
	}
	if err := agent.cmd.Wait(); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	s.kept = append([]string{id}, s.kept...)
	return done, before, after
}

// mounted mounts a copy of the image that was received.
func (s *shop) mounted(t *testing.T) (at string, unmount func()) {
	t.Helper()
	dir := t.TempDir()
	at = filepath.Join(dir, "mnt")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "image")
	command(t, "cp", "--sparse=always", s.file, file)
	command(t, "mount", "-o", "loop", file, at)
	return at, func() {
		command(t, "umount", at)
		os.Remove(file)
	}
}

// prove starts both databases on the image: they hold what they acknowledged. It says what is unclean of what has no log.
func (s *shop) prove(t *testing.T, before, after acked) (unclean string) {
	t.Helper()
	at, unmount := s.mounted(t)
	defer unmount()
	unclean = s.maria.Clean(filepath.Join(at, "my"))
	s.pg.Held(t, filepath.Join(at, "pg"), before.pg, after.pg)
	s.maria.Held(t, filepath.Join(at, "my"), before.maria, after.maria)
	return unclean
}

// free waits until no database has anything of ours.
func (s *shop) free(t *testing.T) {
	t.Helper()
	for limit := time.Now().Add(20 * time.Second); ; pause() {
		pg := s.pg.Ask(t, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'muster';")
		maria := s.maria.Ask(t, "SELECT COUNT(*) FROM INFORMATION_SCHEMA.PROCESSLIST WHERE USER = 'mysql';")
		if pg == "0" && maria == "0" {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("sessions of ours are left: %s in PostgreSQL, %s in MariaDB", pg, maria)
		}
	}
	s.pw.Await(t, 2)
	s.mw.Await(t, 2)
}

func (s *shop) awaitRan(t *testing.T, want string) {
	t.Helper()
	for limit := time.Now().Add(30 * time.Second); s.ran() != want; pause() {
		if time.Now().After(limit) {
			t.Fatalf("hooks ran: %q, want %q", s.ran(), want)
		}
	}
}

func TestRealDatabasesOfADozenIncrementsHoldAllThatTheyAcknowledged(t *testing.T) {
	real(t)
	s := newShop(t, 700<<20)
	s.hook(t, "10-shop", "")
	// Without hooks a table that no log repairs is found open, or this test proves nothing of them.
	done, _, _ := s.capture(t, wire.Plan{FreezeLimit: 20 * time.Second, Hooks: dr.Hooks{Off: true}})
	if done.Consistency != dr.FilesystemConsistent || len(done.Applications) != 0 || s.ran() != "" {
		t.Errorf("with hooks off: %+v, %q", done, s.ran())
	}
	at, unmount := s.mounted(t)
	if unclean := s.maria.Clean(filepath.Join(at, "my")); !strings.Contains(unclean, "myisamchk") || !strings.Contains(unclean, "aria_chk") {
		t.Errorf("a server that is in the middle of writing leaves its tables clean: %q", unclean)
	}
	unmount()
	var frozen, still []time.Duration
	for n := range 12 {
		s.pw.Await(t, 20)
		s.mw.Await(t, 20)
		done, before, after := s.capture(t, wire.Plan{FreezeLimit: 20 * time.Second})
		if done.Consistency != dr.ApplicationConsistent || len(done.Applications) != 3 || len(done.Notes) != 0 {
			t.Errorf("increment %d: %+v", n, done)
		}
		frozen = append(frozen, done.Frozen)
		for _, a := range done.Applications {
			if strings.HasPrefix(a.Name, "MariaDB") {
				still = append(still, a.Still)
			}
		}
		if unclean := s.prove(t, before, after); unclean != "" {
			t.Errorf("increment %d: %s", n, unclean)
		}
	}
	slices.Sort(frozen)
	slices.Sort(still)
	t.Logf("frozen for %s in the middle, %s at most; MariaDB stood still for %s, %s", frozen[6], frozen[11], still[6], still[11])
	s.free(t)
	if n := strings.Count(s.ran(), "post"); n != 12 || strings.Count(s.ran(), "pre") != 12 {
		t.Errorf("hooks ran: %s", s.ran())
	}
}

func TestRealAnAgentKilledAtAnyStepLeavesNoLockAndNoBackup(t *testing.T) {
	real(t)
	s := newShop(t, bigVolume)
	s.hook(t, "app", "test $1 = post || test ! -e "+filepath.Join(s.hooks, ".wait")+" || sleep 1000")
	w := s.v.write(t)
	steps := []struct {
		name string
		to   func(t *testing.T, c *child)
	}{
		{"in a hook", func(t *testing.T, _ *child) {
			if err := os.WriteFile(filepath.Join(s.hooks, ".wait"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.Remove(filepath.Join(s.hooks, ".wait")) })
			s.awaitRan(t, "app pre")
		}},
		{"before the freeze", func(t *testing.T, c *child) { c.toFrozenPass(t) }},
		{"frozen", func(t *testing.T, c *child) {
			c.toFrozenPass(t)
			c.awaitFreeze(t, w)
			if s.mw.Still() < 500*time.Millisecond {
				t.Error("MariaDB writes to a frozen file system")
			}
		}},
		{"after the thaw", func(t *testing.T, c *child) { c.toFrozenPass(t); s.awaitRan(t, "app pre, app post") }},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			if err := os.WriteFile(s.log, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			c := start(t)
			c.begin(t, wire.Plan{Disks: []string{s.v.device}, FreezeLimit: 60 * time.Second}, s.v.sums(t))
			drained := make(chan struct{})
			if step.name == "in a hook" {
				go func() {
					defer close(drained)
					for {
						if _, _, err := c.r.Next(nil); err != nil {
							return
						}
					}
				}()
			} else {
				close(drained)
			}
			step.to(t, c)
			if err := c.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			<-drained
			killed := time.Now()
			s.free(t)
			t.Logf("all go on %s after the kill", time.Since(killed))
			s.awaitRan(t, "app pre, app post") // on the file system that was frozen
		})
	}
}

func TestRealTheLocksOfAnAgentThatHangsEndAfterTheWatchdog(t *testing.T) {
	real(t)
	s := newShop(t, 1<<30)
	s.hook(t, "app", "")
	w := s.v.write(t)
	c := start(t)
	sums := s.v.sums(t)
	const limit = 12 * time.Second // much longer than a pass, which looking for the freeze makes slow
	c.begin(t, wire.Plan{Disks: []string{s.v.device}, FreezeLimit: limit}, sums)
	var done wire.Done
	before := s.acked()
	received := make(chan struct{})
	go func() {
		defer close(received)
		_, done = c.receive(t, s.image, sums)
	}()
	c.awaitFreeze(t, w) // and the agent stands still
	w.await(t, 1)
	s.mw.Await(t, 2)
	if longest := s.mw.Longest(); longest > limit+lockSlack+2*time.Second {
		t.Errorf("MariaDB stood still for %s", longest)
	}
	if err := c.cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	<-received
	after := s.acked()
	if done.Passes < 3 || done.Consistency != dr.ApplicationConsistent {
		t.Errorf("%+v", done)
	}
	s.free(t)
	if s.ran() != "app pre, app post" {
		t.Errorf("hooks ran: %s", s.ran())
	}
	if unclean := s.prove(t, before, after); unclean != "" {
		t.Error(unclean)
	}
}

func TestRealAHookThatFailsCostsTheConsistencyOrTheSnapshot(t *testing.T) {
	real(t)
	s := newShop(t, 700<<20)
	s.hook(t, "10-broken", "echo cannot stop; test $1 = post")
	s.hook(t, "20-hangs", "test $1 = post || sleep 1000")
	done, before, after := s.capture(t, wire.Plan{FreezeLimit: 20 * time.Second, Hooks: dr.Hooks{Limit: 2 * time.Second}})
	why := map[string]string{}
	for _, a := range done.Applications {
		name, _, _ := strings.Cut(a.Name, " at ")
		if why[name] = a.Reason; a.AtRest != (a.Reason == "") {
			t.Errorf("%+v", a)
		}
	}
	if done.Consistency != dr.FilesystemConsistent || len(why) != 4 {
		t.Errorf("%+v", done)
	}
	if !strings.Contains(why["hook 10-broken"], "exit status 1: cannot stop") || !strings.Contains(why["hook 20-hangs"], "killed, because it was not done within 2s") {
		t.Errorf("reasons: %q", why)
	}
	if s.ran() != "10-broken pre, 20-hangs pre, 20-hangs post, 10-broken post" {
		t.Errorf("hooks ran: %s", s.ran())
	}
	if unclean := s.prove(t, before, after); unclean != "" { // the databases' own hooks worked
		t.Error(unclean)
	}
	agent := start(t)
	agent.follow(t, wire.Plan{Disks: []string{s.v.device}, Hooks: dr.Hooks{Limit: time.Second, Required: true}}, s.v.sums(t))
	for {
		kind, payload, err := agent.r.Next(nil)
		if err != nil {
			t.Fatal(err)
		}
		if kind == wire.KindDone {
			t.Fatal("a snapshot was taken although its hooks failed and are required")
		}
		if kind == wire.KindFailure {
			if !strings.Contains(string(payload), "hooks are required") || !strings.Contains(string(payload), "10-broken") {
				t.Errorf("it gave up with %s", payload)
			}
			break
		}
	}
	s.free(t)
}
