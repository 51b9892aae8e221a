package prerecover

import (
	"crypto/sha256"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// Limits are what this silo can give and what the server's owner asked for.
type Limits struct {
	Disks             int    // of the image
	MaxMemory, Memory int    // MiB: the most a machine may have, and what was asked for; 0: no limit, as the inventory says
	MaxCPUs, CPUs     int    // likewise
	UEFI              bool   // there is firmware for UEFI guests
	Seed              string // from which addresses are made up that nothing gives
}

// Bounds of what is decided.
const (
	minMemory     = 512  // MiB
	defaultMemory = 2048 // MiB, for an image without an inventory
	defaultCPUs   = 2
	maxNICs       = 16
)

// Decide chooses the virtual hardware on which the guest boots with the fewest edits. It is a function of its arguments.
// A guest that nothing here can drive is ErrNotRescuable.
func Decide(facts dr.Facts, inv dr.Inventory, limits Limits) (dr.Hardware, error) {
	d := decider{facts: facts, inv: inv, limits: limits}
	for _, choose := range []func() error{d.arch, d.firmware, d.machine, d.disks, d.nics, d.cpu, d.memory, d.identity, d.channel} {
		if err := choose(); err != nil {
			return dr.Hardware{}, fmt.Errorf("choose hardware: %w", err)
		}
	}
	return d.hw, nil
}

type decider struct {
	facts  dr.Facts
	inv    dr.Inventory
	limits Limits
	hw     dr.Hardware
}

func (d *decider) because(what, chosen, format string, args ...any) {
	d.hw.Reasons = append(d.hw.Reasons, dr.Decision{What: what, Chosen: chosen, Reason: fmt.Sprintf(format, args...)})
}

// kernel is the one that will boot.
func (d *decider) kernel() dr.KernelFacts {
	for _, k := range d.facts.Kernels {
		if k.Version == d.facts.Default {
			return k
		}
	}
	if len(d.facts.Kernels) > 0 {
		return d.facts.Kernels[0]
	}
	return dr.KernelFacts{}
}

func (d *decider) arch() error {
	switch d.facts.Arch {
	case "x86_64", "i386", "":
		return nil
	}
	return fmt.Errorf("%w: the system is built for %s and this release runs x86 only", ErrNotRescuable, d.facts.Arch)
}

func (d *decider) firmware() error {
	d.hw.Firmware = d.facts.Firmware
	switch {
	case d.inv.Firmware == dr.BIOS || d.inv.Firmware == dr.UEFI:
		d.hw.Firmware = d.inv.Firmware
		d.because("firmware", string(d.hw.Firmware), "the server itself started with it")
	case d.hw.Firmware == dr.UEFI:
		d.because("firmware", "uefi", "the image has an EFI system partition with a boot loader and no boot code for BIOS")
	case d.hw.Firmware == dr.BIOS:
		d.because("firmware", "bios", "the image has boot code in its first sector")
	default:
		return fmt.Errorf("%w: no disk has a boot loader for BIOS or UEFI", ErrNotRescuable)
	}
	if d.hw.Firmware == dr.UEFI && !d.limits.UEFI {
		return fmt.Errorf("the server starts with UEFI and this silo has no such firmware: install ovmf")
	}
	return nil
}

func (d *decider) machine() error {
	d.hw.Machine = "q35"
	major, minor, ok := kernelVersion(d.kernel().Version)
	switch {
	case ok && (major < 2 || major == 2 && minor < 6), d.facts.Arch == "i386" && ok && major < 3:
		d.hw.Machine = "pc"
		d.because("machine", "pc", "kernel %s is too old for PCI Express", d.kernel().Version)
	default:
		d.because("machine", "q35", "PCI Express, as every kernel since 2.6 expects")
	}
	return nil
}

// kernelVersion reads the first two numbers of a kernel's version; 2.6 counts as 2 and 6.
func kernelVersion(v string) (major, minor int, ok bool) {
	parts := strings.SplitN(v, ".", 3)
	if len(parts) < 2 {
		return 0, 0, false
	}
	major, err := strconv.Atoi(parts[0])
	if err != nil {
		return 0, 0, false
	}
	digits := parts[1]
	if i := strings.IndexFunc(digits, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = digits[:i]
	}
	minor, err = strconv.Atoi(digits)
	return major, minor, err == nil
}

func (d *decider) disks() error {
	if err := d.diskBus(); err != nil {
		return err
	}
	n := max(d.limits.Disks, 1)
	boot := max(slices.IndexFunc(d.inv.Disks, func(i dr.InventoryDisk) bool { return i.Boot }), 0)
	for i := range n {
		var disk dr.HWDisk
		if i < len(d.inv.Disks) {
			disk.Serial = clean(d.inv.Disks[i].Serial)
			disk.WWN = clean(d.inv.Disks[i].WWN)
		}
		disk.Boot = i == boot
		d.hw.Disks = append(d.hw.Disks, disk)
	}
	if len(d.inv.Disks) > 0 {
		d.because("disk identity", fmt.Sprintf("%d disks", n), "serial numbers as the server's own, so that names by id stay")
	}
	return nil
}

func (d *decider) diskBus() error {
	kernel := d.kernel()
	if kernel.Version == "" {
		d.hw.DiskBus = dr.BusSATA
		d.because("disk bus", string(dr.BusSATA), "no kernel was found in the image; SATA is what most systems can drive")
		return nil
	}
	family, source := d.sourceDisk()
	var fits []rung
	for _, r := range diskLadder {
		if len(missing(r.needs, kernel.Drivers)) == 0 {
			fits = append(fits, r)
		}
	}
	if len(fits) == 0 {
		return fmt.Errorf("%w: neither the initramfs of kernel %s nor the kernel itself has a driver for any disk this silo can offer "+
			"(it has: %s); boot the server once with a generic initramfs, or rebuild it with virtio and ahci",
			ErrNotRescuable, kernel.Version, orNone(kernel.Drivers))
	}
	where := "in the initramfs of " + kernel.Version + " or built in"
	chosen := fits[0]
	reason := fmt.Sprintf("%s: %s; the highest rung the kernel can drive", needNames(chosen.needs), where)
	if i := slices.IndexFunc(fits, func(r rung) bool { return r.bus == source }); i >= 0 {
		chosen = fits[i]
		reason = fmt.Sprintf("the server's own kind of disk; %s: %s", needNames(chosen.needs), where)
	} else if i := slices.IndexFunc(fits, func(r rung) bool { return r.family == family }); i >= 0 {
		chosen = fits[i]
		reason = fmt.Sprintf("its disks are called %s… as on the server; %s: %s", family, needNames(chosen.needs), where)
	}
	d.hw.DiskBus = chosen.bus
	d.because("disk bus", string(chosen.bus), "%s", reason)
	return nil
}

// sourceDisk says what the boot disk was called on the server and which rung is the same kind of disk.
func (d *decider) sourceDisk() (family string, bus dr.DiskBus) {
	if len(d.inv.Disks) == 0 {
		return "", ""
	}
	disk := d.inv.Disks[max(slices.IndexFunc(d.inv.Disks, func(i dr.InventoryDisk) bool { return i.Boot }), 0)]
	name, _, _ := strings.Cut(strings.TrimPrefix(disk.Name, "/dev/"), "/")
	for _, f := range []string{"nvme", "vd", "sd", "hd"} {
		if strings.HasPrefix(name, f) && len(name) > len(f) {
			family = f
		}
	}
	switch strings.ToLower(disk.Transport) {
	case "nvme":
		return family, dr.BusNVMe
	case "virtio":
		if family == "sd" {
			return family, dr.BusVirtioSCSI
		}
		return family, dr.BusVirtio
	case "sata", "ata":
		return family, dr.BusSATA
	case "ide":
		return family, dr.BusIDE
	}
	switch family {
	case "nvme":
		return family, dr.BusNVMe
	case "vd":
		return family, dr.BusVirtio
	}
	return family, ""
}

func (d *decider) nics() error {
	kernel := d.kernel()
	have := append(slices.Clone(kernel.Modules), kernel.Drivers...)
	d.hw.NICModel = dr.NICE1000
	reason := "no driver for a better card was found"
	for _, r := range nicLadder {
		if len(missing(r.needs, have)) == 0 {
			d.hw.NICModel = r.model
			reason = fmt.Sprintf("%s: among the modules of %s", needNames(r.needs), kernel.Version)
			break
		}
	}
	seen := map[string]bool{}
	for _, n := range d.inv.NICs {
		if !n.Physical() || len(d.hw.NICs) >= maxNICs {
			continue
		}
		mac := n.MAC
		if n.Permanent != "" {
			mac = n.Permanent
		}
		hw, err := net.ParseMAC(mac)
		if err != nil || len(hw) != 6 || hw[0]&1 != 0 || hw.String() == "00:00:00:00:00:00" || seen[hw.String()] {
			continue
		}
		seen[hw.String()] = true
		nic := dr.HWNIC{MAC: hw.String()}
		if nicNameRE.MatchString(n.Name) {
			nic.Name = n.Name
		}
		d.hw.NICs = append(d.hw.NICs, nic)
	}
	if len(d.inv.NICs) == 0 && len(d.inv.Disks) == 0 || d.inv.Taken.IsZero() && len(d.hw.NICs) == 0 {
		sum := sha256.Sum256([]byte("nic " + d.limits.Seed))
		mac := net.HardwareAddr{0x52, 0x54, 0x00, sum[0], sum[1], sum[2]}
		d.hw.NICs = []dr.HWNIC{{MAC: mac.String()}}
		d.because("network cards", mac.String(), "the image came without an inventory; one card with an address of its own")
	} else {
		d.because("network cards", strconv.Itoa(len(d.hw.NICs)), "as many as the server has, with the same addresses")
	}
	d.because("network card model", string(d.hw.NICModel), "%s", reason)
	return nil
}

func (d *decider) cpu() error {
	major, _ := strconv.Atoi(strings.SplitN(d.facts.Distro.Version, ".", 2)[0])
	el := slices.Contains([]string{"rhel", "rocky", "almalinux", "centos", "ol", "eurolinux", "circle"}, d.facts.Distro.ID) ||
		slices.Contains(d.facts.Distro.Like, "rhel")
	suse := strings.HasPrefix(d.facts.Distro.ID, "sles") || d.facts.Distro.ID == "sled"
	switch {
	case el && major >= 10:
		d.hw.CPULevel = 3
	case el && major == 9, suse && major >= 16:
		d.hw.CPULevel = 2
	}
	if d.hw.CPULevel > 0 {
		d.because("processor", fmt.Sprintf("x86-64-v%d", d.hw.CPULevel), "%s %s is built for it", d.facts.Distro.ID, d.facts.Distro.Version)
	} else {
		d.because("processor", "any", "%s makes no demand", orUnknown(d.facts.Distro.ID))
	}
	d.hw.CPUs = defaultCPUs
	why := "the image came without an inventory"
	switch {
	case d.limits.CPUs > 0:
		d.hw.CPUs, why = d.limits.CPUs, "asked for in the server's settings"
	case d.inv.CPU.Count > 0:
		d.hw.CPUs, why = d.inv.CPU.Count, "as the server has"
	}
	if d.limits.MaxCPUs > 0 && d.hw.CPUs > d.limits.MaxCPUs {
		why = fmt.Sprintf("%d would be %s, but the silo's limit is %d", d.hw.CPUs, why, d.limits.MaxCPUs)
		d.hw.CPUs = d.limits.MaxCPUs
	}
	d.because("processors", strconv.Itoa(d.hw.CPUs), "%s", why)
	return nil
}

func (d *decider) memory() error {
	d.hw.Memory = defaultMemory
	why := "the image came without an inventory"
	switch {
	case d.limits.Memory > 0:
		d.hw.Memory, why = d.limits.Memory, "asked for in the server's settings"
	case d.inv.Memory > 0:
		d.hw.Memory, why = int(min((d.inv.Memory+1<<20-1)>>20, 4<<20)), "as the server has"
	}
	if d.limits.MaxMemory > 0 && d.hw.Memory > d.limits.MaxMemory {
		why = fmt.Sprintf("%d would be %s, but the silo's limit is %d", d.hw.Memory, why, d.limits.MaxMemory)
		d.hw.Memory = d.limits.MaxMemory
	}
	if d.hw.Memory < minMemory {
		why = fmt.Sprintf("%d would be %s, but nothing boots reliably in less than %d", d.hw.Memory, why, minMemory)
		d.hw.Memory = minMemory
	}
	d.because("memory", fmt.Sprintf("%d MiB", d.hw.Memory), "%s", why)
	return nil
}

func (d *decider) identity() error {
	s := &d.inv.SMBIOS
	d.hw.SMBIOS = dr.SMBIOS{
		UUID: clean(s.UUID), Manufacturer: clean(s.Manufacturer), Product: clean(s.Product), Version: clean(s.Version),
		Serial: clean(s.Serial), SKU: clean(s.SKU), Family: clean(s.Family), BIOSVendor: clean(s.BIOSVendor),
		BIOSVersion: clean(s.BIOSVersion), BIOSDate: clean(s.BIOSDate), BoardVendor: clean(s.BoardVendor),
		BoardProduct: clean(s.BoardProduct), BoardSerial: clean(s.BoardSerial), ChassisAsset: clean(s.ChassisAsset),
		ChassisSerial: clean(s.ChassisSerial),
	}
	if d.hw.SMBIOS != (dr.SMBIOS{}) {
		d.because("machine identity", orUnknown(d.hw.SMBIOS.Product), "as the server's, because licences hang on it")
	}
	d.hw.RTCLocal = d.inv.RTCLocal
	if d.hw.RTCLocal {
		d.because("clock", "local time", "the server's hardware clock runs on local time")
	} else {
		d.because("clock", "UTC", "the server's hardware clock runs on UTC, or nothing says otherwise")
	}
	return nil
}

func (d *decider) channel() error {
	kernel := d.kernel()
	have := append(slices.Clone(kernel.Modules), kernel.Drivers...)
	if lack := missing(channelNeeds, have); len(lack) > 0 {
		d.hw.Channel = dr.PortISA
		d.because("test channel", string(dr.PortISA), "the guest has no %s", strings.Join(lack, " and no "))
		return nil
	}
	d.hw.Channel = dr.PortVirtio
	d.because("test channel", string(dr.PortVirtio), "%s: among the modules of %s", needNames(channelNeeds), kernel.Version)
	return nil
}

// clean keeps of a text that came from a server what may stand in a firmware table: printable ASCII, at most 64 bytes.
func clean(s string) string {
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s))
	return s[:min(len(s), 64)]
}

func orNone(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	return strings.Join(list, ", ")
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}
