package guestfish

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// ErrTooLarge is an answer that is larger than was asked for.
var ErrTooLarge = errors.New("larger than the limit")

// memory is how much the appliance has, in MiB. It bounds what a hostile file system can cost.
const memory = "512"

// Launch starts an appliance fit for a short life, with the disks of some add commands. What env says of its arguments holds.
// After an error nothing runs.
func Launch(ctx context.Context, work, cache string, kvm bool, adds [][]string) (*Fish, error) {
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return nil, fmt.Errorf("make appliance cache: %w", err)
	}
	f, err := start(env(work, cache, kvm), work)
	if err != nil {
		return nil, err
	}
	for _, c := range slices.Concat(small, adds, [][]string{{"run"}}) {
		if _, err := f.Do(ctx, c[0], c[1:]...); err != nil {
			f.Kill()
			f.Quit()
			return nil, err
		}
	}
	return f, nil
}

var small = [][]string{
	{"set-smp", "1"}, // with emulation a second processor only gets in the way
	{"set-memsize", memory},
	{"set-network", "false"},
	// Every line on an emulated serial console and every mitigated branch costs; the appliance lives for seconds.
	{"set-append", "quiet mitigations=off"},
}

// env is the whole environment of guestfish: nothing of ours leaks in but where a fixed appliance lies. work is a folder for
// what travels; in cache libguestfs keeps its appliance (400 MB) between guests. Without kvm, which has to be proved to work,
// the appliance is emulated: a KVM that is there and does not work would hang it.
func env(work, cache string, kvm bool) []string {
	settings := "force_tcg"
	if kvm {
		settings = "force_kvm"
	}
	env := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C", "HOME=" + work, "TMPDIR=" + work,
		"LIBGUESTFS_BACKEND=direct", "LIBGUESTFS_BACKEND_SETTINGS=" + settings, "LIBGUESTFS_CACHEDIR=" + cache,
	}
	for _, name := range []string{"LIBGUESTFS_PATH", "LIBGUESTFS_HV", "SUPERMIN_KERNEL", "SUPERMIN_MODULES"} {
		if v := os.Getenv(name); v != "" {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// Ready says what is missing for libguestfs to work on this host, or nil.
func Ready() error {
	f, err := start(nil, "")
	if err != nil {
		return err
	}
	f.Quit()
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

// ReadHost reads and removes a file that guestfish has written for us.
func ReadHost(host string, limit int64) ([]byte, error) {
	defer os.Remove(host)
	info, err := os.Lstat(host)
	if err != nil {
		return nil, err
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%d bytes are %w of %d", info.Size(), ErrTooLarge, limit)
	}
	return os.ReadFile(host)
}
