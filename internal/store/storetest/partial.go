package storetest

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
)

// part is the attachment in which these tests keep what a partial must hold.
const part = "part"

// attempt is a full snapshot of one disk that may go on with an earlier attempt.
type attempt struct {
	w       *store.Writer
	d       *store.DiskWriter
	had     []byte // what the earlier attempt said that it had written
	resumed bool
}

// attempt begins a snapshot of a server with a disk of that size.
func (x *suite) attempt(ctx context.Context, s *store.Store, id, server string, size int64) (a attempt, err error) {
	if a.w, err = s.Begin(ctx, id, ""); err != nil {
		return a, err
	}
	a.resumed, err = a.w.GoOn(ctx, server, func(p *store.Partial) error {
		if p.Disks()[0].Size != size {
			return errors.New("the disk has another size")
		}
		var err error
		a.had, err = p.Attachment(ctx, part)
		return err
	})
	if err == nil {
		blockSize := block
		if a.resumed {
			blockSize = 0
		}
		a.d, err = a.w.Disk(ctx, "sda", size, blockSize)
	}
	if err != nil {
		_ = a.w.Abort(ctx)
	}
	return a, err
}

// write writes some extents, and keeps a partial.
func (a attempt) write(ctx context.Context, server string, d *Disk, extents ...image.Extent) error {
	if err := a.d.Ingest(ctx, d, extents, nil); err != nil {
		return err
	}
	return a.w.KeepPartial(ctx, server, "shop", map[string][]byte{part: d.Data})
}

func (x *suite) must(t *testing.T, s *store.Store, id, server string, size int64) attempt {
	t.Helper()
	a, err := x.attempt(t.Context(), s, id, server, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.w.Abort(context.Background()) })
	return a
}

// goesOn cuts a full snapshot off twice, with collections in between.
func (x *suite) goesOn(t *testing.T) {
	ctx, id, server := t.Context(), x.id(), "srv-resumed"
	whole := NewDisk(3<<20+100, 50)
	Noise(whole.Data, 51)
	size := whole.Size()
	part := &Disk{Data: make([]byte, size)}
	before, err := x.s.Snapshots(ctx)
	if err != nil {
		t.Fatal(err)
	}

	a := x.must(t, x.s, id, server, size)
	copy(part.Data, whole.Data[:1<<20])
	if err := a.write(ctx, server, part, image.Extent{Length: 1 << 20}); err != nil || a.resumed {
		t.Fatalf("resumed %v, %v", a.resumed, err)
	}
	if err := a.d.Ingest(ctx, whole, []image.Extent{{Offset: 2 << 20, Length: block}}, nil); err != nil { // after the partial: lost
		t.Fatal(err)
	}
	_ = a.w.Abort(ctx)

	x.hidden(t, id, len(before))
	a = x.must(t, x.s, id, server, size)
	if !a.resumed || !bytes.Equal(a.had, part.Data) {
		t.Fatal("the next attempt does not know of the first")
	}
	copy(part.Data[1<<20:], whole.Data[1<<20:2<<20])
	Noise(part.Data[:block], 52) // the server goes on
	if err := a.write(ctx, server, part, image.Extent{Length: block}, image.Extent{Offset: 1 << 20, Length: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	_ = a.w.Abort(ctx)
	x.hidden(t, id, len(before))

	if err := x.other.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	a = x.must(t, x.other, id, server, size)
	copy(whole.Data[:block], part.Data)
	if err := a.d.Ingest(ctx, whole, []image.Extent{{Offset: 2 << 20, Length: 1<<20 + 100}}, nil); err != nil {
		t.Fatal(err)
	}
	meta := snapshotOf()
	meta.ServerID = server
	snap, err := a.w.Commit(ctx, meta)
	if err != nil {
		t.Fatal(err)
	}
	if st := snap.Stats; st.Resumed != 2<<20 || st.Changed != size || snap.Disks[0].Data != size || st.New > 1<<20+100 || snap.Parent != "" {
		t.Errorf("the record says %+v, %+v, parent %q", st, snap.Disks, snap.Parent)
	}
	if err := x.s.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*store.Store{x.s, x.other} {
		same(t, s, id, whole.Data)
		intact(t, s, id)
	}
	if a := x.must(t, x.s, x.id(), server, size); a.resumed {
		t.Error("a partial outlived the snapshot")
	}
}

// hidden requires that nobody sees a partial, and that collections leave it alone.
func (x *suite) hidden(t *testing.T, id string, snapshots int) {
	t.Helper()
	ctx := t.Context()
	for _, immediate := range []bool{false, true} {
		if _, err := x.s.Collect(ctx, store.CollectOptions{Immediate: immediate}, nil); err != nil {
			t.Fatal(err)
		}
	}
	all, err := x.s.Snapshots(ctx)
	if err != nil || len(all) != snapshots {
		t.Errorf("%d snapshots are listed, %d were: %v", len(all), snapshots, err)
	}
	_, err = x.s.Snapshot(ctx, id)
	want(t, err, store.ErrNotFound)
	_, err = x.s.Image(ctx, id, 0)
	want(t, err, store.ErrNotFound)
	_, err = x.s.Verify(ctx, id, nil)
	want(t, err, store.ErrNotFound)
	_, err = x.s.Attachment(ctx, id, part)
	want(t, err, store.ErrNotFound)
	want(t, x.s.SetLKG(ctx, "srv-resumed", id), store.ErrNotFound)
	_, err = x.s.Begin(ctx, x.id(), id)
	want(t, err, store.ErrNotFound)
}

// useless has a partial that does not fit any more: it goes, and with it its blocks.
func (x *suite) useless(t *testing.T) {
	ctx, server := t.Context(), "srv-useless"
	d := NewDisk(4<<20, 53)
	Noise(d.Data, 54)
	a := x.must(t, x.s, x.id(), server, d.Size())
	if err := a.write(ctx, server, d, image.Extent{Length: d.Size()}); err != nil {
		t.Fatal(err)
	}
	_ = a.w.Abort(ctx)
	a = x.must(t, x.s, x.id(), server, d.Size()+1)
	if a.resumed {
		t.Error("a disk of another size was gone on with")
	}
	_ = a.w.Abort(ctx)
	if r, err := x.s.Collect(ctx, store.CollectOptions{Immediate: true}, nil); err != nil || r.Freed() < 3<<20 {
		t.Errorf("collected %+v, %v", r, err)
	}
	if a := x.must(t, x.s, x.id(), server, d.Size()); a.resumed {
		t.Error("a partial that is of no use is still there")
	}
}

// partialPowerCuts cuts the power at every change of an attempt with partials: what was said to be kept is
// there, and what is there is what that partial or a later one held, to the byte.
func (x *suite) partialPowerCuts(t *testing.T) {
	const server, size = "srv-cut", 1<<20 + 1
	step := 2
	if raceEnabled {
		step = 7
	}
	d := &Disk{Data: make([]byte, size)}
	var kept []byte // by the last partial that was said to be
	for n := 1; n < 100; n += step {
		s, err := store.Open(t.Context(), x.drv, password)
		if err != nil {
			t.Fatalf("open after a cut before change %d: %v", n-step, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		a, err := x.attempt(ctx, s, x.id(), server, size)
		if err != nil {
			t.Fatal(err)
		}
		if kept != nil && !a.resumed {
			t.Fatalf("after a cut before change %d: what was kept is gone", n-step)
		}
		if a.resumed {
			x.asKept(t, s, server, a)
			copy(d.Data, a.had)
		}
		x.drv.CutAt(n, cancel)
		for i := range int64(2) {
			at := i * 13 * block
			Noise(d.Data[at:at+5*block], uint64(2000+2*n)+uint64(i))
			if err = a.write(ctx, server, d, image.Extent{Offset: at, Length: 5 * block}); err != nil {
				break
			}
			kept = bytes.Clone(d.Data)
		}
		x.drv.CutAt(0, nil)
		_ = a.w.Abort(context.WithoutCancel(ctx))
		if err == nil {
			t.Logf("two partials take up to %d changes", n)
			a = x.must(t, s, x.id(), server, size)
			x.asKept(t, s, server, a)
			if !bytes.Equal(a.had, kept) {
				t.Error("the last partial is not the one that is there")
			}
		}
		_ = s.Close(context.WithoutCancel(ctx))
		cancel()
		if err == nil {
			return
		}
	}
	t.Fatal("it never goes through")
}

// asKept requires that a snapshot to which nothing is added is what the partial says it has. That snapshot is of another
// server, so that the partial stays.
func (x *suite) asKept(t *testing.T, s *store.Store, server string, a attempt) {
	t.Helper()
	id := x.id()
	again := x.must(t, s, id, server, int64(len(a.had)))
	if _, err := again.w.Commit(t.Context(), snapshotOf()); err != nil {
		t.Fatal(err)
	}
	same(t, s, id, a.had)
	intact(t, s, id)
}
