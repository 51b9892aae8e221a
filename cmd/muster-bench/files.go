package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
)

// settled is how long after a change a round begins: as on a server that is captured at night, most files have been left alone for longer.
const settled = 4 * time.Second

// filesets measures increments of folders that are captured file by file against programs that do the same, on the same changes.
func filesets(ctx context.Context, b *bench) (rows []Row, err error) {
	w, err := b.newBusy(ctx, "ext4", busyFiles)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	peers, stop, err := b.walkers(ctx, w.mount)
	if err != nil {
		return nil, err
	}
	defer stop()
	// What the files go onto plays no part here.
	image, parent := dr.NewSnapshotID(time.Now()), ""
	disk := filepath.Join(w.dir, "image.raw")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		return nil, err
	}
	if err := keepFile(ctx, w.store, image, "", disk, nil, func(dr.Snapshot, int64) {}); err != nil {
		return nil, err
	}
	take := func() (dr.Snapshot, float64, error) {
		server := dr.Server{ID: "srv-bench", Name: "bench", Data: dr.DataSet{Paths: []string{w.mount}}}
		task := api.SnapshotTask{ID: dr.NewSnapshotID(time.Now()), Server: server, Parent: parent, Image: image}
		start := time.Now()
		s, err := capture.TakeFiles(ctx, &w.source, w.store, task, nil)
		parent = task.ID
		return s, time.Since(start).Seconds(), err
	}
	if _, _, err := take(); err != nil {
		return nil, err
	}
	var ours, theirs, ratio []float64
	detail := ""
	for round := range b.runs {
		if err := w.change(ctx, round); err != nil {
			return nil, err
		}
		time.Sleep(settled)
		empty := func() error {
			unix.Sync()
			return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
		}
		if err := empty(); err != nil {
			return nil, err
		}
		snap, took, err := take()
		if err != nil {
			return nil, err
		}
		detail = fmt.Sprintf("muster %.2f s", took)
		fastest := 0.0
		for _, p := range peers {
			if err := empty(); err != nil {
				return nil, err
			}
			took, err := timed(ctx, p.env, p.args[0], p.args[1:]...)
			if err != nil {
				return nil, err
			}
			if p.args[0] != "rsync" && (fastest == 0 || took < fastest) { // it keeps one copy, unsealed: a figure, not a peer
				fastest = took
			}
			detail += fmt.Sprintf(", %s %.2f s", p.args[0], took)
		}
		ours, theirs = append(ours, took), append(theirs, fastest)
		changed := float64(busyFiles/100*busyFile + 50<<20)
		ratio = append(ratio, float64(snap.Stats.Read)/changed)
	}
	return []Row{
		higher("increment of files vs restic, borg", median(theirs)/median(ours), 1.5,
			fmt.Sprintf("seconds the faster of 'restic backup' and 'borg create' takes for an increment of a folder of %d files (1 %% rewritten in place, 50 MB new), over seconds of a capture of the same folder file by file (agent started, kept, read back); medians; each begins with nothing of the file system in memory", busyFiles), detail),
		lower("increment of files: read / changed", median(ratio), 1.01, "bytes of content read, over bytes in files that were rewritten or are new; median of the same increments", ""),
	}, nil
}
