package track

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cilium/ebpf"
	"pgregory.net/rapid"
)

func TestTheObjectWasMadeFromThisSource(t *testing.T) {
	var source []byte
	for _, name := range []string{"bpf/kernel.h", "bpf/track.bpf.c"} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		source = append(source, b...)
	}
	want, err := os.ReadFile("bpf/track.bpf.sum")
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(source)
	if got := hex.EncodeToString(sum[:]); got != strings.TrimSpace(string(want)) {
		t.Fatalf("the source has changed since the object was made: run make generate (sum %s)", got)
	}
}

// What is written down once in C and once in Go must be the same.
func TestTheProgramsAndThisPackageAgree(t *testing.T) {
	for _, bios := range []bool{false, true} {
		s, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
		if err != nil {
			t.Fatal(err)
		}
		if !bios {
			if s, err = spec(false, false); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range programs(bios) {
			if s.Programs[name] == nil {
				t.Errorf("there is no program %s", name)
			}
		}
		if len(s.Programs) != len(programs(bios)) {
			t.Errorf("%d programs instead of %d", len(s.Programs), len(programs(bios)))
		}
		for name, want := range map[string][3]uint32{"disks": {4, 16, maxDisks}, "counts": {4, 24, maxDisks}, "current": {4, 4, maxDisks}, "underway": {8, 40, 65536}} {
			m := s.Maps[name]
			if m == nil || [3]uint32{m.KeySize, m.ValueSize, m.MaxEntries} != want {
				t.Errorf("map %s is %v, not %v", name, m, want)
			}
		}
	}
	if reflect.TypeFor[diskEntry]().Size() != 16 || reflect.TypeFor[operationRange]().Size() != 40 || reflect.TypeFor[tally]().Size() != 24 {
		t.Error("a struct has another size than in C")
	}
	if c, err := os.ReadFile("bpf/track.bpf.c"); err != nil || !bytes.Contains(c, []byte("\n#define REGION 1024 ")) || region != 1024 {
		t.Error("a region has another size in C", err)
	}
}

func layouts(t *rapid.T) layout {
	return newLayout(rapid.Int64Range(1, 300<<20).Draw(t, "size"), rapid.Bool().Draw(t, "bytes"))
}

// mark marks a range as the programs do.
func mark(l layout, words []uint64, first, last int64) {
	set := func(base, n int64) {
		if l.bytes {
			words[base+n/8] |= 1 << (n % 8 * 8)
		} else {
			words[base+n/64] |= 1 << (n % 64)
		}
	}
	from, to := first, first-1 // that are marked as regions
	if last-first >= 2*region {
		from, to = (first+region-1)/region*region, (last+1)/region*region-1
		for r := from / region; r <= to/region; r++ {
			set(0, r)
		}
	}
	for g := first; g <= last; g++ {
		if g < from || g > to {
			set(l.coarse(), g)
		}
	}
}

func TestWhatIsMarkedIsTakenOnceAndPutBackWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := layouts(t)
		current, taken := make([]uint64, l.words()), make([]uint64, l.words())
		want := make([]bool, l.granules())
		granules := func(x []Extent) []bool {
			got := make([]bool, l.granules())
			for i, e := range x {
				if e.Offset%l.granule != 0 || e.Length <= 0 || e.Offset+e.Length > l.size || i > 0 && e.Offset <= x[i-1].Offset+x[i-1].Length {
					t.Fatalf("extent %d is %+v after %+v", i, e, x[max(0, i-1)])
				}
				for g := e.Offset / l.granule; g*l.granule < e.Offset+e.Length; g++ {
					got[g] = true
				}
			}
			return got
		}
		all := make([]bool, l.granules())
		for range rapid.IntRange(1, 3).Draw(t, "takes") {
			clear(want)
			for range rapid.IntRange(0, 5).Draw(t, "writes") {
				first := rapid.Int64Range(0, l.granules()-1).Draw(t, "first")
				last := rapid.Int64Range(first, l.granules()-1).Draw(t, "last")
				mark(l, current, first, last)
				for g := first; g <= last; g++ {
					want[g], all[g] = true, true
				}
			}
			if got := granules(l.move(current, taken)); !slices.Equal(got, want) {
				t.Fatal("what was taken is not what was marked")
			}
			if slices.ContainsFunc(current, func(w uint64) bool { return w != 0 }) {
				t.Fatal("something is marked after it was taken")
			}
		}
		l.putBack(current, taken)
		if slices.ContainsFunc(taken, func(w uint64) bool { return w != 0 }) {
			t.Fatal("something is taken after it was put back")
		}
		if got := granules(l.move(current, taken)); !slices.Equal(got, all) {
			t.Fatal("what was put back is not what was taken")
		}
	})
}

// Being killed at any moment of a Take or a Restore loses nothing: taken and current together always have every mark.
func TestBeingKilledLosesNoMark(t *testing.T) {
	l := newLayout(64<<30, false)
	path := t.TempDir() + "/marks"
	if err := os.WriteFile(path, make([]byte, 2*8*l.words()), 0o600); err != nil {
		t.Fatal(err)
	}
	current, taken := sharedMarks(t, path, l)
	r := rand.New(rand.NewPCG(1, 2))
	mark(l, current, 5000, 900000)
	for range 20000 {
		g := r.Int64N(l.granules())
		mark(l, current, g, g)
	}
	want := l.move(slices.Clone(current), make([]uint64, l.words()))
	for range 15 {
		child := exec.Command(os.Args[0], "-test.run=^TestChildMovesMarks$")
		child.Env = append(os.Environ(), "MUSTER_TRACK_MARKS="+path)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // it has begun
			t.Fatal(err)
		}
		time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond) // somewhere in its work
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = child.Wait()
		c, k := slices.Clone(current), slices.Clone(taken)
		l.putBack(c, k)
		if got := l.move(c, make([]uint64, l.words())); !slices.Equal(got, want) {
			t.Fatal("marks are lost")
		}
	}
}

func TestChildMovesMarks(t *testing.T) {
	path := os.Getenv("MUSTER_TRACK_MARKS")
	if path == "" {
		t.Skip("this is the process that TestBeingKilledLosesNoMark kills")
	}
	l := newLayout(64<<30, false)
	current, taken := sharedMarks(t, path, l)
	os.Stdout.WriteString("x")
	for {
		l.move(current, taken)
		l.putBack(current, taken)
	}
}

func sharedMarks(t *testing.T, path string, l layout) (current, taken []uint64) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), 0, int(16*l.words()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	all := unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), 2*l.words())
	return all[:l.words()], all[l.words():]
}

func TestTooManyExtentsAreJoinedAndNoneIsLost(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := newLayout(64<<20, false)
		e := extents{layout: l, limit: rapid.IntRange(1, 40).Draw(t, "limit")}
		marks := rapid.SliceOfN(rapid.Int64Range(0, l.granules()-1), 1, 300).Draw(t, "marks")
		slices.Sort(marks)
		for _, g := range slices.Compact(slices.Clone(marks)) {
			e.add(g, 1)
		}
		if len(e.all) > e.limit {
			t.Fatalf("%d extents, more than %d", len(e.all), e.limit)
		}
		for _, g := range marks {
			if !slices.ContainsFunc(e.all, func(x Extent) bool {
				return x.Offset <= g*l.granule && g*l.granule+l.granule <= x.Offset+x.Length
			}) {
				t.Fatalf("granule %d is lost", g)
			}
		}
	})
}

func TestMapsTakeTheMemoryThatIsPromised(t *testing.T) {
	const tera = 1 << 40
	for _, c := range []struct {
		size    int64
		bytes   bool
		granule int64
		memory  int64 // of one map
	}{
		{tera, false, 16 << 10, 8<<20 + 8<<10},
		{tera, true, 16 << 10, 64<<20 + 64<<10},
		{8 * tera, false, 16 << 10, 64<<20 + 64<<10},
		{9 * tera, false, 32 << 10, 9 * (4<<20 + 4<<10)},
		{maxSize, false, 2 << 30, 64<<20 + 64<<10},
	} {
		l := newLayout(c.size, c.bytes)
		if l.granule != c.granule || l.words()*8 != c.memory {
			t.Errorf("%d bytes: granules of %d and %d bytes of map, not %d and %d", c.size, l.granule, l.words()*8, c.granule, c.memory)
		}
	}
}

// script answers with one reading after the other, and the last for ever.
func script(all ...reading) func() (reading, error) {
	return func() (reading, error) {
		r := all[0]
		if len(all) > 1 {
			all = all[1:]
		}
		return r, nil
	}
}

func at(kernel, counted, writing uint64) reading {
	return reading{counters{kernel, writing}, tally{Sectors: counted}}
}

func TestCountersAreBelievedOnlyWhenTheyAgree(t *testing.T) {
	exact := base{Kernel: 100, Counted: tally{Sectors: 7}, Exact: true}
	moving := func() func() (reading, error) {
		n := uint64(100)
		return func() (reading, error) { n += 8; return at(n+8, n-93, 0), nil }
	}
	for name, c := range map[string]struct {
		base base
		read func() (reading, error)
		left uint64 // sectors of operations whose end was not told
		bios bool
		want verdict
	}{
		"nothing happened":                  {exact, script(at(100, 7, 0)), 0, false, balanced},
		"all was seen":                      {exact, script(at(1100, 1007, 0)), 0, false, balanced},
		"agree after a while":               {exact, script(at(108, 7, 1), at(116, 15, 1), at(116, 23, 0)), 0, false, balanced},
		"agree only once":                   {exact, script(at(108, 15, 0), at(116, 15, 0)), 0, false, unbalanced},
		"one sector too few":                {exact, script(at(1100, 1006, 0)), 0, false, unbalanced},
		"one sector too many":               {exact, script(at(1100, 1008, 0)), 0, false, unbalanced},
		"the kernel's began again":          {exact, script(at(0, 7, 0)), 0, false, unbalanced},
		"never still":                       {exact, moving(), 0, false, restless},
		"bios in flight, never settled":     {exact, script(at(1100, 1007, 1)), 0, true, restless},
		"bios in flight, then settled":      {exact, script(at(1108, 1007, 1), at(1108, 1015, 0)), 0, true, balanced},
		"bios unseen":                       {exact, script(at(1108, 1007, 0)), 0, true, unbalanced},
		"counting began in the middle":      {base{Kernel: 100, Counted: tally{Sectors: 7}}, script(at(100, 7, 0)), 0, false, restless},
		"what is left makes the difference": {exact, script(at(1108, 1007, 0)), 8, false, recovered},
		"more is left than is missing":      {exact, script(at(1108, 1007, 0)), 16, false, unbalanced},
		"less is left than is missing":      {exact, script(at(1116, 1007, 0)), 8, false, unbalanced},
		"what is left may go on":            {exact, script(at(1108, 1007, 1)), 8, false, restless},
		"what is left ends meanwhile":       {exact, script(at(1108, 1007, 1), at(1108, 1007, 0), at(1108, 1015, 0)), 8, false, balanced},
		"left, and nothing is missing":      {exact, script(at(1100, 1007, 0)), 8, false, balanced},
		"requests in flight are no matter":  {exact, script(at(100, 7, 3)), 0, false, balanced},
	} {
		v, _, err := c.base.prove(c.read, func() (uint64, error) { return c.left, nil }, c.bios, 30*time.Millisecond, time.Millisecond)
		if err != nil || v != c.want {
			t.Errorf("%s: verdict %d, %v; want %d", name, v, err, c.want)
		}
	}
}

func TestCountingBeginsInAStillMoment(t *testing.T) {
	b, err := begin(script(at(1, 1, 0), at(2, 2, 0), at(3, 2, 0), at(3, 3, 0), at(4, 3, 0)), false, time.Second)
	if err != nil || !b.Exact || b.Kernel != 4 || b.Counted.Sectors != 3 {
		t.Errorf("got %+v, %v", b, err)
	}
	n := uint64(0)
	b, err = begin(func() (reading, error) { n++; return at(n, n, 0), nil }, false, time.Millisecond)
	if err != nil || b.Exact {
		t.Errorf("never still: got %+v, %v", b, err)
	}
	b, err = begin(script(at(5, 5, 1)), true, time.Millisecond)
	if err != nil || b.Exact {
		t.Errorf("bios in flight: got %+v, %v", b, err)
	}
	broken := errors.New("gone")
	if _, err = begin(func() (reading, error) { return reading{}, broken }, false, time.Second); !errors.Is(err, broken) {
		t.Errorf("an error was lost: %v", err)
	}
}

func TestCountersThatMustNotMoveAreReasons(t *testing.T) {
	b := base{Counted: tally{Sectors: 1, Passthrough: 2, Overflow: 3}}
	for want, now := range map[Reason]tally{
		"":          {9, 2, 3},
		Passthrough: {9, 3, 3},
		Overflowed:  {9, 2, 4},
	} {
		u := b.exceeded(now, "sda")
		if want == "" && u == nil {
			continue
		}
		if u == nil || u.Reason != want {
			t.Errorf("%+v: got %v, want %q", now, u, want)
		}
	}
}

func TestContinuityEndsForAReason(t *testing.T) {
	now := &record{Version: recordVersion, Boot: "b", Object: "o"}
	with := func(change func(*record)) *record {
		r := *now
		change(&r)
		return &r
	}
	for name, c := range map[string]struct {
		old, now *record
		want     Reason
	}{
		"goes on":         {with(func(r *record) {}), now, ""},
		"nothing before":  {nil, now, FirstContact},
		"unreadable":      {&record{Version: -1}, now, Detached},
		"another boot":    {with(func(r *record) { r.Boot = "a" }), now, Rebooted},
		"other programs":  {with(func(r *record) { r.Object = "p" }), now, Upgraded},
		"a bio disk more": {with(func(r *record) {}), with(func(r *record) { r.Bios = true }), Upgraded},
		"a bio disk less": {with(func(r *record) { r.Bios = true }), now, ""},
	} {
		if got, detail := c.old.broken(c.now); got != c.want || got != "" && detail == "" {
			t.Errorf("%s: got %q (%s), want %q", name, got, detail, c.want)
		}
	}
	was := identity{Number: 7 << 20, Size: 4096, Seq: 3}
	for name, c := range map[string]struct {
		now  identity
		want Reason
	}{
		"the same":       {was, ""},
		"larger":         {identity{7 << 20, 8192, 3, false}, Resized},
		"another number": {identity{7<<20 | 1, 4096, 3, false}, Replaced},
		"another medium": {identity{7 << 20, 4096, 4, false}, Replaced},
		"both":           {identity{7 << 20, 8192, 4, false}, Replaced},
	} {
		u := was.differs(c.now, "sda")
		if (u == nil) != (c.want == "") || u != nil && u.Reason != c.want {
			t.Errorf("%s: got %v, want %q", name, u, c.want)
		}
	}
}

func TestKernelCountersAreReadOldAndNew(t *testing.T) {
	const inflight = "       1        2\n"
	for s, want := range map[string]counters{
		"  162831     1486 174717357   617769    76187    27352  4995307   116120        3   123272   794813       70        0 93122718        7    40743    60916\n": {4995307 + 93122718, 2},
		"1 2 3 4 5 6 7 8 9 10 11\n": {7, 2}, // before discards were counted
	} {
		if got, err := parseCounters(s, inflight); err != nil || got != want {
			t.Errorf("%q: got %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "1 2 3", "a b c d e f g h i", "1 2 3 4 5 6 -7 8 9"} {
		if got, err := parseCounters(s, inflight); err == nil {
			t.Errorf("%q: got %+v", s, got)
		}
	}
	if got, err := parseCounters("1 2 3 4 5 6 7 8 9 10 11\n", "none"); err == nil {
		t.Errorf("got %+v", got)
	}
}

func sample() *record {
	return &record{
		Version: recordVersion, Boot: "f0e1", Object: objectName(), Bios: true,
		Links: map[string]id{"request_primary": 3}, Runs: map[string]id{"request_primary": 4}, Maps: map[string]id{"disks": 5},
		Disks: []*recordOfDisk{
			{Name: "sda", Device: identity{8 << 20, 1 << 40, 9, false}, Granule: 16 << 10, Current: 6, Taken: 7,
				Base: base{12, true, 8, tally{1, 2, 3}}, Mark: "m", Slept: 5},
			{Name: "sdb", Device: identity{8<<20 | 16, 4096, 0, true}, Slot: 1, Granule: 16 << 10, Unknown: Busy, Detail: "d"},
		},
	}
}

func TestARecordComesBackAsItWasWritten(t *testing.T) {
	path := t.TempDir() + "/record.json"
	if got, err := readRecord(path); got != nil || err != nil {
		t.Fatalf("no record: %v, %v", got, err)
	}
	for range 2 {
		if err := sample().write(path); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readRecord(path)
	if err != nil || !reflect.DeepEqual(got, sample()) {
		t.Fatalf("got %+v, %v", got, err)
	}
}

func TestARecordThatNoTrackerWroteIsRefused(t *testing.T) {
	for name, spoil := range map[string]func(*record){
		"version":   func(r *record) { r.Version++ },
		"slot":      func(r *record) { r.Disks[0].Slot = maxDisks },
		"one slot":  func(r *record) { r.Disks[0].Slot = 1 },
		"one name":  func(r *record) { r.Disks[0].Name = "sdb" },
		"path":      func(r *record) { r.Disks[0].Name = "../sda" },
		"empty":     func(r *record) { r.Disks[0].Name = "" },
		"size":      func(r *record) { r.Disks[0].Device.Size = 0 },
		"huge":      func(r *record) { r.Disks[0].Device.Size = maxSize + 1 },
		"granule":   func(r *record) { r.Disks[0].Granule = 4096 },
		"reason":    func(r *record) { r.Disks[1].Unknown = "mood" },
		"long mark": func(r *record) { r.Disks[1].Mark = strings.Repeat("x", maxText+1) },
		"no disk":   func(r *record) { r.Disks[1] = nil },
		"too many":  func(r *record) { r.Disks = make([]*recordOfDisk, maxDisks+1) },
	} {
		r, path := sample(), t.TempDir()+"/record.json"
		spoil(r)
		if err := r.write(path); err != nil {
			t.Fatal(err)
		}
		if got, err := readRecord(path); err == nil {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

func FuzzDecodeRecord(f *testing.F) {
	path := f.TempDir() + "/record.json"
	if err := sample().write(path); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":1,"disks":[null]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, err := decodeRecord(bytes.NewReader(b))
		if err != nil {
			return
		}
		// What is accepted can be worked with: it fits the maps and can be written again.
		for _, d := range rec.Disks {
			if l := newLayout(d.Device.Size, rec.Bytes); l.granules() > maxGranules || l.words() <= 0 {
				t.Fatalf("a map of %d words", l.words())
			}
		}
		again, err := json.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeRecord(bytes.NewReader(again)); err != nil || !reflect.DeepEqual(back.Disks, rec.Disks) {
			t.Fatalf("not the same when written: %v", err)
		}
	})
}
