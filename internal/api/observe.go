package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Observer is what monitoring asks of a master. Both questions are cheap enough to be asked every few seconds.
type Observer interface {
	// Figures says where everything stands, in numbers.
	Figures(ctx context.Context) (Figures, error)
	// Health says what of the platform works, and what does not.
	Health(ctx context.Context) Health
}

// Figures are the numbers of an installation at one instant.
type Figures struct {
	At          time.Time
	Started     time.Time // this process
	Servers     []ServerFigures
	Operations  []OperationFigures // unfinished ones
	Tickets     map[string]int     // open ones by the kind of their problem
	Invocations int                // machines that run for real
	Since       Counts             // since this process started
	Stores      []StoreFigures     // the installation's own first; one that cannot be measured is left out
	Nodes       []NodeFigures      // appliances and silos on other machines, by name
}

// ServerFigures is one server in numbers.
type ServerFigures struct {
	Name, Customer string
	Promised       dr.Objectives
	Created        time.Time
	LKG            time.Time  // the instant that last-known-good shows; zero: there is none
	Newest         time.Time  // the instant that the newest snapshot shows; zero: there is none
	Outcome        dr.Outcome // of its last boot test; "" none was held
}

// Age is how old the data would be that a disaster at that instant left: none of what a server without last-known-good
// ever had is recoverable, since it is protected.
func (s ServerFigures) Age(at time.Time) time.Duration {
	if s.LKG.IsZero() {
		return at.Sub(s.Created)
	}
	return at.Sub(s.LKG)
}

// Lag is by how much that is more than what was promised; 0 if it is not, or nothing was.
func (s ServerFigures) Lag(at time.Time) time.Duration {
	if s.Promised.RPO == 0 {
		return 0
	}
	return max(s.Age(at)-s.Promised.RPO, 0)
}

// OperationFigures counts the unfinished operations of one kind in one state.
type OperationFigures struct {
	Kind  string
	State OperationState
	N     int
}

// Counts are what happened.
type Counts struct {
	Verdicts    map[dr.Outcome]int64
	Snapshots   map[dr.SnapshotKind]SnapshotCounts
	Arrivals    map[dr.SnapshotKind]ArrivalCounts
	Promotions  int64
	Expired     int64
	Invocations int64
}

// SnapshotCounts is how many snapshots there were, and what they cost in bytes; see dr.CaptureStats.
type SnapshotCounts struct {
	N                                int64
	Read, Changed, Sent, New, Stored int64
}

// ArrivalCounts is how many snapshots came into the far store over the line.
type ArrivalCounts struct {
	N       int64
	Changed int64 // bytes of them that differed from the snapshot before
	Sent    int64 // bytes that crossed the line for them
}

// StoreFigures say how large a store is. At is when that was measured: not at each question.
type StoreFigures struct {
	Customer string // whose far store it is; "": the installation's own
	At       time.Time
	Bytes    int64 // of all blobs
	Free     int64 // bytes free where the store lies; -1 not known
}

// NodeFigures is one appliance or silo on another machine, as its master knows it.
type NodeFigures struct {
	Role, Name, Customer string
	Connected            bool
	Seen                 time.Time // when it was last heard of; zero: never
	Expires              time.Time // when its newest certificate ends; zero: it has none
	Revoked              bool
	Skew                 time.Duration // how far an appliance's clock is ahead of the master's
}

// Health is what of the platform works.
type Health struct {
	Alive  bool          `json:"alive"` // false: the process should be started anew
	Ready  bool          `json:"ready"` // false: something that protecting needs does not work
	At     time.Time     `json:"at"`
	Checks []HealthCheck `json:"checks"`
}

// HealthCheck is one part of the platform.
type HealthCheck struct {
	Name   string        `json:"name"` // scheduler, engine, catalog, store, silo, nodes
	OK     bool          `json:"ok"`
	Detail string        `json:"detail"`
	Took   time.Duration `json:"took"`
}

// Where an Observer is offered.
const (
	MetricsPath = "/metrics" // in the form of Prometheus
	AlivePath   = "/healthz" // Health; status 503 if it is not alive
	ReadyPath   = "/readyz"  // Health; status 503 if it is not ready
)

// Metrics writes the figures in the form of Prometheus.
func (c *Client) Metrics(ctx context.Context, w io.Writer) error {
	resp, err := c.send(ctx, "GET", MetricsPath, nil, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, io.LimitReader(resp.Body, maxAnswer)); err != nil {
		return fmt.Errorf("read metrics: %w", err)
	}
	return nil
}

// Health asks what works. Something that does not is no error.
func (c *Client) Health(ctx context.Context) (Health, error) {
	var h Health
	resp, err := c.ask(ctx, "GET", ReadyPath, nil, nil)
	if err != nil {
		return h, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusServiceUnavailable {
		return h, fmt.Errorf("ask for health: the master answered %s", resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&h); err != nil {
		return h, fmt.Errorf("read health: %w", err)
	}
	return h, nil
}
