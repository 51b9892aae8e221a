package windows

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/windows"
)

// Codes of the questions below, from winioctl.h and ntddvol.h.
const (
	ioctlDiskLength    = 0x7405c  // IOCTL_DISK_GET_LENGTH_INFO
	ioctlVolumeExtents = 0x560000 // IOCTL_VOLUME_GET_VOLUME_DISK_EXTENTS
	fsctlVolumeBitmap  = 0x9006f  // FSCTL_GET_VOLUME_BITMAP
)

// maxAnswer bounds an answer of a device, in bytes: a bitmap of a volume of 64 TiB in clusters of 4 KiB.
const maxAnswer = 2 << 30

// Disk is an open whole disk to read from. Reads begin and end at multiples of its sectors.
type Disk struct {
	Name   string // PhysicalDriveN
	Size   int64  // bytes
	number uint32
	file   *os.File
}

// OpenDisk opens a disk by its name.
func OpenDisk(name string) (*Disk, error) {
	n, err := number(name)
	if err != nil {
		return nil, err
	}
	d := &Disk{Name: fmt.Sprintf("PhysicalDrive%d", n), number: n}
	if d.file, err = os.Open(`\\.\` + d.Name); err != nil {
		return nil, fmt.Errorf("open disk %s: %w", d.Name, err)
	}
	answer, err := ask(d.file, ioctlDiskLength, nil, 8)
	if err == nil && len(answer) < 8 {
		err = fmt.Errorf("it answers with %d bytes", len(answer))
	}
	if err != nil {
		d.file.Close()
		return nil, fmt.Errorf("measure disk %s: %w", d.Name, err)
	}
	d.Size = int64(binary.LittleEndian.Uint64(answer))
	return d, nil
}

// ReadAt implements io.ReaderAt.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.file.ReadAt(p, off)
	if err != nil && n < len(p) {
		return n, fmt.Errorf("read disk %s at byte %d: %w", d.Name, off+int64(n), err)
	}
	return n, nil
}

// Close closes the disk.
func (d *Disk) Close() error { return d.file.Close() }

// ask asks a device, with room for an answer of some bytes, and for more as long as it has more to say.
func ask(f *os.File, code uint32, question []byte, room int) ([]byte, error) {
	var in *byte
	if len(question) > 0 {
		in = &question[0]
	}
	for ; room <= maxAnswer; room *= 4 {
		out, n := make([]byte, room), uint32(0)
		err := windows.DeviceIoControl(windows.Handle(f.Fd()), code, in, uint32(len(question)), &out[0], uint32(room), &n, nil)
		if err == nil {
			return out[:n], nil
		}
		if !errors.Is(err, windows.ERROR_MORE_DATA) && !errors.Is(err, windows.ERROR_INSUFFICIENT_BUFFER) {
			return nil, fmt.Errorf("ask with code %#x: %w", code, err)
		}
	}
	return nil, fmt.Errorf("ask with code %#x: the answer is longer than %d bytes", code, maxAnswer)
}

// maxVolumes bounds how many volumes are looked at.
const maxVolumes = 1024

// volumes lists the volumes of fixed disks. One that cannot be asked where it lies is left out.
func volumes() ([]volume, error) {
	var name [windows.MAX_PATH + 1]uint16
	handle, err := windows.FindFirstVolume(&name[0], uint32(len(name)))
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	defer func() { _ = windows.FindVolumeClose(handle) }()
	var out []volume
	for range maxVolumes {
		if windows.GetDriveType(&name[0]) == windows.DRIVE_FIXED {
			if v, err := describe(&name[0]); err == nil {
				out = append(out, v)
			}
		}
		if err := windows.FindNextVolume(handle, &name[0], uint32(len(name))); errors.Is(err, windows.ERROR_NO_MORE_FILES) {
			return out, nil
		} else if err != nil {
			return nil, fmt.Errorf("list volumes: %w", err)
		}
	}
	return out, nil
}

func describe(name *uint16) (volume, error) {
	v := volume{name: windows.UTF16PtrToString(name)}
	var fstype [windows.MAX_PATH + 1]uint16
	if windows.GetVolumeInformation(name, nil, 0, nil, nil, nil, &fstype[0], uint32(len(fstype))) == nil {
		v.fstype = windows.UTF16ToString(fstype[:])
	}
	var paths [8 << 10]uint16
	var n uint32
	if err := windows.GetVolumePathNamesForVolumeName(name, &paths[0], uint32(len(paths)), &n); err != nil {
		return volume{}, err
	}
	for rest := paths[:min(int(n), len(paths))]; len(rest) > 0 && rest[0] != 0; {
		end := max(0, slices.Index(rest, 0))
		v.paths = append(v.paths, windows.UTF16ToString(rest[:end]))
		rest = rest[end+1:]
	}
	device := v.name[:len(v.name)-1] // with the backslash it would be its root folder
	path, err := windows.UTF16PtrFromString(device)
	if err != nil {
		return volume{}, err
	}
	const both = windows.FILE_SHARE_READ | windows.FILE_SHARE_WRITE
	handle, err := windows.CreateFile(path, 0, both, nil, windows.OPEN_EXISTING, 0, 0) // asking needs no right to read
	if err != nil {
		return volume{}, err
	}
	f := os.NewFile(uintptr(handle), device)
	defer f.Close()
	answer, err := ask(f, ioctlVolumeExtents, nil, 256)
	if err != nil {
		return volume{}, err
	}
	v.on, err = ParseExtents(answer)
	return v, err
}

// InUse names the disks that hold volumes which programs reach.
func InUse() ([]string, error) {
	all, err := volumes()
	if err != nil {
		return nil, err
	}
	var numbers []uint32
	for _, v := range all {
		for _, e := range v.on {
			if len(v.paths) > 0 {
				numbers = append(numbers, e.Disk)
			}
		}
	}
	slices.Sort(numbers)
	var out []string
	for _, n := range slices.Compact(numbers) {
		out = append(out, fmt.Sprintf("PhysicalDrive%d", n))
	}
	return out, nil
}

// Available is the memory that is free, in bytes; 0 if Windows does not say.
func Available() int64 { return memory().available }

// memory is MEMORYSTATUSEX, as far as it is of use.
func memory() (m struct{ total, available int64 }) {
	var status struct {
		length, load                     uint32
		total, available, pages, virtual uint64
		_                                [3]uint64
	}
	status.length = uint32(unsafe.Sizeof(status))
	ok, _, _ := windows.NewLazySystemDLL("kernel32.dll").NewProc("GlobalMemoryStatusEx").Call(uintptr(unsafe.Pointer(&status)))
	if ok != 0 {
		m.total, m.available = int64(status.total), int64(status.available)
	}
	return m
}
