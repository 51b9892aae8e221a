package store_test

import (
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

func keyOf(customer string) (string, error) { return "the key of " + customer, nil }

func farOf(c store.Customer) (store.Driver, error) { return folder.Driver{Path: c.Place}, nil }

// book opens the customers of an installation in a folder, as another process would.
func customersIn(t *testing.T, dir string) *store.Customers {
	t.Helper()
	drv := folder.Driver{Path: filepath.Join(dir, "own")}
	if err := store.Create(t.Context(), drv, "own"); err != nil && !errors.Is(err, store.ErrNotEmpty) {
		t.Fatal(err)
	}
	own, err := store.Open(t.Context(), drv, "own")
	if err != nil {
		t.Fatal(err)
	}
	b, err := store.OpenCustomers(t.Context(), store.CustomersConfig{Own: own, OwnOf: "old", Driver: farOf, Key: keyOf, NewKey: keyOf})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(b.Close(), own.Close(t.Context())); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
	})
	return b
}

func TestACustomerThatIsAddedIsKnownToEveryProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	one, other := customersIn(t, dir), customersIn(t, dir)
	if _, err := other.Of(t.Context(), "acme"); !errors.Is(err, store.ErrUnknownCustomer) {
		t.Errorf("before it was added: %v", err)
	}
	acme := store.Customer{Name: "acme", Place: filepath.Join(dir, "acme"), Created: time.Now()}
	if err := one.Add(t.Context(), acme); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		if _, err := other.Customer(t.Context(), "acme"); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	// Opened once, however many want it.
	var all sync.WaitGroup
	stores := make([]*store.Store, 8)
	for i := range stores {
		all.Go(func() {
			var err error
			if stores[i], err = other.Of(t.Context(), "acme"); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for _, st := range stores {
		if st == nil || st != stores[0] || st == other.Own {
			t.Errorf("stores %p and %p, own %p", st, stores[0], other.Own)
		}
	}
	if err := one.Add(t.Context(), acme); !errors.Is(err, store.ErrCustomerExists) {
		t.Errorf("added twice: %v", err)
	}
	for _, own := range []string{"", "old"} {
		if st, err := one.Of(t.Context(), own); st != one.Own || err != nil {
			t.Errorf("store of %q: %v, %v", own, st, err)
		}
	}
}

func TestTwoCustomersNeverShareAPlace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b := customersIn(t, dir)
	place := filepath.Join(dir, "one")
	if err := b.Add(t.Context(), store.Customer{Name: "acme", Place: place}); err != nil {
		t.Fatal(err)
	}
	if err := b.Add(t.Context(), store.Customer{Name: "bank", Place: place}); !errors.Is(err, store.ErrBadPassword) {
		t.Errorf("added to the place of another: %v", err)
	}
	for _, name := range []string{"old", "", "Bank", strings.Repeat("x", 64)} {
		if err := b.Add(t.Context(), store.Customer{Name: name, Place: filepath.Join(dir, "two")}); err == nil {
			t.Errorf("added %q", name)
		}
	}
	if err := b.Add(t.Context(), store.Customer{Name: "bank"}); err == nil {
		t.Error("added without a place")
	}
	list, err := b.List(t.Context())
	if err != nil || len(list) != 1 || list[0].Name != "acme" {
		t.Errorf("customers %+v, %v", list, err)
	}
}

func TestAStoreThatMovedIsTakenOnlyIfTheKeyOpensIt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b := customersIn(t, dir)
	for _, name := range []string{"acme", "bank"} {
		if err := b.Add(t.Context(), store.Customer{Name: name, Place: filepath.Join(dir, name)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Move(t.Context(), "acme", filepath.Join(dir, "bank")); !errors.Is(err, store.ErrBadPassword) {
		t.Errorf("moved to the store of another: %v", err)
	}
	if err := b.Move(t.Context(), "acme", filepath.Join(dir, "nowhere")); !errors.Is(err, store.ErrNotAStore) {
		t.Errorf("moved to where nothing is: %v", err)
	}
	if c, err := b.Customer(t.Context(), "acme"); err != nil || c.Place != filepath.Join(dir, "acme") {
		t.Errorf("%+v, %v", c, err)
	}
}
