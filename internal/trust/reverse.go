package trust

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
)

type nodeKey struct {
	role Role
	name string
}

// link is a reverse connection.
type link struct {
	peer Peer
	conn *conn
	http *http.ClientConn
}

// reverse makes the master the client of a connection. A newer connection of a node takes the place of the one before.
func (h *Hub) reverse(ctx context.Context, c *conn) {
	transport := &http.Transport{Protocols: plainHTTP2(), HTTP2: h.timing.http2(), DisableCompression: true, MaxResponseHeaderBytes: maxHeader,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}
	client, err := transport.NewClientConn(ctx, "http", "node:1")
	if err != nil {
		h.log.DebugContext(ctx, "open a reverse connection", "node", c.peer.String(), "error", err)
		c.cut()
		return
	}
	l := &link{peer: *c.peer, conn: c, http: client}
	key := nodeKey{l.peer.Role, l.peer.Name}
	h.mu.Lock()
	old := h.links[key]
	_, alive := h.conns[c]
	if alive { // else it ended meanwhile, and was forgotten
		h.links[key] = l
	}
	h.mu.Unlock()
	if !alive {
		return
	}
	h.log.InfoContext(ctx, "a node is connected", "node", l.peer.String(), "address", c.RemoteAddr().String(), "again", old != nil)
	if old != nil {
		old.conn.cut()
	}
}

// Connected lists the nodes that are connected now, by name.
func (h *Hub) Connected() []Peer {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]Peer, 0, len(h.links))
	for _, l := range h.links {
		out = append(out, l.peer)
	}
	slices.SortFunc(out, func(a, b Peer) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Client gives a client whose requests go to a node, down the connection that the node keeps open, whatever host they
// name. It stays good when the node goes away and comes back; meanwhile, and when the node is away now, the error is
// ErrAway.
func (h *Hub) Client(role Role, name string) (*http.Client, error) {
	key := nodeKey{role, name}
	if h.link(key) == nil {
		return nil, away(key)
	}
	return &http.Client{Transport: reverse{h, key}, CheckRedirect: noRedirect}, nil
}

func away(key nodeKey) error { return fmt.Errorf("reach %s %s: %w", key.role, key.name, ErrAway) }

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

func (h *Hub) link(key nodeKey) *link {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.links[key]
}

// reverse carries the master's requests to one node.
type reverse struct {
	hub *Hub
	key nodeKey
}

// RoundTrip implements http.RoundTripper.
func (r reverse) RoundTrip(request *http.Request) (*http.Response, error) {
	l := r.hub.link(r.key)
	if l == nil || l.http.Err() != nil {
		return nil, errors.Join(away(r.key), closeBody(request))
	}
	if err := r.hub.stays(l.conn); err != nil {
		return nil, errors.Join(err, closeBody(request))
	}
	return l.http.RoundTrip(request)
}

// closeBody does what a RoundTripper owes even to a request that it does not send.
func closeBody(request *http.Request) error {
	if request.Body == nil {
		return nil
	}
	return request.Body.Close()
}
