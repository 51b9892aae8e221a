package trust

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// lanes are the connections on which a node asks. On a long line one connection carries only as much as the kernel keeps of what is on
// its way, which is a few megabytes a round trip, and after a loss it begins slowly again: what is heavy is spread over several. What
// is light goes by the first, past what is heavy. On a short line the first carries everything: more would only cost.
type lanes struct {
	all  []*http.Transport
	long atomic.Bool // so the line was when it was last dialled

	mu   sync.Mutex
	load []int64 // bytes of bodies that are being sent
}

const (
	heavyLanes = 4                     // besides the first
	heavy      = 4 << 20               // bytes of a body: for less it is not worth to connect
	longDial   = 50 * time.Millisecond // for a connection, which is two round trips: from then on a line is long
)

func newLanes(dial func(ctx context.Context, network, address string) (net.Conn, error), t timing) *lanes {
	l := &lanes{load: make([]int64, 1+heavyLanes)}
	timed := func(ctx context.Context, network, address string) (net.Conn, error) {
		start := time.Now()
		conn, err := dial(ctx, network, address)
		if err == nil {
			l.long.Store(time.Since(start) > longDial)
		}
		return conn, err
	}
	for range l.load {
		l.all = append(l.all, &http.Transport{DialTLSContext: timed, Protocols: onlyHTTP2(), HTTP2: t.http2(), DisableCompression: true,
			MaxResponseHeaderBytes: maxHeader, IdleConnTimeout: 90 * time.Second})
	}
	return l
}

// RoundTrip implements http.RoundTripper.
func (l *lanes) RoundTrip(request *http.Request) (*http.Response, error) {
	if request.ContentLength < heavy || !l.long.Load() {
		return l.all[0].RoundTrip(request)
	}
	lane := l.take(request.ContentLength)
	sent := *request // what is given may not be changed
	sent.Body = &counted{ReadCloser: request.Body, done: sync.OnceFunc(func() { l.give(lane, request.ContentLength) })}
	return l.all[lane].RoundTrip(&sent)
}

// take chooses the heavy lane that has least to carry.
func (l *lanes) take(bytes int64) (lane int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lane = 1
	for i := 2; i < len(l.load); i++ {
		if l.load[i] < l.load[lane] {
			lane = i
		}
	}
	l.load[lane] += bytes
	return lane
}

func (l *lanes) give(lane int, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.load[lane] -= bytes
}

// CloseIdleConnections lets http.Client's method of that name through.
func (l *lanes) CloseIdleConnections() {
	for _, t := range l.all {
		t.CloseIdleConnections()
	}
}

// counted is a body that tells when it is closed, which a transport does with every body.
type counted struct {
	io.ReadCloser
	done func()
}

func (c *counted) Close() error {
	defer c.done()
	return c.ReadCloser.Close()
}
