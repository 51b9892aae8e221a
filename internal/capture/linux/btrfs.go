package linux

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The parts of a btrfs device that are in use though no chunk is there: the beginning, and the copies of the superblock.
var btrfsReserved = []Range{{0, 1 << 20}, {64 << 20, 64 << 10}, {256 << 30, 64 << 10}}

// btrfsFree gives what a mounted btrfs has not allocated to any chunk on one of its devices ("major:minor"), from the
// beginning of the device. What is free inside its chunks is not among it.
//
// Source: include/uapi/linux/btrfs.h, btrfs_tree.h.
func btrfsFree(path, dev string) ([]Range, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	id, size, err := btrfsDevice(f, dev)
	if err != nil {
		return nil, err
	}
	chunks, err := btrfsChunks(f, id)
	if err != nil {
		return nil, err
	}
	return complement(append(chunks, btrfsReserved...), size), nil
}

func btrfsIoctl(f *os.File, request uint, arg *[4096]byte) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(unsafe.Pointer(arg))); errno != 0 {
		return fmt.Errorf("ask btrfs at %s (%#x): %w", f.Name(), request, errno)
	}
	return nil
}

const (
	btrfsFsInfo     = 0x8400941F // _IOR(0x94, 31, 1024 bytes): the highest device number comes first
	btrfsDevInfo    = 0xD000941E // _IOWR(0x94, 30, 4096 bytes): number, uuid[16], used, size; the path from byte 3072 on
	btrfsTreeSearch = 0xD0009411 // _IOWR(0x94, 17, 4096 bytes)
	btrfsMaxDevices = 1024
	btrfsDevTree    = 4
	btrfsDevExtent  = 204
	btrfsKey        = 104 // bytes of a search's key
	btrfsHeader     = 32  // bytes before each item
	btrfsMaxChunks  = 1 << 20
)

// btrfsDevice gives the file system's number of a device, and how much of it it has.
func btrfsDevice(f *os.File, dev string) (id uint64, size int64, err error) {
	var info [4096]byte
	if err := btrfsIoctl(f, btrfsFsInfo, &info); err != nil {
		return 0, 0, err
	}
	for id := uint64(0); id <= min(binary.NativeEndian.Uint64(info[:]), btrfsMaxDevices); id++ {
		var d [4096]byte
		binary.NativeEndian.PutUint64(d[:], id)
		if err := btrfsIoctl(f, btrfsDevInfo, &d); err != nil {
			if errors.Is(err, unix.ENODEV) {
				continue // there is none of that number
			}
			return 0, 0, err
		}
		name, _, _ := bytes.Cut(d[3072:], []byte{0})
		var st unix.Stat_t
		if unix.Stat(string(name), &st) == nil && fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)) == dev {
			return id, int64(binary.NativeEndian.Uint64(d[32:]) & (1<<62 - 1)), nil
		}
	}
	return 0, 0, fmt.Errorf("ask btrfs at %s: device %s is not one of its devices", f.Name(), dev)
}

// btrfsChunks gives what is allocated on a device.
func btrfsChunks(f *os.File, device uint64) ([]Range, error) {
	var out []Range
	for from := uint64(0); len(out) < btrfsMaxChunks; {
		var s [4096]byte
		for i, v := range []uint64{btrfsDevTree, device, device, from, ^uint64(0), 0, ^uint64(0)} {
			binary.NativeEndian.PutUint64(s[8*i:], v)
		}
		for i, v := range []uint32{btrfsDevExtent, btrfsDevExtent, 1 << 16} {
			binary.NativeEndian.PutUint32(s[56+4*i:], v)
		}
		if err := btrfsIoctl(f, btrfsTreeSearch, &s); err != nil {
			return nil, err
		}
		count, at := binary.NativeEndian.Uint32(s[64:]), btrfsKey
		for range count {
			if at+btrfsHeader > len(s) {
				return nil, errors.New("ask btrfs for its chunks: the answer makes no sense")
			}
			offset, length := binary.NativeEndian.Uint64(s[at+16:]), int(binary.NativeEndian.Uint32(s[at+28:]))
			if at += btrfsHeader; length < 32 || at+length > len(s) {
				return nil, errors.New("ask btrfs for its chunks: the answer makes no sense")
			}
			out = append(out, Range{int64(offset), int64(binary.LittleEndian.Uint64(s[at+24:]))})
			at, from = at+length, offset+1
		}
		if count == 0 || from == 0 {
			return out, nil
		}
	}
	return nil, errors.New("ask btrfs for its chunks: there are too many")
}
