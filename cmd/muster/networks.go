package main

import (
	"context"

	"github.com/musterdr/muster/internal/silo"
	"github.com/musterdr/muster/internal/vm/network"
)

// hostNetworks are the bridges of this host. It implements silo.Networks.
type hostNetworks struct{}

// HostOnly implements silo.Networks.
func (hostNetworks) HostOnly(ctx context.Context, net silo.HostOnlyNet) error {
	return network.Create(ctx, network.Spec{Name: net.Name, Address: net.Address})
}

// Remove implements silo.Networks.
func (hostNetworks) Remove(ctx context.Context, name string) error { return network.Remove(ctx, name) }

// List implements silo.Networks.
func (hostNetworks) List(ctx context.Context) ([]string, error) { return network.List(ctx) }
