package lab

import (
	"sync"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/database/pgserver"
	"github.com/musterdr/muster/internal/dr"
)

func TestTwoMastersDoOnceWhatIsDueAndOneGoesOnWithoutTheOther(t *testing.T) {
	t.Parallel()
	a := New(t, Healthy)
	a.Use(pgserver.ForTest(t).Database(t))
	writeDisk(t, a, 1)
	_, err := a.AddServer(ctx, dr.Server{Name: "shop", Source: dr.Source{Disks: []string{a.path("shop.raw")}}, Schedule: dr.Schedule{Every: 24 * time.Hour}})
	if err != nil {
		t.Fatal(err)
	}
	b := a.Beside(t, Healthy)
	b.Clock.Turn(time.Hour) // it is wrong
	protects := func(l *Lab) (all []api.Operation) {
		ops, err := l.Operations(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, op := range ops {
			if op.Kind == "protect" {
				all = append(all, op)
			}
		}
		return all
	}
	wake := func(labs ...*Lab) {
		var waking sync.WaitGroup
		for _, l := range labs {
			for range 4 {
				waking.Go(func() { l.Master.Wake(ctx) })
			}
		}
		waking.Wait()
	}
	wake(a, b)
	begun := protects(b)
	if len(begun) != 1 {
		t.Fatalf("begun by two masters: %+v", begun)
	}
	if op := b.Finish(begun[0], nil); op.State != api.OperationSucceeded {
		t.Fatalf("%s: %s", op.State, op.Error)
	}
	first := a.lkg(t)
	if first == "" || b.lkg(t) != first {
		t.Errorf("last-known-good is %q to one and %q to the other", first, b.lkg(t))
	}
	wake(a, b)
	if again := protects(a); len(again) != 1 {
		t.Errorf("done again: %+v", again)
	}

	a.Crash()
	writeDisk(t, a, 2)
	b.Clock.Turn(25 * time.Hour)
	wake(b)
	all := protects(b)
	if len(all) != 2 {
		t.Fatalf("begun by the one that is left: %+v", all)
	}
	if op := b.Finish(all[0], nil); op.State != api.OperationSucceeded {
		t.Fatalf("%s: %s", op.State, op.Error)
	}
	if lkg := b.lkg(t); lkg == first {
		t.Error("last-known-good has not moved")
	}
}
