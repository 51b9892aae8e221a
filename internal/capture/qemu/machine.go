package qemu

import (
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/musterdr/muster/internal/dr"
)

// machine is what libvirt says of a machine.
type machine struct {
	dom        libvirt.Domain
	name, uuid string
	running    bool // or paused: there is a QEMU
	persistent bool // libvirt keeps checkpoints of such machines only
	agent      bool // the guest agent is connected
	group      int  // as whose QEMU runs
	disks      []disk
	inventory  dr.Inventory
}

// disk is one disk of a machine.
type disk struct {
	target   string // libvirt's name: vda
	format   string // of the image: qcow2, raw, …
	path     string // of the image file or block device; "" if it is neither
	file     bool   // an image file
	identity string // changes when another image is put in its place
	size     int64  // bytes that the guest sees
}

// look asks libvirt for the machine.
func (s *Source) look(ctx context.Context) (m machine, err error) {
	var text string
	var state, persistent int32
	err = s.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		if m.dom, err = find(l, s.vm.Domain); err != nil {
			return err
		}
		if state, _, err = l.DomainGetState(m.dom, 0); err != nil {
			return err
		}
		if persistent, err = l.DomainIsPersistent(m.dom); err != nil {
			return err
		}
		text, err = l.DomainGetXMLDesc(m.dom, 0)
		return err
	})
	if code(err) == domainGone {
		return m, fmt.Errorf("look at machine %s: %w", s.vm.Domain, errNoMachine)
	}
	if err != nil {
		return m, fmt.Errorf("look at machine %s: %w", s.vm.Domain, err)
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(text); err != nil {
		return m, fmt.Errorf("look at machine %s: read its description: %w", s.vm.Domain, err)
	}
	m.name, m.uuid = m.dom.Name, hex.EncodeToString(m.dom.UUID[:])
	m.persistent = persistent == 1
	m.running = !slices.Contains([]libvirt.DomainState{libvirt.DomainShutoff, libvirt.DomainCrashed, libvirt.DomainNostate}, libvirt.DomainState(state))
	m.agent, m.group = hasAgent(x), qemuGroup(x)
	if err := s.findDisks(ctx, &m, x); err != nil {
		return m, fmt.Errorf("look at machine %s: %w", m.name, err)
	}
	return m, nil
}

// maxMachines bounds how many machines are listed.
const maxMachines = 4096

// Machines names the machines that a libvirt knows, running or not; only the URI of the source counts.
func Machines(ctx context.Context, vm dr.VMSource) (names []string, err error) {
	s, err := Open(vm, Host{})
	if err != nil {
		return nil, err
	}
	defer s.Close() //nolint:errcheck // only asked
	err = s.conn.ask(ctx, func(l *libvirt.Libvirt) error {
		all, _, err := l.ConnectListAllDomains(1, 0)
		names = nil
		for _, d := range all[:min(len(all), maxMachines)] {
			names = append(names, d.Name)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	return names, nil
}

// find finds a machine by name, or by UUID if none has that name.
func find(l *libvirt.Libvirt, name string) (libvirt.Domain, error) {
	dom, err := l.DomainLookupByName(name)
	if code(err) != domainGone {
		return dom, err
	}
	id, bad := hex.DecodeString(strings.ReplaceAll(name, "-", ""))
	if bad != nil || len(id) != len(libvirt.UUID{}) {
		return dom, err
	}
	return l.DomainLookupByUUID(libvirt.UUID(id))
}

// findDisks lists the disks to be read, in libvirt's order, and the inventory that goes with them.
func (s *Source) findDisks(ctx context.Context, m *machine, x libvirtxml.Domain) error {
	wanted := slices.Clone(s.vm.Disks)
	m.inventory = inventory(x)
	for _, d := range x.Devices.Disks {
		named := d.Target != nil && slices.Contains(wanted, d.Target.Dev)
		if d.Target == nil || d.Source == nil || len(s.vm.Disks) > 0 && !named ||
			len(s.vm.Disks) == 0 && (d.Device != "" && d.Device != "disk" || d.ReadOnly != nil) {
			continue
		}
		wanted = slices.DeleteFunc(wanted, func(name string) bool { return name == d.Target.Dev })
		one := describe(d)
		err := s.conn.ask(ctx, func(l *libvirt.Libvirt) error {
			_, capacity, _, err := l.DomainGetBlockInfo(m.dom, one.target, 0)
			one.size = int64(capacity)
			return err
		})
		if err != nil {
			return fmt.Errorf("see how large disk %s is: %w", one.target, err)
		}
		if one.size <= 0 {
			return fmt.Errorf("disk %s has a size of %d bytes", one.target, one.size)
		}
		m.disks = append(m.disks, one)
		m.inventory.Disks = append(m.inventory.Disks, inventoryDisk(d, x, one))
	}
	switch {
	case len(wanted) > 0:
		return fmt.Errorf("it has no disk %s: see 'virsh domblklist %s'", strings.Join(wanted, ", "), m.name)
	case len(m.disks) == 0:
		return fmt.Errorf("it has no disk that it can write to")
	case len(m.disks) > dr.MaxDisks:
		return fmt.Errorf("it has %d disks: the most is %d; choose some of them", len(m.disks), dr.MaxDisks)
	}
	return nil
}

// describe says where a disk's image is.
func describe(d libvirtxml.DomainDisk) disk {
	out := disk{target: d.Target.Dev, format: "raw"}
	if d.Driver != nil && d.Driver.Type != "" {
		out.format = d.Driver.Type
	}
	switch src := d.Source; {
	case src.File != nil:
		out.path, out.file = src.File.File, true
	case src.Block != nil:
		out.path = src.Block.Dev
	case src.Network != nil:
		out.identity = src.Network.Protocol + ":" + src.Network.Name
	default:
		out.identity = "other"
	}
	if out.path != "" {
		out.identity = out.path
		// A file that was put back from a copy has another inode. A device keeps its name; its bitmaps lie inside it.
		if info, err := os.Stat(out.path); err == nil && out.file {
			if stat, ok := info.Sys().(*syscall.Stat_t); ok {
				out.identity = fmt.Sprintf("%s#%d", out.path, stat.Ino)
			}
		}
	}
	return out
}

// hasAgent says whether the guest agent has opened its channel.
func hasAgent(x libvirtxml.Domain) bool {
	for _, c := range x.Devices.Channels {
		if c.Target != nil && c.Target.VirtIO != nil && c.Target.VirtIO.Name == "org.qemu.guest_agent.0" && c.Target.VirtIO.State == "connected" {
			return true
		}
	}
	return false
}

// qemuGroup is the group of a running machine's QEMU, which makes a socket for us; root's if libvirt does not say.
func qemuGroup(x libvirtxml.Domain) int {
	for _, label := range x.SecLabel {
		_, group, ok := strings.Cut(label.Label, ":")
		if gid, err := strconv.Atoi(strings.TrimPrefix(group, "+")); label.Model == "dac" && ok && err == nil {
			return gid
		}
	}
	return 0
}

// inventory is what the description tells of the hardware. What is inside the machine is not known from outside.
func inventory(x libvirtxml.Domain) dr.Inventory {
	inv := dr.Inventory{Taken: time.Now().UTC(), Firmware: dr.BIOS, Virt: x.Type, SMBIOS: smbios(x)}
	if x.OS != nil && (x.OS.Firmware == "efi" || x.OS.Loader != nil && x.OS.Loader.Type == "pflash") {
		inv.Firmware = dr.UEFI
	}
	if x.VCPU != nil {
		inv.CPU.Count = int(x.VCPU.Value)
	}
	if x.CPU != nil && x.CPU.Model != nil {
		inv.CPU.Model = x.CPU.Model.Value
	}
	if x.Memory != nil {
		inv.Memory = bytesOf(uint64(x.Memory.Value), x.Memory.Unit)
	}
	inv.RTCLocal = x.Clock != nil && x.Clock.Offset == "localtime"
	for _, n := range x.Devices.Interfaces {
		if n.MAC == nil {
			continue
		}
		nic := dr.NIC{MAC: strings.ToLower(n.MAC.Address), Up: true}
		if n.Model != nil {
			nic.Driver = n.Model.Type
		}
		inv.NICs = append(inv.NICs, nic)
	}
	return inv
}

// bytesOf reads libvirt's scaled integers.
func bytesOf(n uint64, unit string) int64 {
	scale := map[string]uint64{"b": 1, "bytes": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "": 1 << 10, "k": 1 << 10, "KiB": 1 << 10,
		"M": 1 << 20, "MiB": 1 << 20, "G": 1 << 30, "GiB": 1 << 30, "T": 1 << 40, "TiB": 1 << 40}[unit]
	if scale == 0 || n > 1<<62/scale {
		return 0
	}
	return int64(n * scale)
}

// smbios is the firmware's tables, as far as the description sets them.
func smbios(x libvirtxml.Domain) dr.SMBIOS {
	s := dr.SMBIOS{UUID: x.UUID}
	if x.OS == nil || x.OS.SMBios == nil || x.OS.SMBios.Mode != "sysinfo" {
		return s
	}
	for _, info := range x.SysInfo {
		if info.SMBIOS == nil {
			continue
		}
		if b := info.SMBIOS.BIOS; b != nil {
			fillIn(b.Entry, map[string]*string{"vendor": &s.BIOSVendor, "version": &s.BIOSVersion, "date": &s.BIOSDate})
		}
		if b := info.SMBIOS.System; b != nil {
			fillIn(b.Entry, map[string]*string{"manufacturer": &s.Manufacturer, "product": &s.Product, "version": &s.Version,
				"serial": &s.Serial, "sku": &s.SKU, "family": &s.Family, "uuid": &s.UUID})
		}
		for _, b := range info.SMBIOS.BaseBoard[:min(1, len(info.SMBIOS.BaseBoard))] {
			fillIn(b.Entry, map[string]*string{"manufacturer": &s.BoardVendor, "product": &s.BoardProduct, "serial": &s.BoardSerial})
		}
		if b := info.SMBIOS.Chassis; b != nil {
			fillIn(b.Entry, map[string]*string{"serial": &s.ChassisSerial, "asset": &s.ChassisAsset})
		}
	}
	return s
}

func fillIn(entries []libvirtxml.DomainSysInfoEntry, fields map[string]*string) {
	for _, e := range entries {
		if to := fields[e.Name]; to != nil {
			*to = strings.TrimSpace(e.Value)
		}
	}
}

// inventoryDisk is a disk as the guest sees it.
func inventoryDisk(d libvirtxml.DomainDisk, x libvirtxml.Domain, one disk) dr.InventoryDisk {
	out := dr.InventoryDisk{Name: one.target, Size: one.size, Serial: d.Serial, WWN: d.WWN, Model: d.Product,
		Transport: d.Target.Bus, Boot: d.Boot != nil && d.Boot.Order == 1}
	if d.BlockIO != nil {
		out.SectorSize = int(d.BlockIO.LogicalBlockSize)
	}
	if d.Target.Bus != "scsi" {
		return out
	}
	controller := uint(0)
	if d.Address != nil && d.Address.Drive != nil && d.Address.Drive.Controller != nil {
		controller = *d.Address.Drive.Controller
	}
	for _, c := range x.Devices.Controllers {
		if c.Type == "scsi" && c.Index != nil && *c.Index == controller && strings.HasPrefix(c.Model, "virtio") {
			out.Transport = "virtio"
		}
	}
	return out
}
