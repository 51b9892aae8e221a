package storetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
)

func (x *suite) records(t *testing.T) {
	type value struct{ N int }
	for i := range 3 {
		if err := x.s.PutRecord(t.Context(), "server", fmt.Sprintf("srv-%d", i), value{i}); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.s.PutRecord(t.Context(), "server", "srv-1", value{10}); err != nil {
		t.Fatal(err)
	}
	if err := x.s.DeleteRecord(t.Context(), "server", "srv-2"); err != nil {
		t.Fatal(err)
	}
	if err := x.s.PutRecord(t.Context(), "verdict", "srv-1", value{99}); err != nil {
		t.Fatal(err)
	}
	for range 20 { // more than Kopia keeps without compacting them
		if err := x.s.PutRecord(t.Context(), "verdict", "often", value{1}); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.other.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*store.Store{x.s, x.other} {
		got := map[string]int{}
		err := s.Records(t.Context(), "server", func(id string, raw json.RawMessage) error {
			var v value
			got[id] = -1
			if err := json.Unmarshal(raw, &v); err != nil {
				return err
			}
			got[id] = v.N
			return nil
		})
		if err != nil || len(got) != 2 || got["srv-0"] != 0 || got["srv-1"] != 10 {
			t.Errorf("records: %v, %v", got, err)
		}
	}
	stop := errors.New("enough")
	want(t, x.s.Records(t.Context(), "server", func(string, json.RawMessage) error { return stop }), stop)
	for _, bad := range [][2]string{{"", "a"}, {"A", "a"}, {"server", ""}, {"server", "a b"}, {"lkg", "srv-1"}} {
		if err := x.s.PutRecord(t.Context(), bad[0], bad[1], 1); err == nil {
			t.Errorf("the record %q was put", bad)
		}
	}
}

func (x *suite) protected(t *testing.T) {
	ctx := t.Context()
	d := NewDisk(4*block, 20)
	good, newer := x.id(), x.id()
	write(t, x.s, good, "", d, nil)
	write(t, x.s, newer, good, d, []image.Extent{})
	want(t, x.s.SetLKG(ctx, "srv-9", "snap-none"), store.ErrNotFound)
	if err := x.s.SetLKG(ctx, "srv-9", good); err != nil {
		t.Fatal(err)
	}
	want(t, x.s.Forget(ctx, good), store.ErrProtected)
	if err := x.s.SetLKG(ctx, "srv-9", newer); err != nil {
		t.Fatal(err)
	}
	if m, err := x.s.LKG(ctx); err != nil || m["srv-9"] != newer {
		t.Errorf("last-known-good: %v, %v", m, err)
	}
	want(t, x.s.Forget(ctx, newer), store.ErrProtected)

	other := x.other
	release := other.Pin(good)
	want(t, x.s.Forget(ctx, good), store.ErrPinned)
	release()
	release()
	if err := other.Hold(ctx, good, "invocation-1"); err != nil {
		t.Fatal(err)
	}
	want(t, x.s.Forget(ctx, good), store.ErrPinned)
	if m, err := x.s.Holds(ctx); err != nil || m[good] != nil && !slices.Equal(m[good], []string{"invocation-1"}) {
		t.Errorf("holds: %v, %v", m, err)
	}
	want(t, x.s.Hold(ctx, "snap-none", "a"), store.ErrNotFound)
	if err := x.s.Unhold(ctx, good, "invocation-1"); err != nil {
		t.Fatal(err)
	}
	m, err := other.Image(ctx, good, 0)
	if err != nil {
		t.Fatal(err)
	}
	want(t, x.s.Forget(ctx, good), store.ErrPinned)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	w, err := other.Begin(ctx, x.id(), good)
	if err != nil {
		t.Fatal(err)
	}
	want(t, x.s.Forget(ctx, good), store.ErrPinned) // the parent of what is being written
	if err := w.Abort(ctx); err != nil {
		t.Fatal(err)
	}
	if err := x.s.Forget(ctx, good); err != nil {
		t.Fatal(err)
	}
	want(t, x.s.Forget(ctx, good), store.ErrNotFound)
	if err := x.s.SetLKG(ctx, "srv-9", ""); err != nil {
		t.Fatal(err)
	}
}

func (x *suite) collect(t *testing.T) {
	ctx := t.Context()
	d := NewDisk(1<<20, 21)
	Noise(d.Data, 210)
	old, inc := x.id(), x.id()
	write(t, x.s, old, "", d, nil)
	first := bytes.Clone(d.Data)
	Noise(d.Data[:block], 22)
	write(t, x.s, inc, old, d, []image.Extent{{Length: block}})
	alone := NewDisk(4<<20, 23)
	Noise(alone.Data, 230)
	gone := x.id()
	write(t, x.s, gone, "", alone, nil)
	reader := x.other // whose index will be out of date
	m, err := reader.Image(ctx, inc, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close() //nolint:errcheck // only read

	if err := x.s.Forget(ctx, old); err != nil {
		t.Fatal(err)
	}
	if err := x.s.Forget(ctx, gone); err != nil {
		t.Fatal(err)
	}
	r, err := x.s.Collect(ctx, store.CollectOptions{}, nil)
	if err != nil || r.Freed() > 1<<20 {
		t.Fatalf("a careful collection freed what is young: %+v, %v", r, err)
	}
	r, err = x.s.Collect(ctx, store.CollectOptions{Immediate: true}, nil)
	if err != nil || r.Freed() < 3<<20 {
		t.Fatalf("collected %+v, %v", r, err)
	}
	for _, s := range []*store.Store{x.s, reader} {
		same(t, s, inc, d.Data) // holds blocks that came with its parent
	}
	all, err := x.s.Snapshots(ctx)
	if err != nil || len(all) != r.Snapshots {
		t.Fatalf("%d snapshots, %d walked: %v", len(all), r.Snapshots, err)
	}
	for _, snap := range all {
		intact(t, x.s, snap.ID)
	}
	// What was collected can be written again.
	back := x.id()
	write(t, x.s, back, inc, &Disk{Data: first}, nil)
	same(t, x.s, back, first)
	u, err := x.s.Usage(ctx)
	if err != nil || u.Bytes == 0 || u.Contents == 0 || u.Blobs == 0 || u.Unpacked < u.Packed/2 {
		t.Errorf("usage %+v, %v", u, err)
	}
}

func (x *suite) collectWhileWriting(t *testing.T) {
	w, err := x.s.Begin(t.Context(), x.id(), "")
	if err != nil {
		t.Fatal(err)
	}
	other := x.other
	for _, s := range []*store.Store{x.s, other} {
		_, err = s.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil)
		want(t, err, store.ErrBusy)
	}
	if err := w.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	var collections int
	wg.Go(func() {
		for collections < 4 {
			select {
			case <-done:
				return
			default:
			}
			switch _, err := other.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); {
			case err == nil:
				collections++
			case !errors.Is(err, store.ErrBusy):
				t.Errorf("collect: %v", err)
				return
			}
		}
	})
	var ids []string
	d := NewDisk(1<<20, 24)
	for i := range 4 {
		Noise(d.Data[i*block:(i+1)*block], uint64(25+i))
		ids = append(ids, x.id())
		parent := ""
		if i > 0 {
			parent = ids[i-1]
		}
		write(t, x.s, ids[i], parent, d, nil)
		if i > 1 {
			if err := x.s.Forget(t.Context(), ids[i-2]); err != nil {
				t.Error(err)
			}
		}
	}
	close(done)
	wg.Wait()
	if _, err := other.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); err != nil {
		t.Fatal(err)
	}
	same(t, x.s, ids[3], d.Data)
	intact(t, x.s, ids[3])
	intact(t, x.s, ids[2])
	t.Logf("%d collections ran in between", collections)
}

func (x *suite) full(t *testing.T) {
	d := NewDisk(2<<20, 30)
	before := x.id()
	write(t, x.s, before, "", d, nil)
	x.drv.Full(true)
	Noise(d.Data, 31)
	id := x.id()
	_, err := tryWrite(t.Context(), x.s, id, "", d, nil)
	x.drv.Full(false)
	want(t, err, store.ErrNoSpace)
	_, err = x.s.Snapshot(t.Context(), id)
	want(t, err, store.ErrNotFound)
	intact(t, x.s, before)
	write(t, x.s, id, "", d, nil) // there is room again
	same(t, x.s, id, d.Data)
}

func (x *suite) lies(t *testing.T) {
	d := NewDisk(1<<20, 32)
	Noise(d.Data, 320)
	x.drv.Lie(true)
	id := x.id()
	_, err := tryWrite(t.Context(), x.s, id, "", d, nil)
	x.drv.Lie(false)
	want(t, err, store.ErrDamaged)
	_, err = x.s.Snapshot(t.Context(), id)
	want(t, err, store.ErrNotFound)
}

func (x *suite) flipped(t *testing.T) {
	ctx := t.Context()
	p, err := x.drv.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close(ctx) //nolint:errcheck // only for the test
	known := map[string]bool{}
	packs, err := Packs(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range packs {
		known[string(m.BlobID)] = true
	}
	d := NewDisk(2<<20+9, 33)
	Noise(d.Data, 330)
	id := x.id()
	write(t, x.s, id, "", d, nil)
	if packs, err = Packs(ctx, p); err != nil {
		t.Fatal(err)
	}
	for _, m := range packs {
		if known[string(m.BlobID)] {
			continue
		}
		if err := FlipByte(ctx, p, m.BlobID, m.Length/2); err != nil {
			t.Fatal(err)
		}
	}
	s := x.s
	r, err := s.Verify(ctx, id, nil)
	want(t, err, store.ErrDamaged)
	if r.Damaged != 1 || len(r.Damages) != 1 || r.Damages[0].Disk != 0 || r.Damages[0].Name != "sda" || r.Damages[0].Length != block {
		t.Fatalf("the report says %+v", r)
	}
	at := r.Damages[0].Offset
	m, err := s.Image(ctx, id, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close() //nolint:errcheck // only read
	buf := make([]byte, d.Size())
	n, err := m.ReadAt(buf, 0)
	want(t, err, store.ErrDamaged)
	for _, word := range []string{id, "disk 0", fmt.Sprint(at)} {
		if !bytes.Contains([]byte(err.Error()), []byte(word)) {
			t.Errorf("the error %q does not name %s", err, word)
		}
	}
	if int64(n) != at || !bytes.Equal(buf[:n], d.Data[:n]) {
		t.Errorf("%d bytes were read before the damage at %d", n, at)
	}
	if _, err := m.ReadAt(buf[:at], 0); err != nil {
		t.Errorf("before the damage: %v", err)
	}
	if n, err := m.ReadAt(buf[at+block:], at+block); err != nil || !bytes.Equal(buf[at+block:], d.Data[at+block:]) {
		t.Errorf("after the damage: %d, %v", n, err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := x.s.Forget(ctx, id); err != nil {
		t.Fatal(err)
	}
}

func (x *suite) nothing(t *testing.T) {
	_, err := x.s.Verify(t.Context(), "snap-none", nil)
	want(t, err, store.ErrNotFound)
}

// gone takes the place away for good: everything fails soon, and says why.
func (x *suite) gone(t *testing.T) {
	s, err := store.Open(t.Context(), x.drv, password)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close(context.Background()) //nolint:errcheck // its place is gone
	x.drv.CutAt(1, func() {})
	defer x.drv.CutAt(0, nil)
	if err := s.PutRecord(t.Context(), "server", "srv-1", 1); !errors.Is(err, ErrPower) {
		t.Errorf("put a record: %v", err)
	}
	if err := s.Refresh(t.Context()); !errors.Is(err, ErrPower) {
		t.Errorf("refresh: %v", err)
	}
}

// powerCuts writes a snapshot again and again, each time in a process of its own, and cuts the power one change later
// each time until it goes through.
func (x *suite) powerCuts(t *testing.T) {
	f := x.drv
	first := NewDisk(1<<20+1, 40)
	before, id := x.id(), x.id()
	write(t, x.s, before, "", first, nil)
	second := &Disk{Data: bytes.Clone(first.Data)}
	step := 1
	if raceEnabled {
		step = 5 // opening a store takes seconds then
	}
	for n := 1; n < 100; n += step {
		s, err := store.Open(t.Context(), f, password)
		if err != nil {
			t.Fatalf("open after a cut before change %d: %v", n-step, err)
		}
		intact(t, s, before)
		if _, err := s.Snapshot(t.Context(), id); err == nil {
			t.Logf("published before change %d", n-step)
			x.finish(t, s, before, id, second.Data)
			return
		} else if !errors.Is(err, store.ErrNotFound) {
			t.Fatalf("after a cut before change %d: %v", n-step, err)
		}
		Noise(second.Data[3*block:9*block], uint64(1000+n)) // anew each time: what a cut left behind must not help
		ctx, cancel := context.WithCancel(t.Context())
		f.CutAt(n, cancel)
		_, err = tryWrite(ctx, s, id, before, second, nil)
		f.CutAt(0, nil)
		if err == nil {
			t.Logf("a snapshot takes up to %d changes", n)
			x.finish(t, s, before, id, second.Data)
			return
		}
		_ = s.Close(context.WithoutCancel(ctx)) // a process that lost its store
	}
	t.Fatal("it never goes through")
}

// finish checks what is left after the power cuts, with what they left behind and without.
func (x *suite) finish(t *testing.T, s *store.Store, before, id string, data []byte) {
	t.Helper()
	defer s.Close(context.Background()) //nolint:errcheck // only read
	same(t, s, id, data)
	if err := x.s.Refresh(t.Context()); err != nil { // one that was open all the time
		t.Fatal(err)
	}
	same(t, x.s, id, data)
	if _, err := s.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); err != nil {
		t.Fatal(err)
	}
	intact(t, s, before)
	intact(t, s, id)
}
