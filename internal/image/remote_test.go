package image

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// remote opens an image through a server of ours.
func remote(t testing.TB, img Image) *Remote {
	t.Helper()
	s := quiet()
	if err := s.Add("disk", img); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(shortDir(t), "s")
	l, err := Listen(socket, 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, s, l)
	r, err := Dial(t.Context(), socket, "disk", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func TestARemoteIsTheImageThatTheServerOffers(t *testing.T) {
	for _, size := range []int64{1, 4097, 3<<20 + 1536, remoteRead + 12<<20} {
		m := randomMemory(uint64(size), size)
		r := remote(t, m)
		got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
		if err != nil || !bytes.Equal(got, m.data) {
			t.Fatalf("size %d: %d bytes, equal %v, %v", size, len(got), bytes.Equal(got, m.data), err)
		}
		// In one read as well, past the end of it.
		whole := make([]byte, size+10)
		if n, err := r.ReadAt(whole, 0); n != int(size) || !errors.Is(err, io.EOF) || !bytes.Equal(whole[:size], m.data) {
			t.Errorf("size %d: %d bytes in one read, %v", size, n, err)
		}
		var at int64
		err = r.Extents(t.Context(), 0, size, func(e Extent) bool {
			if e.Offset != at || e.Length < 1 || e.Zero && !zeros(m.data[e.Offset:e.Offset+e.Length]) {
				t.Errorf("extent %+v at %d", e, at)
			}
			at += e.Length
			return true
		})
		if err != nil || at != size {
			t.Errorf("size %d: extents up to %d, %v", size, at, err)
		}
	}
}

func TestManyReadsOfARemoteAtOnceKeepApart(t *testing.T) {
	m := randomMemory(7, 8<<20)
	r := remote(t, m)
	var wg sync.WaitGroup
	for worker := range 2 * remoteFlying {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(worker), 1))
			for range 50 {
				off, n := rnd.Int64N(r.Size()), rnd.IntN(300<<10)
				p := make([]byte, min(int64(n), r.Size()-off))
				if _, err := r.ReadAt(p, off); err != nil || !bytes.Equal(p, m.data[off:off+int64(len(p))]) {
					t.Errorf("%d bytes at %d: %v", len(p), off, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestAnExportThatIsNotThereIsRefusedByTheServersWords(t *testing.T) {
	r := remote(t, randomMemory(1, 4096))
	socket := r.conn.RemoteAddr().String()
	if _, err := Dial(t.Context(), socket, "other", ""); err == nil || !strings.Contains(err.Error(), "no export of that name") {
		t.Errorf("another name: %v", err)
	}
	if _, err := Dial(t.Context(), socket, "disk", "changes"); err == nil || !strings.Contains(err.Error(), "no dirty bitmap changes") {
		t.Errorf("a bitmap: %v", err)
	}
	if _, err := r.Dirty(t.Context()); err == nil {
		t.Error("it knows what is dirty without a bitmap")
	}
}

func TestARemoteThatWasClosedOrWhoseServerIsGoneIsAnError(t *testing.T) {
	r := remote(t, randomMemory(1, 1<<20))
	_ = r.Close()
	if _, err := r.ReadAt(make([]byte, 10), 0); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// scripted is a remote whose server says what it is told to, once the first request has come.
func scripted(t *testing.T, says []byte) *Remote {
	t.Helper()
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		_ = theirs.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = theirs.Write(slices.Concat([]byte("NBDMAGICIHAVEOPT"), be(uint16(3))))
		answered := func(option uint32, data ...[]byte) []byte { return appendOptReply(nil, option, repAck, data...) }
		for _, step := range []struct {
			take int
			say  []byte
		}{
			{4 + optionSize, answered(optStructuredReply)},
			{optionSize + len(text("disk")) + 4 + len(text(metaAllocation)) + len(text(metaBitmap+"b")), slices.Concat(
				appendOptReply(nil, optSetMeta, repMeta, be(uint32(7)), []byte(metaAllocation)),
				appendOptReply(nil, optSetMeta, repMeta, be(uint32(9)), []byte(metaBitmap+"b")), answered(optSetMeta))},
			{optionSize + len(text("disk")) + 2, slices.Concat(
				appendOptReply(nil, optGo, repInfo, be(uint16(infoExport)), be(uint64(8192)), be(uint16(3))), answered(optGo))},
			{requestSize, says},
		} {
			if _, err := io.ReadFull(theirs, make([]byte, step.take)); err != nil {
				return
			}
			if _, err := theirs.Write(step.say); err != nil {
				return
			}
		}
	}()
	r, err := handshake(ours, "disk", "b")
	if err != nil {
		t.Fatal(err)
	}
	go r.receive()
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func TestAHostileServerIsFoundOut(t *testing.T) {
	data := func(flags uint16, cookie, off uint64, n int) []byte {
		return slices.Concat(appendChunk(nil, flags, chunkOffsetData, cookie, 8+n), be(off), bytes.Repeat([]byte("x"), n))
	}
	states := func(id uint32, pairs ...uint32) []byte {
		return slices.Concat(appendChunk(nil, chunkDone, chunkBlockStatus, 1, 4+4*len(pairs)), be(id), be(pairs))
	}
	for name, says := range map[string][]byte{
		"nothing":                      nil,
		"a part of the data":           data(chunkDone, 1, 0, 4095),
		"the same data twice":          slices.Concat(data(0, 1, 0, 4096), data(chunkDone, 1, 0, 1)),
		"data before the range":        slices.Concat(data(0, 1, ^uint64(0), 4096), data(chunkDone, 1, 0, 4096)),
		"data behind the range":        data(chunkDone, 1, 1, 4096),
		"more data than asked for":     data(chunkDone, 1, 0, 4097),
		"a hole behind the range":      slices.Concat(appendChunk(nil, chunkDone, chunkOffsetHole, 1, 12), be(uint64(0)), be(uint32(1<<31))),
		"an answer to nothing":         data(chunkDone, 2, 0, 4096),
		"a chunk of no kind":           slices.Concat(appendChunk(nil, chunkDone, 77, 1, 4), make([]byte, 4)),
		"unknown flags":                data(chunkDone|1<<4, 1, 0, 4096),
		"a simple answer":              slices.Concat(appendSimple(nil, 1, 0), make([]byte, 4096)),
		"an error of endless text":     slices.Concat(appendChunk(nil, chunkDone, chunkError, 1, 1<<30), make([]byte, 64)),
		"an error with a wrong length": slices.Concat(appendChunk(nil, chunkDone, chunkError, 1, 6), be(uint32(5)), be(uint16(100))),
		"a state for a read":           states(9, 4096, 1),
		"noise":                        bytes.Repeat([]byte("noise"), 100),
		"the end of a header":          data(chunkDone, 1, 0, 4096)[:10],
	} {
		if n, err := scripted(t, says).ReadAt(make([]byte, 4096), 0); err == nil {
			t.Errorf("%s: %d bytes without an error", name, n)
		}
	}
	for name, says := range map[string][]byte{
		"another context":         states(8, 8192, 1),
		"a state of no bytes":     states(9, 0, 1, 8192, 1),
		"states behind the range": states(9, 8192, 1, 1, 1),
		"half a state":            slices.Concat(appendChunk(nil, chunkDone, chunkBlockStatus, 1, 8), be(uint32(9)), be(uint32(1))),
		"data":                    data(chunkDone, 1, 0, 8192),
	} {
		if got, err := scripted(t, says).Dirty(t.Context()); err == nil {
			t.Errorf("%s: %v without an error", name, got)
		}
	}
	// The table can be passed: a sound answer is taken.
	p := make([]byte, 4096)
	if _, err := scripted(t, slices.Concat(data(0, 1, 4000, 96), data(chunkDone, 1, 0, 4000))).ReadAt(p, 0); err != nil || p[0] != 'x' || p[4095] != 'x' {
		t.Errorf("a sound answer: %v", err)
	}
	if got, err := scripted(t, states(9, 8192, 0)).Dirty(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("nothing dirty: %v, %v", got, err)
	}
}

func TestAServerThatSaysNothingIsLeftAfterTheLimit(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	go func() { _, _ = io.Copy(io.Discard, theirs) }()
	r := &Remote{conn: ours, size: 4096, stall: 20 * time.Millisecond, slots: make(chan struct{}, 1), ended: make(chan struct{}), calls: map[uint64]*call{}}
	r.in = bufio.NewReader(ours)
	go r.receive()
	if _, err := r.ReadAt(make([]byte, 10), 0); err == nil || !strings.Contains(err.Error(), "did not answer") {
		t.Errorf("%v", err)
	}
	_ = r.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Dial(ctx, filepath.Join(shortDir(t), "none"), "disk", ""); err == nil {
		t.Error("a socket that is not there was opened")
	}
}

func TestTooManyDirtyExtentsAreTakenAsMoreAndNeverAsFewer(t *testing.T) {
	var list []Extent
	for i := range int64(maxDirty + 100) {
		list = appendExtent(list, Extent{Offset: 4 * i, Length: 1, Zero: i%2 == 0})
	}
	last := list[len(list)-1]
	if len(list) != maxDirty || last.Zero || last.Offset+last.Length != 4*(maxDirty+99)+1 {
		t.Errorf("%d extents, the last %+v", len(list), last)
	}
}

// FuzzRemote lets a server say anything in answer to a read and to a question.
func FuzzRemote(f *testing.F) {
	f.Add([]byte{}, true)
	f.Add(slices.Concat(appendDataFrame(nil, 1, 0, 4096), make([]byte, 4096), appendChunk(nil, chunkDone, chunkNone, 1, 0)), true)
	f.Add(slices.Concat(appendHoleFrame(nil, 1, 0, 2048), appendErrorFrame(nil, 1, 5, "bad")), true)
	f.Add(slices.Concat(appendChunk(nil, chunkDone, chunkBlockStatus, 1, 12), be(uint32(9)), be(uint32(4096)), be(uint32(1))), false)
	f.Fuzz(func(t *testing.T, says []byte, read bool) {
		r := scripted(t, says)
		if read {
			p := make([]byte, 4096)
			if n, err := r.ReadAt(p, 0); err == nil && n != len(p) {
				t.Errorf("%d bytes without an error", n)
			} else if err == nil && len(says) < 32 {
				t.Errorf("%d bytes of answer cannot be 4096", len(says))
			}
			return
		}
		dirty, err := r.Dirty(t.Context())
		at := int64(0)
		for _, e := range dirty {
			if err != nil || e.Offset < at || e.Length < 1 || e.Length > r.Size()-e.Offset {
				t.Fatalf("extent %+v behind %d, %v", e, at, err)
			}
			at = e.Offset + e.Length
		}
	})
}
