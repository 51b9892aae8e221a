package prerecover

import (
	"path"
	"regexp"
	"slices"
	"strings"
)

// maxBootFiles is how many files of boot loader configuration are looked at.
const maxBootFiles = 128

// boot reads the configuration of the boot loader and finds out which kernel boots.
func (s *sight) boot() error {
	files := []string{"/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/boot/grub/menu.lst", "/boot/grub/grub.conf", "/etc/grub.conf",
		"/boot/extlinux/extlinux.conf", "/boot/extlinux.conf", "/extlinux.conf", "/boot/syslinux/syslinux.cfg", "/syslinux.cfg",
		"/boot/grub/grubenv", "/boot/grub2/grubenv", "/etc/kernel/cmdline"}
	for _, dir := range []string{"/boot/loader/entries", "/boot/efi/loader/entries", "/efi/loader/entries"} {
		names, err := s.list(dir)
		if err != nil {
			return err
		}
		for _, n := range names {
			if plainName(n) && strings.HasSuffix(n, ".conf") && len(files) < maxBootFiles {
				files = append(files, dir+"/"+n)
			}
		}
	}
	more, err := s.esp()
	if err != nil {
		return err
	}
	for _, f := range append(files, more...) {
		if _, err := s.read(f, maxConfig); err != nil {
			return err
		}
	}
	if err := s.bootFolders(); err != nil {
		return err
	}
	s.defaultKernel()
	return s.readDrivers()
}

func (s *sight) bootFolders() error {
	for _, d := range []string{"/boot/grub/i386-pc", "/boot/grub2/i386-pc"} {
		if _, err := s.stat(d); err != nil {
			return err
		}
	}
	return nil
}

// esp lists what lies on the EFI system partition, mounting it where the system keeps it if fstab does not say so, and
// gives the boot loader configurations on it.
func (s *sight) esp() (configs []string, err error) {
	if err := s.mountESP(); err != nil {
		return nil, err
	}
	for _, at := range []string{"/boot/efi", "/efi", "/boot"} {
		if s.view.Mounts[at] == "" {
			continue
		}
		dir := at + "/EFI"
		vendors, err := s.list(dir)
		if err != nil {
			return nil, err
		}
		for _, v := range vendors[:min(len(vendors), 32)] {
			if !plainName(v) {
				continue
			}
			names, err := s.list(dir + "/" + v)
			if err != nil {
				return nil, err
			}
			for _, n := range names {
				if strings.EqualFold(n, "grub.cfg") {
					configs = append(configs, dir+"/"+v+"/"+n)
				}
			}
		}
		if err := s.readLoaders(dir, vendors); err != nil {
			return nil, err
		}
	}
	return configs, nil
}

func (s *sight) mountESP() error {
	i := slices.IndexFunc(s.view.Devices, func(d Device) bool { return d.ESP() && d.Type == "vfat" })
	if i < 0 {
		return nil
	}
	esp := s.view.Devices[i].Name
	for _, d := range s.view.Mounts {
		if d == esp {
			return nil
		}
	}
	for _, at := range []string{"/boot/efi", "/efi"} {
		if e, err := s.stat(at); err != nil {
			return err
		} else if !e.exists || !e.stat.Mode.IsDir() || s.view.Mounts[at] != "" {
			continue
		}
		delete(s.view.entries, at)
		if err := s.mount(s.view.Devices[i], at, ""); err != nil {
			s.note("mount", at, "the EFI system partition could not be mounted: %v", err)
			return s.ctx.Err()
		}
		s.view.Mounts[at] = esp
		return nil
	}
	return nil
}

// readLoaders reads the boot loaders if there is none on the fallback path: then they are copied there.
func (s *sight) readLoaders(dir string, vendors []string) error {
	if fallbackThere(s.view, dir) {
		return nil
	}
	for _, v := range vendors {
		if strings.EqualFold(v, "BOOT") || !plainName(v) {
			continue
		}
		for _, n := range s.view.names(dir + "/" + v) {
			if fallbackName(n) != "" {
				if _, err := s.read(dir+"/"+v+"/"+n, maxBinary); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// fallbackThere says whether the path every UEFI firmware tries has a loader.
func fallbackThere(v *View, dir string) bool {
	for _, b := range v.names(dir) {
		if strings.EqualFold(b, "BOOT") && slices.ContainsFunc(v.names(dir+"/"+b), func(n string) bool { return strings.EqualFold(n, "BOOTX64.EFI") }) {
			return true
		}
	}
	return false
}

// fallbackName says what a vendor's file is called on the fallback path, beside what plays the part of BOOTX64.EFI.
func fallbackName(name string) string {
	switch n := strings.ToLower(name); n {
	case "shimx64.efi", "grubx64.efi", "mmx64.efi", "systemd-bootx64.efi", "grub.cfg", "grub.efi":
		return n
	}
	return ""
}

var linuxLineRE = regexp.MustCompile(`(?m)^[ \t]*(?:linux(?:16|efi)?|kernel|KERNEL|LINUX)[ \t]+(\S+)`)

// defaultKernel finds out which kernel boots: what the boot loader remembers, else its first entry, else the newest.
func (s *sight) defaultKernel() {
	if len(s.facts.Kernels) == 0 {
		s.note("kernel", "", "no kernel was found in /boot")
		return
	}
	installed := func(text string) string {
		for _, k := range s.facts.Kernels { // newest first, so that the longest of two that match is not missed
			suffix := path.Base(k.Initramfs)
			if strings.Contains(text, k.Version) || suffix != "." && strings.HasSuffix(text, suffix[strings.IndexByte(suffix, '-')+1:]) {
				return k.Version
			}
		}
		return ""
	}
	for _, f := range []string{"/boot/grub2/grubenv", "/boot/grub/grubenv"} {
		content, _ := s.view.content(f)
		for line := range strings.Lines(string(content)) {
			if saved, ok := strings.CutPrefix(line, "saved_entry="); ok {
				if v := installed(strings.TrimSpace(saved)); v != "" {
					s.facts.Default = v
					s.note("kernel", v, "the boot loader remembers it as its choice")
					return
				}
			}
		}
	}
	for _, f := range []string{"/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/boot/extlinux.conf", "/boot/extlinux/extlinux.conf"} {
		content, ok := s.view.content(f)
		if !ok {
			continue
		}
		if m := linuxLineRE.FindSubmatch(content); m != nil {
			if v := installed(path.Base(string(m[1]))); v != "" {
				s.facts.Default = v
				s.note("kernel", v, "it is the first entry of %s", f)
				return
			}
		}
	}
	s.facts.Default = s.facts.Kernels[0].Version
	s.note("kernel", s.facts.Default, "it is the newest that is installed")
}

// bootConfigs lists the files in which kernels get their arguments.
func bootConfigs(v *View) []string {
	var out []string
	for name, e := range v.entries {
		base := path.Base(name)
		if !e.loaded || !e.exists || e.isLink {
			continue
		}
		switch {
		case strings.EqualFold(base, "grub.cfg"), base == "menu.lst", base == "grub.conf", base == "extlinux.conf", base == "syslinux.cfg",
			strings.HasSuffix(path.Dir(name), "/loader/entries"):
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// The lines on which a kernel gets its arguments: after the kernel's path in GRUB's files, after options in a boot loader
// entry, after append in extlinux's and syslinux's.
var (
	grubArgsRE  = regexp.MustCompile(`^([ \t]*(?:linux(?:16|efi)?|kernel)[ \t]+(\S+)(?:[ \t]+|$))(.*)$`)
	entryArgsRE = regexp.MustCompile(`^([ \t]*(options)(?:[ \t]+|$))(.*)$`)
	linuxArgsRE = regexp.MustCompile(`^([ \t]*((?i:append))(?:[ \t]+|$))(.*)$`)
	notLinuxRE  = regexp.MustCompile(`(?i)xen|memtest`)
)

func argsRE(file string) *regexp.Regexp {
	switch {
	case strings.HasSuffix(path.Dir(file), "/loader/entries"):
		return entryArgsRE
	case strings.HasSuffix(file, "linux.conf"), strings.HasSuffix(file, "linux.cfg"):
		return linuxArgsRE
	}
	return grubArgsRE
}

// editArgs changes the arguments of every kernel in a boot loader's configuration, leaving all else as it is.
func editArgs(file, text string, change func(args []string) []string) string {
	re := argsRE(file)
	var b strings.Builder
	for raw := range strings.Lines(text) {
		line := strings.TrimRight(raw, "\r\n")
		m := re.FindStringSubmatch(line)
		if m == nil || notLinuxRE.MatchString(m[2]) {
			b.WriteString(raw)
			continue
		}
		args := strings.Fields(m[3])
		changed := change(slices.Clone(args))
		if slices.Equal(args, changed) {
			b.WriteString(raw)
			continue
		}
		b.WriteString(strings.TrimRight(m[1], " \t") + " " + mergeArgs(m[3], args, changed) + raw[len(line):])
	}
	return b.String()
}

// mergeArgs keeps the blanks between arguments that stay, and adds new ones at the end.
func mergeArgs(tail string, before, after []string) string {
	if len(after) < len(before) {
		return strings.Join(after, " ")
	}
	for i, old := range before {
		if old != after[i] {
			tail = replaceWord(tail, old, after[i])
		}
	}
	tail = strings.TrimRight(tail, " \t")
	for _, a := range after[len(before):] {
		tail = strings.TrimLeft(tail+" "+a, " ")
	}
	return tail
}

// replaceWord replaces the first word of a line that is exactly old.
func replaceWord(line, old, with string) string {
	for i := 0; ; {
		j := strings.Index(line[i:], old)
		if j < 0 {
			return line
		}
		from, to := i+j, i+j+len(old)
		if (from == 0 || strings.IndexByte(" \t", line[from-1]) >= 0) && (to == len(line) || strings.IndexByte(" \t", line[to]) >= 0) {
			return line[:from] + with + line[to:]
		}
		i = to
	}
}
