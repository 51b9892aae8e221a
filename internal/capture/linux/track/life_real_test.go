package track

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// runs says whether a program is still in the kernel.
func runs(program id) bool {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(program))
	if err == nil {
		p.Close()
	}
	return err == nil
}

// write writes to a disk around the page cache.
func write(t testing.TB, disk string, off int64, n int) {
	t.Helper()
	f, err := os.OpenFile("/dev/"+disk, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(pages(n), off); err != nil {
		t.Fatal(err)
	}
}

const mega = 1 << 20

// small makes a small disk and a tracker that has taken and kept a first snapshot of it.
func small(t *testing.T) (dir, disk string, tr *Tracker) {
	t.Helper()
	real(t)
	disk = loop(t, filepath.Join(memory(t), "disk"), 64*mega)
	dir = place(t)
	tr = begun(t, dir, false, disk)
	acquainted(t, tr.Disk(disk))
	return dir, disk, tr
}

func want(t testing.TB, d *Disk, x ...Extent) {
	t.Helper()
	if got := take(t, d); !slices.Equal(got, x) {
		proved(t, d)
		t.Fatalf("took %+v, want %+v", got, x)
	}
}

func childTakesAndIsKilled(dir, disk string) error {
	tr, err := Start(dir, []string{disk})
	if err != nil {
		return err
	}
	if _, err := tr.Disk(disk).Take(); err != nil {
		return err
	}
	if err := tr.Disk(disk).Prove(); err != nil {
		return err
	}
	return unix.Kill(os.Getpid(), unix.SIGKILL)
}

func TestAKilledAgentIsAdopted(t *testing.T) {
	again(t, func() {
		dir, disk, tr := small(t)
		was := *tr.rec
		tr.Close()
		write(t, disk, 3*mega, 4096)
		for range 2 {
			child := exec.Command(os.Args[0])
			child.Env = append(os.Environ(), "MUSTER_TRACK_TAKE="+dir+" "+disk)
			out, err := child.CombinedOutput()
			if err == nil || !strings.Contains(child.ProcessState.String(), "killed") {
				t.Fatalf("the child was to be killed: %v\n%s", err, out)
			}
		}
		write(t, disk, 9*mega, 4096) // nobody is there
		tr = begun(t, dir, false, disk)
		if tr.rec.Links["request_primary"] != was.Links["request_primary"] || tr.rec.Runs["request_twin"] != was.Runs["request_twin"] {
			t.Error("other programs were installed")
		}
		d := tr.Disk(disk)
		if d.Mark() != "first" {
			t.Errorf("the mark is %q", d.Mark())
		}
		// What the killed ones took is there again, with what was written since.
		want(t, d, Extent{3 * mega, minGranule}, Extent{9 * mega, minGranule})
		proved(t, d)
		kept(t, d, "second")
		want(t, d)
		if d.Mark() != "second" {
			t.Errorf("the mark is %q", d.Mark())
		}
	})
}

func TestWhatIsNotKeptIsGivenAgain(t *testing.T) {
	again(t, func() {
		_, disk, tr := small(t)
		d := tr.Disk(disk)
		write(t, disk, 0, 4096)
		want(t, d, Extent{0, minGranule})
		write(t, disk, 5*mega, 3*minGranule)
		want(t, d, Extent{5 * mega, 3 * minGranule})
		if err := d.Restore(); err != nil {
			t.Fatal(err)
		}
		write(t, disk, 5*mega+minGranule, 4096)
		want(t, d, Extent{0, minGranule}, Extent{5 * mega, 3 * minGranule})
		if err := d.Kept("x"); err == nil {
			t.Error("what was not proved could be kept")
		}
		proved(t, d)
		kept(t, d, "x")
		want(t, d)
	})
}

func TestNotKnowingLastsUntilASnapshotIsKept(t *testing.T) {
	real(t)
	again(t, func() {
		disk := loop(t, filepath.Join(memory(t), "disk"), 64*mega)
		dir := place(t)
		for range 2 {
			tr := begun(t, dir, false, disk)
			d := tr.Disk(disk)
			_, err := d.Take()
			unknown(t, err, FirstContact)
			write(t, disk, mega, 4096)
			want(t, d, Extent{mega, minGranule})
			proved(t, d)
			tr.Close() // not kept
		}
		d := begun(t, dir, false, disk).Disk(disk)
		if err := d.Kept(""); err == nil {
			t.Error("a snapshot was kept of which nothing was taken")
		}
		_, err := d.Take()
		unknown(t, err, FirstContact)
		if err := d.Restore(); err != nil {
			t.Fatal(err)
		}
		_, err = d.Take()
		unknown(t, err, FirstContact)
		kept(t, d, "")
		want(t, d)
	})
}

func TestAProgramThatIsDetachedIsNoticed(t *testing.T) {
	again(t, func() {
		dir, disk, tr := small(t)
		detach := func(name string) {
			if err := os.Remove(filepath.Join(tr.pins(), name)); err != nil {
				t.Fatal(err)
			}
		}
		// While an agent is there …
		detach("link-request_twin")
		_, err := tr.Disk(disk).Take()
		unknown(t, err, Detached)
		write(t, disk, 0, 4096)
		want(t, tr.Disk(disk), Extent{0, minGranule})
		proved(t, tr.Disk(disk))
		kept(t, tr.Disk(disk), "")
		// … and while none is.
		for _, name := range []string{"link-request_primary", "counts", "current-0", "taken-0"} {
			detach(name)
			tr.Close()
			tr = begun(t, dir, false, disk)
			_, err := tr.Disk(disk).Take()
			unknown(t, err, Detached)
			write(t, disk, 0, 4096)
			want(t, tr.Disk(disk), Extent{0, minGranule})
			proved(t, tr.Disk(disk))
			kept(t, tr.Disk(disk), "")
		}
	})
}

func TestAWriteThatNobodySawIsNoticed(t *testing.T) {
	again(t, func() {
		_, disk, tr := small(t)
		d := tr.Disk(disk)
		var entry diskEntry
		number := d.rec.Device.Number
		if err := errors.Join(tr.kernel.disks.Lookup(number, &entry), tr.kernel.disks.Delete(number)); err != nil {
			t.Fatal(err)
		}
		write(t, disk, 0, 4096)
		if err := tr.kernel.disks.Put(number, entry); err != nil {
			t.Fatal(err)
		}
		want(t, d)
		unknown(t, d.Prove(), Unbalanced)
		// From there on everything is known again.
		write(t, disk, mega, 4096)
		want(t, d, Extent{mega, minGranule})
		proved(t, d)
		kept(t, d, "")
		want(t, d)
		proved(t, d)
	})
}

// Some kernels run no program in some interrupts. What was begun there and did not end for the programs is where was written.
func TestAWriteWhoseEndIsNotToldIsKnownByItsBeginning(t *testing.T) {
	again(t, func() {
		_, disk, tr := small(t)
		d := tr.Disk(disk)
		number := d.rec.Device.Number
		unseen := func(off int64, n int) {
			var entry diskEntry
			if err := errors.Join(tr.kernel.disks.Lookup(number, &entry), tr.kernel.disks.Delete(number)); err != nil {
				t.Fatal(err)
			}
			write(t, disk, off, n)
			if err := tr.kernel.disks.Put(number, entry); err != nil {
				t.Fatal(err)
			}
		}
		left := func(request, began uint64, off int64, n, kind uint32) {
			r := operationRange{Device: number, Bytes: n, Sector: uint64(off) / 512, Began: began, Kind: kind}
			if err := tr.kernel.underway.Put(request, r); err != nil {
				t.Fatal(err)
			}
		}
		unseen(3*mega, 8192)
		left(1, d.rec.Base.Since, 3*mega, 8192, wholeKind)
		write(t, disk, 0, 4096)
		want(t, d, Extent{0, minGranule}, Extent{3 * mega, minGranule})
		proved(t, d)
		kept(t, d, "")
		want(t, d) // it is not given again
		proved(t, d)

		// One that the last Take could not give is in the next.
		unseen(5*mega, 4096)
		left(2, d.rec.Base.Since+1, 5*mega, 4096, wholeKind)
		proved(t, d)
		want(t, d, Extent{5 * mega, minGranule})
		proved(t, d)
		if all, err := d.underway(); err != nil || len(all) > 0 {
			t.Errorf("left are %v, %v", all, err)
		}

		// A discard of two ranges is where its parts are.
		unseen(6*mega, 4096)
		left(3, d.rec.Base.Since+2, 6*mega, 4096, scatteredKind)
		left(4, d.rec.Base.Since+2, 9*mega, 2048, partKind)
		left(5, d.rec.Base.Since+2, 8*mega, 2048, partKind)
		want(t, d, Extent{8 * mega, minGranule}, Extent{9 * mega, minGranule})
		proved(t, d)
		kept(t, d, "")
		want(t, d)

		// What began before counting did proves nothing, and where a discard of too many ranges wrote is not known.
		unseen(7*mega, 4096)
		left(6, d.rec.Base.Since-1, 7*mega, 4096, wholeKind)
		want(t, d)
		unknown(t, d.Prove(), Unbalanced)
		unseen(7*mega, 4096)
		left(7, d.rec.Base.Since, 7*mega, 4096, nowhereKind)
		unknown(t, d.Prove(), Missed)
	})
}

func TestCountersThatMustNotMoveAreNoticed(t *testing.T) {
	for reason, spoil := range map[Reason]func(*tally){
		Passthrough: func(c *tally) { c.Passthrough++ },
		Overflowed:  func(c *tally) { c.Overflow++ },
	} {
		t.Run(string(reason), func(t *testing.T) {
			again(t, func() {
				_, disk, tr := small(t)
				d := tr.Disk(disk)
				var each []tally
				if err := tr.kernel.counts.Lookup(d.rec.Slot, &each); err != nil {
					t.Fatal(err)
				}
				spoil(&each[0])
				if err := tr.kernel.counts.Put(d.rec.Slot, each); err != nil {
					t.Fatal(err)
				}
				_, err := d.Take()
				unknown(t, err, reason)
				want(t, d)
				proved(t, d)
			})
		})
	}
}

func TestAnotherSizeOrDeviceIsNoticed(t *testing.T) {
	again(t, func() {
		dir, disk, tr := small(t)
		file := run(t, "losetup", "-n", "-O", "BACK-FILE", "/dev/"+disk)
		size := int64(64 * mega)
		resize := func() {
			size += 32 * mega
			if err := os.Truncate(file, size); err != nil {
				t.Fatal(err)
			}
			run(t, "losetup", "-c", "/dev/"+disk)
		}
		replace := func() {
			run(t, "losetup", "-d", "/dev/"+disk)
			run(t, "losetup", "/dev/"+disk, file)
		}
		for _, c := range []struct {
			reason  Reason
			change  func()
			restart bool
		}{{Resized, resize, false}, {Resized, resize, true}, {Replaced, replace, false}, {Replaced, replace, true}} {
			if c.restart {
				tr.Close()
			}
			c.change()
			if c.restart {
				tr = begun(t, dir, false, disk)
			}
			d := tr.Disk(disk)
			_, err := d.Take()
			unknown(t, err, c.reason)
			write(t, disk, size-4096, 4096)
			want(t, d, Extent{size - minGranule, minGranule})
			proved(t, d)
			kept(t, d, "")
		}
	})
}

func TestOtherProgramsOrAnotherBootAreNoticed(t *testing.T) {
	for reason, change := range map[Reason]func(*record, string){
		Upgraded: func(r *record, pins string) {
			r.Object = "v0-0123456789ab"
			_ = os.Rename(pins, filepath.Join(filepath.Dir(pins), r.Object))
		},
		Rebooted: func(r *record, _ string) { r.Boot = "another" },
		Slept:    func(r *record, _ string) { r.Disks[0].Slept -= 5e9 },
		Detached: func(r *record, _ string) { r.Links["request_twin"]++ },
	} {
		t.Run(string(reason), func(t *testing.T) {
			again(t, func() {
				dir, disk, tr := small(t)
				pins := tr.pins()
				tr.Close()
				rec, err := readRecord(filepath.Join(dir, recordFile))
				if err != nil {
					t.Fatal(err)
				}
				change(rec, pins)
				if err := rec.write(filepath.Join(dir, recordFile)); err != nil {
					t.Fatal(err)
				}
				tr = begun(t, dir, false, disk)
				if left, err := filepath.Glob(filepath.Join(dir, pinFolder, "v*")); err != nil || len(left) != 1 || left[0] != pins {
					t.Errorf("pinned are %v, %v", left, err)
				}
				d := tr.Disk(disk)
				_, err = d.Take()
				unknown(t, err, reason)
				kept(t, d, "")
				write(t, disk, mega, 4096)
				want(t, d, Extent{mega, minGranule})
				proved(t, d)
			})
		})
	}
}

func TestARecordThatCannotBeReadIsNotKnowing(t *testing.T) {
	dir, disk, tr := small(t)
	tr.Close()
	if err := os.WriteFile(filepath.Join(dir, recordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := begun(t, dir, false, disk).Disk(disk).Take()
	unknown(t, err, FirstContact)
}

func TestDisksComeAndGoWithoutTheOthers(t *testing.T) {
	again(t, func() {
		dir, first, tr := small(t)
		tr.Close()
		write(t, first, 0, 4096)
		path := filepath.Join(memory(t), "second")
		second := loop(t, path, 32*mega)
		tr = begun(t, dir, false, second) // the first one stays though it is not named
		want(t, tr.Disk(first), Extent{0, minGranule})
		proved(t, tr.Disk(first))
		kept(t, tr.Disk(first), "")
		acquainted(t, tr.Disk(second))
		write(t, second, mega, 4096)
		want(t, tr.Disk(second), Extent{mega, minGranule})
		want(t, tr.Disk(first))
		if _, err := Start(dir, nil); !errors.Is(err, ErrBusy) {
			t.Errorf("a second process got the tracker: %v", err)
		}
		if err := Remove(dir); !errors.Is(err, ErrBusy) {
			t.Errorf("it was removed under a process: %v", err)
		}
	})
}

func TestWhatCannotBeTrackedSaysWhy(t *testing.T) {
	_, disk, tr := small(t)
	for _, name := range []string{"nosuchdisk", "../vda", "", disk + "p1"} {
		_, err := tr.Disk(name).Take()
		unknown(t, err, Untrackable)
		unknown(t, tr.Disk(name).Prove(), Untrackable)
		kept(t, tr.Disk(name), "x")
	}
	stats := filepath.Join("/sys/block", disk, "queue/iostats")
	if err := os.WriteFile(stats, []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.WriteFile(stats, []byte("1"), 0) }()
	_, err := tr.Disk(disk).Take()
	unknown(t, err, Untrackable)
}

func TestNothingIsLeftAfterRemove(t *testing.T) {
	dir, _, tr := small(t)
	program := tr.rec.Runs["request_primary"]
	tr.Close()
	if err := Remove(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Error("the folder is left")
	}
	if mounts := text("/proc/self/mounts"); strings.Contains(mounts, dir) {
		t.Error("a file system is left mounted")
	}
	for range 1000 { // the kernel frees programs when it comes to it
		if !runs(program) {
			return
		}
		_ = unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
	}
	t.Error("a program is left")
}

// A bio-based disk. zram counts writes and not discards: the latter cannot be proved, and that has to show.
func TestABioBasedDiskIsTracked(t *testing.T) {
	real(t)
	again(t, func() {
		const disk = "zram0"
		if text("/sys/block/zram0/disksize") != "0" {
			t.Skip("there is no zram device that is free")
		}
		if err := os.WriteFile("/sys/block/zram0/disksize", []byte(fmt.Sprint(64*mega)), 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.WriteFile("/sys/block/zram0/reset", []byte("1"), 0) })
		if err := os.WriteFile("/sys/block/zram0/queue/iostats", []byte("1"), 0); err != nil { // zram does not count unless asked to
			t.Fatal(err)
		}
		d := begun(t, place(t), false, disk).Disk(disk)
		if d.rec == nil || !d.rec.Device.Bios {
			t.Fatal("zram is not bio-based here")
		}
		acquainted(t, d)
		for i := range 50 {
			at := int64(i%7) * 3 * mega
			n := 4096 * (1 + 37*i)
			write(t, disk, at, n)
			want(t, d, Extent{at, (int64(n) + minGranule - 1) / minGranule * minGranule})
			proved(t, d)
			kept(t, d, "")
		}
		f, err := os.OpenFile("/dev/"+disk, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		blockIoctl(t, f, blkDiscard, 0, mega)
		f.Close()
		want(t, d, Extent{0, mega})
		unknown(t, d.Prove(), Unbalanced)
	})
}
