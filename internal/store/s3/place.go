package s3

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/minio/minio-go/v7"

	"github.com/musterdr/muster/internal/store"
)

// place is an open bucket.
type place struct {
	blob.DefaultProviderImplementation
	d         Driver
	c         *minio.Client
	core      minio.Core
	transport *http.Transport
	clock     clock
	versions  bool // the bucket keeps versions: deleting only hides
	locks     *table
}

// Reading.
const (
	readTries  = 8
	firstPause = 100 * time.Millisecond // before a read is repeated; doubles
	stall      = 20 * time.Second       // without a byte, a body counts as cut off
	hedgeSize  = 4 << 20                // reads up to this size are asked for twice if the first is slow
	hedgeAfter = time.Second
)

// mutable are the blobs that Kopia writes anew under the same name: its format and its timetable.
func mutable(id blob.ID) bool { return strings.HasPrefix(string(id), "kopia.") }

// fleeting are blobs that nothing kept depends on: markers of sessions, the timetable of maintenance. They are not locked.
func fleeting(id blob.ID) bool {
	return strings.HasPrefix(string(id), "s") || id == "kopia.maintenance"
}

func (p *place) key(id blob.ID) string { return p.d.Prefix + string(id) }

func (p *place) DisplayName() string                 { return p.d.String() }
func (p *place) ConnectionInfo() blob.ConnectionInfo { return blob.ConnectionInfo{} }

func (p *place) Close(ctx context.Context) error {
	err := p.locks.close(ctx)
	p.transport.CloseIdleConnections()
	return err
}

// Sync has nothing to do: what the service acknowledged it has.
func (p *place) Sync(context.Context) error { return nil }

// Evict has nothing to do: there is no cache between us and the service.
func (p *place) Evict(context.Context, blob.ID) {}

// PutBlob writes a blob that is not there yet. One that is there and holds the same is fine: a PUT may have been done whose answer was lost.
func (p *place) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	if opts.HasRetentionOptions() {
		return blob.ErrUnsupportedPutBlobOption // how long is the driver's to say
	}
	if !opts.SetModTime.IsZero() {
		return blob.ErrSetTimeUnsupported
	}
	err := p.locks.mayWrite()
	if err == nil {
		err = p.put(ctx, id, data, !mutable(id))
	}
	if err == nil {
		err = p.locks.mayWrite() // we may have stood still in between: what was written must not be built on
	}
	if errors.Is(err, errConflict) {
		if opts.DoNotRecreate {
			return blob.ErrBlobAlreadyExists
		}
		if err = p.compare(ctx, id, data); errors.Is(err, blob.ErrBlobNotFound) {
			err = p.put(ctx, id, data, false) // some services count the marker of a deletion as something to overwrite
		}
	}
	if err == nil && opts.GetModTime != nil {
		var m blob.Metadata
		m, err = p.GetMetadata(ctx, id)
		*opts.GetModTime = m.Timestamp
	}
	return err
}

func (p *place) put(ctx context.Context, id blob.ID, data blob.Bytes, onlyNew bool) error {
	o := minio.PutObjectOptions{SendContentMd5: true, DisableMultipart: true, ContentType: "application/octet-stream"}
	if onlyNew {
		o.SetMatchETagExcept("*")
	}
	if p.d.Retention > 0 && !fleeting(id) {
		o.Mode, o.RetainUntilDate = p.mode(), p.until()
	}
	size := int64(data.Length())
	ctx, cancel := within(ctx, size)
	defer cancel()
	r := data.Reader()
	defer r.Close() //nolint:errcheck // memory
	_, err := p.c.PutObject(ctx, p.d.Bucket, p.key(id), r, size, o)
	return p.explain(err)
}

// compare says whether the service has just these bytes.
func (p *place) compare(ctx context.Context, id blob.ID, data blob.Bytes) error {
	var got, want store.Buffer
	if _, err := data.WriteTo(&want); err != nil {
		return err
	}
	if err := p.GetBlob(ctx, id, 0, -1, &got); err != nil {
		return err
	}
	if !bytes.Equal(got.Bytes(), want.Bytes()) {
		return fmt.Errorf("put blob %s: %w, and nothing is overwritten", id, blob.ErrBlobAlreadyExists)
	}
	return nil
}

// GetBlob reads a blob or a part of it, again from the start if the answer was cut off.
func (p *place) GetBlob(ctx context.Context, id blob.ID, offset, length int64, output blob.OutputBuffer) error {
	output.Reset()
	if offset < 0 {
		return fmt.Errorf("%w: offset %d", blob.ErrInvalidRange, offset)
	}
	if length >= 0 && length <= hedgeSize {
		b, err := p.hedged(ctx, id, offset, length)
		if err == nil {
			_, err = output.Write(b)
		}
		return err
	}
	return p.again(ctx, func() error {
		output.Reset()
		return p.stream(ctx, id, offset, length, output)
	})
}

// again repeats what was cut off.
func (p *place) again(ctx context.Context, read func() error) error {
	pause := cmp.Or(p.d.pause, firstPause)
	for try := 1; ; try++ {
		err := read()
		var cut *cutOff
		if !errors.As(err, &cut) || try == readTries || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
		pause *= 2
	}
}

// cutOff is an answer that ended too early, or does not go on.
type cutOff struct{ error }

func (c *cutOff) Unwrap() error { return c.error }

// hedged reads a small range, and asks a second time if the first takes long: one slow request in a hundred would otherwise be
// felt in every boot. The first good answer counts.
func (p *place) hedged(ctx context.Context, id blob.ID, offset, length int64) ([]byte, error) {
	if length == 0 {
		_, err := p.GetMetadata(ctx, id)
		return nil, err
	}
	type answer struct {
		b   []byte
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	got := make(chan answer, 2)
	ask := func() {
		var m store.Buffer
		err := p.again(ctx, func() error {
			m.Reset()
			return p.stream(ctx, id, offset, length, &m)
		})
		got <- answer{m.Bytes(), err}
	}
	go ask()
	timer := time.NewTimer(hedgeAfter)
	defer timer.Stop()
	for under := 1; ; {
		select {
		case a := <-got:
			if under--; a.err == nil || under == 0 {
				return a.b, a.err
			}
		case <-timer.C:
			under++
			go ask()
		}
	}
}

// stream asks once. length < 0 is the whole blob.
func (p *place) stream(ctx context.Context, id blob.ID, offset, length int64, w io.Writer) error {
	o := minio.GetObjectOptions{}
	if length >= 0 {
		if err := o.SetRange(offset, offset+length-1); err != nil {
			return fmt.Errorf("%w: %w", blob.ErrInvalidRange, err)
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	body, info, header, err := p.core.GetObject(ctx, p.d.Bucket, p.key(id), o)
	if torn(err) {
		return &cutOff{fmt.Errorf("read blob %s: %w", id, err)}
	}
	if err != nil {
		return p.explain(err)
	}
	defer body.Close() //nolint:errcheck // only read
	want := info.Size
	if length >= 0 {
		if want = length; header.Get("Content-Range") == "" {
			return fmt.Errorf("read blob %s: the service gave all of it where %d bytes at %d were asked for", id, length, offset)
		}
	}
	stuck := time.AfterFunc(stall, func() { cancel(errors.New("no byte came for " + stall.String())) })
	defer stuck.Stop()
	n, err := io.Copy(w, &lively{io.LimitReader(body, want+1), stuck})
	switch {
	case err != nil && ctx.Err() == nil && !isReading(err):
		return err // the output's
	case err != nil && ctx.Err() != nil:
		return &cutOff{fmt.Errorf("read blob %s: %w", id, context.Cause(ctx))}
	case err != nil:
		return &cutOff{fmt.Errorf("read blob %s: cut off after %d of %d bytes: %w", id, n, want, err)}
	case length >= 0 && n < want && offset+length > info.Size && info.Size > 0:
		return fmt.Errorf("%w: %d bytes at %d of %s", blob.ErrInvalidRange, length, offset, id)
	case n != want:
		return &cutOff{fmt.Errorf("read blob %s: %d bytes came of %d", id, n, want)}
	}
	return nil
}

// lively tells a body that goes on from one that does not, and errors of reading from those of writing.
type lively struct {
	r     io.Reader
	stuck *time.Timer
}

func (l *lively) Read(b []byte) (int, error) {
	n, err := l.r.Read(b)
	l.stuck.Reset(stall)
	if err != nil && err != io.EOF {
		err = &reading{err}
	}
	return n, err
}

type reading struct{ error }

func (r *reading) Unwrap() error { return r.error }

func isReading(err error) bool {
	var r *reading
	return errors.As(err, &r)
}

// GetMetadata says how long a blob is and when it was put.
func (p *place) GetMetadata(ctx context.Context, id blob.ID) (m blob.Metadata, err error) {
	ctx, cancel := within(ctx, 0)
	defer cancel()
	err = p.again(ctx, func() error {
		o, err := p.c.StatObject(ctx, p.d.Bucket, p.key(id), minio.StatObjectOptions{})
		if torn(err) {
			return &cutOff{err}
		}
		m = blob.Metadata{BlobID: id, Length: o.Size, Timestamp: o.LastModified}
		return p.explain(err)
	})
	if err != nil {
		return blob.Metadata{}, err
	}
	return m, nil
}

// ListBlobs lists the blobs whose names begin with prefix. Names with a slash belong to somebody else. A list that breaks off goes on
// after the last name.
func (p *place) ListBlobs(ctx context.Context, prefix blob.ID, cb func(blob.Metadata) error) error {
	after := ""
	return p.again(ctx, func() error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		for o := range p.c.ListObjectsIter(ctx, p.d.Bucket, minio.ListObjectsOptions{Prefix: p.key(prefix), StartAfter: after}) {
			if torn(o.Err) {
				return &cutOff{o.Err}
			}
			if o.Err != nil {
				return p.explain(o.Err)
			}
			after = o.Key
			name := strings.TrimPrefix(o.Key, p.d.Prefix)
			if name == lockKey || strings.Contains(name, "/") {
				continue
			}
			if err := cb(blob.Metadata{BlobID: blob.ID(name), Length: o.Size, Timestamp: o.LastModified}); err != nil {
				return err
			}
		}
		return ctx.Err()
	})
}

// Sweep ends uploads in parts that nobody finished, of whatever program: ours makes none. Of a bucket that keeps versions it
// removes old ones of what is written again and again.
func (p *place) Sweep(ctx context.Context, age time.Duration) error {
	before := p.clock.now().Add(-age)
	for u := range p.c.ListIncompleteUploads(ctx, p.d.Bucket, p.d.Prefix, true) {
		if u.Err != nil {
			if err := p.explain(u.Err); !errors.Is(err, errUnsupported) {
				return fmt.Errorf("list unfinished uploads: %w", err)
			}
			break
		}
		if u.Initiated.After(before) {
			continue
		}
		if err := p.core.AbortMultipartUpload(ctx, p.d.Bucket, u.Key, u.UploadID); err != nil {
			return fmt.Errorf("end unfinished upload of %s: %w", u.Key, p.explain(err))
		}
	}
	if !p.versions {
		return nil
	}
	for _, prefix := range []string{lockKey, "kopia.maintenance", "s"} {
		if err := p.dropOld(ctx, p.d.Prefix+prefix, before); err != nil {
			return err
		}
	}
	return nil
}

// dropOld removes versions that are not the latest, and markers of deletions.
func (p *place) dropOld(ctx context.Context, prefix string, before time.Time) error {
	for o := range p.c.ListObjectsIter(ctx, p.d.Bucket, minio.ListObjectsOptions{Prefix: prefix, WithVersions: true, Recursive: true}) {
		if o.Err != nil {
			return fmt.Errorf("list old versions: %w", p.explain(o.Err))
		}
		if o.IsLatest && !o.IsDeleteMarker || o.LastModified.After(before) {
			continue
		}
		err := p.c.RemoveObject(ctx, p.d.Bucket, o.Key, minio.RemoveObjectOptions{VersionID: o.VersionID})
		if err = p.explain(err); err != nil && !errors.Is(err, errDenied) && !errors.Is(err, blob.ErrBlobNotFound) { // one with a lock is swept later
			return fmt.Errorf("remove an old version of %s: %w", o.Key, err)
		}
	}
	return nil
}
