package qemu

import (
	"encoding/json"
	"reflect"
	"testing"

	"libvirt.org/go/libvirtxml"

	"github.com/musterdr/muster/internal/dr"
)

const windowsLike = `<domain type='kvm' id='3'><name>mail</name><uuid>9A3B0000-0000-4000-8000-00000000ABCD</uuid>
<memory unit='GiB'>4</memory><vcpu placement='static'>3</vcpu>
<sysinfo type='smbios'><bios><entry name='vendor'>LENOVO</entry></bios><system><entry name='serial'> S-1 </entry></system><baseBoard><entry name='product'>B</entry></baseBoard></sysinfo>
<os firmware='efi'><type machine='pc-q35-7.2'>hvm</type><smbios mode='sysinfo'/></os><clock offset='localtime'/>
<devices>
<disk type='block' device='disk'><driver type='raw'/><source dev='/dev/vg/mail'/><target dev='sda' bus='scsi'/><serial>S0</serial><wwn>5000c50015ea71ac</wwn><boot order='1'/><blockio logical_block_size='4096'/><address type='drive' controller='1' bus='0' target='0' unit='0'/></disk>
<disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='pool/x'/><target dev='sdb' bus='sata'/></disk>
<controller type='scsi' index='0' model='lsilogic'/><controller type='scsi' index='1' model='virtio-scsi'/>
<interface type='bridge'><mac address='52:54:00:AA:BB:CC'/><source bridge='br0'/><model type='e1000e'/></interface>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
</devices><seclabel type='dynamic' model='dac'><label>+64055:+108</label></seclabel></domain>`

func TestTheInventoryOfAMachineIsItsHardwareAsTheGuestSeesIt(t *testing.T) {
	var x libvirtxml.Domain
	if err := x.Unmarshal(windowsLike); err != nil {
		t.Fatal(err)
	}
	inv := inventory(x)
	if inv.Firmware != dr.UEFI || inv.CPU.Count != 3 || inv.Memory != 4<<30 || !inv.RTCLocal || inv.Hostname != "" {
		t.Errorf("%+v", inv)
	}
	if want := (dr.SMBIOS{UUID: "9A3B0000-0000-4000-8000-00000000ABCD", BIOSVendor: "LENOVO", Serial: "S-1", BoardProduct: "B"}); inv.SMBIOS != want {
		t.Errorf("%+v", inv.SMBIOS)
	}
	if want := []dr.NIC{{MAC: "52:54:00:aa:bb:cc", Driver: "e1000e", Up: true}}; !reflect.DeepEqual(inv.NICs, want) || !inv.NICs[0].Physical() {
		t.Errorf("%+v", inv.NICs)
	}
	one := describe(x.Devices.Disks[0])
	one.size = 1 << 30
	got := inventoryDisk(x.Devices.Disks[0], x, one)
	want := dr.InventoryDisk{Name: "sda", Size: 1 << 30, SectorSize: 4096, Serial: "S0", WWN: "5000c50015ea71ac", Transport: "virtio", Boot: true}
	if got != want {
		t.Errorf("%+v", got)
	}
	if one.path != "/dev/vg/mail" || one.file || one.format != "raw" {
		t.Errorf("%+v", one)
	}
	if far := describe(x.Devices.Disks[1]); far.path != "" || far.identity != "rbd:pool/x" {
		t.Errorf("%+v", far)
	}
	if !hasAgent(x) || qemuGroup(x) != 108 {
		t.Errorf("agent %v, group %d", hasAgent(x), qemuGroup(x))
	}
}

func TestACheckpointSaysWhoseItIsAndOfWhichImages(t *testing.T) {
	text, err := checkpointXML(checkpointName("snap-20260102t030405-abc"), "srv-1", []disk{
		{target: "vda", format: "qcow2", identity: "/a<b>&#7"}, {target: "vdb", format: "raw", identity: "/b#8"}})
	if err != nil {
		t.Fatal(err)
	}
	var x libvirtxml.DomainCheckpoint
	var about label
	if err := x.Unmarshal(text); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(x.Description), &about); err != nil {
		t.Fatal(err)
	}
	if about.Server != "srv-1" || !reflect.DeepEqual(about.Disks, map[string]string{"vda": "/a<b>&#7"}) || x.Name != "muster-snap-20260102t030405-abc" {
		t.Errorf("%+v of %q", about, x.Name)
	}
	if x.Disks.Disks[0].Checkpoint != "bitmap" || x.Disks.Disks[1].Checkpoint != "no" {
		t.Errorf("%+v", x.Disks.Disks)
	}
}

func TestSizesAreReadInEveryUnitAndNeverOverflow(t *testing.T) {
	for unit, want := range map[string]int64{"b": 7, "KiB": 7 << 10, "": 7 << 10, "GB": 7e9, "TiB": 7 << 40, "furlong": 0} {
		if got := bytesOf(7, unit); got != want {
			t.Errorf("7 %s: %d, want %d", unit, got, want)
		}
	}
	if got := bytesOf(1<<63, "TiB"); got != 0 {
		t.Errorf("overflow: %d", got)
	}
}

func TestWithoutAnythingToFreezeTheWatchdogSaysWhatIsWrongWithItsArguments(t *testing.T) {
	for _, args := range [][]string{nil, {"a", "b"}, {"/s", "id", "soon"}, {"/s", "id", "-1s"}} {
		if Watchdog(args, nil, nil) == nil {
			t.Errorf("%q was taken", args)
		}
	}
}
