package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"

	"github.com/spf13/cobra"

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
	authority, err := trust.Open(i.trustDir(), func() (string, error) {
		if passphraseFile != "" {
			return readPassphrase(passphraseFile)
		}
		return typedPassphrase(cmd, "Passphrase of the master: ")
	})
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

// nodeHandlers are what nodes may ask of this master besides enrolment, by the beginning of the path (patterns of
// http.ServeMux). They are called only for nodes that are let in; trust.PeerOf says which.
func nodeHandlers() map[string]http.Handler {
	return map[string]http.Handler{}
}

// serve lets nodes in until the context ends, if there is a port.
func (n *nodePort) serve(ctx context.Context) error {
	if n == nil {
		return nil
	}
	n.log.Info("the master listens for nodes", "name", n.authority.Name(), "address", n.listener.Addr().String())
	return n.hub.Serve(ctx, n.listener, nodeHandlers())
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
