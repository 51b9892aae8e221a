package linux

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/dr"
)

// Block is a block device of the running system: a whole disk, a partition, or something stacked on others.
type Block struct {
	Name    string   // kernel name: sda, sda1, dm-0
	Dev     string   // major:minor
	Size    int64    // bytes
	Parents []string // kernel names of what it stands on; none for a whole disk
	File    string   // for a loop device: the file behind it
}

// Blocks lists every block device by its kernel name.
func Blocks(root string) map[string]Block {
	out := map[string]Block{}
	for _, disk := range names(root, "sys/block") {
		b := block(root, "sys/block/"+disk, disk)
		b.Parents = names(root, "sys/block", disk, "slaves")
		sort.Strings(b.Parents)
		b.File = text(root, "sys/block", disk, "loop/backing_file")
		out[disk] = b
		for _, part := range names(root, "sys/block", disk) {
			if text(root, "sys/block", disk, part, "partition") == "" {
				continue
			}
			p := block(root, "sys/block/"+disk+"/"+part, part)
			p.Parents = []string{disk}
			out[part] = p
		}
	}
	return out
}

func block(root, dir, name string) Block {
	sectors, _ := strconv.ParseInt(text(root, dir, "size"), 10, 64)
	return Block{Name: name, Dev: text(root, dir, "dev"), Size: sectors * 512}
}

// chain gives a device and everything it stands on. A loop device is followed to nothing: what lies behind it is a file.
func chain(blocks map[string]Block, name string) []string {
	var out []string
	var walk func(name string)
	walk = func(name string) {
		b, ok := blocks[name]
		if !ok || slices.Contains(out, name) {
			return
		}
		out = append(out, name)
		for _, p := range b.Parents {
			walk(p)
		}
	}
	walk(name)
	return out
}

// below gives the whole disks that a device stands on, itself if it is one.
func below(blocks map[string]Block, name string) []string {
	return slices.DeleteFunc(chain(blocks, name), func(n string) bool { return len(blocks[n].Parents) > 0 })
}

// ofMount gives the kernel names of the block devices behind a mount: one, or several for a btrfs.
func ofMount(root string, blocks map[string]Block, m Mount) []string {
	dev := blockDev(root, m)
	var out []string
	for _, b := range blocks {
		if b.Dev == dev {
			out = append(out, b.Name)
		}
	}
	if m.Type == "btrfs" && len(out) == 1 {
		for _, fs := range names(root, "sys/fs/btrfs") {
			if members := names(root, "sys/fs/btrfs", fs, "devices"); slices.Contains(members, out[0]) {
				sort.Strings(members)
				return members
			}
		}
	}
	return out
}

// InUse gives the whole disks, in order of name length and name (sda … sdz, sdaa), that hold the mounted file systems, swap,
// and everything stacked on disks (LVM, md, LUKS). Loop devices, RAM disks and optical drives are never among them.
func InUse(root string) ([]string, error) {
	table, err := Mountinfo(root)
	if err != nil {
		return nil, err
	}
	blocks := Blocks(root)
	used := map[string]bool{}
	mark := func(name string) {
		for _, disk := range below(blocks, name) {
			used[disk] = true
		}
	}
	for _, m := range table {
		for _, name := range ofMount(root, blocks, m) {
			mark(name)
		}
	}
	for _, swap := range Swaps(root) {
		mark(kernelName(blocks, swap))
	}
	for name, b := range blocks {
		if len(b.Parents) > 0 && b.Parents[0] != "" && stacked(name) {
			mark(name)
		}
	}
	var out []string
	for disk := range used {
		if !virtual(disk) {
			out = append(out, disk)
		}
	}
	sort.Slice(out, func(i, j int) bool {
		if len(out[i]) != len(out[j]) {
			return len(out[i]) < len(out[j])
		}
		return out[i] < out[j]
	})
	return out, nil
}

// stacked says whether a device is put together from others by the kernel.
func stacked(name string) bool {
	return strings.HasPrefix(name, "dm-") || strings.HasPrefix(name, "md")
}

// virtual says whether a whole device is none of the machine's disks.
func virtual(name string) bool {
	for _, p := range []string{"loop", "ram", "zram", "sr", "fd", "dm-", "md", "drbd"} {
		if rest, ok := strings.CutPrefix(name, p); ok && rest != "" && rest[0] >= '0' && rest[0] <= '9' {
			return true
		}
	}
	return stacked(name)
}

// kernelName turns a device path into a kernel name.
func kernelName(blocks map[string]Block, path string) string {
	name := strings.ReplaceAll(strings.TrimPrefix(path, "/dev/"), "/", "!")
	if _, ok := blocks[name]; ok {
		return name
	}
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
		dev := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		for _, b := range blocks {
			if b.Dev == dev {
				return b.Name
			}
		}
	}
	return ""
}

// DescribeDisk gives what is known of one whole disk.
func DescribeDisk(root, name string) dr.InventoryDisk {
	sys := func(path ...string) string { return text(root, append([]string{"sys/block", name}, path...)...) }
	b := block(root, "sys/block/"+name, name)
	notes := udev(root, b.Dev)
	d := dr.InventoryDisk{
		Name: name, Size: b.Size,
		Serial:     first(notes["ID_SCSI_SERIAL"], notes["ID_SERIAL_SHORT"], sys("device/serial"), sys("serial")),
		WWN:        first(notes["ID_WWN_WITH_EXTENSION"], notes["ID_WWN"], sys("wwid"), sys("device/wwid")),
		Model:      first(sys("device/model"), strings.ReplaceAll(notes["ID_MODEL"], "_", " ")),
		Transport:  transport(root, name, notes),
		Rotational: sys("queue/rotational") == "1",
		PTUUID:     first(notes["ID_PART_TABLE_UUID"], partitionTable(filepath.Join(root, "dev", name))),
	}
	d.SectorSize, _ = strconv.Atoi(sys("queue/logical_block_size"))
	return d
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// transport says how a disk is attached.
func transport(root, name string, notes map[string]string) string {
	path, _ := os.Readlink(filepath.Join(root, "sys/block", name))
	switch {
	case strings.HasPrefix(name, "nvme"):
		return "nvme"
	case strings.HasPrefix(name, "vd") || strings.Contains(path, "/virtio") && !strings.Contains(path, "/host"):
		return "virtio"
	case strings.HasPrefix(name, "xvd"):
		return "xen"
	case strings.HasPrefix(name, "mmcblk"):
		return "mmc"
	case strings.Contains(path, "/usb"):
		return "usb"
	case strings.Contains(path, "/ata"), notes["ID_BUS"] == "ata":
		return "sata"
	case strings.HasPrefix(name, "sd"):
		return "scsi"
	}
	return ""
}

// partitionTable reads the identifier of a disk's partition table, in the form udev gives it: a GUID, or eight digits.
func partitionTable(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	var head [8192]byte
	if n, _ := f.ReadAt(head[:], 0); n < len(head) || head[510] != 0x55 || head[511] != 0xaa {
		return ""
	}
	for _, sector := range []int{512, 4096} {
		if h := head[sector:]; string(h[:8]) == "EFI PART" {
			g := h[56:72]
			return fmt.Sprintf("%08x-%04x-%04x-%s-%s", binary.LittleEndian.Uint32(g), binary.LittleEndian.Uint16(g[4:]),
				binary.LittleEndian.Uint16(g[6:]), hex.EncodeToString(g[8:10]), hex.EncodeToString(g[10:]))
		}
	}
	return fmt.Sprintf("%08x", binary.LittleEndian.Uint32(head[440:]))
}

// Volumes lists what is stacked on the given whole disks: partitions, LVM, md, LUKS.
func Volumes(ctx context.Context, root string, disks []string) []dr.Volume {
	blocks := Blocks(root)
	var out []dr.Volume
	for name, b := range blocks {
		if len(b.Parents) == 0 {
			continue
		}
		on := below(blocks, name)
		if !slices.ContainsFunc(on, func(d string) bool { return slices.Contains(disks, d) }) {
			continue
		}
		v := dr.Volume{Name: devicePath(root, name), Type: volumeType(root, name), Size: b.Size}
		for _, p := range b.Parents {
			v.Parents = append(v.Parents, devicePath(root, p))
		}
		notes := signature(ctx, root, b)
		v.FSType, v.UUID, v.Label = notes["ID_FS_TYPE"], notes["ID_FS_UUID"], notes["ID_FS_LABEL"]
		v.PartUUID = notes["ID_PART_ENTRY_UUID"]
		out = append(out, v)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return cut(out)
}

// signature says what a device holds: udev's notes, or where udev does not run, what blkid finds.
func signature(ctx context.Context, root string, b Block) map[string]string {
	if notes := udev(root, b.Dev); notes["ID_FS_TYPE"] != "" || notes["ID_PART_ENTRY_UUID"] != "" || root != "/" {
		return notes
	}
	out, _ := run(ctx, "blkid", "-p", "-o", "udev", devicePath(root, b.Name))
	notes := map[string]string{}
	for line := range strings.Lines(out) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			notes[key] = value
		}
	}
	return notes
}

func devicePath(root, name string) string {
	if mapped := text(root, "sys/block", name, "dm/name"); mapped != "" {
		return "/dev/mapper/" + mapped
	}
	return "/dev/" + strings.ReplaceAll(name, "!", "/")
}

func volumeType(root, name string) string {
	if id := text(root, "sys/block", name, "dm/uuid"); id != "" {
		kind, _, _ := strings.Cut(id, "-")
		return strings.ToLower(kind) // LVM, CRYPT, mpath, part3
	}
	if level := text(root, "sys/block", name, "md/level"); level != "" {
		return level
	}
	if stacked(name) {
		return "dm"
	}
	return "part"
}
