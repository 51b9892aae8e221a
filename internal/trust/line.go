package trust

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

// What a connection is for, by ALPN.
const (
	alpnRequests = "h2"
	alpnReverse  = "muster-reverse/1"
)

// timing is how long the line waits for what. Tests are less patient.
type timing struct {
	dial      time.Duration // to connect and shake hands
	idle      time.Duration // silence after which the other end is asked whether it is there
	ping      time.Duration // how long its answer may take
	stranger  time.Duration // how long a connection without a certificate that is good may last
	look      time.Duration // how often the hub looks whether the book was changed, and a node whether its certificate is due
	backoff   time.Duration // before a node connects again, at first
	backoffTo time.Duration // and at last
	settled   time.Duration // a connection that lasted so long was a good one
	shutdown  time.Duration // how long requests under way may go on when their end is wanted
}

var patient = timing{dial: 10 * time.Second, idle: 15 * time.Second, ping: 15 * time.Second, stranger: 30 * time.Second, look: 250 * time.Millisecond,
	backoff: time.Second, backoffTo: 30 * time.Second, settled: time.Minute, shutdown: 5 * time.Second}

// Limits of a line.
const (
	maxHeader  = 64 << 10 // bytes of a request's or an answer's header
	maxStreams = 128      // requests at once on one connection
	window     = 4<<20 - 1
)

func (t timing) http2() *http.HTTP2Config {
	return &http.HTTP2Config{MaxConcurrentStreams: maxStreams, MaxReceiveBufferPerConnection: window, MaxReceiveBufferPerStream: window,
		SendPingTimeout: t.idle, PingTimeout: t.ping, WriteByteTimeout: t.idle + t.ping}
}

// plainHTTP2 makes net/http speak HTTP/2 at once on the connections it is given. They are TLS connections that were
// opened and verified here; net/http does not know that.
func plainHTTP2() *http.Protocols {
	p := &http.Protocols{}
	p.SetUnencryptedHTTP2(true)
	return p
}

// conn is a connection whose TLS is established. It hides that it is one, so that net/http does not do it again.
type conn struct {
	net.Conn
	tls    *tls.Conn
	peer   *Peer     // nil: a stranger
	joined time.Time // when the peer joined
	refuse error     // not nil: why it is a stranger although it showed a certificate

	once   sync.Once
	closed chan struct{} // closed when it is
	after  func()        // called once then, may be nil
}

func newConn(c *tls.Conn) *conn { return &conn{Conn: c, tls: c, closed: make(chan struct{})} }

// Close ends a connection as TLS wants it.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.ended()
	return err
}

// cut ends it at once, whatever it is doing.
func (c *conn) cut() {
	_ = c.tls.NetConn().Close()
	c.ended()
}

func (c *conn) ended() {
	c.once.Do(func() {
		close(c.closed)
		if c.after != nil {
			c.after()
		}
	})
}

// baseTLS is what both ends want of TLS. Who the other is they verify themselves, for the same reasons on both sides: not
// by a host's name, and with an answer that says what to do.
func baseTLS() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true}
}

// masterOf proves that the other end is the master of an authority, or why not.
func masterOf(state tls.ConnectionState, authority *x509.Certificate, now time.Time) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("it shows no certificate")
	}
	_, err := verify(authority, state.PeerCertificates[0], x509.ExtKeyUsageServerAuth, now)
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &unknown):
		return refuse("what answers there is not the master of this node's authority: check the address; if the master was made anew, enrol this node there")
	case errors.Is(err, errTime):
		return fmt.Errorf("the master's certificate does not fit the clock: %w; set the clock of the machine whose is wrong", err)
	}
	return err
}

// dial opens a connection to the first of the master's addresses that answers as what it should be.
func dial(ctx context.Context, masters []string, config *tls.Config, limit time.Duration) (*tls.Conn, error) {
	var errs []error
	for _, address := range masters {
		c, err := dialOne(ctx, address, config, limit)
		if err == nil {
			return c, nil
		}
		errs = append(errs, fmt.Errorf("connect to master %s: %w", address, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

func dialOne(ctx context.Context, address string, config *tls.Config, limit time.Duration) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var d net.Dialer
	raw, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, config)
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return c, nil
}
