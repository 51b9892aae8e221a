package lab

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/silo"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// AddCustomer gives a customer a far store of its own.
func (l *Lab) AddCustomer(name string) {
	l.t.Helper()
	err := l.Customers.Add(context.Background(), store.Customer{Name: name, Place: l.path("store.customers/" + name), Created: l.Clock.Now()})
	if err != nil {
		l.t.Fatal(err)
	}
}

// farKey is what opens a customer's far store.
func farKey(customer string) (string, error) { return password + " of " + customer, nil }

func (l *Lab) farDriver(c store.Customer) (store.Driver, error) {
	return folder.Driver{Path: c.Place}, nil
}

func (l *Lab) customerOf(appliance string) (string, error) {
	if s := l.sites[appliance]; s != nil {
		return s.customer, nil
	}
	switch {
	case l.Whose != nil:
		return l.Whose(appliance)
	case l.Reach != nil:
		return "", nil
	}
	return "", fmt.Errorf("there is no appliance %q", appliance)
}

// storesAt is where the master serves the stores, by their customers; "-" is its own.
const storesAt = "/stores"

// access is what comes with a lease.
func (l *Lab) access(_ context.Context, s dr.Server) (*api.Access, error) {
	customer := s.StoredFor()
	if l.Customers.Owns(customer) {
		return &api.Access{Place: storesAt + "/-", Password: password}, nil
	}
	key, err := l.Customers.Key(customer)
	return &api.Access{Customer: customer, Place: storesAt + "/" + customer, Password: key}, err
}

// driverAt reaches the store at a place that came with a lease.
func (l *Lab) driverAt(place string) (store.Driver, error) {
	customer, ok := strings.CutPrefix(place, storesAt+"/")
	switch {
	case !ok:
		return nil, errors.New("there is no such place")
	case customer == "-":
		return l.driver(), nil
	}
	c, err := l.Customers.Customer(context.Background(), customer)
	if err != nil {
		return nil, err
	}
	return l.farDriver(c)
}

// own are the stores of a silo that is part of its master's process.
type own struct{ *store.Customers }

// Open implements silo.Stores.
func (o own) Open(ctx context.Context, access *api.Access) (*store.Store, func(), error) {
	st, err := o.Of(ctx, access.Customer)
	return st, func() {}, err
}

// nodeStores are those of a silo elsewhere: it has the installation's own open all the time, because that takes long.
type nodeStores struct {
	own *store.Store
	far *silo.Leased
}

// Open implements silo.Stores.
func (n nodeStores) Open(ctx context.Context, access *api.Access) (*store.Store, func(), error) {
	if access.Customer == "" {
		return n.own, func() {}, nil
	}
	return n.far.Open(ctx, access)
}
