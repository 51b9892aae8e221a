package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
)

// envelope is what a run is started with, as kept.
type envelope struct {
	Kind    string          `json:"kind"`
	Version string          `json:"version"`
	Key     string          `json:"key,omitempty"`
	Input   json.RawMessage `json:"input"`
}

// The attributes of a run in the library's own table: what it is listed by, and whether it is to be cancelled.
const (
	attrKind   = "kind"
	attrKey    = "key"
	attrCancel = "cancel"
)

// StartOptions say what else matters about a run.
type StartOptions struct {
	// Key is what the run works on. Of two runs with one key, the later waits for the earlier. "": it shares nothing.
	Key string
	// Refuse: do not wait. If an unfinished run has the key, Start gives ErrBusy and nothing is started.
	Refuse bool
}

// Start starts a run of a registered kind under an id of the caller's. It returns as soon as the run is durable: it
// will be carried out, by this process or a later one. Under an id that was started before it does nothing. At most
// one StartOptions is given.
func Start[In any](ctx context.Context, e *Engine, name, id string, in In, options ...StartOptions) error {
	var o StartOptions
	if len(options) > 0 {
		o = options[0]
	}
	input, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("start %s %s: %w", name, id, err)
	}
	if err := e.start(ctx, name, id, reflect.TypeFor[In](), input, o); err != nil {
		return fmt.Errorf("start %s %s: %w", name, id, err)
	}
	return nil
}

func (e *Engine) start(ctx context.Context, name, id string, in reflect.Type, input json.RawMessage, o StartOptions) error {
	e.mu.Lock()
	k, known := e.kinds[name]
	open := e.launched && !e.closed
	e.mu.Unlock()
	switch {
	case !open:
		return ErrClosed
	case !known:
		return errors.New("no such kind of run is registered")
	case k.in != in:
		return fmt.Errorf("its input is a %s, not a %s", k.in, in)
	case id == "" || len(id) > MaxName || len(o.Key) > MaxName:
		return fmt.Errorf("give an id of 1 to %d bytes and a key no longer", MaxName)
	case len(input) > MaxRecord:
		return fmt.Errorf("its input is %d bytes: the most is %d", len(input), MaxRecord)
	}
	e.starting.Lock()
	defer e.starting.Unlock()
	before, err := e.Status(ctx, id)
	switch {
	case err == nil && before.Kind == name:
		return nil
	case err == nil:
		return fmt.Errorf("the id is that of a %s", before.Kind)
	case !errors.Is(err, ErrNotFound):
		return err
	}
	if o.Refuse && o.Key != "" {
		others, err := e.List(ctx, Filter{Key: o.Key, Unfinished: true, Limit: 1})
		if err != nil {
			return err
		}
		if len(others) > 0 {
			return fmt.Errorf("%w: %s has %s", ErrBusy, others[0].ID, o.Key)
		}
	}
	return e.enqueue(id, envelope{Kind: name, Version: e.version, Key: o.Key, Input: input})
}

// enqueue makes a run durable. Every run goes through one queue, partitioned by key; a run without a key has a
// partition of its own.
func (e *Engine) enqueue(id string, env envelope) error {
	partition := "key/" + env.Key
	if env.Key == "" {
		partition = "run/" + id
	}
	attributes := map[string]any{attrKind: env.Kind}
	if env.Key != "" {
		attributes[attrKey] = env.Key
	}
	_, err := dbos.Enqueue[outcome](e.dbos, queueName, workflowName, env, dbos.WithEnqueueWorkflowID(id),
		dbos.WithEnqueueQueuePartitionKey(partition), dbos.WithEnqueueAttributes(attributes))
	return err
}

// Cancel ends a run: the context of its running step ends with the cause ErrCancelled, no other step begins, its undos
// run, and its state becomes cancelled. It returns once this is durable, which is before the undos are through: Wait
// for them. A run that is over is left as it is; so is one that finishes all the same.
func (e *Engine) Cancel(ctx context.Context, id string) error {
	row, err := e.row(id)
	if err != nil {
		return fmt.Errorf("cancel run %s: %w", id, err)
	}
	if over(row.Status) {
		return nil
	}
	attributes := map[string]any{attrCancel: true}
	for _, name := range []string{attrKind, attrKey} {
		if v, ok := row.Attributes[name]; ok {
			attributes[name] = v
		}
	}
	// The library's own cancellation would refuse the undos too. Ours is a mark that every start of the run reads, and
	// it is set before we look for the run: either the run sees the mark, or we see the run.
	if err := dbos.SetWorkflowAttributes(e.dbos, id, attributes); err != nil {
		return fmt.Errorf("cancel run %s: %w", id, err)
	}
	e.mu.Lock()
	r := e.active[id]
	e.mu.Unlock()
	if r != nil {
		r.cancel(ErrCancelled)
	}
	e.log.InfoContext(ctx, "run to be cancelled", "operation", id)
	return nil
}
