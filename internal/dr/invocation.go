package dr

import "time"

// Invocation is a rescue image run for real.
type Invocation struct {
	ID         string `json:"id"`
	ServerID   string `json:"server_id"`
	Server     string `json:"server"`
	SnapshotID string `json:"snapshot_id"`
	// PreRecovery is the rescue image that passed: what was prepared anew since is not what is run.
	PreRecovery string          `json:"pre_recovery"`
	By          string          `json:"by"`     // who asked
	Reason      string          `json:"reason"` // why, in their words
	State       InvocationState `json:"state"`
	Network     NetworkChoice   `json:"network"`
	Silo        string          `json:"silo,omitempty"`    // where its machine is
	Machine     string          `json:"machine,omitempty"` // hypervisor's name for it
	Moved       string          `json:"moved,omitempty"`   // the last move that took it from a silo
	Addresses   []string        `json:"addresses,omitempty"`
	Steps       []StepRecord    `json:"steps,omitempty"`
	Results     []CheckResult   `json:"results,omitempty"`
	Requested   time.Time       `json:"requested"`
	Served      *time.Time      `json:"served,omitempty"` // when the checks passed and it was handed over
	Ended       *time.Time      `json:"ended,omitempty"`
	RTA         time.Duration   `json:"rta,omitempty"` // measured RTO: requested → served
	RPA         time.Duration   `json:"rpa,omitempty"` // measured RPO: requested − the snapshot's instant
	Kept        bool            `json:"kept,omitempty"`
	KeptAt      string          `json:"kept_at,omitempty"` // folder with what the machine wrote
	Failure     string          `json:"failure,omitempty"`
}

// InvocationState is where an invocation stands.
type InvocationState string

// The states: invoking → running → ended; invoking → failed. An invocation whose start could not be undone is ended by hand:
// invoking → ended.
const (
	Invoking InvocationState = "invoking"
	Running  InvocationState = "running"
	Ended    InvocationState = "ended"
	Failed   InvocationState = "failed"
)

// Active says whether the invocation holds a machine.
func (i Invocation) Active() bool { return i.State == Invoking || i.State == Running }

// NetworkChoice names what an invoked machine is attached to.
type NetworkChoice struct {
	Kind   NetworkKind `json:"kind"`
	Bridge string      `json:"bridge,omitempty"` // for NetworkBridge: an existing bridge of the host
}

// NetworkKind is a kind of attachment.
type NetworkKind string

// The kinds of network.
const (
	NetworkNone     NetworkKind = "none"      // no cable
	NetworkHostOnly NetworkKind = "host-only" // a bridge of its own on which only the host sits, at the server's gateway
	NetworkBridge   NetworkKind = "bridge"    // an existing bridge, which may lead anywhere
)

// StepRecord is one journalled step of an invocation.
type StepRecord struct {
	Name     string        `json:"name"`
	Started  time.Time     `json:"started"`
	Duration time.Duration `json:"duration"`
	Detail   string        `json:"detail,omitempty"`
	Error    string        `json:"error,omitempty"`
}
