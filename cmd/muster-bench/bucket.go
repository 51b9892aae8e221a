package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/cached"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/s3"
	"github.com/musterdr/muster/internal/store/s3/gateway"
)

// The reads that are timed: scattered, one after another, as a booting guest does that waits for each.
const (
	bucketLatency = 20 * time.Millisecond // added to every request
	bucketReads   = 500
	bucketRead    = 16 << 10
)

// bucketReading compares reading an image from a bucket that is far away, without and with the cache on this host, with
// reading it from a folder.
func bucketReading(ctx context.Context, b *bench) ([]Row, error) {
	dir, err := b.fresh("bucket")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	g, err := gateway.Start(ctx, filepath.Join("build", "bin", "versitygw"), filepath.Join(dir, "service"))
	if err != nil {
		return nil, fmt.Errorf("%w ('scripts/deps tools' builds it)", err)
	}
	defer g.Close()
	if err := g.Client.MakeBucket(ctx, "bench", minio.MakeBucketOptions{}); err != nil {
		return nil, err
	}
	near := s3.Driver{Endpoint: g.Addr, Plain: true, Region: gateway.Region, Bucket: "bench", PathStyle: true, Credentials: filepath.Join(dir, "credentials")}
	if err := gateway.Credentials(near.Credentials, gateway.AccessKey, gateway.SecretKey); err != nil {
		return nil, err
	}
	disk := folder.Driver{Path: filepath.Join(dir, "folder")}
	offsets, err := b.fill(ctx, disk, near)
	if err != nil {
		return nil, err
	}
	slow := slowed(g.Addr)
	defer slow.Close()
	far := near
	far.Endpoint = slow.Listener.Addr().String()
	var folders, bare, warm []float64
	for range b.runs {
		cache := cached.Driver{Driver: far, Dir: filepath.Join(dir, "cache"), Limit: 4 << 30}
		if err := os.RemoveAll(cache.Dir); err != nil {
			return nil, err
		}
		for _, m := range []struct {
			drv   store.Driver
			times *[]float64
		}{{disk, &folders}, {far, &bare}, {cache, nil}, {cache, &warm}} {
			took, err := timeReads(ctx, m.drv, offsets)
			if err != nil {
				return nil, err
			}
			if m.times != nil {
				*m.times = append(*m.times, took)
			}
		}
	}
	detail := fmt.Sprintf("%d reads of %d KiB: folder %.2f s, bucket %.2f s, bucket with a warm cache %.2f s (medians)", len(offsets), bucketRead>>10, median(folders), median(bare), median(warm))
	what := fmt.Sprintf("seconds for %d scattered reads of %d KiB of the shop's disk, one after another, each time with an empty memory, from a bucket of versitygw on this host with %s added to each request", bucketReads, bucketRead>>10, bucketLatency)
	return []Row{
		lower("reading from a far bucket, cache warm", median(warm)/median(folders), 3, what+" and a cache on disk that has seen them, over the same from a folder; medians", detail),
		higher("what the cache saves", median(bare)/median(warm), 10, what+" without a cache, over the same with one that has seen them; medians", detail),
	}, nil
}

// fill keeps the shop's disk in both stores, and gives places of it that hold data.
func (b *bench) fill(ctx context.Context, drivers ...store.Driver) ([]int64, error) {
	src, err := image.OpenFile(b.image)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	var offsets []int64
	for _, drv := range drivers {
		if err := store.Create(ctx, drv, password); err != nil {
			return nil, err
		}
		st, err := store.Open(ctx, drv, password)
		if err != nil {
			return nil, err
		}
		_, err = keep(ctx, st, "snap-bench", "", src, nil)
		if err == nil && offsets == nil {
			offsets, err = scattered(ctx, st)
		}
		if err := errors.Join(err, st.Close(ctx)); err != nil {
			return nil, err
		}
	}
	return offsets, nil
}

// scattered chooses places that hold data, the same each time.
func scattered(ctx context.Context, st *store.Store) ([]int64, error) {
	m, err := st.Image(ctx, "snap-bench", 0)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	var full []int64
	err = m.Extents(ctx, 0, m.Size(), func(e image.Extent) bool {
		for off := e.Offset; !e.Zero && off+bucketRead <= e.Offset+e.Length; off += bucketRead {
			full = append(full, off)
		}
		return true
	})
	if err != nil || len(full) < bucketReads {
		return nil, errors.Join(err, fmt.Errorf("the image holds data in %d places of %d", len(full), bucketReads))
	}
	r := rand.New(rand.NewPCG(1, 2))
	r.Shuffle(len(full), func(i, j int) { full[i], full[j] = full[j], full[i] })
	return full[:bucketReads], nil
}

// timeReads opens a store and reads.
func timeReads(ctx context.Context, drv store.Driver, offsets []int64) (float64, error) {
	st, err := store.Open(ctx, drv, password)
	if err != nil {
		return 0, err
	}
	defer st.Close(ctx)
	m, err := st.Image(ctx, "snap-bench", 0)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	buf := make([]byte, bucketRead)
	start := time.Now()
	for _, off := range offsets {
		if _, err := m.ReadAt(buf, off); err != nil {
			return 0, err
		}
	}
	return time.Since(start).Seconds(), nil
}

// slowed is the service with bucketLatency before each request.
func slowed(addr string) *httptest.Server {
	p := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: addr})
		r.Out.Host = r.In.Host // it is signed
	}}
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(bucketLatency)
		p.ServeHTTP(w, r)
	}))
}
