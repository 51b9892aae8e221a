// Package emulated boots a small Linux in an emulated machine, for what no process and no namespace has of its own: a kernel with a
// device-mapper, a wall clock. Only tests use it.
//
//	Machine   the kernel, what it finds in its initramfs, and what else QEMU is told
//
// Knows: QEMU, kernels that scripts/guest-kernels fetches, busybox.
// Must not know: what is tested in it.
package emulated

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Machine is what boots. Its init, a script for busybox's shell at /busybox, finds the modules that it is to load in /modules, in
// order, and says "guest is up" on its console when it is.
type Machine struct {
	Kernel  string            // of those that scripts/guest-kernels fetches: "bookworm", "bookworm-backports"
	Modules []string          // what the kernel must have loaded; what they need comes along
	Files   map[string]string // of the initramfs, by name: what is in them; "init" is among them
	Copies  map[string]string // further ones: from where they are copied
	Memory  int               // MiB
	Args    []string          // of QEMU: disks, networks, clocks
}

// processor has all that QEMU can emulate but what it emulates wrongly: its cmpxchg16b without a lock loses the flags (QEMU
// 7.2), and kernels since 6.5 rely on them. Five levels of page tables are only slow.
const processor = "max,-cx16,-la57"

const (
	bootLimit = time.Minute
	serialLog = "serial.log"
)

// Boot starts a machine, whose files are in a folder of its own, and returns when it is up. off pulls its plug, as the end of the
// test does.
func Boot(t testing.TB, dir string, m Machine) (off func()) {
	t.Helper()
	image := m.initramfs(t, dir)
	log := filepath.Join(dir, serialLog)
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	machine := exec.Command("qemu-system-x86_64", append([]string{"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", processor, "-smp", "2", "-m", fmt.Sprint(m.Memory),
		"-nodefaults", "-display", "none", "-no-reboot", "-kernel", image, "-initrd", filepath.Join(dir, "initramfs"),
		"-append", "console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off", "-serial", "file:" + log}, m.Args...)...)
	machine.Stderr = os.Stderr
	if err := machine.Start(); err != nil {
		t.Fatal(err)
	}
	off = func() {
		if machine.ProcessState == nil {
			_ = machine.Process.Kill()
			_ = machine.Wait()
		}
	}
	t.Cleanup(off)
	for limit := time.Now().Add(bootLimit); ; <-time.After(50 * time.Millisecond) {
		said := Said(dir)
		if strings.Contains(said, "guest is up") {
			return off
		}
		if time.Now().After(limit) || strings.Contains(said, "Kernel panic") {
			t.Fatalf("the guest does not start: %s", said)
		}
	}
}

// Said is what the machine whose files are in a folder has said on its console.
func Said(dir string) string {
	raw, _ := os.ReadFile(filepath.Join(dir, serialLog))
	return string(raw)
}

// initramfs writes what the kernel starts with, and gives the path of that kernel.
func (m Machine) initramfs(t testing.TB, dir string) (image string) {
	t.Helper()
	kernels := filepath.Join(os.Getenv("MUSTER_KERNELS"), m.Kernel)
	found, err := filepath.Glob(filepath.Join(kernels, "boot/vmlinuz-*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("there is no kernel in %s/boot (scripts/guest-kernels): %v", kernels, err)
	}
	release := strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")
	root := filepath.Join(dir, "initramfs.d")
	for _, dir := range []string{"modules", "system", "dev", "proc", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "cp", "/bin/busybox", root)
	for name, text := range m.Files {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, from := range m.Copies {
		run(t, "cp", from, filepath.Join(root, name))
	}
	var loaded []string
	for _, module := range m.Modules {
		for line := range strings.Lines(run(t, "modprobe", "--dirname", kernels, "--set-version", release, "--show-depends", module)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "insmod" && !slices.Contains(loaded, f[1]) {
				loaded = append(loaded, f[1])
				to := filepath.Join(root, fmt.Sprintf("modules/%02d-%s", len(loaded), strings.TrimSuffix(filepath.Base(f[1]), ".xz")))
				run(t, "cp", f[1], to)
				if filepath.Ext(f[1]) == ".xz" {
					run(t, "sh", "-c", "xz --decompress --stdout "+f[1]+" >"+to)
				}
			}
		}
	}
	run(t, "sh", "-c", "cd "+root+" && find . | busybox cpio -o -H newc >"+filepath.Join(dir, "initramfs"))
	return found[0]
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return string(out)
}
