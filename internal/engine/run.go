package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
)

// Run is a run being carried out. Its methods and Step are called by the registered function, one after another.
type Run struct {
	engine *Engine
	id     string
	term   int64
	starts int64

	library dbos.Context            // ends when the engine closes
	work    context.Context         // ends when the engine closes or the run is cancelled
	cancel  context.CancelCauseFunc // of work

	undos     []undo
	undoing   bool
	cancelled bool  // a step was refused or cut short by Cancel; remembered with that step
	stopped   error // the engine closes: nothing more may be done or recorded
	changed   error // the function takes other steps than it did when the run began

	mu       sync.Mutex
	step     string // under way
	waiting  string // the resource the step waits for
	progress *Progress
}

type undo struct {
	name string
	do   func(ctx context.Context) error
}

// ID is the id the run was started under.
func (r *Run) ID() string { return r.id }

// Context ends when the run is cancelled (context.Cause is then ErrCancelled) or the engine closes. Steps get a context
// of their own.
func (r *Run) Context() context.Context { return r.work }

// Term is the fencing number of this start of the run: higher than that of every earlier start of every run. Whoever
// acts for a run refuses a term lower than one it has seen for the same thing.
func (r *Run) Term() int64 { return r.term }

// Report says how far the step under way has come. It is kept in memory only and may be called often, from any goroutine.
func (r *Run) Report(part string, done, total int64, unit string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.progress = &Progress{Part: part, Done: done, Total: total, Unit: unit}
}

// OnUndo says what takes the next step back. It is registered before that step, so that there is no instant at which
// the step was done and nobody knows how to undo it; and it must be right if the step never began or was cut short.
// Undos run, last first, as durable steps with retries, if the function returns an error or the run is cancelled; an
// undo that keeps failing is reported in the run's error and does not keep the others from running.
func (r *Run) OnUndo(name string, do func(ctx context.Context) error) {
	r.undos = append(r.undos, undo{name, do})
}

// outcome is how a run ended, as kept.
type outcome struct {
	State State  `json:"state"`
	Error string `json:"error,omitempty"`
}

// execute is the one workflow the library knows. It returns an error only when the run is to be left as it is.
func (e *Engine) execute(ctx dbos.Context, env envelope) (outcome, error) {
	id, err := dbos.GetWorkflowID(ctx)
	if err != nil {
		return outcome{}, err
	}
	r, marked, err := e.begin(ctx, id)
	if err != nil {
		return outcome{}, e.leave(ctx, id, err)
	}
	defer e.end(r)
	o := outcome{Cancelled, ErrCancelled.Error()}
	if !marked || r.starts > 1 {
		o = r.carryOut(env)
	}
	if r.stopped != nil || ctx.Err() != nil {
		return outcome{}, e.leave(ctx, id, r.stopped)
	}
	e.log.InfoContext(ctx, "run over", "operation", id, "kind", env.Kind, "state", o.State, "error", o.Error)
	return o, nil
}

// begin counts the start and makes the run known, so that Cancel finds it.
func (e *Engine) begin(ctx dbos.Context, id string) (r *Run, marked bool, err error) {
	r = &Run{engine: e, id: id, library: ctx}
	if r.term, r.starts, err = e.db.begin(ctx, id); err != nil {
		return nil, false, fmt.Errorf("count the start: %w", err)
	}
	r.work, r.cancel = context.WithCancelCause(ctx)
	e.mu.Lock()
	e.active[id] = r
	e.mu.Unlock()
	row, err := e.row(id)
	if err != nil {
		e.end(r)
		return nil, false, err
	}
	if _, marked = row.Attributes[attrCancel]; marked {
		r.cancel(ErrCancelled)
	}
	return r, marked, nil
}

func (e *Engine) end(r *Run) {
	r.cancel(nil)
	e.mu.Lock()
	delete(e.active, r.id)
	e.mu.Unlock()
}

// leave parks a run that can neither go on nor be said to be over, because the engine closes or its database does not
// answer, until the engine closes. Nothing is recorded, so that the next Launch carries it on.
func (e *Engine) leave(ctx dbos.Context, id string, err error) error {
	if ctx.Err() == nil {
		e.log.Error("run waits for a restart", "operation", id, "error", err)
		<-ctx.Done()
	}
	return ctx.Err()
}

// carryOut runs the function and, if it must be, the undos.
func (r *Run) carryOut(env envelope) outcome {
	e := r.engine
	e.mu.Lock()
	k, known := e.kinds[env.Kind]
	e.mu.Unlock()
	if err := r.mayGoOn(env, known); err != nil {
		return outcome{Failed, err.Error()}
	}
	err := r.call(func() error { return k.do(r, env.Input) })
	if r.stopped != nil {
		return outcome{}
	}
	if err == nil && r.changed != nil {
		err = r.changed
	}
	if err == nil && r.cancelled {
		err = ErrCancelled
	}
	if err == nil {
		return outcome{State: Succeeded}
	}
	o := outcome{State: Failed, Error: err.Error()}
	if r.cancelled {
		o.State = Cancelled
	}
	if failed := r.undoAll(); failed != nil {
		o.Error = o.Error + "; " + failed.Error()
	}
	return o
}

// mayGoOn refuses runs that this process cannot carry on rightly. Their undos are not known to it either.
func (r *Run) mayGoOn(env envelope, known bool) error {
	if !known {
		return fmt.Errorf("no %s is registered in this version", env.Kind)
	}
	if r.starts > 2*MaxStarts {
		return fmt.Errorf("given up after %d starts: neither it nor its undos came to an end", r.starts-1)
	}
	if env.Version == r.engine.version || r.starts == 1 {
		return nil
	}
	steps, err := dbos.GetWorkflowSteps(r.engine.dbos, r.id, dbos.WithStepsLimit(1), dbos.WithStepsLoadOutput(false))
	if err == nil && len(steps) == 0 {
		return nil
	}
	return fmt.Errorf("begun by version %s of its steps, which version %s cannot carry on: start it again",
		env.Version, r.engine.version)
}

// undoAll takes back what was done, last first.
func (r *Run) undoAll() error {
	r.undoing = true
	var errs []error
	for i := len(r.undos) - 1; i >= 0 && r.stopped == nil; i-- {
		u := r.undos[i]
		do := func(ctx context.Context) (json.RawMessage, error) { return nil, u.do(ctx) }
		name := "undo " + u.name
		var err error
		if r.changed != nil {
			// The steps of this run are not where they were: what is recorded cannot be told apart. Undos are safe to
			// repeat, so they run without a record.
			err = r.attempt(r.library, name, undoOptions, do).err(name)
		} else {
			err = r.take(name, undoOptions, do).err(name)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// undoOptions: an undo is tried for some minutes, because what it leaves behind nobody else may find.
var undoOptions = StepOptions{Limit: 10 * time.Minute, Attempts: 6, Backoff: 500 * time.Millisecond}

// call turns a panic into an error: one run must not take the others with it.
func (r *Run) call(do func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			r.engine.log.Error("run panicked", "operation", r.id, "panic", p, "stack", string(debug.Stack()))
			err = Permanent(fmt.Errorf("panic: %v", p))
		}
	}()
	return do()
}
