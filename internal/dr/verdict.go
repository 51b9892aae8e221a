package dr

import "time"

// Outcome is a verdict in one word.
type Outcome string

// The four outcomes. Only Pass promotes; Inconclusive and Blocked neither promote nor demote.
const (
	Pass         Outcome = "PASS"
	Fail         Outcome = "FAIL"
	Blocked      Outcome = "BLOCKED"      // something it depends on failed
	Inconclusive Outcome = "INCONCLUSIVE" // the test could not be held: no capacity, channel lost
)

// Code names why a boot failed, from a closed list.
type Code string

// The failure codes.
const (
	CodeNone             Code = ""
	CodeNoBootable       Code = "no-bootable-device"
	CodeGrubRescue       Code = "grub-rescue"
	CodeInitrdTimeout    Code = "initrd-timeout"
	CodeEmergency        Code = "emergency-mode"
	CodePanic            Code = "kernel-panic"
	CodeLoginNoAgent     Code = "login-no-agent"
	CodeServiceFailed    Code = "service-failed"
	CodeCheckFailed      Code = "check-failed"
	CodeBaseline         Code = "baseline-mismatch" // it booted, but is no carbon copy
	CodeTimeout          Code = "timeout"
	CodeDied             Code = "machine-died"
	CodeDiskError        Code = "disk-error" // the image could not be read: the store is damaged
	CodeBadAnswer        Code = "bad-answer" // the test agent answered wrongly or with garbage
	CodeNotBooted        Code = "not-rescuable"
	CodeNothingChecked   Code = "nothing-checked"
	CodeNoCapacity       Code = "no-capacity"
	CodeInfrastructure   Code = "infrastructure" // our side broke
	CodeHostBusy         Code = "host-busy"      // what did not come up may have had no time to
	CodePreRecoverFailed Code = "pre-recover-failed"
)

// Verdict is the answer to all checks of one boot test, kept as an attribute of the snapshot it tested (R87).
type Verdict struct {
	ID          string        `json:"id"`
	SnapshotID  string        `json:"snapshot_id"`
	PreRecovery string        `json:"pre_recovery"`
	Silo        string        `json:"silo,omitempty"` // that held the test, and has its evidence; "" of releases with only one
	Outcome     Outcome       `json:"outcome"`
	Code        Code          `json:"code,omitempty"`
	Summary     string        `json:"summary"` // one sentence for people
	Started     time.Time     `json:"started"`
	Phases      []Phase       `json:"phases"`
	Results     []CheckResult `json:"results"`
	Evidence    []Evidence    `json:"evidence,omitempty"`
	Rung        string        `json:"rung,omitempty"` // disk bus/NIC model it ran on
	Accelerator string        `json:"accelerator,omitempty"`
	BootID      string        `json:"boot_id,omitempty"`
	RTA         time.Duration `json:"rta"` // measured: from the start of assembly to the last check's answer
	RPA         time.Duration `json:"rpa"` // measured: age of the data when the test started
	RTOMet      *bool         `json:"rto_met,omitempty"`
	RPOMet      *bool         `json:"rpo_met,omitempty"`
}

// Phase is one timed part of a boot.
type Phase struct {
	Name     string        `json:"name"` // assemble, firmware, kernel, userspace, stable, checks
	Duration time.Duration `json:"duration"`
}

// The phases in order.
const (
	PhaseAssemble  = "assemble"
	PhaseFirmware  = "firmware"
	PhaseKernel    = "kernel"
	PhaseUserspace = "userspace"
	PhaseStable    = "stable"
	PhaseChecks    = "checks"
)

// CheckState is the answer to one question.
type CheckState string

// The states of one check.
const (
	CheckPass CheckState = "pass"
	CheckWarn CheckState = "warn" // worth reading, does not fail the verdict
	CheckFail CheckState = "fail"
	CheckSkip CheckState = "skip" // could not apply, and the reason is in Got
)

// CheckResult is one question and its answer.
type CheckResult struct {
	Name     string        `json:"name"`
	State    CheckState    `json:"state"`
	Want     string        `json:"want,omitempty"`
	Got      string        `json:"got,omitempty"`
	Code     Code          `json:"code,omitempty"` // for a fail: what it means for the verdict
	Duration time.Duration `json:"duration,omitempty"`
}

// Evidence is a file kept with a verdict.
type Evidence struct {
	Kind string `json:"kind"` // screenshot, serial, answers
	Path string `json:"path"`
	Size int64  `json:"size"`
}

// Judge turns the answers of a machine that did come up into an outcome. A test that asked nothing fails: a verifier
// that verified nothing must not pass. The code is that of the first failing result.
func Judge(results []CheckResult) (Outcome, Code, string) {
	asked := 0
	for _, r := range results {
		switch r.State {
		case CheckFail:
			code := r.Code
			if code == CodeNone {
				code = CodeCheckFailed
			}
			return Fail, code, r.Name + ": " + r.Got
		case CheckPass, CheckWarn:
			asked++
		}
	}
	if asked == 0 {
		return Fail, CodeNothingChecked, "the machine came up but no question was answered"
	}
	return Pass, CodeNone, "all checks passed"
}

// MeetObjectives fills in whether the measured times keep the promise.
func (v *Verdict) MeetObjectives(o Objectives) {
	if o.RTO > 0 {
		met := v.RTA <= o.RTO
		v.RTOMet = &met
	}
	if o.RPO > 0 {
		met := v.RPA <= o.RPO
		v.RPOMet = &met
	}
}

// Record is a snapshot together with what is known of it by now.
type Record struct {
	Snapshot    Snapshot     `json:"snapshot"`
	State       State        `json:"state"`
	PreRecovery *PreRecovery `json:"pre_recovery,omitempty"` // the newest
	Verdict     *Verdict     `json:"verdict,omitempty"`      // the newest
	LKG         bool         `json:"lkg"`
	HeldBy      string       `json:"held_by,omitempty"` // the suspicious snapshot for whose sake it is held, itself or an earlier one; see Holds
	Ruling      *Ruling      `json:"ruling,omitempty"`  // of a person who looked at it
}

// Promotion is one move of last-known-good.
type Promotion struct {
	ServerID   string    `json:"server_id"`
	SnapshotID string    `json:"snapshot_id"`
	Previous   string    `json:"previous,omitempty"`
	VerdictID  string    `json:"verdict_id"`
	At         time.Time `json:"at"`
}

// Promotes says whether a verdict moves last-known-good to the snapshot it tested: only a PASS, and only forward in
// the time the disks show, and not if the tested one is held. The present one may be empty. Testing the present one again
// and passing does not move.
func Promotes(v Verdict, tested Snapshot, heldBy string, present *Snapshot) bool {
	if v.Outcome != Pass || v.SnapshotID != tested.ID || heldBy != "" {
		return false
	}
	return present == nil || (tested.ID != present.ID && tested.Taken.After(present.Taken))
}

// StateAfter says what a verdict proves of the snapshot it tested. What a person refused stays rejected.
func StateAfter(v Verdict, before State, ruling *Ruling) State {
	switch v.Outcome {
	case Pass:
		if ruling != nil && !ruling.Accept {
			return Rejected
		}
		return Verified
	case Fail:
		return Rejected
	}
	return before
}

// InconclusiveLimit is how many inconclusive tests in a row raise a ticket.
const InconclusiveLimit = 2

// ProblemAfter gives the problem a verdict stands for, or "" for none yet. recent are the server's verdicts before
// this one, newest first. One problem has one key however many nights it lasts.
func ProblemAfter(v Verdict, recent []Verdict) Problem {
	switch v.Outcome {
	case Fail:
		return Problem("test-failed/" + string(v.Code))
	case Inconclusive:
		n := 1
		for _, r := range recent {
			if r.Outcome != Inconclusive {
				break
			}
			n++
		}
		if n >= InconclusiveLimit {
			return "test-inconclusive"
		}
	case Pass:
		switch {
		case v.RTOMet != nil && !*v.RTOMet:
			return "rto-missed"
		case v.RPOMet != nil && !*v.RPOMet:
			return "rpo-missed"
		}
	}
	return ""
}

// Problem is the key of a ticket: a kind, and what tells two of that kind apart.
type Problem string

// Problems that do not come from a verdict.
const (
	ProblemCapture     Problem = "capture-failed"
	ProblemPreRecovery Problem = "pre-recovery-failed"
	ProblemTestMissing Problem = "test-missing"
	ProblemStore       Problem = "store-damaged"
	ProblemInvocation  Problem = "invocation-failed"  // it did not come to run
	ProblemInvoked     Problem = "invocation-checks"  // it runs, and does not pass its checks
	ProblemStopped     Problem = "invocation-stopped" // its machine is gone
	ProblemHost        Problem = "host-not-ready"
	ProblemArrival     Problem = "arrival-missing"      // a snapshot of an appliance that should have arrived did not
	ProblemSend        Problem = "replication-failed"   // an appliance cannot send a snapshot
	ProblemNearFull    Problem = "near-store-full"      // an appliance has no room to capture; one for each
	ProblemAway        Problem = "appliance-away"       // one for each
	ProblemClock       Problem = "clock-wrong"          // one for each appliance
	ProblemSiloLost    Problem = "invocation-silo-lost" // nobody knows whether its machine runs
)

// ClosedByPass lists the kinds of problem that a passing test proves gone.
func (p Problem) ClosedByPass() bool {
	for _, prefix := range []string{"test-", "capture-failed", "pre-recovery-failed", "rto-missed", "rpo-missed"} {
		if len(p) >= len(prefix) && string(p[:len(prefix)]) == prefix {
			return true
		}
	}
	return false
}

// Ticket is one open problem with its history.
type Ticket struct {
	ID       string     `json:"id"`
	ServerID string     `json:"server_id"`
	Server   string     `json:"server"`
	Problem  Problem    `json:"problem"`
	Title    string     `json:"title"`
	Detail   string     `json:"detail,omitempty"`
	Snapshot string     `json:"snapshot,omitempty"`
	Opened   time.Time  `json:"opened"`
	LastSeen time.Time  `json:"last_seen"`
	Count    int        `json:"count"` // how many times it was seen
	Closed   *time.Time `json:"closed,omitempty"`
	Reason   string     `json:"reason,omitempty"` // why it was closed
}

// Event is one thing that happened. Events are never changed or removed.
type Event struct {
	Seq     int64     `json:"seq"`
	At      time.Time `json:"at"`
	Kind    string    `json:"kind"` // snapshot.kept, lkg.moved, ticket.opened, …
	Server  string    `json:"server,omitempty"`
	Subject string    `json:"subject,omitempty"` // the id of what it happened to
	Message string    `json:"message"`
}

// Expirable lists the snapshots a retention rule lets go, data before the images it goes onto, otherwise oldest first. It never
// lists last-known-good, the newest snapshot of each kind, one that is booted (pinned), one that is still being worked on, or
// an image that data goes onto which stays; nor, while a person has to decide, the evidence and the last snapshot from before it.
func Expirable(records []Record, keep Retention, lkg string, pinned map[string]bool) []string {
	if keep.KeepLast <= 0 {
		return nil
	}
	live := make([]Record, 0, len(records))
	for _, r := range records {
		if r.State != Expired {
			live = append(live, r)
		}
	}
	live = oldestFirst(live)
	stays, newest := spared(live), map[bool]string{}
	stays[lkg] = true
	tested := map[string]bool{} // images that data was tested with: they need no test of their own
	for _, r := range live {
		newest[r.Snapshot.IsData()] = r.Snapshot.ID
		tested[r.Snapshot.Image] = true
	}
	points := 0 // an image that data goes onto is no point of its own to go back to
	for i := len(live) - 1; i >= 0; i-- {
		id := live[i].Snapshot.ID
		if !tested[id] {
			points++
		}
		if !tested[id] && points <= keep.KeepLast || pinned[id] {
			stays[id] = true
		}
	}
	stays[newest[true]], stays[newest[false]] = true, true
	for _, r := range live {
		// One that arrived from an appliance after a newer one is not tested, and the newest stays anyway.
		if r.State == Kept && (r.Snapshot.IsData() || !tested[r.Snapshot.ID]) {
			stays[r.Snapshot.ID] = true
		}
	}
	for _, r := range live {
		if r.Snapshot.IsData() && stays[r.Snapshot.ID] {
			stays[r.Snapshot.Image] = true
		}
	}
	var out []string
	for _, data := range []bool{true, false} {
		for _, r := range live {
			if r.Snapshot.IsData() == data && !stays[r.Snapshot.ID] {
				out = append(out, r.Snapshot.ID)
			}
		}
	}
	return out
}

// ImageFor chooses the image onto which a server's next data goes: the newest, unless its last test failed, alone or with data
// on it; then that of last-known-good, so that one bad image does not make every night's data bad. Records are the server's,
// newest first; false if there is no image.
func ImageFor(records []Record) (Snapshot, bool) {
	var newest *Record
	images := map[string]*Record{}
	good := ""
	for i := range records {
		r := &records[i]
		if r.LKG {
			good = r.Snapshot.ImageID()
		}
		if r.State == Expired || r.Snapshot.IsData() {
			continue
		}
		images[r.Snapshot.ID] = r
		if newest == nil {
			newest = r
		}
	}
	if newest == nil {
		return Snapshot{}, false
	}
	if known := images[good]; known != nil && failed(records, newest.Snapshot.ID) {
		return known.Snapshot, true
	}
	return newest.Snapshot, true
}

// failed says whether the last verdict on an image, alone or with data on it, is a FAIL.
func failed(records []Record, image string) bool {
	var last *Verdict
	for _, r := range records {
		if v := r.Verdict; r.Snapshot.ImageID() == image && v != nil && (last == nil || v.Started.After(last.Started)) {
			last = v
		}
	}
	return last != nil && last.Outcome == Fail
}
