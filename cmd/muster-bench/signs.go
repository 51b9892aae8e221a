package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/disk"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/signs"
	"github.com/musterdr/muster/internal/store"
)

// lookCost measures what looking for signs of tampering costs a first capture of the whole image.
func lookCost(ctx context.Context, b *bench) ([]Row, error) {
	var share []float64
	detail := ""
	for range b.runs {
		took, blocks, err := b.timeLook()
		if err != nil {
			return nil, err
		}
		whole, err := b.timeCapture(ctx)
		if err != nil {
			return nil, err
		}
		share = append(share, 100*took.Seconds()/whole.Seconds())
		detail = fmt.Sprintf("last round: %d blocks, %.1f µs each; %.2f s of %.1f s", blocks, float64(took.Microseconds())/float64(blocks), took.Seconds(), whole.Seconds())
	}
	return []Row{lower("cost of looking for signs of tampering, % of a full capture", median(share), 3,
		"processor time for looking at every block of the shop's disk image that holds anything, over that of a whole first capture of it (read, looked at, kept, read back); medians", detail)}, nil
}

// timeLook looks at the blocks alone, as they come out of a buffer.
func (b *bench) timeLook() (took time.Duration, blocks int64, err error) {
	src, err := image.OpenFile(b.image)
	if err != nil {
		return 0, 0, err
	}
	defer src.Close()
	const block = store.DefaultBlockSize
	m, err := signs.NewMap(block, src.Size())
	if err != nil {
		return 0, 0, err
	}
	buf, zero := make([]byte, 1<<20), make([]byte, block)
	for off := int64(0); off+int64(len(buf)) <= src.Size(); off += int64(len(buf)) {
		if _, err := src.ReadAt(buf, off); err != nil {
			return 0, 0, err
		}
		for at := 0; at < len(buf); at += block {
			data := buf[at : at+block]
			if string(data) == string(zero) {
				continue
			}
			began := time.Now()
			m.Look((off+int64(at))/block, data)
			took += time.Since(began)
			blocks++
		}
	}
	return took, blocks, nil
}

// timeCapture gives the processor time of a first capture.
func (b *bench) timeCapture(ctx context.Context) (time.Duration, error) {
	st, dir, err := b.newStore(ctx, "signs")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	defer st.Close(ctx)
	src, err := disk.Open([]string{b.image})
	if err != nil {
		return 0, err
	}
	before := processor()
	_, err = capture.Take(ctx, src, st, api.SnapshotTask{ID: dr.NewSnapshotID(time.Now()), Server: dr.Server{ID: "srv-bench", Name: "bench"}}, nil)
	return processor() - before, err
}

// processor is the processor time of this process so far.
func processor() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
