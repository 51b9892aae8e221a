package files

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/fileset"
)

// changed reads what is kept of a name beside its stat, a file's content included, and gives it. The entry that was given is
// the one of what was read, which may be newer than the one that was looked at.
func (w *Walk) changed(at int, name string, e *fileset.Entry, st *unix.Statx_t) (*fileset.Entry, error) {
	w.opening(e.Path)
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if gone(err) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", e.Path, err)
	}
	defer unix.Close(fd)
	now, err := look(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, fmt.Errorf("look at %q: %w", e.Path, err)
	}
	if now.Mode&unix.S_IFMT != st.Mode&unix.S_IFMT || now.Ino != st.Ino || device(&now) != device(st) {
		return nil, errSwapped
	}
	target := e.Target
	if e.Kind != fileset.Link {
		e = w.entry(e.Path, e.Kind, &now)
	}
	switch e.Kind {
	case fileset.Link:
		e.Target = target
	case fileset.Symlink:
		if e.Target, err = readlink(fd); err != nil {
			return nil, fmt.Errorf("read link %q: %w", e.Path, err)
		}
	case fileset.File:
		if err := w.content(fd, e); err != nil {
			return nil, fmt.Errorf("read %q: %w: leave it out with --exclude if it cannot be helped", e.Path, err)
		}
	}
	w.recent(e)
	if e.Kind != fileset.Link {
		if err := w.attrs(fd, e); err != nil {
			return nil, err
		}
	}
	return e, w.emit(e)
}

func readlink(fd int) (string, error) {
	buf := make([]byte, fileset.MaxPath+1)
	n, err := unix.Readlinkat(fd, "", buf)
	if err != nil {
		return "", err
	}
	if n == 0 || n > fileset.MaxPath {
		return "", errors.New("its target has no length that a target can have")
	}
	return string(buf[:n]), nil
}

// through names what a descriptor holds open. It needs no right to find it again, and nobody can swap it.
func through(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// content reads a file until it was not written to meanwhile, and fills in its size and holes as they were then. The
// descriptor names the file and cannot be read.
func (w *Walk) content(fd int, e *fileset.Entry) error {
	flags := unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC
	rd, err := unix.Open(through(fd), flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		rd, err = unix.Open(through(fd), flags, 0)
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(rd), e.Path)
	defer f.Close()
	if err := w.flush(); err != nil {
		return err
	}
	w.Files++
	for try := 1; ; try++ {
		before, err := look(rd, "", unix.AT_EMPTY_PATH)
		if err != nil {
			return err
		}
		*e = *w.entry(e.Path, e.Kind, &before)
		whole, err := w.pieces(f, e, &before)
		if err != nil {
			return err
		}
		after, err := look(rd, "", unix.AT_EMPTY_PATH)
		if err != nil {
			return err
		}
		if whole && after.Size == before.Size && after.Mtime == before.Mtime && after.Ctime == before.Ctime {
			return nil
		}
		if try == maxTries {
			e.Unstable = true
			w.note(noteUnstable, e.Path)
			return nil
		}
		if err := w.Out.Again(); err != nil {
			return err
		}
	}
}

// pieces gives the content of a file and says whether it was as long as it should be. If it was not, the entry says so.
func (w *Walk) pieces(f *os.File, e *fileset.Entry, st *unix.Statx_t) (whole bool, err error) {
	extents := []fileset.Extent{{Offset: 0, Length: e.Size}}
	if int64(st.Blocks)*512 < e.Size {
		if extents, err = dataOf(f, e.Size); err != nil {
			return false, err
		}
	}
	for i, x := range extents {
		for at := x.Offset; at < x.Offset+x.Length; {
			if err := w.ctx.Err(); err != nil {
				return false, err
			}
			n, err := f.ReadAt(w.buf[:min(int64(len(w.buf)), x.Offset+x.Length-at)], at)
			if n > 0 {
				if err := w.Out.Piece(w.buf[:n]); err != nil {
					return false, err
				}
				at += int64(n)
				w.Read += int64(n)
			}
			if errors.Is(err, io.EOF) && at < x.Offset+x.Length { // it was cut off meanwhile
				extents = extents[:i+1]
				if extents[i].Length = at - x.Offset; extents[i].Length == 0 {
					extents = extents[:i]
				}
				e.Size = at
				w.holes(e, extents)
				return false, nil
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return false, err
			}
		}
	}
	w.holes(e, extents)
	return true, nil
}

// holes notes where the data of a file is.
func (w *Walk) holes(e *fileset.Entry, data []fileset.Extent) {
	e.Sparse, e.Data = false, nil
	if e.Size == 0 || len(data) == 1 && data[0] == (fileset.Extent{Length: e.Size}) {
		return
	}
	e.Sparse, e.Data = true, data
}

// dataOf asks where a file has data. A file system that cannot tell has it everywhere.
func dataOf(f *os.File, size int64) (out []fileset.Extent, err error) {
	for at := int64(0); at < size; {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return out, nil // a hole up to the end
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
			return append(out, fileset.Extent{Offset: at, Length: size - at}), nil
		case err != nil:
			return nil, err
		}
		if from >= size {
			return out, nil
		}
		to := size
		if len(out) < fileset.MaxExtents-1 {
			if to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE); err != nil && !errors.Is(err, unix.ENXIO) {
				return nil, err
			}
			if err != nil || to > size || to <= from {
				to = size
			}
		}
		out = append(out, fileset.Extent{Offset: from, Length: to - from})
		at = to
	}
	return out, nil
}

// attrs reads the extended attributes of what a descriptor names.
func (w *Walk) attrs(fd int, e *fileset.Entry) error {
	names, err := grow(func(b []byte) (int, error) { return unix.Listxattr(through(fd), b) })
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && len(names) == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list attributes of %q: %w", e.Path, err)
	}
	total := 0
	for _, name := range strings.Split(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		value, err := grow(func(b []byte) (int, error) { return unix.Getxattr(through(fd), name, b) })
		switch {
		case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
			continue // removed meanwhile, or one that is only listed
		case err != nil:
			return fmt.Errorf("read attribute %q of %q: %w", name, e.Path, err)
		}
		total += len(name) + len(value)
		if name == "" || len(name) > fileset.MaxName || len(value) > fileset.MaxAttr || total > fileset.MaxAttrBytes || len(e.Attrs) == fileset.MaxAttrs {
			w.note(noteAttrs, e.Path)
			e.Attrs = nil
			return nil
		}
		e.Attrs = append(e.Attrs, fileset.Attr{Name: name, Value: string(value)})
	}
	slices.SortFunc(e.Attrs, func(a, b fileset.Attr) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

// grow asks for something whose length may change until it fits.
func grow(ask func([]byte) (int, error)) ([]byte, error) {
	for size := 1024; ; size *= 8 {
		b := make([]byte, size)
		n, err := ask(b)
		if errors.Is(err, unix.ERANGE) && size < fileset.MaxAttr*2 {
			continue
		}
		if err != nil {
			return nil, err
		}
		return b[:n], nil
	}
}
