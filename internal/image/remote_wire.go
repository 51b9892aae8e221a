package image

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// handshake agrees with a server on structured replies, contexts and an export.
func handshake(conn net.Conn, export, bitmap string) (*Remote, error) {
	_ = conn.SetDeadline(time.Now().Add(remoteHello))
	if len(export) > MaxExportName || len(bitmap) > 1023 {
		return nil, fmt.Errorf("%w: a name is too long", errOption)
	}
	var hello [greetingSize]byte
	if _, err := io.ReadFull(conn, hello[:]); err != nil {
		return nil, err
	}
	flags := binary.BigEndian.Uint16(hello[16:])
	if binary.BigEndian.Uint64(hello[0:]) != magicServer || binary.BigEndian.Uint64(hello[8:]) != magicOption || flags&flagFixedNewstyle == 0 {
		return nil, fmt.Errorf("%w: it is no NBD server of the fixed newstyle", errGarbage)
	}
	if _, err := conn.Write(binary.BigEndian.AppendUint32(nil, uint32(flags&(flagFixedNewstyle|flagNoZeroes)))); err != nil {
		return nil, err
	}
	r := &Remote{conn: conn, in: bufio.NewReaderSize(conn, 64<<10), size: -1, contexts: map[string]uint32{}, stall: remoteStall,
		slots: make(chan struct{}, remoteFlying), ended: make(chan struct{}), calls: map[uint64]*call{}}
	if err := negotiate(conn, optStructuredReply, nil, nil); err != nil {
		return nil, fmt.Errorf("ask for structured replies: %w", err)
	}
	wanted := []string{metaAllocation}
	if bitmap != "" {
		wanted = append(wanted, metaBitmap+bitmap)
	}
	query := binary.BigEndian.AppendUint32(appendText(nil, export), uint32(len(wanted)))
	for _, name := range wanted {
		query = appendText(query, name)
	}
	if err := negotiate(conn, optSetMeta, query, r.granted(wanted)); err != nil && bitmap != "" {
		return nil, fmt.Errorf("ask for the dirty bitmap %s: %w", bitmap, err)
	}
	if _, ok := r.contexts[metaBitmap+bitmap]; bitmap != "" && !ok {
		return nil, fmt.Errorf("the server has no dirty bitmap %s", bitmap)
	}
	if err := negotiate(conn, optGo, binary.BigEndian.AppendUint16(appendText(nil, export), 0), r.informed); err != nil {
		return nil, err
	}
	if r.size < 0 {
		return nil, fmt.Errorf("%w: it does not say how large the export is", errGarbage)
	}
	_ = conn.SetDeadline(time.Time{})
	return r, nil
}

// refusal is an error that a server answers an option with. The connection goes on.
type refusal struct {
	kind uint32
	text string
}

func (r refusal) Error() string {
	if r.text == "" {
		return fmt.Sprintf("the server refuses (%#x)", r.kind)
	}
	return "the server refuses: " + r.text
}

// negotiate sends an option and hands what is answered to take, until the server acknowledges.
func negotiate(conn net.Conn, option uint32, data []byte, take func(kind uint32, data []byte) error) error {
	if _, err := conn.Write(appendOption(nil, option, data)); err != nil {
		return err
	}
	for range maxOptions {
		var head [optReplySize]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return err
		}
		kind, length := binary.BigEndian.Uint32(head[12:]), binary.BigEndian.Uint32(head[16:])
		if binary.BigEndian.Uint64(head[0:]) != magicOptReply || binary.BigEndian.Uint32(head[8:]) != option || length > maxOption {
			return fmt.Errorf("%w: in the answer to option %d", errGarbage, option)
		}
		answer := make([]byte, length)
		if _, err := io.ReadFull(conn, answer); err != nil {
			return err
		}
		switch {
		case kind == repAck:
			return nil
		case kind >= 1<<31:
			return refusal{kind, tame(answer)}
		case take == nil:
			return fmt.Errorf("%w: answer %d to option %d", errGarbage, kind, option)
		}
		if err := take(kind, answer); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d answers to option %d", errGarbage, maxOptions, option)
}

// granted notes the contexts that the server grants of those wanted.
func (r *Remote) granted(wanted []string) func(uint32, []byte) error {
	return func(kind uint32, data []byte) error {
		if kind != repMeta || len(data) < 4 || !slices.Contains(wanted, string(data[4:])) {
			return fmt.Errorf("%w: it grants a context that nobody asked for", errGarbage)
		}
		r.contexts[string(data[4:])] = binary.BigEndian.Uint32(data)
		return nil
	}
}

// informed notes the size of the export. Other information is for those who asked for it.
func (r *Remote) informed(kind uint32, data []byte) error {
	if kind != repInfo || len(data) < 2 {
		return fmt.Errorf("%w: answer %d about an export", errGarbage, kind)
	}
	if binary.BigEndian.Uint16(data) != infoExport {
		return nil
	}
	if len(data) != 12 || binary.BigEndian.Uint64(data[2:]) > maxRemoteSize {
		return fmt.Errorf("%w: the size of an export", errGarbage)
	}
	r.size = int64(binary.BigEndian.Uint64(data[2:]))
	return nil
}

// answer receives one simple reply or one chunk of a structured one, and says whether the call it belongs to is over.
func (r *Remote) answer() (c *call, over bool, err error) {
	var head [chunkSize]byte
	if _, err := io.ReadFull(r.in, head[:4]); err != nil {
		return nil, false, err
	}
	size := chunkSize
	if binary.BigEndian.Uint32(head[:]) == magicSimple {
		size = simpleSize
	} else if binary.BigEndian.Uint32(head[:]) != magicStructured {
		return nil, false, fmt.Errorf("%w: an answer begins with %#x", errGarbage, head[:4])
	}
	if _, err := io.ReadFull(r.in, head[4:size]); err != nil {
		return nil, false, cutShort(err)
	}
	r.mu.Lock()
	c = r.calls[binary.BigEndian.Uint64(head[8:])]
	r.mu.Unlock()
	if c == nil {
		return nil, false, fmt.Errorf("%w: an answer to nothing", errGarbage)
	}
	if size == simpleSize {
		errno := binary.BigEndian.Uint32(head[4:])
		if errno == 0 {
			return nil, false, fmt.Errorf("%w: a simple answer to a structured question", errGarbage)
		}
		c.fail(errno, "")
		return c, true, nil
	}
	flags, kind, length := binary.BigEndian.Uint16(head[4:]), binary.BigEndian.Uint16(head[6:]), binary.BigEndian.Uint32(head[16:])
	if flags&^uint16(chunkDone) != 0 || kind == chunkNone && flags == 0 {
		return nil, false, fmt.Errorf("%w: flags %#x of a chunk", errGarbage, flags)
	}
	return c, flags&chunkDone != 0, cutShort(r.chunk(c, kind, length))
}

// chunk receives the body of a chunk.
func (r *Remote) chunk(c *call, kind uint16, length uint32) error {
	wrong := fmt.Errorf("%w: a chunk of kind %d and %d bytes in answer to request %d", errGarbage, kind, length, c.kind)
	switch {
	case kind == chunkNone && length == 0:
		return nil
	case kind == chunkOffsetData && c.kind == cmdRead && length > 8 && length-8 <= c.length:
		var at [8]byte
		if _, err := io.ReadFull(r.in, at[:]); err != nil {
			return err
		}
		room, err := c.fill(binary.BigEndian.Uint64(at[:]), length-8)
		if err == nil {
			_, err = io.ReadFull(r.in, room)
		}
		return err
	case kind == chunkOffsetHole && c.kind == cmdRead && length == 12:
		var hole [12]byte
		if _, err := io.ReadFull(r.in, hole[:]); err != nil {
			return err
		}
		room, err := c.fill(binary.BigEndian.Uint64(hole[:]), binary.BigEndian.Uint32(hole[8:]))
		clear(room)
		return err
	case kind == chunkBlockStatus && c.kind == cmdBlockStatus && length >= 12 && length%8 == 4 && length <= maxStates+4:
		body := make([]byte, length)
		if _, err := io.ReadFull(r.in, body); err != nil {
			return err
		}
		return c.learn(body)
	case kind >= 1<<15 && length >= 6 && length <= maxErrorText:
		body := make([]byte, length)
		if _, err := io.ReadFull(r.in, body); err != nil {
			return err
		}
		n := uint32(binary.BigEndian.Uint16(body[4:]))
		if n > length-6 {
			return wrong
		}
		c.fail(binary.BigEndian.Uint32(body), tame(body[6:6+n]))
		return nil
	}
	return wrong
}

// fill gives the room for bytes of a read's answer, each of which comes once.
func (c *call) fill(at uint64, length uint32) ([]byte, error) {
	if length == 0 || at < c.offset || at-c.offset > uint64(c.length) || uint64(length) > uint64(c.length)-(at-c.offset) {
		return nil, fmt.Errorf("%w: data that was not asked for", errGarbage)
	}
	e := Extent{Offset: int64(at - c.offset), Length: int64(length)}
	i, _ := slices.BinarySearchFunc(c.filled, e, func(a, b Extent) int { return int(min(max(a.Offset-b.Offset, -1), 1)) })
	if i < len(c.filled) && c.filled[i].Offset < e.Offset+e.Length || i > 0 && c.filled[i-1].Offset+c.filled[i-1].Length > e.Offset {
		return nil, fmt.Errorf("%w: data that came already", errGarbage)
	}
	switch {
	case i > 0 && c.filled[i-1].Offset+c.filled[i-1].Length == e.Offset:
		c.filled[i-1].Length += e.Length
	case len(c.filled) >= maxFragments:
		return nil, fmt.Errorf("%w: an answer in more than %d pieces", errGarbage, maxFragments)
	default:
		c.filled = slices.Insert(c.filled, i, e)
	}
	return c.buf[e.Offset : e.Offset+e.Length], nil
}

// full says whether all of a read was answered.
func (c *call) full() bool {
	at := int64(0)
	for _, e := range c.filled {
		if e.Offset != at {
			return false
		}
		at += e.Length
	}
	return at == int64(c.length)
}

// learn takes the states of one context.
func (c *call) learn(body []byte) error {
	if binary.BigEndian.Uint32(body) != c.about {
		return nil // every context that was granted is answered
	}
	if c.told {
		return fmt.Errorf("%w: a context was answered twice", errGarbage)
	}
	c.told = true
	left := int64(c.length)
	for b := body[4:]; len(b) > 0; b = b[8:] {
		s := state{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])}
		if s.length == 0 || left <= 0 {
			return fmt.Errorf("%w: a state of nothing that was asked for", errGarbage)
		}
		left -= int64(s.length)
		c.states = append(c.states, s)
	}
	return nil
}

// fail notes the first thing that the server says went wrong.
func (c *call) fail(errno uint32, text string) {
	if c.err == nil {
		c.err = fmt.Errorf("the server answers with error %d%s", errno, strings.TrimRight(": "+text, ": "))
	}
}

// cutShort turns an end in the middle of an answer into an unexpected one.
func cutShort(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// tame makes a server's words fit for a log.
func tame(b []byte) string {
	if len(b) > 200 || !utf8.Valid(b) {
		return ""
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, string(b))
}
