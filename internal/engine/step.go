package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
	"github.com/sethvargo/go-retry"
)

// Defaults and limits of steps.
const (
	DefaultStepLimit = time.Hour
	DefaultBackoff   = time.Second
	MaxBackoff       = time.Minute
)

// StepOptions say how a step is tried.
type StepOptions struct {
	Limit    time.Duration // of one attempt; its context ends then. 0: DefaultStepLimit
	Attempts int           // how often it is tried in all; 0: once
	Backoff  time.Duration // before the second attempt, doubled before each later one up to MaxBackoff; 0: DefaultBackoff
	// Needs names one of Config.Resources: the step waits until one is free, and has it until it ends. Waiting does not
	// count towards Limit.
	Needs string
}

// Step carries out one part of a run. Its result is remembered when it ends: after a restart Step returns it without
// calling do again. What do returns goes through JSON, also the first time, so that both times give the same; an error
// is remembered as text. What the function must tell apart belongs into Out. Of the errors only ErrCancelled can be
// matched: then the run is being cancelled, and the function should return.
func Step[Out any](r *Run, name string, o StepOptions, do func(ctx context.Context) (Out, error)) (Out, error) {
	var out Out
	rec := r.take(name, o, func(ctx context.Context) (json.RawMessage, error) {
		v, err := do(ctx)
		if err != nil {
			return nil, err
		}
		body, err := json.Marshal(v)
		if err != nil {
			return nil, Permanent(err)
		}
		return body, nil
	})
	if err := rec.err(name); err != nil {
		return out, err
	}
	if err := json.Unmarshal(rec.Value, &out); err != nil {
		return out, fmt.Errorf("read the result of step %s: %w", name, err)
	}
	return out, nil
}

// Permanent marks an error that another attempt would only repeat.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanent{err}
}

type permanent struct{ error }

func (p *permanent) Unwrap() error { return p.error }

// record is how a step ended, as kept. cause is for what is not kept: the engine closes, or the steps have changed.
type record struct {
	Value     json.RawMessage `json:"value,omitempty"`
	Error     string          `json:"error,omitempty"`
	Cancelled bool            `json:"cancelled,omitempty"`
	cause     error
}

func (rec record) err(step string) error {
	switch {
	case rec.cause != nil:
		return fmt.Errorf("step %s: %w", step, rec.cause)
	case rec.Cancelled && rec.Error != "":
		return fmt.Errorf("step %s: %w (%s)", step, ErrCancelled, rec.Error)
	case rec.Cancelled:
		return fmt.Errorf("step %s: %w", step, ErrCancelled)
	case rec.Error != "":
		return fmt.Errorf("step %s: %s", step, rec.Error)
	}
	return nil
}

// take gives the remembered end of a step or, if there is none, carries it out and remembers.
func (r *Run) take(name string, o StepOptions, do func(ctx context.Context) (json.RawMessage, error)) record {
	if r.stopped != nil {
		return record{cause: r.stopped}
	}
	if r.changed != nil {
		return record{cause: r.changed}
	}
	rec, err := dbos.RunAsStep(r.library, func(ctx context.Context) (record, error) {
		return r.attempt(ctx, name, o, do), nil
	}, dbos.WithStepName(name))
	switch {
	case errors.Is(err, &dbos.Error{Code: dbos.ErrorCodeUnexpectedStep}):
		r.changed = fmt.Errorf("the run's steps are not those it began with: %w", err)
		return record{cause: r.changed}
	case err != nil:
		r.stopped = err
		return record{cause: r.stopped}
	}
	r.cancelled = r.cancelled || rec.Cancelled
	return rec
}

// attempt tries a step until it succeeds, may not be tried again, or the run is cancelled. lib ends only when the engine
// closes; undos go on although the run is cancelled.
func (r *Run) attempt(lib context.Context, name string, o StepOptions, do func(ctx context.Context) (json.RawMessage, error)) record {
	ctx, stop := context.WithCancelCause(context.WithValue(lib, runKey{}, r.id))
	defer stop(nil)
	if !r.undoing {
		defer context.AfterFunc(r.work, func() { stop(context.Cause(r.work)) })()
		switch {
		case r.work.Err() != nil:
			return record{Cancelled: true}
		case r.starts > MaxStarts:
			return record{Error: fmt.Sprintf("given up: the run was started %d times and its process died each time", r.starts-1)}
		}
	}
	r.under(name, "")
	defer r.under("", "")
	began := time.Now()
	r.engine.log.DebugContext(ctx, "step begins", "step", name, "term", r.term)
	defer func() { r.engine.log.DebugContext(ctx, "step over", "step", name, "took", time.Since(began)) }()
	release, err := r.acquire(ctx, name, o.Needs)
	if err != nil {
		return record{Error: err.Error(), Cancelled: errors.Is(context.Cause(ctx), ErrCancelled)}
	}
	defer release()

	var value json.RawMessage
	err = retry.Do(ctx, o.backoff(), func(ctx context.Context) error {
		v, err := r.once(ctx, o, do)
		var final *permanent
		switch {
		case err == nil && len(v) > MaxRecord:
			return fmt.Errorf("its result is %d bytes: the most is %d", len(v), MaxRecord)
		case err == nil:
			value = v
			return nil
		case errors.As(err, &final) || ctx.Err() != nil:
			return err
		}
		r.engine.log.WarnContext(ctx, "step failed", "step", name, "error", err)
		return retry.RetryableError(err)
	})
	if err != nil {
		return record{Error: err.Error(), Cancelled: errors.Is(context.Cause(ctx), ErrCancelled)}
	}
	return record{Value: value}
}

type runKey struct{}

// RunOf gives the id of the run whose step a context was made for, "" if it was made for none. It is for telling what was
// done for which run, as in logs.
func RunOf(ctx context.Context) string {
	id, _ := ctx.Value(runKey{}).(string)
	return id
}

// once is one attempt within its limit.
func (r *Run) once(ctx context.Context, o StepOptions, do func(ctx context.Context) (json.RawMessage, error)) (v json.RawMessage, err error) {
	limit := o.Limit
	if limit <= 0 {
		limit = DefaultStepLimit
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = r.call(func() error {
		var err error
		v, err = do(limited)
		return err
	})
	if err != nil && ctx.Err() == nil && limited.Err() != nil {
		err = fmt.Errorf("it took longer than %s: %w", limit, err)
	}
	return v, err
}

func (o StepOptions) backoff() retry.Backoff {
	base := o.Backoff
	if base <= 0 {
		base = DefaultBackoff
	}
	return retry.WithMaxRetries(uint64(max(o.Attempts, 1)-1), retry.WithJitterPercent(5,
		retry.WithCappedDuration(MaxBackoff, retry.NewExponential(base))))
}

// acquire waits for a free one of a resource.
func (r *Run) acquire(ctx context.Context, step, resource string) (release func(), err error) {
	if resource == "" {
		return func() {}, nil
	}
	slots, ok := r.engine.resources[resource]
	if !ok {
		return nil, fmt.Errorf("it needs %q, of which Config.Resources says nothing", resource)
	}
	r.under(step, resource)
	select {
	case slots <- struct{}{}:
		r.under(step, "")
		return func() { <-slots }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for %s: %w", resource, context.Cause(ctx))
	}
}

// under says which step is under way, and what it waits for.
func (r *Run) under(step, resource string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if step != r.step {
		r.progress = nil
	}
	r.step, r.waiting = step, resource
}
