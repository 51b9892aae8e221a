package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/musterdr/muster/internal/dr"
)

// customerRecord is the kind of the records that say which customers there are.
const customerRecord = "customer"

// Limits of customers.
const (
	MaxCustomers       = 1000            // of an installation
	maxLocation        = 4096            // bytes
	readCustomersEvery = time.Second     // how often at most the records are read for a name that is not known
	openFarLimit       = 2 * time.Minute // how long opening a far store may take
)

// Errors of customers.
var (
	ErrUnknownCustomer = errors.New("no such customer")
	ErrCustomerExists  = errors.New("there is such a customer already")
)

// Customer is one whose appliances send into a far store of its own, with a key of its own: what lies in one store says nothing
// about what lies in another.
type Customer struct {
	Name    string    `json:"name"`  // see dr.ValidateLabel
	Place   string    `json:"place"` // location of the far store, in the program's words
	Created time.Time `json:"created"`
	// Awaited: there is no store yet. The first appliance of the customer makes it, like its own.
	Awaited bool `json:"awaited,omitempty"`
}

// CustomersConfig is what Customers are made of.
type CustomersConfig struct {
	Own    *Store                                // the installation's own
	OwnOf  string                                // a customer whose far store Own is; "": nobody's
	Driver func(c Customer) (Driver, error)      // reaches its far store
	Key    func(customer string) (string, error) // opens it
	NewKey func(customer string) (string, error) // gives that key, and makes it if there is none
}

// Customers are the customers of an installation, and their far stores. A record of each is in the installation's own store. A far store
// is opened when it is first wanted, and stays open; one that cannot be opened is its customer's trouble and nobody else's. The methods
// may be called from many goroutines, and by several processes.
type Customers struct {
	CustomersConfig

	mu    sync.Mutex
	known map[string]Customer
	read  time.Time
	open  map[string]*Store // nil: closed

	opening singleflight.Group // by customer
}

// OpenCustomers reads the customers of an installation. Close the book before its own store.
func OpenCustomers(ctx context.Context, c CustomersConfig) (*Customers, error) {
	b := &Customers{CustomersConfig: c, open: map[string]*Store{}}
	if err := b.readAll(ctx); err != nil {
		return nil, err
	}
	return b, nil
}

// Close closes the stores that were opened, but not the installation's own.
func (b *Customers) Close() error {
	b.mu.Lock()
	all := b.open
	b.open = nil
	b.mu.Unlock()
	var errs []error
	for _, st := range all {
		errs = append(errs, st.Close(context.Background()))
	}
	return errors.Join(errs...)
}

// readAll reads the records. Another process may have written some.
func (b *Customers) readAll(ctx context.Context) error {
	if err := b.Own.Refresh(ctx); err != nil {
		return fmt.Errorf("read customers: %w", err)
	}
	known := map[string]Customer{}
	err := b.Own.Records(ctx, customerRecord, func(id string, raw json.RawMessage) error {
		var c Customer
		if err := json.Unmarshal(raw, &c); err != nil || c.Name != id {
			return fmt.Errorf("the record of %q is damaged", id)
		}
		known[c.Name] = c
		return nil
	})
	if err != nil {
		return fmt.Errorf("read customers: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.known, b.read = known, time.Now()
	return nil
}

// List reads which customers have a store of their own, and gives them by name.
func (b *Customers) List(ctx context.Context) ([]Customer, error) {
	if err := b.readAll(ctx); err != nil {
		return nil, err
	}
	return b.Known(), nil
}

// Known is List as it was last read.
func (b *Customers) Known() []Customer {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.SortedFunc(maps.Values(b.known), func(x, y Customer) int { return cmp.Compare(x.Name, y.Name) })
}

// Customer finds one by name. ErrUnknownCustomer if there is none.
func (b *Customers) Customer(ctx context.Context, name string) (Customer, error) {
	c, known, again := b.find(name)
	if again {
		if err := b.readAll(ctx); err != nil {
			return Customer{}, err
		}
		c, known, _ = b.find(name)
	}
	if !known {
		return Customer{}, fmt.Errorf("%w: %q; see 'muster master customer list', and add it with 'muster master customer add %s'", ErrUnknownCustomer, name, name)
	}
	return c, nil
}

func (b *Customers) find(name string) (c Customer, known, again bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c, known = b.known[name]
	return c, known, !known && time.Since(b.read) > readCustomersEvery
}

// Owns says whether a customer's snapshots lie in the installation's own store. "" stands for the installation itself.
func (b *Customers) Owns(customer string) bool { return customer == "" || customer == b.OwnOf }

// Of gives the store in which a customer's snapshots lie. It stays open until the book is closed.
func (b *Customers) Of(ctx context.Context, customer string) (*Store, error) {
	if b.Owns(customer) {
		return b.Own, nil
	}
	c, err := b.Customer(ctx, customer)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	st := b.open[customer]
	b.mu.Unlock()
	if st != nil {
		return st, nil
	}
	select {
	case r := <-b.opening.DoChan(customer, func() (any, error) { return b.openFar(context.WithoutCancel(ctx), c) }):
		if r.Err != nil {
			return nil, fmt.Errorf("open far store of %s: %w", customer, r.Err)
		}
		return r.Val.(*Store), nil //nolint:forcetypeassert // openFar's
	case <-ctx.Done():
		return nil, fmt.Errorf("open far store of %s: %w", customer, context.Cause(ctx))
	}
}

// openFar opens a far store, and keeps it.
func (b *Customers) openFar(ctx context.Context, c Customer) (*Store, error) {
	ctx, cancel := context.WithTimeout(ctx, openFarLimit)
	defer cancel()
	drv, key, err := b.ways(c)
	if err != nil {
		return nil, err
	}
	st, err := Open(ctx, drv, key)
	switch {
	case errors.Is(err, ErrNotAStore) && c.Awaited:
		err = fmt.Errorf("%w: the customer's appliance makes it when it connects", err)
	case err == nil && c.Awaited: // from now on a place where nothing is, is one that is not mounted
		c.Awaited = false
		err = b.note(ctx, c)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil && b.open == nil {
		err = errors.New("this process is ending")
	}
	if err != nil {
		if st != nil {
			err = errors.Join(err, st.Close(ctx))
		}
		return nil, err
	}
	b.open[c.Name] = st
	return st, nil
}

// ways gives what opens a customer's store.
func (b *Customers) ways(c Customer) (drv Driver, key string, err error) {
	if drv, err = b.Driver(c); err == nil {
		key, err = b.Key(c.Name)
	}
	return drv, key, err
}

// Add adds a customer, with a new far store or one that its key opens; if it is awaited, without. Cut off, it may be called
// again: the record is written last. ErrCustomerExists if there is such a customer already.
func (b *Customers) Add(ctx context.Context, c Customer) error {
	if err := dr.ValidateLabel("customer", c.Name); err != nil {
		return err
	}
	all, err := b.List(ctx)
	switch {
	case err != nil:
		return err
	case b.Owns(c.Name) || slices.ContainsFunc(all, func(x Customer) bool { return x.Name == c.Name }):
		return fmt.Errorf("add customer %s: %w", c.Name, ErrCustomerExists)
	case len(all) >= MaxCustomers:
		return fmt.Errorf("add customer %s: there are %d, which is the most", c.Name, len(all))
	}
	_, err = b.NewKey(c.Name)
	if err == nil {
		err = b.settle(ctx, c, true)
	}
	if err != nil {
		return fmt.Errorf("add customer %s: %w", c.Name, err)
	}
	return nil
}

// Move writes down that a customer's far store is at another place by now, where its key opens it. What has it open still
// goes on with the old place.
func (b *Customers) Move(ctx context.Context, name, place string) error {
	c, err := b.Customer(ctx, name)
	if err == nil {
		c.Place, c.Awaited = place, false
		err = b.settle(ctx, c, false)
	}
	if err != nil {
		return fmt.Errorf("move far store of %s: %w", name, err)
	}
	return nil
}

// Remove forgets a customer. Its far store is left as it is, and what has it open goes on until it ends. ErrUnknownCustomer if there is none.
func (b *Customers) Remove(ctx context.Context, name string) (Customer, error) {
	c, err := b.Customer(ctx, name)
	if err == nil {
		err = b.Own.DeleteRecord(ctx, customerRecord, c.Name)
	}
	if err == nil {
		err = b.readAll(ctx)
	}
	if err != nil {
		return c, fmt.Errorf("remove customer %s: %w", name, err)
	}
	return c, nil
}

// settle makes sure that a customer's store is where its record will say.
func (b *Customers) settle(ctx context.Context, c Customer, create bool) error {
	if c.Place == "" || len(c.Place) > maxLocation {
		return fmt.Errorf("say where its store is, in at most %d bytes", maxLocation)
	}
	drv, key, err := b.ways(c)
	if err != nil {
		return err
	}
	if c.Awaited {
		return b.note(ctx, c)
	}
	st, err := Open(ctx, drv, key)
	if create && errors.Is(err, ErrNotAStore) {
		if err = Create(ctx, drv, key); err == nil {
			st, err = Open(ctx, drv, key)
		}
	}
	if err != nil {
		return fmt.Errorf("open store in %s: %w", drv, err)
	}
	if err := st.Close(ctx); err != nil {
		return err
	}
	return b.note(ctx, c)
}

func (b *Customers) note(ctx context.Context, c Customer) error {
	if err := b.Own.PutRecord(ctx, customerRecord, c.Name, c); err != nil {
		return err
	}
	return b.readAll(ctx)
}
