package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrInUse is the error for a disk that somebody may be writing to, so that its content is not that of one instant.
var ErrInUse = errors.New("the disk is in use")

// File is a raw disk image file or a block device, opened for reading only. It does not keep others from writing.
type File struct {
	path   string
	file   *os.File
	direct *os.File // the same with O_DIRECT; nil if reads go through the page cache
	size   int64
	device bool
	data   atomic.Pointer[Extent] // where data was found last: asking the kernel for every read costs a sixth of it
}

// OpenFile opens a raw disk image file or a block device. It refuses what is no raw disk (an image in another format, a
// compressed file, an empty one) and says how to convert it. A disk that a running QEMU may write to, or a device that
// is mounted writable, is ErrInUse; users of other kinds are not recognised.
func OpenFile(path string) (*File, error) {
	f, err := OpenFileInUse(path)
	if err != nil {
		return nil, err
	}
	if err := f.checkInUse(); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("open disk %s: %w", path, err)
	}
	return f, nil
}

// OpenFileInUse is OpenFile without ErrInUse, for callers who see to it themselves that what they read makes sense.
func OpenFileInUse(path string) (*File, error) {
	// Without O_NONBLOCK opening a FIFO would wait for a writer.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	f := &File{path: path, file: file}
	if err = f.measure(); err == nil {
		err = refuseFormats(f, f.size)
	}
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("open disk %s: %w", path, err)
	}
	return f, nil
}

// measure finds out what kind of file it is and how long.
func (f *File) measure() error {
	info, err := f.file.Stat()
	if err != nil {
		return err
	}
	switch mode := info.Mode(); {
	case mode.IsRegular():
		f.size = info.Size()
	case mode.IsDir():
		return errors.New("it is a folder: give a raw disk image or a block device")
	case mode.Type() == fs.ModeDevice:
		f.device = true
		if f.size, err = deviceSize(f.file); err != nil {
			return fmt.Errorf("measure device: %w", err)
		}
	default:
		return errors.New("it is neither a file nor a block device")
	}
	if f.size == 0 {
		return errors.New("it is empty: a disk has at least one sector")
	}
	return nil
}

func deviceSize(file *os.File) (int64, error) {
	var size uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return 0, errno
	}
	return int64(size), nil
}

// Size is the length in bytes when the file was opened.
func (f *File) Size() int64 { return f.size }

// Device says whether it is a block device.
func (f *File) Device() bool { return f.device }

// Close closes the file. Reads that are under way must have ended.
func (f *File) Close() error {
	err := f.file.Close()
	if f.direct != nil {
		err = errors.Join(err, f.direct.Close())
	}
	return err
}

// Direct lets later reads come from the medium and not from the page cache, and says whether that is possible here; if
// not, nothing changes. A device below a mounted file system needs it: the file system does not write through the
// device's own page cache, so a second ordinary read may show what a first one saw. Call it before the first read.
func (f *File) Direct() bool {
	if f.direct != nil {
		return true
	}
	direct, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.file.Fd()), os.O_RDONLY|unix.O_DIRECT|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	b := takeDirectBuffer()
	defer directBuffers.Put(b)
	if _, err := direct.ReadAt((*b)[:directAlign], 0); err != nil && !errors.Is(err, io.EOF) {
		_ = direct.Close()
		return false
	}
	f.direct = direct
	return true
}

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read disk %s: negative offset %d", f.path, off)
	}
	if off >= f.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > f.size-off
	if short {
		p = p[:f.size-off]
	}
	read := f.file.ReadAt
	if f.direct != nil {
		read = f.readDirect
	}
	n, err := read(p, off)
	if errors.Is(err, io.EOF) && n < len(p) {
		return n, fmt.Errorf("read disk %s at offset %d: it is shorter than when it was opened: %w",
			f.path, off+int64(n), io.ErrUnexpectedEOF)
	}
	if n == len(p) {
		err = nil
		if short {
			err = io.EOF
		}
	}
	return n, err
}

// Reads with O_DIRECT begin and end at multiples of directAlign, in memory that does as well. No sector is larger.
const (
	directAlign  = 4 << 10
	directBuffer = 1 << 20
)

var directBuffers = sync.Pool{New: func() any {
	b := make([]byte, directBuffer+directAlign)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (directAlign - 1)
	b = b[skip : skip+directBuffer]
	return &b
}}

func takeDirectBuffer() *[]byte { return directBuffers.Get().(*[]byte) }

// readDirect reads through an aligned buffer.
func (f *File) readDirect(p []byte, off int64) (n int, err error) {
	b := takeDirectBuffer()
	defer directBuffers.Put(b)
	for n < len(p) {
		at := off + int64(n)
		skip := int(at % directAlign)
		want := (skip + len(p) - n + directAlign - 1) &^ (directAlign - 1)
		// At the end of the disk the medium gives less than a whole unit.
		got, err := f.direct.ReadAt((*b)[:min(want, directBuffer)], at-int64(skip))
		if got <= skip {
			if err == nil {
				err = io.EOF
			}
			return n, err
		}
		n += copy(p[n:], (*b)[skip:got])
		if err != nil && n < len(p) {
			return n, err
		}
	}
	return n, nil
}

// Extents implements Image. A file's holes are Zero; a device is all data.
func (f *File) Extents(ctx context.Context, off, length int64, yield func(Extent) bool) error {
	if off < 0 || length < 0 || length > f.size-off {
		return fmt.Errorf("find extents of %s: [%d, %d) is not within its %d bytes", f.path, off, off+length, f.size)
	}
	for end := off + length; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := f.extent(off, end)
		if err != nil {
			return fmt.Errorf("find extents of %s at offset %d: %w", f.path, off, err)
		}
		if !yield(e) {
			return nil
		}
		off += e.Length
	}
	return nil
}

// extent is the one that begins at off.
func (f *File) extent(off, end int64) (Extent, error) {
	if f.device {
		return Extent{Offset: off, Length: end - off}, nil
	}
	// Should it be punched out meanwhile, it is zeros that are not called so.
	if d := f.data.Load(); d != nil && d.Offset <= off && off < d.Offset+d.Length {
		return Extent{Offset: off, Length: min(d.Offset+d.Length, end) - off}, nil
	}
	fd := int(f.file.Fd())
	data, err := unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data from here to the end
		return Extent{Offset: off, Length: end - off, Zero: true}, nil
	case errors.Is(err, unix.EINVAL): // the file system does not tell
		return Extent{Offset: off, Length: end - off}, nil
	case err != nil:
		return Extent{}, err
	case data > off:
		return Extent{Offset: off, Length: min(data, end) - off, Zero: true}, nil
	}
	hole, err := unix.Seek(fd, off, unix.SEEK_HOLE)
	if err != nil {
		return Extent{}, err
	}
	if hole <= off { // a hole was punched meanwhile
		return Extent{Offset: off, Length: min(end-off, directAlign)}, nil
	}
	f.data.Store(&Extent{Offset: off, Length: hole - off})
	return Extent{Offset: off, Length: min(hole, end) - off}, nil
}
