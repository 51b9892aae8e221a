package s3

import (
	"context"
	"errors"
	"fmt"
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

// held says until when the service keeps a version ("": the newest); the zero time if it does not. It asks for the object's head, which every
// service answers alike; one that hides it from these credentials still refuses to remove what is locked.
func (p *place) held(ctx context.Context, key, version string) (time.Time, error) {
	o, err := p.c.StatObject(ctx, p.d.Bucket, key, minio.StatObjectOptions{VersionID: version})
	if err != nil {
		return time.Time{}, p.explain(err)
	}
	text := o.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date")
	if text == "" {
		return time.Time{}, nil
	}
	until, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, fmt.Errorf("read the lock of %s: %w", key, err)
	}
	return until, nil
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
