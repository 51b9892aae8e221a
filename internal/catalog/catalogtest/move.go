package catalogtest

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/database"
)

// Copies checks that a catalog goes from one database to another in full or not at all. Both are empty.
func Copies(t *testing.T, from, to string) {
	ctx := context.Background()
	w, target := newWorld(t, from), newWorld(t, to)
	for n := range 2 {
		s := server(n)
		w.must(w.AddServer(ctx, s))
		for night := 1; night <= 5; night++ {
			w.must(recordNight(ctx, w.Catalog, s.ID, fmt.Sprint(n), night))
		}
	}
	cut, cancel := context.WithCancel(ctx)
	_, err := catalog.Copy(cut, w.Catalog, target.Catalog, func(database.Table) { cancel() }) // after the first table
	w.refused("a copy that was cut off", err)
	if empty, err := target.Empty(ctx); err != nil || !empty {
		t.Errorf("after a copy that was cut off the target is empty: %v, %v", empty, err)
	}
	seen := 0
	tables, err := catalog.Copy(ctx, w.Catalog, target.Catalog, func(database.Table) { seen++ })
	w.must(err)
	rows := map[string]int64{}
	for _, table := range tables {
		rows[table.Name] = table.Rows
	}
	if rows["servers"] != 2 || rows["snapshots"] != 10 || rows["verdicts"] != 10 || rows["events"] == 0 || seen != len(tables) {
		t.Errorf("copied %v, told of %d tables", rows, seen)
	}
	checkInvariants(t, target.Catalog)
	again, err := catalog.Copy(ctx, w.Catalog, target.Catalog, func(database.Table) { t.Error("copied again") })
	if err != nil || len(again) != len(tables) {
		t.Errorf("the same again: %v, %v", again, err)
	}
	// It can be written to as before: numbers go on.
	w.must(recordNight(ctx, target.Catalog, "srv-0", "later", 9))
	checkInvariants(t, target.Catalog)
	_, err = catalog.Copy(ctx, w.Catalog, target.Catalog, nil)
	w.is(err, catalog.ErrNotEmpty)

	w.must(w.Leave(ctx, "elsewhere"))
	var moved *catalog.MovedError
	if _, err := catalog.Open(ctx, from); !errors.As(err, &moved) || moved.Place != "elsewhere" {
		t.Errorf("a catalog that has moved: %v", err)
	}
}
