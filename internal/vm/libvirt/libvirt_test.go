package libvirt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image/png"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

func sample() vm.Spec {
	return vm.Spec{
		Name: "verdict-a1", Owner: vm.Owner{Kind: "test", ID: `verdict-"<&>`, Term: 3}, Dir: "/run/muster/verdict-a1",
		Hardware: dr.Hardware{
			Firmware: dr.BIOS, Machine: "q35", CPUs: 2, Memory: 1024, DiskBus: dr.BusVirtio, NICModel: dr.NICE1000e, RTCLocal: true,
			Disks: []dr.HWDisk{{Serial: "WD-1"}, {Serial: "WD-2", Boot: true}},
			NICs:  []dr.HWNIC{{MAC: "52:54:00:AA:BB:CC"}},
			SMBIOS: dr.SMBIOS{
				UUID: "4C4C4544-0042-3510-8058-B4C04F4E3232", Manufacturer: "Dell\x00 Inc.,\n<b>" + strings.Repeat("x", 300),
				BIOSDate: "not a date", Serial: "4B5XN22",
			},
		},
		Disks: []vm.Disk{
			{Layers: []vm.Layer{{Path: "/var/data", Format: "raw"}}},
			{Scratch: true, Layers: []vm.Layer{
				{Path: "/var/scratch.qcow2", Format: "qcow2"}, {Path: "/var/delta.qcow2", Format: "qcow2"},
				{Socket: "/run/muster/x.sock", Export: "snap-1/0"},
			}},
		},
		Networks: []vm.Network{{}},
	}
}

// parsed is the description of a machine, read back.
func parsed(t *testing.T, spec vm.Spec, host vm.Host) libvirtxml.Domain {
	t.Helper()
	text, err := describe(spec, host, newUUID())
	if err != nil {
		t.Fatal(err)
	}
	var d libvirtxml.Domain
	if err := d.Unmarshal(text); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return d
}

func TestEveryLayerIsSpeltOut(t *testing.T) {
	d := parsed(t, sample(), vm.Host{Accelerator: "tcg"}).Devices.Disks[1]
	if d.Driver.Cache != "unsafe" || d.Driver.RErrorPolicy != "stop" || d.Source.File.File != "/var/scratch.qcow2" {
		t.Errorf("top: %+v", d.Driver)
	}
	delta := d.BackingStore
	if delta.Format.Type != "qcow2" || delta.Source.File.File != "/var/delta.qcow2" || delta.Source.File.SecLabel[0].Relabel != "no" {
		t.Errorf("delta: %+v", delta)
	}
	base := delta.BackingStore
	if base.Format.Type != "raw" || base.Source.Network.Name != "snap-1/0" || base.Source.Network.Hosts[0].Socket != "/run/muster/x.sock" {
		t.Errorf("export: %+v", base)
	}
	if end := base.BackingStore; end == nil || end.Format != nil || end.BackingStore != nil {
		t.Errorf("the chain has no end: %+v", end)
	}
	if cache := parsed(t, sample(), vm.Host{Accelerator: "tcg"}).Devices.Disks[0].Driver.Cache; cache != "writeback" {
		t.Errorf("a disk that is kept has cache %s", cache)
	}
}

func TestTheBootDiskIsAskedFirst(t *testing.T) {
	disks := parsed(t, sample(), vm.Host{Accelerator: "tcg"}).Devices.Disks
	if disks[0].Boot.Order != 2 || disks[1].Boot.Order != 1 {
		t.Errorf("orders %d, %d", disks[0].Boot.Order, disks[1].Boot.Order)
	}
	for n, want := range map[int][]uint{0: {1, 2, 3}, 1: {2, 1, 3}, 2: {2, 3, 1}} {
		hw := dr.Hardware{Disks: make([]dr.HWDisk, 3)}
		hw.Disks[n].Boot = true
		for i := range want {
			if got := bootOrder(i, hw); got != want[i] {
				t.Errorf("boot disk %d: disk %d has order %d, want %d", n, i, got, want[i])
			}
		}
	}
}

func TestACustomersStringsAreTamed(t *testing.T) {
	d := parsed(t, sample(), vm.Host{Accelerator: "tcg"})
	for _, e := range d.SysInfo[0].SMBIOS.System.Entry {
		if len(e.Value) > maxString || strings.ContainsAny(e.Value, "\x00\n") {
			t.Errorf("%s is %q", e.Name, e.Value)
		}
	}
	for _, e := range d.SysInfo[0].SMBIOS.BIOS.Entry {
		if e.Name == "date" {
			t.Errorf("a date that is none was passed on: %q", e.Value)
		}
	}
	for in, want := range map[string]string{"WD-WCC4": "WD-WCC4", " a/b c\x00": "a_b_c_", strings.Repeat("9", 50): strings.Repeat("9", 20), "": ""} {
		if got := serial(in, 20); got != want {
			t.Errorf("serial %q became %q, want %q", in, got, want)
		}
	}
	for in, want := range map[string]string{"0x5000C500A1B2C3D4": "5000c500a1b2c3d4", "naa.5000c500a1b2c3d4": "5000c500a1b2c3d4", "eui.0025388": "", "t10.ATA": ""} {
		if got := wwn(in); got != want {
			t.Errorf("wwn %q became %q, want %q", in, got, want)
		}
	}
}

func TestTheOwnerSurvivesItsWayThroughXML(t *testing.T) {
	d := parsed(t, sample(), vm.Host{Accelerator: "tcg"})
	if !strings.Contains(d.Metadata.XML, namespace) || !strings.Contains(d.Metadata.XML, `term="3"`) {
		t.Errorf("metadata: %s", d.Metadata.XML)
	}
}

func TestTheGuestSeesTheServersUUIDAndLibvirtAnother(t *testing.T) {
	d := parsed(t, sample(), vm.Host{Accelerator: "tcg"})
	if strings.EqualFold(d.UUID, sample().Hardware.SMBIOS.UUID) {
		t.Error("a second copy of the server could not be started")
	}
	if d.QEMUCommandline == nil || d.QEMUCommandline.Args[1].Value != "type=1,uuid=4c4c4544-0042-3510-8058-b4c04f4e3232" {
		t.Errorf("arguments %+v", d.QEMUCommandline)
	}
}

func TestKVMAndEmulationGetTheProcessorThatServes(t *testing.T) {
	kvm, tcg := parsed(t, sample(), vm.Host{Accelerator: "kvm"}), parsed(t, sample(), vm.Host{Accelerator: "tcg"})
	if kvm.Type != "kvm" || kvm.CPU.Mode != "host-passthrough" || kvm.Features.TCG != nil {
		t.Errorf("kvm: %s %s", kvm.Type, kvm.CPU.Mode)
	}
	if tcg.Type != "qemu" || tcg.CPU.Mode != "maximum" || tcg.Features.TCG.TBCache.Size != tbCache {
		t.Errorf("tcg: %s %s", tcg.Type, tcg.CPU.Mode)
	}
	spec := sample()
	spec.Hardware.CPULevel = 4
	if _, err := describe(spec, vm.Host{Accelerator: "tcg"}, newUUID()); err == nil {
		t.Error("a processor that cannot be emulated was promised")
	}
}

func TestACableThatIsOutLeadsNowhere(t *testing.T) {
	nic := parsed(t, sample(), vm.Host{Accelerator: "tcg"}).Devices.Interfaces[0]
	if nic.Link == nil || nic.Link.State != "down" || nic.Source.Bridge != nil {
		t.Errorf("card: %+v", nic)
	}
}

func TestSpecsThatCannotStartAreRefused(t *testing.T) {
	dir := t.TempDir()
	if len(dir) >= maxDir {
		dir = "/tmp"
	}
	path := filepath.Join(dir, "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	good := func() vm.Spec {
		spec := sample()
		spec.Dir = dir
		spec.Hardware.Disks = spec.Hardware.Disks[:1]
		spec.Disks = []vm.Disk{{Layers: []vm.Layer{{Path: path, Format: "raw"}}}}
		return spec
	}
	if err := check(good()); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*vm.Spec){
		"machine":          func(s *vm.Spec) { s.Hardware.Machine = "isapc" },
		"firmware":         func(s *vm.Spec) { s.Hardware.Firmware = "" },
		"ide on q35":       func(s *vm.Spec) { s.Hardware.DiskBus = dr.BusIDE },
		"bus":              func(s *vm.Spec) { s.Hardware.DiskBus = "floppy" },
		"raw on top":       func(s *vm.Spec) { l := s.Disks[0].Layers[0]; s.Disks[0].Layers = []vm.Layer{l, l} },
		"format":           func(s *vm.Spec) { s.Disks[0].Layers[0].Format = "vmdk" },
		"device as layer":  func(s *vm.Spec) { s.Disks[0].Layers[0].Path = "/dev/null" },
		"relative path":    func(s *vm.Spec) { s.Disks[0].Layers[0].Path = "disk" },
		"nic model":        func(s *vm.Spec) { s.Hardware.NICModel = "ne2000" },
		"multicast mac":    func(s *vm.Spec) { s.Hardware.NICs[0].MAC = "01:00:5e:00:00:01" },
		"mac with more":    func(s *vm.Spec) { s.Hardware.NICs[0].MAC = "52:54:00:12:34:56,x" },
		"bridge path":      func(s *vm.Spec) { s.Networks[0].Bridge = "../lo" },
		"bridge not there": func(s *vm.Spec) { s.Networks[0].Bridge = "muabsent" },
	} {
		spec := good()
		spoil(&spec)
		if err := check(spec); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestHostilePicturesAreRefused(t *testing.T) {
	for name, data := range map[string]string{
		"nothing": "", "no picture": "hello", "huge": "P6 60000 60000 255\n", "negative": "P6 -1 5 255\n", "deep": "P6 1 1 65535\nxxxxxx",
		"short": "P6 2 2 255\nxxx", "half a header": "P6 2", "a broken PNG": "\x89PNG\r\n\x1a\nxxxxxxxxxxxxxxxxxxxx",
	} {
		if _, err := encodePicture([]byte(data)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	shot, err := encodePicture([]byte("P6\n2 1\n255\n\xff\x00\x00\x00\x00\xff"))
	if err != nil {
		t.Fatal(err)
	}
	picture, err := png.Decode(bytes.NewReader(shot))
	if err != nil {
		t.Fatal(err)
	}
	if r, _, b, _ := picture.At(0, 0).RGBA(); r != 0xffff || b != 0 {
		t.Error("the first point is not red")
	}
}

func FuzzPictures(f *testing.F) {
	f.Add([]byte("P6\n2 1\n255\n\xff\x00\x00\x00\x00\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<16 {
			t.Skip()
		}
		_, _ = encodePicture(data)
	})
}

func TestADaemonThatSaysNothingIsNotWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	mute := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			mute <- c
		}
	}()
	t.Cleanup(func() { _ = l.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err = newConnection(path).ask(ctx, func(*libvirt.Libvirt) error { return nil })
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v, want deadline exceeded", err)
	}
	_ = (<-mute).Close()
}

func TestADaemonThatIsNotThereIsNamed(t *testing.T) {
	_, err := Open(t.Context(), Config{Socket: filepath.Join(t.TempDir(), "none"), Emulator: "/bin/true"})
	if err == nil || !strings.Contains(err.Error(), "systemctl start libvirtd") {
		t.Fatalf("%v, want what to do", err)
	}
}

func TestTheUserOfQEMUIsReadFromTheCapabilities(t *testing.T) {
	const text = `<capabilities><host><cpu><arch>x86_64</arch></cpu><secmodel><model>apparmor</model><doi>0</doi></secmodel>
		<secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>%s</baselabel></secmodel></host></capabilities>`
	uid, gid, err := qemuUser(fmt.Sprintf(text, "+64055:+108"))
	if err != nil || uid != 64055 || gid != 108 {
		t.Fatal(uid, gid, err)
	}
	if _, _, err := qemuUser(fmt.Sprintf(text, "nonsense")); err == nil {
		t.Fatal("nonsense was believed")
	}
}

func TestAProbeIsKeptForThisBootAndThisQEMUOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kvm.json")
	ask := func() verdict {
		h := &Hypervisor{config: Config{ProbeFile: path}, emulator: "/bin/true"} // says nothing, so KVM does not work
		v, err := h.accelerator(t.Context())
		if err != nil || v.Reason == "" {
			t.Fatal(v, err)
		}
		return v
	}
	kept := ask()
	kept.Reason = "as the file says"
	if err := writeVerdict(path, kept); err != nil {
		t.Fatal(err)
	}
	if got := ask(); got != kept {
		t.Fatalf("asked again: %+v", got)
	}
	for _, old := range []verdict{{"another boot", kept.Emulator, "old"}, {kept.Boot, "another QEMU", "old"}} {
		if err := writeVerdict(path, old); err != nil {
			t.Fatal(err)
		}
		if got := ask(); got.Reason == "old" {
			t.Fatalf("believed %+v", old)
		}
	}
}
