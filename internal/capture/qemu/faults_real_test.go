package qemu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/capturetest"
	"github.com/musterdr/muster/internal/dr"
)

func (r *rig) scribble(t *testing.T, rnd *rand.Rand, writes int) {
	t.Helper()
	for range writes {
		data := bytes.Repeat([]byte{byte(1 + rnd.IntN(255))}, 1+rnd.IntN(20_000))
		disk := rnd.IntN(len(r.formats))
		r.write(t, disk, rnd.Int64N(capturetest.DiskSize-int64(len(data))), data)
	}
}

func wantPass(t *testing.T, snap dr.Snapshot, kind dr.PassKind, words ...string) {
	t.Helper()
	if snap.Pass.Kind != kind || snap.Pass.Provider != dr.ProviderQEMU {
		t.Errorf("pass %+v, want %s by qemu", snap.Pass, kind)
	}
	for _, w := range words {
		if !strings.Contains(snap.Pass.Reason, w) {
			t.Errorf("reason %q does not say %q", snap.Pass.Reason, w)
		}
	}
}

func TestManyIncrementsAreTheDisksByteForByteAcrossStopsAndStarts(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2", "qcow2").start(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	snap := r.take(t, "")
	for i := range 8 {
		switch i {
		case 2: // stopped and started between two snapshots, written to by another QEMU meanwhile
			virsh(t, "destroy", r.name)
			r.scribble(t, rnd, 2)
			r.start(t)
		case 4: // a snapshot at rest, and one after it
			virsh(t, "destroy", r.name)
		case 6:
			r.start(t)
		}
		r.scribble(t, rnd, 3)
		next := r.take(t, snap.ID)
		wantPass(t, next, dr.PassTracked)
		if next.Stats.Read == 0 || next.Stats.Changed == 0 {
			t.Errorf("increment %d: %+v", i, next.Stats)
		}
		if got, want := r.checkpoints(t), checkpointName(next.ID); i < 4 && !slices.Equal(got, []string{want}) {
			t.Errorf("checkpoints %v, want %s alone", got, want)
		}
		snap = next
	}
}

func TestWhatIsWrittenWhileADiskIsReadBelongsToTheNextSnapshot(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2", "raw").start(t)
	first := r.take(t, "")
	r.write(t, 0, 5000, []byte("before"))
	before := [][]byte{r.content(t, 0), r.content(t, 1)}
	written := false
	snap, err := r.try(t.Context(), t, first.ID, func(part string, _, _ int64, _ string) {
		if !written && strings.HasPrefix(part, "disk ") {
			written = true
			r.write(t, 0, 0, bytes.Repeat([]byte("late"), 10_000))
			r.write(t, 1, 1<<20, bytes.Repeat([]byte("late"), 10_000))
		}
	})
	if err != nil || !written {
		t.Fatal(written, err)
	}
	for i := range before {
		r.same(t, snap, i, before[i])
	}
	r.take(t, snap.ID)
	// Nothing is left of the backups.
	if left, _ := filepath.Glob(filepath.Join(r.dir, "*"+scratchSuffix)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestACaptureThatWasKilledIsClearedAwayByTheNext(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2", "qcow2").start(t)
	first := r.take(t, "")
	r.write(t, 0, 100_000, []byte("between"))
	self, _ := os.Executable()
	victim := exec.CommandContext(t.Context(), self, r.name, r.dir)
	victim.Env = append(os.Environ(), asVictim+"=1")
	out, err := victim.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "reading\n" {
		t.Fatalf("%q, %v", line, err)
	}
	// While it lives it is not disturbed.
	if _, err := r.try(t.Context(), t, first.ID, nil); err == nil || !strings.Contains(err.Error(), "another capture") {
		t.Errorf("beside a capture that is under way: %v", err)
	}
	r.write(t, 1, 200_000, []byte("during"))
	_ = victim.Process.Signal(syscall.SIGKILL)
	_ = victim.Wait()
	if !strings.Contains(virsh(t, "backup-dumpxml", r.name), "backup.sock") {
		t.Fatal("the job ended by itself: this proves nothing")
	}
	r.write(t, 1, 300_000, []byte("after"))
	snap := r.take(t, first.ID)
	wantPass(t, snap, dr.PassTracked)
	if snap.Stats.Changed == 0 {
		t.Error("nothing changed")
	}
	if got := r.checkpoints(t); !slices.Equal(got, []string{checkpointName(snap.ID)}) {
		t.Errorf("checkpoints %v", got)
	}
}

func TestABitmapThatAPowerCutBrokeIsNotTrustedAndReplaced(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2", "qcow2").start(t)
	first := r.take(t, "")
	// Once stopped in order, so that the bitmap is in the file; then started again, written to, and killed.
	virsh(t, "destroy", r.name)
	r.start(t)
	r.write(t, 0, 0, bytes.Repeat([]byte("x"), 100_000))
	r.io(t, 0, "flush")
	pid, err := strconv.Atoi(strings.TrimSpace(tool(t, "cat", "/run/libvirt/qemu/"+r.name+".pid")))
	if err != nil {
		t.Fatal(err)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	waitFor(t, func() bool { return !r.running(t) })
	rest := r.take(t, first.ID) // shut off
	wantPass(t, rest, dr.PassCompare, "vda: its dirty bitmap is broken", "vdb: its dirty bitmap is broken")
	r.start(t)
	live := r.take(t, rest.ID)
	wantPass(t, live, dr.PassCompare, "vda: its dirty bitmap is broken", "vdb: its dirty bitmap is broken")
	r.write(t, 0, 50_000, []byte("again"))
	wantPass(t, r.take(t, live.ID), dr.PassTracked)
	if got := r.checkpoints(t); len(got) != 1 {
		t.Errorf("checkpoints %v: the broken one is still there", got)
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for until := time.Now().Add(30 * time.Second); !ok(); {
		if time.Now().After(until) {
			t.Fatal("it did not happen")
		}
	}
}

func TestImagesThatChangedPlacesAreNotTakenForOneAnother(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2", "qcow2").start(t)
	first := r.take(t, "")
	virsh(t, "destroy", r.name)
	a, b, c := r.path(0), r.path(1), filepath.Join(r.dir, "c")
	for _, mv := range [][2]string{{a, c}, {b, a}, {c, b}} { // both hold a bitmap of the same name
		if err := os.Rename(mv[0], mv[1]); err != nil {
			t.Fatal(err)
		}
	}
	wantPass(t, r.take(t, first.ID), dr.PassCompare, "vda: another image is in its place", "vdb: another image is in its place")
	r.start(t)
	wantPass(t, r.take(t, first.ID), dr.PassCompare, "vda: another image is in its place", "vdb: another image is in its place")
}

func TestADomainThatWasDefinedAnewIsCompared(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2").start(t)
	first := r.take(t, "")
	virsh(t, "destroy", r.name)
	virsh(t, "undefine", "--checkpoints-metadata", r.name)
	r.define(t)
	r.start(t)
	r.write(t, 0, 0, []byte("new"))
	snap := r.take(t, first.ID)
	wantPass(t, snap, dr.PassCompare, "no checkpoint")
	wantPass(t, r.take(t, snap.ID), dr.PassTracked)
}

func TestOtherPeoplesCheckpointsAndBackupsAreLeftAlone(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2").start(t)
	virsh(t, "checkpoint-create-as", r.name, "theirs")
	first := r.take(t, "")
	r.write(t, 0, 0, []byte("new"))
	snap := r.take(t, first.ID)
	wantPass(t, snap, dr.PassTracked)
	virsh(t, "checkpoint-create-as", r.name, "theirs-too")
	r.write(t, 0, 100, []byte("newer"))
	snap = r.take(t, snap.ID)
	wantPass(t, snap, dr.PassTracked)

	file := filepath.Join(r.dir, "backup.xml")
	if err := os.WriteFile(file, []byte("<domainbackup mode='pull'><server transport='unix' socket='"+r.dir+"/s'/></domainbackup>"), 0o644); err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(r.dir, 0o777)
	virsh(t, "backup-begin", r.name, file)
	if _, err := r.try(t.Context(), t, snap.ID, nil); err == nil || !strings.Contains(err.Error(), "somebody else's backup") {
		t.Errorf("beside another backup: %v", err)
	}
	if !strings.Contains(virsh(t, "backup-dumpxml", r.name), r.dir+"/s") {
		t.Error("the other backup is gone")
	}
	virsh(t, "domjobabort", r.name)
	waitFor(t, func() bool { // libvirt ends it beside us
		return exec.Command("virsh", "-q", "-c", "qemu:///system", "backup-dumpxml", r.name).Run() != nil
	})
	src := r.open(t)
	defer src.Close()
	if err := src.Forget(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := r.checkpoints(t); !slices.Equal(got, []string{"theirs", "theirs-too"}) {
		t.Errorf("checkpoints %v: want those of others alone", got)
	}
}

func TestForgetLeavesNoBitmapInTheImagesOfAMachineThatIsShutOff(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2", "raw").start(t)
	r.take(t, "")
	virsh(t, "destroy", r.name)
	if got := r.bitmaps(t, 0); len(got) != 1 {
		t.Fatalf("bitmaps %v before", got)
	}
	src := r.open(t)
	defer src.Close()
	for range 2 {
		if err := src.Forget(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if bitmaps, checkpoints := r.bitmaps(t, 0), r.checkpoints(t); len(bitmaps)+len(checkpoints) > 0 {
		t.Errorf("left: bitmaps %v, checkpoints %v", bitmaps, checkpoints)
	}
}

func TestAMachineThatIsStartedWhileItIsReadGoesFirst(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2")
	started := false
	_, err := r.try(t.Context(), t, "", func(part string, _, _ int64, _ string) {
		if !started && strings.HasPrefix(part, "disk ") {
			started = true
			r.start(t) // fails the test if the backup keeps it from starting
		}
	})
	if !errors.Is(err, ErrChanged) || !started {
		t.Errorf("started %v: %v, want ErrChanged", started, err)
	}
	r.take(t, "")
}

func TestAnIncrementReadsWhatWasWrittenAndLittleMore(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2")
	raw := filepath.Join(r.dir, "raw")
	tool(t, "dd", "if=/dev/urandom", "of="+raw, "bs=1M", "count=192", "status=none")
	tool(t, "truncate", "-s", "256M", raw)
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, r.path(0))
	_ = os.Remove(raw)
	r.start(t)
	first := r.take(t, "")
	if first.Stats.Read > 193<<20 {
		t.Errorf("a full one read %d bytes of 192 MiB: holes were read", first.Stats.Read)
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 60 {
		r.io(t, 0, "write -P 9 "+strconv.FormatInt(rnd.Int64N(190<<20/4096)*4096, 10)+" 4k")
	}
	r.io(t, 0, "write -P 8 100M 8M")
	snap := r.take(t, first.ID)
	wantPass(t, snap, dr.PassTracked)
	ratio := float64(snap.Stats.Read) / float64(snap.Stats.Changed)
	t.Logf("full: read %d in %s; increment: read %d, changed %d, ratio %.3f, in %s", first.Stats.Read, first.Stats.Duration, snap.Stats.Read,
		snap.Stats.Changed, ratio, snap.Stats.Duration)
	if ratio > 1.1 {
		t.Errorf("bytes read / bytes in changed blocks: %.2f, want at most 1.1", ratio)
	}
	r.io(t, 0, "discard 20M 16M")
	if snap = r.take(t, snap.ID); snap.Stats.Read != 0 || snap.Stats.Changed == 0 {
		t.Errorf("discarded, and %d bytes read, %d changed", snap.Stats.Read, snap.Stats.Changed)
	}
}

func TestOnlyTheDisksThatWereNamedAreTouched(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2", "qcow2").start(t)
	take := func(parent string, disks ...string) (dr.Snapshot, error) {
		src, err := Open(dr.VMSource{Domain: r.name, Disks: disks}, r.host)
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		return capture.Take(t.Context(), src, shared, api.SnapshotTask{ID: dr.NewSnapshotID(time.Now()), Server: dr.Server{ID: "srv-1", Name: "web"}, Parent: parent}, nil)
	}
	if _, err := take("", "vdb", "vdx"); err == nil || !strings.Contains(err.Error(), "no disk vdx") {
		t.Errorf("a disk that is not there: %v", err)
	}
	first, err := take("", "vdb")
	if err != nil || len(first.Disks) != 1 || first.Disks[0].Name != "vdb" {
		t.Fatalf("%+v, %v", first.Disks, err)
	}
	r.write(t, 1, 0, []byte("new"))
	snap, err := take(first.ID, "vdb")
	if err != nil {
		t.Fatal(err)
	}
	wantPass(t, snap, dr.PassTracked)
	want := r.content(t, 1)
	r.same(t, snap, 0, want)
	virsh(t, "destroy", r.name)
	if other, ours := r.bitmaps(t, 0), r.bitmaps(t, 1); len(other) != 0 || len(ours) != 1 {
		t.Errorf("bitmaps %v in the other disk, %v in ours", other, ours)
	}
}

func TestATransientMachineIsReadWithoutCheckpoints(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "qcow2").start(t)
	virsh(t, "undefine", r.name)
	first := r.take(t, "")
	snap := r.take(t, first.ID)
	wantPass(t, snap, dr.PassCompare, "no checkpoint")
	if !slices.ContainsFunc(snap.Notes, func(n string) bool { return strings.Contains(n, "transient") }) {
		t.Errorf("notes %q", snap.Notes)
	}
}

func TestABackupIsGivenUpBeforeTheScratchFileCannotGrow(t *testing.T) {
	real(t)
	t.Parallel()
	r := newRig(t, "raw")
	small := filepath.Join(r.dir, "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	tool(t, "mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small)
	t.Cleanup(func() { _ = exec.Command("umount", small).Run() })
	j := &job{Source: r.open(t), m: machine{name: r.name, disks: []disk{{target: "vda", path: filepath.Join(small, "a"), file: true}}}}
	ctx, cancel := context.WithCancelCause(t.Context())
	j.watchSpace(ctx, cancel)
	if err := context.Cause(ctx); err == nil || !strings.Contains(err.Error(), small) || !strings.Contains(err.Error(), "make room") {
		t.Errorf("%v", err)
	}
}

func TestLibvirtdMayBeRestartedWhileADiskIsRead(t *testing.T) {
	real(t) // not parallel: the others talk to libvirtd too
	r := newRig(t, "qcow2", "qcow2").start(t)
	first := r.take(t, "")
	restartLibvirtd(t)
	r.write(t, 0, 0, []byte("between"))
	restarted := false
	snap, err := r.try(t.Context(), t, first.ID, func(part string, _, _ int64, _ string) {
		if !restarted && strings.HasPrefix(part, "disk ") {
			restarted = true
			restartLibvirtd(t)
		}
	})
	if err != nil || !restarted {
		t.Fatal(restarted, err)
	}
	wantPass(t, snap, dr.PassTracked)
	for i := range r.formats {
		r.same(t, snap, i, r.content(t, i))
	}
	r.write(t, 1, 0, []byte("after"))
	wantPass(t, r.take(t, snap.ID), dr.PassTracked)
}

func restartLibvirtd(t *testing.T) {
	t.Helper()
	const pidFile = "/run/libvirt/libvirtd.pid"
	old, err := strconv.Atoi(strings.TrimSpace(tool(t, "cat", pidFile)))
	if err != nil {
		t.Fatal(err)
	}
	_ = syscall.Kill(old, syscall.SIGTERM)
	waitFor(t, func() bool {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(old) + "/stat")
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
	tool(t, "libvirtd", "--daemon", "--pid-file", pidFile)
	waitFor(t, func() bool { return exec.Command("virsh", "-q", "-c", "qemu:///system", "list").Run() == nil })
}
