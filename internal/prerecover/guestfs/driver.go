package guestfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

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

// appliance is how much memory the appliance has, in MiB. It bounds what a hostile file system can cost.
const applianceMemory = "512"

// Ready says what is missing for the driver to work on this host, or nil.
func Ready() error {
	f, err := startFish(nil, "")
	if err != nil {
		return err
	}
	f.quit()
	if os.Getenv("LIBGUESTFS_PATH") != "" || os.Getenv("SUPERMIN_KERNEL") != "" {
		return nil
	}
	kernels, _ := filepath.Glob("/boot/vmlinuz-*")
	for _, k := range kernels {
		if file, err := os.Open(k); err == nil {
			file.Close()
			return nil
		}
	}
	return errors.New("libguestfs has no kernel for its appliance: install linux-image-cloud-amd64, or make /boot/vmlinuz-* readable")
}

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

func (g *guest) open(ctx context.Context, d Driver, dir string, base []vm.Layer) error {
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
	if err := os.MkdirAll(d.Cache, 0o700); err != nil {
		return fmt.Errorf("make appliance cache: %w", err)
	}
	var err error
	if g.fish, err = startFish(d.env(g.work), g.work); err != nil {
		return err
	}
	commands := [][]string{
		{"set-smp", "1"}, // with emulation a second processor only gets in the way
		{"set-memsize", applianceMemory},
		{"set-network", "false"},
		// Every line on an emulated serial console and every mitigated branch costs; the appliance lives for seconds.
		{"set-append", "quiet mitigations=off"},
	}
	for _, delta := range g.deltas {
		commands = append(commands, []string{"add", delta, "format:qcow2", "cachemode:unsafe"})
	}
	commands = append(commands, []string{"run"})
	for _, c := range commands {
		if _, err := g.fish.do(ctx, c[0], c[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// env is the whole environment of guestfish: nothing of ours leaks in but where a fixed appliance lies.
func (d Driver) env(work string) []string {
	settings := "force_tcg"
	if d.KVM {
		settings = "force_kvm"
	}
	env := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C", "HOME=" + work, "TMPDIR=" + work,
		"LIBGUESTFS_BACKEND=direct", "LIBGUESTFS_BACKEND_SETTINGS=" + settings, "LIBGUESTFS_CACHEDIR=" + d.Cache,
	}
	for _, name := range []string{"LIBGUESTFS_PATH", "LIBGUESTFS_HV", "SUPERMIN_KERNEL", "SUPERMIN_MODULES"} {
		if v := os.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}
