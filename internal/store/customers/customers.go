// Package customers knows the customers of an installation, and opens the far store of each.
//
//	Book      the customers of an installation: a record of each, in the installation's own store
//	Customer  a name, and where its far store is
//
// Each far store has a key of its own: what lies in one says nothing about what lies in another. It is opened when it is first
// wanted, and stays open. One that cannot be opened is its customer's trouble, and nobody else's.
//
// Knows: which customers there are, where their stores lie, how each is opened.
// Must not know: who asks, what a server is, how keys are kept.
package customers

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

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

// Limits.
const (
	MaxCustomers = 1000                   // of an installation
	maxPlace     = 4096                   // bytes of a location
	readEvery    = time.Second            // how often at most the records are read for a name that is not known
	openLimit    = 2 * time.Minute        // how long opening a store may take
	record       = "customer"             // the kind of the records
	retryAfter   = 100 * time.Millisecond // how long a store that could not be opened is not tried again
)

// Errors.
var (
	ErrUnknown = errors.New("no such customer")
	ErrExists  = errors.New("there is such a customer already")
)

// Customer is one whose appliances send into a far store of its own.
type Customer struct {
	Name    string    `json:"name"`  // see dr.ValidateLabel
	Place   string    `json:"place"` // location of the far store, in the program's words
	Created time.Time `json:"created"`
}

// Config is what a Book is made of.
type Config struct {
	Own    *store.Store                           // the installation's own
	OwnOf  string                                 // a customer whose far store Own is; "": nobody's
	Driver func(c Customer) (store.Driver, error) // reaches its far store
	Key    func(customer string) (string, error)  // makes it, if there is none
}

// Book is the customers of an installation. Its methods may be called from many goroutines, and by several processes.
type Book struct {
	Config

	mu    sync.Mutex
	known map[string]Customer
	read  time.Time
	open  map[string]*opening
}

type opening struct {
	done  chan struct{} // closed when the others are known
	ended time.Time
	store *store.Store
	err   error
}

// Open reads the customers of an installation. Close the book before its own store.
func Open(ctx context.Context, c Config) (*Book, error) {
	b := &Book{Config: c, open: map[string]*opening{}}
	if err := b.readAll(ctx); err != nil {
		return nil, err
	}
	return b, nil
}

// Close closes the stores that were opened, but not the installation's own.
func (b *Book) Close() error {
	b.mu.Lock()
	all := slices.Collect(maps.Values(b.open))
	b.open = nil
	b.mu.Unlock()
	var errs []error
	for _, o := range all {
		if <-o.done; o.store != nil {
			errs = append(errs, o.store.Close(context.Background()))
		}
	}
	return errors.Join(errs...)
}

// readAll reads the records. Another process may have written some.
func (b *Book) readAll(ctx context.Context) error {
	if err := b.Own.Refresh(ctx); err != nil {
		return fmt.Errorf("read customers: %w", err)
	}
	known := map[string]Customer{}
	err := b.Own.Records(ctx, record, func(id string, raw json.RawMessage) error {
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

// List gives the customers that have a store of their own, by name.
func (b *Book) List(ctx context.Context) ([]Customer, error) {
	if err := b.readAll(ctx); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.SortedFunc(maps.Values(b.known), func(x, y Customer) int { return cmp.Compare(x.Name, y.Name) }), nil
}

// Customer finds one by name. ErrUnknown if there is none.
func (b *Book) Customer(ctx context.Context, name string) (Customer, error) {
	c, known, again := b.find(name)
	if again {
		if err := b.readAll(ctx); err != nil {
			return Customer{}, err
		}
		c, known, _ = b.find(name)
	}
	if !known {
		return Customer{}, fmt.Errorf("%w: %q; see 'muster master customer list', and add it with 'muster master customer add %s'", ErrUnknown, name, name)
	}
	return c, nil
}

func (b *Book) find(name string) (c Customer, known, again bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c, known = b.known[name]
	return c, known, !known && time.Since(b.read) > readEvery
}

// Owns says whether a customer's snapshots lie in the installation's own store. "" stands for the installation itself.
func (b *Book) Owns(customer string) bool { return customer == "" || customer == b.OwnOf }

// Of gives the store in which a customer's snapshots lie. It stays open until the book is closed.
func (b *Book) Of(ctx context.Context, customer string) (*store.Store, error) {
	if b.Owns(customer) {
		return b.Own, nil
	}
	c, err := b.Customer(ctx, customer)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	o := b.open[customer]
	switch {
	case b.open == nil:
		b.mu.Unlock()
		return nil, errors.New("open far store: this process is ending")
	case o == nil || o.failed():
		o = &opening{done: make(chan struct{})}
		b.open[customer] = o
		go b.begin(context.WithoutCancel(ctx), c, o)
	}
	b.mu.Unlock()
	select {
	case <-o.done:
		return o.store, o.err
	case <-ctx.Done():
		return nil, fmt.Errorf("open far store of %s: %w", customer, context.Cause(ctx))
	}
}

func (o *opening) failed() bool {
	select {
	case <-o.done:
		return o.err != nil && time.Since(o.ended) > retryAfter
	default:
		return false
	}
}

func (b *Book) begin(ctx context.Context, c Customer, o *opening) {
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	defer close(o.done)
	drv, key, err := b.ways(c)
	if err == nil {
		o.store, err = store.Open(ctx, drv, key)
	}
	if o.ended = time.Now(); err != nil {
		o.err = fmt.Errorf("open far store of %s: %w", c.Name, err)
	}
}

// ways gives what opens a customer's store.
func (b *Book) ways(c Customer) (drv store.Driver, key string, err error) {
	if drv, err = b.Driver(c); err == nil {
		key, err = b.Key(c.Name)
	}
	return drv, key, err
}

// Add adds a customer, with a new far store or one that its key opens. Cut off, it may be called again: the record is
// written last. ErrExists if there is such a customer already.
func (b *Book) Add(ctx context.Context, c Customer) error {
	if err := dr.ValidateLabel("customer", c.Name); err != nil {
		return err
	}
	all, err := b.List(ctx)
	switch {
	case err != nil:
		return err
	case b.Owns(c.Name) || slices.ContainsFunc(all, func(x Customer) bool { return x.Name == c.Name }):
		return fmt.Errorf("add customer %s: %w", c.Name, ErrExists)
	case len(all) >= MaxCustomers:
		return fmt.Errorf("add customer %s: there are %d, which is the most", c.Name, len(all))
	}
	if err := b.settle(ctx, c, true); err != nil {
		return fmt.Errorf("add customer %s: %w", c.Name, err)
	}
	return nil
}

// Move writes down that a customer's far store is at another place by now, where its key opens it. What has it open still
// goes on with the old place.
func (b *Book) Move(ctx context.Context, name, place string) error {
	c, err := b.Customer(ctx, name)
	if err == nil {
		c.Place = place
		err = b.settle(ctx, c, false)
	}
	if err != nil {
		return fmt.Errorf("move far store of %s: %w", name, err)
	}
	return nil
}

// settle makes sure that a customer's store is where its record will say.
func (b *Book) settle(ctx context.Context, c Customer, create bool) error {
	if c.Place == "" || len(c.Place) > maxPlace {
		return fmt.Errorf("say where its store is, in at most %d bytes", maxPlace)
	}
	drv, key, err := b.ways(c)
	if err != nil {
		return err
	}
	st, err := store.Open(ctx, drv, key)
	if create && errors.Is(err, store.ErrNotAStore) {
		if err = store.Create(ctx, drv, key); err == nil {
			st, err = store.Open(ctx, drv, key)
		}
	}
	if err != nil {
		return fmt.Errorf("open store in %s: %w", drv, err)
	}
	if err := st.Close(ctx); err != nil {
		return err
	}
	if err := b.Own.PutRecord(ctx, record, c.Name, c); err != nil {
		return err
	}
	return b.readAll(ctx)
}
