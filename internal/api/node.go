package api

import (
	"context"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Appliance is what a master asks of an appliance. In one process it is called directly; between machines the same
// contract travels over the appliance's own outbound connection.
//
// Every call is idempotent under its identifier: asked again for a snapshot it has kept, it answers with that one.
type Appliance interface {
	// Snapshot captures a server and returns once the snapshot is kept: written, read back, published.
	Snapshot(ctx context.Context, task SnapshotTask, report dr.Progress) (dr.Snapshot, error)
	// Contact connects to a source once without changing it, and says what it found. For an SSH source without a host
	// key it returns the key the host showed, for a person to confirm.
	Contact(ctx context.Context, source dr.Source) (Contact, error)
	// Forget removes what capture left on a source: the agent's cache folder. Used when a server is removed.
	Forget(ctx context.Context, source dr.Source) error
}

// Journal is whoever writes down what an appliance did by itself: a master.
type Journal interface {
	// FilesRestored writes down that files were put back. Told again it does nothing.
	FilesRestored(ctx context.Context, r dr.FileRestore) error
}

// SnapshotTask asks for one snapshot.
type SnapshotTask struct {
	ID     string    `json:"id"` // of the snapshot to be made
	Server dr.Server `json:"server"`
	Parent string    `json:"parent,omitempty"` // newest kept snapshot of the server of the same kind, "" for a full one
	Image  string    `json:"image,omitempty"`  // not "": take the server's data, which goes onto this image
	// Trusted is the newest snapshot of the same kind that is not held; signs are measured against it too, if it is not the parent.
	Trusted string   `json:"trusted,omitempty"`
	Usual   dr.Usual `json:"usual"` // what this server's snapshots usually change
	// Date says for an instant by this machine's clock by what instant a snapshot is dated; nil: by that.
	Date func(time.Time) time.Time `json:"-"`
}

// Contact is what a first contact with a source found.
type Contact struct {
	HostKey     string       `json:"host_key,omitempty"`
	Fingerprint string       `json:"fingerprint,omitempty"` // SHA256:…
	Inventory   dr.Inventory `json:"inventory"`
}

// Silo is what a master asks of a silo. Every call is idempotent under its identifier and comes with a Grant: a silo refuses
// work of a lower term than it has seen for the same identifier, and ends by itself what it has no lease for any more.
type Silo interface {
	// Beat renews the leases of a silo, and asks how it stands.
	Beat(ctx context.Context, beat Beat) (Pulse, error)
	// PreRecover makes a rescue image of a snapshot. An error of type *Rejected means that the snapshot itself is at
	// fault and trying again would not help.
	PreRecover(ctx context.Context, task PreRecoverTask, report dr.Progress) (dr.PreRecovery, error)
	// KeepDeltas puts a pre-recovery's deltas into the store beside their snapshot, so that a lost silo costs nothing. It
	// returns the digest of what they hold.
	KeepDeltas(ctx context.Context, task DeltasTask) (digest string, err error)
	// HoldDeltas makes sure that the silo has them at hand, fetched from the store if need be, and proves it by their digest.
	HoldDeltas(ctx context.Context, task DeltasTask) (digest string, err error)
	// Test boots a rescue image, asks, and removes the machine. What the test could not decide is an INCONCLUSIVE
	// verdict and no error; an error means that the call itself broke and may be repeated. NotFound: the deltas are neither
	// here nor in the store.
	Test(ctx context.Context, task TestTask, report dr.Progress) (dr.Verdict, error)
	// Invoke boots a rescue image on a live layer and returns when its processors run.
	Invoke(ctx context.Context, task InvokeTask, report dr.Progress) (Invoked, error)
	// CheckInvoked waits for an invoked machine to come up and asks it the server's checks.
	CheckInvoked(ctx context.Context, task InvokeTask, report dr.Progress) ([]dr.CheckResult, error)
	// Tend makes an invocation whole again after a restart: exports are served, the machine is found. It says
	// whether the machine still runs.
	Tend(ctx context.Context, task InvokeTask) (running bool, err error)
	// Leave shuts an invoked machine down and keeps what it has written in the store, under the name of task.Moved, for another silo to go
	// on with. What is here stays until EndInvocation. Asked again it keeps it again.
	Leave(ctx context.Context, task InvokeTask, report dr.Progress) (Left, error)
	// EndInvocation stops the machine and keeps or discards what it wrote. It returns where it was kept.
	EndInvocation(ctx context.Context, task InvokeTask, keep bool) (kept string, err error)
	// Discard removes the deltas and evidence of a snapshot that has expired.
	Discard(ctx context.Context, snapshotID string) error
	// Reap removes every machine, export, scratch layer and folder that belongs to none of the given owners and to no call that is
	// under way. It is called when a master or a silo has started, and when a silo is back that was lost.
	Reap(ctx context.Context, alive []string) (removed []string, err error)
	// Diagnose says what this host can do.
	Diagnose(ctx context.Context) []Finding
}

// Stamp is an instant by a silo's own clock, which no other clock is compared with. A silo gives one with each Pulse, the master
// gives it back with what it grants, and the silo counts the lease's time from there: an instant before the master
// granted it. A message that lay about, or a silo that was stopped, cannot make a lease last longer.
type Stamp struct {
	Boot string        `json:"boot,omitempty"` // the silo's process
	At   time.Duration `json:"at,omitempty"`
}

// Grant is the lease under which a silo is asked for something.
type Grant struct {
	Term   int64         `json:"term"`
	Stamp  Stamp         `json:"stamp,omitzero"`
	For    time.Duration `json:"for,omitempty"`    // from Stamp on, if it is not renewed; 0: until it is ended
	Access *Access       `json:"access,omitempty"` // how the customer's store is opened; nil: the silo's own
}

// Access opens a customer's store. A silo keeps it in memory only, as long as the work lasts.
type Access struct {
	Customer string `json:"customer"`
	Place    string `json:"place"` // of the store, below the master's address
	Password string `json:"password"`
}

// String leaves out the password, for logs.
func (a Access) String() string { return "store of " + a.Customer }

// Beat is a master's heartbeat to one silo.
type Beat struct {
	Stamp  Stamp         `json:"stamp,omitzero"`   // of the silo's last pulse; zero: there was none
	For    time.Duration `json:"for"`              // how long leases last from there
	Leases []int64       `json:"leases,omitempty"` // that it has, by their terms
}

// Pulse is how a silo stands. Of Silo the master takes everything but state, beats and time.
type Pulse struct {
	Stamp Stamp     `json:"stamp"`
	Clock time.Time `json:"clock,omitzero"` // what its host's clock shows
	Silo  dr.Silo   `json:"silo"`
	Doing []string  `json:"doing,omitempty"` // identifiers of the work under way
}

// Rejected is an answer about a snapshot, not a fault on the way: no rescue image can be made of it.
type Rejected struct {
	Code   dr.Code `json:"code"`
	Reason string  `json:"reason"`
}

func (r *Rejected) Error() string { return r.Reason }

// PreRecoverTask asks for a rescue image.
type PreRecoverTask struct {
	ID       string      `json:"id"` // of the pre-recovery
	Grant    Grant       `json:"grant"`
	Server   dr.Server   `json:"server"`
	Snapshot dr.Snapshot `json:"snapshot"`
}

// TestTask asks for a boot test.
type TestTask struct {
	ID          string         `json:"id"` // of the verdict
	Grant       Grant          `json:"grant"`
	Server      dr.Server      `json:"server"`
	Snapshot    dr.Snapshot    `json:"snapshot"`
	PreRecovery dr.PreRecovery `json:"pre_recovery"`
	Asked       time.Time      `json:"asked"`
}

// DeltasTask names deltas.
type DeltasTask struct {
	Grant       Grant          `json:"grant"`
	Snapshot    dr.Snapshot    `json:"snapshot"`
	PreRecovery dr.PreRecovery `json:"pre_recovery"`
}

// InvokeTask asks for, or names, an invoked machine.
type InvokeTask struct {
	ID          string           `json:"id"` // of the invocation
	Grant       Grant            `json:"grant"`
	Server      dr.Server        `json:"server"`
	Snapshot    dr.Snapshot      `json:"snapshot"`
	PreRecovery dr.PreRecovery   `json:"pre_recovery"`
	Network     dr.NetworkChoice `json:"network"`
	// Moved is the move with which what the machine wrote was put into the store last: a silo that has nothing of it fetches that. "": none.
	Moved string `json:"moved,omitempty"`
}

// KeptName is the name under which a file of an invoked machine is kept with its snapshot while it is moved.
func (t InvokeTask) KeptName(file string) string { return KeptPrefix(t.ID) + t.Moved + "." + file }

// KeptPrefix is how all such names of an invocation begin.
func KeptPrefix(invocation string) string { return invocation + "." }

// Left is a machine that was stopped to be moved.
type Left struct {
	Clean bool  `json:"clean"` // it shut down by itself; else the plug was pulled
	Size  int64 `json:"size"`  // bytes that it has written, as they lie in its live layers
}

// Invoked is a machine that was started for real.
type Invoked struct {
	Machine   string   `json:"machine"`
	Addresses []string `json:"addresses"` // where the host reaches it; empty with no network
	Bridge    string   `json:"bridge,omitempty"`
}

// Finding is one thing a host can or cannot do.
type Finding struct {
	Name   string `json:"name"`
	State  string `json:"state"` // ok, warn, fail
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitempty"` // what to do about it
}
