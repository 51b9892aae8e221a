package dr

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Metered is what one customer had of the platform in one month: what is charged for. It follows from what the catalog recorded
// anyway, so that it can be told again for any month.
type Metered struct {
	Month       string   `json:"month"`              // 2026-11, in UTC
	Customer    string   `json:"customer,omitempty"` // "": the installation's own
	Servers     int      `json:"servers"`            // of which anything was kept at the end of the month
	Protected   int64    `json:"protected_bytes"`    // of those: disks of the newest image and content of the newest data
	Stored      int64    `json:"stored_bytes"`       // by which the snapshots kept at the end made the store grow
	Added       int64    `json:"added_bytes"`        // by which the month's snapshots made the store grow
	Sent        int64    `json:"sent_bytes"`         // over the wire from the servers in the month
	Replicated  int64    `json:"replicated_bytes"`   // over the line from appliances into the far store, of snapshots that arrived in the month
	Snapshots   int      `json:"snapshots"`          // taken in the month
	Tests       Capacity `json:"tests"`
	Invocations Capacity `json:"invocations"`
}

// Capacity is what rescue machines had of silos, for as long as they had it.
type Capacity struct {
	Machines int   `json:"machines"`
	Seconds  int64 `json:"seconds"`
	Memory   int64 `json:"memory_mib_seconds"`
	CPUs     int64 `json:"cpu_seconds"`
}

func (c *Capacity) add(hw Hardware, d time.Duration) {
	seconds := int64(d.Round(time.Second) / time.Second)
	c.Machines++
	c.Seconds += seconds
	c.Memory += seconds * int64(hw.Memory)
	c.CPUs += seconds * int64(hw.CPUs)
}

// Meter adds up one month. Everything that was recorded before its end is told to it, in any order but servers first.
type Meter struct {
	month    string
	from, to time.Time // to is no later than the instant of asking: what still runs is metered up to there
	customer map[string]string
	sums     map[string]*Metered
	newest   map[newestKey]*newestSize
}

type newestKey struct {
	server string
	data   bool
}

type newestSize struct {
	taken time.Time
	size  int64
}

// NewMeter begins a month, given as 2026-11, as it stands now. A month that has not begun is an error.
func NewMeter(month string, now time.Time) (*Meter, error) {
	from, err := time.Parse("2006-01", month)
	if err != nil {
		return nil, fmt.Errorf("read month %q: write it as 2026-11", month)
	}
	if from.After(now) {
		return nil, fmt.Errorf("meter month %s: it has not begun", month)
	}
	to := from.AddDate(0, 1, 0)
	if now.Before(to) {
		to = now
	}
	return &Meter{month: month, from: from, to: to, customer: map[string]string{}, sums: map[string]*Metered{},
		newest: map[newestKey]*newestSize{}}, nil
}

// Span is the time that is metered, the end left out.
func (m *Meter) Span() (from, to time.Time) { return m.from, m.to }

func (m *Meter) in(t time.Time) bool { return !t.Before(m.from) && t.Before(m.to) }

func (m *Meter) sum(server string) *Metered {
	customer := m.customer[server]
	s := m.sums[customer]
	if s == nil {
		s = &Metered{Month: m.month, Customer: customer}
		m.sums[customer] = s
	}
	return s
}

// Server tells whose a server is, by the definition that it has now or had last.
func (m *Meter) Server(s Server) { m.customer[s.ID] = s.Customer }

// Snapshot tells of a snapshot; kept says whether it was still kept at the end.
func (m *Meter) Snapshot(s Snapshot, kept bool) {
	if !s.Taken.Before(m.to) {
		return
	}
	if m.in(s.Taken) {
		sum := m.sum(s.ServerID)
		sum.Snapshots++
		sum.Added += s.Stats.Stored
		sum.Sent += s.Stats.Sent
	}
	if !kept {
		return
	}
	m.sum(s.ServerID).Stored += s.Stats.Stored
	key := newestKey{s.ServerID, s.IsData()}
	if n := m.newest[key]; n == nil || s.Taken.After(n.taken) {
		m.newest[key] = &newestSize{s.Taken, s.Size()}
	}
}

// Arrival tells that a snapshot of a server came into the far store, and how many bytes crossed the line for it. It counts in the
// month in which it arrived.
func (m *Meter) Arrival(serverID string, at time.Time, sent int64) {
	if m.in(at) {
		m.sum(serverID).Replicated += sent
	}
}

// Test tells of a boot test. It counts in the month in which it began. One that started no machine counts for nothing.
func (m *Meter) Test(serverID string, v Verdict, hw Hardware) {
	var d time.Duration
	for _, p := range v.Phases {
		d += p.Duration
	}
	if d > 0 && m.in(v.Started) {
		m.sum(serverID).Tests.add(hw, d)
	}
}

// Invocation tells of an invocation. It counts from when it was asked for until it ended, as far as that is in the month.
func (m *Meter) Invocation(i Invocation, hw Hardware) {
	from, to := i.Requested, m.to
	if i.Ended != nil && i.Ended.Before(to) {
		to = *i.Ended
	}
	if from.Before(m.from) {
		from = m.from
	}
	if to.After(from) {
		m.sum(i.ServerID).Invocations.add(hw, to.Sub(from))
	}
}

// Result gives each customer's sums, by name.
func (m *Meter) Result() []Metered {
	counted := map[string]bool{}
	for key, n := range m.newest {
		sum := m.sum(key.server)
		sum.Protected += n.size
		if !counted[key.server] {
			counted[key.server] = true
			sum.Servers++
		}
	}
	out := make([]Metered, 0, len(m.sums))
	for _, s := range m.sums {
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b Metered) int { return cmp.Compare(a.Customer, b.Customer) })
	return out
}
