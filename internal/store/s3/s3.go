// Package s3 keeps a store in a bucket of an S3 service, in the layout of Kopia's own "s3" storage, so that
//
//	kopia repository connect s3 --bucket BUCKET --prefix PREFIX --endpoint HOST
//
// opens it.
//
// # Nouns
//
//	Driver    a prefix of a bucket, and how to reach it; place is that, open
//	table     all locks of a store: one small object, changed by compare and swap (lock.go)
//	session   a place that holds locks: it says regularly that it is alive, or is taken for dead
//	retention until when the service lets nobody remove a blob (hold.go)
//
// # What is written
//
// Every blob is one PUT with its MD5, which the service checks, under If-None-Match, so that nothing is ever overwritten
// but Kopia's few "kopia." files. S3 is strongly consistent: what was acknowledged is there. The store still reads every
// blob back and compares: one more GET and as many bytes again as were sent, which some services charge for. A checksum
// that the service returns would be cheaper and would only prove what reached it, not what it gives back.
//
// # What goes wrong
//
// minio-go repeats what the service refuses for now (503, SlowDown, a broken connection), with a growing pause. A body that is cut off or
// stalls is asked for again here. A small read that is slow is asked for a second time beside the first. What comes back
// in the end has the length that was asked for, or is an error.
//
// Knows: S3, object locks, leases.
// Must not know: what is in a blob.
package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/musterdr/muster/internal/store"
)

// Driver keeps blobs in a bucket. Parse makes one of a URL.
type Driver struct {
	Endpoint    string // host, or host:port
	Plain       bool   // HTTP without TLS: for tests and for what is reached through a tunnel
	Region      string // "": the service is asked
	Bucket      string
	Prefix      string // of every blob's key; ends in a slash, or is empty
	PathStyle   bool   // the bucket is in the path, not in the host name
	CA          string // file of certificates that sign the service's, in PEM; "": the system's
	Credentials string // file in the form of ~/.aws/credentials; "": AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment

	// Retention makes every blob irremovable for so long; 0 none. The bucket must have object lock.
	Retention time.Duration
	// Governance lets those with a special right remove locked blobs, after Approve. Otherwise nobody can (compliance).
	Governance bool
	// Approve is asked before a locked blob is removed; an error refuses. Nil refuses all: to remove backups before their
	// time is for several people to decide, and this driver is not the place where they meet.
	Approve func(context.Context, Removal) error

	lease lease         // zero: the defaults
	pause time.Duration // before what was cut off is read again; doubles. 0: firstPause
}

// Removal is a locked blob that somebody wants to remove before its time.
type Removal struct {
	Blob    blob.ID
	Version string
	Until   time.Time
}

// Limits of one request.
const (
	dialLimit    = 10 * time.Second
	answerLimit  = 60 * time.Second // from the end of the request to the beginning of the answer
	requestLimit = 2 * time.Minute  // of a request without a body to speak of, with its repetitions
	slowestRate  = 64 << 10         // bytes a second: what is slower counts as stuck
	maxTries     = 6                // of minio-go, about 3 s in all
	connections  = 32
)

func (d Driver) String() string { return "s3://" + d.Bucket + "/" + d.Prefix + " at " + d.Endpoint }

// Create makes the prefix ready. One that holds anything already is store.ErrNotEmpty. The bucket must be there: who may
// make buckets may do too much. A service that ignores conditions is refused, because locks would not hold.
func (d Driver) Create(ctx context.Context) (store.Place, error) {
	return d.use(ctx, func(p *place) error { return d.prepare(ctx, p) })
}

// use connects, and lets go again if that was for nothing.
func (d Driver) use(ctx context.Context, begin func(p *place) error) (store.Place, error) {
	p, err := d.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := begin(p); err != nil {
		return nil, errors.Join(err, p.Close(ctx))
	}
	return p, nil
}

func (d Driver) prepare(ctx context.Context, p *place) error {
	for o := range p.c.ListObjectsIter(ctx, d.Bucket, minio.ListObjectsOptions{Prefix: d.Prefix, MaxKeys: 1}) {
		if o.Err != nil {
			return p.explain(o.Err)
		}
		return fmt.Errorf("%w: it holds %s; give an empty prefix, or open the store that is there", store.ErrNotEmpty, o.Key)
	}
	return p.locks.create(ctx)
}

// Open opens a prefix made by Create. Another one is store.ErrNotAStore.
func (d Driver) Open(ctx context.Context) (store.Place, error) {
	return d.use(ctx, func(p *place) error { return p.locks.open(ctx) })
}

// connect reaches the bucket.
func (d Driver) connect(ctx context.Context) (*place, error) {
	p, err := d.client()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	v, err := p.c.GetBucketVersioning(ctx, d.Bucket)
	switch err = p.explain(err); {
	case err == nil:
		p.versions = v.Enabled() || v.Suspended()
	case errors.Is(err, errUnsupported): // a service without versions answers so
	default:
		return nil, fmt.Errorf("reach bucket %s at %s: %w", d.Bucket, d.Endpoint, err)
	}
	if d.Retention > 0 {
		if err := p.requireLock(ctx); err != nil {
			return nil, err
		}
	}
	p.locks = newTable(p, d.lease)
	return p, nil
}

// client makes the client without asking the service anything.
func (d Driver) client() (*place, error) {
	transport, err := d.transport()
	if err != nil {
		return nil, err
	}
	p := &place{d: d}
	creds, err := d.credentials()
	if err != nil {
		return nil, err
	}
	lookup := minio.BucketLookupAuto
	if d.PathStyle {
		lookup = minio.BucketLookupPath
	}
	region := d.Region
	if region == "" && !strings.HasSuffix(d.Endpoint, ".amazonaws.com") {
		region = "us-east-1" // what other services go by
	}
	c, err := minio.New(d.Endpoint, &minio.Options{Creds: creds, Secure: !d.Plain, Transport: dated{transport, &p.clock},
		Region: region, BucketLookup: lookup, MaxRetries: maxTries})
	if err != nil {
		return nil, fmt.Errorf("reach %s: %w", d.Endpoint, err)
	}
	p.c, p.core, p.transport = c, minio.Core{Client: c}, transport
	return p, nil
}

func (d Driver) transport() (*http.Transport, error) {
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: dialLimit, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:   dialLimit,
		ResponseHeaderTimeout: answerLimit,
		IdleConnTimeout:       time.Minute,
		MaxIdleConns:          connections,
		MaxIdleConnsPerHost:   connections,
		MaxConnsPerHost:       2 * connections,
		DisableCompression:    true,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
	}
	if d.CA == "" {
		return t, nil
	}
	raw, err := os.ReadFile(d.CA)
	if err != nil {
		return nil, fmt.Errorf("read certificates of the S3 service: %w", err)
	}
	t.TLSClientConfig.RootCAs = x509.NewCertPool()
	if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(raw) {
		return nil, fmt.Errorf("read certificates of the S3 service: %s holds none in PEM", d.CA)
	}
	return t, nil
}

// credentials are read once. They are in no error: minio-go's name the file and the profile only.
func (d Driver) credentials() (*credentials.Credentials, error) {
	c := credentials.NewEnvAWS()
	from := "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
	if d.Credentials != "" {
		info, err := os.Stat(d.Credentials)
		if err != nil {
			return nil, fmt.Errorf("read credentials of the S3 service: %w", err)
		}
		if info.Mode().Perm()&0o077 != 0 {
			return nil, fmt.Errorf("read credentials of the S3 service: others may read %s: chmod 600 it, and replace the key if it was seen", d.Credentials)
		}
		c = credentials.NewFileAWSCredentials(d.Credentials, "")
		from = d.Credentials
	}
	v, err := c.GetWithContext(nil)
	if err != nil {
		return nil, fmt.Errorf("read credentials of the S3 service from %s: %w", from, err)
	}
	if v.AccessKeyID == "" || v.SecretAccessKey == "" {
		return nil, fmt.Errorf("read credentials of the S3 service: %s has none", from)
	}
	return c, nil
}
