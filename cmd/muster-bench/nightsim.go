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

// simServer, simSilo and simWork are what the rules are asked about, with what only a simulation knows.
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

// simEvent is something that happens at a time.
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
	simCase
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
	simFigures
}

// newNight makes a farm and its customers' servers. All of them are due in the same ten minutes of an evening.
func newNight(c simCase) *simNight {
	begin := time.Date(2026, 3, 2, 22, 0, 0, 0, time.UTC)
	s := &simNight{simCase: c, rng: rand.New(rand.NewPCG(20, 2000)), now: begin, begin: begin, sites: map[string]int{}, waiting: map[string]*simWork{}, leases: map[string]dr.Lease{},
		terms: map[string]int64{}, where: dr.Where{}, works: map[string]*simWork{}}
	for i, size := range siloSizes {
		for n := range size.n {
			silo := &simSilo{Silo: dr.Silo{Name: fmt.Sprintf("silo-%d-%d", i, n), State: dr.SiloActive, Hypervisor: dr.HypervisorKVM, Memory: size.memory, Cores: size.cores, Space: 4 << 40, Seen: begin}}
			s.silos = append(s.silos, silo)
		}
	}
	for i := range simServers {
		// The first customers have most servers.
		customer := min(s.rng.IntN(simCustomers), s.rng.IntN(simCustomers))
		at := begin.Add(time.Duration(s.rng.IntN(600)) * time.Second)
		server := &simServer{Server: dr.Server{ID: fmt.Sprintf("srv-%d", i), Name: fmt.Sprintf("host-%d", i), Schedule: dr.Schedule{Every: dr.DefaultEvery}}, customer: fmt.Sprintf("customer-%d", customer)}
		share := s.rng.IntN(100)
		for _, size := range c.sizes {
			if server.memory, server.cores = size.memory, size.cores; share < size.share {
				break
			}
			share -= size.share
		}
		server.taken.Image = at.Add(-24 * time.Hour)
		server.taken.Last = server.taken.Image
		s.servers = append(s.servers, server)
	}
	if c.faults != nil {
		c.faults(s, begin.Add((simNights-1)*24*time.Hour+simMiddle))
	}
	return s
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
			s.work(&simWork{Work: dr.Work{ID: fmt.Sprintf("pre-%d", s.kept), Kind: dr.WorkPreRecovery, Memory: simRescue, Cores: 1, Space: 1 << 30, Near: server.deltas}, of: server, kept: s.now,
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
	s.last = s.now
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
