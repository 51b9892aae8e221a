package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

const password = "a key for measuring only"

// counted is an image that counts what is read of it.
type counted struct {
	image.Image
	read atomic.Int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.Image.ReadAt(p, off)
	c.read.Add(int64(n))
	return n, err
}

// fresh makes an empty folder below the work folder.
func (b *bench) fresh(name string) (string, error) {
	dir := filepath.Join(b.work, name)
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o711)
}

func (b *bench) newStore(ctx context.Context, name string) (*store.Store, string, error) {
	dir, err := b.fresh(name)
	if err != nil {
		return nil, "", err
	}
	drv := folder.Driver{Path: filepath.Join(dir, "store")}
	if err := store.Create(ctx, drv, password); err != nil {
		return nil, "", err
	}
	st, err := store.Open(ctx, drv, password)
	return st, dir, err
}

// keep ingests one disk as a snapshot.
func keep(ctx context.Context, st *store.Store, id, parent string, src image.Image, extents []image.Extent) (dr.Snapshot, error) {
	w, err := st.Begin(ctx, id, parent)
	if err != nil {
		return dr.Snapshot{}, err
	}
	defer func() { _ = w.Abort(ctx) }() // after Commit it does nothing
	d, err := w.Disk(ctx, "sda", src.Size(), 0)
	if err != nil {
		return dr.Snapshot{}, err
	}
	if err := d.Ingest(ctx, src, extents, nil); err != nil {
		return dr.Snapshot{}, err
	}
	return w.Commit(ctx, dr.Snapshot{ID: id, ServerID: "srv-bench", Server: "bench", Parent: parent, Taken: time.Now().UTC(),
		Consistency: dr.CrashConsistent, Pass: dr.CapturePass{Kind: dr.PassFull},
		Inventory: dr.Inventory{Disks: []dr.InventoryDisk{{Name: "sda", Size: src.Size()}}}})
}

// ingest compares a first full snapshot with the two best known deduplicating backup programs on the same file. Each
// round starts from an empty repository and runs all three, so that a change in the machine's speed meets all alike.
func ingest(ctx context.Context, b *bench) ([]Row, error) {
	var ours, theirs []float64
	detail := ""
	for range b.runs {
		m, err := b.timeIngest(ctx)
		if err != nil {
			return nil, err
		}
		restic, err := b.timeRestic(ctx)
		if err != nil {
			return nil, err
		}
		borg, err := b.timeBorg(ctx)
		if err != nil {
			return nil, err
		}
		ours = append(ours, m)
		theirs = append(theirs, min(restic, borg))
		detail = fmt.Sprintf("last round: muster %.1f s, restic %.1f s, borg %.1f s", m, restic, borg)
	}
	return []Row{higher("full ingest vs restic, borg", median(theirs)/median(ours), 1.8,
		"seconds the faster of 'restic backup' and 'borg create --compression zstd,1' takes for the shop's disk image, over seconds Muster takes to keep it (written, read back, published); medians, empty repository each time", detail)}, nil
}

func (b *bench) timeIngest(ctx context.Context) (float64, error) {
	st, dir, err := b.newStore(ctx, "ingest")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	defer st.Close(ctx)
	src, err := image.OpenFile(b.image)
	if err != nil {
		return 0, err
	}
	defer src.Close()
	start := time.Now()
	_, err = keep(ctx, st, dr.NewSnapshotID(start), "", src, nil)
	return time.Since(start).Seconds(), err
}

func (b *bench) timeRestic(ctx context.Context) (float64, error) {
	dir, err := b.fresh("restic")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	env := append(os.Environ(), "RESTIC_PASSWORD=x", "RESTIC_REPOSITORY="+dir+"/repo", "RESTIC_CACHE_DIR="+dir+"/cache")
	if _, err := timed(ctx, env, "restic", "init"); err != nil {
		return 0, err
	}
	return timed(ctx, env, "restic", "backup", b.image)
}

func (b *bench) timeBorg(ctx context.Context) (float64, error) {
	dir, err := b.fresh("borg")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	env := append(os.Environ(), "BORG_PASSPHRASE=x", "BORG_BASE_DIR="+dir)
	if _, err := timed(ctx, env, "borg", "init", "--encryption=repokey-blake2", dir+"/repo"); err != nil {
		return 0, err
	}
	return timed(ctx, env, "borg", "create", "--compression", "zstd,1", dir+"/repo::first", b.image)
}

func timed(ctx context.Context, env []string, name string, args ...string) (float64, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.Env = env
	start := time.Now()
	out, err := c.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("run %s: %w: %s", name, err, out)
	}
	return time.Since(start).Seconds(), nil
}

// increment changes one block in a hundred and keeps the difference, told which extents changed.
func increment(ctx context.Context, b *bench) ([]Row, error) {
	dir, err := b.fresh("increment")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, "disk.raw")
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", b.image, disk).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("copy image: %w: %s", err, out)
	}
	st, stDir, err := b.newStore(ctx, "increment-store")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(stDir)
	defer st.Close(ctx)
	parent := dr.NewSnapshotID(time.Now())
	if err := keepFile(ctx, st, parent, "", disk, nil, nil); err != nil {
		return nil, err
	}
	extents, peer, err := scatter(ctx, disk, dir)
	if err != nil {
		return nil, err
	}
	var read int64
	var snap dr.Snapshot
	if err := keepFile(ctx, st, dr.NewSnapshotID(time.Now().Add(time.Second)), parent, disk, extents, func(s dr.Snapshot, n int64) { snap, read = s, n }); err != nil {
		return nil, err
	}
	changed := snap.Stats.Changed
	return []Row{
		lower("increment: read / changed", float64(read)/float64(changed), 1.05,
			"bytes an incremental snapshot reads from the source, over bytes of the blocks that changed (1 % of the disk's non-zero blocks), given the changed extents",
			fmt.Sprintf("%d blocks, %d bytes read, %d changed", len(extents), read, changed)),
		lower("increment: stored / zstd -1", float64(snap.Stats.Stored)/float64(peer), 1.10,
			"bytes by which the store grows, sealed and with all its metadata, over the size of the changed blocks in one file compressed by 'zstd -1'",
			fmt.Sprintf("%d stored, %d by zstd", snap.Stats.Stored, peer)),
	}, nil
}

func keepFile(ctx context.Context, st *store.Store, id, parent, path string, extents []image.Extent, done func(dr.Snapshot, int64)) error {
	f, err := image.OpenFile(path)
	if err != nil {
		return err
	}
	defer f.Close()
	src := &counted{Image: f}
	snap, err := keep(ctx, st, id, parent, src, extents)
	if err == nil && done != nil {
		done(snap, src.read.Load())
	}
	return err
}

// scatter changes one non-zero block in a hundred the way a server does: a block's bytes become those of another
// block, moved by a few bytes, so that they compress like real data and are not known to the store. It gives the
// extents and what zstd makes of the changed blocks.
func scatter(ctx context.Context, disk, dir string) ([]image.Extent, int64, error) {
	const block = store.DefaultBlockSize
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	changes, err := os.Create(filepath.Join(dir, "changed"))
	if err != nil {
		return nil, 0, err
	}
	defer changes.Close()
	rng := rand.New(rand.NewPCG(1, 2))
	data, err := nonZero(f, info.Size(), block)
	if err != nil {
		return nil, 0, err
	}
	var extents []image.Extent
	buf := make([]byte, block)
	for _, i := range rng.Perm(len(data))[:len(data)/100] {
		from, to := data[rng.IntN(len(data))], data[i]
		if _, err := f.ReadAt(buf, from); err != nil && err != io.EOF {
			return nil, 0, err
		}
		buf = append(buf[7:], "changed"...)
		if _, err := f.WriteAt(buf, to); err != nil {
			return nil, 0, err
		}
		if _, err := changes.Write(buf); err != nil {
			return nil, 0, err
		}
		extents = append(extents, image.Extent{Offset: to, Length: block})
	}
	if err := f.Sync(); err != nil {
		return nil, 0, err
	}
	packed := changes.Name() + ".zst"
	if out, err := exec.CommandContext(ctx, "zstd", "-1", "-q", "-f", changes.Name(), "-o", packed).CombinedOutput(); err != nil {
		return nil, 0, fmt.Errorf("run zstd: %w: %s", err, out)
	}
	peer, err := os.Stat(packed)
	if err != nil {
		return nil, 0, err
	}
	slices.SortFunc(extents, func(a, b image.Extent) int { return cmp.Compare(a.Offset, b.Offset) })
	return extents, peer.Size(), nil
}

func nonZero(f *os.File, size, block int64) ([]int64, error) {
	var out []int64
	buf := make([]byte, block)
	for off := int64(0); off+block <= size; off += block {
		if _, err := f.ReadAt(buf, off); err != nil {
			return nil, err
		}
		for _, c := range buf {
			if c != 0 {
				out = append(out, off)
				break
			}
		}
	}
	return out, nil
}
