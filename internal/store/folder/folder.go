// Package folder keeps a store in a folder of a local or mounted file system, in the layout of Kopia's own
// "filesystem" storage, so that
//
//	kopia repository connect filesystem --path FOLDER
//
// opens it.
//
// Kopia's driver is used for the layout and for writing. Ours adds what it lacks: names are synced as well as
// contents, reading does not try for seconds before it reports a bad sector, caches can be dropped, and locks work
// between processes.
//
// Knows: files, folders, syncing, locks.
// Must not know: what is in a blob.
package folder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/store"
)

// Driver keeps blobs in the folder Path.
type Driver struct {
	Path string
}

// lockFile holds nothing; ranges of it stand for locks. It also marks the folder as ours.
const lockFile = "muster.lock"

func (d Driver) String() string { return d.Path }

// Create makes the folder if need be. One that is not empty is store.ErrNotEmpty.
func (d Driver) Create(ctx context.Context) (store.Place, error) {
	if err := os.MkdirAll(d.Path, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(d.Path)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.Name() == "lost+found" { // an empty file system of its own is a fine place
			continue
		}
		return nil, fmt.Errorf("%w: it contains %s; give an empty folder, or open the store that is there", store.ErrNotEmpty, e.Name())
	}
	f, err := os.OpenFile(filepath.Join(d.Path, lockFile), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, store.ErrNotEmpty
	}
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Close(), syncDir(filepath.Dir(d.Path))); err != nil {
		return nil, err
	}
	return d.open(ctx, true)
}

// Open opens a folder made by Create. Another folder is store.ErrNotAStore.
func (d Driver) Open(ctx context.Context) (store.Place, error) {
	if _, err := os.Stat(filepath.Join(d.Path, lockFile)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s has no %s", store.ErrNotAStore, d.Path, lockFile)
	} else if err != nil {
		return nil, err
	}
	return d.open(ctx, false)
}

func (d Driver) open(ctx context.Context, create bool) (store.Place, error) {
	path, err := filepath.Abs(d.Path)
	if err != nil {
		return nil, err
	}
	st, err := filesystem.New(ctx, &filesystem.Options{Path: path}, create)
	if err != nil {
		return nil, err
	}
	paths, ok := st.(sharded)
	if !ok {
		return nil, errors.New("kopia's filesystem storage no longer says where a blob lies")
	}
	return &place{Storage: st, paths: paths, root: path, synced: map[string]bool{}}, nil
}

// sharded is the part of Kopia's driver that knows which file a blob is.
type sharded interface {
	GetShardedPathAndFilePath(ctx context.Context, id blob.ID) (dir, file string, err error)
}

// place is an open folder.
type place struct {
	blob.Storage
	paths sharded
	root  string

	mu     sync.Mutex
	synced map[string]bool // folders whose own name is known to be on the medium

	buffers sync.Pool
}

func (p *place) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	if err := p.Storage.PutBlob(ctx, id, data, opts); err != nil {
		return err
	}
	dir, _, err := p.paths.GetShardedPathAndFilePath(ctx, id)
	if err != nil {
		return err
	}
	return p.syncNames(dir)
}

// syncNames puts the names in a folder on the medium, and the folder's own name if that has not been done yet.
func (p *place) syncNames(dir string) error {
	if err := syncDir(dir); err != nil {
		return err
	}
	for dir != p.root && strings.HasPrefix(dir, p.root) {
		p.mu.Lock()
		done := p.synced[dir]
		p.mu.Unlock()
		if done {
			return nil
		}
		if err := syncDir(filepath.Dir(dir)); err != nil {
			return err
		}
		p.mu.Lock()
		p.synced[dir] = true
		p.mu.Unlock()
		dir = filepath.Dir(dir)
	}
	return nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// GetBlob reads once. Kopia's own tries ten times over seconds when a sector is bad.
func (p *place) GetBlob(ctx context.Context, id blob.ID, offset, length int64, output blob.OutputBuffer) error {
	if err := ctx.Err(); err != nil {
		return err
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

const copySize = 1 << 20

func (p *place) copyAll(f *os.File, output io.Writer) error {
	b := p.buffer(copySize)
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

func (p *place) buffer(n int64) []byte {
	if b, ok := p.buffers.Get().(*[]byte); ok && int64(cap(*b)) >= n {
		return (*b)[:n]
	}
	return make([]byte, n)
}

// Sync syncs the whole file system the folder is on.
func (p *place) Sync(context.Context) error {
	f, err := os.Open(p.root)
	if err != nil {
		return err
	}
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return errors.Join(fmt.Errorf("sync file system of %s: %w", p.root, err), f.Close())
	}
	return f.Close()
}

// Evict drops a blob from the page cache. What was written must have been synced, or it stays.
func (p *place) Evict(ctx context.Context, id blob.ID) {
	_, path, err := p.paths.GetShardedPathAndFilePath(ctx, id)
	if err != nil {
		return
	}
	f, err := os.Open(path)
	if err != nil {
		return
	}
	defer f.Close() //nolint:errcheck // only advice
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// Sweep removes the temporary files of writes that never ended.
func (p *place) Sweep(ctx context.Context, age time.Duration) error {
	return filepath.WalkDir(p.root, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.IsDir() || !strings.Contains(e.Name(), ".f.tmp.") {
			return nil
		}
		info, err := e.Info()
		if err != nil || time.Since(info.ModTime()) < age {
			return nil
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}
