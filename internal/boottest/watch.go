package boottest

import (
	"context"
	"crypto/sha256"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
	"github.com/musterdr/muster/internal/vm"
)

// The pace of watching.
const (
	pollEvery     = 150 * time.Millisecond // serial log and disk errors
	stateEvery    = 600 * time.Millisecond
	stallEvery    = 5 * time.Second
	callLimit     = 10 * time.Second // one call of the hypervisor
	hostlessLimit = 30 * time.Second // without an answer of the hypervisor
	pausedLimit   = 5 * time.Second  // stopped for no reason that we know
)

// watch looks at a machine from the outside and ends the attendance as soon as it is known that no answer will come.
type watch struct {
	machine   vm.Machine
	limits    Limits
	began     time.Time
	diskError func() error
	report    dr.Progress

	// Of run's goroutine alone.
	console  console
	suspect  int // index of symptoms, -1: none
	since    time.Time
	evidence string // the line
	login    time.Time
	hostless time.Time // since when the hypervisor does not answer
	paused   time.Time
	moved    time.Time // when something moved last
	seen     map[[sha256.Size]byte]bool
	reads    int64
	meter    meter

	mu       sync.Mutex
	talk     *probe.Conversation
	restart  context.CancelCauseFunc // ends the present visit
	greeted  bool                    // in the present visit
	awake    bool
	kernelAt time.Time
	initAt   time.Time
	screen   []byte // the last photograph
}

// visit begins a conversation that the watch wakes when the kernel runs, and whose context it ends when the machine
// starts again.
func (w *watch) visit(talk *probe.Conversation, restart context.CancelCauseFunc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.talk, w.restart, w.greeted = talk, restart, false
	if w.awake {
		talk.Wake()
	}
}

func (w *watch) greet() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.greeted = true
}

// run watches until ctx ends, which it itself does with the reason once there is one.
func (w *watch) run(ctx context.Context, end context.CancelCauseFunc) {
	w.suspect, w.moved, w.seen = -1, time.Now(), map[[sha256.Size]byte]bool{}
	defer w.console.close()
	w.measure(ctx, w.moved)
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	var lastState, lastStall time.Time
	lastStall = time.Now()
	for {
		now := time.Now()
		err := w.read(now)
		if err == nil && now.Sub(lastState) >= stateEvery {
			lastState = now
			err = w.state(ctx, now)
			w.report.Report("boot", int64(now.Sub(w.began).Seconds()), int64(w.limits.Boot.Seconds()), "seconds")
		}
		if err == nil && now.Sub(lastStall) >= min(stallEvery, w.limits.Stall/3) {
			lastStall = now
			w.measure(ctx, now)
			err = w.stall(ctx, now)
		}
		if err == nil {
			err = w.diagnose(now)
		}
		if err != nil && ctx.Err() == nil {
			end(err)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// read takes in what is new on the serial port.
func (w *watch) read(now time.Time) error {
	before := w.console.total
	lines, prompt, err := w.console.next()
	if err != nil {
		return &Unheld{dr.CodeInfrastructure, "read the serial log: " + err.Error()}
	}
	if w.console.total != before {
		w.moved = now
	}
	if w.console.total > maxSerial {
		return failed(dr.CodeBadAnswer, "the guest wrote more than %d MiB to its serial port", maxSerial>>20)
	}
	for _, line := range lines {
		w.take(line, now)
	}
	if prompt != "" && w.console.total != before {
		w.take(prompt, now)
	}
	return nil
}

func (w *watch) take(line string, now time.Time) {
	if m := markOf(line); m != markNone {
		w.pass(m, now)
	}
	if i := symptomOf(line); i >= 0 && (w.suspect < 0 || i < w.suspect) {
		w.suspect, w.since, w.evidence = i, now, probe.Clean(strings.TrimSpace(line), maxText)
	}
	if loginRE.MatchString(line) && w.login.IsZero() {
		w.login = now
	}
}

// pass notes a point of the boot, and what it contradicts.
func (w *watch) pass(m mark, now time.Time) {
	begins := m == markFirmware || m == markStart
	if w.suspect >= 0 && !symptoms[w.suspect].final {
		early := symptoms[w.suspect].code == dr.CodeGrubRescue || symptoms[w.suspect].code == dr.CodeNoBootable
		if begins || early {
			w.suspect = -1
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if begins && (w.greeted || w.awake) {
		// It was up, or on its way, and starts again: silence until its kernel runs.
		w.kernelAt, w.initAt, w.login, w.awake = time.Time{}, time.Time{}, time.Time{}, false
		if w.restart != nil {
			w.restart(probe.ErrRestarted)
		}
	}
	if m == markFirmware {
		return
	}
	if w.kernelAt.IsZero() {
		w.kernelAt = now
	}
	if m == markInit && w.initAt.IsZero() {
		w.initAt = now
	}
	if w.awake = true; w.talk != nil {
		w.talk.Wake()
	}
}

// diagnose says whether what is known is enough.
func (w *watch) diagnose(now time.Time) error {
	if w.diskError != nil {
		if err := w.diskError(); err != nil {
			return failed(dr.CodeDiskError, "the image could not be read: %s", probe.Clean(err.Error(), maxText))
		}
	}
	if w.suspect >= 0 && now.Sub(w.since) >= symptoms[w.suspect].settle {
		return w.symptom()
	}
	w.mu.Lock()
	greeted, talk := w.greeted, w.talk
	w.mu.Unlock()
	if !greeted && talk != nil && !w.login.IsZero() && now.Sub(w.login) >= w.limits.Login {
		return noAgent(talk, "a login prompt is shown")
	}
	return nil
}

// noAgent tells a guest without an agent from a channel that our side could not connect.
func noAgent(talk *probe.Conversation, sign string) error {
	if up, why := talk.Connected(); !up && why != nil {
		return &Unheld{dr.CodeInfrastructure, sign + ", but the test agent's port cannot be connected: " + why.Error()}
	}
	return failed(dr.CodeLoginNoAgent, "%s, but the test agent does not answer", sign)
}

func (w *watch) symptom() error {
	s := symptoms[w.suspect]
	return failed(s.code, "%s: %q", s.text, w.evidence)
}

// state asks the hypervisor whether the machine still runs.
func (w *watch) state(ctx context.Context, now time.Time) error {
	limited, cancel := context.WithTimeout(ctx, callLimit)
	state, why, err := w.machine.State(limited)
	cancel()
	switch {
	case errors.Is(err, vm.ErrGone):
		state, why, err = vm.Off, "the machine is gone", nil
	case err != nil:
		if w.hostless.IsZero() {
			w.hostless = now
		}
		if time.Since(w.hostless) > hostlessLimit {
			return &Unheld{dr.CodeInfrastructure, "the hypervisor does not answer: " + err.Error()}
		}
		return nil
	}
	w.hostless = time.Time{}
	if state != vm.Paused {
		w.paused = time.Time{}
	}
	switch state {
	case vm.Running:
		return nil
	case vm.Paused:
		return w.stopped(why, now)
	}
	// What it wrote last may say more than that it is off.
	if err := w.read(now); err == nil && w.suspect >= 0 {
		return w.symptom()
	}
	if state == vm.Crashed {
		if strings.Contains(strings.ToLower(why), "panic") {
			return failed(dr.CodePanic, "the kernel panicked")
		}
		return failed(dr.CodeDied, "the machine died: %s", orUnknown(why))
	}
	if why == "" {
		why = "the guest switched itself off"
	}
	return failed(dr.CodeDied, "%s", why)
}

// stopped judges a machine whose processors stand still.
func (w *watch) stopped(why string, now time.Time) error {
	reason := strings.ToLower(why)
	switch {
	case strings.Contains(reason, "no space"), strings.Contains(reason, "enospc"):
		return &Unheld{dr.CodeNoCapacity, "there is no room for what the machine writes: " + why}
	case strings.Contains(reason, "i/o error"), strings.Contains(reason, "ioerror"):
		return failed(dr.CodeDiskError, "the machine stopped because a disk could not be read or written: %s", why)
	case strings.Contains(reason, "panic"):
		return failed(dr.CodePanic, "the kernel panicked")
	case strings.Contains(reason, "watchdog"):
		return failed(dr.CodeDied, "the guest's watchdog stopped it")
	}
	if w.paused.IsZero() {
		w.paused = now
	}
	if now.Sub(w.paused) >= pausedLimit {
		return &Unheld{dr.CodeInfrastructure, "the machine was stopped from outside: " + orUnknown(why)}
	}
	return nil
}

// measure looks at what the machine has used.
func (w *watch) measure(ctx context.Context, now time.Time) {
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	if usage, ok := w.meter.read(limited, w.machine, now); ok && usage.ReadBytes != w.reads {
		w.reads, w.moved = usage.ReadBytes, now
	}
}

// stall ends the wait for a guest in which nothing moves any more: no output, no disk read, no picture that was not
// seen before (a cursor blinks).
func (w *watch) stall(ctx context.Context, now time.Time) error {
	w.mu.Lock()
	greeted := w.greeted
	w.mu.Unlock()
	if greeted {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	if w.photograph(limited) {
		w.moved = now
	}
	if still := now.Sub(w.moved); still >= w.limits.Stall {
		return failed(dr.CodeTimeout, "nothing has moved for %s: no output, no disk read, no change on the screen", still.Round(time.Second))
	}
	return nil
}

// photograph keeps a picture of the screen and says whether it is a new one.
func (w *watch) photograph(ctx context.Context) bool {
	shot, err := w.machine.Screenshot(ctx)
	if err != nil || len(shot) == 0 || len(shot) > maxScreen {
		return false
	}
	w.mu.Lock()
	w.screen = shot
	w.mu.Unlock()
	sum := sha256.Sum256(shot)
	fresh := !w.seen[sum]
	if fresh && len(w.seen) < maxPictures {
		w.seen[sum] = true
	}
	return fresh
}

const (
	maxText     = 300     // bytes of what is quoted of a guest in a result
	maxScreen   = 8 << 20 // bytes of a photograph
	maxPictures = 1 << 10 // different ones that are told apart
)

func orUnknown(why string) string {
	if why == "" {
		return "no reason is known"
	}
	return why
}
