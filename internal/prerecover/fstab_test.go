package prerecover

import (
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/dr"
)

// table is an image with two disks and an LVM volume.
func table() *View {
	v := NewView()
	v.Disks = []Disk{{Name: "/dev/sda", Table: "gpt"}, {Name: "/dev/sdb", Table: "dos"}}
	v.Devices = []Device{
		{Name: "/dev/sda1", Disk: 0, Number: 1, Type: "vfat", UUID: "AAAA-1111"},
		{Name: "/dev/sda2", Disk: 0, Number: 2, Type: "ext4", UUID: "uuid-a2", Label: "root", PartUUID: "part-a2"},
		{Name: "/dev/sdb1", Disk: 1, Number: 1, Type: "xfs", UUID: "uuid-b1"},
		{Name: "/dev/vg-x/lv", Disk: -1, Type: "ext4", UUID: "uuid-lv"},
	}
	return v
}

func TestDeviceNamesBecomeUUIDs(t *testing.T) {
	raid := dr.Inventory{Disks: []dr.InventoryDisk{{Name: "sdb"}, {Name: "sda"}}} // the server had them the other way round
	byID := dr.Inventory{Filesystems: []dr.Filesystem{{Mount: "/data", UUID: "uuid-b1"}, {Mount: "/gone", UUID: "not-there"}}}
	volumes := dr.Inventory{Volumes: []dr.Volume{{Name: "/dev/sdq7", UUID: "uuid-b1"}, {Name: "/dev/sda9", UUID: "not-there"}}}
	for _, c := range []struct {
		name, line, want string
		inv              dr.Inventory
	}{
		{"scsi", "/dev/sda2 / ext4 defaults 0 1", "UUID=uuid-a2 / ext4 defaults 0 1", dr.Inventory{}},
		{"ide", "/dev/hdb1 /d xfs", "UUID=uuid-b1 /d xfs", dr.Inventory{}},
		{"virtio", "/dev/vda1\t/boot/efi\tvfat", "UUID=AAAA-1111\t/boot/efi\tvfat", dr.Inventory{}},
		{"xen", "/dev/xvda2 / ext4", "UUID=uuid-a2 / ext4", dr.Inventory{}},
		{"nvme", "/dev/nvme1n1p1 /d xfs", "UUID=uuid-b1 /d xfs", dr.Inventory{}},
		{"cciss", "/dev/cciss/c0d0p2 / ext4", "UUID=uuid-a2 / ext4", dr.Inventory{}},
		{"mmc", "/dev/mmcblk0p2 / ext4", "UUID=uuid-a2 / ext4", dr.Inventory{}},
		{"columns stay", "/dev/sda2           / ext4", "UUID=uuid-a2        / ext4", dr.Inventory{}},
		{"a comment stays", "  # /dev/sda2 / ext4 # x", "  # /dev/sda2 / ext4 # x", dr.Inventory{}},
		{"UUID stays", "UUID=uuid-a2 / ext4", "UUID=uuid-a2 / ext4", dr.Inventory{}},
		{"LABEL stays", `LABEL="root" / ext4`, `LABEL="root" / ext4`, dr.Inventory{}},
		{"by-uuid stays", "/dev/disk/by-uuid/uuid-a2 / ext4", "/dev/disk/by-uuid/uuid-a2 / ext4", dr.Inventory{}},
		{"mapper stays", "/dev/mapper/vg--x-lv / ext4", "/dev/mapper/vg--x-lv / ext4", dr.Inventory{}},
		{"a volume stays", "/dev/vg-x/lv / ext4", "/dev/vg-x/lv / ext4", dr.Inventory{}},
		{"an unknown partition stays", "/dev/sda7 /x ext4", "/dev/sda7 /x ext4", dr.Inventory{}},
		{"an unknown disk stays", "/dev/sdz1 /x ext4", "/dev/sdz1 /x ext4", dr.Inventory{}},
		{"the server's own order counts", "/dev/sda1 /d xfs", "UUID=uuid-b1 /d xfs", raid},
		{"by-id goes by what was mounted", "/dev/disk/by-id/ata-X-part1 /data xfs", "UUID=uuid-b1 /data xfs", byID},
		{"by-id of what is gone stays", "/dev/disk/by-id/ata-Y /gone xfs", "/dev/disk/by-id/ata-Y /gone xfs", byID},
		{"the inventory's volumes count", "/dev/sdq7 /data xfs", "UUID=uuid-b1 /data xfs", volumes},
		{"no line end and a carriage return", "/dev/sda2 / ext4\r", "UUID=uuid-a2 / ext4\r", dr.Inventory{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := planFstab(t, c.line, "fstab-by-uuid", c.inv); got != c.want {
				t.Errorf("%q became %q, want %q", c.line, got, c.want)
			}
		})
	}
}

func planFstab(t testing.TB, text, action string, inv dr.Inventory) string {
	t.Helper()
	v := table().WithFile(fstabPath, []byte(text))
	p, err := PlanEdits(PlanInput{View: v, Inventory: inv, Facts: dr.Facts{Init: "systemd"},
		Overlays: []Overlay{{Name: "x", Version: 1, Reason: "r", Reverse: "r", Edits: []Step{{Action: action}}}}})
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Edits) == 0 {
		return text
	}
	return string(p.Edits[0].Content)
}

func TestAbsentMountsDoNotStopTheBoot(t *testing.T) {
	const timeout = "nofail,x-systemd.device-timeout=10s"
	for line, want := range map[string]string{
		"UUID=gone /x ext4 defaults 0 2":         "UUID=gone /x ext4 " + timeout + " 0 2",
		"UUID=gone /x ext4 rw,noatime 0 2":       "UUID=gone /x ext4 rw,noatime," + timeout + " 0 2",
		"UUID=gone /x ext4":                      "UUID=gone /x ext4 " + timeout,
		"UUID=gone none swap sw 0 0":             "UUID=gone none swap sw," + timeout + " 0 0",
		"nas:/a /n nfs4 rw":                      "nas:/a /n nfs4 rw," + timeout,
		"//nas/share /n cifs credentials=/x":     "//nas/share /n cifs credentials=/x," + timeout,
		"/dev/sdz1 /x ext4 defaults":             "/dev/sdz1 /x ext4 " + timeout,
		"UUID=gone /x ext4 noauto":               "UUID=gone /x ext4 noauto",
		"UUID=gone /x ext4 nofail":               "UUID=gone /x ext4 nofail",
		"UUID=gone / ext4 defaults":              "UUID=gone / ext4 defaults",
		"UUID=uuid-b1 /x xfs defaults":           "UUID=uuid-b1 /x xfs defaults",
		"PARTUUID=PART-A2 /x ext4 defaults":      "PARTUUID=PART-A2 /x ext4 defaults",
		"/dev/mapper/vg--x-lv /x ext4 defaults":  "/dev/mapper/vg--x-lv /x ext4 defaults",
		"tmpfs /tmp tmpfs defaults":              "tmpfs /tmp tmpfs defaults",
		"/var/lib/a /var/lib/b none bind 0 0":    "/var/lib/a /var/lib/b none bind 0 0",
		"/srv/file.iso /mnt iso9660 loop,ro 0 0": "/srv/file.iso /mnt iso9660 loop,ro 0 0",
		"proc /proc proc defaults":               "proc /proc proc defaults",
	} {
		if got := planFstab(t, line, "fstab-absent-nofail", dr.Inventory{}); got != want {
			t.Errorf("%q became %q, want %q", line, got, want)
		}
	}
}

func FuzzFstab(f *testing.F) {
	f.Add("/dev/sda2 / ext4 defaults 0 1\nUUID=gone\t/x\text4\n# c\n")
	f.Add("/dev/sda1\\040x /y\\011 z\r\n\n\x00")
	f.Fuzz(func(t *testing.T, text string) {
		if lines := parseTab(text); joinTab(lines) != text {
			t.Fatal("a table that is not changed changes")
		}
		for _, action := range []string{"fstab-by-uuid", "fstab-absent-nofail"} {
			got := planFstab(t, text, action, dr.Inventory{})
			if strings.Count(got, "\n") != strings.Count(text, "\n") {
				t.Fatalf("%s changed the number of lines", action)
			}
			if again := planFstab(t, got, action, dr.Inventory{}); again != got {
				t.Fatalf("%s a second time changes %q to %q", action, got, again)
			}
		}
	})
}

func FuzzOSRelease(f *testing.F) {
	f.Add("ID=debian\nVERSION_ID=\"12\"\nID_LIKE='a b'\nPRETTY_NAME=\"x\"\n")
	f.Fuzz(func(t *testing.T, text string) {
		d := parseOSRelease(text)
		for _, v := range append(d.Like, d.ID, d.Version) {
			if v != "" && !osReleaseRE.MatchString(v) {
				t.Errorf("%q", v)
			}
		}
		if len(d.Name) > 64 {
			t.Errorf("name of %d bytes", len(d.Name))
		}
	})
}
