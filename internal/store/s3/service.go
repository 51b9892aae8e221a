package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"
)

var (
	errConflict    = errors.New("somebody else changed it first")
	errDenied      = errors.New("the service does not allow it")
	errUnsupported = errors.New("the service cannot do that")
)

// explain says what an answer of the service means, and what to do.
func (p *place) explain(err error) error {
	if err == nil {
		return nil
	}
	r := minio.ToErrorResponse(err)
	switch r.Code {
	case "NoSuchKey", "NoSuchVersion":
		return blob.ErrBlobNotFound
	case "NoSuchBucket":
		return fmt.Errorf("there is no bucket %s at %s: make it there, or correct the address of the store", p.d.Bucket, p.d.Endpoint)
	case "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidTokenId", "ExpiredToken", "XAdminUserNotFound", "InvalidSecurity":
		return fmt.Errorf("the service at %s does not know these credentials: correct %s (%s)", p.d.Endpoint, p.d.credentialsFrom(), r.Code)
	case "RequestTimeTooSkewed":
		return fmt.Errorf("the service at %s says that the clock of this host is wrong: set it right, 'timedatectl' shows it (%s)", p.d.Endpoint, p.clock.describe())
	case "PreconditionFailed", "ConditionalRequestConflict":
		return errConflict
	case "InvalidRange":
		return blob.ErrInvalidRange
	case "XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "NoSpaceLeftOnDevice", "XMinioAdminBucketQuotaExceeded":
		return fmt.Errorf("%w (%s says %s)", syscall.ENOSPC, p.d.Endpoint, r.Code)
	case "NotImplemented", "MethodNotAllowed", "VersioningNotConfigured":
		return fmt.Errorf("%w (%s)", errUnsupported, r.Code)
	}
	switch r.StatusCode {
	case http.StatusPreconditionFailed:
		return errConflict
	case http.StatusRequestedRangeNotSatisfiable:
		return blob.ErrInvalidRange
	case http.StatusInsufficientStorage:
		return fmt.Errorf("%w (%s says %s)", syscall.ENOSPC, p.d.Endpoint, r.Code)
	case http.StatusForbidden, http.StatusUnauthorized:
		return fmt.Errorf("%w: give the credentials the rights that docs/operator/s3.md lists (%s: %s)", errDenied, r.Code, r.Message)
	}
	return err
}

// torn says whether an answer broke off before it could be read at all.
func torn(err error) bool {
	var n net.Error
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.As(err, &n)
}

func (d Driver) credentialsFrom() string {
	if d.Credentials != "" {
		return d.Credentials
	}
	return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
}

// clock is the service's clock, as its answers tell it.
type clock struct {
	mu     sync.Mutex
	offset time.Duration // the service's clock minus ours
	latest time.Time     // what it said last
	known  bool
}

func (c *clock) heard(date string, sent time.Time) {
	t, err := http.ParseTime(date)
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.offset, c.known = t.Sub(sent.Add(now.Sub(sent)/2).Round(0)), true
	if t.After(c.latest) {
		c.latest = t
	}
}

// now is the time at the service: what a lock's end is measured by. Our own clock, if it is wrong, must not make a lock
// end tomorrow, or in a hundred years.
func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Round(0).Add(c.offset)
}

func (c *clock) last() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.latest
}

func (c *clock) skew() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.offset
}

func (c *clock) describe() string {
	if s := c.skew().Round(time.Second); s > 0 {
		return fmt.Sprintf("it is %s behind the service's", s)
	} else if s < 0 {
		return fmt.Sprintf("it is %s ahead of the service's", -s)
	}
	return "both show the same"
}

// dated notes the service's clock in every answer.
type dated struct {
	http.RoundTripper
	clock *clock
}

func (d dated) RoundTrip(r *http.Request) (*http.Response, error) {
	sent := time.Now()
	a, err := d.RoundTripper.RoundTrip(r)
	if err == nil {
		d.clock.heard(a.Header.Get("Date"), sent)
	}
	return a, err
}

// within bounds a request that moves size bytes.
func within(ctx context.Context, size int64) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, requestLimit+time.Duration(size/slowestRate)*time.Second)
}
