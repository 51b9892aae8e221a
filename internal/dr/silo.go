package dr

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Silo is a host with a hypervisor, as the master knows it: what it can, and how it stands.
type Silo struct {
	Name       string     `json:"name"` // see ValidateName
	State      SiloState  `json:"state"`
	Hypervisor Hypervisor `json:"hypervisor"`
	Memory     int        `json:"memory_mib"`         // that rescue machines may have, all together; it is never overcommitted
	Cores      int        `json:"cores"`              // processors
	Space      int64      `json:"space"`              // bytes free for what machines write, when it was last heard of
	Tests      int        `json:"tests,omitempty"`    // boot tests at once; 0: as many as memory and processors allow
	Networks   []string   `json:"networks,omitempty"` // bridges of its own that a machine can be plugged into
	Reserved   []string   `json:"reserved,omitempty"` // customers that it is for; none: everybody's (R61)
	Version    string     `json:"version,omitempty"`  // of its program
	Seen       time.Time  `json:"seen"`               // when it was last heard of, by the master's clock
	Beats      int64      `json:"beats"`              // how often it was heard of: it grows while the silo lives, whatever clocks say
}

// SiloState says whether a silo may be given work.
type SiloState string

// The states of a silo. One that is draining finishes what it has and takes nothing new.
const (
	SiloActive   SiloState = "active"
	SiloDraining SiloState = "draining"
	SiloLost     SiloState = "lost" // it was not heard of for longer than its leases last
)

// Hypervisor says how fast a silo's machines are.
type Hypervisor string

// The kinds of hypervisor. Emulation boots anything some ten times slower.
const (
	HypervisorKVM       Hypervisor = "kvm"
	HypervisorEmulation Hypervisor = "emulation"
)

// How leases of silos run. A silo ends work whose lease was not renewed for LeaseTime by its own clock, counted from an instant
// before the master renewed it; the master gives such work to another one only LeaseGrace later by its own, which is the time
// to pull plugs. So no clock of one has to agree with that of the other, as long as both run at about the same speed.
const (
	BeatEvery  = 10 * time.Second
	LeaseTime  = time.Minute
	LeaseGrace = 30 * time.Second
)

// WorkKind is what a silo is asked to do.
type WorkKind string

// The kinds of work that a silo has a lease for.
const (
	WorkPreRecovery WorkKind = "pre-recovery"
	WorkTest        WorkKind = "test"
	WorkInvocation  WorkKind = "invocation"
	// WorkMove is room on a second silo while an invoked machine is brought from one to the other: first where it is to go, then where
	// it came from, because it may have to go back.
	WorkMove WorkKind = "move"
)

// TakenOver says whether work of a silo that is lost is given to another one without asking anybody. A boot test or a pre-recovery
// is: nobody sees its machine, and of two results the one of the lower term is refused. An invoked machine is not: it may be
// serving its users although the master cannot see it, and a second one beside it would be two truths. It stays where it is until a
// person says that it cannot run any more, or the silo itself has stopped it.
func (k WorkKind) TakenOver() bool { return !k.invoked() }

// invoked says whether it is for a machine that serves people: nothing else has room before it does.
func (k WorkKind) invoked() bool { return k == WorkInvocation || k == WorkMove }

// Work is one piece of work for a silo, and what it needs there.
type Work struct {
	ID       string    `json:"id"` // of the pre-recovery, verdict or invocation
	Kind     WorkKind  `json:"kind"`
	Customer string    `json:"customer,omitempty"`
	Server   string    `json:"server"`            // its name
	Memory   int       `json:"memory_mib"`        // of the machine that is started
	Cores    int       `json:"cores"`             // as many as there are, if a silo has fewer
	Space    int64     `json:"space"`             // bytes that it may write
	Network  string    `json:"network,omitempty"` // a bridge that the silo must have
	Near     string    `json:"near,omitempty"`    // the pre-recovery whose deltas it starts from or, for a new one, of last-known-good
	Since    time.Time `json:"since"`             // when it began to wait
	Avoid    []string  `json:"avoid,omitempty"`   // silos that just failed at it: taken only if there is no other
	Only     string    `json:"only,omitempty"`    // the one silo that can do it: where an invoked machine is
	Not      string    `json:"not,omitempty"`     // a silo that must not have it: from which an invoked machine is moved
}

// Lease is a piece of work that a silo has been given.
type Lease struct {
	Work    Work      `json:"work"`
	Silo    string    `json:"silo"`
	Term    int64     `json:"term"` // higher than that of every lease before: what comes under a lower one of the same work is refused
	Run     int64     `json:"run"`  // term of the master's run that it was given to
	Granted time.Time `json:"granted"`
	Expires time.Time `json:"expires,omitzero"` // if it is not renewed; of an invocation: never
}

// Where says which silos hold the deltas of a pre-recovery, by its identifier.
type Where map[string][]string

// Takes says whether a silo takes work for a customer at all. Reserved means reserved: an idle silo of one customer is no use
// to others, for on the day that its customer needs it nothing has to be cleared first.
func (s Silo) Takes(customer string) bool {
	return len(s.Reserved) == 0 || slices.Contains(s.Reserved, customer)
}

// Describe says what a silo can, for people.
func (s Silo) Describe() string {
	text := fmt.Sprintf("%s, %d MiB for rescue machines, %d processors, %d GiB free", s.Hypervisor, s.Memory, s.Cores, s.Space>>30)
	if len(s.Reserved) > 0 {
		text += ", reserved for " + strings.Join(s.Reserved, ", ")
	}
	return text
}

// Validate says what is wrong with what a silo says of itself.
func (s Silo) Validate() error {
	if !nameRE.MatchString(s.Name) || len(s.Name) > MaxSiloName {
		return fmt.Errorf("silo name %q: use 1 to %d of a-z, 0-9 and '-', not starting or ending with '-'", s.Name, MaxSiloName)
	}
	if s.Memory < 0 || s.Cores < 0 || s.Space < 0 || s.Tests < 0 {
		return fmt.Errorf("silo %s: memory, cores, space and tests must not be negative", s.Name)
	}
	if s.Hypervisor != HypervisorKVM && s.Hypervisor != HypervisorEmulation {
		return fmt.Errorf("silo %s: its hypervisor %q is neither %s nor %s", s.Name, s.Hypervisor, HypervisorKVM, HypervisorEmulation)
	}
	if len(s.Networks) > MaxNetworks || len(s.Reserved) > MaxReserved {
		return fmt.Errorf("silo %s: the most is %d networks and %d customers", s.Name, MaxNetworks, MaxReserved)
	}
	return nil
}

// Limits on what a silo says of itself.
const (
	MaxNetworks = 256
	MaxReserved = 256
	MaxSiloName = 40 // bytes: it becomes part of identifiers
)
