package linux

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// held is one mounted, writable file system with content on the disks to be captured.
type held struct {
	Mount
	Path  string // where this process reaches it: the mount point, or one in another process's tree
	layer int    // how many loop devices lie between it and a disk
}

// writableOn lists the writable file systems on disks (kernel names), each once, in the order in which they must be
// frozen: one that lives in a file on another before the other, inner mounts before outer ones, the root last.
func writableOn(root string, disks []string) ([]held, error) {
	if len(disks) == 0 {
		return nil, nil
	}
	blocks := Blocks(root)
	var out []held
	seen := map[string]bool{}
	for _, tree := range mountTrees(root) {
		table, err := mountinfo(root, tree.table)
		if err != nil {
			if tree.path == "" {
				return nil, err
			}
			continue // the process is gone
		}
		for _, m := range table {
			if seen[m.Dev] || !m.Writable() {
				continue
			}
			layer, ok := layersTo(root, blocks, table, m, disks)
			if !ok {
				continue
			}
			seen[m.Dev] = true
			out = append(out, held{Mount: m, Path: tree.path + m.Mount, layer: layer})
		}
	}
	sort.SliceStable(out, func(i, j int) bool {
		a, b := out[i], out[j]
		if a.layer != b.layer {
			return a.layer > b.layer
		}
		if d, e := depth(a.Mount.Mount), depth(b.Mount.Mount); d != e {
			return d > e
		}
		return a.ID > b.ID
	})
	return out, nil
}

func depth(path string) int { return strings.Count(strings.TrimSuffix(path, "/"), "/") }

// mountTree is one mount namespace: where its table is, and how its root is reached ("" for our own).
type mountTree struct{ table, path string }

// mountTrees gives our own mount namespace and, where that can be told, every other one: a container or a service may have
// a file system mounted that nobody else sees.
func mountTrees(root string) []mountTree {
	trees := []mountTree{{table: "proc/self/mountinfo"}}
	ours, err := os.Readlink(filepath.Join(root, "proc/self/ns/mnt"))
	if err != nil {
		return trees
	}
	seen := map[string]bool{ours: true}
	for _, pid := range names(root, "proc") {
		if _, err := strconv.Atoi(pid); err != nil {
			continue
		}
		ns, err := os.Readlink(filepath.Join(root, "proc", pid, "ns/mnt"))
		if err != nil || seen[ns] || len(trees) >= 256 {
			continue
		}
		seen[ns] = true
		trees = append(trees, mountTree{table: "proc/" + pid + "/mountinfo", path: filepath.Join(root, "proc", pid, "root")})
	}
	return trees
}

// layersTo says whether a mount stands on one of the disks, and through how many loop devices.
func layersTo(root string, blocks map[string]Block, table []Mount, m Mount, disks []string) (layer int, ok bool) {
	const deepest = 8
	for layer = range deepest {
		var file string
		for _, name := range ofMount(root, blocks, m) {
			for _, device := range chain(blocks, name) {
				if slices.Contains(disks, device) {
					return layer, true
				}
				file = first(file, blocks[device].File)
			}
		}
		lower, found := holding(table, file)
		if file == "" || !found {
			return 0, false
		}
		m = lower
	}
	return 0, false
}

// holding gives the mount that a path lies on.
func holding(table []Mount, path string) (best Mount, ok bool) {
	for _, m := range table {
		if path == m.Mount || strings.HasPrefix(path, strings.TrimSuffix(m.Mount, "/")+"/") {
			if !ok || len(m.Mount) >= len(best.Mount) {
				best, ok = m, true
			}
		}
	}
	return best, ok
}

// uncaptured names what this release cannot take although it is mounted for writing.
func uncaptured(root string) []string {
	table, _ := Mountinfo(root)
	var out []string
	for _, m := range table {
		if (m.Type == "zfs" || m.Type == "bcachefs") && m.Writable() {
			out = append(out, fmt.Sprintf("%s (%s)", m.Mount, m.Type))
		}
	}
	return out
}

// Refuse says why the disks in use cannot be told from the mount table; nil if they can.
func Refuse(root string) error {
	if odd := uncaptured(root); len(odd) > 0 {
		return fmt.Errorf("find the disks in use: %s cannot be traced to disks by this release: name the disks of this server explicitly", strings.Join(odd, ", "))
	}
	return nil
}

// written is the kernel's count of bytes written to and discarded from a block device.
func written(root, name string) int64 {
	stat := text(root, "sys/block", name, "stat")
	if stat == "" { // a partition
		if dirs, _ := filepath.Glob(filepath.Join(root, "sys/block/*", name, "stat")); len(dirs) == 1 {
			stat = text(dirs[0])
		}
	}
	f := strings.Fields(stat)
	var n int64
	for _, column := range []int{6, 13} { // sectors written, sectors discarded
		if column < len(f) {
			sectors, _ := strconv.ParseInt(f[column], 10, 64)
			n += sectors * 512
		}
	}
	return n
}

// counted lists the block devices whose write counters tell whether disks stood still: a disk itself, or where LVM, md or
// LUKS lie on it, the topmost devices, because those layers write records of their own to the disk.
func counted(root string, disks []string) []string {
	blocks := Blocks(root)
	var out []string
	for _, disk := range disks {
		under := map[string]bool{} // devices that others stand on
		var above []string
		layered := false
		for name, b := range blocks {
			if name == disk || !slices.Contains(chain(blocks, name), disk) {
				continue
			}
			above = append(above, name)
			layered = layered || stacked(name)
			for _, p := range b.Parents {
				under[p] = true
			}
		}
		if !layered {
			out = append(out, disk)
			continue
		}
		for _, name := range above {
			if !under[name] {
				out = append(out, name)
			}
		}
	}
	sort.Strings(out)
	return slices.Compact(out)
}

// counters is a reading of what was written below the file systems.
type counters struct {
	device  map[string]int64 // bytes
	swapped int64            // bytes that went out to swap, on whatever device
}

func readCounters(root string, devices []string) counters {
	c := counters{device: map[string]int64{}}
	for _, d := range devices {
		c.device[d] = written(root, d)
	}
	for line := range strings.Lines(content(root, "proc/vmstat")) {
		if pages, ok := strings.CutPrefix(line, "pswpout "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(pages), 10, 64)
			c.swapped = n * int64(os.Getpagesize())
		}
	}
	return c
}

// disturbed says which device was written to between two readings by something other than swap; nil if none was.
func (c counters) disturbed(later counters) error {
	for name, before := range c.device {
		if n := later.device[name] - before; n > later.swapped-c.swapped {
			return fmt.Errorf("%s was written to (%d bytes)", name, n)
		}
	}
	return nil
}

// Lock keeps this process in memory, so that it can run while the file systems that hold its program and its swap stand
// still, and asks the kernel not to choose it when memory runs out.
func Lock() error {
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE); err != nil {
		return fmt.Errorf("lock the agent in memory: %w", err)
	}
	return nil
}
