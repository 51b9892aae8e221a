package lab

import (
	"os"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// standsIn makes the appliance of one office, which sends to the master of the other one, and has that protect the office's server.
func (l *Lab) standsIn(t *testing.T, office, server string, at *Lab) *Site {
	t.Helper()
	l.AddCustomer(office)
	box := l.NewSiteOf(office, office)
	_, err := l.AddServer(ctx, dr.Server{Name: server, Appliance: office, Source: dr.Source{Disks: []string{at.path("shop.raw")}},
		Schedule: dr.Schedule{Every: 24 * time.Hour}, Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}})
	if err != nil {
		t.Fatal(err)
	}
	return box
}

// Two offices each have the other's snapshots, tested; when one is gone its servers run in the other, which goes on with its own days.
func TestTwoOfficesProtectEachOther(t *testing.T) {
	t.Parallel()
	hamburg, bremen := New(t, Healthy), New(t, Healthy)
	writeDisk(t, hamburg, 1)
	writeDisk(t, bremen, 2)
	ofHamburg := bremen.standsIn(t, "hamburg", "till", hamburg)
	ofBremen := hamburg.standsIn(t, "bremen", "mill", bremen)
	ofHamburg.Night()
	ofBremen.Night()
	hamburg.settled(t)
	bremen.settled(t)
	till := bremen.good(t, "till")
	hamburg.good(t, "mill")

	// Hamburg burns down, with its master and its appliance.
	ofHamburg.Crash()
	hamburg.Crash()
	for _, lost := range []string{hamburg.StoreFolder(), hamburg.path("store.customers"), hamburg.path("shop.raw"), ofHamburg.Dir} {
		if err := os.RemoveAll(lost); err != nil {
			t.Fatal(err)
		}
	}
	if op := bremen.Finish(bremen.Invoke(ctx, api.InvokeRequest{Server: "till", By: "ann", Reason: "fire in Hamburg"})); op.State != api.OperationSucceeded {
		t.Fatalf("invoke: %s", op.Error)
	}
	inv, err := bremen.Invocation(ctx, "till")
	if err != nil || inv.State != dr.Running || inv.SnapshotID != till.Snapshot.ID {
		t.Errorf("%+v, %v", inv, err)
	}
	// Bremen's own server is captured all the same, and what is owed is kept.
	before, err := ofBremen.Near.Snapshots(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ofBremen.Cut(true)
	writeDisk(t, bremen, 3)
	ofBremen.Clock.Turn(25 * time.Hour)
	ofBremen.Wake(ctx)
	until(t, "it is captured", func() bool {
		after, err := ofBremen.Near.Snapshots(ctx)
		return err == nil && len(after) == len(before)+1
	})
}
