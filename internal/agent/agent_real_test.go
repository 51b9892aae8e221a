//go:build linux

package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// ownMounts runs the tests again in a mount namespace of their own, so that no mount of theirs outlives them.
func ownMounts() {
	if os.Getenv("MUSTER_OWN_MOUNTS") != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			panic(err)
		}
		return
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), "MUSTER_OWN_MOUNTS=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func real(t *testing.T) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root and loop devices: set MUSTER_REAL=1")
	}
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// volume is a file system on a loop device that somebody writes to.
type volume struct {
	fstype, device, mount string
	size                  int64
}

// newVolume makes a file system that ends a little before its device.
func newVolume(t *testing.T, fstype string, size int64) *volume {
	t.Helper()
	dir := t.TempDir()
	v := &volume{fstype: fstype, size: size, mount: filepath.Join(dir, "mnt")}
	file := filepath.Join(dir, "disk.img")
	if err := errors.Join(os.Mkdir(v.mount, 0o755), os.WriteFile(file, nil, 0o600), os.Truncate(file, size)); err != nil {
		t.Fatal(err)
	}
	v.device = command(t, "losetup", "--find", "--show", file)
	t.Cleanup(func() { command(t, "losetup", "--detach", v.device) })
	switch fstype {
	case "ext4":
		command(t, "mkfs.ext4", "-q", "-F", v.device, strconv.FormatInt(size/1024-1024, 10))
	case "xfs":
		command(t, "mkfs.xfs", "-q", "-d", fmt.Sprintf("size=%d", size-1<<20), v.device)
	case "btrfs":
		command(t, "mkfs.btrfs", "-q", "-b", strconv.FormatInt(size-1<<20, 10), v.device)
	}
	command(t, "mount", v.device, v.mount)
	t.Cleanup(func() {
		// A watchdog may still be on its way out.
		for limit := time.Now().Add(5 * time.Second); unix.Unmount(v.mount, 0) != nil; pause() {
			if time.Now().After(limit) {
				t.Errorf("unmount %s: still in use", v.mount)
				return
			}
		}
	})
	return v
}

// writer writes numbers to a file system: first to one file, then to another, each synced before the next. Whoever sees
// both at one instant sees them equal, or the first ahead by one.
type writer struct {
	acked  atomic.Int64 // number that is safe in both files
	beat   atomic.Int64 // when it last got something done, Unix nanoseconds
	worst  atomic.Int64 // longest time that it stood still, nanoseconds
	stop   chan struct{}
	ended  sync.WaitGroup
	failed atomic.Pointer[error]
}

func (v *volume) write(t *testing.T) *writer {
	t.Helper()
	w := &writer{stop: make(chan struct{})}
	w.beat.Store(time.Now().UnixNano())
	w.ended.Go(func() {
		if err := w.run(v.mount); err != nil {
			w.failed.Store(&err)
		}
	})
	t.Cleanup(func() { w.end(t) })
	w.await(t, 5)
	return w
}

func (w *writer) end(t *testing.T) {
	select {
	case <-w.stop:
		return
	default:
	}
	close(w.stop)
	w.ended.Wait()
	if err := w.failed.Load(); err != nil {
		t.Errorf("write under capture: %v", *err)
	}
}

func (w *writer) run(dir string) error {
	var files []*os.File
	for _, name := range []string{"first", "second"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		defer f.Close()
		files = append(files, f)
	}
	for n := int64(1); ; n++ {
		select {
		case <-w.stop:
			return nil
		default:
		}
		for _, f := range files {
			if _, err := f.WriteAt([]byte(fmt.Sprintf("%020d", n)), 0); err != nil {
				return err
			}
			if err := f.Sync(); err != nil {
				return err
			}
			now := time.Now().UnixNano()
			w.worst.Store(max(w.worst.Load(), now-w.beat.Swap(now)))
		}
		// Something that grows and shrinks, so that metadata changes as well.
		name := filepath.Join(dir, fmt.Sprintf("file-%d", n%50))
		if err := os.WriteFile(name, bytes.Repeat([]byte("x"), int(n%7)*20000), 0o644); err != nil {
			return err
		}
		w.acked.Store(n)
	}
}

// await waits until the writer has got on by some steps.
func (w *writer) await(t *testing.T, steps int64) {
	t.Helper()
	for from, limit := w.acked.Load(), time.Now().Add(20*time.Second); w.acked.Load() < from+steps; {
		if time.Now().After(limit) || w.failed.Load() != nil {
			t.Fatalf("the writer does not get on: %d", w.acked.Load())
		}
		pause()
	}
}

// pause lets a poll of the kernel's state wait; there is nothing in it to be told by.
func pause() { <-time.After(2 * time.Millisecond) }

func (w *writer) still() time.Duration { return time.Since(time.Unix(0, w.beat.Load())) }

// awaitFreeze returns when the file system is frozen, with the agent stopped in that moment. A writer that stands still may
// only be slow; one that goes on standing still while the agent is stopped is frozen.
func (c *child) awaitFreeze(t *testing.T, w *writer) {
	t.Helper()
	const suspicious, sure = 3 * time.Millisecond, 1500 * time.Millisecond
	signal := func(s syscall.Signal) {
		if err := c.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	for limit := time.Now().Add(60 * time.Second); time.Now().Before(limit); pause() {
		if w.still() < suspicious {
			continue
		}
		signal(syscall.SIGSTOP)
		for beat := w.beat.Load(); w.beat.Load() == beat; pause() {
			if w.still() > sure {
				return
			}
		}
		signal(syscall.SIGCONT)
	}
	t.Fatalf("nothing was ever frozen; the writer stood still for %s at most", time.Duration(w.worst.Load()))
}

// toFrozenPass reads until the agent announces the pass under freeze, and collects in the background from there on.
func (c *child) toFrozenPass(t *testing.T) {
	t.Helper()
	for {
		kind, payload, err := c.r.Next(nil)
		if err != nil {
			t.Fatal(err)
		}
		var p wire.Pass
		if kind == wire.KindFailure {
			t.Fatalf("the agent gave up: %s", payload)
		}
		if kind == wire.KindPass && wire.Decode(payload, &p) == nil && p.Frozen {
			return
		}
	}
}

func (v *volume) sums(t *testing.T) *wire.Sums {
	t.Helper()
	s, err := wire.NewSums(wire.NewSeed(), 128<<10, v.size)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const bigVolume = 2 << 30 // so that reading it takes a second or so

func TestRealFrozenPassIsOneInstant(t *testing.T) {
	real(t)
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			v := newVolume(t, fstype, 400<<20)
			w := v.write(t)
			c := start(t)
			before := w.acked.Load()
			sums := v.sums(t)
			c.begin(t, wire.Plan{Disks: []string{v.device}, FreezeLimit: 20 * time.Second}, sums)
			image := make([]byte, v.size)
			_, done := c.receive(t, image, sums)
			after := w.acked.Load()
			w.await(t, 5)
			if done.Consistency != dr.FilesystemConsistent || done.Frozen <= 0 || done.Passes < 2 {
				t.Errorf("done: %+v", done)
			}
			t.Logf("frozen for %s, %d passes, the writer stood still for at most %s", done.Frozen, done.Passes, time.Duration(w.worst.Load()))
			v.examine(t, image, before, after)
		})
	}
}

// examine checks an image of the volume: it is clean without any replay, and holds what was synced.
func (v *volume) examine(t *testing.T, image []byte, before, after int64) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, image, 0o600); err != nil {
		t.Fatal(err)
	}
	options := "loop,ro,norecovery"
	if v.fstype == "ext4" {
		if head := command(t, "dumpe2fs", "-h", file); strings.Contains(head, "needs_recovery") {
			t.Error("the journal of the image needs to be replayed")
		}
		command(t, "e2fsck", "-fn", file)
	} else {
		options += ",nouuid"
	}
	at := filepath.Join(t.TempDir(), "image.mnt")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, "mount", "-o", options, file, at)
	v.compare(t, at, before, after)
	command(t, "umount", at)
	if v.fstype == "xfs" {
		// A frozen xfs leaves one record in its log on purpose, so that a mount sweeps up unlinked files. All else is in its
		// place, as the mount without recovery has just shown; after one with it xfs_repair must find nothing.
		command(t, "mount", "-o", "loop,nouuid", file, at)
		v.compare(t, at, before, after)
		command(t, "umount", at)
		command(t, "xfs_repair", "-n", file)
	}
}

// compare reads what the writer wrote from a mounted image.
func (v *volume) compare(t *testing.T, at string, before, after int64) {
	t.Helper()
	read := func(name string) int64 {
		b, err := os.ReadFile(filepath.Join(at, name))
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.ParseInt(string(b), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	first, second := read("first"), read("second")
	if first < second || first > second+1 {
		t.Errorf("the image shows %d and %d together, which never were", first, second)
	}
	if second < before || second > after+1 {
		t.Errorf("the image shows %d; %d was synced before the capture and %d after it", second, before, after)
	}
}

func TestRealAnAgentKilledWhileFrozenLeavesNothingFrozen(t *testing.T) {
	real(t)
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			v := newVolume(t, fstype, bigVolume)
			w := v.write(t)
			c := start(t)
			c.begin(t, wire.Plan{Disks: []string{v.device}, FreezeLimit: 60 * time.Second}, v.sums(t))
			c.toFrozenPass(t)
			c.awaitFreeze(t, w)
			if err := c.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			killed := time.Now()
			w.await(t, 1)
			if took := time.Since(killed); took > time.Second {
				t.Errorf("the first write after the kill took %s", took)
			} else {
				t.Logf("thawed and written to %s after the kill", took)
			}
		})
	}
}

func TestRealTheWatchdogThawsAtItsDeadlineAndThePassIsVoid(t *testing.T) {
	real(t)
	v := newVolume(t, "ext4", bigVolume)
	w := v.write(t)
	c := start(t)
	sums := v.sums(t)
	const limit = 15 * time.Second // much longer than a pass, which looking for the freeze makes slow
	c.begin(t, wire.Plan{Disks: []string{v.device}, FreezeLimit: limit}, sums)
	image := make([]byte, v.size)
	before := w.acked.Load()
	var blocks int
	var done wire.Done
	received := make(chan struct{})
	go func() {
		defer close(received)
		blocks, done = c.receive(t, image, sums)
	}()
	c.awaitFreeze(t, w)
	w.await(t, 1) // though the agent stands still
	if w.worst.Load() > int64(limit+time.Second) {
		t.Errorf("the writer stood still for %s, the limit is %s", time.Duration(w.worst.Load()), limit)
	}
	if err := c.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	<-received
	after := w.acked.Load()
	if done.Passes < 3 || done.Consistency != dr.FilesystemConsistent {
		t.Errorf("%d blocks, %+v: want the void pass to be made again", blocks, done)
	}
	w.end(t)
	v.examine(t, image, before, after)
}

func TestRealAFreezeThatWouldTakeTooLongIsRefusedBeforeItBegins(t *testing.T) {
	real(t)
	v := newVolume(t, "ext4", 400<<20)
	w := v.write(t)
	c := start(t)
	c.begin(t, wire.Plan{Disks: []string{v.device}, FreezeLimit: 10 * time.Millisecond}, v.sums(t))
	for {
		kind, payload, err := c.r.Next(nil)
		if err != nil {
			t.Fatal(err)
		}
		if kind == wire.KindDone {
			t.Fatalf("400 MB were read in 10 ms: %s", payload)
		}
		if kind == wire.KindFailure {
			if !strings.Contains(string(payload), "raise the freeze limit") || !strings.Contains(string(payload), "nothing was frozen") {
				t.Errorf("it gave up with %s", payload)
			}
			break
		}
	}
	w.await(t, 1)
}

func TestRealAWatchdogThatIsKilledIsNoticedAndNothingStaysFrozen(t *testing.T) {
	real(t)
	v := newVolume(t, "ext4", bigVolume)
	w := v.write(t)
	c := start(t)
	sums := v.sums(t)
	c.begin(t, wire.Plan{Disks: []string{v.device}, FreezeLimit: 60 * time.Second}, sums)
	image := make([]byte, v.size)
	var done wire.Done
	received := make(chan struct{})
	go func() {
		defer close(received)
		_, done = c.receive(t, image, sums)
	}()
	c.awaitFreeze(t, w)
	dogs := strings.Fields(command(t, "pgrep", "-P", strconv.Itoa(c.cmd.Process.Pid)))
	if len(dogs) != 1 {
		t.Fatalf("the agent has children %v", dogs)
	}
	pid, _ := strconv.Atoi(dogs[0])
	if err := errors.Join(syscall.Kill(pid, syscall.SIGKILL), c.cmd.Process.Signal(syscall.SIGCONT)); err != nil {
		t.Fatal(err)
	}
	<-received
	if w.await(t, 1); done.Passes < 3 {
		t.Errorf("done: %+v, want another pass after the one without a watchdog", done)
	}
}

func TestRealWritesBelowTheFileSystemVoidThePass(t *testing.T) {
	real(t)
	v := newVolume(t, "ext4", 800<<20)
	raw, err := os.OpenFile(v.device, os.O_WRONLY|unix.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		defer raw.Close()
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
				_, _ = raw.WriteAt(bytes.Repeat([]byte{byte(n)}, 4096), v.size-4096) // behind the file system
			}
		}
	}()
	defer func() { close(stop); <-ended }()
	c := start(t)
	c.begin(t, wire.Plan{Disks: []string{v.device}}, v.sums(t))
	for {
		kind, payload, err := c.r.Next(nil)
		if err != nil {
			t.Fatal(err)
		}
		if kind == wire.KindDone {
			t.Fatalf("an image was made of a disk that did not stand still: %s", payload)
		}
		if kind == wire.KindFailure {
			if !strings.Contains(string(payload), "writes to it directly") {
				t.Errorf("it gave up with %s", payload)
			}
			return
		}
	}
}
