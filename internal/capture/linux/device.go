package linux

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Disk is an open disk to read from: a whole disk of this system, or a file with a disk's content.
type Disk struct {
	Name   string // kernel name, or the file's base name
	Size   int64  // bytes
	Kernel string // kernel name; "" for a file
	file   *os.File
}

// OpenDisk opens a disk given by kernel name or absolute path. It reads around the page cache: what is read is what the
// device holds, and the server's cache is left alone. Reads begin at a multiple of 4096 bytes, end at one or at the end of
// the disk, and go to a view.Buffer.
func OpenDisk(name string) (*Disk, error) {
	path := name
	if !filepath.IsAbs(path) {
		if strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
			return nil, fmt.Errorf("open disk %q: give a kernel name like sda, or an absolute path", name)
		}
		path = filepath.Join("/dev", name)
	}
	flags := os.O_RDONLY
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, fmt.Errorf("open disk %s: %w", name, err)
	}
	d := &Disk{Name: filepath.Base(path), file: f}
	if err := d.identify(); err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

func (d *Disk) identify() error {
	info, err := d.file.Stat()
	if err != nil {
		return fmt.Errorf("open disk %s: %w", d.Name, err)
	}
	switch {
	case info.Mode().IsRegular():
		d.Size = info.Size()
		return nil
	case info.Mode()&os.ModeDevice == 0 || info.Mode()&os.ModeCharDevice != 0:
		return fmt.Errorf("open disk %s: it is neither a block device nor a file", d.Name)
	}
	if d.Size, err = d.file.Seek(0, io.SeekEnd); err != nil {
		return fmt.Errorf("measure disk %s: %w", d.Name, err)
	}
	st := info.Sys().(*syscall.Stat_t)
	dev := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	for _, b := range Blocks("/") {
		if b.Dev == dev {
			d.Kernel, d.Name = b.Name, b.Name
			return nil
		}
	}
	return fmt.Errorf("open disk %s: the kernel does not list it", d.Name)
}

// ReadAt reads from the disk. A file that has become shorter is an error, not an early end.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		m, err := unix.Pread(int(d.file.Fd()), p[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err == nil && m == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return n, fmt.Errorf("read disk %s at byte %d: %w", d.Name, off+int64(n), err)
		}
		n += m
	}
	return len(p), nil
}

// Close closes the disk.
func (d *Disk) Close() error { return d.file.Close() }

// Written counts what was ever written to and discarded from the disks, in bytes, as the kernel counts it. Disks that are
// files count nothing.
func Written(disks []*Disk) (n int64) {
	for _, d := range disks {
		if d.Kernel != "" {
			n += written("/", d.Kernel)
		}
	}
	return n
}
