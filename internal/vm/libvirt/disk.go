package libvirt

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

const (
	// reconnect is how long QEMU waits for the server of an export that has gone, in seconds, before the guest's
	// request fails: long enough to restart a server below a running machine.
	reconnect = 300
	maxLayers = 16
)

// bus is how a dr.DiskBus is made of libvirt's disks and controllers.
type bus struct {
	bus        string // libvirt's
	prefix     string // of the disks' names to libvirt
	controller string // SCSI controller's model, "" if it is no SCSI
	max        int    // disks
	serial     int    // bytes of a serial number that the device carries
	wwn        bool   // whether it carries one
}

// buses are libvirt's names. NVMe is missing: libvirt learned it long after the versions that we run on, see nvme.
var buses = map[dr.DiskBus]bus{
	dr.BusVirtio:     {bus: "virtio", prefix: "vd", max: 20, serial: 20},
	dr.BusVirtioSCSI: {bus: "scsi", prefix: "sd", controller: "virtio-scsi", max: 24, serial: 36, wwn: true},
	dr.BusSATA:       {bus: "sata", prefix: "sd", max: 18, serial: 20},
	dr.BusIDE:        {bus: "ide", prefix: "hd", max: 4, serial: 20, wwn: true},
	dr.BusLSI:        {bus: "scsi", prefix: "sd", controller: "lsilogic", max: 7, serial: 36, wwn: true},
	dr.BusMegaSAS:    {bus: "scsi", prefix: "sd", controller: "lsisas1078", max: 24, serial: 36, wwn: true},
	dr.BusMPTSAS:     {bus: "scsi", prefix: "sd", controller: "lsisas1068", max: 8, serial: 36, wwn: true},
	dr.BusPVSCSI:     {bus: "scsi", prefix: "sd", controller: "vmpvscsi", max: 24, serial: 36, wwn: true},
}

const (
	maxNVMe    = 8
	nvmeSerial = 20
	// nvmeSlot is the first NVMe disk's slot on the root bus, the others go down from there: libvirt does not know of
	// them and fills the bus from below.
	nvmeSlot = 0x1e
)

func hasNVMe(spec vm.Spec) bool { return spec.Hardware.DiskBus == dr.BusNVMe && len(spec.Disks) > 0 }

var (
	wwnRE      = regexp.MustCompile(`^[0-9a-f]{16}$`)
	unsafeRuns = regexp.MustCompile(`[^A-Za-z0-9_.+-]+`) // libvirt takes no other character in a serial number
)

// serial makes a source disk's serial number fit for a virtual one.
func serial(s string, max int) string {
	s = unsafeRuns.ReplaceAllString(strings.TrimSpace(s), "_")
	return s[:min(len(s), max)]
}

// wwn gives a world wide name in libvirt's form, "" if it is of a kind that virtual disks do not have.
func wwn(s string) string {
	s = strings.ToLower(strings.TrimSpace(s))
	for _, prefix := range []string{"0x", "naa."} {
		s = strings.TrimPrefix(s, prefix)
	}
	if !wwnRE.MatchString(s) {
		return ""
	}
	return s
}

// controllers are those that libvirt must not choose by itself.
func controllers(hw dr.Hardware) []libvirtxml.DomainController {
	zero := uint(0)
	list := []libvirtxml.DomainController{{Type: "usb", Index: &zero, Model: "none"}}
	if b := buses[hw.DiskBus]; b.controller != "" && len(hw.Disks) > 0 {
		list = append(list, libvirtxml.DomainController{Type: "scsi", Index: &zero, Model: b.controller})
	}
	return list
}

// bootOrder numbers disks from 1: the boot disk first, the others in their order.
func bootOrder(i int, hw dr.Hardware) uint {
	first := 0
	for n, d := range hw.Disks {
		if d.Boot {
			first = n
			break
		}
	}
	switch {
	case i == first:
		return 1
	case i < first:
		return uint(i) + 2
	default:
		return uint(i) + 1
	}
}

// disk is one disk with all its layers spelt out, so that nothing depends on what is written in a layer's header.
func disk(i int, d vm.Disk, hw dr.Hardware) libvirtxml.DomainDisk {
	b := buses[hw.DiskBus]
	out := libvirtxml.DomainDisk{
		Device: "disk",
		// On an error the machine pauses and its State says so: guests turn errors into damage and silence.
		Driver: &libvirtxml.DomainDiskDriver{
			Name: "qemu", Type: d.Layers[0].Format, Cache: cache(d), ErrorPolicy: "stop", RErrorPolicy: "stop", Discard: "unmap",
		},
		Source:       source(d.Layers[0]),
		BackingStore: &libvirtxml.DomainDiskBackingStore{},
		Target:       &libvirtxml.DomainDiskTarget{Dev: b.prefix + string(rune('a'+i)), Bus: b.bus},
		Serial:       serial(hw.Disks[i].Serial, b.serial),
		Boot:         &libvirtxml.DomainDeviceBoot{Order: bootOrder(i, hw)},
	}
	if b.wwn {
		out.WWN = wwn(hw.Disks[i].WWN)
	}
	if b.controller != "" {
		zero, n := uint(0), uint(i)
		address := libvirtxml.DomainAddressDrive{Controller: &zero, Bus: &zero, Target: &n, Unit: &zero}
		if hw.DiskBus == dr.BusLSI { // a narrow bus: libvirt counts its disks as units
			address.Target, address.Unit = &zero, &n
		}
		out.Address = &libvirtxml.DomainAddress{Drive: &address}
	}
	below := out.BackingStore
	for _, layer := range d.Layers[1:] {
		below.Format = &libvirtxml.DomainDiskFormat{Type: format(layer)}
		below.Source = source(layer)
		below.BackingStore = &libvirtxml.DomainDiskBackingStore{} // an empty one ends the chain
		below = below.BackingStore
	}
	return out
}

func cache(d vm.Disk) string {
	if d.Scratch {
		return "unsafe"
	}
	return "writeback"
}

func format(l vm.Layer) string {
	if l.Format == "" && l.Socket != "" {
		return "raw"
	}
	return l.Format
}

// source is where a layer is.
func source(l vm.Layer) *libvirtxml.DomainDiskSource {
	if l.Socket != "" {
		return &libvirtxml.DomainDiskSource{Network: &libvirtxml.DomainDiskSourceNetwork{
			Protocol: "nbd", Name: l.Export,
			Hosts:     []libvirtxml.DomainDiskSourceHost{{Transport: "unix", Socket: l.Socket}},
			Reconnect: &libvirtxml.DomainDiskSourceNetworkReconnect{Delay: strconv.Itoa(reconnect)},
		}}
	}
	return &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{
		File: l.Path, SecLabel: []libvirtxml.DomainDeviceSecLabel{{Model: "dac", Relabel: "no"}},
	}}
}

// nvme is an NVMe disk as arguments to QEMU, equal to what disk gives for the others, but that its device knows no
// error policy: the guest sees errors.
func nvme(i int, d vm.Disk, hw dr.Hardware) (args []string) {
	name := fmt.Sprintf("muster-%d", i)
	for n := len(d.Layers) - 1; n >= 0; n-- { // a node names those below it, so they come first
		for _, node := range nodes(d, n, name) {
			text, err := json.Marshal(node)
			if err != nil {
				panic("libvirt: a layer does not turn into JSON: " + err.Error()) // it is made of strings and numbers
			}
			args = append(args, "-blockdev", string(text))
		}
	}
	number := serial(hw.Disks[i].Serial, nvmeSerial)
	if number == "" {
		number = name // the device must have one
	}
	root := "pci.0"
	if hw.Machine == "q35" {
		root = "pcie.0"
	}
	return append(args, "-device", fmt.Sprintf("nvme,id=muster-nvme%d,drive=%s-0,serial=%s,bootindex=%d,bus=%s,addr=%#x",
		i, name, number, bootOrder(i, hw), root, nvmeSlot-i))
}

// nodes are layer n of a disk as QEMU block nodes: where it is, and what it is.
func nodes(d vm.Disk, n int, name string) []map[string]any {
	layer := d.Layers[n]
	own, place := fmt.Sprintf("%s-%d", name, n), fmt.Sprintf("%s-%d-place", name, n)
	cache := map[string]any{"direct": false, "no-flush": d.Scratch}
	where := map[string]any{"driver": "file", "filename": layer.Path, "node-name": place, "cache": cache, "read-only": n > 0}
	if layer.Socket != "" {
		where = map[string]any{
			"driver": "nbd", "server": map[string]any{"type": "unix", "path": layer.Socket}, "export": layer.Export,
			"reconnect-delay": reconnect, "node-name": place, "cache": cache, "read-only": true,
		}
	}
	what := map[string]any{"driver": format(layer), "file": place, "node-name": own, "cache": cache, "read-only": n > 0}
	if n == 0 {
		where["discard"], what["discard"] = "unmap", "unmap"
	}
	if layer.Format == "qcow2" {
		what["backing"] = nil
		if n+1 < len(d.Layers) {
			what["backing"] = fmt.Sprintf("%s-%d", name, n+1)
		}
	}
	return []map[string]any{where, what}
}
