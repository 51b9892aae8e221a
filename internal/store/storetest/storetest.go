// Package storetest proves that a driver keeps what package store promises: a driver's test is one call of Run.
//
//	Disk    a disk in memory that counts what is read from it
//	Faulty  a driver over another one that can lose power, fill up and lie
//
// Knows: the promises of package store.
// Must not know: any driver.
package storetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
)

const (
	password = "correct horse"
	block    = 16 << 10 // small, so that small disks have many
)

// suite is a store all tests share, as a real one is shared by all that happens to it.
type suite struct {
	drv   *Faulty
	s     *store.Store
	other *store.Store // as another process would have it open
	n     int
}

// Run runs the suite. open gives a driver for a new, empty place.
func Run(t *testing.T, open func(t *testing.T) store.Driver) {
	x := &suite{drv: &Faulty{Driver: open(t)}}
	if err := store.Create(t.Context(), x.drv, password); err != nil {
		t.Fatal(err)
	}
	x.s, x.other = reopen(t, x.drv), reopen(t, x.drv)
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"a place that is not empty is refused", x.refusesForeign},
		{"what goes in comes out", x.roundTrip},
		{"an increment reads and stores what changed", x.increment},
		{"zeros cost nothing", x.zeros},
		{"a block that comes compressed is stored as it came", x.packed},
		{"a disk may grow and shrink", x.resized},
		{"a chain keeps its block size", x.blockSize},
		{"writers do not disturb each other", x.parallel},
		{"a snapshot is written once", x.once},
		{"an aborted snapshot leaves no trace", x.aborted},
		{"what does not fit is not gone on with", x.useless},
		{"a full snapshot that was cut off is gone on with", x.goesOn},
		{"files stay with a snapshot", x.files},
		{"records survive", x.records},
		{"what is in use is not forgotten", x.protected},
		{"collecting frees what nobody names and nothing else", x.collect},
		{"collecting and writing keep apart", x.collectWhileWriting},
		{"a set of files comes out as it went in", x.fileSets},
		{"a full medium loses nothing", x.full},
		{"a medium that lies is found out", x.lies},
		{"a flipped byte is found and named", x.flipped},
		{"a flipped byte in a file is found and named", x.flippedFile},
		{"verifying nothing is an error", x.nothing},
		{"a power cut leaves a snapshot complete or absent", x.powerCuts},
		{"a power cut leaves files complete or absent", x.filePowerCuts},
		{"a power cut leaves the partial", x.partialPowerCuts},
		{"a place that is gone is given up", x.gone},
	} {
		if !t.Run(test.name, test.run) {
			return // what follows would only repeat it
		}
	}
}

func reopen(t *testing.T, drv store.Driver) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), drv, password)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// id gives a new snapshot's identifier.
func (x *suite) id() string {
	x.n++
	return fmt.Sprintf("snap-%d", x.n)
}

func snapshotOf() dr.Snapshot {
	return dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Now().UTC(), Inventory: dr.Inventory{Hostname: "shop"}}
}

// write keeps a snapshot of one disk.
func write(t *testing.T, s *store.Store, id, parent string, d *Disk, extents []image.Extent) dr.Snapshot {
	t.Helper()
	snap, err := tryWrite(t.Context(), s, id, parent, d, extents)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func tryWrite(ctx context.Context, s *store.Store, id, parent string, d *Disk, extents []image.Extent) (dr.Snapshot, error) {
	w, err := s.Begin(ctx, id, parent)
	if err != nil {
		return dr.Snapshot{}, err
	}
	defer w.Abort(ctx) //nolint:errcheck // never fails
	size := 0
	if parent == "" {
		size = block
	}
	dw, err := w.Disk(ctx, "sda", d.Size(), size)
	if err != nil {
		return dr.Snapshot{}, err
	}
	if err := dw.Ingest(ctx, d, extents, nil); err != nil {
		return dr.Snapshot{}, err
	}
	return w.Commit(ctx, snapshotOf())
}

// same requires a kept disk to be equal to data, read whole, in random pieces, and by its extents.
func same(t *testing.T, s *store.Store, id string, data []byte) {
	t.Helper()
	m, err := s.Image(t.Context(), id, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close() //nolint:errcheck // only read
	if m.Size() != int64(len(data)) {
		t.Fatalf("%s has %d bytes, not %d", id, m.Size(), len(data))
	}
	got := make([]byte, len(data))
	if n, err := m.ReadAt(got, 0); err != nil || n != len(got) {
		t.Fatalf("read %s: %d, %v", id, n, err)
	}
	if !bytes.Equal(got, data) {
		t.Fatalf("%s differs", id)
	}
	r := rand.New(rand.NewPCG(7, uint64(len(data))))
	for range 50 {
		off := r.Int64N(m.Size())
		p := make([]byte, r.IntN(3*block)+1)
		n, err := m.ReadAt(p, off)
		if want := min(int64(len(p)), m.Size()-off); int64(n) != want || (err == nil) != (want == int64(len(p))) {
			t.Fatalf("read %d bytes of %s at %d: %d, %v", len(p), id, off, n, err)
		}
		if !bytes.Equal(p[:n], data[off:off+int64(n)]) {
			t.Fatalf("%s differs at %d", id, off)
		}
	}
	var next int64
	err = m.Extents(t.Context(), 0, m.Size(), func(e image.Extent) bool {
		if e.Offset != next || e.Length <= 0 {
			t.Fatalf("extent %+v of %s does not follow %d", e, id, next)
		}
		next = e.Offset + e.Length
		if e.Zero && !empty(data[e.Offset:next]) {
			t.Fatalf("extent %+v of %s is not zero", e, id)
		}
		return true
	})
	if err != nil || next != m.Size() {
		t.Fatalf("extents of %s end at %d: %v", id, next, err)
	}
}

func intact(t *testing.T, s *store.Store, id string) {
	t.Helper()
	if r, err := s.Verify(t.Context(), id, nil); err != nil {
		t.Fatalf("%v (%+v)", err, r)
	}
}

func want(t *testing.T, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Fatalf("got %v, want %v", err, target)
	}
}

func (x *suite) refusesForeign(t *testing.T) {
	want(t, store.Create(t.Context(), x.drv, password), store.ErrNotEmpty)
	_, err := store.Open(t.Context(), x.drv, "wrong")
	want(t, err, store.ErrBadPassword)
}

func (x *suite) roundTrip(t *testing.T) {
	d := NewDisk(3<<20+777, 1)
	id := x.id()
	snap := write(t, x.s, id, "", d, nil)
	same(t, x.s, id, d.Data)
	intact(t, x.s, id)
	if snap.ID != id || len(snap.Disks) != 1 || snap.Disks[0].Size != d.Size() || snap.Disks[0].BlockSize != block {
		t.Errorf("the snapshot says %+v", snap.Disks)
	}
	if st := snap.Stats; st.Changed != snap.Disks[0].Data || st.New == 0 || st.New > st.Changed || st.Stored == 0 {
		t.Errorf("the stats say %+v of %+v", st, snap.Disks)
	}
	kept, err := x.s.Snapshot(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := mustJSON(t, kept), mustJSON(t, snap); !bytes.Equal(a, b) {
		t.Errorf("kept %s\nreturned %s", a, b)
	}
	_, err = x.s.Snapshot(t.Context(), "snap-none")
	want(t, err, store.ErrNotFound)
	_, err = x.s.Image(t.Context(), id, 1)
	want(t, err, store.ErrNotFound)
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (x *suite) increment(t *testing.T) {
	d := NewDisk(5<<20+100, 2)
	full, inc := x.id(), x.id()
	first := write(t, x.s, full, "", d, nil)
	old := bytes.Clone(d.Data)
	Noise(d.Data[block+5:block+100], 3) // inside the second block
	Noise(d.Data[40*block:43*block], 4)
	clear(d.Data[10*block : 12*block])
	d.Read.Store(0)
	snap := write(t, x.s, inc, full, d, []image.Extent{
		{Offset: 41 * block, Length: 2 * block}, {Offset: block + 5, Length: 95}, {Offset: 40 * block, Length: block + 1},
		{Offset: 10 * block, Length: 2 * block, Zero: true},
	})
	if got := d.Read.Load(); got != 4*block {
		t.Errorf("%d bytes were read, not %d", got, 4*block)
	}
	if snap.Stats.New != 4*block || snap.Stats.Changed < 4*block || snap.Stats.Changed > 6*block {
		t.Errorf("the stats say %+v", snap.Stats)
	}
	if snap.Stats.Stored > 5*block+64<<10 || snap.Stats.Stored >= first.Stats.Stored {
		t.Errorf("the store grew by %d for %d bytes", snap.Stats.Stored, 4*block)
	}
	same(t, x.s, full, old)
	same(t, x.s, inc, d.Data)
	intact(t, x.s, inc)
	_, err := x.s.Begin(t.Context(), x.id(), "snap-none")
	want(t, err, store.ErrNotFound)
	// Everything read again and nothing changed: nothing is stored, and the map is the same.
	again := x.id()
	if s := write(t, x.s, again, inc, d, nil); s.Stats.Changed != 0 || s.Stats.New != 0 || s.Disks[0].Root != snap.Disks[0].Root {
		t.Errorf("an unchanged disk: %+v %+v", s.Stats, s.Disks)
	}
}

// packed writes blocks with frames that are larger than any the store would make itself, and one that not every reader could
// unpack.
func (x *suite) packed(t *testing.T) {
	encoder := func(o ...zstd.EOption) *zstd.Encoder {
		e, err := zstd.NewWriter(nil, append(o, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { e.Close() })
		return e
	}
	loose, wide := encoder(zstd.WithNoEntropyCompression(true), zstd.WithSingleSegment(true)), encoder(zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false))
	const blocks = 64
	var data []byte
	r := rand.New(rand.NewPCG(11, uint64(x.n)))
	for len(data) < blocks*block {
		data = fmt.Appendf(data, "%d servers of %d stand, %x\n", r.IntN(1000), r.IntN(1000), r.Uint32())
	}
	data = data[:blocks*block]
	write := func(frame func(plain []byte) []byte) (dr.Snapshot, int64) {
		id := x.id()
		w, err := x.s.Begin(t.Context(), id, "")
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort(t.Context()) //nolint:errcheck // never fails
		d, err := w.Disk(t.Context(), "vda", int64(len(data)), block)
		if err != nil {
			t.Fatal(err)
		}
		var wait sync.WaitGroup
		var frames atomic.Int64
		for i := range int64(blocks) {
			wait.Go(func() {
				plain := bytes.Clone(data[i*block : (i+1)*block])
				f := frame(plain)
				frames.Add(int64(len(f)))
				if err := d.WritePacked(t.Context(), i, plain, f); err != nil {
					t.Error(err)
				}
				clear(plain) // it was the caller's
				clear(f)
			})
		}
		wait.Wait()
		snap, err := w.Commit(t.Context(), snapshotOf())
		if err != nil {
			t.Fatal(err)
		}
		same(t, x.s, id, data)
		intact(t, x.s, id)
		return snap, frames.Load()
	}
	came, size := write(func(plain []byte) []byte { return loose.EncodeAll(plain, nil) })
	if came.Stats.Stored < size || came.Stats.Stored > size+64<<10 {
		t.Errorf("the store grew by %d for frames of %d bytes", came.Stats.Stored, size)
	}
	for i := range data {
		data[i] ^= 0x40 // other blocks of the same kind
	}
	made, size := write(func(plain []byte) []byte {
		var h zstd.Header
		f := wide.EncodeAll(plain, nil)
		if err := h.Decode(f); err != nil {
			t.Error(err)
		}
		// A window of 2 GiB, which is as well encoded by hand: the byte after the magic and the descriptor.
		f = append(append(bytes.Clone(f[:4]), f[4]&^0x20), f[5:]...)
		f[5] = 0xa8
		return f
	})
	if made.Stats.Stored >= came.Stats.Stored {
		t.Errorf("frames of %d bytes that need a window of 2 GiB: the store grew by %d", size, made.Stats.Stored)
	}
}

func (x *suite) zeros(t *testing.T) {
	w, err := x.s.Begin(t.Context(), x.id(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort(t.Context()) //nolint:errcheck // never fails
	const size = 200<<30 + 5
	d, err := w.Disk(t.Context(), "vda", size, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), 12345, make([]byte, d.BlockSize())); err != nil {
		t.Fatal(err)
	}
	if err := d.Zero(t.Context(), 0, d.Blocks()); err != nil {
		t.Fatal(err)
	}
	snap, err := w.Commit(t.Context(), snapshotOf())
	if err != nil {
		t.Fatal(err)
	}
	if snap.Disks[0].Data != 0 || snap.Stats.Changed != 0 || snap.Stats.New != 0 || snap.Stats.Stored > 64<<10 {
		t.Errorf("200 GiB of zeros: %+v %+v", snap.Disks, snap.Stats)
	}
	m, err := x.s.Image(t.Context(), snap.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close() //nolint:errcheck // only read
	var got []image.Extent
	err = m.Extents(t.Context(), 3, size-3, func(e image.Extent) bool { got = append(got, e); return true })
	if err != nil || len(got) != 1 || got[0] != (image.Extent{Offset: 3, Length: size - 3, Zero: true}) {
		t.Errorf("extents %v, %v", got, err)
	}
}

func (x *suite) resized(t *testing.T) {
	d := &Disk{Data: make([]byte, 65<<20+3*block+100)} // most of it empty, so that it is fast
	Noise(d.Data[:1<<20], 5)
	Noise(d.Data[60<<20:], 50)
	full := x.id()
	write(t, x.s, full, "", d, nil)
	sizes := []int64{65<<20 + 3*block + 900, 129<<20 + 7, 61<<20 + 1, 64 << 20}
	if raceEnabled {
		sizes = sizes[1:3] // large memory is slow then
	}
	for _, size := range sizes {
		inc := x.id()
		other := &Disk{Data: make([]byte, size)}
		copy(other.Data, d.Data)
		extents := []image.Extent{}
		if size > d.Size()+block {
			Noise(other.Data[size-2*block:], 6)
			extents = append(extents, image.Extent{Offset: size - 2*block, Length: 2 * block})
		}
		snap := write(t, x.s, inc, full, other, extents)
		same(t, x.s, inc, other.Data)
		var data int64
		for off := int64(0); off < size; off += block {
			if p := other.Data[off:min(off+block, size)]; !empty(p) {
				data += int64(len(p))
			}
		}
		if snap.Disks[0].Data != data {
			t.Errorf("size %d: %d bytes of data, the snapshot says %d", size, data, snap.Disks[0].Data)
		}
	}
}

func (x *suite) blockSize(t *testing.T) {
	full := x.id()
	write(t, x.s, full, "", NewDisk(block, 8), nil)
	w, err := x.s.Begin(t.Context(), x.id(), full)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort(t.Context()) //nolint:errcheck // never fails
	if _, err := w.Disk(t.Context(), "sda", block, 2*block); err == nil {
		t.Error("another block size than the parent's was accepted")
	}
	for _, bad := range []struct{ size, block int64 }{{0, 0}, {-1, 0}, {1, 100}, {1, 2048}, {1 << 60, 0}, {1, 8 << 20}} {
		if _, err := w.Disk(t.Context(), "sdb", bad.size, int(bad.block)); err == nil {
			t.Errorf("a disk of %d bytes in blocks of %d was accepted", bad.size, bad.block)
		}
	}
	d, err := w.Disk(t.Context(), "sda", block, 0)
	if err != nil || d.BlockSize() != block {
		t.Errorf("%v: inherits block size %d", err, d.BlockSize())
	}
	for _, bad := range []struct {
		n    int64
		data []byte
	}{{-1, make([]byte, block)}, {1, make([]byte, block)}, {0, make([]byte, block-1)}, {0, nil}} {
		if err := d.Write(t.Context(), bad.n, bad.data); err == nil {
			t.Errorf("%d bytes for block %d were accepted", len(bad.data), bad.n)
		}
	}
}

func (x *suite) parallel(t *testing.T) {
	d := NewDisk(2<<20, 9)
	var wg sync.WaitGroup
	ids := []string{x.id(), x.id(), x.id()}
	for _, id := range ids {
		wg.Go(func() {
			if _, err := tryWrite(t.Context(), x.s, id, "", d, nil); err != nil {
				t.Errorf("%s: %v", id, err)
			}
		})
	}
	wg.Wait()
	// What one process keeps, another sees after Refresh.
	if err := x.other.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		same(t, x.other, id, d.Data)
	}
}

func (x *suite) once(t *testing.T) {
	d := NewDisk(block, 10)
	id := x.id()
	w, err := x.s.Begin(t.Context(), id, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = x.s.Begin(t.Context(), id, "")
	want(t, err, store.ErrBusy)
	if err := w.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}
	write(t, x.s, id, "", d, nil)
	_, err = x.s.Begin(t.Context(), id, "")
	want(t, err, store.ErrExists)
}

func (x *suite) aborted(t *testing.T) {
	id := x.id()
	w, err := x.s.Begin(t.Context(), id, "")
	if err != nil {
		t.Fatal(err)
	}
	src := NewDisk(1<<20, 11)
	d, err := w.Disk(t.Context(), "sda", src.Size(), block)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Ingest(t.Context(), src, nil, nil); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := w.Abort(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Commit(t.Context(), snapshotOf()); err == nil {
		t.Error("an aborted snapshot was committed")
	}
	if err := d.Write(t.Context(), 0, src.Data[:block]); err == nil {
		t.Error("an aborted snapshot was written to")
	}
	_, err = x.s.Snapshot(t.Context(), id)
	want(t, err, store.ErrNotFound)
	w, err = x.s.Begin(t.Context(), id, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(t.Context(), snapshotOf()); err == nil {
		t.Error("a snapshot of no disk was committed")
	}
}

func (x *suite) files(t *testing.T) {
	id := x.id()
	w, err := x.s.Begin(t.Context(), id, "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort(t.Context()) //nolint:errcheck // never fails
	src := NewDisk(block, 12)
	d, err := w.Disk(t.Context(), "sda", src.Size(), block)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Ingest(t.Context(), src, nil, nil); err != nil {
		t.Fatal(err)
	}
	w.Attach("fingerprints", []byte("old"))
	w.Attach("fingerprints", []byte("new"))
	w.Attach("empty", nil)
	if _, err := w.Commit(t.Context(), snapshotOf()); err != nil {
		t.Fatal(err)
	}
	if err := w.Abort(t.Context()); err != nil { // fine after Commit
		t.Fatal(err)
	}
	for name, text := range map[string]string{"fingerprints": "new", "empty": ""} {
		if got, err := x.s.Attachment(t.Context(), id, name); err != nil || string(got) != text {
			t.Errorf("attachment %s: %q, %v", name, got, err)
		}
	}
	_, err = x.s.Attachment(t.Context(), id, "other")
	want(t, err, store.ErrNotFound)
	big := make([]byte, 3<<20+1)
	Noise(big, 13)
	if err := x.s.Keep(t.Context(), id, "delta-0.qcow2", strings.NewReader("first")); err != nil {
		t.Fatal(err)
	}
	if err := x.s.Keep(t.Context(), id, "delta-0.qcow2", bytes.NewReader(big)); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if err := x.s.Fetch(t.Context(), id, "delta-0.qcow2", &got); err != nil || !bytes.Equal(got.Bytes(), big) {
		t.Errorf("fetched %d bytes of %d: %v", got.Len(), len(big), err)
	}
	list, err := x.s.Kept(t.Context(), id)
	if err != nil || len(list) != 1 || list[0].Name != "delta-0.qcow2" || list[0].Size != int64(len(big)) {
		t.Errorf("kept: %+v, %v", list, err)
	}
	want(t, x.s.Fetch(t.Context(), id, "other", &got), store.ErrNotFound)
	want(t, x.s.Keep(t.Context(), "snap-none", "a", &got), store.ErrNotFound)
	if err := x.s.Keep(t.Context(), id, "../a", &got); err == nil {
		t.Error("a file named ../a was kept")
	}
	if err := x.s.Keep(t.Context(), id, "live", strings.NewReader("for a while")); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again does nothing
		if err := x.s.Drop(t.Context(), id, "live"); err != nil {
			t.Fatal(err)
		}
	}
	want(t, x.s.Fetch(t.Context(), id, "live", &got), store.ErrNotFound)
	r, err := x.s.Verify(t.Context(), id, nil)
	if err != nil || r.Files != 4 {
		t.Errorf("verified %+v, %v", r, err)
	}
	if err := x.s.Forget(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	want(t, x.s.Fetch(t.Context(), id, "delta-0.qcow2", &got), store.ErrNotFound)
}
