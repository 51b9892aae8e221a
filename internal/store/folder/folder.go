// Package folder keeps a store in a folder of a local or mounted file system, in the layout of Kopia's own
// "filesystem" storage, so that
//
//	kopia repository connect filesystem --path FOLDER
//
// opens it.
//
// Kopia's driver is used for the layout, for listing and for deleting. Ours writes and reads: names are synced as well as
// contents, large blobs go past the page cache, a bad sector is reported at once and not after ten attempts, caches can
// be dropped, and locks work between processes.
//
// Knows: files, folders, syncing, locks.
// Must not know: what is in a blob.
package folder

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/durable"
	"github.com/musterdr/muster/internal/store"
)

// Driver keeps blobs in the folder Path.
type Driver struct {
	Path string
}

// FormatFile, at the top of the folder, holds the store's keys, sealed under the password: without it the password opens
// nothing. It never changes but when the password does.
const FormatFile = "kopia.repository.f"

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
	if err := errors.Join(f.Close(), durable.Sync(filepath.Dir(d.Path))); err != nil {
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
		if e.IsDir() || !strings.Contains(e.Name(), ".f"+tempMark) {
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
