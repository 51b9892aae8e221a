package api

import (
	"context"
	"encoding/json"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Operator is what people and their tools may ask of a master. The master implements it, Handler offers it as REST,
// and Client, which speaks that REST, implements it again: what works in a test in one process works over the wire.
//
// A server is named by its name or its identifier. Errors are of type *Error, with a Kind.
type Operator interface {
	Version(ctx context.Context) (Version, error)

	// Contact connects to a source once, from an appliance ("": this process), changing nothing, before it is protected.
	Contact(ctx context.Context, appliance string, source dr.Source) (Contact, error)
	AddServer(ctx context.Context, server dr.Server) (dr.Server, error)
	UpdateServer(ctx context.Context, name string, change ServerChange) (dr.Server, error)
	// Servers gives a page of servers by name: those that come after the name given, at most limit, or MaxServers. Fewer
	// than that are the last. AllServers has every page.
	Servers(ctx context.Context, after string, limit int) ([]ServerStatus, error)
	Server(ctx context.Context, name string) (ServerStatus, error)
	// RemoveServer ends a server's protection. Its snapshots stay until they are expired.
	RemoveServer(ctx context.Context, name string) error

	// Snapshot starts a snapshot; the test of what it keeps follows at once, in the same operation.
	Snapshot(ctx context.Context, name string) (Operation, error)
	// SnapshotData does the same with the data alone, which goes onto an image that is kept.
	SnapshotData(ctx context.Context, name string) (Operation, error)
	// PreRecover makes a snapshot's rescue image anew. An empty snapshot means the newest.
	PreRecover(ctx context.Context, name, snapshot string) (Operation, error)
	// Replicate has a server's appliance send a snapshot to the far store now. An empty snapshot means the newest.
	Replicate(ctx context.Context, name, snapshot string) (Operation, error)
	// Appliances gives every appliance that a server names or that has said hello, by name.
	Appliances(ctx context.Context) ([]ApplianceStatus, error)
	// Test boots a snapshot's rescue image, making one if there is none. An empty snapshot means the newest.
	Test(ctx context.Context, name, snapshot string) (Operation, error)
	Snapshots(ctx context.Context, name string) ([]dr.Record, error) // newest first, without inventories
	Record(ctx context.Context, snapshot string) (dr.Record, error)
	Promotions(ctx context.Context, name string) ([]dr.Promotion, error)
	// Rule records what a person says of a held snapshot. Accepted, it becomes last-known-good if it passed its test, and
	// later ones are compared with it; refused, it is rejected.
	Rule(ctx context.Context, snapshot string, request RuleRequest) (Operation, error)

	Invoke(ctx context.Context, request InvokeRequest) (Operation, error)
	EndInvocation(ctx context.Context, id string, keep bool) (Operation, error)
	Invocations(ctx context.Context, all bool) ([]dr.Invocation, error)
	Invocation(ctx context.Context, id string) (dr.Invocation, error) // by identifier, or the active one of a server by its name

	// MoveInvocation brings an invoked machine to another silo: it is shut down, what it wrote goes through the store, and it boots there. If
	// it cannot, it boots again where it was.
	MoveInvocation(ctx context.Context, id string, request MoveRequest) (Operation, error)
	// AbandonInvocation gives up a machine whose silo is lost. A person says that it cannot run any more; should its silo come
	// back, the machine is stopped there, and what it wrote is kept.
	AbandonInvocation(ctx context.Context, id string, request AbandonRequest) (dr.Invocation, error)

	ListSilos(ctx context.Context) ([]SiloStatus, error)
	ShowSilo(ctx context.Context, name string) (SiloStatus, error)
	// DrainSilo has a silo take no new work, or work again.
	DrainSilo(ctx context.Context, name string, request DrainRequest) (SiloStatus, error)
	// RemoveSilo forgets a silo that is drained or lost and has nothing left.
	RemoveSilo(ctx context.Context, name string) error

	Tickets(ctx context.Context, all bool) ([]dr.Ticket, error)
	CloseTicket(ctx context.Context, id, reason string) error
	Events(ctx context.Context, after int64, limit int, server string) ([]dr.Event, error)

	Operations(ctx context.Context) ([]Operation, error) // newest first
	// Operation answers at once if the operation has gone further than seen, else when it does or after wait.
	Operation(ctx context.Context, id string, seen int64, wait time.Duration) (Operation, error)
	CancelOperation(ctx context.Context, id string) error

	// StoreUsage says what each store holds, the installation's own first.
	StoreUsage(ctx context.Context) ([]StoreUsage, error)
	// Meter says what each customer had of the platform in a month, given as 2026-11; customer "" is all of them.
	Meter(ctx context.Context, month, customer string) ([]dr.Metered, error)
	VerifyStore(ctx context.Context, snapshot string) (Operation, error) // "" verifies every snapshot
	CollectStore(ctx context.Context, alone bool) (Operation, error)     // alone: the caller promises that nobody else writes to the store
	AdoptStore(ctx context.Context) (Operation, error)

	Doctor(ctx context.Context) ([]Finding, error)
}

// AllServers gives every server, by name.
func AllServers(ctx context.Context, op Operator) ([]ServerStatus, error) {
	all := []ServerStatus{}
	for after := ""; ; {
		page, err := op.Servers(ctx, after, MaxServers)
		all = append(all, page...)
		if err != nil || len(page) < MaxServers {
			return all, err
		}
		after = page[len(page)-1].Server.Name
	}
}

// Version says what answers.
type Version struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Data    string    `json:"data"` // folder of the installation
}

// ServerChange changes a server's settings; nil leaves one as it is.
type ServerChange struct {
	Customer   *string        `json:"customer,omitempty"`
	Every      *time.Duration `json:"every,omitempty"`
	RTO        *time.Duration `json:"rto,omitempty"`
	RPO        *time.Duration `json:"rpo,omitempty"`
	Checks     *[]dr.Check    `json:"checks,omitempty"`
	Memory     *int           `json:"memory_mib,omitempty"`
	CPUs       *int           `json:"cpus,omitempty"`
	Overlays   *string        `json:"overlays,omitempty"`
	KeepLast   *int           `json:"keep_last,omitempty"`
	Signs      *dr.SignLevel  `json:"signs,omitempty"`
	KeyFile    *string        `json:"key_file,omitempty"`
	HostKey    *string        `json:"host_key,omitempty"`
	FreezeTime *time.Duration `json:"freeze_limit,omitempty"`
	ReadLimit  *int64         `json:"read_limit,omitempty"`
	Resident   *bool          `json:"resident,omitempty"`
	Snapshots  *bool          `json:"snapshots,omitempty"`

	Tier        *dr.Tier       `json:"tier,omitempty"`
	DataPaths   *[]string      `json:"data_paths,omitempty"`
	DataExclude *[]string      `json:"data_exclude,omitempty"`
	DataEvery   *time.Duration `json:"data_every,omitempty"`
	Standby     *string        `json:"standby,omitempty"`

	HooksOff      *bool          `json:"hooks_off,omitempty"`
	HookLimit     *time.Duration `json:"hook_limit,omitempty"`
	HooksRequired *bool          `json:"hooks_required,omitempty"`
}

// ServerStatus is a server with where it stands.
type ServerStatus struct {
	Server     dr.Server      `json:"server"`
	Newest     *dr.Record     `json:"newest,omitempty"`  // without inventory
	LKG        *dr.Record     `json:"lkg,omitempty"`     // without inventory
	Due        time.Time      `json:"due"`               // when the next snapshot is to be taken
	DataDue    time.Time      `json:"data_due,omitzero"` // when the next one of data is
	Retest     time.Time      `json:"retest,omitzero"`   // when the newest is tested again because its test was inconclusive
	Tickets    int            `json:"tickets"`           // open ones
	Near       *SiteServer    `json:"near,omitempty"`    // what its appliance last said of it
	Operation  *Operation     `json:"operation,omitempty"`
	Invocation *dr.Invocation `json:"invocation,omitempty"`
	Holders    []string       `json:"holders,omitempty"` // silos on which last-known-good would boot at once
}

// RuleRequest says what a person decides about a held snapshot.
type RuleRequest struct {
	Accept bool   `json:"accept"`
	By     string `json:"by"`
	Reason string `json:"reason,omitempty"` // needed to accept
}

// AbandonRequest says who gives a machine up, and how it was made sure that it cannot run.
type AbandonRequest struct {
	By     string `json:"by"`
	Reason string `json:"reason"`
}

// MoveRequest asks for an invoked machine to be brought to another silo.
type MoveRequest struct {
	To     string `json:"to,omitempty"` // the silo; "": the one that placement chooses
	By     string `json:"by"`
	Reason string `json:"reason,omitempty"`
}

// DrainRequest says whether a silo is to take no new work, and why.
type DrainRequest struct {
	Drain  bool   `json:"drain"`
	Reason string `json:"reason,omitempty"`
}

// SiloStatus is a silo with what it has.
type SiloStatus struct {
	Silo      dr.Silo    `json:"silo"`
	Connected bool       `json:"connected"`
	Leases    []dr.Lease `json:"leases,omitempty"` // its work
	Held      int        `json:"held"`             // last-known-goods that would boot at once there
	// Skew is how far its host's clock was ahead of the master's when it was last heard of.
	Skew time.Duration `json:"skew"`
}

// InvokeRequest asks for a server's last-known-good to be run for real.
type InvokeRequest struct {
	Server  string           `json:"server"`
	By      string           `json:"by"`
	Reason  string           `json:"reason"`
	Network dr.NetworkChoice `json:"network"`
}

// Operation is long work, seen from outside.
type Operation struct {
	ID       string          `json:"id"`
	Kind     string          `json:"kind"` // protect, replicate, prerecover, test, rule, invoke, end-invocation, verify, collect, adopt
	Server   string          `json:"server,omitempty"`
	Subject  string          `json:"subject,omitempty"` // what it is about: a snapshot, verdict or invocation
	State    OperationState  `json:"state"`
	Step     string          `json:"step,omitempty"` // what it is doing now, for people
	Silo     string          `json:"silo,omitempty"` // that does it
	Part     string          `json:"part,omitempty"`
	Done     int64           `json:"done,omitempty"`
	Total    int64           `json:"total,omitempty"`
	Unit     string          `json:"unit,omitempty"`
	Seen     int64           `json:"seen"` // grows with every change; give it back to wait for the next one
	Error    string          `json:"error,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"` // what it found, for verify, collect and adopt
	Started  time.Time       `json:"started"`
	Finished *time.Time      `json:"finished,omitempty"`
}

// OperationState is how far an operation is.
type OperationState string

// The states of an operation.
const (
	OperationQueued    OperationState = "queued"
	OperationRunning   OperationState = "running"
	OperationSucceeded OperationState = "succeeded"
	OperationFailed    OperationState = "failed"
	OperationCancelled OperationState = "cancelled"
)

// Finished says whether nothing more will happen.
func (s OperationState) Finished() bool {
	return s == OperationSucceeded || s == OperationFailed || s == OperationCancelled
}

// StoreUsage says what a store holds.
type StoreUsage struct {
	Customer  string `json:"customer,omitempty"` // whose far store it is; "": the installation's own
	Location  string `json:"location"`
	Bytes     int64  `json:"bytes"`           // of all blobs
	Snapshots int    `json:"snapshots"`       // kept
	Logical   int64  `json:"logical"`         // bytes of all kept snapshots' disks
	Free      int64  `json:"free"`            // bytes free where the store lies; -1 unknown
	Error     string `json:"error,omitempty"` // why nothing could be measured
}
