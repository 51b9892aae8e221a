// Package capturetest proves that a capture.Source keeps its promises, whatever it reads and however it gets there. A
// source's test makes a Bench and calls Run.
package capturetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

// Bench is a source to be proven, and what the suite needs around it.
type Bench struct {
	Store *store.Store
	// Open gives a source that reads Disks, files that exist.
	Open  func(t *testing.T) capture.Source
	Disks []string
	// Sends says that bytes travel: an increment must send little more than what changed.
	Sends bool
	// Tracks says that an increment reads only what was written, or where writes were missed compares and says so; Skips that what is known to be zeros is not read.
	Tracks, Skips bool

	// How a disk is read, written to and made longer that is more than its file. Without them it is the file.
	Content func(t *testing.T, disk int) []byte
	Write   func(t *testing.T, disk int, off int64, data []byte)
	Grow    func(t *testing.T, disk int)

	// Cut has the line from the server end after that many more bytes, or never for 0, and says how many came since the last
	// call. Every source that Sends over a line which can be cut has it.
	Cut func(after int64) (came int64)

	server string // what all snapshots of this bench are of
}

// DiskSize is the size of the disks that Fill makes: not a multiple of any block size.
const DiskSize = 2<<20 + 1536

// Fill writes a disk to a file: noise, text and holes.
func Fill(t *testing.T, path string, seed uint64) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 0))
	data := make([]byte, DiskSize)
	for off := 0; off < len(data); off += 48 << 10 {
		piece := data[off:min(len(data), off+48<<10)]
		switch r.IntN(3) {
		case 0:
			for i := 0; i+8 <= len(piece); i += 8 {
				binary.LittleEndian.PutUint64(piece[i:], r.Uint64())
			}
		case 1:
			copy(piece, bytes.Repeat([]byte("a line of a log\n"), len(piece)/16))
		}
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Run proves the promises, each as a test of its own.
func Run(t *testing.T, start func(t *testing.T) *Bench) {
	for _, promise := range []struct {
		name string
		test func(*testing.T, *Bench)
	}{
		{"AFullSnapshotIsTheDisks", full},
		{"AnIncrementIsTheDisksAndHoldsOnlyWhatChanged", increment},
		{"NothingChangedIsKeptForNothing", unchanged},
		{"WhatBecameZerosReadsAsZeros", zeroed},
		{"ADiskOfAnotherSizeIsCapturedInFull", grown},
		{"ACancelledCaptureLeavesNoSnapshotAndTheNextOneWorks", cancelled},
		{"AFullCaptureThatIsCutOffGoesOnWhereItWas", cutOff},
		{"ContactNamesTheDisksAndLeavesThemAlone", contact},
		{"ASnapshotThatIsKeptIsNotTakenAgain", twice},
		{"ForgetMayBeCalledAgain", forget},
	} {
		t.Run(promise.name, func(t *testing.T) {
			t.Parallel()
			b := start(t)
			b.server = dr.NewID("srv")
			promise.test(t, b)
		})
	}
}

// take captures, and fails the test if that fails.
func (b *Bench) take(t *testing.T, parent string) dr.Snapshot {
	t.Helper()
	snap, err := b.try(t.Context(), t, dr.NewSnapshotID(time.Now()), parent, nil)
	if err != nil {
		t.Fatal(err)
	}
	b.same(t, snap)
	return snap
}

func (b *Bench) try(ctx context.Context, t *testing.T, id, parent string, report dr.Progress) (dr.Snapshot, error) {
	t.Helper()
	src := b.Open(t)
	defer func() {
		if err := src.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}()
	return capture.Take(ctx, src, b.Store, api.SnapshotTask{ID: id, Server: dr.Server{ID: b.server, Name: "web"}, Parent: parent}, report)
}

// same compares a snapshot with the disks as they are now.
func (b *Bench) same(t *testing.T, snap dr.Snapshot) {
	t.Helper()
	if len(snap.Disks) != len(b.Disks) || len(snap.Inventory.Disks) != len(b.Disks) {
		t.Fatalf("the snapshot has %d disks and %d in its inventory, want %d", len(snap.Disks), len(snap.Inventory.Disks), len(b.Disks))
	}
	for i := range b.Disks {
		want := b.content(t, i)
		img, err := b.Store.Image(t.Context(), snap.ID, i)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
		_ = img.Close()
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("disk %d of %s is not what was on the server (%d bytes, want %d; %v)", i, snap.ID, len(got), len(want), err)
		}
	}
}

// content is what is on a disk.
func (b *Bench) content(t *testing.T, disk int) []byte {
	t.Helper()
	if b.Content != nil {
		return b.Content(t, disk)
	}
	data, err := os.ReadFile(b.Disks[disk])
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// change overwrites a part of a disk.
func (b *Bench) change(t *testing.T, disk int, off int64, data []byte) {
	t.Helper()
	if b.Write != nil {
		b.Write(t, disk, off, data)
		return
	}
	f, err := os.OpenFile(b.Disks[disk], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

func full(t *testing.T, b *Bench) {
	snap := b.take(t, "")
	if snap.Pass.Kind != dr.PassFull || snap.Pass.Reason == "" || snap.Parent != "" {
		t.Errorf("pass %+v, parent %q: want a full one with a reason", snap.Pass, snap.Parent)
	}
	if !b.Skips && snap.Stats.Read < int64(len(b.Disks))*DiskSize || snap.Stats.Read == 0 || snap.Stats.Duration <= 0 || snap.Consistency == "" {
		t.Errorf("figures: %+v, consistency %q", snap.Stats, snap.Consistency)
	}
	if since := time.Since(snap.Taken); since < 0 || since > time.Minute {
		t.Errorf("taken %s ago", since)
	}
}

func increment(t *testing.T, b *Bench) {
	first := b.take(t, "")
	b.change(t, 0, 1<<20+17, []byte("something new"))
	b.change(t, len(b.Disks)-1, DiskSize-3, []byte("end"))
	snap := b.take(t, first.ID)
	kind := dr.PassCompare
	tracked := b.Tracks && !strings.Contains(snap.Pass.Reason, "unbalanced") // some kernels leave out writes
	if tracked {
		kind = dr.PassTracked
	}
	if snap.Parent != first.ID || snap.Pass.Kind != kind || (snap.Pass.Reason == "") != tracked || snap.Pass.Provider == "" {
		t.Errorf("parent %q, pass %+v: want an increment of %s, and to know how it was seen", snap.Parent, snap.Pass, first.ID)
	}
	if tracked && snap.Stats.Read > 4*int64(snap.Disks[0].BlockSize) {
		t.Errorf("read %d bytes for two blocks", snap.Stats.Read)
	}
	if block := int64(snap.Disks[0].BlockSize); snap.Stats.Changed == 0 || snap.Stats.Changed > 2*block {
		t.Errorf("changed %d bytes, want at most two blocks of %d", snap.Stats.Changed, block)
	}
	// Layout and inventory travel as well, and can be large on a machine with much to tell.
	if b.Sends && (snap.Stats.Sent == 0 || snap.Stats.Sent > first.Stats.Sent/4) {
		t.Errorf("sent %d bytes for two blocks; the full snapshot took %d", snap.Stats.Sent, first.Stats.Sent)
	}
	if !b.Sends && snap.Stats.Sent != 0 {
		t.Errorf("a local disk sent %d bytes", snap.Stats.Sent)
	}
	b.change(t, 0, 0, []byte("and once more"))
	b.take(t, snap.ID)
}

func unchanged(t *testing.T, b *Bench) {
	first := b.take(t, "")
	if snap := b.take(t, first.ID); snap.Stats.Changed != 0 || snap.Stats.New != 0 {
		t.Errorf("nothing changed, and %d bytes changed, %d of them new", snap.Stats.Changed, snap.Stats.New)
	}
}

func zeroed(t *testing.T, b *Bench) {
	b.change(t, 0, 0, bytes.Repeat([]byte("x"), 1<<20))
	first := b.take(t, "")
	b.change(t, 0, 0, make([]byte, 1<<20-100))
	snap := b.take(t, first.ID)
	if snap.Stats.New > int64(snap.Disks[0].BlockSize) {
		t.Errorf("zeros cost %d new bytes", snap.Stats.New)
	}
}

func grown(t *testing.T, b *Bench) {
	first := b.take(t, "")
	b.grow(t, 0)
	if snap := b.take(t, first.ID); snap.Pass.Kind != dr.PassFull || snap.Parent != "" || snap.Pass.Reason == "" {
		t.Errorf("pass %+v, parent %q: want a full one that says why", snap.Pass, snap.Parent)
	}
}

func (b *Bench) grow(t *testing.T, disk int) {
	t.Helper()
	if b.Grow != nil {
		b.Grow(t, disk)
		return
	}
	Append(t, b.Disks[disk])
}

// Append makes a file longer.
func Append(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.Write(bytes.Repeat([]byte("more"), 128<<10))
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func cancelled(t *testing.T, b *Bench) {
	ctx, cancel := context.WithCancel(t.Context())
	id := dr.NewSnapshotID(time.Now())
	// Cancelled with the first sign of progress, which comes after the disks were opened.
	if _, err := b.try(ctx, t, id, "", func(string, int64, int64, string) { cancel() }); err == nil {
		t.Fatal("a cancelled capture returned no error")
	}
	if _, err := b.Store.Snapshot(t.Context(), id); err == nil {
		t.Fatal("a cancelled capture left a snapshot")
	}
	if snap, err := b.try(t.Context(), t, id, "", nil); err != nil {
		t.Errorf("the next attempt: %v", err)
	} else {
		b.same(t, snap)
	}
}

// cutOff has the line end again and again: what arrived once is not sent again, and the snapshot is the disks as they are.
func cutOff(t *testing.T, b *Bench) {
	if b.Cut == nil {
		return // nothing travels
	}
	total := int64(len(b.Disks)) * DiskSize
	r := rand.New(rand.NewPCG(9, 0))
	for i := range b.Disks {
		data := make([]byte, DiskSize) // of which nothing compresses
		for at := range data {
			data[at] = byte(r.Uint32())
		}
		b.change(t, i, 0, data)
	}
	var came, cuts int64
	for ; came < total*3/4; cuts++ {
		b.Cut(total/8 + r.Int64N(total/4))
		if _, err := b.try(t.Context(), t, dr.NewSnapshotID(time.Now()), "", nil); err == nil {
			t.Fatal("a capture whose line ended is complete")
		}
		came += b.Cut(0)
	}
	b.change(t, 0, 0, []byte("written since"))
	snap := b.take(t, "")
	came += b.Cut(0)
	if snap.Pass.Kind != dr.PassFull || snap.Stats.Resumed < total/2 || snap.Stats.Changed != total {
		t.Errorf("pass %+v, %+v: want a full one that went on", snap.Pass, snap.Stats)
	}
	// Besides blocks each attempt sends what the server is made of, and of a block in which it was cut a part.
	besides := b.take(t, snap.ID).Stats.Sent + int64(snap.Disks[0].BlockSize)
	if most := total*102/100 + (cuts+2)*besides; came > most {
		t.Errorf("%d bytes came in %d attempts for %d; want at most %d", came, cuts+1, total, most)
	}
}

func contact(t *testing.T, b *Bench) {
	before := b.content(t, 0)
	src := b.Open(t)
	defer src.Close()
	about, err := src.Contact(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(about.Inventory.Disks) != len(b.Disks) || about.Inventory.Disks[0].Size != DiskSize {
		t.Errorf("disks: %+v", about.Inventory.Disks)
	}
	if after := b.content(t, 0); !bytes.Equal(before, after) {
		t.Error("the disk changed")
	}
}

func twice(t *testing.T, b *Bench) {
	snap := b.take(t, "")
	if _, err := b.try(t.Context(), t, snap.ID, "", nil); err == nil {
		t.Error("a snapshot was taken over one that is kept")
	}
}

func forget(t *testing.T, b *Bench) {
	src := b.Open(t)
	defer src.Close()
	for range 2 {
		if err := src.Forget(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
