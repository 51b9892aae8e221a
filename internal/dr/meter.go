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

func (c *Capacity) join(d Capacity) {
	c.Machines += d.Machines
	c.Seconds += d.Seconds
	c.Memory += d.Memory
	c.CPUs += d.CPUs
}

// Meter adds up one month. Everything that was recorded before its end is told to it, in any order but servers first.
type Meter struct {
	month    string
	from, to time.Time // to is no later than the instant of asking: what still runs is metered up to there
	customer map[string]string
	sums     map[string]*Metered
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
	return &Meter{month: month, from: from, to: to, customer: map[string]string{}, sums: map[string]*Metered{}}, nil
}

// Month is the month that is metered.
func (m *Meter) Month() Month { return MonthOf(m.from) }

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
func (m *Meter) Server(id, customer string) { m.customer[id] = customer }

// Book tells how the books of a server stood at the end: the last of them that is not of a later month, and the bytes by which what is
// kept of the server had grown in all of them up to there.
func (m *Meter) Book(server string, last Book, stored int64) {
	if last.Image.Taken.IsZero() && last.Data.Taken.IsZero() && stored == 0 && last.Month != m.Month() {
		return // nothing is left of it
	}
	sum := m.sum(server)
	sum.Stored += stored
	sum.Protected += last.Image.Size + last.Data.Size
	if !last.Image.Taken.IsZero() || !last.Data.Taken.IsZero() {
		sum.Servers++
	}
	if last.Month == m.Month() {
		sum.Snapshots += int(last.Snapshots)
		sum.Added += last.Added
		sum.Sent += last.Sent
		sum.Replicated += last.Replicated
		sum.Tests.join(last.Tests)
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
	out := make([]Metered, 0, len(m.sums))
	for _, s := range m.sums {
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b Metered) int { return cmp.Compare(a.Customer, b.Customer) })
	return out
}
