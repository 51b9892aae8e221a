package prerecover

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
)

const (
	fstabPath    = "/etc/fstab"
	crypttabPath = "/etc/crypttab"
	agentPath    = "/usr/lib/muster/muster-guest"
)

// tab reads a table that is there.
func (p *planner) tab(name string) ([]fstabLine, bool) {
	content, ok := p.View.content(name)
	if !ok || !isText(content) {
		return nil, false
	}
	lines := parseTab(string(content))
	if len(lines) > maxTabLines {
		p.note("edit", name, "it has more than %d lines and is left as it is", maxTabLines)
		return nil, false
	}
	return lines, true
}

// fstabByUUID names file systems by what is on them and not by where the server had the disk.
func (p *planner) fstabByUUID(Step) error {
	lines, ok := p.tab(fstabPath)
	if !ok {
		return nil
	}
	var changed []string
	for i := range lines {
		e, ok := lines[i].entry()
		if !ok || !strings.HasPrefix(e.spec, "/dev/") {
			continue
		}
		if uuid := p.uuidFor(e); uuid != "" {
			lines[i].set(0, "UUID="+uuid)
			changed = append(changed, e.spec)
		}
	}
	return p.write("replace", fstabPath, []byte(joinTab(lines)), 0, p.because(changed, "is the name the server's kernel gave a disk; on other hardware it may be another's"))
}

// because begins the overlay's reason with what it is about.
func (p *planner) because(what []string, why string) string {
	if len(what) == 0 {
		return ""
	}
	if len(what) > 6 {
		what = append(slices.Clone(what[:6]), "…")
	}
	for i := range what {
		what[i] = printable(what[i])
	}
	return strings.Join(what, ", ") + " " + why
}

// uuidFor gives the UUID with which an entry's device name is to be replaced, "" to leave it.
func (p *planner) uuidFor(e mountEntry) string {
	n := namer{p.View, p.Inventory}
	d, stable, found := n.find(e.spec)
	switch {
	case found && stable:
		return ""
	case found && d.UUID != "":
		return d.UUID
	case found || !strings.HasPrefix(e.spec, "/dev/disk/"):
		return ""
	}
	// By id or path: these follow the hardware. What was mounted there on the server says what is meant.
	for _, f := range p.Inventory.Filesystems {
		if f.Mount == e.mount && f.UUID != "" {
			if d, _, ok := n.byTag("UUID", f.UUID); ok {
				return d.UUID
			}
		}
	}
	return ""
}

// crypttabByUUID does the same for encrypted volumes.
func (p *planner) crypttabByUUID(Step) error {
	lines, ok := p.tab(crypttabPath)
	if !ok {
		return nil
	}
	var changed []string
	for i := range lines {
		spec := lines[i].field(1)
		if !strings.HasPrefix(spec, "/dev/") {
			continue
		}
		if d, stable, found := (namer{p.View, p.Inventory}).find(spec); found && !stable && d.UUID != "" {
			lines[i].set(1, "UUID="+d.UUID)
			changed = append(changed, spec)
		}
	}
	return p.write("replace", crypttabPath, []byte(joinTab(lines)), 0, p.because(changed, "is the name the server's kernel gave a disk"))
}

// cmdlineByUUID names the root and the swap to resume from by UUID where a kernel is told. Only an initramfs understands
// that.
func (p *planner) cmdlineByUUID(Step) error {
	for _, k := range p.Facts.Kernels {
		if k.Initramfs == "" {
			p.note("edit", "kernel arguments", "kernel %s has no initramfs and cannot find a disk by UUID; root= stays", k.Version)
			return nil
		}
	}
	if len(p.Facts.Kernels) == 0 {
		return nil
	}
	return p.everyKernel("", func(args []string) []string {
		for i, a := range args {
			key, spec, ok := strings.Cut(a, "=")
			if !ok || key != "root" && key != "resume" || !strings.HasPrefix(spec, "/dev/") {
				continue
			}
			if d, stable, found := (namer{p.View, p.Inventory}).find(spec); found && !stable && d.UUID != "" {
				args[i] = key + "=UUID=" + d.UUID
			}
		}
		return args
	})
}

// kernelArgs adds arguments to every kernel that does not have them.
func (p *planner) kernelArgs(s Step) error {
	return p.everyKernel("", func(args []string) []string {
		for _, a := range s.Args {
			if !slices.ContainsFunc(args, func(has string) bool { return has == a || argSubject(has) == argSubject(a) }) {
				args = append(args, a)
			}
		}
		return args
	})
}

// argSubject is what an argument is about: a console may be given more than once, for different devices.
func argSubject(a string) string {
	if strings.HasPrefix(a, "console=") {
		a, _, _ = strings.Cut(a, ",")
		return a
	}
	key, _, _ := strings.Cut(a, "=")
	return key
}

func (p *planner) everyKernel(reason string, change func([]string) []string) error {
	for _, f := range bootConfigs(p.View) {
		content, _ := p.View.content(f)
		if !isText(content) {
			continue
		}
		if err := p.write("replace", f, []byte(editArgs(f, string(content), change)), 0, reason); err != nil {
			return err
		}
	}
	return nil
}

// fstabAbsent lets a system start without the file systems that are not there.
func (p *planner) fstabAbsent(Step) error {
	lines, ok := p.tab(fstabPath)
	if !ok {
		return nil
	}
	var changed []string
	for i := range lines {
		e, ok := lines[i].entry()
		if !ok || e.mount == "/" || e.virtual() && !e.network() || e.has("noauto") || e.has("nofail") {
			continue
		}
		why := "comes over the network"
		if !e.network() {
			if _, _, found := (namer{p.View, p.Inventory}).find(e.spec); found {
				continue
			}
			why = "is not among the disks"
		}
		options := append(slices.DeleteFunc(slices.Clone(e.options), func(o string) bool { return o == "defaults" }), "nofail")
		if p.Facts.Init == "systemd" && !slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "x-systemd.device-timeout") }) {
			options = append(options, "x-systemd.device-timeout=10s")
		}
		text := strings.Join(options, ",")
		if len(lines[i].fields) < 3 {
			continue // no type: the entry is no entry
		}
		if len(lines[i].fields) == 3 {
			lines[i].set(2, lines[i].raw[lines[i].fields[2][0]:lines[i].fields[2][1]]+" "+text)
		} else {
			lines[i].set(3, strings.ReplaceAll(text, " ", `\040`))
		}
		changed = append(changed, e.mount+" ("+why+")")
	}
	return p.write("replace", fstabPath, []byte(joinTab(lines)), 0, p.because(changed, "must not keep the system from starting"))
}

// nicNameRE is what Linux calls an interface, kept to what cannot mean anything else in a configuration file.
var nicNameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)

// pinNICs keeps the names of network cards, which would follow the slot they sit in.
func (p *planner) pinNICs(Step) error {
	if p.Facts.Init == "systemd" {
		for _, n := range p.NICs {
			if n.Name == "" {
				continue
			}
			text := fmt.Sprintf("# The server's own name for the card with this address.\n[Match]\nMACAddress=%s\nType=ether\n\n[Link]\nName=%s\n", n.MAC, n.Name)
			reason := fmt.Sprintf("%s keeps its name, with which the network is configured", n.Name)
			if err := p.write("write", "/etc/systemd/network/10-muster-"+n.Name+".link", []byte(text), 0o644, reason); err != nil {
				return err
			}
		}
		return nil
	}
	const rules = "/etc/udev/rules.d/70-persistent-net.rules"
	if !p.View.isFolder(path.Dir(rules)) {
		return nil
	}
	content, _ := p.View.content(rules)
	text := string(content)
	for _, n := range p.NICs {
		if n.Name == "" || strings.Contains(strings.ToLower(text), n.MAC) {
			continue
		}
		text += fmt.Sprintf("SUBSYSTEM==\"net\", ACTION==\"add\", DRIVERS==\"?*\", ATTR{address}==\"%s\", ATTR{type}==\"1\", NAME=\"%s\"\n", n.MAC, n.Name)
	}
	if text == string(content) {
		return nil
	}
	return p.write("write", rules, []byte(text), 0o644, "network cards keep their names")
}

// espFallback puts the boot loader where a firmware looks that has never heard of this system: the entry that names it
// was kept in the server's own firmware.
func (p *planner) espFallback(Step) error {
	for _, at := range slices.Sorted(maps.Keys(p.View.Mounts)) {
		dir := path.Join(at, "EFI")
		if !p.View.isFolder(dir) || fallbackThere(p.View, dir) {
			continue
		}
		vendor := p.loaderVendor(dir)
		if vendor == "" {
			p.note("edit", dir, "there is no boot loader to put on the fallback path")
			continue
		}
		if err := p.copyFallback(dir, vendor); err != nil {
			return err
		}
	}
	return nil
}

// loaders are what can stand on the fallback path, best first.
var loaders = []string{"shimx64.efi", "grubx64.efi", "systemd-bootx64.efi", "grub.efi"}

// loaderVendor chooses the folder of the boot loader: the distribution's own if there are several.
func (p *planner) loaderVendor(dir string) string {
	best := ""
	for _, v := range p.View.names(dir) {
		if strings.EqualFold(v, "BOOT") || p.loaderIn(dir+"/"+v) == "" {
			continue
		}
		if best == "" || strings.EqualFold(v, p.Facts.Distro.ID) {
			best = v
		}
	}
	return best
}

func (p *planner) loaderIn(dir string) string {
	for _, want := range loaders {
		for _, n := range p.View.names(dir) {
			if _, read := p.View.content(dir + "/" + n); read && strings.EqualFold(n, want) {
				return n
			}
		}
	}
	return ""
}

func (p *planner) copyFallback(dir, vendor string) error {
	boot := dir + "/BOOT"
	for _, b := range p.View.names(dir) {
		if strings.EqualFold(b, "BOOT") {
			boot = dir + "/" + b
		}
	}
	from := dir + "/" + vendor
	loader := p.loaderIn(from)
	if err := p.copy(from+"/"+loader, boot+"/BOOTX64.EFI", "the firmware of another machine has no entry for "+vendor+"; it tries this path"); err != nil {
		return err
	}
	for _, n := range p.View.names(from) {
		with := fallbackName(n)
		if with == "" || n == loader || strings.HasPrefix(with, "shim") || p.View.exists(boot+"/"+n) {
			continue
		}
		if _, read := p.View.content(from + "/" + n); !read {
			continue
		}
		if err := p.copy(from+"/"+n, boot+"/"+n, "the boot loader looks for it beside itself"); err != nil {
			return err
		}
	}
	return nil
}

// installAgent puts the test agent into the image.
func (p *planner) installAgent(Step) error {
	if len(p.Agent) == 0 {
		return errNoAgent
	}
	if len(p.Agent) > maxAgent {
		return fmt.Errorf("the test agent is larger than %d bytes", maxAgent)
	}
	return p.write("write", agentPath, p.Agent, 0o755, "")
}
