package guestfish

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// ErrTooLarge is an answer that is larger than was asked for.
var ErrTooLarge = errors.New("larger than the limit")

// memory is how much the appliance has, in MiB. It bounds what a hostile file system can cost.
const memory = "512"

// Small are the commands that make an appliance fit for a short life; disks and "run" follow.
var Small = [][]string{
	{"set-smp", "1"}, // with emulation a second processor only gets in the way
	{"set-memsize", memory},
	{"set-network", "false"},
	// Every line on an emulated serial console and every mitigated branch costs; the appliance lives for seconds.
	{"set-append", "quiet mitigations=off"},
}

// Env is the whole environment of guestfish: nothing of ours leaks in but where a fixed appliance lies. work is a folder for
// what travels; in cache libguestfs keeps its appliance (400 MB) between guests. Without kvm, which has to be proved to work,
// the appliance is emulated: a KVM that is there and does not work would hang it.
func Env(work, cache string, kvm bool) []string {
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
	f, err := Start(nil, "")
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
