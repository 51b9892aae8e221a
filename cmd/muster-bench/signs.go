package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/disk"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

// lookCost measures what looking for signs of tampering costs a capture: a first one of the whole image.
func lookCost(ctx context.Context, b *bench) ([]Row, error) {
	var share, block []float64
	for range b.runs {
		s, n, err := b.timeSigns(ctx)
		if err != nil {
			return nil, err
		}
		share, block = append(share, s), append(block, n)
	}
	return []Row{lower("cost of looking for signs of tampering, % of a full capture", 100*median(share), 3,
		"time that all processors spend in looking at blocks, over the time of all processors that a first capture of the shop's disk image takes (read, looked at, kept, read back); medians",
		fmt.Sprintf("%.1f µs a block of %d KiB that holds anything", median(block), store.DefaultBlockSize>>10))}, nil
}

func (b *bench) timeSigns(ctx context.Context) (share, block float64, err error) {
	st, dir, err := b.newStore(ctx, "signs")
	if err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(dir)
	defer st.Close(ctx)
	src, err := disk.Open([]string{b.image})
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	s, err := capture.Take(ctx, src, st, api.SnapshotTask{ID: dr.NewSnapshotID(start), Server: dr.Server{ID: "srv-bench", Name: "bench"}}, nil)
	if err != nil {
		return 0, 0, err
	}
	took := float64(s.Signs.Took)
	return took / (float64(time.Since(start)) * float64(runtime.GOMAXPROCS(0))), took / 1000 / (float64(s.Disks[0].Data) / store.DefaultBlockSize), nil
}
