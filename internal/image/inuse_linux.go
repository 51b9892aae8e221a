package image

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// QEMU says what it does with an image by read locks on single bytes: 100 plus the number of a permission that it
// uses (block/file-posix.c, RAW_LOCK_PERM_BASE; include/block/block-common.h, BLK_PERM_*).
const (
	qemuPermissions = 100
	qemuWrite       = 1
	qemuResize      = 3
)

// CheckInUse is ErrInUse, with the reason, if somebody can be seen who may write to the file or block device at path,
// whatever its format.
func CheckInUse(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open disk: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return fmt.Errorf("open disk: %w", err)
	}
	return (&File{file: file, device: info.Mode()&os.ModeDevice != 0}).checkInUse()
}

// checkInUse is ErrInUse, with the reason, if somebody can be seen who may write to the disk.
func (f *File) checkInUse() error {
	for _, permission := range []int64{qemuWrite, qemuResize} {
		// Asking for an exclusive lock finds everybody's; nothing is locked.
		lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: qemuPermissions + permission, Len: 1}
		err := unix.FcntlFlock(f.file.Fd(), unix.F_OFD_GETLK, &lock)
		if err == nil && lock.Type != unix.F_UNLCK {
			return fmt.Errorf("%w: a running virtual machine writes to it; shut it down, or protect the machine over SSH",
				ErrInUse)
		}
		// A file system without locks cannot say; its users are not seen.
	}
	if !f.device {
		return nil
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(f.file.Fd()), &stat); err != nil {
		return err
	}
	return checkMounted(stat.Rdev)
}

// maxStack bounds how many devices are looked at: partitions, and what is stacked on them.
const maxStack = 1024

// checkMounted is ErrInUse if a device, one of its partitions or a device made of them is mounted writable or is swap.
func checkMounted(device uint64) error {
	written, err := writtenDevices()
	if err != nil {
		return fmt.Errorf("see what is mounted: %w", err)
	}
	stack, seen := []uint64{device}, map[uint64]bool{}
	for len(stack) > 0 && len(seen) < maxStack {
		d := stack[0]
		stack = stack[1:]
		if seen[d] {
			continue
		}
		seen[d] = true
		if where := written[d]; where != "" {
			return fmt.Errorf("%w: %s; unmount it, or protect the machine over SSH", ErrInUse, where)
		}
		stack = append(stack, devicesOn(d)...)
	}
	return nil
}

// devicesOn lists the partitions of a device and the devices that hold it (device mapper, md).
func devicesOn(d uint64) (on []uint64) {
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(d), unix.Minor(d))
	for _, pattern := range []string{"*/partition", "holders/*/dev"} {
		found, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, path := range found {
			text, err := os.ReadFile(filepath.Join(filepath.Dir(path), "dev"))
			var major, minor uint32
			if _, scan := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err == nil && scan == nil {
				on = append(on, unix.Mkdev(major, minor))
			}
		}
	}
	return on
}

// writtenDevices says of every device that is mounted writable, or swap, where. Some file systems hide their device's
// number behind one of their own, so the name of the source counts as well.
func writtenDevices() (map[uint64]string, error) {
	written := map[uint64]string{}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(bytes.NewReader(mounts))
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		at, of := strings.Fields(before), strings.Fields(after)
		if !ok || len(at) < 5 || len(of) < 3 || !strings.HasPrefix(of[2]+",", "rw,") {
			continue
		}
		where := "it is mounted at " + at[4]
		var major, minor uint32
		if _, err := fmt.Sscanf(at[2], "%d:%d", &major, &minor); err == nil {
			written[unix.Mkdev(major, minor)] = where
		}
		note(written, of[1], where)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	swaps, err := os.ReadFile("/proc/swaps")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(swaps)) {
		if name, _, _ := strings.Cut(line, " "); name != "" {
			note(written, name, "it is used as swap")
		}
	}
	return written, nil
}

// note adds the device of that name, if it is one.
func note(written map[uint64]string, name, where string) {
	if !strings.HasPrefix(name, "/dev/") {
		return
	}
	var stat unix.Stat_t
	if err := unix.Stat(name, &stat); err == nil && stat.Mode&unix.S_IFMT == unix.S_IFBLK {
		written[stat.Rdev] = where
	}
}
