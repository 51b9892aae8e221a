package dr

import "time"

// Taken says when the newest snapshots of a server were taken, zero for never. The newest is the one that was recorded
// last and has not expired, also where a clock that was stepped back says otherwise.
type Taken struct {
	Image, Data time.Time // of each kind
	Last        time.Time // of either
}

// Latest is the latest instant of any kind.
func (t Taken) Latest() time.Time {
	if t.Data.After(t.Image) {
		return t.Data
	}
	return t.Image
}

// Dues says when the next snapshots of a server are to be taken; zero for what its tier does not have.
type Dues struct {
	Image, Data time.Time
}

// Due says when the next snapshots of each kind are to be taken, given the newest ones.
func (s Server) Due(t Taken, now time.Time) (d Dues) {
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
