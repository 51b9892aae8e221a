package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

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
	take := func(ctx context.Context) (dr.Snapshot, float64, error) {
		server := dr.Server{ID: "srv-bench", Name: "bench", Data: dr.DataSet{Paths: []string{w.mount}}}
		task := api.SnapshotTask{ID: dr.NewSnapshotID(time.Now()), Server: server, Parent: parent, Image: image}
		start := time.Now()
		s, err := capture.TakeFiles(ctx, &w.source, w.store, task, nil)
		parent = task.ID
		return s, time.Since(start).Seconds(), err
	}
	if _, _, err := take(ctx); err != nil {
		return nil, err
	}
	rounds := walked{figure: "rsync"} // it keeps one copy, unsealed
	var ratio []float64
	for round := range b.runs {
		if err := w.change(ctx, round); err != nil {
			return nil, err
		}
		time.Sleep(settled)
		snap, err := rounds.round(ctx, take, peers, true)
		if err != nil {
			return nil, err
		}
		changed := float64(busyFiles/100*busyFile + 50<<20)
		ratio = append(ratio, float64(snap.Stats.Read)/changed)
	}
	return []Row{
		higher("increment of files vs restic, borg", median(rounds.theirs)/median(rounds.ours), 1.5,
			fmt.Sprintf("seconds the faster of 'restic backup' and 'borg create' takes for an increment of a folder of %d files (1 %% rewritten in place, 50 MB new), over seconds of a capture of the same folder file by file (agent started, kept, read back); medians; each begins with nothing of the file system in memory", busyFiles), rounds.last),
		lower("increment of files: read / changed", median(ratio), 1.01, "bytes of content read, over bytes in files that were rewritten or are new; median of the same increments", ""),
	}, nil
}
