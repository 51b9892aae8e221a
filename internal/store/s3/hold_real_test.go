package s3_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/s3"
	"github.com/musterdr/muster/internal/store/storetest"
)

const password = "correct horse"

// fill makes a store and opens it.
func fill(t *testing.T, d store.Driver, ids ...string) *store.Store {
	t.Helper()
	if err := store.Create(t.Context(), d, password); err != nil {
		t.Fatal(err)
	}
	s := reopen(t, d)
	for i, id := range ids {
		if err := keep(t.Context(), s, id, storetest.NewDisk(1<<20, uint64(i))); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func reopen(t *testing.T, d store.Driver) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), d, password)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(context.Background()) })
	return s
}

func keep(ctx context.Context, s *store.Store, id string, disk *storetest.Disk) error {
	w, err := s.Begin(ctx, id, "")
	if err != nil {
		return err
	}
	defer w.Abort(ctx)
	dw, err := w.Disk(ctx, "sda", disk.Size(), 0)
	if err != nil {
		return err
	}
	if err := dw.Ingest(ctx, disk, nil, nil); err != nil {
		return err
	}
	_, err = w.Commit(ctx, dr.Snapshot{ServerID: "srv-1", Server: "shop", Taken: time.Now()})
	return err
}

// until says until when a version is locked.
func (g *service) until(t *testing.T, o minio.ObjectInfo) (until time.Time) {
	t.Helper()
	if o.IsDeleteMarker {
		return until
	}
	head, err := g.c.StatObject(t.Context(), "bucket-"+fmt.Sprint(g.n), o.Key, minio.StatObjectOptions{VersionID: o.VersionID})
	if err != nil {
		t.Fatal(err)
	}
	until, _ = time.Parse(time.RFC3339, head.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date"))
	return until
}

func versions(t *testing.T, g *service, d s3.Driver) (all []minio.ObjectInfo) {
	t.Helper()
	for o := range g.c.ListObjectsIter(t.Context(), d.Bucket, minio.ListObjectsOptions{Prefix: d.Prefix, WithVersions: true, Recursive: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		all = append(all, o)
	}
	return all
}

// Somebody has the credentials, which here are those of the service's own root, and does his worst. Nothing that a snapshot
// needs can be taken away before its time, and its versions are the store as it was.
func TestWithTheCredentialsNobodyTakesAwayWhatIsLocked(t *testing.T) {
	real(t)
	g := start(t, t.TempDir())
	d := g.bucket(t, true)
	d.Retention = 24 * time.Hour
	s := fill(t, d, "snap-1")
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := versions(t, g, d)

	mode := minio.Compliance
	soon := time.Now().Add(time.Minute)
	locked := map[string]bool{}
	for _, o := range before {
		locked[o.Key+o.VersionID] = g.until(t, o).After(time.Now().Add(23 * time.Hour))
		g.c.PutObject(t.Context(), d.Bucket, o.Key, strings.NewReader("garbage"), 7, minio.PutObjectOptions{})
		g.c.RemoveObject(t.Context(), d.Bucket, o.Key, minio.RemoveObjectOptions{})
		g.c.PutObjectRetention(t.Context(), d.Bucket, o.Key, minio.PutObjectRetentionOptions{VersionID: o.VersionID, Mode: &mode, RetainUntilDate: &soon, GovernanceBypass: true})
		g.c.PutObjectRetention(t.Context(), d.Bucket, o.Key, minio.PutObjectRetentionOptions{VersionID: o.VersionID, GovernanceBypass: true})
		err := g.c.RemoveObject(t.Context(), d.Bucket, o.Key, minio.RemoveObjectOptions{VersionID: o.VersionID, GovernanceBypass: true})
		if locked[o.Key+o.VersionID] && err == nil {
			t.Errorf("version %s of %s was removed", o.VersionID, o.Key)
		}
	}
	g.c.PutObject(t.Context(), d.Bucket, d.Prefix+"xn0_0123456789abcdef0123456789abcdef-s0123456789abcdef012-c1", strings.NewReader("poison"), 6, minio.PutObjectOptions{})
	if _, err := store.Open(t.Context(), d, password); err == nil {
		t.Fatal("the attack did nothing: this test proves nothing")
	}

	there := map[string]bool{}
	for _, o := range versions(t, g, d) {
		there[o.Key+o.VersionID] = true
	}
	n := 0
	for _, o := range before {
		name := strings.TrimPrefix(o.Key, d.Prefix)
		fleeting := name == "_muster.lock" || name == "kopia.maintenance" || name[0] == 's' || o.IsDeleteMarker
		if fleeting {
			continue
		}
		// The service shows no lock of a version that was replaced, and keeps it.
		if n++; o.IsLatest && !locked[o.Key+o.VersionID] || !there[o.Key+o.VersionID] {
			t.Errorf("%s: locked %t, there %t", name, locked[o.Key+o.VersionID], there[o.Key+o.VersionID])
		}
	}
	if n < 5 {
		t.Fatalf("only %d blobs", n)
	}
	t.Logf("%d versions survived", n)

	// What is there by its versions is the store: put together elsewhere, it opens and is whole.
	found := d
	found.Bucket = d.Bucket + "-found"
	if err := g.c.MakeBucket(t.Context(), found.Bucket, minio.MakeBucketOptions{}); err != nil {
		t.Fatal(err)
	}
	found.Retention = 0
	if err := create(t, found).Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, o := range before {
		if o.IsLatest && o.Key != d.Prefix+"_muster.lock" {
			_, err := g.c.CopyObject(t.Context(), minio.CopyDestOptions{Bucket: found.Bucket, Object: o.Key}, minio.CopySrcOptions{Bucket: d.Bucket, Object: o.Key, VersionID: o.VersionID})
			if err != nil {
				t.Fatalf("copy version %s of %s: %v", o.VersionID, o.Key, err)
			}
		}
	}
	s = reopen(t, found)
	if r, err := s.Verify(t.Context(), "snap-1", nil); err != nil {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestCollectLeavesWhatIsLockedForLater(t *testing.T) {
	real(t)
	g := start(t, t.TempDir())
	d := g.bucket(t, true)
	d.Retention = 24 * time.Hour
	s := fill(t, d, "snap-1", "snap-2")
	if err := s.Forget(t.Context(), "snap-2"); err != nil {
		t.Fatal(err)
	}
	r, err := s.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil)
	if err != nil || r.Locked == 0 {
		t.Fatalf("collected %+v, %v", r, err)
	}
	if _, err := s.Verify(t.Context(), "snap-1", nil); err != nil {
		t.Error(err)
	}
	if err := keep(t.Context(), s, "snap-3", storetest.NewDisk(1<<20, 1)); err != nil { // as snap-2
		t.Fatal(err)
	}
	if _, err := s.Verify(t.Context(), "snap-3", nil); err != nil {
		t.Error(err)
	}
}

func TestCollectFreesWhatIsNotLockedAnyMore(t *testing.T) {
	real(t)
	g := start(t, t.TempDir())
	d := g.bucket(t, true) // which keeps versions, and no lock on any
	s := fill(t, d, "snap-1", "snap-2")
	if err := s.Forget(t.Context(), "snap-2"); err != nil {
		t.Fatal(err)
	}
	before := versions(t, g, d)
	r, err := s.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil)
	if err != nil || r.Locked != 0 || r.Freed() < 300<<10 {
		t.Fatalf("collected %+v, %v", r, err)
	}
	var was, is int64
	for _, o := range before {
		was += o.Size
	}
	for _, o := range versions(t, g, d) {
		is += o.Size
	}
	if is > was-300<<10 {
		t.Errorf("all versions together: %d bytes before, %d after", was, is)
	}
}

func TestLocksAreExtendedBeforeTheyRunOut(t *testing.T) {
	real(t)
	g := start(t, t.TempDir())
	d := g.bucket(t, true)
	d.Retention = time.Hour
	s := fill(t, d, "snap-1", "snap-2")
	r, err := s.ExtendLocks(t.Context(), nil)
	if err != nil || r.Extended != 0 || r.Blobs < 5 {
		t.Fatalf("young locks: %+v, %v", r, err)
	}
	if err := s.Forget(t.Context(), "snap-2"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.Retention = 30 * 24 * time.Hour // an hour is less than half of that
	s = reopen(t, d)
	first, stop := context.WithCancel(t.Context())
	part, err := s.ExtendLocks(first, func(string, int64, int64, string) { stop() })
	if err == nil {
		t.Error("it was stopped, and says that it is done")
	}
	r, err = s.ExtendLocks(t.Context(), nil)
	if err != nil || part.Extended == 0 || r.Blobs < 5 || part.Extended+r.Extended > r.Blobs { // each once; what was under way when it was stopped counts for neither
		t.Fatalf("locks that run out: %+v, then %+v, %v", part, r, err)
	}
	if again, err := s.ExtendLocks(t.Context(), nil); err != nil || again.Extended != 0 || again.Blobs != r.Blobs {
		t.Errorf("again: %+v, %v", again, err)
	}
	var long, short int
	for _, o := range versions(t, g, d) {
		switch left := time.Until(g.until(t, o)); {
		case left > 29*24*time.Hour:
			long++
		case left > 0:
			short++
		}
	}
	if long < r.Blobs || short == 0 {
		t.Errorf("%d blobs are locked for long, %d for an hour; %+v", long, short, r)
	}
	d.Retention = 0
	if _, err := reopen(t, d).ExtendLocks(t.Context(), nil); !errors.Is(err, store.ErrNoLocks) {
		t.Errorf("without a retention: %v", err)
	}
}

func TestALockedBlobIsRemovedEarlyOnlyIfApproved(t *testing.T) {
	real(t)
	g := start(t, t.TempDir())
	d := g.bucket(t, true)
	d.Retention, d.Governance = time.Hour, true
	p := create(t, d)
	if err := p.PutBlob(t.Context(), "p1", store.Bytes("one"), blob.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	refused := errors.New("two of three said no")
	for _, approve := range []func(context.Context, s3.Removal) error{nil, func(context.Context, s3.Removal) error { return refused }} {
		d.Approve = approve
		err := open(t, d).DeleteBlob(t.Context(), "p1")
		if !errors.Is(err, store.ErrLocked) || approve != nil && !errors.Is(err, refused) {
			t.Errorf("got %v", err)
		}
		t.Log(err)
	}
	if _, err := p.GetMetadata(t.Context(), "p1"); err != nil {
		t.Error(err)
	}
	var asked s3.Removal
	d.Approve = func(_ context.Context, r s3.Removal) error { asked = r; return nil }
	if err := open(t, d).DeleteBlob(t.Context(), "p1"); err != nil || asked.Blob != "p1" || asked.Version == "" || time.Until(asked.Until) < 50*time.Minute {
		t.Errorf("approved: %+v, %v", asked, err)
	}
	if _, err := p.GetMetadata(t.Context(), "p1"); !errors.Is(err, blob.ErrBlobNotFound) {
		t.Error(err)
	}
	d.Governance = false
	p = open(t, d)
	if err := p.PutBlob(t.Context(), "p2", store.Bytes("two"), blob.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := p.DeleteBlob(t.Context(), "p2"); !errors.Is(err, store.ErrLocked) {
		t.Errorf("in compliance mode: %v", err)
	}
}

func TestABucketWithoutLockIsRefusedForARetention(t *testing.T) {
	real(t)
	g := start(t, t.TempDir())
	d := g.bucket(t, false)
	d.Retention = time.Hour
	if _, err := d.Create(t.Context()); err == nil || !strings.Contains(err.Error(), "no object lock") {
		t.Errorf("got %v", err)
	}
}
