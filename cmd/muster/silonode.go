package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/master"
	"github.com/musterdr/muster/internal/silo"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/remote"
	"github.com/musterdr/muster/internal/trust"
)

// silosOf are the silo of this process and those that are connected.
type silosOf struct {
	home master.SiloSet
	hub  *trust.Hub // nil: nobody can connect
}

// Names implements master.Silos.
func (s silosOf) Names() []string {
	names := s.home.Names()
	if s.hub == nil {
		return names
	}
	for _, p := range s.hub.Connected() {
		if p.Role == trust.Silo && !slices.Contains(names, p.Name) {
			names = append(names, p.Name)
		}
	}
	return names
}

// Silo implements master.Silos.
func (s silosOf) Silo(name string) (api.Silo, error) {
	if s.home[name] != nil || s.hub == nil {
		return s.home.Silo(name)
	}
	c, err := s.hub.Client(trust.Silo, name)
	if err != nil {
		return nil, api.Errorf(api.Unavailable, "%w", err)
	}
	return api.RemoteSilo(c, "https://"+name), nil
}

func leasedDriver(node *trust.Node) func(place string) (store.Driver, error) {
	return func(place string) (store.Driver, error) {
		if !strings.HasPrefix(place, storesPlace+"/") {
			return nil, fmt.Errorf("this release knows no store at %q", place)
		}
		return remote.New(node.Client(), masterURL+place), nil
	}
}

func siloServeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "serve", Short: "Run a silo on this machine, which has joined a master", Args: cobra.NoArgs,
		Long: `Run a silo until interrupted. It keeps a connection to its master open, says what it can, and makes, tests and runs rescue images as it is asked. It listens
nowhere. The master's store is read over the same connection; what opens it comes with each piece of work, and is kept in memory as long as that lasts.

Work that is under way when it ends is done by another silo; invoked machines do not notice. Where the master is not reached for a minute, boot
tests end by themselves; invoked machines run on.`,
		Example: `  muster silo join --file silo-1.token
  muster silo serve --reserve bank --reserve mill`}
	var c siloSettings
	fl := cmd.Flags()
	fl.StringArrayVar(&c.reserved, "reserve", nil, "customer that this silo is for (may be repeated); without it everybody's")
	fl.IntVar(&c.memory, "memory", 0, "MiB that rescue machines may have all together; 0: seven eighths of this host's")
	fl.IntVar(&c.tests, "tests", 0, "boot tests at once; 0: as many as memory and processors allow")
	fl.IntVar(&c.MaxMemory, "max-memory", 0, "MiB a rescue machine may have; 0: half this host's")
	fl.IntVar(&c.MaxCPUs, "max-cpus", 0, "processors a rescue machine may have; 0: this host's")
	fl.StringVar(&c.Libvirt, "libvirt", "", "libvirt's socket; empty: the system's")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return serveSilo(cmd, installation(cmd), c) }
	return cmd
}

// siloSettings are what a silo is told when it is started.
type siloSettings struct {
	settings
	reserved      []string
	memory, tests int
}

func serveSilo(cmd *cobra.Command, i install, c siloSettings) error {
	ctx := cmd.Context()
	p := &platform{log: slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))}
	defer p.close()
	node, err := trust.OpenNode(i.nodeDir())
	if err != nil {
		return fmt.Errorf("open silo: %w", err)
	}
	if node.Peer().Role != trust.Silo {
		return withCode(exitRefused, fmt.Errorf("%s has joined as %s, not as a silo", i.Dir, node.Peer()))
	}
	node.Log = p.log
	if err := os.MkdirAll(i.Run, 0o711); err != nil {
		return fmt.Errorf("make folder for sockets: %w", err)
	}
	if err := p.lock(i); err != nil {
		return err
	}
	s, _, err := p.openSilo(ctx, i, c.settings, silo.Config{Name: node.Peer().Name, Stores: &silo.Leased{Driver: leasedDriver(node)},
		Memory: c.memory, Tests: c.tests, Reserved: c.reserved}, exporter{install: i})
	if err != nil {
		return err
	}
	// What an earlier process left of boot tests the master has removed as soon as it hears of this one.
	p.log.Info("silo serves", "version", version, "name", node.Peer().Name, "master", node.Master())
	node.Serve(ctx, api.SiloHandler(s))
	p.log.Info("silo stops; invoked machines run on")
	return nil
}

// openLeased opens the store that an exporter of this silo reads, with what its parent tells it on standard input.
func (i install) openLeased(ctx context.Context, in io.Reader) (*store.Store, error) {
	var access told
	if err := json.NewDecoder(io.LimitReader(in, 64<<10)).Decode(&access); err != nil {
		return nil, fmt.Errorf("read what opens the store: %w", err)
	}
	driver, err := i.toldDriver(access)
	if err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, driver, access.Password)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", access, err)
	}
	return st, nil
}

// toldDriver reaches the store that an exporter was told of.
func (i install) toldDriver(t told) (store.Driver, error) {
	if t.Location != "" {
		set, err := i.settings()
		if err != nil {
			return nil, err
		}
		return i.farDriver(set, store.Customer{Name: t.Customer, Place: t.Location})
	}
	node, err := trust.OpenNode(i.nodeDir())
	if err != nil {
		return nil, err
	}
	return leasedDriver(node)(t.Place)
}
