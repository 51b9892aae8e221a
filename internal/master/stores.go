package master

import (
	"context"
	"errors"
	"fmt"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

// storeOf gives the store in which a server's snapshots lie, and what is written of it besides.
func (m *Master) storeOf(ctx context.Context, s dr.Server) (*store.Store, error) {
	if m.Customers == nil {
		return m.Store, nil
	}
	st, err := m.Customers.Of(ctx, s.StoredFor())
	if errors.Is(err, store.ErrUnknownCustomer) {
		return nil, api.Errorf(api.NotFound, "find the store of %s: %w", s.Name, err)
	}
	return st, err
}

// storeOfID is storeOf for a server that is named by its identifier.
func (m *Master) storeOfID(ctx context.Context, serverID string) (*store.Store, error) {
	s, err := m.Catalog.Server(ctx, serverID)
	if err != nil {
		return nil, err
	}
	return m.storeOf(ctx, s)
}

// oneStore is one of the stores of the installation.
type oneStore struct {
	*store.Store
	Customer string // whose far store it is; "": the installation's own
	Location string // for people
	Err      error  // why it cannot be opened: then Store is nil
}

// stores gives every store, the installation's own first.
func (m *Master) stores(ctx context.Context) []oneStore {
	out := []oneStore{{Store: m.Store, Location: m.Location}}
	if m.Customers == nil {
		return out
	}
	for _, c := range m.Customers.Known() {
		one := oneStore{Customer: c.Name, Location: c.Place}
		if one.Store, one.Err = m.Customers.Of(ctx, c.Name); one.Err == nil {
			one.Location = one.Store.String()
		}
		out = append(out, one)
	}
	return out
}

// readCustomers looks again which customers there are: another process may have added one.
func (m *Master) readCustomers(ctx context.Context) error {
	if m.Customers == nil {
		return nil
	}
	_, err := m.Customers.List(ctx)
	return err
}

// eachStore does something with every store. What cannot be done with one is told, and the others are gone on with.
func (m *Master) eachStore(ctx context.Context, do func(st oneStore) error) error {
	var errs []error
	for _, one := range m.stores(ctx) {
		if ctx.Err() != nil {
			return errors.Join(append(errs, context.Cause(ctx))...)
		}
		err := one.Err
		if err == nil {
			err = do(one)
		}
		if err != nil && one.Customer != "" {
			err = fmt.Errorf("store of %s: %w", one.Customer, err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// checkCustomer says whose a server is that an appliance elsewhere captures: the appliance's customer's, and nobody else's.
func (m *Master) checkCustomer(server *dr.Server) error {
	if server.Appliance == "" || m.CustomerOf == nil {
		return nil
	}
	customer, err := m.CustomerOf(server.Appliance)
	if err != nil {
		return api.Errorf(api.Invalid, "%w", err)
	}
	if server.Customer == "" {
		server.Customer = customer
	}
	if server.Customer != customer {
		return api.Errorf(api.Invalid, "server %s cannot be of customer %s: appliance %s, which captures it, is of customer %s", server.Name, server.Customer, server.Appliance, customer)
	}
	return nil
}

// capturedBy gives what says whether a server is one of an appliance's. A name that went from one customer's appliance to another's took
// nothing with it.
func (m *Master) capturedBy(appliance string) func(dr.Server) bool {
	if appliance == "" || m.CustomerOf == nil || m.Customers == nil {
		return func(s dr.Server) bool { return s.Appliance == appliance }
	}
	customer, err := m.CustomerOf(appliance)
	return func(s dr.Server) bool {
		return err == nil && s.Appliance == appliance && (customer == s.Customer || m.Customers.Owns(customer) && m.Customers.Owns(s.Customer))
	}
}
