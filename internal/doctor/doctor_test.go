package doctor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/vm"
)

// healthy is a host that lacks nothing.
func healthy() (Patient, signs) {
	p := Patient{Data: "/var/lib/muster", Store: "/srv/store", Machines: &vm.Host{Accelerator: "kvm", UEFI: true}, AppArmor: []string{`"/run/muster/**.sock" rw,`}}
	return p, signs{
		QEMU:    "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022",
		QEMUImg: "qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", Formats: []string{"luks", "nbd", "qcow2"},
		Guestfish: "guestfish 1.48.6\n", Libvirtd: true, KVMDevice: true, Virtualisation: "vmx",
		Kernels: []kernel{{Path: "/boot/vmlinuz-6.1.0-1-amd64", Readable: true, Modules: true}},
		UEFI:    true, AppArmor: true, AppArmorRules: p.AppArmor, Memory: 32 * gib, Available: 16 * gib, CPUs: 8, CPUModel: "Intel(R) Xeon(R)",
		Space: []volume{{"the data folder", "/var/lib/muster", 400 * gib, 300 * gib}, {"the store", "/srv/store", 4000 * gib, 3000 * gib}}, ClockSynchronised: true, BTF: true,
	}
}

func find(t *testing.T, all []api.Finding, name string) api.Finding {
	t.Helper()
	i := slices.IndexFunc(all, func(f api.Finding) bool { return f.Name == name })
	if i < 0 {
		t.Fatalf("no finding %q", name)
	}
	return all[i]
}

func TestAHealthyHostHasNothingToFix(t *testing.T) {
	for _, f := range judge(healthy()) {
		if f.State != ok || f.Fix != "" || f.Detail == "" {
			t.Errorf("%+v", f)
		}
	}
}

func TestWhatIsMissingIsFoundWithTheCommandThatGivesIt(t *testing.T) {
	for _, c := range []struct {
		name, finding, state, fix string
		harm                      func(p *Patient, s *signs)
	}{
		{"no QEMU", "qemu", fail, "apt-get install -y --no-install-recommends qemu-system-x86", func(_ *Patient, s *signs) { s.QEMU = "" }},
		{"old QEMU", "qemu", fail, "qemu-system-x86", func(_ *Patient, s *signs) { s.QEMU = "QEMU emulator version 4.2.1" }},
		{"KVM does not work", "kvm", warn, "", func(p *Patient, _ *signs) { p.Machines.KVMReason = "a guest of one sector hung" }},
		{"KVM not loaded", "kvm", warn, "modprobe kvm_intel", func(p *Patient, s *signs) { p.Machines, s.KVM, s.KVMDevice = nil, "no device", false }},
		{"KVM not loaded on AMD", "kvm", warn, "modprobe kvm_amd", func(p *Patient, s *signs) {
			p.Machines, s.KVM, s.KVMDevice, s.Virtualisation = nil, "no device", false, "svm"
		}},
		{"no virtualisation", "kvm", warn, "", func(p *Patient, s *signs) {
			p.Machines, s.KVM, s.KVMDevice, s.Virtualisation = nil, "no device", false, ""
		}},
		{"no libvirt", "libvirt", fail, "libvirt-daemon-system", func(p *Patient, s *signs) { p.Machines, s.Libvirtd = nil, false }},
		{"libvirt is down", "libvirt", fail, "systemctl enable --now libvirtd", func(p *Patient, _ *signs) {
			p.Machines, p.Hypervisor = nil, errors.New("connection refused")
		}},
		{"no qemu-img", "qemu-img", fail, "qemu-utils", func(_ *Patient, s *signs) { s.QEMUImg = "" }},
		{"QEMU without NBD", "qemu-img", fail, "qemu-block-extra", func(_ *Patient, s *signs) { s.Formats = []string{"qcow2"} }},
		{"no guestfish", "libguestfs", fail, "libguestfs-tools", func(_ *Patient, s *signs) { s.Guestfish = "" }},
		{"no kernel", "kernel for libguestfs", fail, "linux-image-cloud-amd64", func(_ *Patient, s *signs) { s.Kernels = nil }},
		{"kernel without modules", "kernel for libguestfs", fail, "linux-image-cloud-amd64", func(_ *Patient, s *signs) { s.Kernels[0].Modules = false }},
		{"kernel of Ubuntu", "kernel for libguestfs", fail, "dpkg-statoverride --update --add root root 0644 /boot/vmlinuz-6.1.0-1-amd64", func(_ *Patient, s *signs) { s.Kernels[0].Readable = false }},
		{"no OVMF", "uefi", warn, "ovmf", func(p *Patient, s *signs) { p.Machines.UEFI, s.UEFI = false, false }},
		{"AppArmor without our rules", "apparmor", fail, `printf '%s\n' '"/run/muster/**.sock" rw,' >> /etc/apparmor.d/local/abstractions/libvirt-qemu`, func(_ *Patient, s *signs) { s.AppArmorRules = nil }},
		{"a folder QEMU cannot pass", "folders", fail, "chmod o+x /root", func(_ *Patient, s *signs) { s.Closed = []string{"/root"} }},
		{"too little memory", "memory", fail, "", func(_ *Patient, s *signs) { s.Available = gib }},
		{"little memory", "memory", warn, "", func(_ *Patient, s *signs) { s.Available = 3 * gib }},
		{"one processor", "cpu", warn, "", func(_ *Patient, s *signs) { s.CPUs = 1 }},
		{"full store", "space for the store", fail, "muster store collect", func(_ *Patient, s *signs) { s.Space[1].Free = gib }},
		{"filling store", "space for the store", warn, "muster store collect", func(_ *Patient, s *signs) { s.Space[1].Free = 100 * gib }},
		{"full data folder", "space for the data folder", fail, "", func(_ *Patient, s *signs) { s.Space[0].Free = 0 }},
		{"clock not synchronised", "clock", warn, "timedatectl set-ntp true", func(_ *Patient, s *signs) { s.ClockSynchronised = false }},
		{"no BTF", "ebpf", warn, "", func(_ *Patient, s *signs) { s.BTF = false }},
	} {
		p, s := healthy()
		c.harm(&p, &s)
		all := judge(p, s)
		f := find(t, all, c.finding)
		if f.State != c.state || !strings.Contains(f.Fix, c.fix) || (c.fix == "") != (f.Fix == "") {
			t.Errorf("%s: got %s %q, fix %q; want %s, fix %q", c.name, f.State, f.Detail, f.Fix, c.state, c.fix)
		}
		for _, other := range all {
			if other.Name != c.finding && other.State != ok && c.finding != "libvirt" && c.finding != "kvm" {
				t.Errorf("%s: also %+v", c.name, other)
			}
		}
	}
}

// An appliance needs no hypervisor, and what is only needed for single files is no fault of it.
func TestAnApplianceIsNotAskedForAHypervisor(t *testing.T) {
	p := Patient{Appliance: true, Files: func() error { return nil }}
	s := signs{Memory: gib, Available: gib / 2, CPUs: 2, Space: []volume{{"the near store", "/srv", 400 * gib, 300 * gib}}, ClockSynchronised: true}
	for _, f := range judge(p, s) {
		if f.State != ok {
			t.Errorf("%+v", f)
		}
	}
	p.Files = func() error { return errors.New("guestfish is not installed: apt-get install libguestfs-tools") }
	if f := find(t, judge(p, s), "files"); f.State != warn || !strings.Contains(f.Detail, "apt-get install libguestfs-tools") {
		t.Errorf("%+v", f)
	}
}

func TestSignsAreReadFromTheKernelsOwnFiles(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{
		"proc/meminfo":                           "MemTotal:       24689812 kB\nMemFree:  1 kB\nMemAvailable:   23068672 kB\nHugePages_Total:       0\n",
		"proc/cpuinfo":                           "processor\t: 0\nmodel name\t: AMD EPYC 7B13\nflags\t\t: fpu vme svm sse\n\nprocessor\t: 1\nmodel name\t: AMD EPYC 7B13\nflags\t\t: fpu\n",
		"boot/vmlinuz-6.1.0-56-amd64":            "kernel",
		"boot/vmlinuz-6.1.0-99-amd64":            "kernel without modules",
		"lib/modules/6.1.0-56-amd64/dep":         "",
		"sys/module/apparmor/parameters/enabled": "Y\n",
		appArmorLocal:                            "# ours\n  \"/run/muster/**.sock\" rw,\n",
		"sys/kernel/btf/vmlinux":                 "",
		"usr/share/OVMF/OVMF_CODE_4M.fd":         "",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", fakes(t, map[string]string{
		"qemu-system-x86_64": "echo QEMU emulator version 8.0.1",
		"qemu-img":           "[ $1 = --help ] && echo Supported formats: raw nbd || echo qemu-img version 8.0.1",
		"guestfish":          "exit 1",
	}))
	s := look(t.Context(), root, Patient{Data: filepath.Join(root, "later", "data"), Store: root, Machines: &vm.Host{}})
	if s.Memory != 24689812<<10 || s.Available != 23068672<<10 {
		t.Errorf("memory %d, available %d", s.Memory, s.Available)
	}
	if s.CPUModel != "AMD EPYC 7B13" || s.Virtualisation != "svm" {
		t.Errorf("processor %q, %q", s.CPUModel, s.Virtualisation)
	}
	want := []kernel{{"/boot/vmlinuz-6.1.0-56-amd64", true, true}, {"/boot/vmlinuz-6.1.0-99-amd64", true, false}}
	if !slices.Equal(s.Kernels, want) {
		t.Errorf("kernels %+v", s.Kernels)
	}
	if !s.AppArmor || !slices.Contains(s.AppArmorRules, `"/run/muster/**.sock" rw,`) || !s.BTF || !s.UEFI || s.KVMDevice {
		t.Errorf("%+v", s)
	}
	if s.QEMU != "QEMU emulator version 8.0.1\n" || !slices.Equal(s.Formats, []string{"raw", "nbd"}) || s.Guestfish != "" {
		t.Errorf("programs: %q %v %q", s.QEMU, s.Formats, s.Guestfish)
	}
	if len(s.Space) != 2 || s.Space[0].Size == 0 || s.Space[1].Size != s.Space[0].Size {
		t.Errorf("space %+v", s.Space)
	}
}

// fakes makes a folder of programs.
func fakes(t *testing.T, programs map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, script := range programs {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil { //nolint:gosec // it is to be run
			t.Fatal(err)
		}
	}
	return dir
}

func TestFoldersThatQEMUCannotPassAreNamed(t *testing.T) {
	open := t.TempDir()
	shut := filepath.Join(open, "shut")
	if err := os.MkdirAll(filepath.Join(shut, "data"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(shut, 0o700); err != nil {
		t.Fatal(err)
	}
	if got := closed(filepath.Join(shut, "data", "not", "yet")); !slices.Contains(got, shut) || slices.Contains(got, filepath.Join(shut, "data")) {
		t.Errorf("closed: %v", got)
	}
}

func TestKVMIsProbedOnlyWhereNoHypervisorCanBeAsked(t *testing.T) {
	p := Patient{Data: t.TempDir(), ProbeKVM: func(context.Context) string { return "a guest hung" }}
	if s := look(t.Context(), t.TempDir(), p); s.KVM != "a guest hung" {
		t.Errorf("without a hypervisor: %q", s.KVM)
	}
	p.Machines = &vm.Host{}
	if s := look(t.Context(), t.TempDir(), p); s.KVM != "" {
		t.Errorf("with a hypervisor: %q", s.KVM)
	}
}

func TestVersionsAreFoundInWhatProgramsSay(t *testing.T) {
	for said, want := range map[string]string{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)": "7.2.22", "guestfish 1.48.6\n": "1.48.6", "qemu-img version 10.0.2": "10.0.2",
	} {
		if _, got := version(said); got != want {
			t.Errorf("%q: got %q", said, got)
		}
	}
}
