package libvirt

import (
	"crypto/rand"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
	"github.com/musterdr/muster/internal/vm"
)

// What a machine's folder holds.
const (
	serialLog  = "serial.log"
	isaSocket  = "ttyS1.sock"
	portSocket = "agent.sock"
)

const (
	maxCPUs   = 512
	maxMemory = 16 << 20 // MiB
	maxNICs   = 16
	maxDir    = 80 // bytes; a socket's path has room for 108
	maxString = 64 // bytes of a firmware table's string; QEMU takes more, no vendor needs it

	emulatedLevel = 3 // x86-64-vN that emulation offers at most
)

var (
	macRE    = regexp.MustCompile(`^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$`) // unicast
	bridgeRE = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$`)
	uuidRE   = regexp.MustCompile(`^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$`)
	nicNames = []dr.NICModel{dr.NICVirtio, dr.NICE1000e, dr.NICE1000, dr.NICVMXNet3, dr.NICRTL8139}
)

// firmware are the files of one build of OVMF: the code, and what a machine's variables start from.
type firmware struct{ code, vars string }

// firmwares are the builds without Secure Boot, where distributions put them, best first.
var firmwares = []firmware{
	{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},
	{"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"},
	{"/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"},
	{"/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"},
	{"/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"},
}

// findFirmware gives the first build that is installed.
func findFirmware() (firmware, bool) {
	for _, f := range firmwares {
		_, err1 := os.Stat(f.code)
		_, err2 := os.Stat(f.vars)
		if err1 == nil && err2 == nil {
			return f, true
		}
	}
	return firmware{}, false
}

// newUUID gives a random name (RFC 9562, version 4) for a domain. It is not the UUID that the guest sees: a test and
// an invocation of one server run side by side, and libvirt allows a UUID once.
func newUUID() (id libvirt.UUID) {
	if _, err := rand.Read(id[:]); err != nil {
		panic("libvirt: the system has no randomness: " + err.Error())
	}
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return id
}

func uuidText(id libvirt.UUID) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}

// describe turns a Spec that was checked into libvirt's XML.
func describe(spec vm.Spec, host vm.Host, id libvirt.UUID) (string, error) {
	hw := spec.Hardware
	meta, err := xml.Marshal(struct {
		XMLName xml.Name `xml:"https://musterdr.org/xml/machine/1 machine"`
		tag
	}{tag: tagOf(spec)})
	if err != nil {
		return "", err
	}
	d := libvirtxml.Domain{
		Type:     "qemu",
		Name:     spec.Name,
		UUID:     uuidText(id),
		Title:    fmt.Sprintf("muster: %s %s", spec.Owner.Kind, spec.Owner.ID),
		Metadata: &libvirtxml.DomainMetadata{XML: string(meta)},
		GenID:    &libvirtxml.DomainGenID{Value: uuidText(newUUID())}, // a domain controller must notice that it is a copy
		Memory:   &libvirtxml.DomainMemory{Value: uint(hw.Memory), Unit: "MiB"},
		VCPU:     &libvirtxml.DomainVCPU{Placement: "static", Value: uint(hw.CPUs)},
		SysInfo:  []libvirtxml.DomainSysInfo{{SMBIOS: tables(hw.SMBIOS)}},
		Features: &libvirtxml.DomainFeatureList{ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{}},
		Clock:    clock(hw),
		PM: &libvirtxml.DomainPM{
			SuspendToMem: &libvirtxml.DomainPMPolicy{Enabled: "no"}, SuspendToDisk: &libvirtxml.DomainPMPolicy{Enabled: "no"},
		},
		OnPoweroff: "destroy", OnReboot: "restart",
		OnCrash: "preserve", // the screen and the reason can still be seen
	}
	if spec.NoReboot {
		d.OnReboot = "destroy"
	}
	if d.CPU, err = processor(hw, host); err != nil {
		return "", err
	}
	if host.Accelerator == "kvm" {
		d.Type = "kvm"
	} else {
		d.Features.TCG = &libvirtxml.DomainFeatureTCG{TBCache: &libvirtxml.DomainFeatureTCGTBCache{Unit: "MiB", Size: tbCache}}
	}
	if d.OS, err = boot(spec); err != nil {
		return "", err
	}
	d.Devices = devices(spec, host)
	if args := arguments(spec); len(args) > 0 {
		d.QEMUCommandline = &libvirtxml.DomainQEMUCommandline{Args: args}
	}
	return d.Marshal()
}

// processor gives the guest the host's own under KVM, and all that QEMU can emulate without it.
func processor(hw dr.Hardware, host vm.Host) (*libvirtxml.DomainCPU, error) {
	cpu := &libvirtxml.DomainCPU{Topology: &libvirtxml.DomainCPUTopology{Sockets: 1, Cores: hw.CPUs, Threads: 1}}
	if host.Accelerator == "kvm" {
		cpu.Mode, cpu.Check = "host-passthrough", "none"
		return cpu, nil
	}
	if hw.CPULevel > emulatedLevel {
		return nil, fmt.Errorf("the guest needs an x86-64-v%d processor, emulation offers v%d: use a host with KVM", hw.CPULevel, emulatedLevel)
	}
	cpu.Mode, cpu.Check = "maximum", "none"
	// Five levels of page tables cost an emulated processor a fifth step at every miss, and no guest here needs them.
	cpu.Features = []libvirtxml.DomainCPUFeature{{Policy: "disable", Name: "la57"}}
	return cpu, nil
}

// clock is the hardware clock, and timers that make up for ticks the guest missed.
func clock(hw dr.Hardware) *libvirtxml.DomainClock {
	c := &libvirtxml.DomainClock{Offset: "utc", Timer: []libvirtxml.DomainTimer{
		{Name: "rtc", TickPolicy: "catchup"}, {Name: "pit", TickPolicy: "delay"}, {Name: "hpet", Present: "no"},
	}}
	if hw.RTCLocal {
		c.Offset = "localtime"
	}
	return c
}

// boot is the machine type and its firmware.
func boot(spec vm.Spec) (*libvirtxml.DomainOS, error) {
	never := -1
	os := &libvirtxml.DomainOS{
		Type:   &libvirtxml.DomainOSType{Arch: "x86_64", Machine: spec.Hardware.Machine, Type: "hvm"},
		SMBios: &libvirtxml.DomainSMBios{Mode: "sysinfo"},
	}
	if spec.Hardware.Firmware == dr.BIOS {
		// What BIOS and boot loader show on the screen goes to the serial log too.
		os.BIOS = &libvirtxml.DomainBIOS{UseSerial: "yes", RebootTimeout: &never}
		return os, nil
	}
	f, ok := findFirmware()
	if !ok {
		return nil, fmt.Errorf("no firmware for UEFI guests on this host: apt install ovmf")
	}
	os.Loader = &libvirtxml.DomainLoader{Path: f.code, Readonly: "yes", Type: "pflash"}
	os.NVRam = &libvirtxml.DomainNVRam{NVRam: filepath.Join(spec.Dir, vm.NVRAMFile)}
	return os, nil
}

// tables are the firmware's tables, types 0 to 3. The UUID goes another way, see arguments.
func tables(s dr.SMBIOS) *libvirtxml.DomainSysInfoSMBIOS {
	date := s.BIOSDate
	if _, err := time.Parse("01/02/2006", date); err != nil {
		date = "" // libvirt refuses any other form
	}
	return &libvirtxml.DomainSysInfoSMBIOS{
		BIOS: &libvirtxml.DomainSysInfoBIOS{Entry: entries(
			"vendor", s.BIOSVendor, "version", s.BIOSVersion, "date", date)},
		System: &libvirtxml.DomainSysInfoSystem{Entry: entries(
			"manufacturer", s.Manufacturer, "product", s.Product, "version", s.Version, "serial", s.Serial,
			"sku", s.SKU, "family", s.Family)},
		BaseBoard: []libvirtxml.DomainSysInfoBaseBoard{{Entry: entries(
			"manufacturer", s.BoardVendor, "product", s.BoardProduct, "serial", s.BoardSerial)}},
		Chassis: &libvirtxml.DomainSysInfoChassis{Entry: entries("serial", s.ChassisSerial, "asset", s.ChassisAsset)},
	}
}

// entries pairs names with values and leaves out what is empty.
func entries(pairs ...string) (list []libvirtxml.DomainSysInfoEntry) {
	for i := 0; i < len(pairs); i += 2 {
		if value := printable(pairs[i+1], maxString); value != "" {
			list = append(list, libvirtxml.DomainSysInfoEntry{Name: pairs[i], Value: value})
		}
	}
	return list
}

// printable keeps the first max printable ASCII characters of a customer's string.
func printable(s string, max int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
	return strings.TrimSpace(s[:min(len(s), max)])
}

// arguments is what libvirt has no words for.
func arguments(spec vm.Spec) (list []libvirtxml.DomainQEMUCommandlineArg) {
	add := func(words ...string) {
		for _, w := range words {
			list = append(list, libvirtxml.DomainQEMUCommandlineArg{Value: w})
		}
	}
	// After libvirt's own -uuid, so this one counts: the guest sees its own, libvirt knows the machine by another.
	if uuid := spec.Hardware.SMBIOS.UUID; uuidRE.MatchString(uuid) {
		add("-smbios", "type=1,uuid="+strings.ToLower(uuid))
	}
	if hasNVMe(spec) {
		for i, disk := range spec.Disks {
			add(nvme(i, disk, spec.Hardware)...)
		}
	}
	return list
}

// devices are all the devices of a machine: nothing that a server does not need, so no USB, no sound, no balloon.
func devices(spec vm.Spec, host vm.Host) *libvirtxml.DomainDeviceList {
	first, second := uint(0), uint(1)
	list := &libvirtxml.DomainDeviceList{
		Emulator:    host.Emulator,
		Controllers: controllers(spec.Hardware),
		Videos:      []libvirtxml.DomainVideo{{Model: libvirtxml.DomainVideoModel{Type: "vga", VRam: 16384}}},
		MemBalloon:  &libvirtxml.DomainMemBalloon{Model: "none"},
		RNGs: []libvirtxml.DomainRNG{{Model: "virtio", Backend: &libvirtxml.DomainRNGBackend{
			Random: &libvirtxml.DomainRNGBackendRandom{Device: "/dev/urandom"},
		}}},
		Panics: []libvirtxml.DomainPanic{{Model: "isa"}},
		Serials: []libvirtxml.DomainSerial{{
			Source: &libvirtxml.DomainChardevSource{File: &libvirtxml.DomainChardevSourceFile{Path: filepath.Join(spec.Dir, serialLog)}},
			Target: &libvirtxml.DomainSerialTarget{Type: "isa-serial", Port: &first},
		}, {
			Source: listener(spec, isaSocket),
			Target: &libvirtxml.DomainSerialTarget{Type: "isa-serial", Port: &second},
		}},
		Channels: []libvirtxml.DomainChannel{{
			Source: listener(spec, portSocket),
			Target: &libvirtxml.DomainChannelTarget{VirtIO: &libvirtxml.DomainChannelTargetVirtIO{Name: probe.PortName}},
		}},
	}
	for i, nic := range spec.Hardware.NICs {
		list.Interfaces = append(list.Interfaces, card(spec.Hardware, nic, spec.Networks[i]))
	}
	if !hasNVMe(spec) {
		for i := range spec.Disks {
			list.Disks = append(list.Disks, disk(i, spec.Disks[i], spec.Hardware))
		}
	}
	return list
}

// listener is a unix socket in the machine's folder on which QEMU waits for us.
func listener(spec vm.Spec, name string) *libvirtxml.DomainChardevSource {
	return &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "bind", Path: filepath.Join(spec.Dir, name)}}
}

// card is a network card. It has no boot ROM: a rescue image boots from its disk or not at all.
func card(hw dr.Hardware, nic dr.HWNIC, network vm.Network) libvirtxml.DomainInterface {
	i := libvirtxml.DomainInterface{
		MAC:   &libvirtxml.DomainInterfaceMAC{Address: strings.ToLower(nic.MAC)},
		Model: &libvirtxml.DomainInterfaceModel{Type: string(hw.NICModel)},
		ROM:   &libvirtxml.DomainROM{Enabled: "no"},
	}
	if network.Bridge != "" {
		i.Source = &libvirtxml.DomainInterfaceSource{Bridge: &libvirtxml.DomainInterfaceSourceBridge{Bridge: network.Bridge}}
		return i
	}
	// Every card needs a far end. With the link down, which only the host can raise, nothing passes to this one.
	i.Source = &libvirtxml.DomainInterfaceSource{User: &libvirtxml.DomainInterfaceSourceUser{}}
	i.Link = &libvirtxml.DomainInterfaceLink{State: "down"}
	return i
}
