package folder

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"github.com/kopia/kopia/repo/blob"
	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/durable"
)

// Large blobs are written past the page cache: it would only cost processor time, and reading back must not be answered
// from it. directSize is the piece in which that is done, a multiple of any sector; what lies well in memory is written as it is, and read back, in
// larger ones.
const (
	directSize = 1 << 20
	largeSize  = 4 << 20
	sector     = 4096
)

// tempMark is in the name of every file that is not complete. Kopia uses it too and never reads such a file.
const tempMark = ".tmp."

// PutBlob writes a blob, its name, and the names of the folders it is in, to the medium.
func (p *place) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	if opts.HasRetentionOptions() || opts.DoNotRecreate {
		return blob.ErrUnsupportedPutBlobOption
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	dir, path, err := p.paths.GetShardedPathAndFilePath(ctx, id)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	temp := path + tempMark + rand.Text()
	if err := writeFile(temp, data); err != nil {
		return errors.Join(err, remove(temp))
	}
	if t := opts.SetModTime; !t.IsZero() {
		if err := os.Chtimes(temp, t, t); err != nil {
			return errors.Join(err, remove(temp))
		}
	}
	if err := os.Rename(temp, path); err != nil {
		return errors.Join(err, remove(temp))
	}
	if opts.GetModTime != nil {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		*opts.GetModTime = info.ModTime()
	}
	return p.syncNames(dir)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// writeFile writes and syncs a new file, past the page cache if it is large and the file system can do that.
func writeFile(path string, data blob.Bytes) error {
	if data.Length() >= directSize {
		err := writeThrough(path, data, unix.O_DIRECT)
		if !errors.Is(err, unix.EINVAL) {
			return err
		}
		if err := remove(path); err != nil {
			return err
		}
	}
	return writeThrough(path, data, 0)
}

func writeThrough(path string, data blob.Bytes, flag int) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|flag, 0o600)
	if err != nil {
		return err
	}
	w := &pieces{f: f, direct: flag != 0}
	_, err = data.WriteTo(w)
	if err == nil {
		err = w.finish(int64(data.Length()))
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// pieces collects small writes into pieces that O_DIRECT takes, and writes what is one already as it is. The runtime aligns
// allocations of that size to its pages; where that should not be enough, the kernel says EINVAL and the caller falls back.
type pieces struct {
	f      *os.File
	buf    []byte
	direct bool
}

func (w *pieces) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if len(w.buf) == 0 && len(p) >= directSize && aligned(p) {
			k := min(len(p), largeSize) / directSize * directSize
			if _, err := w.f.Write(p[:k]); err != nil {
				return 0, err
			}
			p = p[k:]
			continue
		}
		if w.buf == nil {
			w.buf = make([]byte, 0, directSize)
		}
		k := copy(w.buf[len(w.buf):cap(w.buf)], p)
		w.buf, p = w.buf[:len(w.buf)+k], p[k:]
		if len(w.buf) == cap(w.buf) {
			if _, err := w.f.Write(w.buf); err != nil {
				return 0, err
			}
			w.buf = w.buf[:0]
		}
	}
	return n, nil
}

func aligned(p []byte) bool { return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%sector == 0 }

// finish writes the last piece, filled up to a whole sector, and cuts the file to its size.
func (w *pieces) finish(size int64) error {
	if len(w.buf) > 0 {
		end := len(w.buf)
		if w.direct {
			end = (end + sector - 1) / sector * sector
			clear(w.buf[len(w.buf):end])
		}
		if _, err := w.f.Write(w.buf[:end]); err != nil {
			return err
		}
	}
	if w.direct {
		return w.f.Truncate(size)
	}
	return nil
}

// syncNames puts the names in a folder on the medium, and the folder's own name if that has not been done yet.
func (p *place) syncNames(dir string) error {
	if err := durable.Sync(dir); err != nil {
		return err
	}
	for dir != p.root && len(dir) > len(p.root) {
		p.mu.Lock()
		done := p.synced[dir]
		p.mu.Unlock()
		if done {
			return nil
		}
		if err := durable.Sync(filepath.Dir(dir)); err != nil {
			return err
		}
		p.mu.Lock()
		p.synced[dir] = true
		p.mu.Unlock()
		dir = filepath.Dir(dir)
	}
	return nil
}

// GetBlob reads once. Kopia's own tries ten times over seconds when a sector is bad.
func (p *place) GetBlob(ctx context.Context, id blob.ID, offset, length int64, output blob.OutputBuffer) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	output.Reset()
	_, path, err := p.paths.GetShardedPathAndFilePath(ctx, id)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return blob.ErrBlobNotFound
	}
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	if length < 0 {
		return p.copyAll(f, output)
	}
	if offset < 0 {
		return fmt.Errorf("%w: offset %d", blob.ErrInvalidRange, offset)
	}
	b := p.buffer(length)
	defer p.buffers.Put(&b)
	if n, err := f.ReadAt(b, offset); err != nil && (err != io.EOF || int64(n) < length) {
		return fmt.Errorf("%w: %d bytes at %d: %w", blob.ErrInvalidRange, length, offset, err)
	}
	_, err = output.Write(b)
	return err
}

func (p *place) copyAll(f *os.File, output io.Writer) error {
	if into, ok := output.(io.ReaderFrom); ok {
		_, err := into.ReadFrom(f)
		return err
	}
	b := p.buffer(directSize)
	defer p.buffers.Put(&b)
	for {
		n, err := f.Read(b)
		if n > 0 {
			if _, err := output.Write(b[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// GetFromMedium implements store.Unbuffered: it reads a blob past the page cache where the file system can do that, and has it
// dropped from there otherwise.
func (p *place) GetFromMedium(ctx context.Context, id blob.ID, output blob.OutputBuffer) error {
	err := p.getDirect(ctx, id, output)
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	p.Evict(ctx, id)
	return p.GetBlob(ctx, id, 0, -1, output)
}

func (p *place) getDirect(ctx context.Context, id blob.ID, output blob.OutputBuffer) error {
	_, path, err := p.paths.GetShardedPathAndFilePath(ctx, id)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return blob.ErrBlobNotFound
	}
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil {
		return err
	}
	output.Reset()
	b := p.buffer(largeSize)
	defer p.buffers.Put(&b)
	for left := info.Size(); left > 0; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n, err := f.Read(b) // of anything but whole sectors the end alone is read
		if err != nil {
			return err
		}
		if _, err := output.Write(b[:n]); err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

func (p *place) buffer(n int64) []byte {
	if b, ok := p.buffers.Get().(*[]byte); ok && int64(cap(*b)) >= n {
		return (*b)[:n]
	}
	return make([]byte, n)
}
