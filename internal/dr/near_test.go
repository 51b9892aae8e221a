package dr

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// drawNear makes the near store of some servers: images and data, some replicated, kept under a clock that may be stepped.
func drawNear(t *rapid.T, now time.Time) (near []Near) {
	at := now.Add(-time.Duration(rapid.IntRange(0, 400*24).Draw(t, "hours of history")) * time.Hour)
	images := map[string]string{}
	for i := range rapid.IntRange(0, 40).Draw(t, "snapshots") {
		server := fmt.Sprintf("srv-%d", rapid.IntRange(1, 3).Draw(t, "server"))
		at = at.Add(time.Duration(rapid.IntRange(-30, 60).Draw(t, "hours since the last")) * time.Hour)
		s := Snapshot{ID: fmt.Sprintf("snap-%d", i), ServerID: server, Taken: at, Stats: CaptureStats{Stored: int64(rapid.IntRange(0, 1000).Draw(t, "stored"))}}
		if images[server] != "" && rapid.Bool().Draw(t, "data") {
			s.Kind, s.Image = SnapshotData, images[server]
		} else {
			s.Kind, images[server] = SnapshotImage, s.ID
		}
		near = append(near, Near{Snapshot: s, Seq: int64(i + 1), Replicated: rapid.Bool().Draw(t, "replicated")})
	}
	return near
}

func TestThinningNeverTakesWhatMustStay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
		near := drawNear(t, now)
		stays := map[string]bool{}
		for _, n := range near {
			if rapid.IntRange(0, 9).Draw(t, "stays") == 0 {
				stays[n.Snapshot.ID] = true
			}
		}
		rule := Thinning{Need: int64(rapid.IntRange(0, 20_000).Draw(t, "need")), Floor: rapid.IntRange(0, 4).Draw(t, "floor"), Stays: stays, Now: now}
		drop := Thin(near, rule)
		gone := map[string]bool{}
		var freed int64
		for i, id := range drop {
			if gone[id] {
				t.Fatalf("%s goes twice", id)
			}
			gone[id] = true
			at := slices.IndexFunc(near, func(n Near) bool { return n.Snapshot.ID == id })
			if freed >= rule.Need {
				t.Fatalf("%s goes although %d of %d bytes are free", id, freed, rule.Need)
			}
			freed += max(near[at].Snapshot.Stats.Stored, 1)
			for _, n := range near { // data before its image, in the order given
				if n.Snapshot.Image == id && n.Snapshot.IsData() && !slices.Contains(drop[:i], n.Snapshot.ID) {
					t.Fatalf("image %s goes before its data %s", id, n.Snapshot.ID)
				}
			}
		}
		left := map[series]int{}
		all := map[series]int{}
		for _, n := range near {
			all[n.series()]++
			if !gone[n.Snapshot.ID] {
				left[n.series()]++
				continue
			}
			if stays[n.Snapshot.ID] {
				t.Fatalf("%s goes and had to stay", n.Snapshot.ID)
			}
			newer := slices.ContainsFunc(near, func(o Near) bool {
				return o.series() == n.series() && o.Seq > n.Seq && o.Replicated && !gone[o.Snapshot.ID]
			})
			if !n.Replicated && !newer {
				t.Fatalf("%s goes, and neither it nor a newer one that stays was replicated", n.Snapshot.ID)
			}
		}
		for key, n := range all {
			if left[key] < min(n, max(rule.Floor, 1)) {
				t.Fatalf("%d of %v stay, the floor is %d", left[key], key, rule.Floor)
			}
		}
	})
}

func TestTheRecentPastStaysDenserThanTheFar(t *testing.T) {
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	var near []Near
	for i := range 365 {
		near = append(near, Near{Seq: int64(i), Replicated: true, Snapshot: Snapshot{ID: fmt.Sprint("snap-", i), ServerID: "srv-1",
			Taken: now.AddDate(0, 0, i-365), Stats: CaptureStats{Stored: 1}}})
	}
	gone := map[string]bool{}
	for _, id := range Thin(near, Thinning{Need: 335, Floor: 3, Now: now}) {
		gone[id] = true
	}
	var recent, far int
	for i, n := range near {
		if !gone[n.Snapshot.ID] {
			if i >= 365-30 {
				recent++
			} else {
				far++
			}
		}
	}
	if len(gone) != 335 || recent < 10 || far < 5 || gone["snap-0"] {
		t.Errorf("of 30 that stay %d are of the last month and %d older; the oldest is gone: %t", recent, far, gone["snap-0"])
	}
}

func TestWhatIsOwedStaysHoweverFullTheDisk(t *testing.T) {
	now := time.Now()
	var near []Near
	for i := range 5 {
		near = append(near, Near{Seq: int64(i), Replicated: i < 2, Snapshot: Snapshot{ID: fmt.Sprint("snap-", i), ServerID: "srv-1", Taken: now}})
	}
	if got := Thin(near, Thinning{Need: 1 << 40, Floor: 1, Now: now}); !slices.Equal(got, []string{"snap-1", "snap-0"}) && !slices.Equal(got, []string{"snap-0", "snap-1"}) {
		t.Errorf("it lets %v go; only the two that were replicated may", got)
	}
}

func TestEverythingIsSentInTheEndAndTheNewestFirst(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
		near := drawNear(t, now)
		servers := map[string]Server{"srv-1": {Schedule: Schedule{Every: time.Hour}}, "srv-2": {Objectives: Objectives{RPO: 4 * time.Hour}}}
		for range len(near) + 1 {
			id := NextToSend(near, servers, nil, now)
			if id == "" {
				break
			}
			at := slices.IndexFunc(near, func(n Near) bool { return n.Snapshot.ID == id })
			sent := near[at]
			if sent.Replicated {
				t.Fatalf("%s is sent twice", id)
			}
			for _, n := range near {
				if n.series() == sent.series() && n.Seq > sent.Seq && !n.Replicated {
					needed := slices.ContainsFunc(near, func(d Near) bool { return d.Snapshot.Image == id && d.Snapshot.IsData() && !d.Replicated })
					if !needed {
						t.Fatalf("%s is sent before the newer %s", id, n.Snapshot.ID)
					}
				}
			}
			if sent.Snapshot.IsData() {
				image := slices.IndexFunc(near, func(n Near) bool { return n.Snapshot.ID == sent.Snapshot.Image })
				if image >= 0 && !near[image].Replicated {
					t.Fatalf("data %s is sent before its image", id)
				}
			}
			near[at].Replicated = true
		}
		for _, n := range near {
			if !n.Replicated {
				t.Fatalf("%s is never sent", n.Snapshot.ID)
			}
		}
	})
}

func TestAServerWithoutAFarCopyComesFirst(t *testing.T) {
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	one := func(server string, seq int64, ago time.Duration, replicated bool) Near {
		return Near{Seq: seq, Replicated: replicated, Snapshot: Snapshot{ID: fmt.Sprintf("snap-%d", seq), ServerID: server, Taken: now.Add(-ago)}}
	}
	near := []Near{one("srv-calm", 1, 30*time.Hour, true), one("srv-risk", 2, 30*time.Hour, true), one("srv-new", 3, 2*time.Hour, false),
		one("srv-calm", 4, time.Hour, false), one("srv-risk", 5, time.Hour, false)}
	servers := map[string]Server{"srv-calm": {Schedule: Schedule{Every: 24 * time.Hour}}, "srv-risk": {Objectives: Objectives{RPO: 24 * time.Hour}}, "srv-new": {}}
	var order []string
	for id := NextToSend(near, servers, nil, now); id != ""; id = NextToSend(near, servers, nil, now) {
		order = append(order, id)
		near[slices.IndexFunc(near, func(n Near) bool { return n.Snapshot.ID == id })].Replicated = true
	}
	if !slices.Equal(order, []string{"snap-3", "snap-5", "snap-4"}) {
		t.Errorf("sent in the order %v", order)
	}
	if id := NextToSend([]Near{near[2]}, servers, nil, now); id != "" {
		t.Errorf("%s is sent again", id)
	}
}

func TestACaptureThatDidNotArriveIsSeen(t *testing.T) {
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	s := Server{Name: "shop", Created: now.Add(-30 * time.Hour), Schedule: Schedule{Every: 24 * time.Hour}}
	for _, c := range []struct {
		rpo  time.Duration
		far  Taken
		late bool
	}{
		{0, Taken{}, false}, // it may take two days
		{24 * time.Hour, Taken{}, true},
		{0, Taken{Image: now.Add(-47 * time.Hour)}, false},
		{0, Taken{Image: now.Add(-49 * time.Hour)}, true},
		{time.Hour, Taken{Image: now.Add(-2 * time.Hour)}, true},
		{0, Taken{Image: now.Add(time.Minute)}, false},
		{0, Taken{Image: now.Add(24 * time.Hour)}, true}, // a clock that is ahead does not silence the alarm
	} {
		s.Objectives.RPO = c.rpo
		if why := s.Late(c.far, now); (why != "") != c.late {
			t.Errorf("promised %s, arrived %v: late says %q", c.rpo, c.far.Image, why)
		}
	}
}
