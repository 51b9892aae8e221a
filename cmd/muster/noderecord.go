package main

import (
	"context"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/master"
	"github.com/musterdr/muster/internal/trust"
)

// witness has what happens to nodes written down by the master. It is called before the port is served.
func (n *nodePort) witness(ctx context.Context, m *master.Master) {
	if n != nil {
		n.hub.Tell = func(h trust.Happening) { m.Witness(ctx, h.At, string(h.What), h.Peer.Name, h.Text) }
	}
}

// figures say how the nodes stand, as far as trust knows.
func (n *nodePort) figures() ([]api.NodeFigures, error) {
	all, err := n.authority.Nodes()
	if err != nil {
		return nil, err
	}
	connected := map[string]bool{}
	for _, p := range n.hub.Connected() {
		connected[p.Name] = true
	}
	out := make([]api.NodeFigures, 0, len(all))
	for _, e := range all {
		one := api.NodeFigures{Role: string(e.Role), Name: e.Name, Customer: e.Customer, Connected: connected[e.Name], Revoked: e.State == trust.Revoked}
		if e.Expires != nil {
			one.Expires = *e.Expires
		}
		out = append(out, one)
	}
	return out, nil
}
