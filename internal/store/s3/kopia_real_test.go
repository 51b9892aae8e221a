package s3_test

import (
	"bytes"
	"io"
	"path/filepath"
	"testing"

	"github.com/kopia/kopia/repo"
	kopias3 "github.com/kopia/kopia/repo/blob/s3"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"

	"github.com/musterdr/muster/internal/store/storetest"
)

// What a stock kopia connects with is Kopia's own driver.
func TestKopiasOwnDriverReadsWhatIsKept(t *testing.T) {
	real(t)
	g := start(t, t.TempDir())
	d := g.bucket(t, false)
	s := fill(t, d, "snap-1")
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	st, err := kopias3.New(ctx, &kopias3.Options{BucketName: d.Bucket, Prefix: d.Prefix, Endpoint: g.addr, DoNotUseTLS: true, AccessKeyID: accessKey, SecretAccessKey: secretKey, Region: d.Region}, false)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "kopia.config")
	if err := repo.Connect(ctx, config, st, password, nil); err != nil {
		t.Fatal(err)
	}
	rep, err := repo.Open(ctx, config, password, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer rep.Close(ctx)
	ids, err := snapshot.ListSnapshotManifests(ctx, rep, nil, nil)
	if err != nil || len(ids) != 1 {
		t.Fatalf("%d snapshots, %v", len(ids), err)
	}
	m, err := snapshot.LoadSnapshot(ctx, rep, ids[0])
	if err != nil {
		t.Fatal(err)
	}
	if contents, err := rep.VerifyObject(ctx, m.RootObjectID()); err != nil || len(contents) == 0 {
		t.Errorf("verify: %v", err)
	}
	snap, err := reopen(t, d).Snapshot(ctx, "snap-1")
	if err != nil {
		t.Fatal(err)
	}
	root, err := object.ParseID(snap.Disks[0].Root)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := rep.OpenObject(ctx, root)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	got := make([]byte, disk.Length())
	if _, err := io.ReadFull(disk, got); err != nil || !bytes.Equal(got, storetest.NewDisk(1<<20, 0).Data) {
		t.Errorf("the disk differs: %d bytes, %v", len(got), err)
	}
}
