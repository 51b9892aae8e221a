package s3

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"

	"github.com/musterdr/muster/internal/store"
)

// earlyExtend is the share of a retention that may pass before it is extended.
const earlyExtend = 2

func (p *place) mode() minio.RetentionMode {
	if p.d.Governance {
		return minio.Governance
	}
	return minio.Compliance
}

// until is when a retention that begins now ends.
func (p *place) until() time.Time {
	return p.clock.now().Add(p.d.Retention).UTC().Truncate(time.Second)
}

// requireLock refuses a bucket that does not lock.
func (p *place) requireLock(ctx context.Context) error {
	on, _, _, _, err := p.c.GetObjectLockConfig(ctx, p.d.Bucket)
	if err == nil && on == "Enabled" {
		return nil
	}
	if err == nil || minio.ToErrorResponse(err).Code == "ObjectLockConfigurationNotFoundError" {
		return fmt.Errorf("bucket %s has no object lock, which can only be chosen when a bucket is made: make another one with it, or use this one without a retention", p.d.Bucket)
	}
	return fmt.Errorf("ask bucket %s for its object lock: %w", p.d.Bucket, p.explain(err))
}

// held says until when the service keeps a version; the zero time if it does not.
func (p *place) held(ctx context.Context, key, version string) (time.Time, error) {
	_, until, err := p.c.GetObjectRetention(ctx, p.d.Bucket, key, version)
	if err != nil {
		if minio.ToErrorResponse(err).Code == "NoSuchObjectLockConfiguration" || minio.ToErrorResponse(err).Code == "InvalidRequest" {
			return time.Time{}, nil
		}
		return time.Time{}, p.explain(err)
	}
	if until == nil {
		return time.Time{}, nil
	}
	return *until, nil
}

// Lock implements store.Locker: it extends a blob's retention if less than half of it is left.
func (p *place) Lock(ctx context.Context, id blob.ID) (extended bool, err error) {
	if p.d.Retention == 0 {
		return false, store.ErrNoLocks
	}
	if fleeting(id) {
		return false, nil
	}
	ctx, cancel := within(ctx, 0)
	defer cancel()
	until, err := p.held(ctx, p.key(id), "")
	if err != nil {
		return false, fmt.Errorf("read the lock of blob %s: %w", id, err)
	}
	if until.Sub(p.clock.now()) > p.d.Retention/earlyExtend {
		return false, nil
	}
	mode, to := p.mode(), p.until()
	err = p.c.PutObjectRetention(ctx, p.d.Bucket, p.key(id), minio.PutObjectRetentionOptions{Mode: &mode, RetainUntilDate: &to})
	if err != nil {
		return false, fmt.Errorf("extend the lock of blob %s: %w", id, p.explain(err))
	}
	return true, nil
}

// DeleteBlob removes a blob and all its versions: where they are kept, hiding it would free nothing. One that is locked stays
// as it is and is store.ErrLocked, unless Approve allows it.
func (p *place) DeleteBlob(ctx context.Context, id blob.ID) error {
	if err := p.locks.mayWrite(); err != nil {
		return err
	}
	ctx, cancel := within(ctx, 0)
	defer cancel()
	if !p.versions {
		err := p.explain(p.c.RemoveObject(ctx, p.d.Bucket, p.key(id), minio.RemoveObjectOptions{}))
		if errors.Is(err, blob.ErrBlobNotFound) {
			return nil
		}
		return err
	}
	all, err := p.versionsOf(ctx, id)
	if err != nil {
		return err
	}
	bypass := false
	for _, v := range all {
		if v.IsDeleteMarker || fleeting(id) {
			continue
		}
		until, err := p.held(ctx, v.Key, v.VersionID)
		if err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
			return err
		}
		if !until.After(p.clock.now()) {
			continue
		}
		if err := p.approved(ctx, Removal{id, v.VersionID, until}); err != nil {
			return err
		}
		bypass = true
	}
	for _, v := range all {
		err := p.explain(p.c.RemoveObject(ctx, p.d.Bucket, v.Key, minio.RemoveObjectOptions{VersionID: v.VersionID, GovernanceBypass: bypass}))
		if errors.Is(err, errDenied) {
			return fmt.Errorf("%w: %w", store.ErrLocked, err)
		}
		if err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
			return err
		}
	}
	return nil
}

func (p *place) approved(ctx context.Context, r Removal) error {
	locked := fmt.Errorf("remove blob %s: %w until %s", r.Blob, store.ErrLocked, r.Until.Format(time.RFC3339))
	if !p.d.Governance {
		return fmt.Errorf("%w; nobody can change that (compliance mode)", locked)
	}
	if p.d.Approve == nil {
		return fmt.Errorf("%w; to remove it earlier is not for one person to decide, and nobody was named who may", locked)
	}
	if err := p.d.Approve(ctx, r); err != nil {
		return fmt.Errorf("%w; it was not approved: %w", locked, err)
	}
	return nil
}

// versionsOf lists the versions of one blob, newest first, with the markers of deletions.
func (p *place) versionsOf(ctx context.Context, id blob.ID) ([]minio.ObjectInfo, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var all []minio.ObjectInfo
	for o := range p.c.ListObjectsIter(ctx, p.d.Bucket, minio.ListObjectsOptions{Prefix: p.key(id), WithVersions: true, Recursive: true}) {
		if o.Err != nil {
			return nil, p.explain(o.Err)
		}
		if o.Key != p.key(id) {
			if o.Key > p.key(id) {
				break
			}
			continue
		}
		all = append(all, o)
	}
	return all, nil
}

// Rewound is what Rewind did.
type Rewound struct {
	Blobs    int // that there were at that time
	Restored int // of them, brought back because they had been hidden or overwritten since
	Hidden   int // put since, and hidden
}

// Rewind makes a bucket that keeps versions show the store as it was at a time: what was hidden or overwritten since then is
// put on top again, what was put since then is hidden. It removes nothing: every version stays. Nobody may use the store
// meanwhile. Afterwards it is opened as always, with the password of that time.
func (d Driver) Rewind(ctx context.Context, at time.Time) (r Rewound, err error) {
	p, err := d.connect(ctx)
	if err != nil {
		return r, err
	}
	defer p.Close(ctx) //nolint:errcheck // it holds no lock
	if !p.versions {
		return r, fmt.Errorf("bucket %s keeps no versions: there is nothing to go back to", d.Bucket)
	}
	keys := map[string][]minio.ObjectInfo{} // newest first
	for o := range p.c.ListObjectsIter(ctx, d.Bucket, minio.ListObjectsOptions{Prefix: d.Prefix, WithVersions: true, Recursive: true}) {
		if o.Err != nil {
			return r, p.explain(o.Err)
		}
		name := strings.TrimPrefix(o.Key, d.Prefix)
		if !strings.Contains(name, "/") && name != lockKey {
			keys[o.Key] = append(keys[o.Key], o)
		}
	}
	for key, versions := range keys {
		if err := p.rewind(ctx, key, versions, at, &r); err != nil {
			return r, fmt.Errorf("bring back %s: %w", key, err)
		}
	}
	return r, nil
}

func (p *place) rewind(ctx context.Context, key string, versions []minio.ObjectInfo, at time.Time, r *Rewound) error {
	var then *minio.ObjectInfo
	for i := range versions {
		if !versions[i].LastModified.After(at) {
			then = &versions[i]
			break
		}
	}
	now := versions[0]
	switch {
	case then == nil || then.IsDeleteMarker:
		if now.IsDeleteMarker {
			return nil
		}
		r.Hidden++
		return p.explain(p.c.RemoveObject(ctx, p.d.Bucket, key, minio.RemoveObjectOptions{}))
	case then.VersionID == now.VersionID:
		r.Blobs++
		return nil
	}
	r.Blobs++
	r.Restored++
	dst := minio.CopyDestOptions{Bucket: p.d.Bucket, Object: key}
	if p.d.Retention > 0 && !fleeting(blob.ID(strings.TrimPrefix(key, p.d.Prefix))) {
		dst.Mode, dst.RetainUntilDate = p.mode(), p.until()
	}
	_, err := p.c.CopyObject(ctx, dst, minio.CopySrcOptions{Bucket: p.d.Bucket, Object: key, VersionID: then.VersionID})
	return p.explain(err)
}
