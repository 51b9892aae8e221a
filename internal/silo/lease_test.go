package silo

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// turned is a clock that a test turns.
type turned struct{ atomic.Int64 }

func (c *turned) now() time.Duration { return time.Duration(c.Load()) }

func (c *turned) turn(d time.Duration) { c.Add(int64(d)) }

func begin(t *testing.T, d *duties, id string, g api.Grant) (context.Context, func()) {
	t.Helper()
	ctx, end, err := d.begin(t.Context(), id, g)
	if err != nil {
		t.Fatal(err)
	}
	return ctx, sync.OnceFunc(end)
}

func ends(t *testing.T, ctx context.Context, why error) {
	t.Helper()
	select {
	case <-ctx.Done():
		if !errors.Is(context.Cause(ctx), why) {
			t.Errorf("ended because %v, want %v", context.Cause(ctx), why)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on")
	}
}

func TestWorkEndsWithItsLease(t *testing.T) {
	clock := &turned{}
	clock.turn(time.Hour)
	d := newDuties(clock.now)
	g := api.Grant{Term: 7, Stamp: d.stamp(), For: time.Minute}
	short, end := begin(t, d, "verdict-1", g)
	defer end()
	long, endLong := begin(t, d, "verdict-2", api.Grant{Term: 8, Stamp: d.stamp(), For: time.Minute})
	defer endLong()
	ever, endEver := begin(t, d, "inv-1", api.Grant{Term: 9})
	defer endEver()
	clock.turn(40 * time.Second)
	d.renew(api.Beat{Stamp: d.stamp(), For: time.Minute, Leases: []int64{8, 9}})
	clock.turn(40 * time.Second)
	ends(t, short, errExpired)
	if long.Err() != nil || ever.Err() != nil {
		t.Errorf("a lease that was renewed: %v; an invocation: %v", long.Err(), ever.Err())
	}
	clock.turn(time.Hour)
	ends(t, long, errExpired)
	if ever.Err() != nil {
		t.Error("an invocation ended because the master was away")
	}
	if got := d.doing(); !slices.Equal(got, []string{"inv-1", "verdict-1", "verdict-2"}) {
		t.Errorf("under way %v: what has not come to its end yet counts", got)
	}
}

// A message that lay about while the silo was stopped must not make a lease last longer than the master thinks.
func TestALeaseCountsFromBeforeItWasGranted(t *testing.T) {
	clock := &turned{}
	clock.turn(time.Hour)
	d := newDuties(clock.now)
	old := d.stamp()
	ctx, end := begin(t, d, "verdict-1", api.Grant{Term: 7, Stamp: old, For: time.Minute})
	defer end()
	clock.turn(2 * time.Minute)
	d.renew(api.Beat{Stamp: old, For: time.Minute, Leases: []int64{7}})
	ends(t, ctx, errExpired)
	for name, g := range map[string]api.Grant{
		"granted long ago":            {Term: 9, Stamp: old, For: time.Minute},
		"granted to a former process": {Term: 9, Stamp: api.Stamp{Boot: "boot-x", At: d.clock()}, For: time.Minute},
		"granted to nobody yet":       {Term: 9, For: time.Minute},
	} {
		if _, _, err := d.begin(t.Context(), "verdict-2", g); api.KindOf(err) != api.Conflict || !errors.Is(err, errExpired) {
			t.Errorf("work %s: %v", name, err)
		}
	}
}

func TestOfTwoOrdersTheLaterCounts(t *testing.T) {
	d := newDuties((&turned{}).now)
	first, end := begin(t, d, "inv-1", api.Grant{Term: 7})
	go func() { <-first.Done(); end() }()
	second, endSecond := begin(t, d, "inv-1", api.Grant{Term: 8}) // waits until nothing is left of the first
	ends(t, first, ErrStale)
	if second.Err() != nil {
		t.Error("the later order was ended")
	}
	endSecond()
	if _, _, err := d.begin(t.Context(), "inv-1", api.Grant{Term: 7}); !errors.Is(err, ErrStale) {
		t.Errorf("an earlier order after the end: %v", err)
	}
	if len(d.doing()) != 0 {
		t.Errorf("under way %v", d.doing())
	}
}

func TestAStoreIsOpenAsLongAsItsCustomersWork(t *testing.T) {
	ctx := t.Context()
	dirs := map[string]string{"bank": t.TempDir(), "mill": t.TempDir()}
	if err := errors.Join(store.Create(ctx, folder.Driver{Path: dirs["bank"]}, "secret"), os.CopyFS(dirs["mill"], os.DirFS(dirs["bank"]))); err != nil {
		t.Fatal(err)
	}
	l := &Leased{Driver: func(place string) (store.Driver, error) { return folder.Driver{Path: dirs[place]}, nil }}
	bank := &api.Access{Customer: "bank", Place: "bank", Password: "secret"}
	one, release, err := l.Open(ctx, bank)
	if err != nil {
		t.Fatal(err)
	}
	two, releaseToo, err := l.Open(ctx, bank)
	if err != nil || one != two {
		t.Errorf("two pieces of work of one customer have two stores: %v", err)
	}
	if _, _, err := l.Open(ctx, &api.Access{Customer: "bank", Place: "bank", Password: "guess"}); api.KindOf(err) != api.Refused {
		t.Errorf("another key got into an open store: %v", err)
	}
	mill, releaseMill, err := l.Open(ctx, &api.Access{Customer: "mill", Place: "mill", Password: "secret"})
	if err != nil || mill == one {
		t.Errorf("another customer: %v", err)
	}
	release()
	release()
	if _, err := one.Snapshots(ctx); err != nil {
		t.Errorf("closed while it is in use: %v", err)
	}
	releaseToo()
	releaseMill()
	if len(l.open) != 0 {
		t.Errorf("%d stores are open when nobody works", len(l.open))
	}
	if _, _, err := l.Open(ctx, &api.Access{Customer: "bank", Place: "bank", Password: "guess"}); err == nil {
		t.Error("a wrong key opened a store")
	}
	if len(l.open) != 0 {
		t.Error("a store that could not be opened is remembered")
	}
	if _, _, err := l.Open(ctx, nil); err == nil {
		t.Error("no key opened a store")
	}
}
