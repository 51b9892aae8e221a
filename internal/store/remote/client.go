package remote

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/sethvargo/go-retry"
	"github.com/zeebo/blake3"

	"github.com/musterdr/muster/internal/store"
)

// New names the place that a Server serves under a base URL to the one who asks with that client.
func New(c *http.Client, base string) store.Driver { return &driver{c, strings.TrimSuffix(base, "/")} }

type driver struct {
	c    *http.Client
	base string
}

func (d *driver) String() string { return d.base }

// Create implements store.Driver.
func (d *driver) Create(ctx context.Context) (store.Place, error) {
	return d.begin(ctx, http.MethodPost)
}

// Open implements store.Driver.
func (d *driver) Open(ctx context.Context) (store.Place, error) { return d.begin(ctx, http.MethodGet) }

func (d *driver) begin(ctx context.Context, method string) (store.Place, error) {
	p := &place{d: d, locks: map[string]bool{}, lists: &lists{}}
	if err := p.simple(ctx, method, pathPlace, nil, nil, nil); err != nil {
		return nil, err
	}
	return p, nil
}

// place is a place over there.
type place struct {
	d *driver
	blob.DefaultProviderImplementation

	mu    sync.Mutex
	locks map[string]bool // by token: whether it is held still
	asked time.Time       // when the capacity was
	room  blob.Capacity
	lists *lists
	work  sync.WaitGroup // what nobody waits for
}

// How often what a broken connection cut off is tried, and how long a capacity is good for.
const (
	attempts     = 4
	firstBackoff = 200 * time.Millisecond
	roomAge      = 5 * time.Second
	maxMessage   = 4 << 10
)

// ask sends a question. An answer that is no error has a body to be closed.
func (p *place) ask(ctx context.Context, method, path string, query url.Values, header http.Header, body io.Reader, length int64) (*http.Response, error) {
	target := p.d.base + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, header)
	if body != nil {
		req.ContentLength = length
	}
	resp, err := p.d.c.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, retry.RetryableError(err)
	}
	p.hearRoom(resp.Header.Get(headerRoom))
	if resp.StatusCode < 300 {
		return resp, nil
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxMessage)) // of an error; its status says enough
	return nil, errors.Join(meaning(resp.StatusCode, strings.TrimSpace(string(text))), resp.Body.Close())
}

// meaning is the error that a status stands for.
func meaning(code int, text string) error {
	var err error
	switch code {
	case http.StatusNotFound:
		return blob.ErrBlobNotFound
	case http.StatusRequestedRangeNotSatisfiable:
		err = blob.ErrInvalidRange
	case http.StatusForbidden:
		err = store.ErrForbidden
	case statusFull:
		err = syscall.ENOSPC
	case statusExists:
		err = store.ErrNotEmpty
	case statusNoStore:
		err = store.ErrNotAStore
	case statusLockLost:
		err = errLockLost
	case statusTaken:
		return errTaken
	case http.StatusNotImplemented:
		return blob.ErrNotAVolume
	case http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusGatewayTimeout:
		return retry.RetryableError(errors.New(text))
	default:
		return fmt.Errorf("the store over there answered %d: %s", code, text)
	}
	if text == "" || text == err.Error() {
		return err
	}
	return fmt.Errorf("%w (%s)", err, text)
}

var errTaken = errors.New("somebody else has the lock")

// again repeats what a connection that broke cut off, or a server that is busy put off.
func again(ctx context.Context, do func(ctx context.Context) error) error {
	b := retry.WithMaxRetries(attempts-1, retry.NewExponential(firstBackoff))
	err := retry.Do(ctx, b, do)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// simple asks a question that may be repeated, and decodes its answer, if one is wanted.
func (p *place) simple(ctx context.Context, method, path string, query url.Values, header http.Header, into any) error {
	return again(ctx, func(ctx context.Context) error {
		resp, err := p.ask(ctx, method, path, query, header, nil, 0)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if into == nil {
			return nil
		}
		if err := json.NewDecoder(io.LimitReader(resp.Body, maxMessage)).Decode(into); err != nil {
			return retry.RetryableError(err)
		}
		return nil
	})
}

func blobPath(id blob.ID) string { return pathBlobs + url.PathEscape(string(id)) }

// hearRoom takes over what an answer says of the room.
func (p *place) hearRoom(said string) {
	var c blob.Capacity
	if n, err := fmt.Sscan(said, &c.SizeB, &c.FreeB); n != 2 || err != nil {
		return
	}
	p.hasRoom(c)
}

func (p *place) hasRoom(c blob.Capacity) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.room, p.asked = c, time.Now()
}

// under names the locks that this place holds. One that was lost makes every change fail.
func (p *place) under(h http.Header) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, held := range p.locks {
		if !held {
			return errLockLost
		}
	}
	if len(p.locks) > 0 {
		h.Set(headerLocks, strings.Join(slices.Collect(maps.Keys(p.locks)), ","))
	}
	return nil
}

// arrived is what of a blob is over there.
type arrived struct {
	There bool  `json:"there"` // all of it, on the medium, as it should be
	Have  int64 `json:"have"`  // so many bytes of it came before it was cut off
}

// Bring implements store.Attesting.
func (p *place) Bring(ctx context.Context, id blob.ID, data blob.Bytes, room func() error) (sent bool, err error) {
	digest, err := sendable(id, data)
	if err != nil {
		return false, err
	}
	err = again(ctx, func(ctx context.Context) error {
		var a arrived
		err := p.simple(ctx, http.MethodGet, pathArrived, url.Values{"id": {string(id)}, "digest": {digest}}, nil, &a)
		if err != nil || a.There { // it may have come whole, and only the answer to that was cut off
			return err
		}
		if err := room(); err != nil {
			return err
		}
		sent = true
		return p.send(ctx, id, data, digest, a.Have, blob.PutOptions{})
	})
	return sent, err
}

// sendable gives the digest of a blob that can be sent.
func sendable(id blob.ID, data blob.Bytes) (digest string, err error) {
	if data.Length() > MaxBlob {
		return "", fmt.Errorf("put blob %s: it has %d bytes; the most is %d", id, data.Length(), MaxBlob)
	}
	return digestOf(data)
}

func digestOf(data blob.Bytes) (string, error) {
	sum := blake3.New()
	_, err := store.Unpaced(data).WriteTo(sum)
	return hex.EncodeToString(sum.Sum(nil)), err
}

// PutBlob sends a blob, or what of it has not arrived yet.
func (p *place) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	if opts.HasRetentionOptions() || opts.DoNotRecreate {
		return blob.ErrUnsupportedPutBlobOption
	}
	digest, err := sendable(id, data)
	if err != nil {
		return err
	}
	return again(ctx, func(ctx context.Context) error {
		var a arrived // of an earlier attempt
		if data.Length() >= resumable {
			if err := p.simple(ctx, http.MethodGet, pathArrived, url.Values{"digest": {digest}}, nil, &a); err != nil {
				return err
			}
		}
		return p.send(ctx, id, data, digest, a.Have, opts)
	})
}

// send sends a blob of which some is over there already.
func (p *place) send(ctx context.Context, id blob.ID, data blob.Bytes, digest string, have int64, opts blob.PutOptions) error {
	offset := min(max(have, 0), int64(data.Length()))
	p.lists.changed()
	defer p.lists.changed()
	h := http.Header{}
	h.Set(headerDigest, digest)
	h.Set(headerSize, strconv.Itoa(data.Length()))
	h.Set(headerOffset, strconv.FormatInt(offset, 10))
	if t := opts.SetModTime; !t.IsZero() {
		h.Set(headerTime, t.Format(time.RFC3339Nano))
	}
	if err := p.under(h); err != nil {
		return err
	}
	body := data.Reader()
	defer body.Close() //nolint:errcheck // memory
	if _, err := body.Seek(offset, io.SeekStart); err != nil {
		return err
	}
	resp, err := p.ask(ctx, http.MethodPut, blobPath(id), nil, h, io.NopCloser(body), int64(data.Length())-offset)
	if err != nil {
		return err
	}
	if opts.GetModTime != nil {
		if *opts.GetModTime, err = time.Parse(time.RFC3339Nano, resp.Header.Get(headerTime)); err != nil {
			return errors.Join(err, resp.Body.Close())
		}
	}
	return resp.Body.Close()
}

// GetBlob implements blob.Storage.
func (p *place) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	h := http.Header{}
	if length >= 0 {
		if offset < 0 {
			return fmt.Errorf("%w: offset %d", blob.ErrInvalidRange, offset)
		}
		h.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	}
	return again(ctx, func(ctx context.Context) error {
		out.Reset()
		resp, err := p.ask(ctx, http.MethodGet, blobPath(id), nil, h, nil, 0)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		n, err := io.Copy(out, io.LimitReader(resp.Body, MaxBlob+1))
		switch {
		case err != nil && ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return retry.RetryableError(fmt.Errorf("get blob %s: it broke off after %d bytes: %w", id, n, err))
		case n > MaxBlob:
			return fmt.Errorf("get blob %s: it has more than %d bytes", id, MaxBlob)
		case length >= 0 && n != length, length < 0 && n != resp.ContentLength:
			return retry.RetryableError(fmt.Errorf("get blob %s: %d bytes came", id, n))
		}
		return nil
	})
}

// GetMetadata implements blob.Storage.
func (p *place) GetMetadata(ctx context.Context, id blob.ID) (m blob.Metadata, err error) {
	err = again(ctx, func(ctx context.Context) error {
		resp, err := p.ask(ctx, http.MethodHead, blobPath(id), nil, nil, nil, 0)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		size, serr := strconv.ParseInt(resp.Header.Get(headerSize), 10, 64)
		at, terr := time.Parse(time.RFC3339Nano, resp.Header.Get(headerTime))
		m = blob.Metadata{BlobID: id, Length: size, Timestamp: at}
		return errors.Join(serr, terr)
	})
	return m, err
}

// ListBlobs implements blob.Storage.
func (p *place) ListBlobs(ctx context.Context, prefix blob.ID, each func(blob.Metadata) error) error {
	all, err := p.lists.get(ctx, prefix, p.list)
	if err != nil {
		return err
	}
	for _, m := range all {
		if err := each(m); err != nil {
			return err
		}
	}
	return nil
}

func (p *place) list(ctx context.Context, prefix blob.ID) (all []blob.Metadata, err error) {
	err = again(ctx, func(ctx context.Context) error {
		all = all[:0]
		resp, err := p.ask(ctx, http.MethodGet, pathList, url.Values{"prefix": {string(prefix)}}, nil, nil, 0)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		for d := json.NewDecoder(resp.Body); ; {
			var l listed
			if err := d.Decode(&l); err != nil {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				return retry.RetryableError(fmt.Errorf("list blobs: the list broke off: %w", err))
			}
			if l.End {
				return nil
			}
			all = append(all, blob.Metadata{BlobID: l.ID, Length: l.Size, Timestamp: l.Time})
		}
	})
	return all, err
}

// DeleteBlob implements blob.Storage.
func (p *place) DeleteBlob(ctx context.Context, id blob.ID) error {
	p.lists.changed()
	defer p.lists.changed()
	if strings.HasPrefix(string(id), sessionPrefix) {
		p.forget(id)
		return nil
	}
	h := http.Header{}
	if err := p.under(h); err != nil {
		return err
	}
	err := p.simple(ctx, http.MethodDelete, blobPath(id), nil, h, nil)
	if errors.Is(err, blob.ErrBlobNotFound) {
		return nil
	}
	return err
}

// forget takes away the marker of a session, which holds nothing, under no lock and with nobody waiting for it. One that stays for
// the line was cut is in nobody's way.
func (p *place) forget(id blob.ID) {
	p.work.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), unlockLimit)
		defer cancel()
		_ = p.simple(ctx, http.MethodDelete, blobPath(id), nil, nil, nil)
	})
}

// Close implements blob.Storage.
func (p *place) Close(context.Context) error {
	p.work.Wait()
	return nil
}

// TryLock implements store.Place. A lock is lost with the connection on which it was taken.
func (p *place) TryLock(name string, exclusive bool) (func(), bool, error) {
	token := rand.Text()
	ctx, cancel := context.WithCancel(context.Background())
	var held io.ReadCloser // the answer, as long as the lock
	err := again(ctx, func(ctx context.Context) error {
		token = rand.Text()                                 // one that may have been taken by a question that broke off goes with its connection
		resp, err := p.ask(ctx, http.MethodPost, pathLocks, //nolint:bodyclose // it is held, and closed when the lock is let go
			url.Values{"name": {name}, "token": {token}, "exclusive": {strconv.FormatBool(exclusive)}}, nil, nil, 0)
		if err == nil {
			held = resp.Body
		}
		return err
	})
	if err != nil {
		cancel()
		if errors.Is(err, errTaken) {
			return nil, false, nil
		}
		return nil, false, fmt.Errorf("lock %s: %w", name, err)
	}
	p.lists.changed()
	p.mu.Lock()
	p.locks[token] = true
	p.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, held) // it ends when the lock does
		_ = held.Close()
		p.mu.Lock()
		defer p.mu.Unlock()
		if _, mine := p.locks[token]; mine {
			p.locks[token] = false
		}
	}()
	var once sync.Once
	return func() {
		once.Do(func() {
			p.mu.Lock()
			delete(p.locks, token)
			p.mu.Unlock()
			bounded, stop := context.WithTimeout(ctx, unlockLimit)
			defer stop()
			_ = p.simple(bounded, http.MethodDelete, pathLocks, url.Values{"token": {token}}, nil, nil) // otherwise it goes with the connection
			cancel()
			<-ended
		})
	}, true, nil
}

// unlockLimit is how long letting a lock go may take; after that it goes with the connection.
const unlockLimit = 10 * time.Second

// GetCapacity implements blob.Storage.
func (p *place) GetCapacity(ctx context.Context) (blob.Capacity, error) {
	p.mu.Lock()
	room, fresh := p.room, time.Since(p.asked) < roomAge
	p.mu.Unlock()
	if fresh {
		return room, nil
	}
	if err := p.simple(ctx, http.MethodGet, pathCapacity, nil, nil, &room); err != nil {
		return room, err
	}
	p.hasRoom(room)
	return room, nil
}

// Sync implements store.Place.
func (p *place) Sync(ctx context.Context) error {
	return p.simple(ctx, http.MethodPost, pathSync, nil, nil, nil)
}

// Evict does nothing: what is put is read back over there, past every cache.
func (p *place) Evict(context.Context, blob.ID) {}

// Sweep implements store.Place.
func (p *place) Sweep(ctx context.Context, age time.Duration) error {
	return p.simple(ctx, http.MethodPost, pathSweep, url.Values{"age": {age.String()}}, nil, nil)
}

// ConnectionInfo implements blob.Storage.
func (p *place) ConnectionInfo() blob.ConnectionInfo { return blob.ConnectionInfo{} }

// DisplayName implements blob.Storage.
func (p *place) DisplayName() string { return p.d.String() }
