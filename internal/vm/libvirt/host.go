package libvirt

import (
	"bufio"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/musterdr/muster/internal/durable"
	"github.com/musterdr/muster/internal/vm"
)

const (
	probeLimit = 5 * time.Second // for a guest of one sector; a processor that works needs 0.3 s
	probeWorks = "muster: the processor works"

	keepFree = 512 << 20 // bytes that stay with the host
	overhead = 192 << 20 // bytes QEMU takes besides the guest's memory
	tbCache  = 256       // MiB of translated code QEMU may keep for one emulated machine
)

//go:generate sh -c "as --64 -o kvmprobe/kvmprobe.o kvmprobe/kvmprobe.s && ld -m elf_x86_64 -Ttext 0x7c00 --oformat binary -o kvmprobe/kvmprobe.bin kvmprobe/kvmprobe.o && rm kvmprobe/kvmprobe.o && chmod 644 kvmprobe/kvmprobe.bin"
//go:embed kvmprobe/kvmprobe.bin
var probeDisk []byte

// Host says what this host can do.
func (h *Hypervisor) Host(ctx context.Context) (vm.Host, error) {
	kvm, err := h.accelerator(ctx)
	if err != nil {
		return vm.Host{}, fmt.Errorf("ask host: %w", err)
	}
	var version uint64
	err = h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		version, err = l.ConnectGetVersion()
		return err
	})
	if err != nil {
		return vm.Host{}, fmt.Errorf("ask host: %w", err)
	}
	_, uefi := findFirmware()
	host := vm.Host{
		Accelerator: "tcg", KVMReason: kvm.Reason, Emulator: h.emulator, UEFI: uefi, CPUs: runtime.NumCPU(),
		Version: fmt.Sprintf("%d.%d.%d", version/1e6, version/1e3%1e3, version%1e3),
	}
	if kvm.Reason == "" {
		host.Accelerator = "kvm"
	}
	if host.Memory, host.Free, err = h.memory(ctx); err != nil {
		return vm.Host{}, fmt.Errorf("ask host: %w", err)
	}
	return host, nil
}

// memory says how much memory the host has, and how much new machines may have: of what nobody uses now, only what is
// not promised already to machines that have yet to touch theirs.
func (h *Hypervisor) memory(ctx context.Context) (total, free int64, err error) {
	total, free, err = meminfo()
	if err != nil {
		return 0, 0, err
	}
	var doms []libvirt.Domain
	promised := int64(0)
	err = h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		doms, _, err = l.ConnectListAllDomains(maxDomains, libvirt.ConnectListDomainsActive)
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	for _, dom := range doms {
		var kib uint64
		err := h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
			_, kib, _, _, _, err = l.DomainGetInfo(dom)
			return err
		})
		if err != nil && !errors.Is(err, vm.ErrGone) {
			return 0, 0, err
		}
		promised += int64(kib)<<10 + overhead
	}
	h.rooms.Lock()
	defer h.rooms.Unlock()
	free = min(free, total-promised) - keepFree - h.pending
	return total, max(free, 0), nil
}

// meminfo reads what the kernel knows of the host's memory.
func meminfo() (total, available int64, err error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	values := map[string]int64{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		if kib, err := strconv.ParseInt(fields[1], 10, 64); err == nil {
			values[fields[0]] = kib << 10
		}
	}
	if values["MemTotal:"] == 0 {
		return 0, 0, errors.New("/proc/meminfo does not say how much memory there is")
	}
	return values["MemTotal:"], values["MemAvailable:"], nil
}

// reserve finds room for a machine until it is started and counted, or has not started.
func (h *Hypervisor) reserve(ctx context.Context, spec vm.Spec) (release func(), err error) {
	_, free, err := h.memory(ctx)
	if err != nil {
		return nil, err
	}
	need := int64(spec.Hardware.Memory)<<20 + overhead
	h.rooms.Lock()
	defer h.rooms.Unlock()
	if need > free {
		return nil, fmt.Errorf("%d MiB of memory are needed, %d MiB are free: %w", need>>20, free>>20, vm.ErrCapacity)
	}
	h.pending += need
	return func() {
		h.rooms.Lock()
		defer h.rooms.Unlock()
		h.pending -= need
	}, nil
}

// verdict is the outcome of the probe of KVM.
type verdict struct {
	Boot     string `json:"boot"`     // boot id of the host
	Emulator string `json:"emulator"` // path and time of QEMU
	Reason   string `json:"reason"`   // why KVM does not work; "" if it does
}

// accelerator probes KVM, once for each boot of the host.
func (h *Hypervisor) accelerator(ctx context.Context) (verdict, error) {
	h.probing.Lock()
	defer h.probing.Unlock()
	if h.kvm != nil {
		return *h.kvm, nil
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return verdict{}, err
	}
	info, err := os.Stat(h.emulator)
	if err != nil {
		return verdict{}, err
	}
	now := verdict{Boot: strings.TrimSpace(string(boot)), Emulator: fmt.Sprint(h.emulator, " ", info.ModTime().UTC())}
	if kept, ok := readVerdict(h.config.ProbeFile); ok && kept.Boot == now.Boot && kept.Emulator == now.Emulator {
		h.kvm = &kept
		return kept, nil
	}
	now.Reason, err = ProbeKVM(ctx, h.emulator)
	if err != nil {
		return verdict{}, err // not an answer: ask again the next time
	}
	slog.InfoContext(ctx, "probed KVM", "works", now.Reason == "", "reason", now.Reason)
	h.kvm = &now
	if h.config.ProbeFile != "" {
		if err := writeVerdict(h.config.ProbeFile, now); err != nil {
			slog.WarnContext(ctx, "cannot keep the outcome of the KVM probe", "error", err)
		}
	}
	return now, nil
}

func readVerdict(path string) (v verdict, ok bool) {
	text, err := os.ReadFile(path)
	return v, err == nil && json.Unmarshal(text, &v) == nil
}

func writeVerdict(path string, v verdict) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return durable.WriteFile(path, append(text, '\n'), 0o600)
}

// ProbeKVM runs a guest of one sector under KVM, as our machines would run, and says why that did not work; "" if it did.
// An error means that it could not be tried.
func ProbeKVM(ctx context.Context, emulator string) (reason string, err error) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return "/dev/kvm does not exist: the processor has no virtualisation, or it is switched off in the firmware", nil
	}
	if err != nil {
		return fmt.Sprintf("/dev/kvm cannot be opened: %v", err), nil
	}
	_ = f.Close()

	dir, err := os.MkdirTemp("", "muster-kvm-")
	if err != nil {
		return "", fmt.Errorf("probe KVM: %w", err)
	}
	defer os.RemoveAll(dir)
	said, complaint, err := runProbe(ctx, dir, emulator, "kvm", "host")
	switch {
	case ctx.Err() != nil:
		return "", fmt.Errorf("probe KVM: %w", ctx.Err())
	case strings.Contains(said, probeWorks):
		return "", nil
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("a guest of one sector hung under KVM for %s", probeLimit), nil
	case complaint != "":
		return "a guest of one sector did not run under KVM: " + complaint, nil
	default:
		return fmt.Sprintf("a guest of one sector did not come to its end under KVM: %v", err), nil
	}
}

// runProbe runs the probe's guest and returns what it said, and the last line of what QEMU complained of.
func runProbe(ctx context.Context, dir, emulator, accelerator, cpu string) (said, complaint string, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	disk, console := filepath.Join(dir, "disk"), filepath.Join(dir, "console")
	if err := os.WriteFile(disk, probeDisk, 0o600); err != nil {
		return "", "", err
	}
	// A disk of one sector has no geometry that a BIOS could read.
	if err := os.Truncate(disk, 1<<20); err != nil {
		return "", "", err
	}
	cmd := exec.CommandContext(ctx, emulator, "-accel", accelerator, "-cpu", cpu, "-machine", "q35", "-smp", "2", "-m", "64",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-drive", "if=none,id=disk,format=raw,readonly=on,file="+disk, "-device", "virtio-blk,drive=disk",
		"-chardev", "file,id=console,path="+console, "-device", "isa-debugcon,iobase=0xe9,chardev=console",
		"-device", "isa-debug-exit,iobase=0xf4")
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	text, _ := os.ReadFile(console)
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return string(text), lines[len(lines)-1], err
}
