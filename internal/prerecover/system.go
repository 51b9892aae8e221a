package prerecover

import (
	"cmp"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// system finds out which distribution it is and how it starts.
func (s *sight) system() error {
	for _, f := range []string{"/etc/os-release", "/usr/lib/os-release"} {
		text, err := s.text(f)
		if err != nil {
			return err
		}
		if d := parseOSRelease(text); d.ID != "" {
			s.facts.Distro = d
			break
		}
	}
	if s.facts.Distro.ID == "" {
		if err := s.oldRelease(); err != nil {
			return err
		}
	}
	hostname, err := s.text("/etc/hostname")
	if err != nil {
		return err
	}
	for line := range strings.Lines(hostname) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' && plainName(line) {
			s.facts.Hostname = line
			break
		}
	}
	selinux, err := s.text("/etc/selinux/config")
	if err != nil {
		return err
	}
	for line := range strings.Lines(selinux) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "SELINUX="); ok && slices.Contains(whenValues[".selinux"], strings.Trim(v, `"`)) {
			s.facts.SELinux = strings.Trim(v, `"`)
		}
	}
	for _, step := range []func() error{s.init, s.arch, s.network} {
		if err := step(); err != nil {
			return err
		}
	}
	for _, f := range []string{"/etc/crypttab", "/etc/lvm/devices/system.devices", "/etc/lvm/cache/.cache", "/etc/cloud/cloud-init.disabled"} {
		if _, err := s.read(f, maxConfig); err != nil {
			return err
		}
	}
	return nil
}

// oldRelease recognises what is older than os-release.
func (s *sight) oldRelease() error {
	for f, id := range map[string]string{"/etc/redhat-release": "rhel", "/etc/debian_version": "debian", "/etc/SuSE-release": "sles",
		"/etc/alpine-release": "alpine"} {
		text, err := s.text(f)
		if err != nil {
			return err
		}
		if text == "" {
			continue
		}
		s.facts.Distro = dr.Distro{ID: id, Name: clean(text), Version: regexp.MustCompile(`\d+(\.\d+)*`).FindString(text[:min(len(text), 200)])}
		return nil
	}
	return nil
}

var osReleaseRE = regexp.MustCompile(`^[a-z0-9._-]{1,64}$`)

// parseOSRelease reads os-release. What does not look like an identifier is not one.
func parseOSRelease(text string) dr.Distro {
	var d dr.Distro
	n := 0
	for line := range strings.Lines(text) {
		if n++; n > 200 {
			break
		}
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			continue
		}
		if len(value) >= 2 && (value[0] == '"' || value[0] == '\'') && value[len(value)-1] == value[0] {
			value = value[1 : len(value)-1]
		}
		switch key {
		case "ID":
			if v := strings.ToLower(value); osReleaseRE.MatchString(v) {
				d.ID = v
			}
		case "ID_LIKE":
			d.Like = nil
			for _, v := range strings.Fields(strings.ToLower(value)) {
				if osReleaseRE.MatchString(v) && len(d.Like) < 16 {
					d.Like = append(d.Like, v)
				}
			}
		case "VERSION_ID":
			if osReleaseRE.MatchString(value) {
				d.Version = value
			}
		case "PRETTY_NAME":
			d.Name = clean(value)
		}
	}
	return d
}

// init finds out what starts the system.
func (s *sight) init() error {
	for _, f := range []string{"/usr/lib/systemd/systemd", "/lib/systemd/systemd"} {
		if e, err := s.stat(f); err != nil {
			return err
		} else if !e.exists {
			continue
		}
		// A system may have systemd's files and still start with another init.
		st, err := s.g.Lstat(s.ctx, "/sbin/init")
		if err != nil || strings.Contains(st.Link, "systemd") || st.Link == "" && s.openrcOrNone() {
			s.facts.Init = "systemd"
			return nil
		}
	}
	for f, init := range map[string]string{"/etc/runlevels/default": "openrc"} {
		if e, err := s.stat(f); err != nil {
			return err
		} else if e.exists {
			s.facts.Init = init
			return nil
		}
	}
	for _, f := range []string{"/etc/inittab", "/etc/init.d"} {
		if e, err := s.stat(f); err != nil {
			return err
		} else if e.exists {
			s.facts.Init = "sysv"
			return nil
		}
	}
	return nil
}

func (s *sight) openrcOrNone() bool {
	e, err := s.stat("/etc/runlevels/default")
	return err == nil && !e.exists
}

// arch reads for which processor the system is built from a program that every system has.
func (s *sight) arch() error {
	for _, f := range []string{"/bin/true", "/usr/bin/true", "/bin/busybox", "/sbin/init", "/usr/lib/systemd/systemd"} {
		e, err := s.read(f, 4<<20)
		if err != nil {
			return err
		}
		if e.loaded {
			if s.facts.Arch = elfArch(e.content); s.facts.Arch != "" {
				return nil
			}
		}
	}
	return nil
}

// network finds out what configures the network, in the order in which one overrules the other.
func (s *sight) network() error {
	for _, k := range []struct {
		kind, dir, pattern string
	}{
		{"netplan", "/etc/netplan", "*.yaml"},
		{"wicked", "/etc/wicked", "*"},
		{"ifcfg", "/etc/sysconfig/network-scripts", "ifcfg-[!l]*"},
		{"networkmanager", "/etc/NetworkManager/system-connections", "*"},
		{"networkd", "/etc/systemd/network", "*.network"},
		{"ifupdown", "/etc/network", "interfaces"},
	} {
		names, err := s.list(k.dir)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(names, func(n string) bool { ok, _ := path.Match(k.pattern, n); return ok }) {
			s.facts.Network = k.kind
			return nil
		}
	}
	return nil
}

// kernels lists what is installed and reads what the kernel that will boot can drive.
func (s *sight) kernels() error {
	boot, err := s.list("/boot")
	if err != nil {
		return err
	}
	moduleDirs, err := s.list("/lib/modules")
	if err != nil {
		return err
	}
	moduleDirs = slices.DeleteFunc(slices.Clone(moduleDirs), func(n string) bool { return !plainName(n) })
	for _, name := range boot {
		suffix, ok := kernelSuffix(name)
		if !ok || len(s.facts.Kernels) >= maxKernels {
			continue
		}
		k := dr.KernelFacts{Version: kernelVersionOf(suffix, moduleDirs)}
		for _, pattern := range []string{"initrd.img-%s", "initramfs-%s.img", "initrd-%s", "initramfs-%s", "initrd-%s.img"} {
			if i := fmt.Sprintf(pattern, suffix); slices.Contains(boot, i) {
				k.Initramfs = "/boot/" + i
				break
			}
		}
		s.facts.Kernels = append(s.facts.Kernels, k)
	}
	slices.SortFunc(s.facts.Kernels, func(a, b dr.KernelFacts) int { return -compareVersions(a.Version, b.Version) })
	return nil
}

// kernelSuffix takes a file of /boot for a kernel. Rescue kernels are not what boots.
func kernelSuffix(name string) (string, bool) {
	if !plainName(name) || strings.Contains(name, "rescue") || strings.HasSuffix(name, ".old") || strings.HasSuffix(name, ".hmac") {
		return "", false
	}
	for _, prefix := range []string{"vmlinuz-", "vmlinux-", "bzImage-"} {
		if suffix, ok := strings.CutPrefix(name, prefix); ok && suffix != "" {
			return suffix, true
		}
	}
	return "", false
}

// kernelVersionOf finds the version of a kernel that is called by its flavour only, as on Alpine (vmlinuz-lts).
func kernelVersionOf(suffix string, moduleDirs []string) string {
	if slices.Contains(moduleDirs, suffix) {
		return suffix
	}
	for _, d := range moduleDirs {
		if strings.HasSuffix(d, "-"+suffix) {
			return d
		}
	}
	if len(moduleDirs) == 1 && !strings.ContainsAny(suffix, "0123456789") {
		return moduleDirs[0]
	}
	return suffix
}

// compareVersions compares as people do: numbers as numbers.
func compareVersions(a, b string) int {
	for a != "" || b != "" {
		na, ra := cutNumber(a)
		nb, rb := cutNumber(b)
		if na >= 0 && nb >= 0 {
			if c := cmp.Compare(na, nb); c != 0 {
				return c
			}
			a, b = ra, rb
			continue
		}
		if a == "" || b == "" || a[0] != b[0] {
			return cmp.Compare(a, b)
		}
		a, b = a[1:], b[1:]
	}
	return 0
}

func cutNumber(s string) (int, string) {
	i := 0
	for i < len(s) && i < 9 && s[i] >= '0' && s[i] <= '9' {
		i++
	}
	n, err := strconv.Atoi(s[:i])
	if err != nil {
		return -1, s
	}
	return n, s[i:]
}

// readDrivers reads which drivers the kernel that will boot has.
func (s *sight) readDrivers() error {
	i := slices.IndexFunc(s.facts.Kernels, func(k dr.KernelFacts) bool { return k.Version == s.facts.Default })
	if i < 0 {
		return nil
	}
	k := &s.facts.Kernels[i]
	lists := map[string]map[string]bool{}
	for _, f := range []string{"modules.builtin", "modules.dep"} {
		e, err := s.read("/lib/modules/"+k.Version+"/"+f, 8<<20)
		if err != nil {
			return err
		}
		lists[f] = moduleList(e.content)
	}
	early := lists["modules.builtin"]
	k.Modules = onLadder(lists["modules.dep"])
	if k.Initramfs != "" {
		content, err := s.g.Read(s.ctx, k.Initramfs, maxInitramfs)
		if err != nil && s.ctx.Err() != nil {
			return err
		}
		var found map[string]bool
		if err == nil {
			found, err = initramfsModules(content)
		}
		if err != nil {
			s.note("initramfs", k.Initramfs, "it could not be read to its end, and may not boot: %v", err)
		}
		for m := range found {
			early[m] = true
		}
	} else {
		s.note("initramfs", "none", "kernel %s has none: only what is built in counts", k.Version)
	}
	k.Drivers = onLadder(early)
	return nil
}

// services lists what is installed to be started.
func (s *sight) services() error {
	dirs := []string{"/usr/lib/systemd/system", "/lib/systemd/system", "/etc/systemd/system", "/etc/init.d",
		"/etc/systemd/system/sysinit.target.wants", "/etc/systemd/network", "/etc/udev/rules.d", "/etc/cloud", "/usr/lib", "/etc", "/etc/init"}
	if s.facts.Init == "openrc" {
		levels, err := s.list("/etc/runlevels")
		if err != nil {
			return err
		}
		for _, l := range levels[:min(len(levels), 32)] {
			if plainName(l) {
				dirs = append(dirs, "/etc/runlevels/"+l)
			}
		}
	}
	if s.facts.Init == "sysv" {
		for _, l := range "S0123456" {
			dirs = append(dirs, fmt.Sprintf("/etc/rc%c.d", l), fmt.Sprintf("/etc/rc.d/rc%c.d", l))
		}
		dirs = append(dirs, "/etc/rc.d", "/etc/rc.d/init.d")
		if _, err := s.read("/etc/inittab", maxConfig); err != nil {
			return err
		}
	}
	for _, d := range dirs {
		if _, err := s.list(d); err != nil {
			return err
		}
	}
	return nil
}

// firmware finds out how the machine starts.
func (s *sight) firmware() error {
	var bootCode, biosPart bool
	for _, d := range s.view.Disks {
		bootCode = bootCode || d.BootCode
		if d.Table != "" {
			s.facts.PartTable = cmp.Or(s.facts.PartTable, d.Table)
		}
	}
	esp := false
	for _, d := range s.view.Devices {
		esp = esp || d.ESP()
		biosPart = biosPart || d.PartType == partBIOSBoot
	}
	mounted := false
	loaders := 0
	for at := range s.view.Mounts {
		dir := at + "/EFI"
		if s.view.isFolder(dir) {
			mounted = true
			loaders += len(s.efiLoaders(dir))
		}
	}
	grubPC := s.view.isFolder("/boot/grub/i386-pc") || s.view.isFolder("/boot/grub2/i386-pc")
	switch {
	case esp && mounted && loaders == 0:
		esp = false
		s.note("firmware", "", "there is an EFI system partition, but no boot loader on it")
	case esp && bootCode && (biosPart || grubPC || s.facts.PartTable == "dos"):
		s.facts.Firmware = dr.BIOS // both would do
		s.note("firmware", "bios", "the image is made to start with BIOS and with UEFI")
		return nil
	}
	switch {
	case esp:
		s.facts.Firmware = dr.UEFI
	case bootCode:
		s.facts.Firmware = dr.BIOS
	}
	return nil
}

// efiLoaders lists the programs two levels below the ESP's EFI folder.
func (s *sight) efiLoaders(dir string) []string {
	var out []string
	for _, vendor := range s.view.names(dir) {
		for _, f := range s.view.names(dir + "/" + vendor) {
			if strings.HasSuffix(strings.ToLower(f), ".efi") {
				out = append(out, dir+"/"+vendor+"/"+f)
			}
		}
	}
	return out
}
