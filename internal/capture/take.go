package capture

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
)

// sumsName is the name under which the fingerprints of a disk are attached to a snapshot.
func sumsName(disk int) string { return fmt.Sprintf("sums-%d", disk) }

// Take captures a server into the store as the snapshot that the task asks for. The snapshot is complete, or there is none.
//
// What a source that compares had read when it was cut off is not a snapshot; it is what the next capture of that server
// has to begin with (see resume.go).
func Take(ctx context.Context, src Source, st *store.Store, task api.SnapshotTask, report dr.Progress) (dr.Snapshot, error) {
	return take(ctx, src, &Sink{store: st, task: task, parent: task.Parent, began: time.Now(), resume: resume{pace: usualPace}}, report)
}

func take(ctx context.Context, src Source, k *Sink, report dr.Progress) (dr.Snapshot, error) {
	defer func() { abort(ctx, k.writer, k.task.ID) }()
	if err := src.Capture(ctx, k, report); err != nil {
		k.leave(ctx, err)
		return dr.Snapshot{}, fmt.Errorf("capture %s: %w", k.task.Server.Name, err)
	}
	if k.kept == nil {
		return dr.Snapshot{}, fmt.Errorf("capture %s: the source gave nothing", k.task.Server.Name)
	}
	return *k.kept, nil
}

// Keep is called once, last: it makes a snapshot of what was written. After nil the snapshot is safe.
func (k *Sink) Keep(ctx context.Context, out Outcome) error {
	if k.writer == nil {
		return errors.New("keep a snapshot: none has begun")
	}
	if err := k.attachSums(k.writer.Attach); err != nil {
		return err
	}
	found, err := k.keepSigns(out)
	if err != nil {
		return err
	}
	k.resumes = false // from here on there is a snapshot, or a store that takes none
	kept, err := k.writer.Commit(ctx, dr.Snapshot{
		ID: k.task.ID, ServerID: k.task.Server.ID, Server: k.task.Server.Name, Parent: k.parent, Taken: dated(k.task, out.Taken),
		Consistency: out.Consistency, Pass: k.passOf(out), Inventory: out.Inventory,
		Applications: out.Applications, Notes: out.Notes, Signs: found,
		Stats: dr.CaptureStats{Read: out.Read, Sent: out.Sent, Frozen: out.Frozen, Duration: time.Since(k.began)},
	})
	if err != nil {
		return fmt.Errorf("keep the snapshot: %w", err)
	}
	k.kept = &kept
	return nil
}

// dated is the instant by which a snapshot is dated that was taken at one by this machine's clock.
func dated(task api.SnapshotTask, taken time.Time) time.Time {
	if task.Date != nil {
		taken = task.Date(taken)
	}
	return taken.UTC()
}

// passOf says how a source saw the disks and found out what changed, and if it read everything, why.
func (k *Sink) passOf(out Outcome) dr.CapturePass {
	pass := k.pass
	pass.Provider, pass.PassedOver = out.Provider, out.PassedOver
	if pass.Kind != dr.PassCompare || out.Reasons == nil {
		return pass
	}
	var why []string
	for i, reason := range out.Reasons {
		if reason != "" {
			why = append(why, fmt.Sprintf("%s: %s", k.names[i], reason))
		}
	}
	pass.Reason = strings.Join(why, "; ")
	if len(why) == 0 {
		pass.Kind = dr.PassTracked
	}
	return pass
}

// Since names the snapshot that this one builds on, and those before it, newest first, as far as the store knows them.
func (k *Sink) Since(ctx context.Context, most int) (ids []string) {
	for id := k.parent; id != "" && len(ids) < most; {
		ids = append(ids, id)
		s, err := k.store.Snapshot(ctx, id)
		if err != nil {
			break
		}
		id = s.Parent
	}
	return ids
}

// ID is the snapshot's.
func (k *Sink) ID() string { return k.task.ID }

// Server is the identifier of the server that the snapshot is taken of.
func (k *Sink) Server() string { return k.task.Server.ID }

// Inherits says whether blocks that are not written stay as the parent has them, with fingerprints that say so.
func (k *Sink) Inherits(disk int) bool { return k.inherits[disk] }

// Sink is a snapshot being written. Write and Zero may be called from many goroutines, for one block by one at a time; the
// last call for a block wins.
type Sink struct {
	store  *store.Store
	task   api.SnapshotTask
	began  time.Time
	parent string // the snapshot that this is an increment of; "" for a full one
	pass   dr.CapturePass
	writer *store.Writer
	kept   *dr.Snapshot
	watch  watch
	resume

	// One a disk.
	names    []string
	disks    []*store.DiskWriter
	inherits []bool
	sums     []*wire.Sums
}

// Begin is called once, first. For a source that compares it gives what is known of each disk, which the source keeps up
// to date; where nothing is known that is a disk of zeros. Blocks that are never written stay as they are known.
func (k *Sink) Begin(ctx context.Context, layout Layout) ([]*wire.Sums, error) {
	if k.writer != nil {
		return nil, errors.New("begin a snapshot: it has begun")
	}
	if k.watch.last = newBase(ctx, k.store, k.task.Parent, layout.Disks); k.watch.last != nil {
		k.watch.bases = append(k.watch.bases, k.watch.last)
	}
	if k.task.Trusted != k.task.Parent {
		if b := newBase(ctx, k.store, k.task.Trusted, layout.Disks); b != nil {
			k.watch.bases = append(k.watch.bases, b)
		}
	}
	known, why := k.fromParent(ctx, layout)
	k.pass = dr.CapturePass{Kind: dr.PassCompare, Reason: "changes to this source are not tracked"}
	if why != "" {
		k.parent, k.pass = "", dr.CapturePass{Kind: dr.PassFull, Reason: why}
	}
	var err error
	if k.writer, err = k.store.Begin(ctx, k.task.ID, k.parent); err != nil {
		return nil, err
	}
	from := k.watch.last
	if k.parent == "" {
		if known, from, err = k.goOn(ctx, layout); err != nil {
			return nil, err
		}
	}
	seed := wire.NewSeed()
	for i, disk := range layout.Disks {
		size := 0 // what it was
		if k.parent == "" && known == nil {
			size = wire.BlockSizeFor(disk.Size, store.DefaultBlockSize)
		}
		w, err := k.writer.Disk(ctx, disk.Name, disk.Size, size)
		if err != nil {
			return nil, err
		}
		if err := k.watch.begin(i, w.BlockSize(), disk.Size, from); err != nil {
			return nil, err
		}
		k.names, k.disks, k.inherits = append(k.names, disk.Name), append(k.disks, w), append(k.inherits, false)
		if !layout.Compares {
			continue
		}
		if known != nil && known[i].BlockSize == w.BlockSize() {
			// Of a partial no agent knows what was written since: everything is compared.
			k.sums, k.inherits[i] = append(k.sums, known[i]), k.parent != ""
			continue
		}
		s, err := wire.NewSums(seed, w.BlockSize(), disk.Size)
		if err != nil {
			return nil, err
		}
		k.sums = append(k.sums, s)
	}
	return k.sums, nil
}

// fromParent gives the parent's fingerprints, or why the parent cannot be built on.
func (k *Sink) fromParent(ctx context.Context, layout Layout) (sums []*wire.Sums, why string) {
	if k.parent == "" {
		return nil, "there is no earlier snapshot"
	}
	parent, err := k.store.Snapshot(ctx, k.parent)
	if err != nil {
		return nil, fmt.Sprintf("the earlier snapshot %s cannot be read: %v", k.parent, err)
	}
	return fit(layout, parent.Disks, k.watch.last, attachedTo(ctx, k.store, k.parent))
}

// fit gives the fingerprints attached to disks that were written before, or why those of now cannot be built on them.
func fit(layout Layout, disks []dr.SnapshotDisk, held *base, with attached) (sums []*wire.Sums, why string) {
	if len(disks) != len(layout.Disks) {
		return nil, fmt.Sprintf("the server has %d disks now and had %d", len(layout.Disks), len(disks))
	}
	for i, before := range disks {
		now := layout.Disks[i]
		if before.Name != now.Name {
			return nil, fmt.Sprintf("disk %d is %s now and was %s", i, now.Name, before.Name)
		}
		if before.Size != now.Size {
			return nil, fmt.Sprintf("disk %s has %d bytes now and had %d", now.Name, now.Size, before.Size)
		}
		if held.at(i, before.BlockSize, before.Size) == nil {
			return nil, fmt.Sprintf("what the blocks of disk %s held was not kept", now.Name)
		}
		if !layout.Compares {
			continue
		}
		b, err := with(sumsName(i))
		if err != nil {
			return nil, fmt.Sprintf("no fingerprints of disk %s were kept: %v", now.Name, err)
		}
		s, err := wire.UnmarshalSums(b)
		if err != nil || s.Size != before.Size || s.BlockSize != before.BlockSize {
			return nil, fmt.Sprintf("the fingerprints of disk %s do not fit it: %v", now.Name, err)
		}
		sums = append(sums, s)
	}
	return sums, ""
}

// Write writes one block. Where it came as a zstd frame that unpacks to it, the frame is stored and not made once more; nil
// otherwise.
func (k *Sink) Write(ctx context.Context, disk int, block int64, data, frame []byte) error {
	k.watch.look(disk, block, data)
	k.fresh.Add(int64(len(data)))
	return k.disks[disk].WritePacked(ctx, block, data, frame)
}

// Zero makes blocks read as zeros.
func (k *Sink) Zero(ctx context.Context, disk int, first, count int64) error {
	if err := k.disks[disk].Zero(ctx, first, count); err != nil {
		return err
	}
	k.watch.zero(disk, first, count)
	return nil
}

// Image takes a whole disk that does not change.
func (k *Sink) Image(ctx context.Context, disk int, img image.Image, report dr.Progress) error {
	d := k.disks[disk]
	k.watch.zero(disk, 0, d.Blocks()) // what is not read is zeros
	return d.Ingest(ctx, looked{img, &k.watch, disk, int64(d.BlockSize())}, nil, report)
}

// Part takes some extents of a disk that does not change. The rest stays as the parent has it.
func (k *Sink) Part(ctx context.Context, disk int, img image.Image, extents []image.Extent, report dr.Progress) error {
	d := k.disks[disk]
	size := int64(d.BlockSize())
	for _, e := range extents {
		if first, stop := (e.Offset+size-1)/size, (e.Offset+e.Length)/size; e.Zero && first < stop {
			k.watch.zero(disk, first, stop-first)
		}
	}
	return d.Ingest(ctx, looked{img, &k.watch, disk, size}, append([]image.Extent{}, extents...), report)
}

// abort gives up what was not committed. A writer that never was, or that has committed, is left alone.
func abort(ctx context.Context, w *store.Writer, snapshotID string) {
	if w == nil {
		return
	}
	if err := w.Abort(context.WithoutCancel(ctx)); err != nil {
		slog.WarnContext(ctx, "snapshot not given up cleanly", "snapshot", snapshotID, "error", err)
	}
}
