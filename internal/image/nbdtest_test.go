package image

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// nbdClient is the other end, written from the protocol's document and not from the server's code.
type nbdClient struct {
	t    testing.TB
	conn net.Conn
	in   *bufio.Reader
	size int64
	send uint16 // transmission flags
	seq  uint64
}

// quiet gives a server that logs nothing.
func quiet() *Server {
	s := NewServer()
	s.Log = slog.New(slog.DiscardHandler)
	return s
}

// served serves on a unix socket until the test ends, and gives a way to connect.
func served(t testing.TB, s *Server) (dial func() net.Conn) {
	t.Helper()
	socket := filepath.Join(shortDir(t), "s")
	l, err := Listen(socket, 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s, l)
	return func() net.Conn {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		return conn
	}
}

// greet reads the server's greeting and answers it.
func greet(t testing.TB, conn net.Conn) *nbdClient {
	t.Helper()
	c := &nbdClient{t: t, conn: conn, in: bufio.NewReaderSize(conn, 1<<16)}
	hello := c.take(18)
	if string(hello[:16]) != "NBDMAGICIHAVEOPT" || binary.BigEndian.Uint16(hello[16:]) != 3 {
		t.Fatalf("greeting %q", hello)
	}
	c.put(be(uint32(3)))
	return c
}

// connect does the whole handshake as QEMU does it.
func connect(t testing.TB, conn net.Conn, export string) *nbdClient {
	t.Helper()
	c := greet(t, conn)
	c.mustOption(8)
	c.mustOption(10, text(export), be(uint32(1)), text("base:allocation"))
	c.goTo(export)
	return c
}

// connectSimple chooses without structured replies.
func connectSimple(t testing.TB, conn net.Conn, export string) *nbdClient {
	t.Helper()
	c := greet(t, conn)
	c.goTo(export)
	return c
}

func (c *nbdClient) goTo(export string) {
	c.t.Helper()
	for _, r := range c.mustOption(7, text(export), be(uint16(0))) {
		if r.kind == 3 && binary.BigEndian.Uint16(r.data) == 0 {
			c.size = int64(binary.BigEndian.Uint64(r.data[2:]))
			c.send = binary.BigEndian.Uint16(r.data[10:])
		}
	}
}

type optReply struct {
	kind uint32
	data []byte
}

// option sends an option and gives its replies up to the last.
func (c *nbdClient) option(option uint32, data ...[]byte) []optReply {
	c.t.Helper()
	body := bytes.Join(data, nil)
	c.put([]byte("IHAVEOPT"), be(option), be(uint32(len(body))), body)
	var replies []optReply
	for {
		head := c.take(20)
		if binary.BigEndian.Uint64(head) != 0x3e889045565a9 || binary.BigEndian.Uint32(head[8:]) != option {
			c.t.Fatalf("option %d: reply begins %x", option, head)
		}
		r := optReply{binary.BigEndian.Uint32(head[12:]), c.take(int(binary.BigEndian.Uint32(head[16:])))}
		replies = append(replies, r)
		if r.kind == 1 || r.kind>>31 == 1 {
			return replies
		}
	}
}

func (c *nbdClient) mustOption(option uint32, data ...[]byte) []optReply {
	c.t.Helper()
	replies := c.option(option, data...)
	if last := replies[len(replies)-1]; last.kind != 1 {
		c.t.Fatalf("option %d: error %#x %s", option, last.kind, last.data)
	}
	return replies
}

// ask sends a request and gives its cookie.
func (c *nbdClient) ask(kind, flags uint16, off uint64, length uint32, payload ...[]byte) uint64 {
	c.t.Helper()
	c.seq++
	c.put(be(uint32(0x25609513)), be(flags), be(kind), be(c.seq), be(off), be(length), bytes.Join(payload, nil))
	return c.seq
}

// answer is a simple reply or a chunk.
type answer struct {
	structured bool
	done       bool
	kind       uint16
	cookie     uint64
	errno      uint32
	data       []byte
}

// next reads an answer; the data of a simple reply is left to the caller.
func (c *nbdClient) next() answer {
	c.t.Helper()
	a, err := c.tryNext()
	if err != nil {
		c.t.Fatalf("read answer: %v", err)
	}
	return a
}

func (c *nbdClient) tryNext() (answer, error) {
	var b [20]byte
	if _, err := io.ReadFull(c.in, b[:16]); err != nil {
		return answer{}, err
	}
	switch binary.BigEndian.Uint32(b[:]) {
	case 0x67446698:
		return answer{done: true, errno: binary.BigEndian.Uint32(b[4:]), cookie: binary.BigEndian.Uint64(b[8:])}, nil
	case 0x668e33ef:
	default:
		return answer{}, fmt.Errorf("answer begins %x", b[:16])
	}
	if _, err := io.ReadFull(c.in, b[16:]); err != nil {
		return answer{}, err
	}
	a := answer{
		structured: true,
		done:       b[5]&1 != 0,
		kind:       binary.BigEndian.Uint16(b[6:]),
		cookie:     binary.BigEndian.Uint64(b[8:]),
		data:       make([]byte, binary.BigEndian.Uint32(b[16:])),
	}
	if _, err := io.ReadFull(c.in, a.data); err != nil {
		return answer{}, err
	}
	if a.kind>>15 == 1 {
		a.errno = binary.BigEndian.Uint32(a.data)
	}
	return a, nil
}

// pending is a read that waits for its answer.
type pending struct {
	off     int64
	got     []byte
	covered int
	errno   uint32
	chunks  int
}

// add takes a chunk in, and fails the test if it covers what was covered or lies outside.
func (p *pending) add(t testing.TB, a answer) {
	t.Helper()
	p.chunks++
	switch a.kind {
	case 0:
	case 1, 2:
		off := int64(binary.BigEndian.Uint64(a.data)) - p.off
		data := a.data[8:]
		if a.kind == 2 {
			data = make([]byte, binary.BigEndian.Uint32(data))
		}
		if off < 0 || off+int64(len(data)) > int64(len(p.got)) {
			t.Fatalf("chunk at %d+%d is outside of %d bytes", off, len(data), len(p.got))
		}
		if !zeros(p.got[off : off+int64(len(data))]) {
			t.Fatalf("chunk at %d covers data again", off)
		}
		copy(p.got[off:], data)
		p.covered += len(data)
	default:
		p.errno = a.errno
	}
	if a.done && p.errno == 0 && p.covered != len(p.got) {
		t.Fatalf("answer covers %d of %d bytes", p.covered, len(p.got))
	}
}

// read reads and waits; nothing else may be under way.
func (c *nbdClient) read(off int64, length int, flags uint16) ([]byte, uint32) {
	c.t.Helper()
	p := c.readAll(off, length, flags)
	return p.got, p.errno
}

func (c *nbdClient) readAll(off int64, length int, flags uint16) *pending {
	c.t.Helper()
	cookie := c.ask(0, flags, uint64(off), uint32(length))
	p := &pending{off: off, got: make([]byte, length)}
	for {
		a := c.next()
		if a.cookie != cookie {
			c.t.Fatalf("answer to %d, asked %d", a.cookie, cookie)
		}
		if !a.structured {
			if p.errno = a.errno; a.errno == 0 {
				copy(p.got, c.take(length))
			}
			return p
		}
		if p.add(c.t, a); a.done {
			return p
		}
	}
}

// errno asks for something without data and gives the error number of the answer.
func (c *nbdClient) errno(kind, flags uint16, off uint64, length uint32, payload ...[]byte) uint32 {
	c.t.Helper()
	cookie := c.ask(kind, flags, off, length, payload...)
	a := c.next()
	if a.cookie != cookie || !a.done {
		c.t.Fatalf("answer %+v to request %d", a, cookie)
	}
	return a.errno
}

type status struct {
	length int64
	zero   bool
}

func (c *nbdClient) blockStatus(off int64, length uint32, flags uint16) []status {
	c.t.Helper()
	cookie := c.ask(7, flags, uint64(off), length)
	a := c.next()
	if a.cookie != cookie || !a.done || a.kind != 5 || binary.BigEndian.Uint32(a.data) != 1 {
		c.t.Fatalf("block status answered by %+v", a)
	}
	var all []status
	for b := a.data[4:]; len(b) > 0; b = b[8:] {
		s := status{int64(binary.BigEndian.Uint32(b)), binary.BigEndian.Uint32(b[4:]) == 3}
		if !s.zero && binary.BigEndian.Uint32(b[4:]) != 0 {
			c.t.Fatalf("state %#x", b[4:8])
		}
		all = append(all, s)
	}
	return all
}

// gone waits until the server hangs up.
func (c *nbdClient) gone() {
	c.t.Helper()
	for {
		if _, err := c.in.Discard(1); err != nil {
			if isTimeout(err) {
				c.t.Fatal("the server did not hang up")
			}
			return
		}
	}
}

func (c *nbdClient) put(b ...[]byte) {
	c.t.Helper()
	if _, err := c.conn.Write(bytes.Join(b, nil)); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

func (c *nbdClient) take(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.in, b); err != nil {
		c.t.Fatalf("receive: %v", err)
	}
	return b
}

func isTimeout(err error) bool {
	timeout, ok := err.(net.Error)
	return ok && timeout.Timeout()
}

func be(v any) []byte {
	b, err := binary.Append(nil, binary.BigEndian, v)
	if err != nil {
		panic(err)
	}
	return b
}

func text(s string) []byte { return append(be(uint32(len(s))), s...) }

// shortDir is a folder whose name may stand in a URI and leaves room for a socket's.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
