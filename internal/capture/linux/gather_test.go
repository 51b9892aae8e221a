package linux

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/dr"
)

// tree makes a fixture root of files, and of links where the content begins with "→ ".
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(content, "→ "); ok {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func equal[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\n got %+v\nwant %+v", what, got, want)
	}
}

func TestMountsAreThoseOnDisksAndNetworksOnceAPlace(t *testing.T) {
	root := tree(t, map[string]string{
		"proc/self/mountinfo": `22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw
23 22 0:21 / /proc rw - proc proc rw
24 22 8:1 / /boot/efi rw - vfat /dev/sda1 rw,fmask=0022
25 22 8:17 / /srv/a\040b rw - xfs /dev/sdb1 ro
26 22 0:44 / /mnt/n rw - nfs4 host:/x rw
27 22 8:33 / /boot/efi rw - ext4 /dev/sdc1 rw
not a line
`,
		"run/udev/data/b8:2": "S:disk/by-uuid/x\nE:ID_FS_UUID=aaaa-bbbb\n",
	})
	got, err := Mounts(root)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "mounts", got, []dr.Filesystem{
		{Device: "/dev/sda2", Mount: "/", Type: "ext4", Options: "rw,relatime", UUID: "aaaa-bbbb"},
		{Device: "/dev/sdc1", Mount: "/boot/efi", Type: "ext4", Options: "rw"},
		{Device: "/dev/sdb1", Mount: "/srv/a b", Type: "xfs", Options: "rw"},
		{Device: "host:/x", Mount: "/mnt/n", Type: "nfs4", Options: "rw"},
	})
	table, _ := Mountinfo(root)
	if !table[0].Writable() || table[3].Writable() {
		t.Errorf("writable: %v and %v, want true for rw and false for ro", table[0].Writable(), table[3].Writable())
	}
}

func TestListenersFoldFamiliesAndLeaveOutClients(t *testing.T) {
	head := "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	line := func(local, state, inode string) string {
		return "   0: " + local + " 00000000:0000 " + state + " 00000000:00000000 00:00000000 00000000     0        0 " + inode + " 1 0 100 0 0 10 0\n"
	}
	root := tree(t, map[string]string{
		"proc/net/tcp":  head + line("0100007F:0016", "0A", "11") + line("0100007F:0050", "01", "12"),
		"proc/net/tcp6": head + line("00000000000000000000000000000000:0016", "0A", "13") + line("0000000000000000FFFF00000100007F:0051", "0A", "13"),
		"proc/net/udp":  head + line("00000000:0035", "07", "14") + line("00000000:C350", "07", "14") + line("00000000:CA6C", "07", "99"),
		"proc/7/stat":   "7 (my (odd) name) S 1 7 7 0 -1 0 0 0",
		"proc/7/fd/3":   "→ socket:[11]", "proc/7/fd/4": "→ socket:[13]", "proc/7/fd/5": "→ socket:[14]",
	})
	equal(t, "listeners", Listeners(root), []dr.Listener{
		{Proto: "tcp", Address: "127.0.0.1", Port: 22, Process: "my (odd) name"},
		{Proto: "tcp", Address: "::", Port: 22, Process: "my (odd) name"},
		{Proto: "tcp", Address: "127.0.0.1", Port: 81, Process: "my (odd) name"},
		{Proto: "udp", Address: "0.0.0.0", Port: 53, Process: "my (odd) name"},
		{Proto: "udp", Address: "0.0.0.0", Port: 51820}, // ephemeral, but the kernel's own: a tunnel
	})
}

func TestProcessesAreDistinctAndOfUserSpace(t *testing.T) {
	root := tree(t, map[string]string{
		"proc/1/stat":  "1 (systemd) S 0 1 1 0 -1 4194560 0",
		"proc/2/stat":  "2 (kthreadd) S 0 0 0 0 -1 2129984 0",
		"proc/30/stat": "30 (nginx) S 1 30 30 0 -1 4194560 0",
		"proc/31/stat": "31 (nginx) S 30 30 30 0 -1 4194560 0",
		"proc/32/stat": "32 (gone) Z 30 30 30 0 -1 4194560 0",
		"proc/33/stat": "garbage",
	})
	equal(t, "processes", Processes(root), []string{"nginx", "systemd"})
}

func TestTheOneWhoAsksIsNotAmongTheProcesses(t *testing.T) {
	all := map[int]process{
		1: {pid: 1}, 50: {pid: 50, parent: 1, session: 50}, // the listening sshd
		60: {pid: 60, parent: 50, session: 60}, 61: {pid: 61, parent: 60, session: 61}, 62: {pid: 62, parent: 61, session: 61},
		70: {pid: 70, parent: 1, session: 70},
	}
	equal(t, "lineage", lineage(all, 62), map[int]bool{60: true, 61: true, 62: true})
}

func TestIdentityIsReadFromFiles(t *testing.T) {
	root := tree(t, map[string]string{
		"etc/os-release":  "ID=ubuntu\nID_LIKE=\"debian x\"\nVERSION_ID=\"24.04\"\nPRETTY_NAME='Ubuntu 24.04'\n",
		"etc/localtime":   "→ ../usr/share/zoneinfo/Europe/Vienna",
		"etc/adjtime":     "0.0 0 0.0\n0\nLOCAL\n",
		"etc/resolv.conf": "nameserver 127.0.0.53\n", "run/systemd/resolve/resolv.conf": "# x\nnameserver 10.0.0.1\nnameserver fd00::1\n",
		"proc/swaps":   "Filename Type Size Used Priority\n/dev/sda3 partition 1 0 -2\n",
		"proc/cpuinfo": "processor : 0\nmodel name : Fast\nflags : fpu cx8 cmov fxsr mmx syscall sse sse2 cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx\n\nprocessor : 1\nflags : fpu\n",
	})
	equal(t, "distro", OSRelease(root), dr.Distro{ID: "ubuntu", Like: []string{"debian", "x"}, Version: "24.04", Name: "Ubuntu 24.04"})
	equal(t, "timezone", Timezone(root), "Europe/Vienna")
	equal(t, "rtc", RTCLocal(root), true)
	equal(t, "resolvers", Resolvers(root), []string{"10.0.0.1", "fd00::1"})
	equal(t, "swaps", Swaps(root), []string{"/dev/sda3"})
	equal(t, "cpu", CPU(root), dr.CPU{Model: "Fast", Count: 2, Level: 2})
	equal(t, "firmware", Firmware(root), dr.BIOS)
}

func TestDisksInUseAreFoundThroughWhatIsStackedOnThem(t *testing.T) {
	root := tree(t, map[string]string{
		"proc/self/mountinfo": "22 1 253:0 / / rw - ext4 /dev/mapper/vg-root rw\n23 22 7:0 / /snap rw - squashfs /dev/loop0 ro\n",
		"sys/block/sda/dev":   "8:0", "sys/block/sda/size": "2048", "sys/block/sda/sda1/partition": "1", "sys/block/sda/sda1/dev": "8:1", "sys/block/sda/sda1/size": "1024",
		"sys/block/sdb/dev": "8:16", "sys/block/sdb/size": "2048", // blank, not in use
		"sys/block/sdaa/dev": "65:160", "sys/block/sdaa/size": "4096",
		"sys/block/dm-0/dev": "253:0", "sys/block/dm-0/size": "100", "sys/block/dm-0/slaves/sda1": "", "sys/block/dm-0/slaves/sdaa": "",
		"sys/block/dm-0/dm/name": "vg-root", "sys/block/dm-0/dm/uuid": "LVM-abc",
		"sys/block/loop0/dev": "7:0", "sys/block/loop0/size": "8", "sys/block/loop0/loop/backing_file": "/x",
		"sys/block/sda/queue/rotational": "0", "sys/block/sda/queue/logical_block_size": "4096", "sys/block/sda/device/model": "Disk  ",
		"run/udev/data/b8:0": "E:ID_SERIAL_SHORT=S1\nE:ID_WWN=0x5\nE:ID_PART_TABLE_UUID=pt\n", "run/udev/data/b8:1": "E:ID_FS_TYPE=LVM2_member\nE:ID_PART_ENTRY_UUID=pe\n",
	})
	got, err := InUse(root)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "in use", got, []string{"sda", "sdaa"})
	equal(t, "disk", DescribeDisk(root, "sda"), dr.InventoryDisk{Name: "sda", Size: 1 << 20, SectorSize: 4096, Serial: "S1", WWN: "0x5", Model: "Disk", Transport: "scsi", PTUUID: "pt"})
	equal(t, "volumes", Volumes(context.Background(), root, got), []dr.Volume{
		{Name: "/dev/mapper/vg-root", Type: "lvm", Size: 51200, Parents: []string{"/dev/sda1", "/dev/sdaa"}},
		{Name: "/dev/sda1", Type: "part", Size: 512 << 10, FSType: "LVM2_member", PartUUID: "pe", Parents: []string{"/dev/sda"}},
	})
}

func TestEnabledUnitsAreThoseLinkedFromOthers(t *testing.T) {
	root := tree(t, map[string]string{
		"etc/systemd/system/multi-user.target.wants/nginx.service":     "→ /lib/systemd/system/nginx.service",
		"etc/systemd/system/graphical.target.wants/nginx.service":      "→ /lib/systemd/system/nginx.service",
		"etc/systemd/system/getty.target.wants/getty@tty1.service":     "→ /lib/systemd/system/getty@.service",
		"etc/systemd/system/dbus.service.requires/dbus-broker.service": "→ /lib/systemd/system/dbus-broker.service",
		"etc/systemd/system/nginx.service.d/limits.conf":               "[Service]",
		"etc/systemd/system/apt-daily.timer":                           "→ /dev/null",
	})
	equal(t, "enabled", enabledUnits(root), []string{"dbus-broker.service", "getty@tty1.service", "nginx.service"})
}

func TestSystemctlsWordsAreTheFirstOfALine(t *testing.T) {
	equal(t, "units", firstWords("● nginx.service loaded failed failed Web\na.service loaded active running A\nNo jobs running.\n"), []string{"a.service", "nginx.service"})
	equal(t, "logins", withoutLogins([]string{"a.service", "user@0.service", "user-runtime-dir@0.service", "ssh@1-10.0.0.1:22.service", "getty@tty1.service"}), []string{"a.service", "getty@tty1.service"})
}

func TestAnInventoryOfThisSystemNamesItsKernelAndProcessors(t *testing.T) {
	inv := Inventory(context.Background(), nil)
	if inv.Kernel == "" || inv.CPU.Count == 0 || inv.Memory == 0 || inv.BootID == "" || inv.Taken.IsZero() {
		t.Errorf("inventory is missing what every Linux has: %+v", inv)
	}
}
