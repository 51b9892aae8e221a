package storetest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"

	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
)

// pair is a near store and a far one that is like it.
type pair struct {
	nearDrv, farDrv *Faulty
	near, far       *store.Store
}

// RunReplication proves that snapshots get from a store of one driver to one of another. open functions give a driver for
// a new, empty place each time.
func RunReplication(t *testing.T, openNear, openFar func(t *testing.T) store.Driver) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, pair)
	}{
		{"a snapshot arrives as it is, once", arrives},
		{"only what is missing travels", onlyMissing},
		{"nothing else of the near store comes along", nothingElse},
		{"a pack of which much is there is not sent again", partly},
		{"files arrive with the image they go onto", filesArrive},
		{"what was forgotten over there can come again", again},
		{"rot does not spread", rot},
		{"a replication that is cut off goes on", cutOff},
		{"a rate is asked, and kept", rates},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := pair{nearDrv: &Faulty{Driver: openNear(t)}, farDrv: &Faulty{Driver: openFar(t), Attests: true}}
			if err := store.Create(t.Context(), p.nearDrv, password); err != nil {
				t.Fatal(err)
			}
			p.near = reopen(t, p.nearDrv)
			if err := store.CreateLike(t.Context(), p.farDrv, "another horse", p.near); err != nil {
				t.Fatal(err)
			}
			p.far = p.openFar(t)
			test.run(t, p)
		})
	}
	t.Run("stores with other secrets are refused", func(t *testing.T) {
		a, b := openNear(t), openFar(t)
		for _, drv := range []store.Driver{a, b} {
			if err := store.Create(t.Context(), drv, password); err != nil {
				t.Fatal(err)
			}
		}
		near, far := reopen(t, a), reopen(t, b)
		write(t, near, "snap-1", "", NewDisk(1<<20, 1), nil)
		_, err := store.Replicate(t.Context(), near, far, "snap-1", store.ReplicateOptions{}, nil)
		want(t, err, store.ErrOtherSecrets)
	})
}

func (p pair) openFar(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), p.farDrv, "another horse")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	return s
}

func (p pair) replicate(t *testing.T, id string) store.Replicated {
	t.Helper()
	r, err := store.Replicate(t.Context(), p.near, p.far, id, store.ReplicateOptions{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func arrives(t *testing.T, p pair) {
	d := NewDisk(6<<20+777, 1)
	kept := write(t, p.near, "snap-1", "", d, nil)
	r := p.replicate(t, "snap-1")
	if r.There || r.Packs == 0 || r.Sent < kept.Stats.Stored/2 {
		t.Errorf("replicated: %+v, of %d bytes stored", r, kept.Stats.Stored)
	}
	same(t, p.far, "snap-1", d.Data)
	intact(t, p.far, "snap-1")
	got, err := p.far.Snapshot(t.Context(), "snap-1")
	if err != nil || !bytes.Equal(mustJSON(t, got), mustJSON(t, kept)) {
		t.Errorf("the far store has %+v, %v; the near one %+v", got, err, kept)
	}
	if r := p.replicate(t, "snap-1"); !r.There || r.Sent != 0 {
		t.Errorf("again: %+v", r)
	}
	// It can be read without the near store, also after both were tidied up.
	if _, err := p.far.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); err != nil {
		t.Fatal(err)
	}
	same(t, p.openFar(t), "snap-1", d.Data)
}

func onlyMissing(t *testing.T, p pair) {
	d := NewDisk(8<<20, 2)
	write(t, p.near, "snap-1", "", d, nil)
	full := p.replicate(t, "snap-1")
	next := &Disk{Data: bytes.Clone(d.Data)}
	Noise(next.Data[3*block:9*block], 7)
	write(t, p.near, "snap-2", "snap-1", next, []image.Extent{{Offset: 3 * block, Length: 6 * block}})
	inc := p.replicate(t, "snap-2")
	if limit := int64(6*block) + full.Sent/50; inc.Sent > limit {
		t.Errorf("an increment of %d bytes sent %d; want at most %d", 6*block, inc.Sent, limit)
	}
	same(t, p.far, "snap-1", d.Data)
	same(t, p.far, "snap-2", next.Data)
	// Another server with the same content.
	write(t, p.near, "snap-3", "", next, nil)
	if twin := p.replicate(t, "snap-3"); twin.Sent > full.Sent/50 {
		t.Errorf("the same again of another server: %+v, after %+v", twin, full)
	}
	same(t, p.far, "snap-3", next.Data)
}

func nothingElse(t *testing.T, p pair) {
	if err := p.near.PutRecord(t.Context(), "server", "srv-1", map[string]string{"name": "shop"}); err != nil {
		t.Fatal(err)
	}
	write(t, p.near, "snap-1", "", NewDisk(1<<20, 3), nil)
	write(t, p.near, "snap-2", "", NewDisk(1<<20, 4), nil)
	p.replicate(t, "snap-2")
	list, err := p.far.Snapshots(t.Context())
	if err != nil || len(list) != 1 || list[0].ID != "snap-2" {
		t.Errorf("snapshots in the far store: %v, %v", list, err)
	}
	err = p.far.Records(t.Context(), "server", func(id string, _ json.RawMessage) error {
		t.Errorf("the record of %s came along", id)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// partly has half of what is in a pack in the far store already, from a store of another appliance.
func partly(t *testing.T, p pair) {
	d := NewDisk(8<<20, 5)
	half := &Disk{Data: d.Data[:4<<20]}
	write(t, p.far, "snap-9", "", half, nil)
	write(t, p.near, "snap-1", "", d, nil)
	r := p.replicate(t, "snap-1")
	if r.Packs > 1 || r.Repacked < 100 { // that of the manifest is sent
		t.Errorf("replicated: %+v; want blocks packed anew", r)
	}
	if limit := int64(float64(4<<20) * 0.75); r.Sent > limit {
		t.Errorf("sent %d bytes, want at most %d", r.Sent, limit)
	}
	same(t, p.far, "snap-1", d.Data)
	same(t, p.far, "snap-9", half.Data)
}

func filesArrive(t *testing.T, p pair) {
	set := papers(40)
	write(t, p.near, "snap-1", "", NewDisk(1<<20, 6), nil)
	if _, err := writeFiles(t.Context(), p.near, "data-1", "", "snap-1", set); err != nil {
		t.Fatal(err)
	}
	_, err := store.Replicate(t.Context(), p.near, p.far, "data-1", store.ReplicateOptions{}, nil)
	want(t, err, store.ErrNotFound)
	p.replicate(t, "snap-1")
	p.replicate(t, "data-1")
	sameFiles(t, p.far, "data-1", set)
	intact(t, p.far, "data-1")
}

func again(t *testing.T, p pair) {
	d := NewDisk(3<<20, 8)
	write(t, p.near, "snap-1", "", d, nil)
	p.replicate(t, "snap-1")
	if err := p.far.Forget(t.Context(), "snap-1"); err != nil {
		t.Fatal(err)
	}
	if _, err := p.far.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); err != nil {
		t.Fatal(err)
	}
	if r := p.replicate(t, "snap-1"); r.There {
		t.Error("it is said to be there")
	}
	same(t, p.far, "snap-1", d.Data)
	intact(t, p.far, "snap-1")
}

func rot(t *testing.T, p pair) {
	write(t, p.near, "snap-1", "", NewDisk(3<<20, 9), nil)
	place, err := p.nearDrv.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer place.Close(t.Context()) //nolint:errcheck // a folder
	packs, err := Packs(t.Context(), place)
	if err != nil || len(packs) == 0 {
		t.Fatal(packs, err)
	}
	largest := slices.MaxFunc(packs, func(a, b blob.Metadata) int { return cmp.Compare(a.Length, b.Length) })
	if err := FlipByte(t.Context(), place, largest.BlobID, largest.Length/2); err != nil {
		t.Fatal(err)
	}
	_, err = store.Replicate(t.Context(), p.near, p.far, "snap-1", store.ReplicateOptions{}, nil)
	want(t, err, store.ErrDamaged)
	if _, err := p.far.Snapshot(t.Context(), "snap-1"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("the far store has it all the same: %v", err)
	}
}

// cutOff cuts the far store off before every change in turn, each time in a process of its own.
func cutOff(t *testing.T, p pair) {
	d := NewDisk(5<<20, 10)
	write(t, p.near, "snap-1", "", d, nil)
	step := 1
	if raceEnabled {
		step = 5
	}
	packs := int64(0)
	for n := 1; n < 100; n += step {
		far, err := store.Open(t.Context(), p.farDrv, "another horse")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		p.farDrv.CutAt(n, cancel)
		r, err := store.Replicate(ctx, p.near, far, "snap-1", store.ReplicateOptions{}, nil)
		p.farDrv.CutAt(0, nil)
		cancel()
		packs += r.Packs
		_ = far.Close(context.Background())
		if err == nil {
			t.Logf("it goes through before change %d; %d packs were sent in all", n, packs)
			break
		}
		if got := p.openFar(t); n%5 == 1 {
			if _, err := got.Snapshot(t.Context(), "snap-1"); err != nil && !errors.Is(err, store.ErrNotFound) {
				t.Fatalf("after a cut before change %d: %v", n, err)
			}
		}
	}
	place, err := p.nearDrv.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer place.Close(t.Context()) //nolint:errcheck // a folder
	if list, err := Packs(t.Context(), place); err != nil || packs > int64(len(list)) {
		t.Errorf("%d packs were sent; there are %d, and each is to be sent once at most (%v)", packs, len(list), err)
	}
	far := p.openFar(t)
	same(t, far, "snap-1", d.Data)
	intact(t, far, "snap-1")
}

func rates(t *testing.T, p pair) {
	write(t, p.near, "snap-1", "", NewDisk(1<<20, 11), nil)
	var asked atomic.Int64
	began := time.Now()
	rate := func() int64 {
		if asked.Add(1) == 1 {
			return -1 // not now
		}
		return 2 << 20
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := store.Replicate(ctx, p.near, p.far, "snap-1", store.ReplicateOptions{Rate: rate}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if least := time.Duration(float64(r.Sent) / (2 << 20) * 0.7 * float64(time.Second)); time.Since(began) < least {
		t.Errorf("%d bytes took %s; at 2 MiB a second it is at least %s", r.Sent, time.Since(began), least)
	}
	ctx, cancel = context.WithCancel(t.Context())
	write(t, p.near, "snap-2", "", NewDisk(1<<20, 12), nil)
	_, err = store.Replicate(ctx, p.near, p.far, "snap-2", store.ReplicateOptions{Rate: func() int64 { cancel(); return -1 }}, nil)
	want(t, err, context.Canceled)
}
