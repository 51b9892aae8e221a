package track

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Real kernels, real block devices: the loop devices of this machine are request-based, zram is bio-based.

func real(t *testing.T) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to load programs into this kernel")
	}
	if err := Supported(); err != nil {
		t.Fatal(err)
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// memory gives a folder in memory, so that the disks of a test cost no disk.
func memory(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("test", dir, "tmpfs", 0, "size=4g"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// loop makes a disk of a new file, or with an offset of an existing file or device.
func loop(t testing.TB, path string, size int64, args ...string) string {
	t.Helper()
	if size > 0 {
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	dev := run(t, "losetup", append(append([]string{"--find", "--show"}, args...), path)...)
	t.Cleanup(func() { run(t, "losetup", "-d", dev) })
	return filepath.Base(dev)
}

func begun(t testing.TB, dir string, byteMode bool, disks ...string) *Tracker {
	t.Helper()
	tr, err := start(dir, disks, func() bool { return byteMode })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tr.Close() })
	return tr
}

// place gives a folder for a tracker, which is removed at the end of the test.
func place(t testing.TB) string {
	dir := filepath.Join(t.TempDir(), "track")
	t.Cleanup(func() {
		if err := Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func take(t testing.TB, d *Disk) []Extent {
	t.Helper()
	x, err := d.Take()
	seen(t, err)
	return x
}

// unseen is the panic of a test under which the kernel left out writes; see again.
type unseen struct{ error }

// again begins a test anew under which the kernel did not run the programs for every write, which some kernels do not in
// some interrupts. That the tracker says so is what it promises; the test has to be made in another moment.
func again(t testing.TB, test func()) {
	t.Helper()
	for range 5 {
		err := func() (err error) {
			defer func() {
				switch p := recover().(type) {
				case nil:
				case unseen:
					err = p
				default:
					panic(p)
				}
			}()
			test()
			return nil
		}()
		if err == nil || t.Failed() {
			return
		}
		t.Logf("once more: %v", err)
	}
	t.Error("the kernel left out writes five times: nothing was proved")
}

// proved proves that nothing was left out. It comes before a test complains of what was taken: only a tracker that says it is all is
// wrong.
func proved(t testing.TB, d *Disk) {
	t.Helper()
	seen(t, d.Prove())
}

func seen(t testing.TB, err error) {
	t.Helper()
	if u := (*Unknown)(nil); errors.As(err, &u) && u.Reason == Unbalanced {
		panic(unseen{err})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func kept(t testing.TB, d *Disk, mark string) {
	t.Helper()
	if err := d.Kept(mark); err != nil {
		t.Fatal(err)
	}
}

// unknown demands a reason.
func unknown(t testing.TB, err error, want Reason) {
	t.Helper()
	var u *Unknown
	if !errors.As(err, &u) || u.Reason != want {
		t.Fatalf("got %v, want %q", err, want)
	}
}

// acquainted makes a first contact into a kept snapshot.
func acquainted(t testing.TB, d *Disk) {
	t.Helper()
	_, err := d.Take()
	unknown(t, err, FirstContact)
	kept(t, d, "first")
}

func content(t testing.TB, disk string) []byte {
	t.Helper()
	f, err := os.OpenFile("/dev/"+disk, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		t.Fatal(err)
	}
	b := pages(int(size))
	read(t, f, b, 0)
	return b
}

func read(t testing.TB, f *os.File, b []byte, off int64) {
	t.Helper()
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
}

// pages gives aligned memory.
func pages(n int) []byte {
	b := make([]byte, n+4096)
	shift := 4096 - int(uintptr(unsafe.Pointer(&b[0]))%4096)
	return b[shift : shift+n : shift+n]
}

func total(x []Extent) (n int64) {
	for _, e := range x {
		n += e.Length
	}
	return n
}

// outside gives the first byte that differs between two contents and lies in no extent; -1 if there is none.
func outside(before, after []byte, x []Extent) int64 {
	at := int64(0)
	check := func(to int64) int64 {
		if bytes.Equal(before[at:to], after[at:to]) {
			return -1
		}
		for i := at; ; i++ {
			if before[i] != after[i] {
				return i
			}
		}
	}
	for _, e := range x {
		if n := check(e.Offset); n >= 0 {
			return n
		}
		at = e.Offset + e.Length
	}
	return check(int64(len(before)))
}

// model is which granules must be marked.
type model struct {
	layout
	must map[int64]bool // written
}

func (m model) wrote(off, n int64) {
	for g := off / m.granule; g*m.granule < off+n; g++ {
		m.must[g] = true
	}
}

// check compares what was taken with the model, granule by granule.
func (m model) check(t *testing.T, x []Extent) {
	t.Helper()
	got := map[int64]bool{}
	for i, e := range x {
		if e.Offset%m.granule != 0 || e.Length <= 0 || e.Offset+e.Length > m.size || i > 0 && e.Offset <= x[i-1].Offset+x[i-1].Length {
			t.Fatalf("extent %d is %+v after %+v", i, e, x[max(0, i-1)])
		}
		for g := e.Offset / m.granule; g*m.granule < e.Offset+e.Length; g++ {
			got[g] = true
		}
	}
	for g := range m.must {
		if !got[g] {
			t.Fatalf("granule %d was written and is not in the extents", g)
		}
	}
	for g := range got {
		if !m.must[g] {
			t.Fatalf("granule %d was not written and is in the extents", g)
		}
	}
	clear(m.must)
}

func ioctl(f *os.File, request uint, arg *[3]uint64) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(unsafe.Pointer(arg))); errno != 0 {
		return fmt.Errorf("ioctl %#x of %v: %w", request, arg, errno)
	}
	return nil
}

func blockIoctl(t testing.TB, f *os.File, request uint, off, n int64) {
	t.Helper()
	if err := ioctl(f, request, &[3]uint64{uint64(off), uint64(n)}); err != nil {
		t.Fatal(err)
	}
}

const (
	blkDiscard = 0x1277
	blkZeroOut = 0x127f
)

func TestExactlyTheGranulesThatWereWrittenAreTaken(t *testing.T) {
	real(t)
	for _, byteMode := range []bool{false, true} {
		t.Run(fmt.Sprintf("bytes=%v", byteMode), func(t *testing.T) {
			again(t, func() {
				const size = 200<<20 + 4096 // the last granule is a part of one
				disk := loop(t, filepath.Join(memory(t), "disk"), size)
				tr := begun(t, place(t), byteMode, disk)
				d := tr.Disk(disk)
				acquainted(t, d)
				f, err := os.OpenFile("/dev/"+disk, os.O_RDWR|unix.O_DIRECT, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				seed := uint64(os.Getpid())
				t.Logf("seed %d", seed)
				random := rand.New(rand.NewPCG(seed, 1))
				m := model{layout: newLayout(size, byteMode), must: map[int64]bool{}}
				buf := pages(4 << 20)
				before := content(t, disk)
				for round := range 40 {
					for range 1 + random.IntN(30) {
						limit := int64(1) << (12 + random.IntN(11)) // to 4 MiB
						n := min(4096*(1+random.Int64N(limit/4096)), size)
						if random.IntN(8) == 0 {
							n = min(n*64, size)
						}
						off := 4096 * random.Int64N((size-n)/4096+1)
						if random.IntN(8) == 0 {
							off = size - n
						}
						switch {
						case n > 4<<20 || random.IntN(6) == 0:
							blockIoctl(t, f, []uint{blkDiscard, blkZeroOut}[random.IntN(2)], off, n)
						default:
							for i := 0; i < int(n); i += 512 {
								buf[i] = byte(random.Uint32())
							}
							if _, err := f.WriteAt(buf[:n], off); err != nil {
								t.Fatal(err)
							}
						}
						m.wrote(off, n)
					}
					x := take(t, d)
					proved(t, d)
					m.check(t, x)
					after := content(t, disk)
					if at := outside(before, after, x); at >= 0 {
						t.Fatalf("byte %d changed and is not in the extents", at)
					}
					before = after
					kept(t, d, strconv.Itoa(round))
				}
			})
		})
	}
}

func TestOneOperationOverTheWholeDiskMarksTheWholeDisk(t *testing.T) {
	real(t)
	again(t, func() {
		const size = 6 << 30 // more than one request can be
		disk := loop(t, filepath.Join(memory(t), "disk"), size)
		d := begun(t, place(t), false, disk).Disk(disk)
		acquainted(t, d)
		f, err := os.OpenFile("/dev/"+disk, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, at := range []Extent{{0, size}, {16384 * 3, size - 16384*5}, {5 << 20, 4<<30 - 16384}} {
			blockIoctl(t, f, blkDiscard, at.Offset, at.Length)
			x := take(t, d)
			proved(t, d)
			if !slices.Equal(x, []Extent{at}) {
				t.Fatalf("a discard of %+v gave %+v", at, x)
			}
			kept(t, d, "")
		}
	})
}
