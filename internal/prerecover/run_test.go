package prerecover_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/prerecover/tree"
)

func TestDebianBecomesARescueImage(t *testing.T) {
	system, _ := debian(t)
	p, g, err := rescue(t, system, nil)
	if err != nil {
		t.Fatal(err)
	}
	f := p.Facts
	if f.Firmware != dr.UEFI || f.Distro.ID != "debian" || f.Init != "systemd" || f.Arch != "x86_64" || f.Hostname != "shop" ||
		f.Network != "ifupdown" || f.Default != "6.1.0-25-amd64" || f.RootDevice != "/dev/sda2" || len(f.Kernels) != 2 {
		t.Errorf("facts = %+v", f)
	}
	hw := p.Hardware
	if hw.DiskBus != dr.BusVirtioSCSI || hw.NICModel != dr.NICVirtio || hw.Channel != dr.PortVirtio || hw.Machine != "q35" || hw.Memory != 2048 || hw.CPUs != 2 {
		t.Errorf("hardware = %+v", hw)
	}
	if want := []dr.HWNIC{{MAC: "52:54:00:12:34:56", Name: "ens3"}, {MAC: "52:54:00:12:34:57"}}; !slices.Equal(hw.NICs, want) {
		t.Errorf("NICs = %+v", hw.NICs)
	}
	if len(hw.Disks) != 1 || hw.Disks[0].Serial != "S1" || !hw.Disks[0].Boot {
		t.Errorf("disks = %+v", hw.Disks)
	}
	wantFstab := `# /etc/fstab: static file system information.
#
UUID=0b5c1f5e-0000-4000-8000-000000000001 /               ext4    errors=remount-ro 0       1
UUID=AB12-CD34  /boot/efi       vfat    umask=0077      0       1
UUID=0b5c1f5e-0000-4000-8000-000000000002 none            swap    sw              0       0
LABEL=data	/srv/my\040data	xfs	defaults	0 2
UUID=11111111-2222-3333-4444-555555555555 /gone ext4 nofail,x-systemd.device-timeout=10s 0 2
nas.example:/export /mnt/nas nfs rw,hard,nofail,x-systemd.device-timeout=10s 0 0
tmpfs /tmp tmpfs size=10% 0 0
/dev/mapper/vg0-lv--home /home ext4 defaults 0 2
`
	checks := map[string]string{
		"/etc/fstab":                                   wantFstab,
		"/etc/crypttab":                                "# name device key\nvault   UUID=1b5c1f5e-aaaa none   luks\n",
		"/usr/lib/muster/muster-guest":                 "\x7fELF agent",
		"/etc/systemd/network/10-muster-ens3.link":     "# The server's own name for the card with this address.\n[Match]\nMACAddress=52:54:00:12:34:56\nType=ether\n\n[Link]\nName=ens3\n",
		"/boot/efi/EFI/BOOT/BOOTX64.EFI":               "shim\x00",
		"/boot/efi/EFI/BOOT/grubx64.efi":               "grub\x00",
		"/boot/efi/EFI/BOOT/grub.cfg":                  "configfile\n",
		"/etc/lvm/devices/system.devices.muster-saved": "IDTYPE=sys_wwid …\n",
	}
	for name, want := range checks {
		if got := content(t, g, name); got != want {
			t.Errorf("%s is\n%s\nand should be\n%s", name, got, want)
		}
	}
	grub := content(t, g, "/boot/grub/grub.cfg")
	for _, want := range []string{
		"\tlinux\t/boot/vmlinuz-6.1.0-25-amd64 root=UUID=" + rootUUID + " ro  quiet console=tty0 console=ttyS0,115200 loglevel=7\n",
		"ro single console=ttyS0,9600 console=tty0 loglevel=7\n", "\tlinux16\t/boot/memtest86+.bin\n", "set default=\"0\"\n",
	} {
		if !strings.Contains(grub, want) {
			t.Errorf("grub.cfg has no %q:\n%s", want, grub)
		}
	}
	ctx := context.Background()
	if s, err := g.Stat(ctx, "/usr/lib/muster/muster-guest"); err != nil || s.Mode != 0o755 {
		t.Errorf("agent: %+v, %v", s, err)
	}
	for name, target := range map[string]string{
		"/etc/systemd/system/open-vm-tools.service":                     "/dev/null",
		"/etc/systemd/system/hpilo.service":                             "/dev/null",
		"/etc/systemd/system/sysinit.target.wants/muster-guest.service": "/etc/systemd/system/muster-guest.service",
	} {
		if s, err := g.Lstat(ctx, name); err != nil || s.Link != target {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	for _, name := range []string{"/etc/lvm/devices/system.devices", "/etc/systemd/system/ssh.service"} {
		if _, err := g.Lstat(ctx, name); err == nil {
			t.Errorf("%s is there", name)
		}
	}
	for _, e := range p.Edits {
		if e.Reason == "" || e.Reverse == "" || !strings.Contains(e.Overlay, "@") || e.Diff == "" && e.Action != "mkdir" {
			t.Errorf("edit says too little: %+v", e)
		}
	}
}

func TestTheSameImageGivesTheSameEdits(t *testing.T) {
	system, _ := debian(t)
	first, _, err := rescue(t, system, nil)
	if err != nil {
		t.Fatal(err)
	}
	second, _, err := rescue(t, system, nil)
	if err != nil {
		t.Fatal(err)
	}
	first.Deltas, second.Deltas = nil, nil
	if !reflect.DeepEqual(first, second) {
		t.Error("two runs on the same image differ")
	}
}

func TestAnImageThatCannotBootIsRefusedWithTheReason(t *testing.T) {
	linux := func() (*tree.System, *tree.Filesystem) { return debian(t) }
	device := func(kind string) *tree.System {
		return &tree.System{Disks: []prerecover.Disk{{Name: "/dev/sda", Table: "gpt"}},
			Filesystems: []*tree.Filesystem{{Device: prerecover.Device{Name: "/dev/sda1", Number: 1, Type: kind}}}}
	}
	empty := &tree.System{Disks: []prerecover.Disk{{Name: "/dev/sda"}}, Filesystems: []*tree.Filesystem{{Device: prerecover.Device{Name: "/dev/sda"}}}}
	data, _ := linux()
	data.Filesystems = []*tree.Filesystem{(&tree.Filesystem{Device: prerecover.Device{Name: "/dev/sda1", Type: "ext4"}}).File("/photo.jpg", nil, 0o644)}
	noLoader, _ := linux()
	noLoader.Filesystems = noLoader.Filesystems[1:]
	full, fullRoot := linux()
	fullRoot.Free = 4096
	noDriver, root := linux()
	root.File("/boot/initrd.img-6.1.0-25-amd64", initramfs(t, "aacraid", "sd_mod"), 0o644)
	arm, armRoot := linux()
	armRoot.File("/usr/bin/true", append(slices.Clone(elf[:18]), 183, 0), 0o755)
	huge, hugeRoot := linux()
	hugeRoot.File("/etc/fstab", make([]byte, 2<<20), 0o644)
	for _, c := range []struct {
		name   string
		system *tree.System
		says   string
	}{
		{"empty", empty, "empty"}, {"LUKS", device("crypto_LUKS"), "LUKS"}, {"Windows", device("ntfs"), "Windows"},
		{"data only", data, "no Linux system"}, {"no boot loader", noLoader, "boot loader"}, {"full", full, "full"},
		{"no driver", noDriver, "initramfs of kernel 6.1.0-25-amd64"}, {"arm", arm, "aarch64"}, {"huge fstab", huge, "/etc/fstab"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			_, _, err := rescue(t, c.system, func(r *prerecover.Request) { r.Dir = dir; r.Snapshot.Inventory.Firmware = "" })
			if !errors.Is(err, prerecover.ErrNotRescuable) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error = %v", err)
			}
			if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

func TestATruncatedInitramfsIsToldAndTheDriversUntilThenCount(t *testing.T) {
	system, root := debian(t)
	whole := initramfs(t, "virtio_blk", "virtio_pci", "sd_mod", "ahci")
	root.File("/boot/initrd.img-6.1.0-25-amd64", whole[:len(whole)-20], 0o644).
		File("/lib/modules/6.1.0-25-amd64/modules.builtin", []byte("kernel/drivers/ata/ahci.ko\nkernel/drivers/scsi/sd_mod.ko\n"), 0o644)
	p, _, err := rescue(t, system, nil)
	if err != nil {
		t.Fatal(err)
	}
	if p.Hardware.DiskBus != dr.BusSATA {
		t.Errorf("disk bus = %s", p.Hardware.DiskBus)
	}
	if !slices.ContainsFunc(p.Notes, func(d dr.Decision) bool {
		return d.What == "initramfs" && strings.Contains(d.Reason, "could not be read")
	}) {
		t.Errorf("notes = %+v", p.Notes)
	}
}

func TestHostileNamesInAnImageAreLeftAlone(t *testing.T) {
	system, root := debian(t)
	for _, n := range []string{"vmlinuz-$(reboot)", "vmlinuz-a\nb", "initrd.img-../../x", "vmlinuz-;id", "-rf"} {
		root.File("/boot/"+strings.ReplaceAll(n, "/", "_"), nil, 0o644)
	}
	root.File("/etc/systemd/system/open-vm-tools\n.service", nil, 0o644).
		File("/usr/lib/systemd/system/srvadmin\"; id.service", nil, 0o644).
		File("/etc/hostname", []byte("$(id)\x1b[31m\n"), 0o644).
		File("/etc/os-release", []byte("ID=$(id)\nID=debian\nPRETTY_NAME=\"\x1b[31mred\"\nVERSION_ID=`id`\n"), 0o644)
	p, _, err := rescue(t, system, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Facts.Kernels) != 2 || p.Facts.Hostname != "" || p.Facts.Distro.ID != "debian" || p.Facts.Distro.Version != "" || p.Facts.Distro.Name != "[31mred" {
		t.Errorf("facts = %+v", p.Facts)
	}
	for _, e := range p.Edits {
		if strings.ContainsAny(e.Path, "\n\"$;") {
			t.Errorf("edit of %q", e.Path)
		}
	}
}

func TestTheSystemIsFoundWhereverItLies(t *testing.T) {
	t.Run("in a btrfs subvolume that is not the default", func(t *testing.T) {
		system, root := debian(t)
		dir := t.TempDir()
		for name, text := range map[string]string{"@/etc/os-release": "ID=ubuntu\nVERSION_ID=24.04\n", "@/usr/lib/systemd/systemd": string(elf),
			"@/etc/fstab": "UUID=" + rootUUID + " / btrfs subvol=@ 0 0\n", "@/usr/bin/true": string(elf), "@snapshots/1/etc/os-release": "ID=old\n"} {
			if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		*root = tree.Filesystem{Device: root.Device}
		root.Device.Type = "btrfs"
		if err := root.FromFolder(dir); err != nil {
			t.Fatal(err)
		}
		p, _, err := rescue(t, system, nil)
		if err != nil || p.Facts.Distro.ID != "ubuntu" || p.Facts.RootFS != "btrfs" {
			t.Errorf("facts = %+v, %v", p.Facts, err)
		}
	})
	t.Run("on the one of two that calls itself the root", func(t *testing.T) {
		system, _ := debian(t)
		clone := &tree.Filesystem{Device: prerecover.Device{Name: "/dev/sda6", Number: 6, Type: "ext4", UUID: "2b5c"}}
		clone.File("/etc/os-release", []byte("ID=copy\n"), 0o644).File("/sbin/init", elf, 0o755).File("/etc/passwd", nil, 0o644).
			File("/etc/fstab", []byte(debianFstab), 0o644)
		system.Filesystems = append([]*tree.Filesystem{clone}, system.Filesystems...)
		p, _, err := rescue(t, system, nil)
		if err != nil || p.Facts.RootDevice != "/dev/sda2" {
			t.Errorf("root = %s, %v", p.Facts.RootDevice, err)
		}
	})
	t.Run("where the inventory says", func(t *testing.T) {
		system, _ := debian(t)
		other := &tree.Filesystem{Device: prerecover.Device{Name: "/dev/sdb1", Disk: 1, Number: 1, Type: "xfs", UUID: "3b5c"}}
		other.File("/etc/os-release", []byte("ID=rocky\nVERSION_ID=9.4\nID_LIKE=\"rhel centos\"\n"), 0o644).File("/sbin/init", elf, 0o755)
		system.Disks = append(system.Disks, prerecover.Disk{Name: "/dev/sdb", Table: "gpt"})
		system.Filesystems = append(system.Filesystems, other)
		p, _, err := rescue(t, system, func(r *prerecover.Request) {
			r.Snapshot.Inventory.Filesystems = []dr.Filesystem{{Device: "/dev/sdb1", Mount: "/", UUID: "3b5c"}}
		})
		if err != nil || p.Facts.RootDevice != "/dev/sdb1" || p.Hardware.CPULevel != 2 {
			t.Errorf("root = %s, %v", p.Facts.RootDevice, err)
		}
	})
}

func TestLabelsAreSetOnWhatIsAddedAndNothingElse(t *testing.T) {
	system, root := debian(t)
	const unit = "system_u:object_r:systemd_unit_file_t:s0"
	root.File("/etc/selinux/config", []byte("# SELINUX=disabled\nSELINUX=enforcing\nSELINUXTYPE=targeted\n"), 0o644).
		Label("/etc/systemd/system", "security.selinux", unit).
		Label("/usr/lib", "security.selinux", "system_u:object_r:lib_t:s0").
		Label("/etc/fstab", "security.selinux", "system_u:object_r:etc_t:s0")
	_, g, err := rescue(t, system, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"/etc/systemd/system/muster-guest.service": unit, "/etc/systemd/system/hpilo.service": unit,
		"/usr/lib/muster": "system_u:object_r:lib_t:s0", "/usr/lib/muster/muster-guest": "system_u:object_r:bin_t:s0",
		"/etc/fstab": "system_u:object_r:etc_t:s0", "/boot/efi/EFI/BOOT/BOOTX64.EFI": "",
	} {
		if got, err := g.Xattr(context.Background(), name, "security.selinux"); err != nil || got != want {
			t.Errorf("label of %s = %q, %v", name, got, err)
		}
	}
}

func TestWhatCannotBeReadByEveryoneIsNotShown(t *testing.T) {
	system, _ := debian(t)
	o, err := prerecover.ParseOverlay("x.yaml", []byte("name: x\nversion: 1\nreason: test\nreverse: test\nedits:\n- {action: replace, path: /etc/shadow, find: secret, with: other}\n"))
	if err != nil {
		t.Fatal(err)
	}
	p, g, err := rescue(t, system, func(r *prerecover.Request) { r.Overlays = []prerecover.Overlay{o} })
	if err != nil {
		t.Fatal(err)
	}
	if got := content(t, g, "/etc/shadow"); got != "root:other:\n" {
		t.Errorf("shadow = %q", got)
	}
	last := p.Edits[len(p.Edits)-1]
	if last.Path != "/etc/shadow" || strings.Contains(last.Diff, "secret") || strings.Contains(last.Diff, "other") {
		t.Errorf("edit = %+v", last)
	}
}

func TestExplainShowsEveryEditWithItsReason(t *testing.T) {
	system, root := debian(t)
	root.File("/etc/os-release", []byte("ID=debian\nPRETTY_NAME=\"\x1b]0;evil\x07\"\n"), 0o644)
	p, _, err := rescue(t, system, nil)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := prerecover.Explain(&b, p, true); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	if strings.ContainsAny(text, "\x1b\x07") {
		t.Error("control characters reach the terminal")
	}
	for _, want := range append([]string{"virtio_scsi", "-/dev/sda2 ", "+UUID=" + rootUUID, "before", "to undo", "fstab-by-uuid@1"}, paths(p)...) {
		if !strings.Contains(text, want) {
			t.Errorf("it does not show %q:\n%s", want, text)
		}
	}
}

func paths(p dr.PreRecovery) (out []string) {
	for _, e := range p.Edits {
		out = append(out, e.Path, e.Reason)
	}
	return out
}
