package prerecover

import (
	"slices"
	"strconv"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// fstabLine is one line of fstab or crypttab. The text outside the changed fields stays as it is.
type fstabLine struct {
	raw    string // with its line end
	fields [][2]int
}

// maxTabLines is the largest number of lines of an fstab that is edited.
const maxTabLines = 10_000

// parseTab splits a table of fields. Comments and empty lines have no fields.
func parseTab(text string) []fstabLine {
	var lines []fstabLine
	for raw := range strings.Lines(text) {
		l := fstabLine{raw: raw}
		if t := strings.TrimLeft(raw, " \t"); t != "" && t[0] != '#' {
			l.split()
		}
		lines = append(lines, l)
	}
	return lines
}

func (l *fstabLine) split() {
	l.fields = nil
	start := -1
	for i := 0; i <= len(l.raw); i++ {
		blank := i == len(l.raw) || strings.IndexByte(" \t\r\n", l.raw[i]) >= 0
		switch {
		case !blank && start < 0:
			start = i
		case blank && start >= 0:
			l.fields = append(l.fields, [2]int{start, i})
			start = -1
		}
	}
}

// field gives field i with its octal escapes resolved, "" if there is none.
func (l *fstabLine) field(i int) string {
	if i >= len(l.fields) {
		return ""
	}
	raw := l.raw[l.fields[i][0]:l.fields[i][1]]
	if !strings.Contains(raw, `\`) {
		return raw
	}
	var b strings.Builder
	for i := 0; i < len(raw); i++ {
		if raw[i] == '\\' && i+3 < len(raw) {
			if n, err := strconv.ParseUint(raw[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(raw[i])
	}
	return b.String()
}

// set puts a new text in place of field i. The columns after it stay where they are as far as the blanks allow.
func (l *fstabLine) set(i int, text string) {
	from, to := l.fields[i][0], l.fields[i][1]
	tail := l.raw[to:]
	// Give back blanks for what the field grew, and leave one; put in blanks for what it shrank.
	grown := len(text) - (to - from)
	blanks := len(tail) - len(strings.TrimLeft(tail, " "))
	switch {
	case i+1 >= len(l.fields):
	case grown > 0 && blanks > 1:
		tail = tail[min(grown, blanks-1):]
	case grown < 0 && blanks > 1:
		tail = strings.Repeat(" ", -grown) + tail
	}
	l.raw = l.raw[:from] + text + tail
	l.split()
}

func joinTab(lines []fstabLine) string {
	var b strings.Builder
	for _, l := range lines {
		b.WriteString(l.raw)
	}
	return b.String()
}

// mountEntry is one entry of fstab.
type mountEntry struct {
	spec, mount, kind string
	options           []string
}

func (l *fstabLine) entry() (mountEntry, bool) {
	if len(l.fields) < 2 {
		return mountEntry{}, false
	}
	e := mountEntry{spec: l.field(0), mount: l.field(1), kind: l.field(2)}
	if o := l.field(3); o != "" {
		e.options = strings.Split(o, ",")
	}
	return e, true
}

func (e mountEntry) has(option string) bool { return slices.Contains(e.options, option) }

// networkTypes are file systems that come over a network.
var networkTypes = []string{"nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "glusterfs", "fuse.glusterfs", "ceph", "fuse.ceph",
	"fuse.sshfs", "sshfs", "davfs", "afs", "lustre", "beegfs", "gfs2", "ocfs2", "9p", "virtiofs", "fuse.s3fs", "s3fs", "fuse.rclone", "rclone"}

func (e mountEntry) network() bool {
	return slices.Contains(networkTypes, strings.ToLower(e.kind)) || e.has("_netdev") || strings.HasPrefix(e.spec, "//") ||
		strings.Contains(e.spec, ":/") && !strings.HasPrefix(e.spec, "/dev/")
}

// virtualTypes need no device.
var virtualTypes = []string{"proc", "sysfs", "tmpfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "securityfs", "debugfs", "configfs",
	"efivarfs", "hugetlbfs", "mqueue", "overlay", "fuse.lxcfs", "none", "bind", "ramfs", "usbfs", "binfmt_misc", "nfsd", "rpc_pipefs"}

func (e mountEntry) virtual() bool {
	return slices.Contains(virtualTypes, e.kind) || e.has("bind") || e.has("rbind") || e.has("rprivate") ||
		!strings.HasPrefix(e.spec, "/dev/") && !strings.Contains(e.spec, "=")
}

// namer knows the devices of an image under the names its server gave them.
type namer struct {
	view *View
	inv  dr.Inventory
}

// find gives the device an entry of fstab means, and whether the name is one that another machine would give too.
func (n namer) find(spec string) (device Device, stable, ok bool) {
	if key, value, tagged := strings.Cut(spec, "="); tagged && !strings.HasPrefix(spec, "/") {
		return n.byTag(key, strings.Trim(value, `"`))
	}
	for _, dir := range [][2]string{{"/dev/disk/by-uuid/", "UUID"}, {"/dev/disk/by-label/", "LABEL"}, {"/dev/disk/by-partuuid/", "PARTUUID"}} {
		if value, is := strings.CutPrefix(spec, dir[0]); is {
			return n.byTag(dir[1], value)
		}
	}
	if vg, is := strings.CutPrefix(spec, "/dev/mapper/"); is {
		for _, d := range n.view.Devices {
			if parts := strings.Split(strings.TrimPrefix(d.Name, "/dev/"), "/"); len(parts) == 2 && mapperName(parts[0], parts[1]) == vg {
				return d, true, true
			}
		}
		return Device{}, true, false
	}
	if d, found := n.view.device(spec); found && d.Disk < 0 {
		return d, true, true // a logical volume or array by its own name
	}
	d, found := n.byKernelName(spec)
	return d, false, found
}

func (n namer) byTag(key, value string) (Device, bool, bool) {
	for _, d := range n.view.Devices {
		var has string
		switch strings.ToUpper(key) {
		case "UUID":
			has = d.UUID
		case "LABEL":
			has = d.Label
		case "PARTUUID":
			has = d.PartUUID
		}
		if has != "" && (has == value || strings.ToUpper(key) != "LABEL" && strings.EqualFold(has, value)) {
			return d, true, true
		}
	}
	return Device{}, true, false
}

// mapperName is what device-mapper calls a logical volume.
func mapperName(vg, lv string) string {
	return strings.ReplaceAll(vg, "-", "--") + "-" + strings.ReplaceAll(lv, "-", "--")
}

// byKernelName understands /dev/sda1 and its like. What the server's inventory says comes first, if the image bears it
// out; otherwise the letter or number of the disk is its place among the disks.
func (n namer) byKernelName(spec string) (Device, bool) {
	for _, v := range n.inv.Volumes {
		if v.Name == spec && v.UUID != "" {
			if d, _, ok := n.byTag("UUID", v.UUID); ok {
				return d, true
			}
		}
	}
	disk, part, ok := splitKernelName(strings.TrimPrefix(spec, "/dev/"))
	if !ok || !strings.HasPrefix(spec, "/dev/") {
		return Device{}, false
	}
	index := slices.IndexFunc(n.inv.Disks, func(d dr.InventoryDisk) bool { return strings.TrimPrefix(d.Name, "/dev/") == disk })
	if index < 0 {
		if len(n.inv.Volumes) > 0 {
			return Device{}, false // the inventory is complete, and knows no such disk
		}
		index = diskIndex(disk)
	}
	for _, d := range n.view.Devices {
		if d.Disk == index && d.Number == part {
			return d, true
		}
	}
	return Device{}, false
}

// letterDisks are families of disks that are lettered a, b, …, aa.
var letterDisks = []string{"sd", "hd", "vd", "xvd"}

// splitKernelName splits sda1, nvme0n1p2, mmcblk0p1, cciss/c0d0p1 into disk and partition; 0 is the whole disk.
func splitKernelName(name string) (disk string, part int, ok bool) {
	for _, f := range letterDisks {
		rest, is := strings.CutPrefix(name, f)
		if !is {
			continue
		}
		letters := strings.TrimRight(rest, "0123456789")
		if letters == "" || len(letters) > 2 || strings.Trim(letters, "abcdefghijklmnopqrstuvwxyz") != "" {
			continue
		}
		n, ok := partNumber(rest[len(letters):])
		return f + letters, n, ok
	}
	if strings.HasPrefix(name, "nvme") || strings.HasPrefix(name, "mmcblk") || strings.HasPrefix(name, "cciss/c") || strings.HasPrefix(name, "ida/c") {
		disk, number, has := name, "", false
		if i := strings.LastIndexByte(name, 'p'); i > 0 && i+1 < len(name) && strings.Trim(name[i+1:], "0123456789") == "" {
			disk, number, has = name[:i], name[i+1:], true
		}
		if !has {
			return disk, 0, true
		}
		n, ok := partNumber(number)
		return disk, n, ok
	}
	return "", 0, false
}

func partNumber(digits string) (int, bool) {
	if digits == "" {
		return 0, true
	}
	n, err := strconv.Atoi(digits)
	return n, err == nil && n >= 1 && n <= 256
}

// diskIndex is the place of a disk among its like: sdb is 1, nvme2n1 is 2, cciss/c0d1 is 1.
func diskIndex(disk string) int {
	for _, f := range letterDisks {
		if letters, is := strings.CutPrefix(disk, f); is {
			n := 0
			for _, c := range letters {
				n = n*26 + int(c-'a') + 1
			}
			return n - 1
		}
	}
	var digits string
	switch {
	case strings.HasPrefix(disk, "nvme"):
		digits, _, _ = strings.Cut(disk[len("nvme"):], "n")
	case strings.HasPrefix(disk, "mmcblk"):
		digits = disk[len("mmcblk"):]
	default:
		digits = disk[strings.LastIndexByte(disk, 'd')+1:]
	}
	n, err := strconv.Atoi(digits)
	if err != nil {
		return -1
	}
	return n
}
