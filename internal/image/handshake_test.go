package image

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestTheHandshakeNamesExportsAndWhatTheyAreLike(t *testing.T) {
	s := quiet()
	dial := offered(t, s, randomMemory(20, 123_457))
	if err := s.Add("another", randomMemory(21, 4096)); err != nil {
		t.Fatal(err)
	}
	c := greet(t, dial())
	var names []string
	for _, r := range c.mustOption(optList) {
		if r.kind == repServer {
			n := binary.BigEndian.Uint32(r.data)
			names = append(names, string(r.data[4:4+n]))
		}
	}
	if !slices.Equal(names, []string{"another", name}) {
		t.Errorf("listed %q", names)
	}
	blocks := false
	for _, r := range c.mustOption(optInfo, text(name), be([]uint16{2, infoName, infoBlockSize})) {
		if r.kind != repInfo {
			continue
		}
		switch binary.BigEndian.Uint16(r.data) {
		case infoExport:
			if size := binary.BigEndian.Uint64(r.data[2:]); size != 123_457 {
				t.Errorf("size %d", size)
			}
		case infoName:
			if string(r.data[2:]) != name {
				t.Errorf("name %q", r.data[2:])
			}
		case infoBlockSize:
			blocks = bytes.Equal(r.data[2:], be([]uint32{1, 4096, 32 << 20}))
		}
	}
	if !blocks {
		t.Error("the block sizes are missing or wrong")
	}
	c.mustOption(optStructuredReply)
	for _, query := range []string{"base:", "base:allocation"} {
		if got := c.mustOption(optListMeta, text(name), be(uint32(1)), text(query)); string(got[0].data[4:]) != metaAllocation {
			t.Errorf("query %s gave %q", query, got[0].data)
		}
	}
	if got := c.mustOption(optSetMeta, text(name), be(uint32(1)), text("qemu:dirty-bitmap:x")); len(got) != 1 {
		t.Errorf("an unknown context was accepted: %v", got)
	}
	c.mustOption(optAbort)
	c.gone()
}

func TestAnOptionThatCannotBeServedIsAnErrorAndNoMore(t *testing.T) {
	s := quiet()
	dial := offered(t, s, randomMemory(22, 1<<20))
	if err := s.Add("another", randomMemory(23, 4096)); err != nil {
		t.Fatal(err)
	}
	c := greet(t, dial())
	for _, o := range []struct {
		option uint32
		data   []byte
		want   uint32
	}{
		{5, nil, repErrUnsup}, // STARTTLS
		{11, nil, repErrUnsup},
		{1 << 31, []byte("what"), repErrUnsup},
		{optGo, append(text("no such"), 0, 0), repErrUnknown},
		{optInfo, append(text(""), 0, 0), repErrUnknown}, // there are two
		{optGo, nil, repErrInvalid},
		{optGo, []byte{255, 255, 255, 255, 0, 0}, repErrInvalid},
		{optGo, append(text(name), 0), repErrInvalid},
		{optGo, append(text(name), 0, 2, 0, 1), repErrInvalid},
		{optGo, append(text("\xff\xfe"), 0, 0), repErrInvalid},
		{optGo, make([]byte, maxOption+1), repErrTooBig},
		{optList, []byte{1}, repErrInvalid},
		{optSetMeta, append(text(name), be(uint32(0))...), repErrInvalid}, // structured replies come first
		{optStructuredReply, []byte{1}, repErrInvalid},
		{optStructuredReply, nil, repAck},
		{optSetMeta, append(text("no such"), be(uint32(0))...), repErrUnknown},
		{optSetMeta, append(text(name), be(^uint32(0))...), repErrInvalid},
		{optSetMeta, append(text(name), 0, 0, 0, 1, 0, 0, 0, 9, 'x'), repErrInvalid},
		{optSetMeta, append(text(name), 0, 0, 0, 0, 9), repErrInvalid},
	} {
		got := c.option(o.option, o.data)
		if last := got[len(got)-1]; last.kind != o.want {
			t.Errorf("option %d with %.40q: %#x %s", o.option, o.data, last.kind, last.data)
		}
	}
	c.goTo(name)
	if _, errno := c.read(0, 4096, 0); errno != 0 {
		t.Errorf("after all that a read gave error %d", errno)
	}
	if errno := c.errno(cmdBlockStatus, 0, 0, 4096); errno != errnoInval {
		t.Errorf("block status without a chosen context gave error %d", errno)
	}
}

func TestAContextChosenForOneExportDoesNotCountForAnother(t *testing.T) {
	s := quiet()
	dial := offered(t, s, randomMemory(24, 1<<20))
	if err := s.Add("another", randomMemory(25, 4096)); err != nil {
		t.Fatal(err)
	}
	c := greet(t, dial())
	c.mustOption(optStructuredReply)
	c.mustOption(optSetMeta, text("another"), be(uint32(1)), text(metaAllocation))
	c.goTo(name)
	if errno := c.errno(cmdBlockStatus, 0, 0, 4096); errno != errnoInval {
		t.Errorf("error %d", errno)
	}
}

func TestOldClientsChooseByNameAlone(t *testing.T) {
	m := randomMemory(26, 70_001)
	dial := offered(t, quiet(), m)
	for flags, length := range map[uint32]int{3: 10, 1: 134, 0: 134} {
		for _, export := range []string{name, ""} { // the only export is also the default
			conn := dial()
			c := &nbdClient{t: t, conn: conn, in: greetRaw(t, conn)}
			c.put(be(flags), []byte("IHAVEOPT"), be(uint32(1)), text(export))
			if got := c.take(length); binary.BigEndian.Uint64(got) != uint64(m.Size()) || !zeros(got[10:]) {
				t.Fatalf("flags %d: %x", flags, got)
			}
			if got, errno := c.read(1, 70_000, 0); errno != 0 || !bytes.Equal(got, m.data[1:]) {
				t.Errorf("flags %d: read gave error %d", flags, errno)
			}
		}
	}
	c := greet(t, dial())
	c.put([]byte("IHAVEOPT"), be(uint32(1)), text("no such"))
	c.gone()
}

func TestAHandshakeThatIsNoneEndsTheConnection(t *testing.T) {
	s := quiet()
	dial := offered(t, s, randomMemory(27, 4096))
	bystander := connect(t, dial(), name)
	for what, b := range map[string][]byte{
		"unknown flags":    be(uint32(4)),
		"another protocol": []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"a huge option":    bytes.Join([][]byte{be(uint32(3)), []byte("IHAVEOPT"), be(uint32(2)), be(uint32(maxSkip + 1))}, nil),
		"a huge name": bytes.Join([][]byte{
			be(uint32(3)), []byte("IHAVEOPT"), be(uint32(1)), text(strings.Repeat("x", maxOption+1))}, nil),
	} {
		conn := dial()
		c := &nbdClient{t: t, conn: conn, in: greetRaw(t, conn)}
		c.put(b)
		t.Log(what)
		c.gone()
	}
	c := greet(t, dial())
	for range maxOptions {
		if _, err := c.conn.Write(append(append([]byte("IHAVEOPT"), be(uint32(99))...), be(uint32(0))...)); err != nil {
			break
		}
	}
	c.gone()
	if _, errno := bystander.read(0, 4096, 0); errno != 0 {
		t.Errorf("a well-behaved client got error %d", errno)
	}
}

func TestAClientThatNeverChoosesIsDroppedAfterTheLimit(t *testing.T) {
	s := quiet()
	s.HandshakeLimit = 500 * time.Millisecond
	dial := offered(t, s, randomMemory(28, 4096))
	chosen := connect(t, dial(), name)
	silent := dial()
	greetRaw(t, silent)
	greet(t, dial()).gone()
	(&nbdClient{t: t, conn: silent}).turnedAway()
	if _, errno := chosen.read(0, 4096, 0); errno != 0 {
		t.Errorf("a client that did choose in time got error %d", errno)
	}
}

// greetRaw reads the greeting and answers nothing.
func greetRaw(t testing.TB, conn net.Conn) *bufio.Reader {
	t.Helper()
	c := bufio.NewReader(conn)
	if _, err := c.Discard(18); err != nil {
		t.Fatal(err)
	}
	return c
}
