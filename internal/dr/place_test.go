package dr

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func host(name string, gib int, reserved ...string) Silo {
	return Silo{Name: name, State: SiloActive, Hypervisor: HypervisorKVM, Memory: gib << 10, Cores: 32, Space: 1 << 40, Reserved: reserved}
}

func piece(kind WorkKind, id, customer string, gib int) Work {
	return Work{ID: id, Kind: kind, Customer: customer, Memory: gib << 10, Cores: 2, Space: 1 << 30, Since: noon}
}

func on(silo string, w Work) Lease { return Lease{Work: w, Silo: silo, Granted: noon} }

// taken says which silo took what, in order.
func taken(placed []Placed) (out []string) {
	for _, p := range placed {
		out = append(out, p.Work+"@"+p.Silo)
	}
	return out
}

func TestWorkGoesWhereItShould(t *testing.T) {
	busy := host("a", 8)
	draining, lost, slow := host("c", 64), host("d", 64), host("b", 64)
	draining.State, lost.State, slow.Hypervisor = SiloDraining, SiloLost, HypervisorEmulation
	lan := host("b", 8)
	lan.Networks = []string{"lan7"}
	onLan := piece(WorkInvocation, "i", "", 4)
	onLan.Network = "lan7"
	near := piece(WorkTest, "t", "", 4)
	near.Near = "pre-1"
	again := piece(WorkTest, "t", "", 4)
	again.Avoid = []string{"a"}
	one := host("a", 64)
	one.Tests = 1
	for name, c := range map[string]struct {
		work   []Work
		silos  []Silo
		leases []Lease
		where  Where
		want   []string
	}{
		"where there is most room":                    {[]Work{piece(WorkTest, "t", "", 4)}, []Silo{host("a", 8), host("b", 16)}, []Lease{on("a", piece(WorkTest, "x", "", 2))}, nil, []string{"t@b"}},
		"nowhere else than to active silos":           {[]Work{piece(WorkTest, "t", "", 4)}, []Silo{busy, draining, lost}, nil, nil, []string{"t@a"}},
		"a test goes where its deltas are":            {[]Work{near}, []Silo{host("a", 64), host("b", 8)}, nil, Where{"pre-1": {"b"}}, []string{"t@b"}},
		"but does not wait for that":                  {[]Work{near}, []Silo{host("a", 64), host("b", 8)}, []Lease{on("b", piece(WorkTest, "x", "", 6))}, Where{"pre-1": {"b"}}, []string{"t@a"}},
		"KVM before emulation":                        {[]Work{piece(WorkPreRecovery, "p", "", 1)}, []Silo{slow, host("x", 2)}, nil, nil, []string{"p@x"}},
		"an invocation to the network it needs":       {[]Work{onLan}, []Silo{host("a", 64), lan}, nil, nil, []string{"i@b"}},
		"invocations first":                           {[]Work{piece(WorkTest, "t", "", 8), piece(WorkInvocation, "z", "", 8)}, []Silo{busy}, nil, nil, []string{"z@a"}},
		"its own silo before everybody's":             {[]Work{piece(WorkTest, "t", "bank", 4)}, []Silo{host("a", 64), host("b", 8, "bank")}, nil, nil, []string{"t@b"}},
		"everybody's when its own is full":            {[]Work{piece(WorkTest, "t", "bank", 4)}, []Silo{host("a", 64), host("b", 2, "bank")}, nil, nil, []string{"t@a"}},
		"never to another's, idle or not":             {[]Work{piece(WorkTest, "t", "shop", 4)}, []Silo{host("b", 64, "bank")}, nil, nil, nil},
		"invoked machines of a customer are spread":   {[]Work{piece(WorkInvocation, "i", "shop", 2)}, []Silo{host("a", 64), host("b", 8)}, []Lease{on("a", piece(WorkInvocation, "x", "shop", 2))}, nil, []string{"i@b"}},
		"not again where it just failed":              {[]Work{again}, []Silo{host("a", 64), host("b", 8)}, nil, nil, []string{"t@b"}},
		"again there if there is no other":            {[]Work{again}, []Silo{host("a", 64)}, nil, nil, []string{"t@a"}},
		"no more tests at once than a silo wants":     {[]Work{piece(WorkTest, "t", "", 1), piece(WorkTest, "u", "", 1)}, []Silo{one}, nil, nil, []string{"t@a"}},
		"what is leased is not placed again":          {[]Work{piece(WorkTest, "t", "", 1)}, []Silo{host("a", 64)}, []Lease{on("a", piece(WorkTest, "t", "", 1))}, nil, nil},
		"who has less under way is next":              {[]Work{piece(WorkTest, "t", "big", 4), piece(WorkTest, "u", "small", 4)}, []Silo{busy}, []Lease{on("a", piece(WorkTest, "x", "big", 4))}, nil, []string{"u@a"}},
		"a crisis costs its customer no night's turn": {[]Work{piece(WorkTest, "t", "big", 4), piece(WorkTest, "u", "small", 4)}, []Silo{busy}, []Lease{on("a", piece(WorkInvocation, "x", "big", 4))}, nil, []string{"t@a"}},
	} {
		placed, _ := Place(noon, c.work, c.silos, c.leases, c.where)
		if got := taken(placed); !slices.Equal(got, c.want) {
			t.Errorf("%s: placed %v, want %v", name, got, c.want)
		}
	}
}

func TestAnInvocationMakesTheYoungestTestsEnd(t *testing.T) {
	old, young := on("a", piece(WorkTest, "old", "", 4)), on("a", piece(WorkTest, "young", "", 4))
	young.Granted = noon.Add(time.Minute)
	placed, waiting := Place(noon, []Work{piece(WorkInvocation, "i", "", 4), piece(WorkTest, "t", "", 4)}, []Silo{host("a", 8)}, []Lease{old, young}, nil)
	if len(placed) != 0 || len(waiting) != 2 || !slices.Equal(waiting[0].Displace, []string{"young"}) || waiting[0].Never {
		t.Fatalf("%+v, %+v", placed, waiting)
	}
	// The room that is cleared is the invocation's.
	placed, _ = Place(noon, []Work{piece(WorkInvocation, "i", "", 4), piece(WorkTest, "t", "", 4)}, []Silo{host("a", 8)}, []Lease{old}, nil)
	if got := taken(placed); !slices.Equal(got, []string{"i@a"}) {
		t.Errorf("placed %v", got)
	}
	other := on("a", piece(WorkInvocation, "j", "", 6))
	if _, waiting = Place(noon, []Work{piece(WorkInvocation, "i", "", 4)}, []Silo{host("a", 8)}, []Lease{other}, nil); len(waiting[0].Displace) != 0 || waiting[0].Never {
		t.Errorf("an invocation displaces another: %+v", waiting)
	}
}

func TestWhatCannotEverBePlacedIsSaid(t *testing.T) {
	for want, c := range map[string]struct {
		w     Work
		silos []Silo
	}{
		"there is no silo": {piece(WorkTest, "t", "", 1), nil},
		"it needs 16384 MiB of memory, and the largest silo has 8192": {piece(WorkTest, "t", "", 16), []Silo{host("a", 8)}},
		"every silo is reserved for other customers":                  {piece(WorkTest, "t", "shop", 1), []Silo{host("a", 8, "bank")}},
	} {
		_, waiting := Place(noon, []Work{c.w}, c.silos, nil, nil)
		if len(waiting) != 1 || !waiting[0].Never || waiting[0].Why != want {
			t.Errorf("%+v, want %q", waiting, want)
		}
	}
	lost := host("a", 8)
	lost.State = SiloLost
	if _, waiting := Place(noon, []Work{piece(WorkTest, "t", "", 1)}, []Silo{lost}, nil, nil); waiting[0].Never {
		t.Errorf("one that is lost may come back: %+v", waiting)
	}
}

// farm draws silos with leases that fit, and work.
func farm(t *rapid.T) (silos []Silo, leases []Lease, work []Work, where Where) {
	customers := []string{"", "shop", "bank", "mill"}
	where = Where{}
	for i := range rapid.IntRange(1, 6).Draw(t, "silos") {
		s := host(fmt.Sprintf("silo%d", i), rapid.IntRange(1, 32).Draw(t, "gib"))
		s.State = rapid.SampledFrom([]SiloState{SiloActive, SiloActive, SiloActive, SiloDraining, SiloLost}).Draw(t, "state")
		s.Hypervisor = rapid.SampledFrom([]Hypervisor{HypervisorKVM, HypervisorEmulation}).Draw(t, "hypervisor")
		s.Cores, s.Tests = rapid.IntRange(1, 16).Draw(t, "cores"), rapid.IntRange(0, 3).Draw(t, "tests")
		s.Space = int64(rapid.IntRange(0, 20).Draw(t, "space")) << 30
		if rapid.IntRange(0, 3).Draw(t, "reserved") == 0 {
			s.Reserved = []string{rapid.SampledFrom(customers[1:]).Draw(t, "for")}
		}
		silos = append(silos, s)
	}
	draw := func(n int) Work {
		kind := rapid.SampledFrom([]WorkKind{WorkPreRecovery, WorkTest, WorkTest, WorkInvocation, WorkMove}).Draw(t, "kind")
		w := piece(kind, fmt.Sprintf("w%d", n), rapid.SampledFrom(customers).Draw(t, "customer"), rapid.IntRange(1, 20).Draw(t, "need"))
		w.Cores, w.Since = rapid.IntRange(1, 20).Draw(t, "cores"), noon.Add(-time.Duration(rapid.IntRange(0, 60).Draw(t, "waited"))*time.Minute)
		if kind == WorkMove {
			w.Not = rapid.SampledFrom(silos).Draw(t, "from").Name
		}
		if rapid.Bool().Draw(t, "near") {
			w.Near = fmt.Sprintf("pre-%d", n)
			where[w.Near] = []string{rapid.SampledFrom(silos).Draw(t, "holder").Name}
		}
		return w
	}
	for n := range rapid.IntRange(0, 20).Draw(t, "leases") {
		s := rapid.SampledFrom(silos).Draw(t, "silo")
		if w := draw(n); Fits(w, s, leases) == nil {
			leases = append(leases, Lease{Work: w, Silo: s.Name, Granted: noon.Add(-time.Duration(rapid.IntRange(0, 60).Draw(t, "ago")) * time.Minute)})
		}
	}
	for n := range rapid.IntRange(0, 30).Draw(t, "work") {
		work = append(work, draw(100+n))
	}
	return silos, leases, work, where
}

func TestWhateverTheStatePlacementKeepsItsPromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		silos, leases, work, where := farm(t)
		placed, waiting := Place(noon, work, silos, leases, where)
		if len(placed)+len(waiting) != len(work) {
			t.Fatalf("%d pieces became %d placed and %d waiting", len(work), len(placed), len(waiting))
		}
		byName, byID := map[string]Silo{}, map[string]Work{}
		for _, s := range silos {
			byName[s.Name] = s
		}
		for _, w := range work {
			byID[w.ID] = w
		}
		before := leases
		for _, p := range placed { // each fits beside those before it
			w, s := byID[p.Work], byName[p.Silo]
			if err := Fits(w, s, before); err != nil {
				t.Fatal(err)
			}
			if s.State != SiloActive || !s.Takes(w.Customer) || w.Not == s.Name {
				t.Fatalf("%s, which is %s and for %v, was given work of %q", s.Name, s.State, s.Reserved, w.Customer)
			}
			before = append(before[:len(before):len(before)], Lease{Work: w, Silo: s.Name})
		}
		memory := map[string]int{}
		for _, l := range before {
			memory[l.Silo] += l.Work.Memory
		}
		for name, used := range memory {
			if used > byName[name].Memory {
				t.Fatalf("%s has %d MiB and gave %d", name, byName[name].Memory, used)
			}
		}
		waits, clearing := map[string]bool{}, false // a silo that is cleared for one invocation is not for the next
		kinds := map[string]WorkKind{}
		for _, l := range leases {
			kinds[l.Work.ID] = l.Work.Kind
		}
		for _, w := range waiting {
			waits[w.Work] = true
			clearing = clearing || len(w.Displace) > 0
			if w.Why == "" {
				t.Fatalf("%s waits and nobody says why", w.Work)
			}
			for _, id := range w.Displace {
				if !byID[w.Work].Kind.invoked() || !kinds[id].TakenOver() {
					t.Fatalf("%s displaces %s, a %s", w.Work, id, kinds[id])
				}
			}
		}
		for _, w := range work { // no invocation waits where there is memory
			for _, s := range silos {
				if waits[w.ID] && w.Kind.invoked() && !clearing && Fits(w, s, before) == nil {
					t.Fatalf("invocation %s waits though %s has room", w.ID, s.Name)
				}
			}
		}
		shuffled := [3]any{slices.Clone(work), slices.Clone(silos), slices.Clone(leases)}
		rng := rand.New(rand.NewPCG(1, rapid.Uint64().Draw(t, "seed")))
		for _, list := range shuffled {
			rng.Shuffle(reflect.ValueOf(list).Len(), reflect.Swapper(list))
		}
		again, _ := Place(noon, shuffled[0].([]Work), shuffled[1].([]Silo), shuffled[2].([]Lease), where)
		if !slices.Equal(again, placed) {
			t.Fatalf("another order of the same state gives %v, not %v", again, placed)
		}
	})
}

// A stream of small work that never ends must not keep a large piece, or a customer with little, waiting for ever.
func TestNobodyWaitsForEver(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var silos []Silo
		for i := range rapid.IntRange(1, 4).Draw(t, "silos") {
			silos = append(silos, host(fmt.Sprintf("silo%d", i), 16))
		}
		rng := rand.New(rand.NewPCG(7, rapid.Uint64().Draw(t, "seed")))
		large := piece(WorkTest, "large", rapid.SampledFrom([]string{"shop", "bank"}).Draw(t, "of"), 16)
		few := piece(WorkTest, "few", "mill", 2)
		waiting := map[string]Work{"large": large, "few": few}
		var leases []Lease
		ends := map[string]time.Time{}
		n := 0
		for now := noon; now.Sub(noon) < 45*time.Minute; now = now.Add(time.Minute) {
			leases = slices.DeleteFunc(leases, func(l Lease) bool { return !ends[l.Work.ID].After(now) })
			for len(waiting) < 10+8*len(silos) { // there is always more than fits
				n++
				w := piece(WorkTest, fmt.Sprintf("s%d", n), []string{"shop", "bank"}[n%2], 1+rng.IntN(3))
				w.Since = now
				waiting[w.ID] = w
			}
			placed, _ := Place(now, slices.Collect(maps.Values(waiting)), silos, leases, nil)
			for _, p := range placed {
				leases = append(leases, Lease{Work: waiting[p.Work], Silo: p.Silo, Granted: now})
				ends[p.Work] = now.Add(time.Duration(2+rng.IntN(8)) * time.Minute)
				delete(waiting, p.Work)
			}
			if _, still := waiting["few"]; still && now.Sub(noon) > 10*time.Minute {
				t.Fatalf("a customer with one server waits since %s", now.Sub(noon))
			}
			if _, still := waiting["large"]; still && now.Sub(noon) > Patience+15*time.Minute {
				t.Fatalf("a large piece waits since %s", now.Sub(noon))
			}
		}
	})
}

func BenchmarkPlace(b *testing.B) {
	var silos []Silo
	var work []Work
	var leases []Lease
	for i := range 20 {
		silos = append(silos, host(fmt.Sprintf("silo%d", i), 64))
		for j := range 16 {
			leases = append(leases, on(silos[i].Name, piece(WorkTest, fmt.Sprintf("l%d-%d", i, j), fmt.Sprint(j), 4)))
		}
	}
	for i := range 2000 {
		work = append(work, piece(WorkTest, fmt.Sprintf("w%d", i), fmt.Sprint(i%50), 1+i%8))
	}
	for b.Loop() {
		Place(noon.Add(time.Hour), work, silos, leases[:len(leases)-1], nil)
	}
}
