package main

import (
	"context"
	"fmt"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/master"
)

// A simulated night: only time is made up. When a server is captured, which silo takes which work, when a lease is lost: each
// is decided by the rules that decide it in earnest (dr.Server.Dues, dr.Attempt, dr.Place, dr.Silo), asked at the master's tick.
//
// What is measured is how well the farm is used once there is more to do than it can do at once: from the moment the first work waits
// until the last work that waited has begun. Before that, and after it, silos are idle because there is no work for them.
const (
	simServers   = 2000
	simCustomers = 60
	simNights    = 2
	simSites     = 2    // captures at once at one customer's
	simRescue    = 1200 // MiB for making a rescue image
	simWindow    = 8 * time.Hour
	simMiddle    = 15 * time.Minute // in the middle of a night's work
)

// Times of steps, in seconds, in order of length.
var (
	captureTimes    = []float64{12.4, 12.8, 13.2, 13.5, 13.7, 14.4, 14.4, 14.9, 15.5, 15.6, 15.8, 16.4, 16.5, 16.8, 17.3, 17.7, 18.2, 18.2, 25.1, 29.6, 46.2}
	prerecoverTimes = []float64{14.4, 15.1, 15.6, 16.4, 16.4, 16.5, 16.9, 17.1, 17.2, 17.7, 18.4, 18.4, 19.6, 19.8, 20.3, 21.1, 21.2, 22.3, 22.5, 22.9, 28.5}
	testTimes       = []float64{44.1, 63.6, 64.2, 69.5, 69.5, 70.4, 73.0, 74.5, 74.9, 75.6, 75.8, 75.8, 76.0, 79.6, 80.6, 81.3, 81.5, 84.2, 87.1, 106.1, 188.2}
)

// simSource says where they come from.
const simSource = "times of captures, rescue images and boot tests are those of 21 real ones of the demo's shop (make orders, 22 November 2026: two cores without KVM, the live shop beside on the same host)"

const (
	simFailed = 10 * time.Minute // a test whose machine does not come up waits for it until the limit for that
	simBroken = 20 * time.Second // a silo that cannot start machines says so
)

// machineSize is a size that servers have: MiB, processors, and how many of a hundred.
type machineSize struct{ memory, cores, share int }

var (
	usualSizes = []machineSize{{2 << 10, 1, 30}, {4 << 10, 2, 30}, {8 << 10, 2, 20}, {16 << 10, 4, 12}, {32 << 10, 8, 6}, {64 << 10, 8, 2}}
	// unevenSizes has large databases, for which most silos are too small, among very small servers.
	unevenSizes = []machineSize{{1 << 10, 1, 55}, {2 << 10, 1, 25}, {8 << 10, 4, 8}, {32 << 10, 8, 6}, {64 << 10, 16, 4}, {90 << 10, 24, 2}}
)

// unevenUse is what is asked for with large databases: most silos are too small for them, and have nothing to do when only they wait.
const unevenUse = 0.75

// siloSizes are the silos: small, middle, large.
var siloSizes = []struct{ n, memory, cores int }{{10, 32 << 10, 8}, {6, 64 << 10, 16}, {4, 96 << 10, 24}}

// simCase is one way in which nights go.
type simCase struct {
	name   string
	least  float64 // the least part of the silos that has to be in use
	sizes  []machineSize
	faults func(s *simNight, middle time.Time) // what goes wrong, in the middle of the last night
}

var simCases = []simCase{
	{name: "all goes well", least: 0.85, sizes: usualSizes},
	{name: "uneven sizes", least: unevenUse, sizes: unevenSizes},
	{name: "two silos lost", least: 0.85, sizes: usualSizes, faults: func(s *simNight, middle time.Time) {
		s.silos[12].gone, s.silos[17].gone = middle, middle.Add(time.Minute) // a middle one and a large one, for good
	}},
	{name: "one reserved", least: 0.85, sizes: usualSizes, faults: func(s *simNight, _ time.Time) {
		s.silos[13].Reserved = []string{"customer-0"}
	}},
	{name: "all of it at once, one broken, one drained, one back", least: unevenUse, sizes: unevenSizes, faults: func(s *simNight, middle time.Time) {
		s.silos[12].gone, s.silos[17].gone = middle, middle.Add(time.Minute)
		s.silos[5].gone, s.silos[5].back = middle.Add(3*time.Minute), middle.Add(20*time.Minute)
		s.silos[13].Reserved = []string{"customer-0"}
		s.at(middle, func() { s.silos[3].State = dr.SiloDraining })
		s.at(middle.Add(12*time.Hour), func() { s.silos[3].State = dr.SiloActive })
		s.at(middle.Add(-5*time.Minute), func() { s.silos[8].broken = true })
	}},
}

// simUse is capacity of silos in use, and what there was of it: MiB-seconds, core-seconds, and of each silo the scarcer of both, in
// MiB-seconds. able: the last of those silos alone that could take some of the work that waits, were they idle.
type simUse struct{ memory, memoryOf, cores, coresOf, scarce, able, ableOf float64 }

func (u *simUse) add(v simUse) {
	u.memory, u.memoryOf = u.memory+v.memory, u.memoryOf+v.memoryOf
	u.cores, u.coresOf = u.cores+v.cores, u.coresOf+v.coresOf
	u.scarce += v.scarce
	u.able, u.ableOf = u.able+v.able, u.ableOf+v.ableOf
}

// simFigures is what a simulation tells.
type simFigures struct {
	kept, judged, late, redone, moved int
	latest                            time.Duration // from snapshot to verdict
	slowest                           time.Duration // decision
	longest                           int           // pieces that waited at once

	use, since simUse        // while there was more to do than could be done; what came after work waited last
	first      time.Time     // when work first waited in this night
	took       time.Duration // from the first that waited to the last verdict, of all nights
	last       time.Time     // verdict
}

func (f *simFigures) share() float64 { return f.use.scarce / f.use.memoryOf }

// night simulates nights of many servers and silos, well ones and bad ones.
func night(ctx context.Context, _ *bench) (rows []Row, err error) {
	var missed int
	var details string
	for _, c := range simCases {
		s := newNight(c)
		began := time.Now()
		if err := s.run(ctx); err != nil {
			return rows, err
		}
		without := 0
		for _, server := range s.servers {
			without += max(simNights-server.verdicts, 0)
		}
		missed += without
		details += fmt.Sprintf("%s: %d; ", c.name, without)
		rows = append(rows, higher("simulated night, "+c.name+": silos in use", s.share(), c.least, simDefinition, s.figures(time.Since(began))))
	}
	return append(rows, lower("simulated nights: servers without a verdict", float64(missed), 0, "servers of which a night's snapshot had no verdict before the next was due, of all nights above", details+simSource)), nil
}

var simDefinition = "of the capacity that silos offer the part in use, of each silo the scarcer of memory and processors, from the moment the first work waits until the last work that waited has begun; " +
	"a silo that is lost offers nothing once the master knows, a reserved one only while work waits or runs that it takes; placement is the real one, asked every " + master.DefaultTick.String() + "; " + simSource

func (s *simNight) figures(simulated time.Duration) string {
	hours := s.took.Hours() / simNights
	rate := float64(s.judged) / simNights / hours / float64(len(s.silos))
	return fmt.Sprintf("%d servers, %d silos, %d nights: %d snapshots, %d verdicts; memory %.2f, processors %.2f in use, %.2f of the silos that could have taken some of what waited; a night's work took %s of a window of %s: %.0f boots an hour and silo, which is %.0f servers in the window; "+
		"at most %d pieces waited, the latest verdict came %s after its snapshot, %d later than %s; %d pieces done again, %d tests away from their deltas; longest decision %s; simulated in %s",
		len(s.servers), len(s.silos), simNights, s.kept, s.judged, s.use.memory/s.use.memoryOf, s.use.cores/s.use.coresOf, s.use.able/s.use.ableOf, (s.took / simNights).Round(time.Second), simWindow, rate, rate*float64(len(s.silos))*simWindow.Hours(),
		s.longest, s.latest.Round(time.Second), s.late, master.DefaultGrace, s.redone, s.moved, s.slowest.Round(time.Millisecond), simulated.Round(time.Second))
}

// count notes how much of the silos is in use.
func (s *simNight) count() {
	s.longest = max(s.longest, len(s.waiting))
	if s.now.Hour() == 12 && !s.first.IsZero() { // the night is over
		s.took += s.last.Sub(s.first)
		s.first, s.since = time.Time{}, simUse{}
	}
	if s.first.IsZero() {
		if len(s.waiting) == 0 {
			return
		}
		s.first = s.now
	}
	s.since.add(s.present())
	if len(s.waiting) > 0 {
		s.use.add(s.since)
		s.since = simUse{}
	}
}

// present is what is in use until the next tick.
func (s *simNight) present() (out simUse) {
	type room struct{ memory, cores int }
	busy := map[string]room{}
	for _, l := range s.leases {
		b := busy[l.Silo]
		busy[l.Silo] = room{b.memory + l.Work.Memory, b.cores + l.Work.Cores}
	}
	tick := master.DefaultTick.Seconds()
	for _, silo := range s.silos {
		b, leased := busy[silo.Name]
		if silo.State != dr.SiloActive || len(silo.Reserved) > 0 && !leased && !s.wanted(silo) {
			continue
		}
		if !s.alive(silo) {
			b = room{} // what the master takes for work there is none
		}
		memory, cores := float64(b.memory), float64(min(b.cores, silo.Cores))
		part := max(memory/float64(silo.Memory), cores/float64(silo.Cores))
		offers, scarce := float64(silo.Memory)*tick, part*float64(silo.Memory)*tick
		out.add(simUse{memory: memory * tick, memoryOf: offers, cores: cores * tick, coresOf: float64(silo.Cores) * tick, scarce: scarce})
		if s.wanted(silo) {
			out.add(simUse{able: scarce, ableOf: offers})
		}
	}
	return out
}

// wanted says whether work waits that a silo could take, were it idle.
func (s *simNight) wanted(silo *simSilo) bool {
	for _, w := range s.waiting {
		if silo.Takes(w.Customer) && w.Memory <= silo.Memory {
			return true
		}
	}
	return false
}
