package s3

import (
	"context"
	"fmt"
	"time"

	"github.com/minio/minio-go/v7"
)

// Health is what a bucket is like.
type Health struct {
	Skew     time.Duration // of this host's clock against the service's; positive if ours is behind
	Took     time.Duration // of one small request
	Versions bool          // the bucket keeps versions
	Locks    bool          // the bucket has object lock
	Default  string        // the retention that the bucket gives to everything by itself; "" none
}

// Examine asks the service what the bucket is like. It changes nothing.
func (d Driver) Examine(ctx context.Context) (h Health, err error) {
	p, err := d.client()
	if err != nil {
		return h, err
	}
	defer p.transport.CloseIdleConnections()
	ctx, cancel := within(ctx, 0)
	defer cancel()
	began := time.Now()
	for o := range p.c.ListObjectsIter(ctx, d.Bucket, minio.ListObjectsOptions{Prefix: d.Prefix, MaxKeys: 1}) {
		if o.Err != nil {
			return h, p.explain(o.Err)
		}
		break
	}
	h.Took = time.Since(began)
	if v, err := p.c.GetBucketVersioning(ctx, d.Bucket); err == nil {
		h.Versions = v.Enabled()
	}
	if on, mode, validity, unit, err := p.c.GetObjectLockConfig(ctx, d.Bucket); err == nil {
		h.Locks = on == "Enabled"
		if mode != nil && validity != nil && unit != nil {
			h.Default = fmt.Sprintf("%s, %d %s", *mode, *validity, *unit)
		}
	}
	h.Skew = p.clock.skew()
	return h, nil
}
