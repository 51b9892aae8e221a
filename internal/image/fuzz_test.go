package image

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// piped is a listener that gives one connection.
type piped struct {
	conn chan net.Conn
	done chan struct{}
	once sync.Once
}

func newPiped(conn net.Conn) *piped {
	p := &piped{conn: make(chan net.Conn, 1), done: make(chan struct{})}
	p.conn <- conn
	return p
}

func (p *piped) Accept() (net.Conn, error) {
	select {
	case conn := <-p.conn:
		return conn, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *piped) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *piped) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// talkTo sends bytes to a server over a pipe, takes whatever comes back, hangs up, and closes the server.
func talkTo(t *testing.T, m *memory, sent []byte) (received []byte) {
	t.Helper()
	s := quiet()
	s.MaxClients, s.MaxInFlight = 1, 2*pieceRoom
	s.OnError = func(_ string, err error) { t.Errorf("a sound image gave %v", err) }
	if err := s.Add(name, m); err != nil {
		t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	l := newPiped(theirs)
	served := make(chan error, 1)
	go func() { served <- s.Serve(t.Context(), l) }()

	_ = ours.SetDeadline(time.Now().Add(20 * time.Second))
	got := make(chan []byte, 1)
	go func() {
		// The largest answers are cut off: what comes in time is enough.
		b, _ := io.ReadAll(io.LimitReader(ours, 8<<20))
		got <- b
		_ = ours.Close()
	}()
	_, _ = ours.Write(sent)
	// A last request that nobody can misunderstand, if the server still listens: go away.
	_, _ = ours.Write(bytes.Join([][]byte{be(uint32(magicRequest)), be([]uint16{0, cmdDisconnect}), make([]byte, 20)}, nil))
	waitFor(t, "the client to be admitted", func() bool { return len(l.conn) == 0 })
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	received = <-got
	if peak := s.Stats(name).PeakInFlight; peak > s.MaxInFlight {
		t.Errorf("%d bytes in flight", peak)
	}
	return received
}

func option(kind uint32, data ...[]byte) []byte {
	body := bytes.Join(data, nil)
	return bytes.Join([][]byte{[]byte("IHAVEOPT"), be(kind), text(string(body))}, nil)
}

func ask(kind, flags uint16, off uint64, length uint32) []byte {
	return bytes.Join([][]byte{be(uint32(magicRequest)), be([]uint16{flags, kind}), be(uint64(1)), be(off), be(length)}, nil)
}

// FuzzHandshake: whatever a client says before it has chosen, the server neither breaks nor hangs.
func FuzzHandshake(f *testing.F) {
	f.Add(be(uint32(3)))
	f.Add(append(be(uint32(3)), option(optGo, text(name), be(uint16(0)))...))
	f.Add(append(be(uint32(1)), option(optExportName, []byte(name))...))
	f.Add(bytes.Join([][]byte{
		be(uint32(3)), option(optStructuredReply), option(optListMeta, text(name), be(uint32(1)), text("base:")),
		option(optSetMeta, text(name), be(uint32(1)), text(metaAllocation)), option(optInfo, text(name), be([]uint16{1, 3})),
		option(optList), option(optGo, text(name), be(uint16(0))), ask(cmdRead, 0, 0, 4096),
	}, nil))
	f.Add(append(be(uint32(3)), option(99, make([]byte, maxOption+1))...))
	f.Add(append(be(uint32(3)), option(optAbort)...))
	m := randomMemory(40, 1<<20+3)
	f.Fuzz(func(t *testing.T, sent []byte) {
		if got := talkTo(t, m, sent); !bytes.HasPrefix(got, []byte("NBDMAGICIHAVEOPT\x00\x03")) {
			t.Errorf("greeting %q", got)
		}
	})
}

// FuzzRequests: whatever a client asks after it has chosen, every answer is well-formed and true.
func FuzzRequests(f *testing.F) {
	f.Add(true, ask(cmdRead, 0, 0, 1<<20))
	f.Add(true, ask(cmdRead, cmdFlagDF, 5, 70_000))
	f.Add(false, ask(cmdRead, 0, 4095, 300_000))
	f.Add(true, append(ask(cmdBlockStatus, 0, 0, 1<<20), ask(cmdBlockStatus, cmdFlagReqOne, 9, 1)...))
	f.Add(true, append(ask(cmdWrite, 0, 0, 5), "hello"...))
	f.Add(true, append(ask(cmdRead, 0, ^uint64(0), ^uint32(0)), ask(cmdDisconnect, 0, 0, 0)...))
	f.Add(false, append(ask(cmdTrim, 0, 0, 5), ask(cmdFlush, 0, 0, 0)...))
	m := randomMemory(41, 1<<20+3)
	f.Fuzz(func(t *testing.T, structured bool, sent []byte) {
		hello := [][]byte{be(uint32(3))}
		skip := 18
		if structured {
			hello = append(hello, option(optStructuredReply), option(optSetMeta, text(name), be(uint32(1)), text(metaAllocation)))
			skip += 20 + 20 + 4 + len(metaAllocation) + 20
		}
		hello = append(hello, option(optGo, text(name), be(uint16(0))))
		skip += 20 + 12 + 20 + 14 + 20
		got := talkTo(t, m, append(bytes.Join(hello, nil), sent...))
		if len(got) < skip {
			t.Fatalf("the handshake gave %d bytes", len(got))
		}
		if structured {
			checkChunks(t, m, got[skip:])
		}
	})
}

// checkChunks reads answers as long as they are whole, and compares data with the image.
func checkChunks(t *testing.T, m *memory, b []byte) {
	t.Helper()
	c := &nbdClient{t: t, in: bufio.NewReader(bytes.NewReader(b))}
	for {
		a, err := c.tryNext()
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if a.structured && (a.kind == chunkOffsetData || a.kind == chunkOffsetHole) {
			off, data := int64(binary.BigEndian.Uint64(a.data)), a.data[8:]
			if a.kind == chunkOffsetHole {
				data = make([]byte, binary.BigEndian.Uint32(data))
			}
			if off+int64(len(data)) > m.Size() || !bytes.Equal(data, m.data[off:off+int64(len(data))]) {
				t.Fatalf("wrong data at %d", off)
			}
		}
	}
}
