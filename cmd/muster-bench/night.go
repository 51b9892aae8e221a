package main

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/master"
)

// A simulated night: only time is made up. When a server is captured, which silo takes which work, when a lease is lost: each
// is decided by the rules that decide it in earnest (dr.Server.Dues, dr.Attempt, dr.Place, dr.Silo), asked at the master's tick.
const (
	simServers   = 2000
	simCustomers = 60
	simNights    = 3
	simSites     = 2    // captures at once at one customer's
	simAppliance = 1200 // MiB for making a rescue image
)

// Times of steps as they were measured, in seconds: of the demo's shop on a machine with two cores and without KVM, which did
// other things beside. A test that fails waits for its machine until the limit for that.
var (
	captureTimes    = []float64{6, 9, 15, 16, 21}
	prerecoverTimes = []float64{17, 20, 22, 24, 26}
	testTimes       = []float64{45, 79, 80, 84, 119}
)

const (
	simFailed = 10 * time.Minute // a test whose machine does not come up
	simBroken = 20 * time.Second // a silo that cannot start machines says so
)

// machines are the sizes that servers have: MiB, processors, and how many of a hundred.
var machineSizes = []struct{ memory, cores, share int }{{2 << 10, 1, 30}, {4 << 10, 2, 30}, {8 << 10, 2, 20}, {16 << 10, 4, 12}, {32 << 10, 8, 6}, {64 << 10, 8, 2}}

// siloSizes are the silos: small, middle, large.
var siloSizes = []struct{ n, memory, cores int }{{10, 32 << 10, 8}, {6, 64 << 10, 16}, {4, 96 << 10, 24}}

// windows are the hours at which customers have their snapshots taken, and how many of ten customers.
var windows = []struct{ hour, share int }{{22, 4}, {0, 3}, {2, 2}, {4, 1}}

type simServer struct {
	dr.Server
	customer      string
	memory, cores int
	taken         dr.Taken
	attempt       dr.Attempt
	busy          bool   // captured, prepared or tested at present
	deltas        string // the pre-recovery of its last-known-good
	verdicts      int
}

type simSilo struct {
	dr.Silo
	broken bool      // every piece fails
	gone   time.Time // from when on it is dead; zero: it lives
	back   time.Time // when it comes back; zero: never
}

// simWork is a piece of work with whose it is.
type simWork struct {
	dr.Work
	of    *simServer
	kept  time.Time // when its snapshot was
	fails bool      // its machine does not come up
}

// event is something that happens at a time.
type simEvent struct {
	at time.Time
	n  int // of two at once the earlier made
	do func()
}

type simEvents []simEvent

func (q simEvents) Len() int      { return len(q) }
func (q simEvents) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q simEvents) Less(i, j int) bool {
	return cmp.Or(q[i].at.Compare(q[j].at), cmp.Compare(q[i].n, q[j].n)) < 0
}
func (q *simEvents) Push(e any) { *q = append(*q, e.(simEvent)) }
func (q *simEvents) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	*q = (*q)[:last]
	return e
}

// simNight is the state of a simulation.
type simNight struct {
	rng     *rand.Rand
	now     time.Time
	begin   time.Time
	events  simEvents
	made    int
	servers []*simServer
	silos   []*simSilo
	sites   map[string]int // captures under way, by customer
	waiting map[string]*simWork
	leases  map[string]dr.Lease
	terms   map[string]int64 // of the last lease: what comes under a lower one is refused
	term    int64
	where   dr.Where
	works   map[string]*simWork

	kept, judged, late, redone, moved int
	latest                            time.Duration
	used, could                       float64 // silo-seconds while work waits: in use, and there for it
	all, there                        float64 // the same of the whole nights, from ten to six
	crowded                           time.Duration
	longest                           int
	slowest                           time.Duration
}

// night simulates nights of many servers and silos.
func night(ctx context.Context, _ *bench) ([]Row, error) {
	s := newNight()
	began := time.Now()
	if err := s.run(ctx); err != nil {
		return nil, err
	}
	missed := 0
	for _, server := range s.servers {
		missed += max(simNights-server.verdicts, 0)
	}
	figures := fmt.Sprintf("%d servers, %d silos, %d nights: %d snapshots, %d verdicts, %d later than %s, the latest after %s; work waited in %s of them, at most %d pieces; %d pieces done again, %d tests away from their deltas; %.0f %% of ten to six; longest decision %s; simulated in %s",
		len(s.servers), len(s.silos), simNights, s.kept, s.judged, s.late, master.DefaultGrace, s.latest.Round(time.Second), s.crowded.Round(time.Minute), s.longest, s.redone, s.moved,
		100*s.all/s.there, s.slowest.Round(time.Millisecond), time.Since(began).Round(time.Second))
	return []Row{
		higher("simulated nights: silos in use while work waits", s.used/s.could, 0.85,
			"of each silo that lives and could ever take some of the waiting work the greater part in use of its memory and its processors, over the time in which work waits; placement is the real one, asked every "+master.DefaultTick.String()+"; some silos are lost, come back, are drained or fail at everything", figures),
		lower("simulated nights: servers without a verdict", float64(missed), 0, "servers of which a night's snapshot had no verdict before the next was due, all nights", figures),
	}, nil
}

func newNight() *simNight {
	begin := time.Date(2026, 3, 2, 20, 0, 0, 0, time.UTC)
	s := &simNight{rng: rand.New(rand.NewPCG(20, 2000)), now: begin, begin: begin, sites: map[string]int{}, waiting: map[string]*simWork{}, leases: map[string]dr.Lease{},
		terms: map[string]int64{}, where: dr.Where{}, works: map[string]*simWork{}}
	for i, size := range siloSizes {
		for n := range size.n {
			silo := &simSilo{Silo: dr.Silo{Name: fmt.Sprintf("silo-%d-%d", i, n), State: dr.SiloActive, Hypervisor: dr.HypervisorKVM, Memory: size.memory, Cores: size.cores, Space: 4 << 40, Seen: begin}}
			s.silos = append(s.silos, silo)
		}
	}
	s.silos[0].Reserved, s.silos[1].Reserved = []string{"customer-0"}, []string{"customer-0"}
	for i := range simServers {
		// The first customers have most servers.
		customer := min(s.rng.IntN(simCustomers), s.rng.IntN(simCustomers))
		hour := s.pick(customer)
		at := time.Date(begin.Year(), begin.Month(), begin.Day(), hour, s.rng.IntN(10), s.rng.IntN(60), 0, time.UTC)
		if at.Before(begin) {
			at = at.Add(24 * time.Hour)
		}
		server := &simServer{Server: dr.Server{ID: fmt.Sprintf("srv-%d", i), Name: fmt.Sprintf("host-%d", i), Schedule: dr.Schedule{Every: dr.DefaultEvery}}, customer: fmt.Sprintf("customer-%d", customer)}
		share := s.rng.IntN(100)
		for _, size := range machineSizes {
			if server.memory, server.cores = size.memory, size.cores; share < size.share {
				break
			}
			share -= size.share
		}
		server.taken.Image = at.Add(-24 * time.Hour)
		server.taken.Last = server.taken.Image
		s.servers = append(s.servers, server)
	}
	s.faults()
	return s
}

// pick gives the hour of a customer's window.
func (s *simNight) pick(customer int) int {
	share := customer % 10
	for _, w := range windows {
		if share < w.share {
			return w.hour
		}
		share -= w.share
	}
	return windows[0].hour
}

// faults says what goes wrong: in the second and third night, in the middle of most work.
func (s *simNight) faults() {
	second, third := s.begin.Add(26*time.Hour+12*time.Minute), s.begin.Add(50*time.Hour+8*time.Minute)
	s.silos[12].gone = second // for good
	s.silos[5].gone, s.silos[5].back = second.Add(3*time.Minute), second.Add(20*time.Minute)
	s.silos[17].gone, s.silos[17].back = third, third.Add(time.Hour)
	s.at(second, func() { s.silos[3].State = dr.SiloDraining })
	s.at(second.Add(12*time.Hour), func() { s.silos[3].State = dr.SiloActive })
	s.at(third.Add(-time.Hour), func() { s.silos[8].broken = true })
}

func (s *simNight) at(t time.Time, do func()) {
	s.made++
	heap.Push(&s.events, simEvent{t, s.made, do})
}

func (s *simNight) draw(times []float64) time.Duration {
	i := s.rng.IntN(len(times) - 1)
	return time.Duration((times[i] + s.rng.Float64()*(times[i+1]-times[i])) * float64(time.Second))
}

// run goes from tick to tick until every night is over.
func (s *simNight) run(ctx context.Context) error {
	for end := s.begin.Add(simNights * 24 * time.Hour); s.now.Before(end); s.now = s.now.Add(master.DefaultTick) {
		if err := ctx.Err(); err != nil {
			return err
		}
		tick := s.now
		for len(s.events) > 0 && !s.events[0].at.After(tick) {
			e := heap.Pop(&s.events).(simEvent)
			s.now = e.at
			e.do()
		}
		s.now = tick
		s.beats()
		s.expire()
		s.captures()
		s.place()
		s.count()
	}
	return nil
}

// alive says whether a silo does anything at present.
func (s *simNight) alive(silo *simSilo) bool {
	return silo.gone.IsZero() || s.now.Before(silo.gone) || !silo.back.IsZero() && !s.now.Before(silo.back)
}

// beats notes who is heard of, and who has not been for too long.
func (s *simNight) beats() {
	for _, silo := range s.silos {
		switch {
		case s.alive(silo):
			silo.Seen = s.now
			if silo.State == dr.SiloLost {
				silo.State = dr.SiloActive
			}
			for id, l := range s.leases {
				// What it had when it died it has no more.
				if l.Silo == silo.Name && (silo.gone.IsZero() || l.Granted.Before(silo.gone) == s.now.Before(silo.gone)) {
					l.Expires = s.now.Add(dr.LeaseTime)
					s.leases[id] = l
				}
			}
		case s.now.Sub(silo.Seen) > dr.LeaseTime:
			silo.State = dr.SiloLost
		}
	}
}

// expire takes over what a silo had that is not heard of.
func (s *simNight) expire() {
	for id, l := range s.leases {
		if s.now.After(l.Expires.Add(dr.LeaseGrace)) {
			s.again(id, l.Silo)
		}
	}
}

// again has a piece of work done once more, elsewhere if that is possible.
func (s *simNight) again(id, silo string) {
	w := s.works[id]
	delete(s.leases, id)
	w.Avoid = append(w.Avoid, silo)
	w.Since = s.now
	s.waiting[id] = w
	s.redone++
}

// captures begins what is due, as each customer's appliance does.
func (s *simNight) captures() {
	for _, server := range s.servers {
		if server.busy || s.sites[server.customer] >= simSites {
			continue
		}
		if server.Dues(server.taken, s.now).Next().After(s.now) || server.attempt.Again(server.Server, s.now).After(s.now) {
			continue
		}
		server.attempt = server.attempt.Begin(server.taken.Last, s.now)
		server.busy = true
		s.sites[server.customer]++
		taken := s.now
		s.at(s.now.Add(s.draw(captureTimes)), func() {
			s.sites[server.customer]--
			if s.rng.IntN(100) == 0 { // it could not be reached: tried again later
				server.busy = false
				return
			}
			server.taken.Image, server.taken.Last = taken, taken
			s.kept++
			s.work(&simWork{Work: dr.Work{ID: fmt.Sprintf("pre-%d", s.kept), Kind: dr.WorkPreRecovery, Memory: simAppliance, Cores: 1, Space: 1 << 30, Near: server.deltas}, of: server, kept: s.now,
				fails: s.rng.IntN(50) == 0})
		})
	}
}

func (s *simNight) work(w *simWork) {
	w.Customer, w.Server, w.Since = w.of.customer, w.of.Name, s.now
	s.works[w.ID], s.waiting[w.ID] = w, w
}

// place asks which silo takes what, and begins it.
func (s *simNight) place() {
	if len(s.waiting) == 0 {
		return
	}
	var work []dr.Work
	for _, w := range s.waiting {
		work = append(work, w.Work)
	}
	slices.SortFunc(work, func(a, b dr.Work) int { return cmp.Compare(a.ID, b.ID) })
	var silos []dr.Silo
	byName := map[string]*simSilo{}
	for _, silo := range s.silos {
		silos, byName[silo.Name] = append(silos, silo.Silo), silo
	}
	var leases []dr.Lease
	for _, l := range s.leases {
		leases = append(leases, l)
	}
	slices.SortFunc(leases, func(a, b dr.Lease) int { return cmp.Compare(a.Work.ID, b.Work.ID) })
	start := time.Now()
	placed, _ := dr.Place(s.now, work, silos, leases, s.where)
	s.slowest = max(s.slowest, time.Since(start))
	for _, p := range placed {
		s.grant(s.waiting[p.Work], byName[p.Silo])
	}
}

func (s *simNight) grant(w *simWork, silo *simSilo) {
	s.term++
	term := s.term
	s.terms[w.ID] = term
	delete(s.waiting, w.ID)
	s.leases[w.ID] = dr.Lease{Work: w.Work, Silo: silo.Name, Term: term, Granted: s.now, Expires: s.now.Add(dr.LeaseTime)}
	if !s.alive(silo) {
		return // it will not even hear of it
	}
	takes := s.draw(prerecoverTimes)
	if w.Kind == dr.WorkTest {
		if !slices.Contains(s.where[w.Near], silo.Name) {
			s.moved++ // its deltas are made anew there
		} else {
			takes = 0
		}
		if takes += s.draw(testTimes); w.fails {
			takes += simFailed
		}
	}
	if silo.broken {
		takes = simBroken
	}
	granted := s.now
	s.at(s.now.Add(takes), func() {
		died := !silo.gone.IsZero() && granted.Before(silo.gone) && !s.now.Before(silo.gone)
		if died || s.terms[w.ID] != term || s.leases[w.ID].Term != term {
			return // what it did is lost, or refused
		}
		if silo.broken {
			s.again(w.ID, silo.Name)
			return
		}
		delete(s.leases, w.ID)
		s.done(w, silo)
	})
}

func (s *simNight) done(w *simWork, silo *simSilo) {
	delete(s.works, w.ID)
	delete(s.terms, w.ID)
	if w.Kind == dr.WorkPreRecovery {
		s.where[w.ID] = []string{silo.Name}
		s.work(&simWork{Work: dr.Work{ID: "verdict" + w.ID[len("pre"):], Kind: dr.WorkTest, Memory: w.of.memory, Cores: w.of.cores, Space: 2 << 30, Near: w.ID}, of: w.of, kept: w.kept, fails: w.fails})
		return
	}
	server, took := w.of, s.now.Sub(w.kept)
	server.busy = false
	server.verdicts++
	s.judged++
	if s.latest = max(s.latest, took); took > master.DefaultGrace {
		s.late++
	}
	if w.fails {
		delete(s.where, w.Near)
		return
	}
	delete(s.where, server.deltas)
	server.deltas = w.Near
}

// count notes how much of the silos is in use.
func (s *simNight) count() {
	tick := master.DefaultTick.Seconds()
	busy := map[string][2]int{}
	for _, l := range s.leases {
		b := busy[l.Silo]
		busy[l.Silo] = [2]int{b[0] + l.Work.Memory, b[1] + l.Work.Cores}
	}
	s.longest = max(s.longest, len(s.waiting))
	if len(s.waiting) > 0 {
		s.crowded += master.DefaultTick
	}
	night := s.now.Hour() >= 22 || s.now.Hour() < 6
	for _, silo := range s.silos {
		if !s.alive(silo) || silo.State != dr.SiloActive {
			continue
		}
		b := busy[silo.Name]
		part := min(1, max(float64(b[0])/float64(silo.Memory), float64(b[1])/float64(silo.Cores)))
		if night {
			s.all, s.there = s.all+part*tick, s.there+tick
		}
		for _, w := range s.waiting {
			if silo.Takes(w.Customer) && w.Memory <= silo.Memory {
				s.used, s.could = s.used+part*tick, s.could+tick
				break
			}
		}
	}
}
