package dr

import (
	"cmp"
	"container/heap"
	"fmt"
	"slices"
	"time"
)

// Patience is how long smaller work may pass a larger piece that fits nowhere. Then room is gathered for it.
const Patience = 15 * time.Minute

// Placed is work that a silo is to begin now.
type Placed struct {
	Work string
	Silo string
}

// Waiting is work that no silo can begin now.
type Waiting struct {
	Work string
	Why  string // a part of a sentence for people, as "every silo is busy"
	// Never: none of the silos there are could take it, not even one that is idle.
	Never bool
	// Displace names tests and pre-recoveries that have to end so that an invocation can begin. They are held again later.
	Displace []string
}

// Place decides which silo takes which piece of work. It is the whole of the decision: the same state gives the same answer.
//
//   - Memory is never overcommitted, whatever for.
//   - Invocations come first. They do not wait for processors or for estimated space: on the day a slow machine is better than
//     none. If no silo has the memory, tests are displaced, the youngest first.
//   - Tests and pre-recoveries go on in turn between customers: the one of which least is under way is next, then the one that
//     waits longest. Of one customer the oldest is next. So nobody is kept waiting by how much another one has (R106).
//   - A piece that smaller ones have passed for Patience gets room gathered for it on one silo; of at most one silo in ten at a
//     time, so that gathering does not keep the others idle.
//   - A silo that is reserved takes only its customers' work; its customers use it first, and others when it is full.
//   - Work goes where its deltas are; then where there is most room, so that losing one silo costs as little as can be. Invoked
//     machines of one customer are spread for the same reason. KVM is preferred to emulation.
func Place(now time.Time, work []Work, silos []Silo, leases []Lease, where Where) ([]Placed, []Waiting) {
	p := newPlacing(silos, leases, where)
	leased := map[string]bool{}
	for _, l := range leases {
		leased[l.Work.ID] = true
	}
	var urgent, usual []Work
	for _, w := range work {
		switch {
		case leased[w.ID]: // begun already
		case w.Kind.invoked():
			urgent = append(urgent, w)
		default:
			usual = append(usual, w)
		}
	}
	p.inTurn(urgent, p.invoke)
	for _, w := range passed(now, usual, leases) {
		if !p.take(w) && len(p.held) < max(1, len(silos)/10) {
			p.gather(w)
		}
	}
	p.inTurn(usual, p.take)
	for _, w := range usual {
		if !p.done[w.ID] {
			p.waiting = append(p.waiting, p.wait(w))
		}
	}
	return p.placed, p.waiting
}

// Fits says why a silo cannot be given a piece of work beside the leases it has; nil if it can. Place keeps to it, and whoever
// grants a lease asks again, because something else may have been granted meanwhile.
func Fits(w Work, s Silo, leases []Lease) error {
	p := newPlacing([]Silo{s}, leases, nil)
	if !p.rooms[0].fits(w, false) {
		return fmt.Errorf("silo %s cannot take it now: %s", s.Name, p.wait(w).Why)
	}
	return nil
}

// room is what a silo has left.
type room struct {
	Silo
	memory, cores, tests int
	space                int64
	fixed                int            // MiB of invoked machines
	of                   map[string]int // invoked machines, by customer
	leases               []Lease        // of tests and pre-recoveries
}

func (r *room) add(w Work) {
	r.memory -= w.Memory
	r.cores -= min(w.Cores, r.Silo.Cores)
	r.space -= w.Space
	switch {
	case w.Kind == WorkTest:
		r.tests++
	case w.Kind.invoked():
		r.fixed += w.Memory
		r.of[w.Customer]++
	}
}

// may says whether the silo could ever take the work: were it idle.
func (r *room) may(w Work) bool {
	return r.State == SiloActive && r.Takes(w.Customer) && w.Memory <= r.Memory && (w.Only == "" || w.Only == r.Name) && (w.Not == "" || w.Not != r.Name) &&
		(w.Network == "" || slices.Contains(r.Networks, w.Network)) && (w.Kind.invoked() || w.Space <= r.Space)
}

// fits says whether it can take it now. roomy asks of an invocation for what it can do without.
func (r *room) fits(w Work, roomy bool) bool {
	if !r.may(w) || w.Memory > r.memory {
		return false
	}
	if w.Kind.invoked() && !roomy {
		return true
	}
	return min(w.Cores, r.Silo.Cores) <= r.cores && w.Space <= r.space && (w.Kind != WorkTest || r.Tests == 0 || r.tests < r.Tests)
}

// left is how much of the silo is free, in thousandths.
func (r *room) left() int {
	return min(1000*r.memory/max(r.Memory, 1), 1000*r.cores/max(r.Silo.Cores, 1))
}

// need is what tells two pieces of work apart as far as fitting goes.
type need struct {
	kind          WorkKind
	customer      string // only if silos are reserved
	memory, cores int
	space         int64
	network, only string
	not           string
}

// placing is one decision under way.
type placing struct {
	rooms    []*room
	where    Where
	share    map[party]int // MiB under way
	held     map[string]bool
	full     map[need]Waiting // what fits nowhere: room only shrinks
	done     map[string]bool
	reserved bool
	placed   []Placed
	waiting  []Waiting
}

func newPlacing(silos []Silo, leases []Lease, where Where) *placing {
	p := &placing{where: where, held: map[string]bool{}, full: map[need]Waiting{}, done: map[string]bool{}, share: map[party]int{}}
	byName := map[string]*room{}
	for _, s := range silos {
		r := &room{Silo: s, memory: s.Memory, cores: s.Cores, space: s.Space, of: map[string]int{}}
		p.rooms, byName[s.Name] = append(p.rooms, r), r
		p.reserved = p.reserved || len(s.Reserved) > 0
	}
	slices.SortFunc(p.rooms, func(a, b *room) int { return cmp.Compare(a.Name, b.Name) })
	for _, l := range leases {
		p.count(l.Work)
		if r := byName[l.Silo]; r != nil {
			r.add(l.Work)
			if !l.Work.Kind.invoked() {
				r.leases = append(r.leases, l)
			}
		}
	}
	return p
}

// inTurn offers work, each time the oldest of the customer of which least is under way.
func (p *placing) inTurn(work []Work, offer func(Work) bool) {
	q := turns{share: p.share, of: map[string][]Work{}}
	for _, w := range work {
		if !p.done[w.ID] {
			q.of[w.Customer] = append(q.of[w.Customer], w)
		}
	}
	for customer, own := range q.of {
		slices.SortFunc(own, older)
		q.order = append(q.order, customer)
	}
	heap.Init(&q)
	for q.Len() > 0 {
		customer := q.order[0]
		offer(q.of[customer][0])
		if q.of[customer] = q.of[customer][1:]; len(q.of[customer]) == 0 {
			heap.Pop(&q)
		} else {
			heap.Fix(&q, 0)
		}
	}
}

// turns is a heap of customers: whose turn it is first.
type turns struct {
	share map[party]int
	of    map[string][]Work // oldest first, none empty
	order []string
}

func (q *turns) Len() int      { return len(q.order) }
func (q *turns) Swap(i, j int) { q.order[i], q.order[j] = q.order[j], q.order[i] }
func (q *turns) Push(c any)    { q.order = append(q.order, c.(string)) }
func (q *turns) Pop() any {
	last := len(q.order) - 1
	c := q.order[last]
	q.order = q.order[:last]
	return c
}

func (q *turns) Less(i, j int) bool {
	a, b := q.of[q.order[i]][0], q.of[q.order[j]][0]
	return cmp.Or(cmp.Compare(q.share[shareOf(a)], q.share[shareOf(b)]), older(a, b)) < 0
}

func older(a, b Work) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.ID, b.ID)) }

// party is whose share of what is counted: a crisis costs a customer nothing of its nights, nor the other way round.
type party struct {
	invoked  bool
	customer string
}

func shareOf(w Work) party { return party{w.Kind.invoked(), w.Customer} }

func (p *placing) count(w Work) { p.share[shareOf(w)] += max(w.Memory, 1) }

// take gives a piece of work to the best silo that can begin it now.
func (p *placing) take(w Work) bool {
	if _, full := p.full[p.need(w)]; full {
		return false
	}
	for _, avoid := range []bool{true, false} {
		for _, roomy := range []bool{true, false} {
			if r := p.best(w, avoid, roomy); r != nil {
				r.add(w)
				p.count(w)
				p.done[w.ID] = true
				p.placed = append(p.placed, Placed{w.ID, r.Name})
				return true
			}
		}
	}
	p.full[p.need(w)] = p.wait(w)
	return false
}

func (p *placing) need(w Work) need {
	n := need{kind: w.Kind, memory: w.Memory, cores: w.Cores, space: w.Space, network: w.Network, only: w.Only, not: w.Not}
	if p.reserved {
		n.customer = w.Customer
	}
	return n
}

// best chooses among the silos that can begin a piece of work.
func (p *placing) best(w Work, avoid, roomy bool) (best *room) {
	near := p.where[w.Near]
	for _, r := range p.rooms {
		if p.held[r.Name] || !r.fits(w, roomy) || avoid && slices.Contains(w.Avoid, r.Name) {
			continue
		}
		if best == nil || better(w, r, best, near) {
			best = r
		}
	}
	return best
}

func better(w Work, a, b *room, near []string) bool {
	which := func(is func(*room) bool) int {
		switch x, y := is(a), is(b); {
		case x == y:
			return 0
		case x:
			return 1
		}
		return -1
	}
	kvm := which(func(r *room) bool { return r.Hypervisor == HypervisorKVM })
	holds := which(func(r *room) bool { return slices.Contains(near, r.Name) })
	own := which(func(r *room) bool { return len(r.Reserved) > 0 })
	spread := 0
	if w.Kind.invoked() {
		spread = cmp.Compare(b.of[w.Customer], a.of[w.Customer])
	}
	room := cmp.Compare(a.left(), b.left())
	if w.Kind == WorkTest { // elsewhere its deltas would have to be made anew
		return cmp.Or(holds, kvm, own, room) > 0
	}
	return cmp.Or(kvm, own, spread, holds, room) > 0
}

// invoke places an invocation or, if there is no memory for it, says which tests are in its way.
func (p *placing) invoke(w Work) bool {
	if p.take(w) {
		return true
	}
	wait := p.wait(w)
	var chosen *room
	least := 0
	for _, r := range p.rooms {
		if p.held[r.Name] || !r.may(w) || w.Memory > r.Memory-r.fixed {
			continue
		}
		lost, names := r.clear(w.Memory)
		if w.Memory > r.memory+lost {
			continue // what else is there was placed a moment ago
		}
		if chosen == nil || lost < least {
			chosen, least, wait.Displace = r, lost, names
		}
	}
	if chosen != nil {
		p.held[chosen.Name] = true
		wait.Why = "boot tests on " + chosen.Name + " make way for it"
	}
	p.waiting = append(p.waiting, wait)
	return false
}

// clear names the youngest tests and pre-recoveries that have to end until there is so much memory, and how much they have.
func (r *room) clear(memory int) (lost int, names []string) {
	slices.SortFunc(r.leases, func(a, b Lease) int {
		return cmp.Or(b.Granted.Compare(a.Granted), cmp.Compare(a.Work.ID, b.Work.ID))
	})
	for _, l := range r.leases {
		if r.memory+lost >= memory {
			break
		}
		lost += l.Work.Memory
		names = append(names, l.Work.ID)
	}
	return lost, names
}

// passed lists, oldest first, what has waited for Patience while smaller work was preferred after that, or came after it and is
// about to be.
func passed(now time.Time, work []Work, leases []Lease) (out []Work) {
	type small struct {
		at            time.Time
		memory, cores int // the least of this and all later ones
	}
	var all []small
	for _, w := range work {
		all = append(all, small{w.Since, w.Memory, w.Cores})
	}
	for _, l := range leases {
		if !l.Work.Kind.invoked() {
			all = append(all, small{l.Granted, l.Work.Memory, l.Work.Cores})
		}
	}
	slices.SortFunc(all, func(a, b small) int { return a.at.Compare(b.at) })
	for i := len(all) - 2; i >= 0; i-- {
		all[i].memory, all[i].cores = min(all[i].memory, all[i+1].memory), min(all[i].cores, all[i+1].cores)
	}
	for _, w := range work {
		if now.Sub(w.Since) < Patience {
			continue
		}
		after, _ := slices.BinarySearchFunc(all, w.Since.Add(Patience), func(s small, at time.Time) int { return s.at.Compare(at) })
		if after < len(all) && (all[after].memory < w.Memory || all[after].cores < w.Cores) {
			out = append(out, w)
		}
	}
	slices.SortFunc(out, older)
	return out
}

// gather keeps further work off the silo that will have room for this piece first. It is the one with most memory free, and
// has at each decision at least as much as at the one before, until the piece fits.
func (p *placing) gather(w Work) {
	var most *room
	for _, r := range p.rooms {
		if !p.held[r.Name] && r.may(w) && w.Memory <= r.Memory-r.fixed && (most == nil || r.memory > most.memory) {
			most = r
		}
	}
	if most != nil {
		p.held[most.Name] = true
		p.full[p.need(w)] = Waiting{Why: "room is being gathered for it on " + most.Name}
	}
}

// wait says why a piece of work cannot begin.
func (p *placing) wait(w Work) Waiting {
	if known, ok := p.full[p.need(w)]; ok {
		known.Work = w.ID
		return known
	}
	out := Waiting{Work: w.ID}
	active, takes, could, memory := 0, 0, 0, 0
	for _, r := range p.rooms {
		idle := *r
		idle.State = SiloActive
		if idle.may(w) {
			could++
		}
		if r.State != SiloActive {
			continue
		}
		active++
		if r.Takes(w.Customer) {
			takes++
			memory = max(memory, r.Memory)
		}
	}
	out.Never = could == 0
	switch {
	case len(p.rooms) == 0:
		out.Why = "there is no silo"
	case w.Only != "" && !slices.ContainsFunc(p.rooms, func(r *room) bool { return r.Name == w.Only && r.State == SiloActive }):
		out.Why = "silo " + w.Only + " is not there"
	case out.Never && memory < w.Memory && takes > 0:
		out.Why = fmt.Sprintf("it needs %d MiB of memory, and the largest silo has %d", w.Memory, memory)
	case out.Never && w.Network != "":
		out.Why = "no silo that it may use has the network " + w.Network
	case out.Never && takes == 0 && active > 0:
		out.Why = "every silo is reserved for other customers"
	case out.Never:
		out.Why = fmt.Sprintf("no silo that it may use has %d MiB of memory and %d MiB free on disk", w.Memory, w.Space>>20)
	case active == 0:
		out.Why = "no silo is active"
	default:
		out.Why = "every silo that could take it is busy"
	}
	return out
}
