package dr

import "time"

// Taken says when the last snapshots of a server were taken, zero for never: the last in the order in which they were kept,
// whatever the clock said.
type Taken struct {
	Image, Data time.Time
	Last        time.Time // of either
}

// TakenOf reads it from a server's snapshots, given in the order in which they were kept.
func TakenOf(snapshots []Snapshot) (t Taken) {
	for _, s := range snapshots {
		if s.IsData() {
			t.Data = s.Taken
		} else {
			t.Image = s.Taken
		}
		t.Last = s.Taken
	}
	return t
}

// Dues says when the next snapshots of a server are to be taken; zero for what its tier does not have.
type Dues struct {
	Image, Data time.Time
}

// Dues says when the next snapshots are to be taken, after the last ones.
func (s Server) Dues(t Taken, now time.Time) (d Dues) {
	if s.HasImage() {
		d.Image = s.Schedule.Due(t.Image, now)
	}
	if s.HasData() {
		d.Data = s.Data.Schedule().Due(t.Data, now)
	}
	return d
}

// Next is the earlier of the two.
func (d Dues) Next() time.Time {
	if d.Image.IsZero() || !d.Data.IsZero() && d.Data.Before(d.Image) {
		return d.Data
	}
	return d.Image
}

// Waiting after failed captures: doubled from the first to the second, never longer than the schedule itself.
const (
	firstRetry = 5 * time.Minute
	lastRetry  = 2 * time.Hour
)

// Attempt is the last scheduled capture of a server, and how many up to it kept nothing.
type Attempt struct {
	At       time.Time `json:"at"`
	Failures int       `json:"failures"`
}

// Begin notes an attempt that begins now. last is when the server's last snapshot was taken.
func (a Attempt) Begin(last, now time.Time) Attempt {
	if !last.IsZero() && !last.Before(a.At) {
		a.Failures = 0 // the last attempt kept something
	}
	return Attempt{At: now, Failures: a.Failures + 1}
}

// Again says when the next attempt may be made at the earliest. An attempt that lies in the future was made before the
// clock was stepped back, and delays nothing.
func (a Attempt) Again(s Server, now time.Time) time.Time {
	if a.Failures == 0 || a.At.After(now) {
		return time.Time{}
	}
	every := s.Schedule.Every
	if s.HasData() {
		every = min(every, s.Data.Schedule().Every)
	}
	return a.At.Add(min(firstRetry<<min(a.Failures-1, 10), lastRetry, every))
}
