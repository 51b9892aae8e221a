package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// client is one connection. One goroutine reads its requests; each piece of a read is then a goroutine of its own, so
// that slow reads do not hold up fast ones, and answers are sent in the order in which they get ready.
type client struct {
	server *Server
	conn   net.Conn
	in     *bufio.Reader
	ctx    context.Context // ends when the connection is cut, its cause says why
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when nothing of the client is left

	// Of the handshake.
	structured bool
	metaFor    *string // the export name for which base:allocation was chosen

	export  *export // set once under Server.mu, read-only afterwards
	meta    bool    // base:allocation may be asked
	leaving bool    // we want it gone; under Server.mu

	slots chan struct{} // as many as pieces may be under way
	own   chan struct{} // see budget
	work  sync.WaitGroup
	out   sync.Mutex // held while an answer is sent
}

func newClient(s *Server, conn net.Conn) *client {
	c := &client{
		server: s,
		conn:   conn,
		in:     bufio.NewReaderSize(conn, 16<<10),
		done:   make(chan struct{}),
		slots:  make(chan struct{}, maxPieces),
		own:    make(chan struct{}, 1),
	}
	if wide, ok := conn.(interface{ SetWriteBuffer(int) error }); ok {
		_ = wide.SetWriteBuffer(pieceRoom) // so that a piece is handed over at once; less works as well
	}
	c.own <- struct{}{}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	return c
}

// drain lets the client go: requests that were read are answered, no more are read. The caller holds Server.mu.
func (c *client) drain() {
	c.leaving = true
	if c.export == nil {
		c.cut(net.ErrClosed)
		return
	}
	_ = c.conn.SetReadDeadline(time.Unix(1, 0))
}

// drop cuts the client off. The caller holds Server.mu.
func (c *client) drop() {
	c.leaving = true
	c.cut(net.ErrClosed)
}

// cut ends the connection at once, whoever uses it. The first cause counts.
func (c *client) cut(cause error) {
	c.cancel(cause)
	_ = c.conn.Close()
}

// serve lives as long as the connection. It returns nil if the client left of its own accord.
func (c *client) serve() error {
	err := c.talk()
	c.work.Wait() // what was asked is still answered
	if c.ctx.Err() != nil {
		err = context.Cause(c.ctx)
	}
	c.cut(err)
	return err
}

// talk reads requests until the client leaves.
func (c *client) talk() error {
	if err := c.handshake(); err != nil {
		if errors.Is(err, errAborted) || errors.Is(err, io.EOF) {
			return nil
		}
		return fmt.Errorf("handshake: %w", err)
	}
	var head [requestSize]byte
	for {
		if _, err := io.ReadFull(c.in, head[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("read request: %w", err)
		}
		r, err := parseRequest(&head)
		if err != nil {
			return err
		}
		if r.kind == cmdDisconnect {
			return nil
		}
		if err := c.handle(r); err != nil {
			return err
		}
	}
}

// handle starts or answers one request. An error ends the connection.
func (c *client) handle(r request) error {
	switch r.kind {
	case cmdRead:
		if r.flags&^(cmdFlagFUA|cmdFlagDF) != 0 || !r.within(c.export.size) || r.length > MaxRequest {
			return c.refuse(r, errnoInval)
		}
		return c.read(r)
	case cmdWrite:
		// The data has to be taken off the wire to get at the next request.
		if r.length > MaxRequest {
			return fmt.Errorf("write of %d bytes", r.length)
		}
		if _, err := c.in.Discard(int(r.length)); err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		return c.refuse(r, errnoPerm)
	case cmdTrim, cmdWriteZeroes:
		return c.refuse(r, errnoPerm)
	case cmdFlush:
		return c.refuse(r, 0) // a disk that nobody writes to is always flushed
	case cmdCache:
		p, ok := c.export.image.(Prefetcher)
		if !ok || r.flags&^cmdFlagFUA != 0 || !r.within(c.export.size) {
			return c.refuse(r, errnoInval)
		}
		p.Prefetch(int64(r.offset), int64(r.length))
		return c.refuse(r, 0)
	case cmdBlockStatus:
		if !c.meta || r.flags&^(cmdFlagFUA|cmdFlagReqOne) != 0 || r.length == 0 || !r.within(c.export.size) {
			return c.refuse(r, errnoInval)
		}
		return c.start(statusRoom, func(buf []byte) { c.blockStatus(r, buf) })
	}
	return c.refuse(r, errnoInval)
}

// start waits for a free slot and for room for n bytes, and then does a piece of work with a buffer of that size.
func (c *client) start(n int, do func(buf []byte)) error {
	select {
	case c.slots <- struct{}{}:
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
	class := bufferClass(n)
	size := int64(bufferSizes[class])
	held, err := c.server.budget.take(c.ctx, size, c.own)
	if err != nil {
		<-c.slots
		return err
	}
	c.export.hold(size)
	c.work.Go(func() {
		buf := takeBuffer(class)
		do(*buf)
		buffers[class].Put(buf)
		c.export.release(size)
		c.server.budget.give(held)
		<-c.slots
	})
	return nil
}

// refuse answers a request that has no data to answer with; an errno of 0 is success.
func (c *client) refuse(r request, errno uint32) error {
	var b [64]byte
	if c.structured && (r.kind == cmdRead || r.kind == cmdBlockStatus) {
		// These must be answered by chunks.
		c.send(markDone(appendErrorFrame(b[:0], r.cookie, errno, ""), 0))
		return nil
	}
	c.send(appendSimple(b[:0], r.cookie, errno))
	return nil
}

func (c *client) send(b []byte) {
	c.out.Lock()
	defer c.out.Unlock()
	c.sendLocked(b)
}

// sendLocked sends an answer. What goes wrong cuts the connection, and that ends the client.
func (c *client) sendLocked(b []byte) {
	if c.ctx.Err() != nil {
		return
	}
	if err := c.conn.SetWriteDeadline(time.Now().Add(c.server.StallLimit)); err != nil {
		c.cut(fmt.Errorf("send answer: %w", err))
		return
	}
	if _, err := c.conn.Write(b); err != nil {
		c.cut(fmt.Errorf("send answer: %w", err))
	}
}

// markDone sets the done flag of the chunk whose header is at that place.
func markDone(b []byte, at int) []byte {
	b[at+5] |= chunkDone
	return b
}

// broke reports a read of the image that did not work.
func (c *client) broke(err error) {
	c.export.errors.Add(1)
	if report := c.server.OnError; report != nil && c.ctx.Err() == nil {
		report(c.export.name, err)
	}
}
