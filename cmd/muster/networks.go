package main

import (
	"context"
	"os"
	"path/filepath"

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

// bridges lists the bridges of this host that a machine can be plugged into.
func bridges() (names []string) {
	entries, _ := os.ReadDir("/sys/class/net") // a host without them has none
	for _, e := range entries {
		if _, err := os.Stat(filepath.Join("/sys/class/net", e.Name(), "bridge")); err == nil {
			names = append(names, e.Name())
		}
	}
	return names
}
