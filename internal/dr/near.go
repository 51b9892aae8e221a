package dr

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// Near is a snapshot in the near store of an appliance.
type Near struct {
	Snapshot   Snapshot
	Seq        int64 // grows in the order in which snapshots are kept, whatever the clock says
	Replicated bool  // it is in the far store
}

// series is what of a server is compared in time: its images, or its data.
type series struct {
	server string
	data   bool
}

func (n Near) series() series { return series{n.Snapshot.ServerID, n.Snapshot.IsData()} }

// bySeq gives the snapshots of each series in the order in which they were kept.
func bySeq(near []Near) map[series][]Near {
	out := map[series][]Near{}
	sorted := slices.Clone(near)
	slices.SortFunc(sorted, func(a, b Near) int { return cmp.Compare(a.Seq, b.Seq) })
	for _, n := range sorted {
		out[n.series()] = append(out[n.series()], n)
	}
	return out
}

// Thinning says what a near store has to give up.
type Thinning struct {
	Need  int64           // bytes to make free, as snapshots say what they added to the store
	Floor int             // of each server's images, and of its data, so many of the newest stay; at least 1
	Stays map[string]bool // snapshots that stay whatever happens: last-known-good, what is read, evidence
	Now   time.Time
}

// sparse is the largest gap that thinning makes inside of a history, as a share of how long ago it is: once the history is as
// thin as that, its far end goes.
const sparse = 0.5

// Thin chooses the snapshots that a near store lets go, in the order in which they may go, until Need is met or nothing more may
// go. The far past is thinned first: always the snapshot goes that leaves the smallest gap for its age, so that the recent past
// stays dense and the far past reaches as far back as there is room. What the far store does not have stays, unless
// it has a newer one of the same kind of the same server; and such a one goes after everything that was replicated. An image goes after all
// data that goes onto it.
func Thin(near []Near, t Thinning) (drop []string) {
	histories := bySeq(near)
	onto := map[string]int{} // data by its image
	for _, n := range near {
		if n.Snapshot.IsData() {
			onto[n.Snapshot.Image]++
		}
	}
	t.Floor = max(t.Floor, 1)
	for _, replicated := range []bool{true, false} {
		for t.Need > 0 {
			key, i, ok := thinnest(histories, onto, t, replicated)
			if !ok {
				break
			}
			n := histories[key][i]
			histories[key] = slices.Delete(histories[key], i, i+1)
			if n.Snapshot.IsData() {
				onto[n.Snapshot.Image]--
			}
			drop = append(drop, n.Snapshot.ID)
			t.Need -= max(n.Snapshot.Stats.Stored, 1)
		}
	}
	return drop
}

// thinnest finds the snapshot that is missed least.
func thinnest(histories map[series][]Near, onto map[string]int, t Thinning, replicated bool) (best series, at int, found bool) {
	var least float64
	for _, key := range slices.SortedFunc(maps.Keys(histories), compareSeries) {
		list := histories[key]
		sent := lastReplicated(list)
		for i, n := range list[:max(len(list)-t.Floor, 0)] {
			id := n.Snapshot.ID
			if t.Stays[id] || onto[id] > 0 || n.Replicated != replicated || !n.Replicated && i > sent {
				continue
			}
			score := gap(list, i, t.Now)
			if i == 0 { // the far end: it goes when the rest is sparse; of several the one that reaches furthest back
				score = sparse + 1/(1+t.Now.Sub(n.Snapshot.Taken).Hours())
			}
			if !found || score < least {
				best, at, least, found = key, i, score, true
			}
		}
	}
	return best, at, found
}

// gap is what would be missing around a snapshot, as a share of its age.
func gap(list []Near, i int, now time.Time) float64 {
	if i == 0 || i+1 >= len(list) {
		return 0
	}
	age := max(now.Sub(list[i].Snapshot.Taken), time.Minute)
	return float64(max(list[i+1].Snapshot.Taken.Sub(list[i-1].Snapshot.Taken), 0)) / float64(age)
}

// lastReplicated gives the place of the newest replicated one, -1 for none.
func lastReplicated(list []Near) int {
	for i, n := range slices.Backward(list) {
		if n.Replicated {
			return i
		}
	}
	return -1
}

func compareSeries(a, b series) int {
	if c := cmp.Compare(a.server, b.server); c != 0 {
		return c
	}
	switch {
	case a.data == b.data:
		return 0
	case b.data:
		return -1
	}
	return 1
}

// NextToSend chooses the snapshot that is replicated next; "" if there is none. Of each server the newest comes first, because it
// is what would be missed most; among servers, one of which the far store has nothing, then the one whose promise is nearest
// to being broken. When every server's newest is there, the older ones follow, newest first. An image goes before the data that goes onto it.
// What is in not is passed over.
func NextToSend(near []Near, servers map[string]Server, not map[string]bool, now time.Time) string {
	type candidate struct {
		id      string
		older   bool    // the far store has a newer one
		urgency float64 // age of what the far store has, as a share of what was promised
		seq     int64
	}
	var all []candidate
	images := map[string]Near{}
	for _, n := range near {
		images[n.Snapshot.ID] = n
	}
	for key, list := range bySeq(near) {
		sent := lastReplicated(list)
		for i, n := range slices.Backward(list) {
			if n.Replicated {
				continue
			}
			id := n.Snapshot.ID
			if image, ok := images[n.Snapshot.Image]; ok && key.data && !image.Replicated {
				id = image.Snapshot.ID
			}
			if not[id] {
				continue
			}
			c := candidate{id: id, older: i < sent || i < len(list)-1 && sent < 0 && !not[list[len(list)-1].Snapshot.ID], seq: n.Seq, urgency: 1e9}
			if sent >= 0 {
				c.urgency = float64(now.Sub(list[sent].Snapshot.Taken)) / float64(servers[key.server].promised(key.data))
			}
			all = append(all, c)
		}
	}
	if len(all) == 0 {
		return ""
	}
	best := slices.MinFunc(all, func(a, b candidate) int {
		switch {
		case a.older != b.older && a.older:
			return 1
		case a.older != b.older:
			return -1
		case !a.older && a.urgency != b.urgency:
			return cmp.Compare(b.urgency, a.urgency)
		}
		return cmp.Compare(b.seq, a.seq)
	})
	return best.id
}

// promised is how old the newest snapshot in the far store may become: the recovery point that was promised or, without one,
// twice the time between captures. Where there is data, the promise is about that, and not about the image below it.
func (s Server) promised(data bool) time.Duration {
	every := s.Schedule.Every
	if data {
		every = s.Data.Schedule().Every
	}
	if every <= 0 {
		every = DefaultEvery
	}
	if s.Objectives.RPO > 0 && (data || !s.HasData()) {
		return s.Objectives.RPO
	}
	return 2 * every
}

// ClockSlack is how far two clocks may differ before it is said.
const ClockSlack = 5 * time.Minute

// ClockOff says for people how wrong a clock is that is so far ahead of the one that counts: "40m0s ahead"; "" if it hardly is.
func ClockOff(ahead time.Duration) string {
	switch by := ahead.Abs().Round(time.Minute).String(); {
	case ahead.Abs() <= ClockSlack:
		return ""
	case ahead < 0:
		return by + " behind"
	default:
		return by + " ahead"
	}
}

// Late says why a snapshot that should have arrived from an appliance is missing, "" if none is. far is what has arrived, began
// when the wait for it began at the latest: when the server was added, for one of which nothing has.
func (s Server) Late(far Taken, now time.Time) string {
	if s.HasImage() {
		if why := s.late(far.Image, false, now); why != "" {
			return "the newest image " + why
		}
	}
	if s.HasData() {
		if why := s.late(far.Data, true, now); why != "" {
			return "the newest data " + why
		}
	}
	return ""
}

func (s Server) late(last time.Time, data bool, now time.Time) string {
	limit := s.promised(data)
	since := last
	if last.IsZero() {
		since = s.Created
	}
	switch {
	case since.After(now.Add(ClockSlack)):
		return "says that it was taken at " + since.UTC().Format(time.RFC3339) + ", which is still to come: set the clock of the appliance"
	case now.Sub(since) <= limit:
		return ""
	case last.IsZero():
		return "has never arrived, " + now.Sub(since).Round(time.Minute).String() + " after the server was added"
	}
	return "that has arrived is " + now.Sub(since).Round(time.Minute).String() + " old; promised are " + limit.String()
}
