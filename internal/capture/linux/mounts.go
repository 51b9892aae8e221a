package linux

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/dr"
)

// Mount is one line of a mountinfo file: a file system, or a part of one, at a place in the tree.
type Mount struct {
	ID      int
	Dev     string // "major:minor" of the file system; major 0 has no block device behind it, or is btrfs
	Root    string // the part of the file system that is mounted: "/" for all of it
	Mount   string // where
	Options string // of this mount
	Type    string // ext4, xfs, …
	Device  string // what was mounted, as the mounter wrote it
	Super   string // options of the file system itself
}

// Writable says whether the file system can be written to, through this mount or another.
func (m Mount) Writable() bool {
	for o := range strings.SplitSeq(m.Super, ",") {
		if o == "ro" {
			return false
		}
	}
	return true
}

// Mountinfo reads the mount table of this process, in the order of mounting.
func Mountinfo(root string) ([]Mount, error) { return mountinfo(root, "proc/self/mountinfo") }

func mountinfo(root, path string) ([]Mount, error) {
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	return parseMountinfo(string(b)), nil
}

// parseMountinfo skips lines that it does not understand.
func parseMountinfo(table string) []Mount {
	var out []Mount
	for line := range strings.Lines(table) {
		before, after, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 6 || len(right) < 3 {
			continue
		}
		id, err := strconv.Atoi(left[0])
		if err != nil {
			continue
		}
		out = append(out, Mount{
			ID: id, Dev: left[2], Root: unescape(left[3]), Mount: unescape(left[4]), Options: left[5],
			Type: right[0], Device: unescape(right[1]), Super: right[2],
		})
	}
	return out
}

// unescape undoes the kernel's \040 form of white space and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// onDisk says whether a mount stands on a block device of this machine rather than on memory, the kernel or a network.
func (m Mount) onDisk() bool {
	return strings.HasPrefix(m.Device, "/dev/") || !strings.HasPrefix(m.Dev, "0:") || m.Type == "zfs"
}

// Mounts lists the file systems that stand on disks or come over a network, each place once, in the order of mounting.
// Sizes are those of the running system and are 0 under another root.
func Mounts(root string) ([]dr.Filesystem, error) {
	table, err := Mountinfo(root)
	if err != nil {
		return nil, err
	}
	at := map[string]int{}
	var out []dr.Filesystem
	for _, m := range table {
		if !m.onDisk() && !network(m.Type) {
			continue
		}
		fs := dr.Filesystem{Device: m.Device, Mount: m.Mount, Type: m.Type, Options: m.Options}
		if m.onDisk() {
			fs.UUID = udev(root, blockDev(root, m))["ID_FS_UUID"]
			fs.Size, fs.Used = usage(root, m.Mount)
		}
		if i, hidden := at[m.Mount]; hidden { // a later mount on the same place hides the earlier one
			out[i] = fs
			continue
		}
		at[m.Mount] = len(out)
		out = append(out, fs)
	}
	return cut(out), nil
}

// network says whether a file system type is served by another machine. statfs on one may hang, so nobody asks it.
func network(fstype string) bool {
	switch fstype {
	case "nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "9p", "afs", "lustre", "virtiofs":
		return true
	}
	return false
}

func usage(root, path string) (size, used int64) {
	var st unix.Statfs_t
	if root != "/" || unix.Statfs(path, &st) != nil {
		return 0, 0
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Blocks-st.Bfree) * st.Bsize
}

// blockDev gives the "major:minor" of the block device behind a mount. A btrfs has a made-up number of its own, so
// there the device that was named is looked up.
func blockDev(root string, m Mount) string {
	if !strings.HasPrefix(m.Dev, "0:") || root != "/" || !strings.HasPrefix(m.Device, "/dev/") {
		return m.Dev
	}
	var st unix.Stat_t
	if unix.Stat(m.Device, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return m.Dev
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
}

// udev gives what udev has noted about a block device; nil if it is not running.
func udev(root, dev string) map[string]string {
	notes := content(root, "run/udev/data/b"+dev)
	if notes == "" {
		return nil
	}
	out := map[string]string{}
	for line := range strings.Lines(notes) {
		if key, value, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "E:"), "="); ok {
			out[key] = value
		}
	}
	return out
}

// Swaps lists the swap devices and files in use.
func Swaps(root string) []string {
	var out []string
	first := true
	for line := range strings.Lines(content(root, "proc/swaps")) {
		if f := strings.Fields(line); !first && len(f) > 0 {
			out = append(out, unescape(f[0]))
		}
		first = false
	}
	return cut(out)
}

// ZFS says whether the kernel of this system has ZFS.
func ZFS(root string) bool { return len(names(root, "sys/module/zfs")) > 0 }
