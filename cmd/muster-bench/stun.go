package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
)

// stuns is how many increments are taken under load of each kind of file system.
const stuns = 25

// maxGiven is how many captures in all may be given up.
const maxGiven = 10

// stunned measures how long file systems stand still while others write to them, and looks into every image.
func stunned(ctx context.Context, b *bench) ([]Row, error) {
	var all stunning
	for _, fstype := range []string{"ext4", "xfs"} {
		if err := b.stunsOf(ctx, fstype, &all); err != nil {
			return nil, fmt.Errorf("%s: %w", fstype, err)
		}
	}
	const what = "milliseconds for which a file system stands still in a tracked capture while fio writes to it: 4 KiB at random places of a file, with an fsync every 8, and 64 KiB buffered; "
	detail := fmt.Sprintf("%d captures of ext4 and xfs, %d of them compared, and %d given up", len(all.frozen), all.compared, all.given)
	for _, why := range all.bad {
		detail += "; " + why
	}
	return []Row{
		lower("freeze under writes, median ms", median(all.frozen), 100, what+"median", detail),
		lower("freeze under writes, worst ms", slices.Max(all.frozen), 500, what+"worst", detail),
		higher("images that hold every record acknowledged before the freeze, %", 100*float64(len(all.frozen)-len(all.bad))/float64(len(all.frozen)), 100,
			"images of those captures whose file system is clean without repair (e2fsck -fn, xfs_repair -n) and, mounted without recovery, holds every record that an fsync had acknowledged before the capture began to freeze", detail),
	}, nil
}

type stunning struct {
	frozen   []float64 // milliseconds
	compared int       // captures that had to compare everything
	given    int       // captures that were given up and kept nothing
	bad      []string  // what is wrong with images
}

func (b *bench) stunsOf(ctx context.Context, fstype string, out *stunning) (err error) {
	w, err := b.newBusy(ctx, fstype, 2000)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	ctx, cancel := context.WithCancel(ctx)
	load := exec.CommandContext(ctx, "fio", "--directory="+w.mount, "--time_based", "--runtime=1800", "--size=200m", "--thread",
		"--name=database", "--rw=randwrite", "--bs=4k", "--fsync=8", "--rate_iops=500",
		"--name=files", "--rw=write", "--bs=64k", "--rate=20m")
	if err := load.Start(); err != nil {
		cancel()
		return fmt.Errorf("start fio: %w", err)
	}
	var r recorder
	recorded := make(chan error, 1)
	go func() { recorded <- r.run(ctx, filepath.Join(w.mount, "records")) }()
	defer func() {
		cancel()
		_ = load.Wait()
		err = errors.Join(err, <-recorded)
	}()
	for taken := -1; taken < stuns; taken++ { // the first is a full one
		time.Sleep(time.Second) // for the load to change something
		var acked uint64
		s, _, err := w.takeWhen(ctx, func() { acked = r.acked.Load() })
		if err != nil && out.given < maxGiven {
			// A kernel that leaves out writes again and again: no snapshot is taken, and the next try may do better.
			fmt.Fprintln(os.Stderr, "given up:", err)
			out.given++
			taken--
			continue
		}
		if err != nil {
			return err
		}
		if taken < 0 {
			continue
		}
		if s.Pass.Kind != dr.PassTracked {
			out.compared++
		}
		out.frozen = append(out.frozen, float64(s.Stats.Frozen)/float64(time.Millisecond))
		if err := w.examine(ctx, s, fstype, acked); err != nil {
			out.bad = append(out.bad, fmt.Sprintf("%s %s: %v", fstype, s.ID, err))
		}
	}
	return nil
}

// recorder appends records to a file, each safe before the next.
type recorder struct{ acked atomic.Uint64 }

func (r *recorder) run(ctx context.Context, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for n := uint64(1); ctx.Err() == nil; n++ {
		if _, err := f.Write(binary.LittleEndian.AppendUint64(nil, n)); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		r.acked.Store(n)
	}
	return nil
}

// examine looks into an image.
func (w *busy) examine(ctx context.Context, s dr.Snapshot, fstype string, acked uint64) error {
	file, at := filepath.Join(w.dir, "image"), filepath.Join(w.dir, "image.mnt")
	defer os.Remove(file)
	if err := errors.Join(w.fetch(ctx, s.ID, file), os.MkdirAll(at, 0o755)); err != nil {
		return err
	}
	options, checks := "loop,ro,norecovery", []string{"e2fsck", "-fn", file}
	if fstype == "xfs" {
		options, checks = options+",nouuid", []string{"xfs_repair", "-n", file}
	}
	if out, err := exec.CommandContext(ctx, "mount", "-o", options, file, at).CombinedOutput(); err != nil {
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	records, err := os.ReadFile(filepath.Join(at, "records"))
	if out, uerr := exec.Command("umount", at).CombinedOutput(); uerr != nil {
		return fmt.Errorf("unmount: %w: %s", uerr, out)
	}
	if err != nil {
		return err
	}
	if uint64(len(records)) < 8*acked {
		return fmt.Errorf("%d records were acknowledged, the image has %d", acked, len(records)/8)
	}
	for n := range acked {
		if got := binary.LittleEndian.Uint64(records[8*n:]); got != n+1 {
			return fmt.Errorf("record %d reads %d", n+1, got)
		}
	}
	if fstype == "xfs" {
		// A frozen xfs leaves one record in its log on purpose, which a mount takes out.
		for _, c := range [][]string{{"mount", "-o", "loop,nouuid", file, at}, {"umount", at}} {
			if out, err := exec.CommandContext(ctx, c[0], c[1:]...).CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", c[0], err, out)
			}
		}
	}
	if out, err := exec.CommandContext(ctx, checks[0], checks[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", checks[0], err, out)
	}
	return nil
}

// fetch writes a snapshot's disk to a file.
func (w *busy) fetch(ctx context.Context, id, file string) (err error) {
	img, err := w.store.Image(ctx, id, 0)
	if err != nil {
		return err
	}
	defer img.Close() //nolint:errcheck // only read
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(img.Size()); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	var failed error
	err = img.Extents(ctx, 0, img.Size(), func(e image.Extent) bool {
		for at, end := e.Offset, e.Offset+e.Length; at < end && !e.Zero && failed == nil; at += int64(len(buf)) {
			part := buf[:min(int64(len(buf)), end-at)]
			if _, failed = img.ReadAt(part, at); failed == nil {
				_, failed = f.WriteAt(part, at)
			}
		}
		return failed == nil
	})
	return errors.Join(err, failed)
}
