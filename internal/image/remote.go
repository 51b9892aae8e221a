package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// Limits of a Remote.
const (
	remoteRead    = 4 << 20          // bytes of one read request
	remoteStatus  = 1 << 30          // bytes of disk of one question about their state
	remoteFlying  = 16               // requests under way, as many as QEMU works on at a time
	remoteStall   = 2 * time.Minute  // without an answer; the connection is cut then
	remoteHello   = 30 * time.Second // for the handshake
	maxStates     = 1 << 20          // bytes of one answer about states, as much as QEMU gives
	maxErrorText  = 4 << 10          // bytes that a server may say about an error
	maxFragments  = 4096             // pieces of one answer that lie apart
	maxDirty      = 1 << 20          // dirty extents of one disk; beyond, what lies between the last ones counts as dirty too
	maxRemoteSize = 1 << 60          // bytes of a disk
)

var errGarbage = errors.New("the server breaks the NBD protocol")

// Remote is an export of another NBD server, as an Image. It asks for structured replies and will not do without them.
// The server is hostile input: whatever it answers is bounded and checked against what was asked, and what does not fit
// ends the connection. After that every call is an error.
type Remote struct {
	conn     net.Conn
	in       *bufio.Reader
	size     int64
	contexts map[string]uint32 // that the server granted, by name
	stall    time.Duration

	slots chan struct{}
	out   sync.Mutex // held while a request is sent
	ended chan struct{}

	mu     sync.Mutex
	calls  map[uint64]*call
	cookie uint64
	err    error // why the connection ended
}

var _ Image = (*Remote)(nil)

// call is a request under way. Between start and done it belongs to the goroutine that receives.
type call struct {
	request
	buf    []byte   // of a read
	filled []Extent // of a read: what has come, in order and apart
	about  uint32   // of a question: the context
	states []state  // of a question
	told   bool     // of a question: the context was answered
	err    error    // what the server said of this request
	done   chan struct{}
}

// state is what a context says of a run of bytes.
type state struct{ length, flags uint32 }

// Dial opens an export on a unix socket. With a bitmap's name, the export must offer that dirty bitmap of QEMU's (see
// Dirty). The context limits the handshake; Close ends everything else.
func Dial(ctx context.Context, socket, export, bitmap string) (*Remote, error) {
	var d net.Dialer
	ctx, cancel := context.WithTimeout(ctx, remoteHello)
	defer cancel()
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("open NBD export %s: %w", export, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	r, err := handshake(conn, export, bitmap)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("open NBD export %s: %w", export, err)
	}
	go r.receive()
	return r, nil
}

// Size implements Image.
func (r *Remote) Size() int64 { return r.size }

// Close ends the connection. What is under way fails.
func (r *Remote) Close() error {
	r.mu.Lock()
	if r.err == nil {
		r.err = net.ErrClosed
	}
	r.mu.Unlock()
	r.out.Lock()
	_ = r.conn.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = r.conn.Write(appendRequest(nil, request{kind: cmdDisconnect})) // a courtesy
	r.out.Unlock()
	r.cut(net.ErrClosed)
	<-r.ended
	return nil
}

// cut ends the connection; the first cause counts.
func (r *Remote) cut(cause error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = cause
	}
	_ = r.conn.Close()
}

// ReadAt implements Image.
func (r *Remote) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("read NBD export at %d: before its beginning", off)
	}
	for n < len(p) {
		if off >= r.size {
			return n, io.EOF
		}
		piece := p[n:min(len(p), n+remoteRead)]
		piece = piece[:min(int64(len(piece)), r.size-off)]
		c := &call{request: request{kind: cmdRead, offset: uint64(off), length: uint32(len(piece))}, buf: piece}
		if err := r.do(c); err != nil {
			return n, fmt.Errorf("read %d bytes at %d of an NBD export: %w", len(piece), off, err)
		}
		n, off = n+len(piece), off+int64(len(piece))
	}
	return n, nil
}

// Extents implements Image. A server that does not tell holes has none.
func (r *Remote) Extents(ctx context.Context, off, length int64, yield func(Extent) bool) error {
	if off < 0 || length < 0 || off > r.size-length {
		return fmt.Errorf("list extents of an NBD export: %d bytes at %d lie outside its %d", length, off, r.size)
	}
	if _, ok := r.contexts[metaAllocation]; !ok {
		if length > 0 {
			yield(Extent{Offset: off, Length: length})
		}
		return nil
	}
	return r.states(ctx, metaAllocation, off, length, func(off, length int64, flags uint32) bool {
		return yield(Extent{Offset: off, Length: length, Zero: flags&stateZero != 0})
	})
}

// Dirty lists what the bitmap named to Dial has as dirty, in order, apart. What is dirty and known to read as zeros is
// Zero.
func (r *Remote) Dirty(ctx context.Context) (dirty []Extent, err error) {
	for name := range r.contexts {
		if !strings.HasPrefix(name, metaBitmap) {
			continue
		}
		var marked []Extent
		err := r.states(ctx, name, 0, r.size, func(off, length int64, flags uint32) bool {
			if flags&stateDirty != 0 {
				marked = appendExtent(marked, Extent{Offset: off, Length: length})
			}
			return true
		})
		if err != nil {
			return nil, err
		}
		for _, m := range marked {
			if err := r.Extents(ctx, m.Offset, m.Length, func(e Extent) bool {
				dirty = appendExtent(dirty, e)
				return true
			}); err != nil {
				return nil, err
			}
		}
		return dirty, nil
	}
	return nil, errors.New("list what is dirty of an NBD export: it was opened without a bitmap")
}

// appendExtent appends an extent that lies behind the others. It joins equal neighbours, and with too many of them, unequal ones.
func appendExtent(list []Extent, e Extent) []Extent {
	if n := len(list); n > 0 {
		last := &list[n-1]
		if full := n >= maxDirty; full || last.Zero == e.Zero && last.Offset+last.Length == e.Offset {
			last.Length, last.Zero = e.Offset+e.Length-last.Offset, last.Zero && !full
			return list
		}
	}
	return append(list, e)
}

// states asks for the states of a range until it knows them all.
func (r *Remote) states(ctx context.Context, name string, off, length int64, yield func(off, length int64, flags uint32) bool) error {
	for end := off + length; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		c := &call{request: request{kind: cmdBlockStatus, offset: uint64(off), length: uint32(min(end-off, remoteStatus))}, about: r.contexts[name]}
		err := r.do(c)
		if err == nil && !c.told {
			err = fmt.Errorf("%w: no answer about %s", errGarbage, name)
		}
		if err != nil {
			return fmt.Errorf("ask for %s at %d of an NBD export: %w", name, off, err)
		}
		for _, s := range c.states {
			n := min(int64(s.length), end-off) // the last one may reach beyond what was asked
			if n == 0 {
				break
			}
			if !yield(off, n, s.flags) {
				return nil
			}
			off += n
		}
	}
	return nil
}

// do sends a request and waits for its answer.
func (r *Remote) do(c *call) error {
	r.slots <- struct{}{}
	defer func() { <-r.slots }()
	c.done = make(chan struct{})
	r.mu.Lock()
	if r.err != nil {
		defer r.mu.Unlock()
		return r.err
	}
	r.cookie++
	c.cookie = r.cookie
	r.calls[c.cookie] = c
	r.mu.Unlock()

	r.out.Lock()
	_ = r.conn.SetWriteDeadline(time.Now().Add(r.stall))
	_, err := r.conn.Write(appendRequest(nil, c.request))
	r.out.Unlock()
	if err != nil {
		r.cut(err)
	}
	late := time.AfterFunc(r.stall, func() { r.cut(fmt.Errorf("the server did not answer for %s", r.stall)) })
	defer late.Stop()
	<-c.done // always comes: whoever receives gives every call up when the connection ends
	return c.err
}

// receive takes answers until the connection ends.
func (r *Remote) receive() {
	defer close(r.ended)
	err := r.answers()
	if errors.Is(err, io.EOF) {
		err = errors.New("the server hung up")
	}
	r.cut(err)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.calls {
		c.err = r.err
		close(c.done)
	}
	r.calls = nil
}

func (r *Remote) answers() error {
	for {
		c, over, err := r.answer()
		if err != nil {
			return err
		}
		if !over {
			continue
		}
		if c.err == nil && c.kind == cmdRead && !c.full() {
			return fmt.Errorf("%w: a read was answered in part", errGarbage)
		}
		r.mu.Lock()
		delete(r.calls, c.cookie)
		r.mu.Unlock()
		close(c.done)
	}
}
