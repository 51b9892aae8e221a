package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// maxAnswer bounds an answer's body in bytes.
const maxAnswer = 64 << 20

// Client asks a master over its REST interface. It implements Operator and Files.
type Client struct {
	http *http.Client
	base string
	who  string // is asked
	hint string // what to do when nobody answers
}

// Dial gives a client of the master that listens on a unix socket. It does not connect yet.
func Dial(socket string) *Client {
	var d net.Dialer
	transport := &http.Transport{
		DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
		MaxIdleConns:    4,
		IdleConnTimeout: time.Minute,
	}
	return &Client{http: &http.Client{Transport: transport}, base: "http://muster", who: "master",
		hint: "no master answers on " + socket + ": start one with 'muster serve', or name its folder with --dir"}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func call[T any](ctx context.Context, c *Client, method, path string, query url.Values, in any) (T, error) {
	var out T
	data, err := c.do(ctx, method, path, query, in)
	if err != nil || len(data) == 0 {
		return out, err
	}
	if err := json.Unmarshal(data, &out); err != nil {
		return out, fmt.Errorf("read answer to %s %s: %w", method, path, err)
	}
	return out, nil
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, in any) ([]byte, error) {
	resp, err := c.send(ctx, method, path, query, in)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read answer to %s %s: %w", method, path, err)
	}
	return data, nil
}

// send asks, and gives an answer that is no error. Its body has to be closed.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, in any) (*http.Response, error) {
	resp, err := c.ask(ctx, method, path, query, in)
	if err != nil || resp.StatusCode < 300 {
		return resp, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read answer to %s %s: %w", method, path, err)
	}
	e := &Error{}
	if json.Unmarshal(data, e) != nil || e.Message == "" {
		e.Message = fmt.Sprintf("%s %s: the %s answered %s", method, path, c.who, resp.Status)
	}
	if e.Kind == "" {
		e.Kind = kindOf(resp.StatusCode)
	}
	return nil, e
}

// ask gives whatever is answered. Its body has to be closed.
func (c *Client) ask(ctx context.Context, method, path string, query url.Values, in any) (*http.Response, error) {
	var payload io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("write request %s %s: %w", method, path, err)
		}
		payload = bytes.NewReader(raw)
	}
	target := c.base + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, payload)
	if err != nil {
		return nil, fmt.Errorf("make request %s %s: %w", method, path, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" {
			return nil, Errorf(Unavailable, "%s", c.hint)
		}
		return nil, fmt.Errorf("ask %s: %w", c.who, err)
	}
	return resp, nil
}

func seg(s string) string { return url.PathEscape(s) }

// Version implements Operator.
func (c *Client) Version(ctx context.Context) (Version, error) {
	return call[Version](ctx, c, "GET", "/v1/version", nil, nil)
}

// Contact implements Operator.
func (c *Client) Contact(ctx context.Context, appliance string, source dr.Source) (Contact, error) {
	return call[Contact](ctx, c, "POST", "/v1/contact", url.Values{"appliance": {appliance}}, source)
}

// AddServer implements Operator.
func (c *Client) AddServer(ctx context.Context, server dr.Server) (dr.Server, error) {
	return call[dr.Server](ctx, c, "POST", "/v1/servers", nil, server)
}

// UpdateServer implements Operator.
func (c *Client) UpdateServer(ctx context.Context, name string, change ServerChange) (dr.Server, error) {
	return call[dr.Server](ctx, c, "PATCH", "/v1/servers/"+seg(name), nil, change)
}

// Servers implements Operator.
func (c *Client) Servers(ctx context.Context, after string, limit int) ([]ServerStatus, error) {
	q := url.Values{"limit": {strconv.Itoa(limit)}}
	if after != "" {
		q.Set("after", after)
	}
	return call[[]ServerStatus](ctx, c, "GET", "/v1/servers", q, nil)
}

// Server implements Operator.
func (c *Client) Server(ctx context.Context, name string) (ServerStatus, error) {
	return call[ServerStatus](ctx, c, "GET", "/v1/servers/"+seg(name), nil, nil)
}

// RemoveServer implements Operator.
func (c *Client) RemoveServer(ctx context.Context, name string) error {
	_, err := c.do(ctx, "DELETE", "/v1/servers/"+seg(name), nil, nil)
	return err
}

// Snapshot implements Operator.
func (c *Client) Snapshot(ctx context.Context, name string) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/servers/"+seg(name)+"/snapshot", nil, nil)
}

// SnapshotData implements Operator.
func (c *Client) SnapshotData(ctx context.Context, name string) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/servers/"+seg(name)+"/snapshot-data", nil, nil)
}

// PreRecover implements Operator.
func (c *Client) PreRecover(ctx context.Context, name, snapshot string) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/servers/"+seg(name)+"/prerecover", nil, snapshotBody{snapshot})
}

// Test implements Operator.
func (c *Client) Test(ctx context.Context, name, snapshot string) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/servers/"+seg(name)+"/test", nil, snapshotBody{snapshot})
}

// Replicate implements Operator.
func (c *Client) Replicate(ctx context.Context, name, snapshot string) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/servers/"+seg(name)+"/replicate", nil, snapshotBody{snapshot})
}

// Appliances implements Operator.
func (c *Client) Appliances(ctx context.Context) ([]ApplianceStatus, error) {
	return call[[]ApplianceStatus](ctx, c, "GET", "/v1/appliances", nil, nil)
}

// Snapshots implements Operator.
func (c *Client) Snapshots(ctx context.Context, name string) ([]dr.Record, error) {
	return call[[]dr.Record](ctx, c, "GET", "/v1/servers/"+seg(name)+"/snapshots", nil, nil)
}

// Record implements Operator.
func (c *Client) Record(ctx context.Context, snapshot string) (dr.Record, error) {
	return call[dr.Record](ctx, c, "GET", "/v1/snapshots/"+seg(snapshot), nil, nil)
}

// Promotions implements Operator.
func (c *Client) Promotions(ctx context.Context, name string) ([]dr.Promotion, error) {
	return call[[]dr.Promotion](ctx, c, "GET", "/v1/servers/"+seg(name)+"/promotions", nil, nil)
}

// Rule implements Operator.
func (c *Client) Rule(ctx context.Context, snapshot string, request RuleRequest) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/snapshots/"+seg(snapshot)+"/rule", nil, request)
}

// Invoke implements Operator.
func (c *Client) Invoke(ctx context.Context, request InvokeRequest) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/invocations", nil, request)
}

// EndInvocation implements Operator.
func (c *Client) EndInvocation(ctx context.Context, id string, keep bool) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/invocations/"+seg(id)+"/end", nil, map[string]bool{"keep": keep})
}

// Invocations implements Operator.
func (c *Client) Invocations(ctx context.Context, all bool) ([]dr.Invocation, error) {
	return call[[]dr.Invocation](ctx, c, "GET", "/v1/invocations", url.Values{"all": {strconv.FormatBool(all)}}, nil)
}

// Invocation implements Operator.
func (c *Client) Invocation(ctx context.Context, id string) (dr.Invocation, error) {
	return call[dr.Invocation](ctx, c, "GET", "/v1/invocations/"+seg(id), nil, nil)
}

// MoveInvocation implements Operator.
func (c *Client) MoveInvocation(ctx context.Context, id string, request MoveRequest) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/invocations/"+seg(id)+"/move", nil, request)
}

// AbandonInvocation implements Operator.
func (c *Client) AbandonInvocation(ctx context.Context, id string, request AbandonRequest) (dr.Invocation, error) {
	return call[dr.Invocation](ctx, c, "POST", "/v1/invocations/"+seg(id)+"/abandon", nil, request)
}

// ListSilos implements Operator.
func (c *Client) ListSilos(ctx context.Context) ([]SiloStatus, error) {
	return call[[]SiloStatus](ctx, c, "GET", "/v1/silos", nil, nil)
}

// ShowSilo implements Operator.
func (c *Client) ShowSilo(ctx context.Context, name string) (SiloStatus, error) {
	return call[SiloStatus](ctx, c, "GET", "/v1/silos/"+seg(name), nil, nil)
}

// DrainSilo implements Operator.
func (c *Client) DrainSilo(ctx context.Context, name string, request DrainRequest) (SiloStatus, error) {
	return call[SiloStatus](ctx, c, "POST", "/v1/silos/"+seg(name)+"/drain", nil, request)
}

// RemoveSilo implements Operator.
func (c *Client) RemoveSilo(ctx context.Context, name string) error {
	_, err := c.do(ctx, "DELETE", "/v1/silos/"+seg(name), nil, nil)
	return err
}

// Tickets implements Operator.
func (c *Client) Tickets(ctx context.Context, all bool) ([]dr.Ticket, error) {
	return call[[]dr.Ticket](ctx, c, "GET", "/v1/tickets", url.Values{"all": {strconv.FormatBool(all)}}, nil)
}

// CloseTicket implements Operator.
func (c *Client) CloseTicket(ctx context.Context, id, reason string) error {
	_, err := c.do(ctx, "POST", "/v1/tickets/"+seg(id)+"/close", nil, map[string]string{"reason": reason})
	return err
}

// Events implements Operator.
func (c *Client) Events(ctx context.Context, after int64, limit int, server string) ([]dr.Event, error) {
	q := url.Values{"after": {strconv.FormatInt(after, 10)}, "limit": {strconv.Itoa(limit)}}
	if server != "" {
		q.Set("server", server)
	}
	return call[[]dr.Event](ctx, c, "GET", "/v1/events", q, nil)
}

// Operations implements Operator.
func (c *Client) Operations(ctx context.Context) ([]Operation, error) {
	return call[[]Operation](ctx, c, "GET", "/v1/operations", nil, nil)
}

// Operation implements Operator.
func (c *Client) Operation(ctx context.Context, id string, seen int64, wait time.Duration) (Operation, error) {
	q := url.Values{"seen": {strconv.FormatInt(seen, 10)}, "wait": {strconv.FormatInt(min(wait, MaxWait).Milliseconds(), 10)}}
	return call[Operation](ctx, c, "GET", "/v1/operations/"+seg(id), q, nil)
}

// CancelOperation implements Operator.
func (c *Client) CancelOperation(ctx context.Context, id string) error {
	_, err := c.do(ctx, "POST", "/v1/operations/"+seg(id)+"/cancel", nil, nil)
	return err
}

// StoreUsage implements Operator.
func (c *Client) StoreUsage(ctx context.Context) ([]StoreUsage, error) {
	return call[[]StoreUsage](ctx, c, "GET", "/v1/store", nil, nil)
}

// Meter implements Operator.
func (c *Client) Meter(ctx context.Context, month, customer string) ([]dr.Metered, error) {
	return call[[]dr.Metered](ctx, c, "GET", "/v1/meter/"+seg(month), url.Values{"customer": {customer}}, nil)
}

// VerifyStore implements Operator.
func (c *Client) VerifyStore(ctx context.Context, snapshot string) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/store/verify", nil, snapshotBody{snapshot})
}

// CollectStore implements Operator.
func (c *Client) CollectStore(ctx context.Context, alone bool) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/store/collect", nil, map[string]bool{"alone": alone})
}

// AdoptStore implements Operator.
func (c *Client) AdoptStore(ctx context.Context) (Operation, error) {
	return call[Operation](ctx, c, "POST", "/v1/store/adopt", nil, nil)
}

// Doctor implements Operator.
func (c *Client) Doctor(ctx context.Context) ([]Finding, error) {
	return call[[]Finding](ctx, c, "GET", "/v1/doctor", nil, nil)
}
