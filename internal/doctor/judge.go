package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/api"
)

const install = "apt-get install -y --no-install-recommends "

// Limits below which a host is too small.
const (
	gib           = 1 << 30
	leastMemory   = 2 * gib // libguestfs' machine and a small server's
	enoughMemory  = 4 * gib
	leastSpace    = 2 * gib
	enoughSpace   = 20 * gib
	enoughPercent = 5 // of the file system
	leastQEMU     = 6
)

// judge says what the signs mean.
func judge(p Patient, s signs) []api.Finding {
	if p.Appliance {
		return judgeAppliance(p, s)
	}
	out := []api.Finding{
		judgeQEMU(s), judgeKVM(p, s), judgeLibvirt(p, s), judgeQEMUImg(s), judgeGuestfs(s), judgeKernel(s), judgeUEFI(p, s),
		judgeAppArmor(p, s), judgeFolders(p, s), judgeMemory(s), judgeCPU(s),
	}
	for _, v := range s.Space {
		out = append(out, judgeSpace(v))
	}
	return append(out, judgeClock(s), judgeTracking(s))
}

// judgeAppliance: what a host needs that only captures, keeps and sends. An emulator is there for single files alone, if at all.
func judgeAppliance(p Patient, s signs) []api.Finding {
	files := api.Finding{Name: "files", State: ok, Detail: "single files of images can be looked into"}
	if err := p.Files(); err != nil {
		files.State, files.Detail = warn, "single files of images cannot be looked into: "+err.Error()
	}
	out := []api.Finding{files}
	if s.QEMU != "" {
		out = append(out, judgeKVM(p, s))
	}
	out = append(out, api.Finding{Name: "memory", State: ok, Detail: fmt.Sprintf("%s, %s of it available", size(s.Memory), size(s.Available))}, judgeCPU(s))
	for _, v := range s.Space {
		out = append(out, judgeSpace(v))
	}
	return append(out, judgeClock(s))
}

func judgeQEMU(s signs) api.Finding {
	f := api.Finding{Name: "qemu", Fix: install + "qemu-system-x86"}
	switch major, version := version(s.QEMU); {
	case s.QEMU == "":
		f.State, f.Detail = fail, "QEMU is not installed: no image can be booted"
	case major < leastQEMU:
		f.State, f.Detail = fail, fmt.Sprintf("QEMU %s is older than %d", version, leastQEMU)
	default:
		return api.Finding{Name: "qemu", State: ok, Detail: "QEMU " + version}
	}
	return f
}

func judgeKVM(p Patient, s signs) api.Finding {
	reason := s.KVM
	if p.Machines != nil {
		reason = p.Machines.KVMReason
	}
	if reason == "" {
		return api.Finding{Name: "kvm", State: ok, Detail: "a guest runs under KVM"}
	}
	f := api.Finding{Name: "kvm", State: warn, Detail: reason + "; machines are emulated, several times slower"}
	if !s.KVMDevice && s.Virtualisation != "" {
		f.Fix = "modprobe " + map[string]string{"vmx": "kvm_intel", "svm": "kvm_amd"}[s.Virtualisation]
	}
	return f
}

func judgeLibvirt(p Patient, s signs) api.Finding {
	f := api.Finding{Name: "libvirt", State: fail}
	switch {
	case p.Hypervisor == nil && p.Machines != nil:
		return api.Finding{Name: "libvirt", State: ok, Detail: "libvirt answers"}
	case !s.Libvirtd:
		f.Detail, f.Fix = "libvirt is not installed", install+"libvirt-daemon-system libvirt-clients"
	default:
		f.Detail, f.Fix = "libvirt does not answer", "systemctl enable --now libvirtd"
		if p.Hypervisor != nil {
			f.Detail += ": " + p.Hypervisor.Error()
		}
	}
	return f
}

func judgeQEMUImg(s signs) api.Finding {
	f := api.Finding{Name: "qemu-img", State: fail, Fix: install + "qemu-utils"}
	switch {
	case s.QEMUImg == "":
		f.Detail = "qemu-img is not installed: no delta can be made"
	case !slices.Contains(s.Formats, "nbd"):
		f.Detail, f.Fix = "this QEMU cannot read NBD exports", install+"qemu-block-extra"
	default:
		_, version := version(s.QEMUImg)
		return api.Finding{Name: "qemu-img", State: ok, Detail: "qemu-img " + version + ", reads NBD exports"}
	}
	return f
}

func judgeGuestfs(s signs) api.Finding {
	if s.Guestfish == "" {
		return api.Finding{Name: "libguestfs", State: fail, Detail: "guestfish is not installed: images cannot be pre-recovered",
			Fix: install + "libguestfs-tools"}
	}
	_, version := version(s.Guestfish)
	return api.Finding{Name: "libguestfs", State: ok, Detail: "guestfish " + version}
}

// judgeKernel: libguestfs boots a kernel of this host, of which it needs the file and the modules.
func judgeKernel(s signs) api.Finding {
	f := api.Finding{Name: "kernel for libguestfs", State: fail}
	for _, k := range s.Kernels {
		if k.Readable && k.Modules {
			return api.Finding{Name: f.Name, State: ok, Detail: k.Path}
		}
	}
	for _, k := range s.Kernels {
		if k.Modules {
			f.Detail, f.Fix = k.Path+" may not be read", "dpkg-statoverride --update --add root root 0644 "+k.Path
			return f
		}
	}
	f.Detail, f.Fix = "no kernel with its modules is installed in /boot", install+"linux-image-cloud-amd64"
	return f
}

func judgeUEFI(p Patient, s signs) api.Finding {
	if s.UEFI || p.Machines != nil && p.Machines.UEFI {
		return api.Finding{Name: "uefi", State: ok, Detail: "firmware for UEFI guests is installed"}
	}
	return api.Finding{Name: "uefi", State: warn, Detail: "no firmware for UEFI guests: only servers with BIOS can be booted", Fix: install + "ovmf"}
}

func judgeAppArmor(p Patient, s signs) api.Finding {
	if !s.AppArmor {
		return api.Finding{Name: "apparmor", State: ok, Detail: "AppArmor does not confine QEMU here"}
	}
	var missing []string
	for _, rule := range p.AppArmor {
		if !slices.Contains(s.AppArmorRules, rule) {
			missing = append(missing, "'"+strings.ReplaceAll(rule, "'", `'\''`)+"'")
		}
	}
	if len(missing) == 0 {
		return api.Finding{Name: "apparmor", State: ok, Detail: "AppArmor lets QEMU read what Muster exports"}
	}
	return api.Finding{Name: "apparmor", State: fail, Detail: "AppArmor does not let QEMU read what Muster exports",
		Fix: fmt.Sprintf("mkdir -p /%s && printf '%%s\\n' %s >> /%s", strings.TrimSuffix(appArmorLocal, "/libvirt-qemu"), strings.Join(missing, " "), appArmorLocal)}
}

// judgeFolders: QEMU runs as a user of its own, which has to pass every folder above a layer.
func judgeFolders(p Patient, s signs) api.Finding {
	if len(s.Closed) > 0 {
		return api.Finding{Name: "folders", State: fail, Detail: fmt.Sprintf("QEMU's user cannot pass %s, which lies above %s", strings.Join(s.Closed, ", "), p.Data),
			Fix: "chmod o+x " + strings.Join(s.Closed, " ")}
	}
	return api.Finding{Name: "folders", State: ok, Detail: "QEMU's user can reach " + p.Data}
}

func judgeMemory(s signs) api.Finding {
	f := api.Finding{Name: "memory", State: ok, Detail: fmt.Sprintf("%s, %s of it available", size(s.Memory), size(s.Available))}
	switch {
	case s.Memory == 0:
		f.State, f.Detail = warn, "cannot read how much memory there is"
	case s.Available < leastMemory:
		f.State, f.Detail = fail, f.Detail+"; a rescue machine needs "+size(leastMemory)
	case s.Available < enoughMemory:
		f.State, f.Detail = warn, f.Detail+"; only small servers will fit"
	}
	return f
}

func judgeCPU(s signs) api.Finding {
	f := api.Finding{Name: "cpu", State: ok, Detail: fmt.Sprintf("%d × %s", s.CPUs, cmp.Or(s.CPUModel, "processor"))}
	if s.CPUs < 2 {
		f.State, f.Detail = warn, f.Detail+"; with one processor tests and captures wait for each other"
	}
	return f
}

func judgeSpace(v volume) api.Finding {
	f := api.Finding{Name: "space for " + v.Use, State: ok, Detail: fmt.Sprintf("%s of %s free at %s", size(v.Free), size(v.Size), v.Path)}
	if v.Size == 0 {
		f.State, f.Detail = warn, "cannot read how much space there is at "+v.Path
		return f
	}
	switch {
	case v.Free < leastSpace:
		f.State, f.Detail = fail, f.Detail+"; it must be "+size(leastSpace)
	case v.Free < enoughSpace || v.Free/(v.Size/100+1) < enoughPercent:
		f.State, f.Detail = warn, f.Detail+"; that will be used up soon"
	}
	if f.State != ok && v.Use == "the store" {
		f.Fix = "muster store collect"
	}
	return f
}

func judgeClock(s signs) api.Finding {
	switch {
	case s.ClockUnknown:
		return api.Finding{Name: "clock", State: warn, Detail: "the kernel does not say whether its clock is synchronised"}
	case !s.ClockSynchronised:
		return api.Finding{Name: "clock", State: warn, Detail: "the clock is not synchronised: measured recovery points depend on it",
			Fix: install + "systemd-timesyncd && timedatectl set-ntp true"}
	}
	return api.Finding{Name: "clock", State: ok, Detail: "the clock is synchronised"}
}

// judgeTracking: changed-block tracking by eBPF needs the kernel's type information. No release uses it yet.
func judgeTracking(s signs) api.Finding {
	if s.BTF {
		return api.Finding{Name: "ebpf", State: ok, Detail: "the kernel carries its types (BTF); used by a later release for servers that are this host"}
	}
	return api.Finding{Name: "ebpf", State: warn, Detail: "the kernel does not carry its types (BTF); nothing needs them in this release"}
}

// version finds the first version number in what a program said of itself.
func version(said string) (major int, text string) {
	for _, word := range strings.FieldsFunc(said, func(r rune) bool { return r == ' ' || r == '(' || r == ')' || r == ',' || r == '\n' }) {
		if n, err := fmt.Sscanf(word, "%d.", &major); n == 1 && err == nil {
			return major, word
		}
	}
	return 0, strings.TrimSpace(said)
}

// size writes bytes for people.
func size(n int64) string {
	if n < gib {
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/gib)
}
