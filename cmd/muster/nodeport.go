package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/master"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/remote"
	"github.com/musterdr/muster/internal/trust"
)

// nodePort is where appliances and silos of other machines reach this master.
type nodePort struct {
	authority *trust.Authority // who they are, and customers' keys
	hub       *trust.Hub       // how the master reaches them
	log       *slog.Logger
	listener  net.Listener
}

// openNodePort opens the authority and the port of a master. Where 'muster master init' was never done there is none, nil,
// and no error. listen is "" for the address that was given then.
func (i install) openNodePort(cmd *cobra.Command, listen, passphraseFile string, log *slog.Logger) (*nodePort, error) {
	authority, err := i.openAuthority(cmd, passphraseFile)
	if errors.Is(err, trust.ErrNone) && listen == "" {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if listen == "" {
		listen = authority.Listen()
	}
	listener, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, fmt.Errorf("listen for nodes: %w; another address can be given with --listen", err)
	}
	return &nodePort{authority: authority, hub: trust.NewHub(authority, log), log: log, listener: listener}, nil
}

// keys gives the authority, nil where there is none.
func (n *nodePort) keys() *trust.Authority {
	if n == nil {
		return nil
	}
	return n.authority
}

// openAuthority opens the authority of a master. trust.ErrNone if there is none.
func (i install) openAuthority(cmd *cobra.Command, passphraseFile string) (*trust.Authority, error) {
	return trust.Open(i.trustDir(), func() (string, error) {
		if passphraseFile != "" {
			return readPassphrase(passphraseFile)
		}
		return typedPassphrase(cmd, "Passphrase of the master: ")
	})
}

// nodeHandlers are what nodes may ask of this master besides enrolment, by the beginning of the path (patterns of
// http.ServeMux). They are called only for nodes that are let in; trust.PeerOf says which. The function that is given too ends them.
func nodeHandlers(m *master.Master, far farStores) (map[string]http.Handler, func() error) {
	stores := remote.NewServer(func(r *http.Request) (store.Driver, remote.Rights, error) {
		peer, ok := trust.PeerOf(r.Context())
		customer := remote.NameOf(r)
		switch {
		case ok && peer.Role == trust.Silo && customer != "": // what opens it comes with its leases, and it adds deltas
			if customer == ownStore {
				customer = ""
			}
		case ok && peer.Role == trust.Appliance && customer == "": // its own customer's, whatever it asks for
			customer = peer.Customer
		default:
			return nil, remote.None, errors.New("this store is not for you")
		}
		return far.open(r.Context(), customer)
	})
	home := api.HomeHandler(m, func(ctx context.Context) (string, error) {
		peer, ok := trust.PeerOf(ctx)
		if !ok || peer.Role != trust.Appliance {
			return "", api.Errorf(api.Refused, "only an appliance says hello here")
		}
		return peer.Name, nil
	})
	return map[string]http.Handler{
		storePlace + "/":  http.StripPrefix(storePlace, stores),
		storesPlace + "/": stores.Named(storesPlace),
		"/home/":          home,
	}, func() error { return stores.Close(context.Background()) }
}

// Where a master serves stores, sealed as they lie there.
const (
	storePlace  = "/store"  // to an appliance: its customer's far store
	storesPlace = "/stores" // to a silo: any, by its customer's name
	ownStore    = "-"       // the installation's own, which no customer can be called
)

// farStores are the places of the installation's stores.
type farStores struct {
	install install
	set     settings
	book    *store.Customers
}

// open reaches the far store of a customer, of "" the installation's own, for a node, and says what that may do there.
func (f farStores) open(ctx context.Context, customer string) (drv store.Driver, may remote.Rights, err error) {
	if f.book.Owns(customer) {
		drv, err = f.install.driver(f.set)
		return drv, remote.Append, err
	}
	c, err := f.book.Customer(ctx, customer)
	if err != nil {
		return nil, remote.None, err
	}
	if may = remote.Append; c.Awaited {
		may = remote.Make
	}
	drv, err = f.install.farDriver(f.set, c)
	return drv, may, err
}

// Open implements silo.Stores for the silo of this process.
func (f farStores) Open(ctx context.Context, access *api.Access) (*store.Store, func(), error) {
	customer := ""
	if access != nil {
		customer = access.Customer
	}
	st, err := f.book.Of(ctx, customer)
	return st, func() {}, err
}

// access gives a silo what opens the store of a server.
func (f farStores) access(own string) func(context.Context, dr.Server) (*api.Access, error) {
	return func(_ context.Context, s dr.Server) (*api.Access, error) {
		customer := s.StoredFor()
		if f.book.Owns(customer) {
			return &api.Access{Place: storesPlace + "/" + ownStore, Password: own}, nil
		}
		key, err := f.book.Key(customer)
		if err != nil {
			return nil, err
		}
		return &api.Access{Customer: customer, Place: storesPlace + "/" + customer, Password: key}, nil
	}
}

// openBook opens the customers of an installation. authority is nil where there is none: then there are no customers either.
func (i install) openBook(ctx context.Context, own *store.Store, set settings, authority *trust.Authority) (*store.Customers, error) {
	return store.OpenCustomers(ctx, store.CustomersConfig{Own: own, OwnOf: set.Customer,
		Driver: func(c store.Customer) (store.Driver, error) { return i.farDriver(set, c) },
		Key: func(customer string) (string, error) {
			return keyFrom(authority, customer, (*trust.Authority).CustomerKey)
		},
		NewKey: func(customer string) (string, error) {
			return keyFrom(authority, customer, (*trust.Authority).MakeCustomerKey)
		}})
}

func keyFrom(authority *trust.Authority, customer string, get func(*trust.Authority, string) (string, error)) (string, error) {
	if authority == nil {
		return "", withCode(exitRefused, fmt.Errorf("the key of customer %s is in the authority, which is not there: see 'muster master init'", customer))
	}
	return get(authority, customer)
}

// customerOf says whose an appliance is that was enrolled.
func (n *nodePort) customerOf(appliance string) (string, error) {
	all, err := n.authority.Nodes()
	if err != nil {
		return "", err
	}
	for _, e := range all {
		if e.Role == trust.Appliance && e.Name == appliance {
			return e.Customer, nil
		}
	}
	return "", fmt.Errorf("there is no appliance %q: see 'muster master nodes'", appliance)
}

// site gives an appliance that is connected.
func (n *nodePort) site(name string) (api.Site, error) {
	c, err := n.hub.Client(trust.Appliance, name)
	if err != nil {
		return nil, err
	}
	return api.RemoteSite(c, "http://appliance", name), nil
}

// serve lets nodes in until the context ends, if there is a port. handlers are what they may ask of this master besides
// enrolment, by the beginning of the path (patterns of http.ServeMux). They are called only for nodes that are let in;
// trust.PeerOf says which.
func (n *nodePort) serve(ctx context.Context, handlers map[string]http.Handler) error {
	if n == nil {
		return nil
	}
	n.log.InfoContext(ctx, "the master listens for nodes", "name", n.authority.Name(), "address", n.listener.Addr().String())
	return n.hub.Serve(ctx, n.listener, handlers)
}

// close gives the port up, also if it was never served.
func (n *nodePort) close() error {
	if n == nil {
		return nil
	}
	if err := n.listener.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
