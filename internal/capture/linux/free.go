package linux

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Range is a byte range of a disk.
type Range struct{ Offset, Length int64 }

// Free gives the parts of a disk (kernel name) that mounted file systems say hold nothing, in order. It is as the kernel has
// it in memory at some moment during the call: what is put there later is written later. Only ext4, xfs and btrfs right on the
// disk or on a partition of it are asked; what else is on the disk is not free. A file system that cannot say has nothing free.
//
// Source: the FS_IOC_GETFSMAP ioctl, include/uapi/linux/fsmap.h.
func Free(disk string) ([]Range, error) {
	const root = "/"
	systems, err := writableOn(root, []string{disk})
	if err != nil {
		return nil, err
	}
	blocks := Blocks(root)
	var out []Range
	for _, s := range systems {
		ask := freeOf
		switch {
		case s.layer > 0:
			continue
		case s.Type == "btrfs":
			ask = btrfsFree
		case s.Type != "ext4" && s.Type != "xfs":
			continue
		}
		for _, device := range ofMount(root, blocks, s.Mount) {
			start, ok := partitionStart(root, disk, blocks[device])
			if !ok {
				continue
			}
			free, err := ask(s.Path, blocks[device].Dev)
			if err != nil {
				continue // an old kernel, or a file system without the map it needs
			}
			for _, f := range free {
				out = append(out, Range{start + f.Offset, f.Length})
			}
		}
	}
	slices.SortFunc(out, func(a, b Range) int { return cmp.Compare(a.Offset, b.Offset) })
	return out, nil
}

// complement gives what of size bytes lies in none of the ranges, in order.
func complement(used []Range, size int64) (out []Range) {
	slices.SortFunc(used, func(a, b Range) int { return cmp.Compare(a.Offset, b.Offset) })
	at := int64(0)
	for _, u := range used {
		if end := min(u.Offset, size); end > at {
			out = append(out, Range{at, end - at})
		}
		at = max(at, u.Offset+u.Length)
	}
	if at < size {
		out = append(out, Range{at, size - at})
	}
	return out
}

// partitionStart says at which byte of a disk a device begins, if it is the disk or a partition of it.
func partitionStart(root, disk string, b Block) (int64, bool) {
	if b.Name == disk {
		return 0, true
	}
	if !slices.Equal(b.Parents, []string{disk}) {
		return 0, false
	}
	sectors, err := strconv.ParseInt(text(root, filepath.Join("sys/block", disk, b.Name, "start")), 10, 64)
	return sectors * 512, err == nil
}

// fsmap and fsmapHead are the kernel's.
type fsmap struct {
	device, flags                   uint32
	physical, owner, offset, length uint64
	_                               [3]uint64
}

type fsmapHead struct {
	iflags, oflags, count, entries uint32
	_                              [6]uint64
	keys                           [2]fsmap
}

const (
	getFsmap     = 0xC0C0583B // _IOWR('X', 59, struct fsmap_head)
	specialOwner = 0x10       // FMR_OF_SPECIAL_OWNER
	ownerFree    = 1          // FMR_OWN_FREE
	isLast       = 0x20       // FMR_OF_LAST
	fsmapsAtOnce = 1024
	maxFree      = 1 << 20 // free ranges of one file system that are told
)

// freeOf asks one file system. Offsets are from the beginning of its device, "major:minor".
func freeOf(path, dev string) ([]Range, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var major, minor uint32
	if _, err := fmt.Sscanf(dev, "%d:%d", &major, &minor); err != nil {
		return nil, fmt.Errorf("read device number %q: %w", dev, err)
	}
	own := minor&0xff | major<<8 | minor&^0xff<<12 // as the kernel gives device numbers to programs
	var call struct {
		fsmapHead
		recs [fsmapsAtOnce]fsmap
	}
	most := fsmap{device: ^uint32(0), flags: ^uint32(0), physical: ^uint64(0), owner: ^uint64(0), offset: ^uint64(0)}
	call.count, call.keys[1] = fsmapsAtOnce, most
	var out []Range
	for {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getFsmap, uintptr(unsafe.Pointer(&call))); errno != 0 {
			return nil, fmt.Errorf("ask %s what is free: %w", path, errno)
		}
		for _, r := range call.recs[:min(call.entries, fsmapsAtOnce)] {
			if r.flags&specialOwner == 0 || r.owner != ownerFree || r.device != own || len(out) >= maxFree || r.physical+r.length > 1<<62 {
				continue
			}
			out = append(out, Range{int64(r.physical), int64(r.length)})
		}
		if call.entries == 0 || call.entries > fsmapsAtOnce {
			return out, nil
		}
		last := call.recs[call.entries-1]
		if last.flags&isLast != 0 {
			return out, nil
		}
		call.keys[0] = last // the kernel goes on behind it
		call.entries = 0
	}
}
