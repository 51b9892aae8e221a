package guestfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/musterdr/muster/internal/guestfish"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/vm"
)

// Driver opens images with libguestfs.
type Driver struct {
	// Work is an existing folder for what travels between host and appliance.
	Work string
	// Cache is a folder, made if it is missing, in which libguestfs keeps its appliance (400 MB) between guests. Building
	// it takes half a minute, so it should outlive a restart.
	Cache string
	// KVM says that this host's KVM has been proved to work. Otherwise the appliance is emulated: a KVM that is there and
	// does not work would hang it.
	KVM bool
	// Limit is the longest a guest may be open; 0: DefaultLimit. After it every call fails.
	Limit time.Duration
}

// DefaultLimit is how long a guest may be open.
const DefaultLimit = 10 * time.Minute

// Open implements prerecover.Opener.
func (d Driver) Open(ctx context.Context, dir string, base []vm.Layer) (prerecover.Guest, error) {
	limit := d.Limit
	if limit <= 0 {
		limit = DefaultLimit
	}
	work, err := os.MkdirTemp(d.Work, "guestfs-")
	if err != nil {
		return nil, fmt.Errorf("open image: make work folder: %w", err)
	}
	g := &guest{work: work, deadline: time.Now().Add(limit), limit: limit, disks: len(base)}
	if err := g.open(ctx, d, dir, base); err != nil {
		g.Abandon()
		return nil, fmt.Errorf("open image: %w", err)
	}
	return g, nil
}

func (g *guest) open(ctx context.Context, d Driver, dir string, base []vm.Layer) (err error) {
	if len(base) == 0 {
		return errors.New("it has no disk")
	}
	ctx, cancel := g.bound(ctx)
	defer cancel()
	for i, b := range base {
		path := filepath.Join(dir, fmt.Sprintf("delta-%d.qcow2", i))
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("make delta: %s: %w", path, fs.ErrExist)
		}
		if _, err := vm.NewLayer(ctx, path, b); err != nil {
			return fmt.Errorf("make delta: %w", err)
		}
		g.deltas = append(g.deltas, path)
	}
	var adds [][]string
	for _, delta := range g.deltas {
		adds = append(adds, []string{"add", delta, "format:qcow2", "cachemode:unsafe"})
	}
	g.fish, err = guestfish.Launch(ctx, g.work, d.Cache, d.KVM, adds)
	return err
}
