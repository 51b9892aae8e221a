package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
)

// State is where a run stands.
type State string

// The states of a run; see the package comment.
const (
	Queued    State = "queued"
	Running   State = "running"
	Succeeded State = "succeeded"
	Failed    State = "failed"
	Cancelled State = "cancelled"
)

// Over says whether nothing more will happen to the run.
func (s State) Over() bool { return s == Succeeded || s == Failed || s == Cancelled }

// Status is a run as it stands.
type Status struct {
	ID         string    `json:"id"`
	Kind       string    `json:"kind"`
	Key        string    `json:"key,omitempty"`
	State      State     `json:"state"`
	Error      string    `json:"error,omitempty"` // of a failed or cancelled run; also names undos that failed
	Cancelling bool      `json:"cancelling,omitempty"`
	Created    time.Time `json:"created"`
	Started    time.Time `json:"started,omitzero"` // the last start
	Finished   time.Time `json:"finished,omitzero"`
	Starts     int64     `json:"starts,omitempty"`   // times it was started by a process; only from Status and Wait
	Term       int64     `json:"term,omitempty"`     // of its last start; only from Status and Wait
	Host       string    `json:"host,omitempty"`     // that carries it out, where several may
	Step       string    `json:"step,omitempty"`     // under way
	Waiting    string    `json:"waiting,omitempty"`  // the resource that step waits for
	Progress   *Progress `json:"progress,omitempty"` // of that step
}

// Progress is how far the step under way has come.
type Progress struct {
	Part  string `json:"part"`
	Done  int64  `json:"done"`
	Total int64  `json:"total"` // 0: not known
	Unit  string `json:"unit"`
}

// StepStatus is a finished step.
type StepStatus struct {
	Name     string    `json:"name"`
	Error    string    `json:"error,omitempty"`
	Started  time.Time `json:"started"`
	Finished time.Time `json:"finished"`
}

// Filter narrows List.
type Filter struct {
	Kind       string
	Key        string
	Unfinished bool // only queued and running ones
	Limit      int  // newest first; 0: DefaultList
}

// DefaultList is how many runs List gives unless told.
const DefaultList = 100

const listPage = 200 // rows read at once

// Status gives one run. ErrNotFound if none was started under the id, or it was pruned.
func (e *Engine) Status(ctx context.Context, id string) (Status, error) {
	row, err := e.row(id)
	if err != nil {
		return Status{}, fmt.Errorf("look at run %s: %w", id, err)
	}
	st, err := e.db.stands(ctx, id)
	if err != nil {
		return Status{}, fmt.Errorf("look at run %s: %w", id, err)
	}
	s := e.status(row, st)
	s.Starts, s.Term = st.starts, st.term
	if s.Cancelling && s.State == Queued && st.starts == 0 {
		// It will be let out of the queue in its turn and do nothing; nobody need wait for that.
		s.State, s.Cancelling, s.Error = Cancelled, false, ErrCancelled.Error()
	}
	return s, nil
}

// List gives runs, newest first.
func (e *Engine) List(ctx context.Context, f Filter) ([]Status, error) {
	limit := f.Limit
	if limit <= 0 {
		limit = DefaultList
	}
	options := []dbos.ListWorkflowsOption{dbos.WithFilterSortDesc(), dbos.WithFilterLimit(listPage), dbos.WithFilterLoadInput(false)}
	var unfinished []string
	if f.Unfinished {
		var err error
		if unfinished, err = e.unfinished(ctx, f.Key); err != nil {
			return nil, fmt.Errorf("list runs: %w", err)
		}
		options = append(options, dbos.WithFilterStatus(dbos.WorkflowStatusEnqueued, dbos.WorkflowStatusPending))
	}
	elsewhere, err := e.db.doings(ctx)
	if err != nil {
		return nil, fmt.Errorf("list runs: %w", err)
	}
	out := []Status{}
	for offset := 0; ; offset += listPage {
		if err := e.open(); err != nil {
			return nil, fmt.Errorf("list runs: %w", err)
		}
		page := dbos.WithFilterOffset(offset)
		if f.Unfinished {
			if offset >= len(unfinished) {
				return out, nil
			}
			page = dbos.WithFilterWorkflowIDs(unfinished[offset:min(offset+listPage, len(unfinished))]...)
		}
		rows, err := dbos.ListWorkflows(e.dbos, append(options, page)...)
		if err != nil {
			return nil, fmt.Errorf("list runs: %w", err)
		}
		for _, row := range rows {
			// The library filters by attributes on PostgreSQL only, so kind and key are compared here.
			s := e.status(row, elsewhere[row.ID])
			if (f.Kind == "" || s.Kind == f.Kind) && (f.Key == "" || s.Key == f.Key) {
				out = append(out, s)
			}
			if len(out) == limit {
				return out, nil
			}
		}
		if err := ctx.Err(); err != nil || !f.Unfinished && len(rows) < listPage {
			return out, err
		}
	}
}

// Steps gives the finished steps of a run, in order; undos are among them as "undo NAME".
func (e *Engine) Steps(_ context.Context, id string) ([]StepStatus, error) {
	if err := e.open(); err != nil {
		return nil, fmt.Errorf("list the steps of run %s: %w", id, err)
	}
	steps, err := dbos.GetWorkflowSteps(e.dbos, id)
	if err != nil {
		return nil, fmt.Errorf("list the steps of run %s: %w", id, err)
	}
	out := make([]StepStatus, 0, len(steps))
	for _, s := range steps {
		var rec record
		if body, ok := s.Output.(string); ok {
			_ = json.Unmarshal([]byte(body), &rec)
		}
		step := StepStatus{Name: s.StepName, Started: s.StartedAt, Finished: s.CompletedAt}
		if err := rec.err(s.StepName); err != nil {
			step.Error = err.Error()
		}
		out = append(out, step)
	}
	return out, nil
}

// waitEvery is how often Wait looks.
const waitEvery = 50 * time.Millisecond

// Wait waits until a run is over and gives how it ended. An error means that the wait ended, not the run.
func (e *Engine) Wait(ctx context.Context, id string) (Status, error) {
	tick := time.NewTicker(waitEvery)
	defer tick.Stop()
	for {
		s, err := e.Status(ctx, id)
		if err != nil || s.State.Over() {
			return s, err
		}
		select {
		case <-ctx.Done():
			return s, fmt.Errorf("wait for run %s: %w", id, ctx.Err())
		case <-tick.C:
		}
	}
}

// pruneBatch bounds one transaction of Prune.
const pruneBatch = 100

// Prune forgets runs that were over before an instant and gives how many. Their ids may be started anew.
func (e *Engine) Prune(ctx context.Context, before time.Time) (n int, err error) {
	for {
		if err := e.open(); err != nil {
			return n, fmt.Errorf("prune runs: %w", err)
		}
		rows, err := dbos.ListWorkflows(e.dbos, dbos.WithFilterCompletedBefore(before), dbos.WithFilterLimit(pruneBatch),
			dbos.WithFilterStatus(finished...), dbos.WithFilterLoadInput(false), dbos.WithFilterLoadOutput(false))
		if err != nil {
			return n, fmt.Errorf("prune runs: %w", err)
		}
		ids := make([]string, 0, len(rows))
		for _, row := range rows {
			if err := e.db.forget(ctx, row.ID); err != nil {
				return n, fmt.Errorf("prune run %s: %w", row.ID, err)
			}
			ids = append(ids, row.ID)
		}
		if len(ids) == 0 {
			return n, nil
		}
		if err := dbos.DeleteWorkflows(e.dbos, ids); err != nil {
			return n, fmt.Errorf("prune runs: %w", err)
		}
		n += len(ids)
		if err := ctx.Err(); err != nil {
			return n, err
		}
	}
}

var finished = []dbos.WorkflowStatusType{dbos.WorkflowStatusSuccess, dbos.WorkflowStatusError, dbos.WorkflowStatusCancelled,
	dbos.WorkflowStatusMaxRecoveryAttemptsExceeded}

func over(s dbos.WorkflowStatusType) bool {
	for _, f := range finished {
		if s == f {
			return true
		}
	}
	return false
}

func (e *Engine) open() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return ErrClosed
	}
	return nil
}

// row reads a run's row of the library.
func (e *Engine) row(id string) (dbos.WorkflowStatus, error) {
	if err := e.open(); err != nil {
		return dbos.WorkflowStatus{}, err
	}
	rows, err := dbos.ListWorkflows(e.dbos, dbos.WithFilterWorkflowIDs(id), dbos.WithFilterLoadInput(false))
	if err != nil {
		return dbos.WorkflowStatus{}, err
	}
	if len(rows) == 0 {
		return dbos.WorkflowStatus{}, ErrNotFound
	}
	return rows[0], nil
}

// status reads our states out of the library's. Its ERROR, CANCELLED and MAX_RECOVERY… are none that we write; they
// are what is left when a run's own input cannot be read, or someone used the library's tools on it.
func (e *Engine) status(row dbos.WorkflowStatus, st standing) Status {
	s := Status{ID: row.ID, Created: row.CreatedAt, Started: row.StartedAt, Finished: row.CompletedAt}
	s.Kind, _ = row.Attributes[attrKind].(string)
	s.Key, _ = row.Attributes[attrKey].(string)
	_, marked := row.Attributes[attrCancel]
	s.Cancelling = marked && !over(row.Status)
	switch row.Status {
	case dbos.WorkflowStatusEnqueued, dbos.WorkflowStatusDelayed:
		s.State = Queued
	case dbos.WorkflowStatusPending:
		s.State = Running
	case dbos.WorkflowStatusSuccess:
		var o outcome
		body, _ := row.Output.(string)
		if err := json.Unmarshal([]byte(body), &o); err != nil {
			o = outcome{Failed, "its outcome cannot be read"}
		}
		s.State, s.Error = o.State, o.Error
	case dbos.WorkflowStatusCancelled:
		s.State, s.Error = Cancelled, "cancelled with the workflow library's own tools; nothing was undone"
	default:
		s.State, s.Error = Failed, fmt.Sprintf("ended by the workflow library as %s: %v", row.Status, row.Error)
	}
	if s.State.Over() {
		return s
	}
	s.Host = st.host
	d := st.doing
	e.mu.Lock()
	r := e.active[row.ID]
	e.mu.Unlock()
	if r != nil {
		s.State, d = Running, r.doing()
	}
	if s.State == Running {
		s.Step, s.Waiting, s.Progress = d.Step, d.Waiting, d.Progress
	}
	return s
}
