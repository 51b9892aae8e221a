package store

import (
	"bytes"
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"golang.org/x/time/rate"
)

// Buffer is a blob in memory, to be read into. It implements blob.OutputBuffer.
type Buffer struct{ bytes.Buffer }

// Length implements blob.OutputBuffer.
func (b *Buffer) Length() int { return b.Len() }

// Bytes is a blob in memory, to be put.
type Bytes []byte

// Length implements blob.Bytes.
func (b Bytes) Length() int { return len(b) }

// WriteTo implements blob.Bytes.
func (b Bytes) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(b)
	return int64(n), err
}

// Reader implements blob.Bytes.
func (b Bytes) Reader() io.ReadSeekCloser { return bytesReader{bytes.NewReader(b)} }

type bytesReader struct{ *bytes.Reader }

func (bytesReader) Close() error { return nil }

// lent is what a caller has at hand of a blob and the guard answers from memory: its end, and all of it if all is not nil.
type lent struct {
	id  blob.ID
	at  int64 // where the end begins
	end Bytes
	all Bytes
}

type lentKey struct{}

// tally counts the bytes of blobs that are put under a context. To a place that is far away that is what is given to the line, also of a
// blob that does not arrive.
type tally struct{ n atomic.Int64 }

type tallyKey struct{}

func count(ctx context.Context, n int64) {
	if t, ok := ctx.Value(tallyKey{}).(*tally); ok {
		t.n.Add(n)
	}
}

// counted gives a blob that is counted as it is read.
func counted(ctx context.Context, data blob.Bytes) blob.Bytes {
	t, ok := ctx.Value(tallyKey{}).(*tally)
	if !ok {
		return data
	}
	return tallied{data, t}
}

type tallied struct {
	blob.Bytes
	tally *tally
}

func (b tallied) Reader() io.ReadSeekCloser { return talliedReader{b.Bytes.Reader(), b.tally} }

func (b tallied) WriteTo(w io.Writer) (int64, error) {
	n, err := b.Bytes.WriteTo(w)
	b.tally.n.Add(n)
	return n, err
}

type talliedReader struct {
	io.ReadSeekCloser
	tally *tally
}

func (r talliedReader) Read(p []byte) (int, error) {
	n, err := r.ReadSeekCloser.Read(p)
	r.tally.n.Add(int64(n))
	return n, err
}

// pace keeps what is sent within a rate that may change at any time.
type pace struct {
	ask     func() int64
	mu      sync.Mutex
	limiter *rate.Limiter
}

// Pieces in which a blob is sent where there is a limit, and how often a pace that allows nothing is asked again.
const (
	pacePiece = 16 << 10
	paceAsk   = time.Second
)

func newPace(ask func() int64) *pace {
	return &pace{ask: ask, limiter: rate.NewLimiter(rate.Inf, pacePiece)}
}

// wait returns when n more bytes may be sent.
func (p *pace) wait(ctx context.Context, n int64) error {
	if p.ask == nil {
		return nil
	}
	for n > 0 {
		now := p.ask()
		if now < 0 {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(paceAsk):
			}
			continue
		}
		piece := min(n, pacePiece)
		limit := rate.Inf
		if now > 0 {
			limit = rate.Limit(now)
		}
		p.mu.Lock()
		if p.limiter.Limit() != limit {
			p.limiter.SetLimit(limit)
		}
		p.mu.Unlock()
		if err := p.limiter.WaitN(ctx, int(piece)); err != nil {
			return err
		}
		n -= piece
	}
	return nil
}

// slow gives a blob that is read no faster than the pace allows.
func (p *pace) slow(ctx context.Context, data Bytes) blob.Bytes {
	if p.ask == nil {
		return data
	}
	return paced{Bytes: data, ctx: ctx, pace: p}
}

// Unpaced gives a blob without its pace and uncounted, for those who read it and do not send it.
func Unpaced(data blob.Bytes) blob.Bytes {
	if t, ok := data.(tallied); ok {
		data = t.Bytes
	}
	if p, ok := data.(paced); ok {
		return p.Bytes
	}
	return data
}

// paced is a blob that is read no faster than a pace allows, the first time.
type paced struct {
	Bytes
	ctx  context.Context
	pace *pace
}

func (b paced) Reader() io.ReadSeekCloser { return &pacedReader{bytes.NewReader(b.Bytes), b} }

func (b paced) WriteTo(w io.Writer) (int64, error) { return io.Copy(w, io.MultiReader(b.Reader())) }

type pacedReader struct {
	*bytes.Reader
	of paced
}

func (r *pacedReader) Close() error { return nil }

func (r *pacedReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p[:min(len(p), pacePiece)])
	if werr := r.of.pace.wait(r.of.ctx, int64(n)); werr != nil {
		return 0, werr
	}
	return n, err
}

// WriteTo hides the one of bytes.Reader, which would write all at once.
func (r *pacedReader) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{r})
}
