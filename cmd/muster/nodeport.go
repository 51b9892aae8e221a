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
func nodeHandlers(m *master.Master, set settings, drv store.Driver) (map[string]http.Handler, func() error) {
	far := remote.NewServer(func(r *http.Request) (store.Driver, remote.Rights, error) {
		peer, ok := trust.PeerOf(r.Context())
		switch {
		case ok && peer.Role == trust.Silo: // what opens it comes with its leases, and it adds deltas
		case !ok || peer.Role != trust.Appliance:
			return nil, remote.None, errors.New("only nodes have to do with this store")
		case peer.Customer != set.Customer:
			return nil, remote.None, fmt.Errorf("customer %s has no far store on this master: its own is that of %s; see 'muster master customer'", peer.Customer, orDash(set.Customer))
		}
		return drv, remote.Append, nil
	})
	home := api.HomeHandler(m, func(ctx context.Context) (string, error) {
		peer, ok := trust.PeerOf(ctx)
		if !ok || peer.Role != trust.Appliance {
			return "", api.Errorf(api.Refused, "only an appliance says hello here")
		}
		return peer.Name, nil
	})
	return map[string]http.Handler{storePlace + "/": http.StripPrefix(storePlace, far), "/home/": home},
		func() error { return far.Close(context.Background()) }
}

// storePlace is where a master serves its store, which is the far one of its customer, sealed as it lies there.
const storePlace = "/store"

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
