package trust

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// Hub is the master's end of the lines of all its nodes. Its methods may be called from many goroutines.
type Hub struct {
	// Tell, if it is set before Serve, is told what happens to nodes; what the book says of them again after each start, with the time at
	// which it happened. Connections wait for it.
	Tell func(Happening)

	authority *Authority
	log       *slog.Logger
	timing    timing

	mu        sync.Mutex
	cert      *tls.Certificate // the master's, renewed here
	conns     map[*conn]struct{}
	perNode   map[string]int
	strangers map[string]int // by address: connections that have shown no good certificate (yet)
	stranger  int            // all of them
	links     map[nodeKey]*link
	told      map[string]time.Time // refusals, by node and reason
}

// Limits of a hub.
const (
	maxConns            = 8192
	maxConnsNode        = 32
	maxStrangers        = 256
	maxStrangersAddress = 16 // customers' nodes may share an address
)

// NewHub makes the hub of a master. Serve sets it going.
func NewHub(a *Authority, log *slog.Logger) *Hub {
	return &Hub{authority: a, log: log, timing: patient, conns: map[*conn]struct{}{}, perNode: map[string]int{}, strangers: map[string]int{}, links: map[nodeKey]*link{}, told: map[string]time.Time{}}
}

// Serve lets nodes in until the context ends. Requests whose path begins with one of the prefixes go to its handler, which
// is only called for nodes that are let in and finds out with PeerOf which; what a node may do is the handler's to know.
// Patterns are those of http.ServeMux; /trust/ is taken. The listener is closed.
func (h *Hub) Serve(ctx context.Context, listener net.Listener, handlers map[string]http.Handler) error {
	mux := http.NewServeMux()
	h.mountEnrolment(mux)
	for prefix, handler := range handlers {
		mux.Handle(prefix, handler)
	}
	ready := &queue{address: listener.Addr(), conns: make(chan net.Conn), done: make(chan struct{})}
	server := &http.Server{Handler: h.guard(mux), Protocols: plainHTTP2(), HTTP2: h.timing.http2(), ReadHeaderTimeout: h.timing.dial,
		MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(h.log.Handler(), slog.LevelWarn),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) }}
	var work sync.WaitGroup
	work.Go(func() { _ = server.Serve(ready) }) // ends when the queue does, with nothing to say
	work.Go(func() { h.watch(ctx) })
	accepted := make(chan error, 1)
	work.Go(func() { accepted <- h.accept(ctx, listener, ready, &work) })
	var err error
	select {
	case <-ctx.Done():
	case err = <-accepted:
	}
	listener.Close()
	limit, cancel := context.WithTimeout(context.Background(), h.timing.shutdown)
	defer cancel()
	if server.Shutdown(limit) != nil {
		server.Close()
	}
	h.cutAll()
	work.Wait()
	h.cutAll() // what came in at the last moment
	return err
}

// accept takes connections until the context ends.
func (h *Hub) accept(ctx context.Context, listener net.Listener, ready *queue, work *sync.WaitGroup) error {
	for {
		raw, err := listener.Accept()
		switch {
		case err == nil:
			work.Go(func() { h.receive(ctx, raw, ready) })
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept nodes: %w", err)
		default: // no descriptor is left, or the connection was gone at once
			h.log.WarnContext(ctx, "accept a connection", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(h.timing.look):
			}
		}
	}
}

// receive shakes hands, finds out who it is, and hands the connection to who serves it.
func (h *Hub) receive(ctx context.Context, raw net.Conn, ready *queue) {
	address := source(raw.RemoteAddr())
	if !h.admit(address) {
		raw.Close()
		return
	}
	t := tls.Server(raw, h.tls())
	c := newConn(t)
	c.after = func() { h.forget(c, address) }
	h.mu.Lock()
	h.conns[c] = struct{}{}
	h.mu.Unlock()
	// It is a stranger's, which does not last, until it has shown a good certificate.
	strange := time.AfterFunc(h.timing.stranger, c.cut)
	shake, cancel := context.WithTimeout(ctx, h.timing.dial)
	err := t.HandshakeContext(shake)
	cancel()
	if err != nil {
		h.log.DebugContext(ctx, "shake hands", "address", raw.RemoteAddr().String(), "error", err)
		c.cut()
		return
	}
	if h.identify(c, address) {
		strange.Stop()
	}
	switch protocol := t.ConnectionState().NegotiatedProtocol; {
	case protocol == alpnReverse && c.peer != nil:
		h.reverse(ctx, c)
	case protocol == alpnRequests:
		ready.put(c)
	default:
		c.cut()
	}
}

// source is what strangers are counted by: an address, or the network of one machine where that has many addresses.
func source(a net.Addr) string {
	at, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	address := at.Addr().Unmap()
	if address.Is6() {
		if network, err := address.WithZone("").Prefix(64); err == nil {
			return network.String()
		}
	}
	return address.String()
}

// admit counts a new connection, if there is room for it.
func (h *Hub) admit(address string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.conns) >= maxConns || h.stranger >= maxStrangers || h.strangers[address] >= maxStrangersAddress {
		return false
	}
	h.stranger++
	h.strangers[address]++
	return true
}

// identify finds out whose a connection is, and whether it is a node's that is let in. Then it counts as that node's.
func (h *Hub) identify(c *conn, address string) bool {
	peer, joined, err := h.who(c.tls.ConnectionState())
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil && peer != nil && h.perNode[peer.Name] >= maxConnsNode {
		err = refuse("%s has %d connections open already, the most it may have", *peer, maxConnsNode)
	}
	if c.refuse = err; err != nil || peer == nil {
		return false
	}
	if _, ok := h.conns[c]; !ok { // it ended meanwhile
		return false
	}
	c.peer, c.joined = peer, joined
	h.dropStranger(address)
	h.perNode[peer.Name]++
	return true
}

func (h *Hub) dropStranger(address string) {
	h.stranger--
	if h.strangers[address]--; h.strangers[address] == 0 {
		delete(h.strangers, address)
	}
}

func (h *Hub) forget(c *conn, address string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.conns, c)
	if c.peer == nil {
		h.dropStranger(address)
		return
	}
	if h.perNode[c.peer.Name]--; h.perNode[c.peer.Name] == 0 {
		delete(h.perNode, c.peer.Name)
	}
	if key := (nodeKey{c.peer.Role, c.peer.Name}); h.links[key] != nil && h.links[key].conn == c {
		delete(h.links, key)
		h.log.Info("a node went away", "node", c.peer.String())
	}
}

// who tells the peer of a connection: nil without a certificate, an error with one that is not good.
func (h *Hub) who(state tls.ConnectionState) (*Peer, time.Time, error) {
	if len(state.PeerCertificates) == 0 {
		return nil, time.Time{}, nil
	}
	cert, now := state.PeerCertificates[0], h.authority.now()
	peer, err := verify(h.authority.signer.cert, cert, x509.ExtKeyUsageClientAuth, now)
	ours := err == nil || errors.Is(err, errTime)
	hint := clockHint(cert.NotBefore, cert.NotAfter, now)
	var joined time.Time
	switch {
	case err == nil:
		joined, err = h.authority.admit(peer, cert.NotBefore.Add(backdate))
	case errors.Is(err, errTime) && now.Before(cert.NotBefore):
		err = refuse("the certificate of %s is not valid yet by the master's clock: %s there; set the master's clock", peer, hint)
	case errors.Is(err, errTime):
		err = refuse("the certificate of %s has expired: %s by the master's clock; if that is right, enrol the node again ('muster master enrol') and join with the new token", peer, hint)
	default:
		err = refuse("the certificate is not of this master's authority: ask for a token ('muster master enrol') and join (%v)", err)
	}
	var no *Refusal
	if ours && errors.As(err, &no) {
		h.refused(peer, no.Reason)
	}
	if err != nil {
		return nil, time.Time{}, err
	}
	return &peer, joined, nil
}

// stays says why a node that was let in has to go, nil if it may stay.
func (h *Hub) stays(c *conn) error {
	b, err := h.authority.book()
	if err != nil || b.still(*c.peer, c.joined) {
		return err
	}
	return refuse("%s was revoked or enrolled anew: if this is the right machine, enrol it ('muster master enrol') and join with the new token", *c.peer)
}

// tls is the master's side of a handshake. Any certificate is let through it: who cannot be let in is told why.
func (h *Hub) tls() *tls.Config {
	config := baseTLS()
	config.NextProtos = []string{alpnRequests, alpnReverse}
	config.ClientAuth = tls.RequestClientCert
	config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return h.certificate() }
	return config
}

// certificate gives the master's own certificate, which lives as long as those of nodes and is never written down.
func (h *Hub) certificate() (*tls.Certificate, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.authority.now()
	if h.cert != nil && now.Before(renewAt(h.cert.Leaf)) && now.After(h.cert.Leaf.NotBefore) {
		return h.cert, nil
	}
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := h.authority.certify(Peer{Role: roleMaster, Name: h.authority.Name()}, public)
	if err != nil {
		return nil, err
	}
	h.cert = &tls.Certificate{Certificate: [][]byte{leaf.Raw, h.authority.signer.cert.Raw}, PrivateKey: key, Leaf: leaf}
	return h.cert, nil
}

// renewAt is when a third of a certificate's life is left.
func renewAt(cert *x509.Certificate) time.Time {
	return cert.NotAfter.Add(-cert.NotAfter.Sub(cert.NotBefore.Add(backdate)) / 3)
}

// watch cuts the connections of nodes that are shut out.
func (h *Hub) watch(ctx context.Context) {
	tick := time.NewTicker(h.timing.look)
	defer tick.Stop()
	var last *book
	var broken bool
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		b, err := h.authority.book()
		if (err != nil) != broken {
			broken = err != nil
			h.log.ErrorContext(ctx, "read the book of nodes", "error", err)
		}
		if err == nil && b != last {
			h.cutRefused(b)
			h.tell(b.changes(last)...)
			last = b
		}
	}
}

func (h *Hub) cutRefused(b *book) {
	h.mu.Lock()
	var out []*conn
	for c := range h.conns {
		if c.peer != nil && !b.still(*c.peer, c.joined) {
			out = append(out, c)
		}
	}
	h.mu.Unlock()
	for _, c := range out {
		h.log.Info("a connection is cut: the node was revoked or enrolled anew", "node", c.peer.String(), "address", c.RemoteAddr().String())
		c.cut()
	}
}

func (h *Hub) cutAll() {
	h.mu.Lock()
	var all []*conn
	for c := range h.conns {
		all = append(all, c)
	}
	h.mu.Unlock()
	for _, c := range all {
		c.cut()
	}
}

// queue is a listener of connections that were accepted elsewhere.
type queue struct {
	address net.Addr
	conns   chan net.Conn
	done    chan struct{}
	once    sync.Once
}

func (q *queue) put(c *conn) {
	select {
	case q.conns <- c:
	case <-q.done:
		c.cut()
	}
}

// Accept implements net.Listener.
func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr implements net.Listener.
func (q *queue) Addr() net.Addr { return q.address }
