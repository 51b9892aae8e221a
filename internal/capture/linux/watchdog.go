package linux

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The watchdog is a process of its own, in its own session, that freezes file systems and thaws them again: when told to,
// at its deadline, when it is asked to end, or when whoever started it is gone, whichever comes first. It freezes as well
// as thaws so that it always knows exactly what it holds, and so that a freeze that comes through too late is undone by
// the one who asked for it. Lines over pipes:
//
//	→ arm NANOSECONDS   ← armed
//	→ freeze            ← frozen {…}
//	→ thaw              ← thawed {…}
//	→ (end of input): thaws and ends

// ioctls of linux/fs.h.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// outcome is what became of a freeze.
type outcome struct {
	Unsupported []int         `json:"unsupported,omitempty"` // file systems that know no freeze
	Failed      int           `json:"failed"`                // the one that could not be frozen; -1 none
	Error       string        `json:"error,omitempty"`
	Busy        bool          `json:"busy,omitempty"`    // somebody else has frozen it
	Expired     bool          `json:"expired,omitempty"` // the deadline came first
	Frozen      time.Duration `json:"frozen,omitempty"`  // from before the first freeze to after the last thaw
}

// frozenSystem can be frozen and thawed.
type frozenSystem interface {
	freeze() error
	thaw() error
}

type mountPoint struct{ fd int }

func (m mountPoint) freeze() error { return unix.IoctlSetInt(m.fd, fiFreeze, 0) }
func (m mountPoint) thaw() error   { return unix.IoctlSetInt(m.fd, fiThaw, 0) }

type watchdog struct {
	systems []frozenSystem

	mu      sync.Mutex
	holds   []bool
	started time.Time // of the first freeze
	ended   time.Time // of the last thaw
	over    bool      // no more freezing
	expired bool
}

// Watchdog is the main function of the watchdog process: it serves the lines above on its standard input and output. The
// file systems are the open files from descriptor 3 on, in the order of freezing; there are count of them.
func Watchdog(count int) error {
	// Signals that would end it are answered by a thaw, in run. Writing to a reader that is gone is no reason to die.
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	debug.SetGCPercent(-1)
	if err := Lock(); err != nil {
		return err
	}
	w := &watchdog{holds: make([]bool, count)}
	for i := range count {
		w.systems = append(w.systems, mountPoint{fd: 3 + i})
	}
	go func() {
		<-stop
		w.expire()
	}()
	return w.serve(os.Stdin, os.Stdout)
}

func (w *watchdog) serve(in io.Reader, out io.Writer) error {
	defer w.thaw()
	var frozen sync.WaitGroup
	defer frozen.Wait() // a freeze that comes through late thaws itself
	defer w.finish()
	answer := func(word string, o *outcome) {
		b, _ := json.Marshal(o)
		_, _ = fmt.Fprintf(out, "%s %s\n", word, b)
	}
	var deadline *time.Timer
	answer("ready", nil)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		command, argument, _ := strings.Cut(lines.Text(), " ")
		switch command {
		case "arm":
			limit, err := strconv.ParseInt(argument, 10, 64)
			if err != nil || limit <= 0 || deadline != nil {
				return fmt.Errorf("arm the watchdog: %q is no time limit", argument)
			}
			deadline = time.AfterFunc(time.Duration(limit), w.expire)
			defer deadline.Stop()
			answer("armed", nil)
		case "freeze":
			if deadline == nil {
				return errors.New("freeze: the watchdog has no deadline")
			}
			// Beside the loop: a freeze may hang, and the end of the input must be noticed all the same.
			frozen.Go(func() {
				o := w.freeze()
				answer("frozen", &o)
			})
		case "thaw":
			w.finish()
			frozen.Wait()
			o := w.thaw()
			answer("thawed", &o)
		default:
			return fmt.Errorf("the watchdog knows no command %q", command)
		}
	}
	return lines.Err()
}

// freeze freezes in order until all are frozen, one fails, or it is over.
func (w *watchdog) freeze() outcome {
	o := outcome{Failed: -1}
	for i, s := range w.systems {
		w.mu.Lock()
		if w.over {
			w.mu.Unlock()
			break
		}
		if w.started.IsZero() {
			w.started = time.Now()
		}
		w.mu.Unlock()
		err := s.freeze() // may take long, or never come back
		w.mu.Lock()
		if err == nil {
			if w.holds[i] = true; w.over {
				w.thawHeld()
			}
		}
		w.mu.Unlock()
		switch {
		case err == nil:
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
			o.Unsupported = append(o.Unsupported, i)
		default:
			w.thaw()
			o.Failed, o.Error, o.Busy = i, err.Error(), errors.Is(err, unix.EBUSY)
			return o
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	o.Expired = w.expired
	return o
}

// finish thaws what is frozen and forbids further freezing.
func (w *watchdog) finish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.thawHeld()
}

// expire thaws because the time is up.
func (w *watchdog) expire() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.expired = true
	w.thawHeld()
}

// thaw thaws what is frozen and says whether it was still held.
func (w *watchdog) thaw() outcome {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.thawHeld()
	o := outcome{Failed: -1, Expired: w.expired}
	if !w.started.IsZero() {
		o.Frozen = w.ended.Sub(w.started)
	}
	return o
}

// thawHeld thaws in the opposite order of freezing. The lock is held.
func (w *watchdog) thawHeld() {
	w.over = true
	for i := len(w.systems) - 1; i >= 0; i-- {
		if w.holds[i] {
			_ = w.systems[i].thaw() // an error means that it is not frozen any more: somebody else thawed it
			w.holds[i] = false
			w.ended = time.Now()
		}
	}
	if w.ended.IsZero() {
		w.ended = time.Now()
	}
}
