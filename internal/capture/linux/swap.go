package linux

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// swapHead is what is kept of a swap area, in bytes: its header lies in the first page, and no processor has larger ones.
const swapHead = 64 << 10

// Swapping gives the parts of a disk (kernel name) that the kernel swaps to now, in order: what lies there is of no use after
// the boot that wrote it. Their beginnings, with what makes them swap areas, are not among them, so that where the parts read
// as zeros they are swap areas as new. Only partitions and files of ext4 and xfs right on the disk or a partition of it are
// known.
func Swapping(disk string) []Range {
	const root = "/"
	blocks := Blocks(root)
	var out []Range
	for _, path := range Swaps(root) {
		if name := kernelName(blocks, path); name != "" {
			b := blocks[name]
			start, ok := partitionStart(root, disk, b)
			if size := sizeOf(root, disk, b); ok && size > swapHead {
				out = append(out, Range{start + swapHead, size - swapHead})
			}
			continue
		}
		parts, err := swapFile(root, blocks, disk, path)
		if err == nil {
			out = append(out, parts...)
		}
	}
	slices.SortFunc(out, func(a, b Range) int { return cmp.Compare(a.Offset, b.Offset) })
	return out
}

// SwapState is another text once Swapping may give something else. It costs next to nothing.
func SwapState() string {
	var b strings.Builder
	for _, path := range Swaps("/") {
		var st unix.Stat_t
		_ = unix.Stat(path, &st)
		fmt.Fprintln(&b, path, st.Dev, st.Ino, st.Rdev, st.Ctim)
	}
	return b.String()
}

// sizeOf gives the size of a disk or of a partition of it, in bytes.
func sizeOf(root, disk string, b Block) int64 {
	where := "sys/block/" + disk
	if b.Name != disk {
		where += "/" + b.Name
	}
	sectors, _ := strconv.ParseInt(strings.TrimSpace(text(root, where, "size")), 10, 64)
	return sectors * 512
}

// swapFile gives where the content of a swap file lies on a disk. The kernel keeps it from moving while it swaps there.
func swapFile(root string, blocks map[string]Block, disk, path string) ([]Range, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	dev := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	table, err := Mountinfo(root)
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(table, func(m Mount) bool { return m.Dev == dev })
	if at < 0 || table[at].Type != "ext4" && table[at].Type != "xfs" {
		return nil, errors.New("its file system does not say where on the disk it is")
	}
	for _, b := range blocks {
		if b.Dev != dev {
			continue
		}
		if start, ok := partitionStart(root, disk, b); ok {
			return extentsOf(f, start)
		}
	}
	return nil, errors.New("it is not on this disk")
}

// fiemap is the kernel's, include/uapi/linux/fiemap.h.
type fiemap struct {
	start, length                 uint64
	flags, mapped, count, padding uint32
	extents                       [fiemapAtOnce]fiemapExtent
}

type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

const (
	getFiemap     = 0xC020660B // _IOWR('f', 11, struct fiemap)
	fiemapAtOnce  = 256
	fiemapLast    = 0x1
	fiemapStrange = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400 // unknown, delayed, encoded, encrypted, not aligned, inline, tail
	maxExtents    = 1 << 16
)

// extentsOf gives where a file lies behind its first swapHead bytes, its device beginning at byte start of the disk.
func extentsOf(f *os.File, start int64) ([]Range, error) {
	call := fiemap{length: ^uint64(0), count: fiemapAtOnce}
	var out []Range
	for len(out) < maxExtents {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getFiemap, uintptr(unsafe.Pointer(&call))); errno != 0 {
			return nil, fmt.Errorf("ask where %s lies: %w", f.Name(), errno)
		}
		if call.mapped == 0 || call.mapped > fiemapAtOnce {
			return out, nil
		}
		for _, e := range call.extents[:call.mapped] {
			head := uint64(0)
			if e.logical < swapHead {
				head = min(e.length, swapHead-e.logical)
			}
			if e.flags&fiemapStrange == 0 && e.length > head {
				out = append(out, Range{start + int64(e.physical+head), int64(e.length - head)})
			}
			if e.flags&fiemapLast != 0 {
				return out, nil
			}
			call.start = e.logical + e.length
		}
	}
	return out, nil
}
