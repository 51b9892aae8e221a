package dr

import (
	"slices"
	"sort"
	"time"
)

// Ruling is what a person said of a snapshot that was held.
type Ruling struct {
	SnapshotID string    `json:"snapshot_id"`
	Accept     bool      `json:"accept"` // false: refused
	By         string    `json:"by"`
	Reason     string    `json:"reason,omitempty"`
	At         time.Time `json:"at"`
}

// MaxReason is the longest reason of a ruling, in bytes.
const MaxReason = 1000

// ProblemTampering is the ticket of a server of which a snapshot is held.
const ProblemTampering Problem = "tampering-suspected"

// Suspicious says whether something happened to a server just before a snapshot that a person has to look at.
func (s Snapshot) Suspicious() bool {
	last := s.Signs.last()
	return last != nil && len(last.Found) > 0
}

// Evidence gives the signs for which a snapshot is suspicious or, as one that builds on such a snapshot, still is.
func (s Snapshot) Evidence() []Sign {
	if s.Suspicious() {
		return s.Signs.Last.Found
	}
	if s.Signs != nil && s.Signs.Trusted != nil {
		return s.Signs.Trusted.Found
	}
	return nil
}

// Holds says which of a server's snapshots may not become last-known-good by themselves, and for the sake of which
// snapshot each: a suspicious one for its own, and every later one, of disks or of data, for its, because what it shows builds
// on what happened then. That ends with a snapshot of the same kind that
//
//   - a person accepted: the state it shows is right, and those after it are held only for what happens after it; or
//   - shows the damage undone: compared with one from before the suspicion it shows none of the kinds of sign that are
//     suspected, measured by the same means.
//
// Accepted data ends a suspicion of disks as well: it is tested and run with them.
//
// The records are in the order in which they were kept, oldest first: a clock that was stepped back puts nothing before a
// suspicion. A refused snapshot is held for ever. Whether an earlier one still exists changes nothing: expired ones count.
func Holds(records []Record) map[string]string {
	held := map[string]string{}
	var open suspicions
	before := map[string]bool{} // the snapshots that were not held
	for _, r := range records {
		s := r.Snapshot
		accepted, refused := r.Ruling != nil && r.Ruling.Accept, r.Ruling != nil && !r.Ruling.Accept
		mine := open.of(s.IsData())
		switch {
		case accepted:
			open.end(s.IsData())
			if s.IsData() {
				open.end(false)
			}
		case mine != nil && !refused && undone(s, before, mine.signs):
			open.end(s.IsData()) // even if undoing it changed much since yesterday
		case s.Suspicious():
			if mine == nil {
				open = append(open, suspicion{first: s.ID, data: s.IsData()})
				mine = &open[len(open)-1]
			}
			mine.signs = append(mine.signs, s.Signs.Last.Found...)
			held[s.ID] = s.ID
			continue
		case refused:
			held[s.ID] = s.ID
			continue
		}
		if len(open) > 0 && !accepted {
			held[s.ID] = open[0].first
			continue
		}
		before[s.ID] = true
	}
	return held
}

// suspicion is what nobody decided about yet: of disks, or of data.
type suspicion struct {
	first string // snapshot
	data  bool
	signs []Sign // of all since
}

// suspicions are at most one of each, in the order in which they began.
type suspicions []suspicion

func (o suspicions) of(data bool) *suspicion {
	for i := range o {
		if o[i].data == data {
			return &o[i]
		}
	}
	return nil
}

func (o *suspicions) end(data bool) {
	*o = slices.DeleteFunc(*o, func(s suspicion) bool { return s.data == data })
}

// undone says whether a snapshot, compared with one from before the suspicion, shows no more of it.
func undone(s Snapshot, before map[string]bool, suspected []Sign) bool {
	if s.Signs == nil || s.Signs.Trusted == nil || !before[s.Signs.Trusted.Against] || len(s.Signs.Trusted.Found) > 0 {
		return false
	}
	for _, sign := range suspected {
		if sign.Kind == SignBlocks && s.Signs.Trusted.Blocks == nil || sign.Kind != SignBlocks && s.Signs.Trusted.Names == nil {
			return false // it was not looked at
		}
	}
	return true
}

// OfKind gives the records of snapshots of data, or of disks: only those of one kind are compared with one another.
func OfKind(records []Record, data bool) (out []Record) {
	for _, r := range records {
		if r.Snapshot.IsData() == data {
			out = append(out, r)
		}
	}
	return out
}

// Trusted gives the newest snapshot that is not held, "" for none: what the next one is compared with besides the one before it.
// records are of one kind and carry HeldBy.
func Trusted(records []Record) string {
	for _, r := range slices.Backward(oldestFirst(records)) {
		if r.HeldBy == "" && r.State != Expired {
			return r.Snapshot.ID
		}
	}
	return ""
}

// oldestFirst sorts records by the instant that their disks show.
func oldestFirst(records []Record) []Record {
	sorted := slices.Clone(records)
	sort.SliceStable(sorted, func(i, j int) bool {
		a, b := sorted[i].Snapshot, sorted[j].Snapshot
		if !a.Taken.Equal(b.Taken) {
			return a.Taken.Before(b.Taken)
		}
		return a.ID < b.ID
	})
	return sorted
}

// spared lists what retention leaves while the newest snapshot is held: of disks and of data the last one that is not, with which
// later ones are compared, and every suspicious one since. records are live and oldest first.
func spared(records []Record) map[string]bool {
	out := map[string]bool{}
	if len(records) == 0 || records[len(records)-1].HeldBy == "" {
		return out
	}
	found := map[bool]bool{}
	for _, r := range slices.Backward(records) {
		if found[r.Snapshot.IsData()] {
			continue
		}
		if r.HeldBy == "" || r.HeldBy == r.Snapshot.ID {
			out[r.Snapshot.ID] = true
		}
		found[r.Snapshot.IsData()] = r.HeldBy == ""
	}
	return out
}
