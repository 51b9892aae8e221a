// Package boottest boots a rescue image, asks it questions, and says what that proves.
//
//	Run         one boot test: scratch layers, machine, questions, evidence, verdict; nothing is left but the evidence
//	Attend      the waiting and asking alone, on a machine that somebody else started and keeps
//	Questions   what is expected of a machine: the baseline of its inventory, the customer's checks, the limits
//	Attendance  what it answered
//	Reap        removes what a crashed process of ours left
//
// # What counts
//
//	BOOTED   the test agent inside has repeated this boot's challenge
//	STABLE   init has no job left, every port of the baseline listens, and both stay so over three samples a second
//	         apart; or nothing has changed for so long that nothing will; or the limit
//	SERVING  the comparison with the baseline and the customer's checks have no failure: dr.Judge
//
// The customer's checks are asked as soon as the machine seems stable, while that is being confirmed, and asked again if
// it was not. Nothing waits a fixed time.
//
// # Who is to blame
//
// What the guest did or did not do is a result with a code, and FAIL; what our side could not do is Unheld, and the verdict
// INCONCLUSIVE. While the guest starts, one goroutine watches its serial log, its state and its disks, and ends the test
// as soon as the reason is known: see symptoms. A host that hardly let the guest run is to blame for nearly everything that did
// not come up: see tooBusy.
//
// Knows: machines, the conversation with the test agent, what a healthy boot looks like.
// Must not know: libvirt, the store, the catalog, who asked for the test.
package boottest

import (
	"errors"
	"fmt"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
	"github.com/musterdr/muster/internal/vm"
)

// Limits bound a boot test. A zero field means its default.
type Limits struct {
	Boot      time.Duration // until the agent has answered; 10 min
	Stabilise time.Duration // until the machine is stable after that; 5 min
	Total     time.Duration // the whole attendance; 45 min
	Login     time.Duration // from a login prompt to the agent's answer; 1 min
	Stall     time.Duration // without output, disk reads or a change of the screen before the agent answers; 3 min
	Answer    time.Duration // for one status; 2 min
	Sample    time.Duration // between two samples of a machine that seems stable; 1 s
}

func (l Limits) filled() Limits {
	fill := func(d *time.Duration, otherwise time.Duration) {
		if *d <= 0 {
			*d = otherwise
		}
	}
	fill(&l.Boot, 10*time.Minute)
	fill(&l.Stabilise, 5*time.Minute)
	fill(&l.Total, 45*time.Minute)
	fill(&l.Login, time.Minute)
	fill(&l.Stall, 3*time.Minute)
	fill(&l.Answer, 2*time.Minute)
	fill(&l.Sample, time.Second)
	return l
}

// Questions are what is expected of a machine.
type Questions struct {
	Hardware    dr.Hardware
	Networks    []vm.Network   // as in vm.Spec: a NIC without a bridge has no cable, and is not expected to have addresses
	PreRecovery dr.PreRecovery // units that its edits touch are not expected to run
	Baseline    dr.Baseline
	SourceBoot  string // boot id of the source when it was captured; an answer with it does not come from a new boot
	Checks      []dr.Check
	Limits      Limits
	Began       time.Time    // when the machine's processors started; zero: now
	SerialFrom  int64        // bytes of the serial log that belong to an earlier attendance
	DiskError   func() error // nil, or the first error in reading the image that our side knows of
}

// Attendance is what a machine answered.
type Attendance struct {
	BootID  string           `json:"boot_id,omitempty"`
	Results []dr.CheckResult `json:"results"`
	Phases  []dr.Phase       `json:"phases"` // firmware to checks, as far as it came
	Hello   *probe.Hello     `json:"hello,omitempty"`
	Status  *probe.Status    `json:"status,omitempty"` // of the stable machine
	Garbage int64            `json:"garbage"`          // bytes on the agent's ports that were no answer
	Waited  float64          `json:"waited"`           // part of the time, 0 to 1, in which the host kept the guest from a processor
	Screen  []byte           `json:"-"`                // PNG, when it was decided; nil if there was no screen to photograph
}

// Unheld says that a test could not be held for a reason that is not the guest's. It proves nothing about the image.
type Unheld struct {
	Code   dr.Code // CodeNoCapacity or CodeInfrastructure
	Reason string
}

func (u *Unheld) Error() string { return "boot test could not be held: " + u.Reason }

// failure is why a guest did not come up.
type failure struct {
	code dr.Code
	text string
}

func (f *failure) Error() string { return f.text }

func failed(code dr.Code, format string, args ...any) *failure {
	return &failure{code, fmt.Sprintf(format, args...)}
}

// result is the answer to one of the two questions that every attendance asks.
func (f *failure) result(name string, took time.Duration) dr.CheckResult {
	return dr.CheckResult{Name: name, State: dr.CheckFail, Code: f.code, Want: always[name], Got: f.text, Duration: took}
}

// always are the questions of every attendance: did it boot, and having booted, did it stay.
var always = map[string]string{
	nameBoot: "the test agent repeats the challenge of this boot",
	nameStay: "the machine runs and the test agent answers until the end",
}

const (
	nameBoot = "boot"
	nameStay = "running"
)

var errOver = errors.New("the attendance is over")
