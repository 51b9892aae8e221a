package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"
)

// Limits of a server that are the same everywhere.
const (
	MaxExports    = 4096     // of one server
	MaxExportName = 255      // bytes
	MaxRequest    = 32 << 20 // bytes of one read; what QEMU and libnbd ask at most

	maxPieces = 16 // of one client, being read or waiting to be sent; QEMU has 16 requests under way
)

// Server offers images over NBD, read-only, to clients of any number. It adds no cache: it reads an image exactly when
// and where a client asks. Its memory is bounded by MaxInFlight and about 200 KiB a client, whatever clients do, and what
// one client does closes at most that client's connection.
//
// The fields may be set before the first Serve.
type Server struct {
	// OnError is told of every read of an image that broke, before the client learns of it: an image is damaged or its
	// store out of reach. It is called from many goroutines, should return soon, and must not wait for Remove or Close,
	// which wait for it. Clients that were cut off are not reported any more.
	OnError func(export string, err error)
	// Log gets what clients did wrong; nil is slog.Default.
	Log *slog.Logger

	MaxClients     int           // connections at a time, over all exports
	MaxInFlight    int64         // bytes of all buffers; at least a piece (256 KiB) and some for each of MaxClients
	HandshakeLimit time.Duration // for a client to choose an export
	StallLimit     time.Duration // for a client to take the answer to a piece
	CloseLimit     time.Duration // for Close and Remove to wait for what is under way

	mu        sync.Mutex
	exports   map[string]*export
	clients   map[*client]struct{}
	listeners map[net.Listener]struct{}
	closed    bool
	budget    *budget // made by the first Serve
}

// export is an image on offer.
type export struct {
	name     string
	image    Image
	size     int64
	clients  map[*client]struct{} // guarded by Server.mu
	reads    atomic.Int64
	bytes    atomic.Int64
	errors   atomic.Int64
	inFlight atomic.Int64
	peak     atomic.Int64
}

// Stats is what an export has done since it was added.
type Stats struct {
	Reads        int64 // read requests
	Bytes        int64 // of data sent, without holes
	Errors       int64 // reads of the image that broke
	Clients      int   // connected now
	PeakInFlight int64 // the most bytes of buffers at a time
}

// NewServer gives a server with its usual limits and no exports.
func NewServer() *Server {
	return &Server{
		MaxClients:     64,
		MaxInFlight:    64 << 20,
		HandshakeLimit: 30 * time.Second,
		StallLimit:     2 * time.Minute,
		CloseLimit:     10 * time.Second,
		exports:        map[string]*export{},
		clients:        map[*client]struct{}{},
		listeners:      map[net.Listener]struct{}{},
	}
}

// Add offers an image under a name of at most MaxExportName bytes. The image stays the caller's, who closes it after
// Remove or Close. The empty name is the default, which clients get that ask for no name; while a server has one export only,
// that is the default.
func (s *Server) Add(name string, img Image) error {
	if len(name) > MaxExportName || !utf8.ValidString(name) {
		return fmt.Errorf("add export %q: a name is up to %d bytes of UTF-8", name, MaxExportName)
	}
	for _, r := range name {
		if unicode.IsControl(r) {
			return fmt.Errorf("add export %q: a name has no control characters", name)
		}
	}
	size := img.Size()
	if size < 0 {
		return fmt.Errorf("add export %s: the image has a size of %d bytes", name, size)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return fmt.Errorf("add export %s: %w", name, net.ErrClosed)
	case s.exports[name] != nil:
		return fmt.Errorf("add export %s: the name is in use, remove that export first", name)
	case len(s.exports) >= MaxExports:
		return fmt.Errorf("add export %s: there are %d already, the most a server offers", name, MaxExports)
	}
	s.exports[name] = &export{name: name, image: img, size: size, clients: map[*client]struct{}{}}
	return nil
}

// Remove takes an export away and disconnects its clients. When it returns nobody reads the image any more, unless a
// read hangs in the image itself for longer than CloseLimit. A name that is not there is no error.
func (s *Server) Remove(name string) {
	s.mu.Lock()
	x := s.exports[name]
	delete(s.exports, name)
	var gone []*client
	if x != nil {
		for c := range x.clients {
			c.drop()
			gone = append(gone, c)
		}
	}
	s.mu.Unlock()
	if stuck := wait(gone, time.After(s.CloseLimit)); stuck > 0 {
		s.log().Warn("nbd: reads of a removed export still hang", "export", name, "clients", stuck)
	}
}

// Stats says what an export has done. One that is not there has done nothing.
func (s *Server) Stats(name string) Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.exports[name]
	if x == nil {
		return Stats{}
	}
	return Stats{
		Reads:        x.reads.Load(),
		Bytes:        x.bytes.Load(),
		Errors:       x.errors.Load(),
		Clients:      len(x.clients),
		PeakInFlight: x.peak.Load(),
	}
}

// Serve serves the clients of a listener until ctx ends or the server is closed, and then returns nil once they are
// gone; what was asked before that is still answered, for at most CloseLimit. It closes the listener. Several listeners
// may be served at a time. An error means that the listener broke.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	defer l.Close()
	if err := s.start(l); err != nil {
		return fmt.Errorf("serve NBD: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()

	mine := map[*client]struct{}{} // of this listener; guarded by s.mu
	err := s.accept(ctx, l, mine)

	s.mu.Lock()
	delete(s.listeners, l)
	closed := s.closed
	left := keys(mine)
	for _, c := range left {
		c.drain()
	}
	s.mu.Unlock()
	s.finish(left)
	if closed || ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve NBD: %w", err)
}

// start takes note of a listener and sets up what the limits decide.
func (s *Server) start(l net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	if s.budget == nil {
		shared := s.MaxInFlight - int64(s.MaxClients)*pieceRoom
		if s.MaxClients < 1 || shared < 0 {
			return fmt.Errorf("%d clients need at least %d bytes in flight, the limit is %d",
				s.MaxClients, int64(s.MaxClients)*pieceRoom, s.MaxInFlight)
		}
		s.budget = &budget{free: shared}
	}
	s.listeners[l] = struct{}{}
	return nil
}

// accept starts clients until the listener ends.
func (s *Server) accept(ctx context.Context, l net.Listener, mine map[*client]struct{}) error {
	const longest = time.Second
	pause := 5 * time.Millisecond
	for {
		conn, err := l.Accept()
		if err != nil {
			var passing interface{ Temporary() bool }
			if !errors.As(err, &passing) || !passing.Temporary() {
				return err
			}
			// Out of descriptors, most likely: they come back when clients leave.
			s.log().WarnContext(ctx, "nbd: accept", "error", err)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(pause):
			}
			pause = min(2*pause, longest)
			continue
		}
		pause = 5 * time.Millisecond
		s.admit(conn, mine)
	}
}

// admit starts a client unless there are too many.
func (s *Server) admit(conn net.Conn, mine map[*client]struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.clients) >= s.MaxClients {
		_ = conn.Close()
		s.log().Warn("nbd: client refused, there are too many", "clients", len(s.clients))
		return
	}
	c := newClient(s, conn)
	s.clients[c] = struct{}{}
	mine[c] = struct{}{}
	go func() {
		defer close(c.done)
		err := c.serve()
		s.mu.Lock()
		defer s.mu.Unlock()
		name := ""
		if c.export != nil {
			name = c.export.name
			delete(c.export.clients, c)
		}
		delete(s.clients, c)
		delete(mine, c)
		if err != nil && !c.leaving {
			s.log().Info("nbd: client dropped", "export", name, "reason", err)
		}
	}()
}

// Close stops serving: no new clients and no new requests. What was asked is answered for at most CloseLimit, then the
// connections are cut. An error means that reads hang in an image even then.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		_ = l.Close()
	}
	left := keys(s.clients)
	for _, c := range left {
		c.drain()
	}
	s.mu.Unlock()
	if stuck := s.finish(left); stuck > 0 {
		return fmt.Errorf("close NBD server: reads hang in the image, clients: %d", stuck)
	}
	return nil
}

// finish waits for clients that were told to leave, cuts off those that do not, and counts those that are stuck.
func (s *Server) finish(left []*client) int {
	if wait(left, time.After(s.CloseLimit)) == 0 {
		return 0
	}
	s.mu.Lock()
	for _, c := range left {
		c.drop()
	}
	s.mu.Unlock()
	return wait(left, time.After(time.Second))
}

// wait waits until clients are done or the time is over, and counts those that are not.
func wait(clients []*client, over <-chan time.Time) (stuck int) {
	late := false
	for _, c := range clients {
		if !late {
			select {
			case <-c.done:
				continue
			case <-over:
				late = true
			}
		}
		select {
		case <-c.done:
		default:
			stuck++
		}
	}
	return stuck
}

// find gives the export that a client means. The caller holds the lock.
func (s *Server) find(name string) *export {
	if name == "" && len(s.exports) == 1 {
		for _, x := range s.exports {
			return x
		}
	}
	return s.exports[name]
}

func (s *Server) log() *slog.Logger {
	if s.Log != nil {
		return s.Log
	}
	return slog.Default()
}

// flags are an export's transmission flags.
func (x *export) flags(structured bool) uint16 {
	f := uint16(sendHasFlags | sendReadOnly | sendMultiConn)
	if structured {
		f |= sendDF
	}
	if _, ok := x.image.(Prefetcher); ok {
		f |= sendCache
	}
	return f
}

// hold counts bytes in flight, release uncounts them.
func (x *export) hold(n int64) {
	now := x.inFlight.Add(n)
	for peak := x.peak.Load(); now > peak && !x.peak.CompareAndSwap(peak, now); peak = x.peak.Load() {
	}
}

func (x *export) release(n int64) { x.inFlight.Add(-n) }

func keys(m map[*client]struct{}) []*client {
	all := make([]*client, 0, len(m))
	for c := range m {
		all = append(all, c)
	}
	return all
}
