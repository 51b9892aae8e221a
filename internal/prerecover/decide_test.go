package prerecover

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Facts as they are found on what is commonly installed.
var (
	generic    = []string{"ahci", "ata_piix", "megaraid_sas", "mptsas", "nvme", "sd_mod", "sym53c8xx", "virtio_blk", "virtio_pci", "virtio_scsi", "vmw_pvscsi"}
	allModules = []string{"8139cp", "e1000", "e1000e", "virtio_console", "virtio_net", "virtio_pci", "vmxnet3"}
)

func factsOf(id, version, kernel string, drivers, modules []string) dr.Facts {
	return dr.Facts{Firmware: dr.BIOS, Arch: "x86_64", Init: "systemd", Distro: dr.Distro{ID: id, Version: version}, Default: kernel,
		Kernels: []dr.KernelFacts{{Version: "9.9.9-other"}, {Version: kernel, Initramfs: "/boot/i", Drivers: drivers, Modules: modules}}}
}

func invOf(name, transport string) dr.Inventory {
	return dr.Inventory{Taken: time.Unix(1, 0), Disks: []dr.InventoryDisk{{Name: name, Transport: transport}}}
}

func TestTheHighestRungTheGuestCanDriveIsChosen(t *testing.T) {
	el7 := []string{"megaraid_sas", "sd_mod"}
	for _, c := range []struct {
		name  string
		facts dr.Facts
		inv   dr.Inventory
		bus   dr.DiskBus
		nic   dr.NICModel
		port  dr.GuestPort
		level int
	}{
		{"Debian, all modules, no inventory", factsOf("debian", "12", "6.1.0-25-amd64", generic, allModules), dr.Inventory{}, dr.BusNVMe, dr.NICVirtio, dr.PortVirtio, 0},
		{"Debian from a virtio machine", factsOf("debian", "12", "6.1.0-25-amd64", generic, allModules), invOf("vda", "virtio"), dr.BusVirtio, dr.NICVirtio, dr.PortVirtio, 0},
		{"Ubuntu from NVMe", factsOf("ubuntu", "24.04", "6.8.0-31-generic", generic, allModules), invOf("nvme0n1", "nvme"), dr.BusNVMe, dr.NICVirtio, dr.PortVirtio, 0},
		{"Ubuntu from SATA", factsOf("ubuntu", "24.04", "6.8.0-31-generic", generic, allModules), invOf("sda", "sata"), dr.BusSATA, dr.NICVirtio, dr.PortVirtio, 0},
		{"Ubuntu from a RAID controller keeps sda", factsOf("ubuntu", "24.04", "6.8.0-31-generic", generic, allModules), invOf("sda", "sas"), dr.BusVirtioSCSI, dr.NICVirtio, dr.PortVirtio, 0},
		{"Rocky hostonly on MegaRAID", factsOf("rocky", "9.4", "5.14.0-427.el9.x86_64", el7, allModules), invOf("sda", "sas"), dr.BusMegaSAS, dr.NICVirtio, dr.PortVirtio, 2},
		{"Rocky hostonly on VMware", factsOf("almalinux", "8.9", "4.18.0-513.el8.x86_64", []string{"sd_mod", "vmw_pvscsi"}, []string{"vmxnet3"}), invOf("sda", ""), dr.BusPVSCSI, dr.NICVMXNet3, dr.PortISA, 0},
		{"EL10", factsOf("rhel", "10.0", "6.12.0-55.el10.x86_64", generic, allModules), invOf("nvme0n1", "nvme"), dr.BusNVMe, dr.NICVirtio, dr.PortVirtio, 3},
		{"SUSE with LSI", factsOf("sles", "15.5", "5.14.21-default", []string{"mptsas", "sd_mod"}, []string{"e1000"}), invOf("sda", "scsi"), dr.BusMPTSAS, dr.NICE1000, dr.PortISA, 0},
		{"Alpine", factsOf("alpine", "3.20.1", "6.6.32-0-lts", []string{"ahci", "sd_mod"}, []string{"e1000e", "virtio_console", "virtio_pci"}), invOf("sda", "ata"), dr.BusSATA, dr.NICE1000e, dr.PortVirtio, 0},
		{"old IDE", factsOf("centos", "5.11", "2.6.18-398.el5", []string{"ide_gd_mod", "piix"}, []string{"8139too"}), invOf("hda", "ide"), dr.BusIDE, dr.NICRTL8139, dr.PortISA, 0},
		{"virtio disks, but no way to reach them", factsOf("debian", "12", "6.1.0", []string{"virtio_blk", "ata_piix", "sd_mod"}, nil), invOf("vda", "virtio"), dr.BusIDE, dr.NICE1000, dr.PortISA, 0},
		{"virtio-scsi source", factsOf("debian", "12", "6.1.0", generic, allModules), invOf("sda", "virtio"), dr.BusVirtioSCSI, dr.NICVirtio, dr.PortVirtio, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			hw, err := Decide(c.facts, c.inv, Limits{Disks: 1})
			if err != nil {
				t.Fatal(err)
			}
			if hw.DiskBus != c.bus || hw.NICModel != c.nic || hw.Channel != c.port || hw.CPULevel != c.level {
				t.Errorf("got %s %s %s v%d; reasons %+v", hw.DiskBus, hw.NICModel, hw.Channel, hw.CPULevel, hw.Reasons)
			}
			for _, what := range []string{"firmware", "machine", "disk bus", "network cards", "network card model", "processor", "memory", "clock", "test channel"} {
				if !slices.ContainsFunc(hw.Reasons, func(d dr.Decision) bool { return d.What == what && d.Chosen != "" && d.Reason != "" }) {
					t.Errorf("no reason for the %s", what)
				}
			}
		})
	}
}

func TestSizeStaysWithinTheLimits(t *testing.T) {
	facts := factsOf("debian", "12", "6.1.0", generic, allModules)
	big := dr.Inventory{Memory: 64 << 30, CPU: dr.CPU{Count: 48}}
	for _, c := range []struct {
		name      string
		inv       dr.Inventory
		limits    Limits
		mem, cpus int
	}{
		{"as the server has", big, Limits{}, 65536, 48},
		{"the silo's limit", big, Limits{MaxMemory: 4096, MaxCPUs: 2}, 4096, 2},
		{"as asked", big, Limits{Memory: 1024, CPUs: 1, MaxMemory: 4096, MaxCPUs: 2}, 1024, 1},
		{"asked for more than there is", big, Limits{Memory: 8192, CPUs: 9, MaxMemory: 4096, MaxCPUs: 2}, 4096, 2},
		{"never too little", dr.Inventory{Memory: 100 << 20}, Limits{MaxMemory: 128}, 512, 2},
		{"no inventory", dr.Inventory{}, Limits{}, 2048, 2},
	} {
		hw, err := Decide(facts, c.inv, c.limits)
		if err != nil || hw.Memory != c.mem || hw.CPUs != c.cpus {
			t.Errorf("%s: %d MiB, %d processors, %v", c.name, hw.Memory, hw.CPUs, err)
		}
	}
}

func TestFirmwareIsAsOnTheServer(t *testing.T) {
	facts := factsOf("debian", "12", "6.1.0", generic, allModules)
	facts.Firmware = dr.UEFI
	if _, err := Decide(facts, dr.Inventory{}, Limits{}); err == nil || errors.Is(err, ErrNotRescuable) || !strings.Contains(err.Error(), "ovmf") {
		t.Errorf("a host without UEFI: %v", err)
	}
	if hw, err := Decide(facts, dr.Inventory{}, Limits{UEFI: true}); err != nil || hw.Firmware != dr.UEFI {
		t.Errorf("%s, %v", hw.Firmware, err)
	}
	if hw, err := Decide(facts, dr.Inventory{Firmware: dr.BIOS}, Limits{}); err != nil || hw.Firmware != dr.BIOS {
		t.Errorf("the inventory does not count: %s, %v", hw.Firmware, err)
	}
}

func TestIdentityComesAlongAndHostileTextDoesNot(t *testing.T) {
	facts := factsOf("debian", "12", "6.1.0", generic, allModules)
	inv := dr.Inventory{RTCLocal: true, SMBIOS: dr.SMBIOS{Serial: "AB\x00\x1bC,D=1\n", Product: strings.Repeat("x", 500)},
		Disks: []dr.InventoryDisk{{Name: "sda", Serial: "WD-1\"'<x>"}, {Name: "sdb", Serial: "2", WWN: "0x5000", Boot: true}},
		NICs:  []dr.NIC{{Name: "bond-slave", MAC: "02:00:00:00:00:01", Permanent: "02:00:00:00:00:02"}, {Name: "x", MAC: "ff:ff:ff:ff:ff:ff"}, {Name: "br0", MAC: "02:00:00:00:00:09", Kind: "bridge"}}}
	hw, err := Decide(facts, inv, Limits{Disks: 3})
	if err != nil {
		t.Fatal(err)
	}
	if hw.SMBIOS.Serial != "ABC,D=1" || len(hw.SMBIOS.Product) != 64 || !hw.RTCLocal {
		t.Errorf("identity = %+v", hw.SMBIOS)
	}
	if len(hw.Disks) != 3 || hw.Disks[0].Boot || !hw.Disks[1].Boot || hw.Disks[1].WWN != "0x5000" || hw.Disks[2].Serial != "" {
		t.Errorf("disks = %+v", hw.Disks)
	}
	if want := []dr.HWNIC{{MAC: "02:00:00:00:00:02", Name: "bond-slave"}}; !slices.Equal(hw.NICs, want) {
		t.Errorf("NICs = %+v", hw.NICs)
	}
	one, _ := Decide(facts, dr.Inventory{}, Limits{Seed: "srv-1"})
	two, _ := Decide(facts, dr.Inventory{}, Limits{Seed: "srv-2"})
	if len(one.NICs) != 1 || len(two.NICs) != 1 || one.NICs[0].MAC == two.NICs[0].MAC {
		t.Errorf("made up addresses: %+v and %+v", one.NICs, two.NICs)
	}
}
