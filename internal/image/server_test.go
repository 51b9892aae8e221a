package image

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const name = "snap-20260102t030405-abc/0"

// offered serves one image.
func offered(t testing.TB, s *Server, img Image) (dial func() net.Conn) {
	t.Helper()
	if err := s.Add(name, img); err != nil {
		t.Fatal(err)
	}
	return served(t, s)
}

func TestEveryReadGivesTheImagesBytes(t *testing.T) {
	m := randomMemory(1, 3<<20+777)
	dial := offered(t, quiet(), m)
	structured, simple := connect(t, dial(), name), connectSimple(t, dial(), name)
	rapid.Check(t, func(rt *rapid.T) {
		off := rapid.Int64Range(0, m.Size()).Draw(rt, "offset")
		length := rapid.OneOf(rapid.IntRange(0, 5000), rapid.IntRange(0, 2<<20)).Draw(rt, "length")
		length = int(min(int64(length), m.Size()-off))
		want := m.data[off : off+int64(length)]
		for _, c := range []*nbdClient{structured, simple} {
			if got, errno := c.read(off, length, 0); errno != 0 || !bytes.Equal(got, want) {
				rt.Fatalf("read of %d at %d: error %d, equal %v", length, off, errno, bytes.Equal(got, want))
			}
		}
		p := structured.readAll(off, length, cmdFlagDF)
		switch {
		case length > pieceSize && p.errno != errnoOverflow:
			rt.Fatalf("an unfragmented read of %d bytes gave error %d", length, p.errno)
		case length <= pieceSize && (p.errno != 0 || p.chunks != 1 || !bytes.Equal(p.got, want)):
			rt.Fatalf("unfragmented read of %d at %d: error %d in %d chunks", length, off, p.errno, p.chunks)
		}
	})
}

func TestManyReadsAtOnceKeepTheirAnswersApart(t *testing.T) {
	m := randomMemory(2, 4<<20)
	s := quiet()
	dial := offered(t, s, m)
	var all sync.WaitGroup
	for i := range 8 {
		c := connect(t, dial(), name)
		all.Go(func() {
			waiting := map[uint64]*pending{}
			for n := range 100 {
				off := int64(i*37_111+n*104_729) % (m.Size() - 1)
				length := int(min(m.Size()-off, int64(1+n*n*20)))
				waiting[c.ask(0, 0, uint64(off), uint32(length))] = &pending{off: off, got: make([]byte, length)}
				for len(waiting) > 16 || n == 99 && len(waiting) > 0 {
					a, err := c.tryNext()
					p := waiting[a.cookie]
					if err != nil || p == nil {
						t.Errorf("answer to %d: %v", a.cookie, err)
						return
					}
					if p.add(t, a); a.done {
						delete(waiting, a.cookie)
						if p.errno != 0 || !bytes.Equal(p.got, m.data[p.off:p.off+int64(len(p.got))]) {
							t.Errorf("read at %d differs, error %d", p.off, p.errno)
						}
					}
				}
			}
		})
	}
	all.Wait()
	if got := s.Stats(name); got.Reads != 800 || got.Clients != 8 || got.PeakInFlight == 0 || got.Bytes == 0 {
		t.Errorf("counted %+v", got)
	}
}

func TestBlockStatusNeverCallsDataAHoleAndHidesNoLargeHole(t *testing.T) {
	m := randomMemory(4, 6<<20+4097)
	c := connect(t, offered(t, quiet(), m)(), name)
	rapid.Check(t, func(rt *rapid.T) {
		off := rapid.Int64Range(0, m.Size()-1).Draw(rt, "offset")
		length := uint32(rapid.Int64Range(1, m.Size()-off).Draw(rt, "length"))
		one := uint16(rapid.SampledFrom([]int{0, cmdFlagReqOne}).Draw(rt, "one"))
		all := c.blockStatus(off, length, one)
		if one != 0 && len(all) != 1 {
			rt.Fatalf("%d extents, one was asked for", len(all))
		}
		pos := off
		for i, e := range all {
			if e.length == 0 || i > 0 && e.zero == all[i-1].zero {
				rt.Fatalf("extent %d of %v", i, all)
			}
			for at := pos; at < pos+e.length; at++ {
				if e.zero && m.data[at] != 0 {
					rt.Fatalf("byte %d is in a hole", at)
				}
			}
			for at := (pos + minHole - 1) / minHole * minHole; !e.zero && at+minHole <= pos+e.length; at += minHole {
				if m.isHole(at, at+minHole) {
					rt.Fatalf("the hole at %d is called data", at)
				}
			}
			pos += e.length
		}
		if one == 0 && pos != off+int64(length) || pos > off+int64(length) {
			rt.Fatalf("extents end at %d, asked for %d", pos, off+int64(length))
		}
	})
}

func TestBlockStatusOfAVeryFragmentedImageComesInParts(t *testing.T) {
	m := &memory{data: make([]byte, 2*(maxWalk+100)*minHole)}
	for off := int64(0); off < m.Size(); off += minHole {
		m.extents = append(m.extents, Extent{off, minHole, off/minHole%2 == 0})
	}
	c := connect(t, offered(t, quiet(), m)(), name)
	parts := 0
	for off := int64(0); off < m.Size(); parts++ {
		all := c.blockStatus(off, uint32(m.Size()-off), 0)
		if len(all) > maxExtents {
			t.Fatalf("%d extents in one answer", len(all))
		}
		for _, e := range all {
			if e.length != minHole || e.zero != (off/minHole%2 == 0) {
				t.Fatalf("extent of %d at %d", e.length, off)
			}
			off += e.length
		}
	}
	if parts < 2 {
		t.Errorf("all of it came in %d answers", parts)
	}
}

func TestNothingCanBeWritten(t *testing.T) {
	m := randomMemory(5, 1<<20)
	before := bytes.Clone(m.data)
	c := connect(t, offered(t, quiet(), m)(), name)
	if c.send&sendReadOnly == 0 || c.send&sendMultiConn == 0 {
		t.Errorf("flags %#x", c.send)
	}
	for kind, payload := range map[uint16][]byte{cmdWrite: make([]byte, 70_000), cmdTrim: nil, cmdWriteZeroes: nil} {
		if errno := c.errno(kind, 0, 4096, 70_000, payload); errno != errnoPerm {
			t.Errorf("command %d: error %d", kind, errno)
		}
	}
	if errno := c.errno(cmdFlush, 0, 0, 0); errno != 0 {
		t.Errorf("flush: error %d", errno)
	}
	if got, errno := c.read(0, 1<<20, 0); errno != 0 || !bytes.Equal(got, before) {
		t.Errorf("the connection is of no use afterwards: error %d", errno)
	}
	c.ask(cmdWrite, 0, 0, MaxRequest+1)
	c.gone()
}

func TestRequestsThatMakeNoSenseAreInvalidAndHarmless(t *testing.T) {
	m := randomMemory(6, 1<<20+1)
	size := uint64(m.Size())
	dial := offered(t, quiet(), m)
	c, plain := connect(t, dial(), name), connectSimple(t, dial(), name)
	for _, r := range []struct {
		kind, flags uint16
		off         uint64
		length      uint32
	}{
		{cmdRead, 0, size, 1}, {cmdRead, 0, size - 1, 2}, {cmdRead, 0, 1 << 63, 1}, {cmdRead, 0, ^uint64(0), 2},
		{cmdRead, 0, 0, ^uint32(0)}, {cmdRead, 1 << 15, 0, 1}, {cmdRead, cmdFlagReqOne, 0, 1},
		{cmdBlockStatus, 0, 0, 0}, {cmdBlockStatus, 0, size, 1}, {cmdBlockStatus, 0, ^uint64(0), 1}, {cmdBlockStatus, 64, 0, 1},
		{cmdCache, 0, 0, 1}, {8, 0, 0, 0}, {99, 0, 0, 1}, {65535, 65535, 0, 0},
	} {
		for _, c := range []*nbdClient{c, plain} {
			if errno := c.errno(r.kind, r.flags, r.off, r.length); errno != errnoInval {
				t.Errorf("%+v: error %d", r, errno)
			}
		}
	}
	if errno := plain.errno(cmdBlockStatus, 0, 0, 1); errno != errnoInval {
		t.Errorf("block status without a context: error %d", errno)
	}
	if got, errno := c.read(0, int(size), 0); errno != 0 || !bytes.Equal(got, m.data) {
		t.Errorf("the connection is of no use afterwards: error %d", errno)
	}
	c.put(make([]byte, requestSize))
	c.gone()
}

func TestTheLargestRequestWorksInLittleMemory(t *testing.T) {
	m := &memory{data: make([]byte, MaxRequest), extents: []Extent{{0, MaxRequest, false}}}
	for off := 0; off < MaxRequest; off += 4096 {
		m.data[off] = byte(off>>12) | 1
	}
	s := quiet()
	s.MaxClients, s.MaxInFlight = 2, 3*pieceRoom
	dial := offered(t, s, m)
	for _, c := range []*nbdClient{connect(t, dial(), name), connectSimple(t, dial(), name)} {
		if got, errno := c.read(0, MaxRequest, 0); errno != 0 || !bytes.Equal(got, m.data) {
			t.Errorf("error %d", errno)
		}
		if errno := c.errno(cmdRead, 0, 0, MaxRequest+1); errno != errnoInval {
			t.Errorf("one byte more: error %d", errno)
		}
	}
	if peak := s.Stats(name).PeakInFlight; peak > s.MaxInFlight {
		t.Errorf("%d bytes in flight, the limit is %d", peak, s.MaxInFlight)
	}
}

func TestABrokenReadIsAnErrorHereAndOnlyHereAndTheOwnerLearns(t *testing.T) {
	m := &memory{data: bytes.Repeat([]byte{7}, 4<<20), extents: []Extent{{0, 4 << 20, false}}}
	m.badFrom, m.badTo = 2<<20, 2<<20+1
	s := quiet()
	var told atomic.Int64
	s.OnError = func(export string, err error) {
		if export != name || !errors.Is(err, errBad) || !strings.Contains(err.Error(), "offset 2097152") {
			t.Errorf("told of %v in %s", err, export)
		}
		told.Add(1)
	}
	dial := offered(t, s, m)
	for i, c := range []*nbdClient{connect(t, dial(), name), connectSimple(t, dial(), name)} {
		if _, errno := c.read(2<<20, 4096, 0); errno != errnoIO {
			t.Errorf("error %d", errno)
		}
		if got := told.Load(); got != int64(i+1) {
			t.Errorf("told %d times", got)
		}
		if got, errno := c.read(0, 2<<20, 0); errno != 0 || !bytes.Equal(got, m.data[:2<<20]) {
			t.Errorf("sound data gave error %d", errno)
		}
	}
	c := connect(t, dial(), name)
	if _, errno := c.read(0, 4<<20, 0); errno != errnoIO {
		t.Errorf("a large read with one bad byte gave error %d", errno)
	}
	if _, errno := c.read(0, 1<<20, 0); errno != 0 {
		t.Errorf("the next read gave error %d", errno)
	}
	if got := s.Stats(name).Errors; got != 3 {
		t.Errorf("counted %d errors", got)
	}
	// What broke after a simple answer had begun cannot be said but by hanging up.
	c = connectSimple(t, dial(), name)
	c.ask(cmdRead, 0, 0, 4<<20)
	if a := c.next(); a.errno != 0 {
		t.Errorf("error %d", a.errno)
	}
	c.gone()
}

// liar is an image whose extents break the contract.
type liar struct {
	*memory
	says []Extent
}

func (l liar) Extents(_ context.Context, _, _ int64, yield func(Extent) bool) error {
	for _, e := range l.says {
		if !yield(e) {
			break
		}
	}
	return nil
}

func TestExtentsThatBreakTheContractAreErrorsAndNotWrongData(t *testing.T) {
	for _, says := range [][]Extent{
		nil,
		{{0, 4096, true}},
		{{4096, 1<<20 - 4096, true}},
		{{0, 8192, false}, {4096, 1<<20 - 4096, true}},
		{{0, 0, true}},
		{{0, -5, true}},
		{{0, 2 << 20, true}},
	} {
		s := quiet()
		c := connect(t, offered(t, s, liar{randomMemory(7, 1<<20), says})(), name)
		if errno := c.errno(cmdBlockStatus, 0, 0, 1<<20); errno != errnoIO {
			t.Errorf("%v: block status gave error %d", says, errno)
		}
		if _, errno := c.read(0, pieceSize, 0); errno != errnoIO {
			t.Errorf("%v: read gave error %d", says, errno)
		}
		if s.Stats(name).Errors != 2 {
			t.Errorf("%v: the owner was not told", says)
		}
	}
}

func TestACacheRequestReachesThePrefetcher(t *testing.T) {
	m := cached{randomMemory(8, 1<<20)}
	c := connect(t, offered(t, quiet(), m)(), name)
	if c.send&sendCache == 0 {
		t.Errorf("flags %#x", c.send)
	}
	if errno := c.errno(cmdCache, 0, 4096, 1<<19); errno != 0 {
		t.Errorf("error %d", errno)
	}
	if errno := c.errno(cmdCache, 0, 4096, 1<<20); errno != errnoInval {
		t.Errorf("past the end: error %d", errno)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.prefetched) != 1 || m.prefetched[0].Offset != 4096 || m.prefetched[0].Length != 1<<19 {
		t.Errorf("prefetched %v", m.prefetched)
	}
}

func TestASlowReadDoesNotHoldUpAFastOne(t *testing.T) {
	m := randomMemory(9, 1<<20)
	m.gate = make(chan struct{})
	c := connect(t, offered(t, quiet(), m)(), name)
	slow := c.ask(cmdRead, 0, 0, 512)
	if all := c.blockStatus(0, 1<<20, 0); len(all) == 0 {
		t.Error("no block status while a read is under way")
	}
	second := c.ask(cmdRead, 0, 512, 512)
	waitFor(t, "both reads to be under way", func() bool { return m.reading.Load() == 2 })
	close(m.gate)
	if a, b := c.next().cookie, c.next().cookie; a+b != slow+second {
		t.Errorf("answers to %d and %d", a, b)
	}
}

// waitFor waits for something that happens soon by itself.
func waitFor(t testing.TB, what string, is func() bool) {
	t.Helper()
	limit := time.After(20 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func TestClientsThatTakeNoAnswersAreDroppedAndOthersGoOn(t *testing.T) {
	m := &memory{data: bytes.Repeat([]byte{9}, MaxRequest), extents: []Extent{{0, MaxRequest, false}}}
	s := quiet()
	s.MaxClients, s.MaxInFlight, s.StallLimit = 8, 12*pieceRoom, time.Hour
	dial := offered(t, s, m)
	var greedy []*nbdClient
	for range 7 {
		c := connect(t, dial(), name)
		for range 4 {
			c.ask(cmdRead, 0, 0, MaxRequest)
		}
		greedy = append(greedy, c)
	}
	waitFor(t, "the shared memory to be used up", func() bool { return s.Stats(name).PeakInFlight >= 11*pieceRoom })
	c := connect(t, dial(), name)
	if got, errno := c.read(0, 4<<20, 0); errno != 0 || !bytes.Equal(got, m.data[:4<<20]) {
		t.Errorf("a well-behaved client got error %d", errno)
	}
	if peak := s.Stats(name).PeakInFlight; peak > s.MaxInFlight {
		t.Errorf("%d bytes in flight, the limit is %d", peak, s.MaxInFlight)
	}
	for _, c := range greedy { // they left, as far as the server can see, in the middle of everything
		_ = c.conn.Close()
	}
	waitFor(t, "the greedy to be gone", func() bool { return s.Stats(name).Clients == 1 })
	if _, errno := c.read(0, 4<<20, 0); errno != 0 {
		t.Errorf("afterwards a read gave error %d", errno)
	}
}

func TestAClientThatStallsIsDroppedAfterTheLimit(t *testing.T) {
	m := &memory{data: make([]byte, MaxRequest), extents: []Extent{{0, MaxRequest, false}}}
	s := quiet()
	s.StallLimit = 50 * time.Millisecond
	c := connect(t, offered(t, s, m)(), name)
	c.ask(cmdRead, 0, 0, MaxRequest)
	waitFor(t, "the client to be dropped", func() bool { return s.Stats(name).Clients == 0 })
	c.gone()
}

func TestRemoveDisconnectsAndThenNobodyReads(t *testing.T) {
	m := randomMemory(10, 1<<20)
	m.gate = make(chan struct{})
	s := quiet()
	dial := offered(t, s, m)
	other := randomMemory(11, 1<<20)
	if err := s.Add("other", other); err != nil {
		t.Fatal(err)
	}
	c, bystander := connect(t, dial(), name), connect(t, dial(), "other")
	c.ask(cmdRead, 0, 0, 512)
	waitFor(t, "the read", func() bool { return m.reading.Load() == 1 })
	removed := make(chan struct{})
	go func() {
		s.Remove(name)
		close(removed)
	}()
	c.gone()
	select {
	case <-removed:
		t.Error("removed while the image was read")
	default:
	}
	m.gate <- struct{}{}
	<-removed
	if m.reading.Load() != 0 {
		t.Error("the image is read after Remove")
	}
	if got, errno := bystander.read(0, 1<<20, 0); errno != 0 || !bytes.Equal(got, other.data) {
		t.Errorf("a client of another export got error %d", errno)
	}
	if got := greet(t, dial()).option(optGo, text(name), be(uint16(0))); got[0].kind != repErrUnknown {
		t.Errorf("the removed export answers %#x", got[0].kind)
	}
	if err := s.Add(name, m); err != nil {
		t.Errorf("add it again: %v", err)
	}
	s.Remove("never there")
}

func TestCloseAnswersWhatWasAsked(t *testing.T) {
	m := randomMemory(12, 1<<20)
	m.gate = make(chan struct{})
	s := quiet()
	dial := offered(t, s, m)
	c, idle := connect(t, dial(), name), connect(t, dial(), name)
	undecided := greet(t, dial())
	c.ask(cmdRead, 0, 1000, 512)
	waitFor(t, "the read", func() bool { return m.reading.Load() == 1 })
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	idle.gone()
	undecided.gone()
	m.gate <- struct{}{}
	p := &pending{off: 1000, got: make([]byte, 512)}
	if p.add(t, c.next()); p.errno != 0 || !bytes.Equal(p.got, m.data[1000:1512]) {
		t.Errorf("error %d", p.errno)
	}
	c.gone()
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if err := s.Add("late", m); !errors.Is(err, net.ErrClosed) {
		t.Errorf("add to a closed server: %v", err)
	}
	if err := s.Serve(t.Context(), unasked{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("serve with a closed server: %v", err)
	}
}

// unasked is a listener that is never asked for a client.
type unasked struct{ net.Listener }

func (unasked) Close() error { return nil }

func TestCloseDoesNotWaitForAStalledClientOrAHangingRead(t *testing.T) {
	m := &memory{data: make([]byte, MaxRequest), extents: []Extent{{0, MaxRequest, false}}}
	s := quiet()
	s.CloseLimit = 50 * time.Millisecond
	c := connect(t, offered(t, s, m)(), name)
	c.ask(cmdRead, 0, 0, MaxRequest)
	if err := s.Close(); err != nil {
		t.Errorf("a stalled client: %v", err)
	}

	m = randomMemory(13, 1<<20)
	m.gate = make(chan struct{})
	s = NewServer()
	s.CloseLimit = 50 * time.Millisecond
	c = connect(t, offered(t, s, m)(), name)
	c.ask(cmdRead, 0, 0, 512)
	waitFor(t, "the read", func() bool { return m.reading.Load() == 1 })
	if err := s.Close(); err == nil || !strings.Contains(err.Error(), "clients: 1") {
		t.Errorf("a read that hangs: %v", err)
	}
	close(m.gate)
	c.gone()
}

func TestEndingTheContextEndsServe(t *testing.T) {
	s := quiet()
	if err := s.Add(name, randomMemory(14, 1<<20)); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(filepath.Join(shortDir(t), "s"), 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := connect(t, conn, name)
	cancel()
	c.gone()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("unix", l.Addr().String()); err == nil {
		_ = conn.Close()
		t.Error("the socket still answers")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestMoreClientsThanAllowedAreTurnedAway(t *testing.T) {
	s := quiet()
	s.MaxClients = 2
	dial := offered(t, s, randomMemory(15, 1<<20))
	first, second := connect(t, dial(), name), connect(t, dial(), name)
	(&nbdClient{t: t, conn: dial()}).turnedAway()
	first.ask(cmdDisconnect, 0, 0, 0)
	first.gone()
	waitFor(t, "the first to be gone", func() bool { return s.Stats(name).Clients == 1 })
	third := connect(t, dial(), name)
	for _, c := range []*nbdClient{second, third} {
		if _, errno := c.read(0, 4096, 0); errno != 0 {
			t.Errorf("error %d", errno)
		}
	}
}

func (c *nbdClient) turnedAway() {
	c.t.Helper()
	var b [1]byte
	if n, err := c.conn.Read(b[:]); n != 0 || err == nil || isTimeout(err) {
		c.t.Errorf("got %d bytes, %v", n, err)
	}
}

func TestServeRefusesLimitsThatCannotBeKept(t *testing.T) {
	s := quiet()
	s.MaxInFlight = 1 << 20
	if err := s.Serve(t.Context(), unasked{}); err == nil || !strings.Contains(err.Error(), "at least") {
		t.Errorf("got %v", err)
	}
}

func TestAddRefusesWhatCannotBeOffered(t *testing.T) {
	s := quiet()
	m := randomMemory(16, 4096)
	for _, bad := range []string{strings.Repeat("x", MaxExportName+1), "a\x00b", "a\nb", "\xff"} {
		if err := s.Add(bad, m); err == nil {
			t.Errorf("added %q", bad)
		}
	}
	if err := s.Add(name, m); err != nil {
		t.Fatal(err)
	}
	if err := s.Add(name, m); err == nil {
		t.Error("added a name twice")
	}
}

func TestTheEmptyNameIsTheDefaultExport(t *testing.T) {
	s := quiet()
	m, other := randomMemory(18, 4096), randomMemory(19, 8192)
	dial := offered(t, s, m)
	if got := connect(t, dial(), "").size; got != m.Size() {
		t.Errorf("the only export is not the default: %d bytes", got)
	}
	if err := s.Add("other", other); err != nil {
		t.Fatal(err)
	}
	if got := greet(t, dial()).option(optGo, text(""), be(uint16(0))); got[0].kind != repErrUnknown {
		t.Errorf("one of two exports is the default: %#x", got[0].kind)
	}
	if err := s.Add("", other); err != nil {
		t.Fatal(err)
	}
	if got := connect(t, dial(), "").size; got != other.Size() {
		t.Errorf("the default has %d bytes", got)
	}
}
