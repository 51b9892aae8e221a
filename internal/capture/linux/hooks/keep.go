package hooks

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/dr"
)

// The keeper and the agent speak in lines of JSON over the keeper's standard input and output: one command, one answer.
//
//	begin   what is slow and holds nobody up: checkpoints
//	ready   hooks with "pre"
//	lock    nobody writes any more, for as long as the command says at most
//	unlock  they write again
//	end     unlock, the end of backup modes, hooks with "post"; the keeper ends
//
// An empty line says that the agent lives, and has no answer. The end of the input is an "end" that nobody hears, after the
// watchdog's.
type command struct {
	Do    string        `json:"do"`
	Limit time.Duration `json:"limit,omitempty"` // begin, end: of one hook; lock: of all that is held
}

// Report says what has become of the applications so far.
type Report struct {
	Applications []Application `json:"applications,omitempty"`
	Notes        []string      `json:"notes,omitempty"`
}

// Application is one of them.
type Application struct {
	dr.Application
	Uncovered bool `json:"uncovered,omitempty"` // there is no hook for it, so none has failed
}

// hook brings one application to rest: begin, then lock and unlock any number of times, then end. Every one of them comes
// back after about its limit. After an error of begin or lock nothing is held.
type hook interface {
	String() string
	begin(ctx context.Context, limit time.Duration) error
	lock(ctx context.Context, limit time.Duration) error
	unlock(ctx context.Context) error // nil: it was held all the time
	end(ctx context.Context, limit time.Duration) error
	stands() bool // somebody may have to wait for it while it is held
	notes() []string
}

// kept is a hook and what has become of it.
type kept struct {
	hook
	script bool
	begun  bool // so it has to be ended
	ready  bool // begin worked
	locked bool
	since  time.Time
	still  time.Duration // since then, until it was let go
	broken error         // why it is not, or was not, at rest
}

// keeper is the process. All of it runs in one goroutine but for what several applications do at once.
type keeper struct {
	root  string        // of what is looked at for databases
	dir   string        // of the server's own hooks
	limit time.Duration // of one hook
	hooks []*kept
	alone []Application // those that no hook is for
	said  []string
	over  bool // everything was let go as planned
}

// errNotHeld is for a capture that was not made under its last lock.
var errNotHeld = errors.New("nothing was held while the disks were read")

// Keep is the main function of the keeper's process: it serves the commands above. Hooks of the server's own lie in dir. thawed
// ends when the watchdog of a freeze has ended. A signal that would end it lets everything go first.
func Keep(dir string, in io.Reader, out io.Writer, thawed *os.File) error {
	return keep("/", dir, in, out, thawed)
}

func keep(root, dir string, in io.Reader, out io.Writer, thawed *os.File) error {
	unix.CloseOnExec(int(thawed.Fd()))
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	// What is started from here on is no more precious than anything else.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0)
	// It has to be able to run while the file system that it may be swapped out to stands still.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE); err != nil && os.Geteuid() == 0 {
		return fmt.Errorf("lock the keeper in memory: %w", err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	commands, ticks := make(chan command), make(chan struct{}, 1)
	go func() {
		defer close(commands)
		defer cancel(errors.New("the agent is gone"))
		for lines := bufio.NewScanner(in); lines.Scan(); {
			if len(lines.Bytes()) == 0 {
				select {
				case ticks <- struct{}{}:
				default: // while a command is carried out nobody asks whether the agent lives, but its end must be noticed
				}
				continue
			}
			var c command
			if json.Unmarshal(lines.Bytes(), &c) != nil {
				return
			}
			select {
			case commands <- c:
			case <-ctx.Done():
				return
			}
		}
	}()
	go func() {
		<-stop
		cancel(errors.New("the keeper was asked to end"))
	}()
	k := &keeper{root: root, dir: dir, limit: dr.DefaultHookLimit}
	if ended := k.serve(ctx, commands, ticks, json.NewEncoder(out)); !ended {
		k.abandon(thawed)
	}
	return nil
}

// serve carries out commands; false if they ended, or none came, before everything was let go.
func (k *keeper) serve(ctx context.Context, commands <-chan command, ticks <-chan struct{}, out *json.Encoder) bool {
	idle := time.NewTimer(idleLimit)
	held := time.NewTimer(0)
	<-held.C
	for {
		select {
		case <-ctx.Done():
			return false
		case <-idle.C:
			return false
		case <-held.C:
			k.unlock(ctx, errors.New("it was held for as long as it may be, and let go"))
		case <-ticks:
			idle.Reset(idleLimit)
		case c, ok := <-commands:
			switch {
			case !ok:
				return false
			case c.Do == "begin":
				k.begin(ctx, c.Limit)
			case c.Do == "ready":
				k.ready(ctx)
			case c.Do == "lock":
				k.lock(ctx)
				held.Reset(c.Limit)
			case c.Do == "unlock":
				held.Stop()
				k.unlock(ctx, errNotHeld)
			case c.Do == "end":
				k.end()
			default:
				return false
			}
			if ctx.Err() != nil && c.Do != "end" {
				return false
			}
			_ = out.Encode(k.report()) // an agent that is gone does not hear it
			if c.Do == "end" {
				return true
			}
			idle.Reset(idleLimit)
		}
	}
}

// begin finds the databases and carries out the slow part, which holds nobody up.
func (k *keeper) begin(ctx context.Context, limit time.Duration) {
	if limit > 0 {
		k.limit = min(limit, dr.MaxHookLimit)
	}
	for i, s := range find(k.root) {
		switch {
		case i >= maxDatabases:
			s.uncovered = fmt.Sprintf("only %d databases are brought to rest", maxDatabases)
			fallthrough
		case s.uncovered != "":
			if len(k.alone) < maxDatabases {
				k.alone = append(k.alone, Application{Application: dr.Application{Name: plain(s.String()), Reason: plain(s.uncovered)}, Uncovered: true})
			}
		case s.product == postgresql:
			k.hooks = append(k.hooks, &kept{hook: &postgres{server: s}})
		default:
			k.hooks = append(k.hooks, &kept{hook: &mysql{server: s}})
		}
	}
	k.all(func(h *kept) {
		h.start(ctx, k.limit)
	})
}

// ready runs the server's own hooks, one after the other.
func (k *keeper) ready(ctx context.Context) {
	own, ignored := scripts(k.dir)
	k.said = append(k.said, ignored...)
	for _, s := range own {
		if ctx.Err() != nil {
			return
		}
		h := &kept{hook: s, script: true, since: time.Now()}
		k.hooks = append(k.hooks, h)
		h.start(ctx, k.limit)
	}
}

func (h *kept) start(ctx context.Context, limit time.Duration) {
	h.begun = true
	h.broken = h.begin(ctx, limit)
	h.ready = h.broken == nil
}

// all does something for every hook at once.
func (k *keeper) all(what func(*kept)) {
	var group sync.WaitGroup
	for _, h := range k.hooks {
		group.Go(func() { what(h) })
	}
	group.Wait()
}

// lock lets nobody write. What could not be locked is tried again with the next freeze.
func (k *keeper) lock(ctx context.Context) {
	k.all(func(h *kept) {
		if !h.ready || h.locked {
			return
		}
		if !h.script {
			h.since = time.Now()
		}
		h.broken = h.lock(ctx, lockLimit)
		if h.locked = h.broken == nil; !h.locked {
			h.waited()
		}
	})
}

// unlock lets those that are locked go on, because of a trouble or as planned.
func (k *keeper) unlock(ctx context.Context, why error) {
	k.all(func(h *kept) {
		if !h.locked {
			return
		}
		h.locked = false
		err := h.unlock(context.WithoutCancel(ctx))
		if h.broken = why; err != nil {
			h.broken = fmt.Errorf("it was not held until the end: %w", err)
		}
		h.waited()
	})
}

// waited takes the time for which somebody may have had to wait for a database.
func (h *kept) waited() {
	if h.stands() && !h.script {
		h.still = time.Since(h.since)
	}
}

// end lets everything go: first what others wait for.
func (k *keeper) end() {
	ctx := context.Background()
	for _, h := range k.hooks {
		if !h.locked && h.broken == nil {
			h.broken = errNotHeld
		}
	}
	k.unlock(ctx, nil)
	k.over = true
	k.all(func(h *kept) {
		if h.begun && !h.script {
			h.finish(ctx, k.limit)
		}
	})
	for i := len(k.hooks) - 1; i >= 0; i-- {
		h := k.hooks[i]
		if !h.begun || !h.script {
			continue
		}
		before := h.broken
		h.finish(ctx, k.limit)
		h.still = time.Since(h.since)
		if before == nil && h.broken != nil {
			// The application was at rest; that it may still be is worth a note.
			k.said, h.broken = append(k.said, plain(h.broken.Error())), nil
		}
	}
}

// finish ends what was begun. The first trouble is the one to tell.
func (h *kept) finish(ctx context.Context, limit time.Duration) {
	h.begun = false
	if err := h.end(ctx, limit); err != nil && h.broken == nil {
		h.broken = err
	}
}

// abandon lets everything go after the agent. Locks at once: others wait for them. The server's own hooks only after the
// thaw, because they may write; and in the end even without one.
func (k *keeper) abandon(thawed io.Reader) {
	k.unlock(context.Background(), nil)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = io.Copy(io.Discard, thawed)
	}()
	select {
	case <-gone:
	case <-time.After(thawLimit):
	}
	k.end()
}

func (k *keeper) report() Report {
	r := Report{Applications: k.alone, Notes: k.said}
	for _, h := range k.hooks {
		a := Application{Application: dr.Application{Name: plain(h.String()), AtRest: h.broken == nil && k.over, Still: h.still}}
		if h.broken != nil {
			a.Reason = plain(h.broken.Error())
		}
		r.Applications = append(r.Applications, a)
		r.Notes = append(r.Notes, h.notes()...)
	}
	r.Notes = r.Notes[:min(len(r.Notes), maxNotes)]
	return r
}
