package trust

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/sethvargo/go-retry"
)

// maxClockGap is how far apart the clocks of a node and its master may be before that is told.
const maxClockGap = 5 * time.Minute

// Serve answers the master's requests until the context ends: it keeps one connection to the master open, comes back when
// that ends, with growing pauses, and renews the certificate in time. What is wrong is logged, and tried again: a node
// goes on without its master, and a Join of another process into the same folder is noticed.
func (n *Node) Serve(ctx context.Context, handler http.Handler) {
	server := &http.Server{Handler: handler, Protocols: plainHTTP2(), HTTP2: n.timing.http2(), ReadHeaderTimeout: n.timing.dial,
		MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(n.Log.Handler(), slog.LevelWarn)}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var work sync.WaitGroup
	work.Go(func() { n.keepRenewed(ctx) })
	work.Go(func() {
		<-ctx.Done()
		limit, cancel := context.WithTimeout(context.Background(), n.timing.shutdown)
		defer cancel()
		if server.Shutdown(limit) != nil {
			server.Close()
		}
	})
	line := &outward{node: n, ctx: ctx, pause: n.pauses()}
	_ = server.Serve(line) // ends when the context does, with nothing to say
	cancel()
	work.Wait()
	if line.last != nil {
		line.last.cut() // one that was made at the last moment
	}
	n.client.CloseIdleConnections()
}

// keepRenewed renews the certificate when a third of its life is left. It looks at the clock often, instead of waiting
// for that time: machines are suspended, and clocks are set.
func (n *Node) keepRenewed(ctx context.Context) {
	tick := time.NewTicker(n.timing.look)
	defer tick.Stop()
	pause := n.pauses()
	var next time.Time
	var told string // the error that was logged last
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s, err := n.load()
		if err != nil || n.now().Before(renewAt(s.cert)) || time.Now().Before(next) {
			continue
		}
		if err := n.renew(ctx); err != nil {
			if text := err.Error(); ctx.Err() == nil && text != told {
				told = text
				n.Log.WarnContext(ctx, "the certificate is due and was not renewed; trying again", "expires", s.cert.NotAfter, "error", err)
			}
			wait, _ := pause.Next()
			next = time.Now().Add(wait)
			continue
		}
		pause, told = n.pauses(), ""
		n.Log.InfoContext(ctx, "the certificate was renewed", "expires", n.Expires())
	}
}

// pauses are how long to wait before the next attempt: longer each time, and never the same for all nodes.
func (n *Node) pauses() retry.Backoff {
	return retry.WithJitterPercent(50, retry.WithCappedDuration(n.timing.backoffTo, retry.NewExponential(n.timing.backoff)))
}

// outward is a listener that listens nowhere: it connects to the master, and hands that connection over to be served.
type outward struct {
	node   *Node
	ctx    context.Context // Serve's
	pause  retry.Backoff
	last   *conn // the connection before
	opened time.Time
	told   string // the error that was logged last
}

// Accept implements net.Listener: it gives a new connection when the one before has ended.
func (o *outward) Accept() (net.Conn, error) {
	if o.last != nil {
		select {
		case <-o.last.closed:
		case <-o.ctx.Done():
			return nil, net.ErrClosed
		}
		if time.Since(o.opened) >= o.node.timing.settled {
			o.pause = o.node.pauses()
		}
		o.node.Log.Info("the connection to the master ended")
		o.wait()
	}
	for o.ctx.Err() == nil {
		c, err := o.open()
		if err == nil {
			o.last, o.opened, o.told = c, time.Now(), ""
			o.node.Log.Info("connected to the master", "address", c.RemoteAddr().String())
			return c, nil
		}
		o.tell(err)
		o.wait()
	}
	return nil, net.ErrClosed
}

// open connects, after asking whether the node would be let in: a refusal has a reason then.
func (o *outward) open() (*conn, error) {
	ctx, cancel := context.WithTimeout(o.ctx, 2*o.node.timing.dial)
	defer cancel()
	hello, err := ask(ctx, o.node.client, pathHello, struct{}{})
	if err != nil {
		return nil, err
	}
	if gap := o.node.now().Sub(hello.Time).Abs(); gap > maxClockGap {
		o.node.Log.Warn("this machine's clock and the master's differ: set the one that is wrong", "by", gap.Round(time.Second), "master", hello.Time)
	}
	c, err := o.node.dial(ctx, alpnReverse)
	if err != nil {
		return nil, err
	}
	return newConn(c), nil
}

// tell logs an error once, until it is another.
func (o *outward) tell(err error) {
	if text := err.Error(); o.ctx.Err() == nil && text != o.told {
		o.told = text
		o.node.Log.Warn("the master is not reached; trying again", "error", err)
	}
}

func (o *outward) wait() {
	pause, _ := o.pause.Next()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-o.ctx.Done():
	}
}

// Close implements net.Listener.
func (o *outward) Close() error { return nil }

// Addr implements net.Listener.
func (o *outward) Addr() net.Addr { return nowhere{} }

// nowhere is the address that an outward listener listens on.
type nowhere struct{}

// Network implements net.Addr.
func (nowhere) Network() string { return "tcp" }

// String implements net.Addr.
func (nowhere) String() string { return "nowhere" }
