package guestfish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// ErrTooLarge is an answer that is larger than was asked for.
var ErrTooLarge = errors.New("larger than the limit")

// memory is how much the appliance has, in MiB. It bounds what a hostile file system can cost.
const memory = "512"

// leastFree is how much of a host's memory has to be free for an appliance and its emulator, in bytes. Without it the kernel would
// end one of the two, or something else, somewhere on the way.
const leastFree = 640 << 20

// maxMeminfo bounds what is read of what the kernel says of its memory, in bytes.
const maxMeminfo = 64 << 10

// Launch starts an appliance fit for a short life, with the disks of some add commands. What env says of its arguments holds.
// After an error nothing runs.
func Launch(ctx context.Context, work, cache string, kvm bool, adds [][]string) (*Fish, error) {
	if err := Ready(); err != nil {
		return nil, fmt.Errorf("start libguestfs: %w", err)
	}
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

// Ready says what this host lacks now for an appliance to start, in a sentence that says what to do, or nil. It starts nothing.
func Ready() error { return ready("/") }

func ready(root string) error {
	if _, err := exec.LookPath("guestfish"); err != nil {
		return errors.New("guestfish is not installed: apt-get install --no-install-recommends libguestfs-tools libguestfs-xfs linux-image-amd64")
	}
	if os.Getenv("LIBGUESTFS_PATH") == "" && os.Getenv("SUPERMIN_KERNEL") == "" && !hasKernel(root) {
		return errors.New("libguestfs has no kernel with its modules for its machine: install linux-image-amd64, or make /boot/vmlinuz-* readable")
	}
	// What the kernel does not say stops nobody.
	if free, known := freeMemory(filepath.Join(root, "proc/meminfo")); known && free < leastFree {
		return fmt.Errorf("libguestfs' machine needs %d MiB of memory, and %d MiB are free: give this host more, or try again when less is under way", leastFree>>20, free>>20)
	}
	return nil
}

func hasKernel(root string) bool {
	kernels, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	for _, k := range kernels {
		_, version, _ := strings.Cut(filepath.Base(k), "-")
		if _, err := os.Stat(filepath.Join(root, "lib/modules", version)); err != nil {
			continue
		}
		if file, err := os.Open(k); err == nil {
			file.Close()
			return true
		}
	}
	return false
}

// freeMemory is what programs may still have, in bytes: what is free or can be freed, and swap.
func freeMemory(meminfo string) (bytes int64, known bool) {
	file, err := os.Open(meminfo)
	if err != nil {
		return 0, false
	}
	defer file.Close()
	raw, _ := io.ReadAll(io.LimitReader(file, maxMeminfo)) // what can be read of it
	for line := range strings.Lines(string(raw)) {
		var kib int64
		key, value, _ := strings.Cut(line, ":")
		if n, _ := fmt.Sscanf(value, "%d kB", &kib); n == 1 && (key == "MemAvailable" || key == "SwapFree") {
			bytes += kib << 10
			known = known || key == "MemAvailable"
		}
	}
	return bytes, known
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
