package store_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/storetest"
)

func TestSmoke(t *testing.T) {
	ctx := context.Background()
	drv := folder.Driver{Path: t.TempDir() + "/s"}
	t0 := time.Now()
	lap := func(s string) { t.Log(s, time.Since(t0)); t0 = time.Now() }
	if err := store.Create(ctx, drv, "pw"); err != nil {
		t.Fatal(err)
	}
	lap("create")
	s, err := store.Open(ctx, drv, "pw")
	if err != nil {
		t.Fatal(err)
	}
	lap("open")
	disk := storetest.NewDisk(70<<20+777, 1)
	w, err := s.Begin(ctx, "snap-1", "")
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.Disk(ctx, "sda", disk.Size(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Ingest(ctx, disk, nil, nil); err != nil {
		t.Fatal(err)
	}
	w.Attach("x", []byte("hello"))
	sn, err := w.Commit(ctx, dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	lap("ingest")
	t.Logf("%+v", sn)
	m, err := s.Image(ctx, "snap-1", 0)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, disk.Size())
	if _, err := m.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	lap("read")
	if !bytes.Equal(got, disk.Data) {
		t.Fatal("differs")
	}
	r, err := s.Verify(ctx, "snap-1", nil)
	t.Logf("%+v %v", r, err)
	lap("verify")
	t.Log(s.Forget(ctx, "snap-1"))
	m.Close()
	t.Log(s.Forget(ctx, "snap-1"))
	lap("forget")
	for range 3 {
		t.Log(s.Collect(ctx, store.CollectOptions{Immediate: true}, nil))
		lap("collect")
	}
	t.Log(s.Usage(ctx))
	for i := range 5 {
		if err := s.PutRecord(ctx, "server", "x", map[string]int{"a": i}); err != nil {
			t.Fatal(err)
		}
	}
	lap("5 records")
	t.Log(s.Close(ctx))
}
