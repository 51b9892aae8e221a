package prerecover_test

import (
	"bytes"
	"context"
	"io/fs"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/prerecover/tree"
	"github.com/musterdr/muster/internal/vm"
)

const (
	rootUUID = "0b5c1f5e-0000-4000-8000-000000000001"
	swapUUID = "0b5c1f5e-0000-4000-8000-000000000002"
	dataUUID = "0b5c1f5e-0000-4000-8000-000000000003"
	espUUID  = "AB12-CD34"
	espType  = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
)

// initramfs packs modules as initramfs-tools does: microcode first, plain, then the rest, compressed.
func initramfs(t *testing.T, modules ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	pack := func(names ...string) []byte {
		var b bytes.Buffer
		w := cpio.NewWriter(&b)
		for _, n := range names {
			if err := w.WriteHeader(&cpio.Header{Name: n, Mode: 0o644 | cpio.TypeReg, Size: 5}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write([]byte("12345")); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	out.Write(pack("kernel/x86/microcode/GenuineIntel.bin"))
	out.Write(make([]byte, 512-out.Len()%512))
	var names []string
	for _, m := range modules {
		names = append(names, "usr/lib/modules/6.1.0-25-amd64/kernel/drivers/"+m+".ko")
	}
	z, err := zstd.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(pack(names...)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

var elf = append([]byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x03\x00"), 62, 0)

const debianGrub = `set default="0"
menuentry 'Debian GNU/Linux' --class debian {
	echo	'Loading Linux 6.1.0-25-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-25-amd64 root=/dev/sda2 ro  quiet
	initrd	/boot/initrd.img-6.1.0-25-amd64
}
submenu 'Advanced options' {
	menuentry 'old' {
		linux	/boot/vmlinuz-6.1.0-9-amd64 root=/dev/sda2 ro single console=ttyS0,9600
	}
}
menuentry 'Memory test' {
	linux16	/boot/memtest86+.bin
}
`

const debianFstab = `# /etc/fstab: static file system information.
#
/dev/sda2       /               ext4    errors=remount-ro 0       1
UUID=AB12-CD34  /boot/efi       vfat    umask=0077      0       1
/dev/sda3       none            swap    sw              0       0
LABEL=data	/srv/my\040data	xfs	defaults	0 2
UUID=11111111-2222-3333-4444-555555555555 /gone ext4 defaults 0 2
nas.example:/export /mnt/nas nfs rw,hard 0 0
tmpfs /tmp tmpfs size=10% 0 0
/dev/mapper/vg0-lv--home /home ext4 defaults 0 2
`

// debian is a server as Debian installs it, on GPT with UEFI.
func debian(t *testing.T) (*tree.System, *tree.Filesystem) {
	t.Helper()
	root := &tree.Filesystem{Device: prerecover.Device{Name: "/dev/sda2", Number: 2, Type: "ext4", UUID: rootUUID}}
	root.File("/etc/fstab", []byte(debianFstab), 0o644).
		File("/etc/os-release", []byte("PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_ID=\"12\"\n"), 0o644).
		File("/etc/passwd", []byte("root:x:0:0::/root:/bin/bash\n"), 0o644).
		File("/etc/hostname", []byte("shop\n"), 0o644).
		File("/etc/network/interfaces", []byte("auto ens3\niface ens3 inet dhcp\n"), 0o644).
		File("/etc/crypttab", []byte("# name device key\nvault   /dev/sda4   none   luks\n"), 0o644).
		File("/etc/lvm/devices/system.devices", []byte("IDTYPE=sys_wwid …\n"), 0o600).
		File("/etc/shadow", []byte("root:secret:\n"), 0o640).
		File("/usr/bin/true", elf, 0o755).
		File("/usr/lib/systemd/systemd", elf, 0o755).
		File("/usr/lib/systemd/system/open-vm-tools.service", []byte("[Unit]\n"), 0o644).
		File("/usr/lib/systemd/system/ssh.service", []byte("[Unit]\n"), 0o644).
		File("/etc/init.d/hpilo", []byte("#!/bin/sh\n"), 0o755).
		File("/boot/vmlinuz-6.1.0-25-amd64", []byte("kernel"), 0o644).
		File("/boot/initrd.img-6.1.0-25-amd64", initramfs(t, "virtio_blk", "virtio_pci", "virtio_scsi", "ahci", "sd_mod", "nvme", "virtio_net"), 0o644).
		File("/boot/vmlinuz-6.1.0-9-amd64", []byte("kernel"), 0o644).
		File("/boot/initrd.img-6.1.0-9-amd64", []byte("not read"), 0o644).
		File("/boot/grub/grub.cfg", []byte(debianGrub), 0o444).
		File("/lib/modules/6.1.0-25-amd64/modules.dep", []byte("kernel/drivers/net/virtio_net.ko: kernel/x.ko\nkernel/drivers/char/virtio_console.ko:\nkernel/drivers/virtio/virtio_pci.ko.xz:\n"), 0o644).
		File("/lib/modules/6.1.0-25-amd64/modules.builtin", []byte("kernel/fs/ext4/ext4.ko\n"), 0o644).
		Link("/sbin/init", "/lib/systemd/systemd").
		Folder("/boot/efi").Folder("/home").Folder("/etc/systemd/system/sysinit.target.wants").Folder("/etc/cloud")
	esp := &tree.Filesystem{Device: prerecover.Device{Name: "/dev/sda1", Number: 1, Type: "vfat", UUID: espUUID, PartType: espType}}
	esp.File("/EFI/debian/shimx64.efi", []byte("shim\x00"), 0o755).
		File("/EFI/debian/grubx64.efi", []byte("grub\x00"), 0o755).
		File("/EFI/debian/grub.cfg", []byte("configfile\n"), 0o755)
	home := &tree.Filesystem{Device: prerecover.Device{Name: "/dev/vg0/lv-home", Disk: -1, Type: "ext4", UUID: dataUUID}}
	home.Folder("/")
	return &tree.System{
		Disks: []prerecover.Disk{{Name: "/dev/sda", Table: "gpt"}},
		Filesystems: []*tree.Filesystem{esp, root,
			{Device: prerecover.Device{Name: "/dev/sda3", Number: 3, Type: "swap", UUID: swapUUID}},
			{Device: prerecover.Device{Name: "/dev/sda4", Number: 4, Type: "crypto_LUKS", UUID: "1b5c1f5e-aaaa"}},
			{Device: prerecover.Device{Name: "/dev/sda5", Number: 5, Type: "xfs", UUID: "1b5c1f5e-bbbb", Label: "data"}},
			home},
	}, root
}

func debianInventory() dr.Inventory {
	return dr.Inventory{
		Taken: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), Firmware: dr.UEFI, Memory: 4 << 30, CPU: dr.CPU{Count: 4},
		SMBIOS: dr.SMBIOS{UUID: "4c4c4544-0001", Manufacturer: "Dell Inc.", Product: "PowerEdge", Serial: "ABC"},
		Disks:  []dr.InventoryDisk{{Name: "sda", Size: 4 << 30, Serial: "S1", Transport: "sas", Boot: true}},
		NICs: []dr.NIC{{Name: "ens3", MAC: "52:54:00:12:34:56", Up: true}, {Name: "bond0", MAC: "52:54:00:12:34:56", Kind: "bond"},
			{Name: "lo"}, {Name: "eno2; reboot", MAC: "52:54:00:12:34:57"}, {Name: "bad", MAC: "not a mac"}},
	}
}

// rescue runs a whole pre-recovery on a tree.
func rescue(t *testing.T, system *tree.System, change func(*prerecover.Request)) (dr.PreRecovery, *tree.Guest, error) {
	t.Helper()
	var guest *tree.Guest
	req := prerecover.Request{
		ID: "pre-1", Dir: t.TempDir(), Agent: []byte("\x7fELF agent"), Limits: prerecover.Limits{UEFI: true, MaxMemory: 2048, MaxCPUs: 2},
		Snapshot: dr.Snapshot{ID: "snap-1", ServerID: "srv-1", Server: "shop", Inventory: debianInventory()},
	}
	for range system.Disks {
		req.Snapshot.Disks = append(req.Snapshot.Disks, dr.SnapshotDisk{Name: "sda"})
		req.Base = append(req.Base, vm.Layer{})
	}
	if change != nil {
		change(&req)
	}
	p, err := prerecover.Run(context.Background(), tree.Opener{System: system, Opened: func(g *tree.Guest) { guest = g }}, req, nil)
	if guest != nil && err == nil {
		guest.Reopen()
	}
	return p, guest, err
}

func content(t *testing.T, g prerecover.Guest, name string) string {
	t.Helper()
	b, err := g.Read(context.Background(), name, 1<<20)
	if err != nil {
		t.Fatalf("read %s: %v", name, err)
	}
	return string(b)
}

var _ fs.FileMode
