package appliance

import (
	"context"
	"log/slog"
	"sync"

	"github.com/musterdr/muster/internal/store"
)

// Far looks into the far stores of customers, each as if this process had captured what is in it. Its methods may be called from many
// goroutines.
type Far struct {
	// Own is the appliance of the installation's own store: its sources, journal and Browser are the others' too.
	Own *Appliance

	mu sync.Mutex
	of map[string]*Appliance // by customer
}

// Of gives what looks into a customer's store.
func (f *Far) Of(customer string, st *store.Store) *Appliance {
	if st == f.Own.Store {
		return f.Own
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if a := f.of[customer]; a != nil && a.Store == st { // else it has moved
		return a
	}
	a := &Appliance{Store: st, Open: f.Own.Open, Journal: f.Own.Journal, Browser: f.Own.Browser.Over(st)}
	if f.of == nil {
		f.of = map[string]*Appliance{}
	}
	f.of[customer] = a
	go func() { // what a process before this one did not come to tell
		if err := a.TellRestores(context.Background()); err != nil {
			slog.Warn("files were put back, and it is not among the events yet", "customer", customer, "error", err)
		}
	}()
	return a
}
