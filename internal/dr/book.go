package dr

import (
	"slices"
	"time"
)

// Month is a month of a year, in UTC, counted from the year 0.
type Month int64

// MonthOf gives the month of an instant.
func MonthOf(t time.Time) Month {
	t = t.UTC()
	return Month(t.Year())*12 + Month(t.Month()) - 1
}

// Book is what one server had in one month, of what follows from its snapshots and tests.
type Book struct {
	Month       Month
	Snapshots   int64    // taken in it
	Added, Sent int64    // bytes, of those
	Stored      int64    // bytes by which what is kept of the server grew or shrank in it
	Image, Data Newest   // of each kind that was kept at its end
	Replicated  int64    // bytes over the line for snapshots that arrived in it
	Tests       Capacity // that began in it
}

// Newest is the newest snapshot of a kind. The zero value is none.
type Newest struct {
	Taken time.Time
	Size  int64
}

// Books are the months of one server, in order. A month that is missing is like the one before, with nothing added. A month that
// is over changes only by what comes late: a snapshot that was taken in it.
type Books []Book

// page opens a month: if it is missing it begins as the one before it ended.
func (b *Books) page(m Month) *Book {
	i, found := slices.BinarySearchFunc(*b, m, func(p Book, m Month) int { return int(p.Month - m) })
	if !found {
		page := Book{Month: m}
		if i > 0 {
			page.Image, page.Data = (*b)[i-1].Image, (*b)[i-1].Data
		}
		*b = slices.Insert(*b, i, page)
	}
	return &(*b)[i]
}

func (p *Book) newest(s Snapshot) *Newest {
	if s.IsData() {
		return &p.Data
	}
	return &p.Image
}

// Snapshot adds a snapshot to the month in which it was taken. It may be the newest at the end of that one and of later ones.
func (b *Books) Snapshot(s Snapshot) {
	month := MonthOf(s.Taken)
	p := b.page(month)
	p.Snapshots++
	p.Added += s.Stats.Stored
	p.Sent += s.Stats.Sent
	p.Stored += s.Stats.Stored
	for i := range *b {
		if p := &(*b)[i]; p.Month >= month {
			if n := p.newest(s); s.Taken.After(n.Taken) {
				*n = Newest{s.Taken, s.Size()}
			}
		}
	}
}

// Expired takes a snapshot off what is kept, in the month of that instant or, if the clock was stepped back, the last that has
// begun. left gives the newest of its kind that is kept still.
func (b *Books) Expired(s Snapshot, at time.Time, left func() (Newest, error)) (err error) {
	month := max(MonthOf(at), MonthOf(s.Taken))
	if len(*b) > 0 {
		month = max(month, (*b)[len(*b)-1].Month)
	}
	p := b.page(month)
	p.Stored -= s.Stats.Stored
	if n := p.newest(s); !n.Taken.After(s.Taken) {
		*n, err = left()
	}
	return err
}

// Arrival adds to the month of that instant what crossed the line for a snapshot.
func (b *Books) Arrival(at time.Time, sent int64) { b.page(MonthOf(at)).Replicated += sent }

// Test adds a boot test to the month in which it began. One that started no machine counts for nothing.
func (b *Books) Test(v Verdict, hw Hardware) {
	var d time.Duration
	for _, p := range v.Phases {
		d += p.Duration
	}
	if d > 0 {
		b.page(MonthOf(v.Started)).Tests.add(hw, d)
	}
}
