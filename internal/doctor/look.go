package doctor

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// signs are what was seen of a host.
type signs struct {
	QEMU, QEMUImg, Guestfish string   // what the programs say of their version; "" not installed
	Formats                  []string // that qemu-img knows
	Libvirtd                 bool     // is installed
	KVM                      string   // why it does not work; "" if it does, or the hypervisor was asked instead
	KVMDevice                bool     // /dev/kvm exists
	Virtualisation           string   // vmx, svm or "": the processor's flag
	Kernels                  []kernel
	UEFI                     bool
	AppArmor                 bool     // the kernel confines
	AppArmorRules            []string // lines of the host's own additions for QEMU
	Closed                   []string // folders above the data folder that QEMU's user cannot pass
	Memory, Available        int64    // bytes
	CPUs                     int
	CPUModel                 string
	Space                    []volume
	ClockUnknown             bool
	ClockSynchronised        bool
	BTF                      bool
}

// kernel is a kernel in /boot.
type kernel struct {
	Path     string
	Readable bool // by us
	Modules  bool // are installed
}

// volume is the file system on which a folder lies, or would lie.
type volume struct {
	Use, Path  string
	Size, Free int64 // bytes; 0 unknown
}

const appArmorLocal = "etc/apparmor.d/local/abstractions/libvirt-qemu"

// Limits on what is asked and read.
const (
	askLimit  = 10 * time.Second // for a program to say its version
	maxText   = 1 << 20          // bytes of any file or answer
	maxAbove  = 64               // folders above a folder
	maxKernel = 64
)

// look sees what there is below root, which is "/" except in tests.
func look(ctx context.Context, root string, p Patient) signs {
	at := func(path string) string { return filepath.Join(root, path) }
	s := signs{
		QEMU:      ask(ctx, "qemu-system-x86_64", "--version"),
		QEMUImg:   ask(ctx, "qemu-img", "--version"),
		Guestfish: ask(ctx, "guestfish", "--version"),
		Libvirtd:  installed("libvirtd") || installed("virtqemud"),
		KVMDevice: exists(at("dev/kvm")),
		Kernels:   kernels(root),
		UEFI:      anyFile(root, "usr/share/OVMF/OVMF_CODE*.fd", "usr/share/edk2/*/OVMF_CODE*.fd", "usr/share/qemu/ovmf-x86_64*code.bin"),
		AppArmor:  strings.HasPrefix(text(at("sys/module/apparmor/parameters/enabled")), "Y"),
		Closed:    closed(p.Data),
		CPUs:      runtime.NumCPU(),
		BTF:       exists(at("sys/kernel/btf/vmlinux")),
	}
	if s.QEMUImg != "" {
		s.Formats = formats(ask(ctx, "qemu-img", "--help"))
	}
	for line := range strings.Lines(text(at(appArmorLocal))) {
		s.AppArmorRules = append(s.AppArmorRules, strings.TrimSpace(line))
	}
	s.CPUModel, s.Virtualisation = processor(text(at("proc/cpuinfo")))
	s.Memory, s.Available = memory(text(at("proc/meminfo")))
	s.Space = append(s.Space, space("the data folder", p.Data))
	switch {
	case p.Store == "":
	case p.Appliance:
		s.Space = append(s.Space, space("the near store", p.Store))
	default:
		s.Space = append(s.Space, space("the store", p.Store))
	}
	var clock unix.Timex
	state, err := unix.Adjtimex(&clock) // modes 0: only reads
	s.ClockUnknown, s.ClockSynchronised = err != nil, state != unix.TIME_ERROR && clock.Status&unix.STA_UNSYNC == 0
	if p.Machines == nil && p.ProbeKVM != nil {
		s.KVM = p.ProbeKVM(ctx)
	}
	return s
}

func installed(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil || exists("/usr/sbin/"+program)
}

// ask gives the first bytes a program says, "" if it is not there or fails.
func ask(ctx context.Context, program string, args ...string) string {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	return string(out[:min(len(out), maxText)])
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func anyFile(root string, patterns ...string) bool {
	for _, pattern := range patterns {
		if found, err := filepath.Glob(filepath.Join(root, pattern)); err == nil && len(found) > 0 {
			return true
		}
	}
	return false
}

// text gives a file's content, "" if it cannot be read.
func text(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxText))
	if err != nil {
		return ""
	}
	return string(content)
}

// kernels lists the kernels in /boot, newest names last.
func kernels(root string) []kernel {
	files, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil {
		return nil
	}
	var out []kernel
	for _, path := range files[:min(len(files), maxKernel)] {
		shown, err := filepath.Rel(root, path)
		if err != nil {
			continue
		}
		k := kernel{Path: "/" + shown, Modules: exists(filepath.Join(root, "lib/modules", strings.TrimPrefix(filepath.Base(path), "vmlinuz-")))}
		if f, err := os.Open(path); err == nil {
			k.Readable = true
			_ = f.Close()
		}
		out = append(out, k)
	}
	return out
}

// formats reads the last paragraph of qemu-img's help.
func formats(help string) []string {
	for line := range strings.Lines(help) {
		if rest, found := strings.CutPrefix(line, "Supported formats:"); found {
			return strings.Fields(rest)
		}
	}
	return nil
}

// processor reads /proc/cpuinfo: the model, and the flag that says the processor can virtualise.
func processor(cpuinfo string) (model, virtualisation string) {
	for line := range strings.Lines(cpuinfo) {
		name, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "model name":
			model = strings.TrimSpace(value)
		case "flags":
			for _, flag := range strings.Fields(value) {
				if flag == "vmx" || flag == "svm" {
					virtualisation = flag
				}
			}
			return model, virtualisation // all processors are alike
		}
	}
	return model, virtualisation
}

// memory reads /proc/meminfo, in bytes.
func memory(meminfo string) (total, available int64) {
	for lines := bufio.NewScanner(bytes.NewBufferString(meminfo)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		switch {
		case err != nil:
		case fields[0] == "MemTotal:":
			total = kib << 10
		case fields[0] == "MemAvailable:":
			available = kib << 10
		}
	}
	return total, available
}

// above lists a folder and those above it that exist, lowest first.
func above(path string) []string {
	var out []string
	for range maxAbove {
		if exists(path) {
			out = append(out, path)
		}
		parent := filepath.Dir(path)
		if parent == path {
			break
		}
		path = parent
	}
	return out
}

func space(use, path string) volume {
	v := volume{Use: use, Path: path}
	var st unix.Statfs_t
	if there := above(path); len(there) > 0 && unix.Statfs(there[0], &st) == nil {
		v.Size, v.Free = int64(st.Blocks)*st.Frsize, int64(st.Bavail)*st.Frsize
	}
	return v
}

// closed lists the folders from the given one upwards that others may not pass.
func closed(path string) []string {
	var out []string
	for _, dir := range above(path) {
		if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o001 == 0 {
			out = append(out, dir)
		}
	}
	return out
}
