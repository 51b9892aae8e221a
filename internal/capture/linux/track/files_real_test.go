package track

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// ioctls of linux/fs.h.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
	fiTrim   = 0xc0185879
)

// mounted makes a file system on a device and mounts it.
func mounted(t testing.TB, device string, mkfs ...string) string {
	t.Helper()
	run(t, mkfs[0], append(mkfs[1:], device)...)
	dir := t.TempDir()
	kind := mkfs[0][len("mkfs."):]
	if err := unix.Mount(device, dir, kind, unix.MS_NOATIME, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// still runs something while a file system is frozen. Another process thaws it if this one hangs.
func still(t testing.TB, dir string, do func()) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	thaw := exec.Command("sh", "-c", `sleep 20; exec fsfreeze --unfreeze "$0"`, dir)
	if err := thaw.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = thaw.Process.Kill(), thaw.Wait() }()
	if err := unix.IoctlSetInt(int(f.Fd()), fiFreeze, 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.IoctlSetInt(int(f.Fd()), fiThaw, 0) }()
	do()
}

// writing starts a process that writes to files in a folder. A process of its own, because a thread that hangs in a page fault
// of a frozen file system stops all others of a Go program as soon as memory is collected. The function ends it.
func writing(t *testing.T, dir string) (stop func()) {
	t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "MUSTER_TRACK_WRITE="+dir)
	var out bytes.Buffer
	child.Stdout, child.Stderr = &out, &out
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() {
		in.Close()
		if err := child.Wait(); err != nil {
			t.Errorf("the writers: %v\n%s", err, out.String())
		}
	})
}

// TestMain runs a test's other process, or the tests.
func TestMain(m *testing.M) {
	var err error
	switch write, take := os.Getenv("MUSTER_TRACK_WRITE"), os.Getenv("MUSTER_TRACK_TAKE"); {
	case write != "":
		err = childWrites(write)
	case take != "":
		dir, disk, _ := strings.Cut(take, " ")
		err = childTakesAndIsKilled(dir, disk)
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// childWrites writes until its input ends.
func childWrites(dir string) error {
	ctx, stop := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	var failed atomic.Value
	times := writers(ctx, dir, &wait, &failed)
	_, _ = io.Copy(io.Discard, os.Stdin)
	stop()
	wait.Wait()
	if err, ok := failed.Load().(error); ok {
		return err
	}
	for i := range times {
		if times[i].Load() < 3 {
			return fmt.Errorf("writer %d wrote %d times only", i, times[i].Load())
		}
	}
	return nil
}

// writers write to files in a folder in every way there is until the context ends. They give how often each of them wrote.
func writers(ctx context.Context, dir string, wait *sync.WaitGroup, failed *atomic.Value) *[5]atomic.Int64 {
	var times [5]atomic.Int64
	go1 := func(n int, name string, flags int, write func(f *os.File, r *rand.Rand) error) {
		wait.Go(func() {
			r := rand.New(rand.NewPCG(uint64(n), uint64(os.Getpid())))
			f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE|flags, 0o600)
			if err == nil {
				defer f.Close()
				err = f.Truncate(8 << 20)
			}
			for err == nil && ctx.Err() == nil {
				err = write(f, r)
				times[n].Add(1)
			}
			if err != nil {
				failed.Store(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	go1(0, "buffered", 0, func(f *os.File, r *rand.Rand) error {
		b := bytes.Repeat([]byte{byte(r.Uint32())}, 1+r.IntN(9000))
		if _, err := f.WriteAt(b, r.Int64N(7<<20)); err != nil || r.IntN(20) > 0 {
			return err
		}
		return f.Sync()
	})
	go1(1, "direct", unix.O_DIRECT, func(f *os.File, r *rand.Rand) error {
		b := pages(4096 * (1 + r.IntN(16)))
		for i := 0; i < len(b); i += 100 {
			b[i] = byte(r.Uint32())
		}
		_, err := f.WriteAt(b, 4096*r.Int64N(7<<8))
		return err
	})
	go1(2, "mapped", 0, func(f *os.File, r *rand.Rand) error {
		b, err := unix.Mmap(int(f.Fd()), 0, 8<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		for range 50 {
			b[r.IntN(len(b))] = byte(r.Uint32())
		}
		if r.IntN(4) == 0 {
			err = unix.Msync(b, unix.MS_SYNC)
		}
		if err2 := unix.Munmap(b); err == nil {
			err = err2
		}
		return err
	})
	go1(3, "punched", 0, func(f *os.File, r *rand.Rand) error {
		off, n := 4096*r.Int64N(1<<10), 4096*(1+r.Int64N(256))
		if r.IntN(2) == 0 {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		}
		_, err := f.WriteAt(bytes.Repeat([]byte{byte(r.Uint32())}, int(n)), off)
		return err
	})
	go1(4, "journal", 0, func(f *os.File, r *rand.Rand) error { // creates, renames, removes, trims
		name := filepath.Join(dir, fmt.Sprintf("small-%d", r.IntN(300)))
		switch r.IntN(40) {
		case 0:
			arg := [3]uint64{0, ^uint64(0), 0}
			if err := ioctl(f, fiTrim, &arg); !errors.Is(err, unix.EOPNOTSUPP) {
				return err
			}
			return nil
		case 1:
			return f.Sync()
		case 2, 3, 4:
			if err := os.Remove(name); err != nil && !os.IsNotExist(err) {
				return err
			}
			return nil
		}
		return os.WriteFile(name, bytes.Repeat([]byte{byte(r.Uint32())}, r.IntN(6000)), 0o600)
	})
	return &times
}

// replica copies extents from a disk into its copy, around the page cache.
func replica(t testing.TB, disk *os.File, into []byte, x []Extent) {
	t.Helper()
	for _, e := range x {
		read(t, disk, into[e.Offset:e.Offset+e.Length], e.Offset)
	}
}

// The promise as a whole: a copy that is made while every kind of writer goes on, by reading what Take gives and nothing else, is the
// disk as it stands in the end.
func TestACopyThatFollowsTheTakesIsTheDisk(t *testing.T) {
	real(t)
	for _, c := range []struct {
		name   string
		mkfs   []string
		offset int64 // of the file system on the disk, like a partition's
	}{
		{"ext4", []string{"mkfs.ext4", "-q"}, 0},
		{"ext4 with blocks of 1 KiB", []string{"mkfs.ext4", "-q", "-b", "1024"}, 0},
		{"xfs", []string{"mkfs.xfs", "-q"}, 0},
		{"ext4 at an offset", []string{"mkfs.ext4", "-q"}, 1<<20 + 512*63},
	} {
		t.Run(c.name, func(t *testing.T) {
			const size = 340 << 20
			disk := loop(t, filepath.Join(memory(t), "disk"), size)
			device := "/dev/" + disk
			if c.offset > 0 {
				device = "/dev/" + loop(t, device, 0, "--offset", fmt.Sprint(c.offset))
			}
			dir := mounted(t, device, c.mkfs...)
			d := begun(t, place(t), false, disk).Disk(disk)
			f, err := os.OpenFile("/dev/"+disk, os.O_RDONLY|unix.O_DIRECT, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()

			stop := writing(t, dir)
			defer stop()

			_, err = d.Take()
			unknown(t, err, FirstContact)
			copied := pages(size)
			read(t, f, copied, 0)
			provedOnes := 0
			for snapshot := range 12 {
				var sent int64
				for range 5 {
					x := take(t, d)
					sent += total(x)
					replica(t, f, copied, x)
				}
				still(t, dir, func() {
					x := take(t, d)
					sent += total(x)
					replica(t, f, copied, x)
					err := d.Prove()
					now := content(t, disk)
					if err != nil {
						// Some kernels do not run programs in every interrupt. Then not knowing is right, and all is read.
						unknown(t, err, Unbalanced)
						t.Logf("snapshot %d: %v (it differs from byte %d on)", snapshot, err, outside(now, copied, nil))
						copy(copied, now)
						return
					}
					provedOnes++
					for !bytes.Equal(now, copied) {
						// ext4 goes on trimming while it is frozen. A capture sees that by the kernel's counters; here it
						// has to be what was marked since, and nothing else.
						x := take(t, d)
						if at := outside(now, copied, x); at >= 0 {
							t.Fatalf("snapshot %d: it was proved, and the copy differs at byte %d, which was not written since", snapshot, at)
						}
						t.Logf("snapshot %d: %d KiB were discarded under the freeze", snapshot, total(x)>>10)
						replica(t, f, copied, x)
						seen(t, d.Prove())
						now = content(t, disk)
					}
				})
				kept(t, d, fmt.Sprint(snapshot))
				t.Logf("snapshot %d: %d KiB in 6 takes", snapshot, sent>>10)
				if sent == 0 {
					t.Error("nothing was written meanwhile: this proves nothing")
				}
				if provedOnes == 4 {
					break
				}
			}
			if provedOnes < 3 {
				t.Errorf("only %d of 12 snapshots could be proved", provedOnes)
			}
			stop()
		})
	}
}

// What is read is about what changed: few files of many rewritten in place.
func TestLittleMoreIsTakenThanWhatChanged(t *testing.T) {
	real(t)
	for _, mkfs := range [][]string{{"mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"}, {"mkfs.xfs", "-q"}} {
		t.Run(mkfs[0], func(t *testing.T) {
			again(t, func() {
				disk := loop(t, filepath.Join(memory(t), "disk"), 600<<20)
				dir := mounted(t, "/dev/"+disk, mkfs...)
				for i := range 400 {
					if err := os.WriteFile(fmt.Sprintf("%s/%d", dir, i), bytes.Repeat([]byte{1}, 1<<20), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				tr := begun(t, place(t), false, disk)
				d := tr.Disk(disk)
				_, err := d.Take()
				unknown(t, err, FirstContact)
				var before []byte
				still(t, dir, func() { take(t, d); proved(t, d); before = content(t, disk) })
				kept(t, d, "")
				for i := 0; i < 400; i += 10 {
					f, err := os.OpenFile(fmt.Sprintf("%s/%d", dir, i), os.O_WRONLY, 0)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := f.WriteAt(bytes.Repeat([]byte{2}, 1<<19), 1<<18); err != nil {
						t.Fatal(err)
					}
					f.Close()
				}
				var x []Extent
				var after []byte
				still(t, dir, func() { x = take(t, d); proved(t, d); after = content(t, disk) })
				if at := outside(before, after, x); at >= 0 {
					t.Fatalf("byte %d changed and is not in the extents", at)
				}
				var changed int64
				for at := 0; at < len(before); at += minGranule {
					if end := min(at+minGranule, len(before)); !bytes.Equal(before[at:end], after[at:end]) {
						changed += int64(end - at)
					}
				}
				t.Logf("taken %d KiB in %d extents, changed %d KiB: %.3f", total(x)>>10, len(x), changed>>10, float64(total(x))/float64(changed))
				if changed < 20<<20 || float64(total(x)) > 1.2*float64(changed) {
					t.Error("too much was taken")
				}
			})
		})
	}
}

// A file system in a file on a tracked disk: its writes reach the disk through the file system below.
func TestALoopOnATrackedDiskIsSeenThroughIt(t *testing.T) {
	real(t)
	again(t, func() {
		const size = 400 << 20
		disk := loop(t, filepath.Join(memory(t), "disk"), size)
		outer := mounted(t, "/dev/"+disk, "mkfs.ext4", "-q")
		inner := loop(t, filepath.Join(outer, "inner"), 100<<20)
		dir := mounted(t, "/dev/"+inner, "mkfs.ext4", "-q")
		tr := begun(t, place(t), false, disk, inner)
		both := []*Disk{tr.Disk(disk), tr.Disk(inner)}
		before := make([][]byte, 2)
		for round := range 4 {
			name := filepath.Join(dir, fmt.Sprint(round))
			if err := os.WriteFile(name, bytes.Repeat([]byte{byte(round), 7}, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			still(t, dir, func() {
				still(t, outer, func() {
					for i, d := range both {
						x, err := d.Take()
						now := content(t, d.name)
						if round == 0 {
							unknown(t, err, FirstContact)
							before[i] = now
							continue
						}
						seen(t, err)
						proved(t, d)
						if at := outside(before[i], now, x); at >= 0 {
							t.Fatalf("round %d, %s: byte %d changed and is not in the extents", round, d.name, at)
						} else if n := total(x); n < 2<<20 || n > 40<<20 {
							t.Errorf("round %d, %s: %d KiB were taken for 2 MiB written", round, d.name, n>>10)
						}
						before[i] = now
					}
				})
			})
			for _, d := range both {
				kept(t, d, "")
			}
		}
	})
}
