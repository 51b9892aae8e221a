package engine

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
	"github.com/jackc/pgx/v5"

	store "github.com/musterdr/muster/internal/database"
)

// errFenced says that other hosts have given this one up: what it began is theirs.
var errFenced = errors.New("other hosts have given this one up and carry on its runs")

// host is one process among those that share a PostgreSQL database of runs. It has a lease, which it renews by beating.
//
// No clock is compared with another, not even with the database's: a host holds its lease for as long as its own
// monotonic clock says, counted from before its last beat; the others give it up when they have seen no beat for as long
// by theirs, and a third more. A host that is given up is *fenced*: its row says so, then its sessions are ended by the
// server, and any new one is refused when it connects. Only when none is left are its runs resumed elsewhere. So what a
// host that was stopped and wakes up would record comes too late, whatever its clock says.
type host struct {
	id    string // another at every start
	name  string
	lease time.Duration
	term  int64 // its fencing number; the oldest host leads
}

func newHost(name string, lease time.Duration) *host {
	var b [12]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic("engine: the system has no randomness: " + err.Error())
	}
	return &host{id: hex.EncodeToString(b[:]), name: name, lease: lease}
}

// session is what the host's sessions are called, by which the server finds them.
func (h *host) session() string { return sessionPrefix + h.id }

const sessionPrefix = "muster engine "

// admit refuses a connection of a host that was fenced.
func (h *host) admit(ctx context.Context, conn *pgx.Conn) error {
	var n int
	if err := conn.QueryRow(ctx, `SELECT count(*) FROM muster_engine_hosts WHERE id = $1 AND fenced = 0`, h.id).Scan(&n); err != nil {
		return err
	}
	if n == 0 {
		return errFenced
	}
	return nil
}

// join makes the host known. An earlier process of its name is dead, and is fenced at once.
func (h *host) join(ctx context.Context, conn *pgx.Conn) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	if err := tx.QueryRow(ctx, `UPDATE muster_engine_term SET term = term + 1 WHERE id = 1 RETURNING term`).Scan(&h.term); err != nil {
		return err
	}
	if h.name != "" {
		if _, err := tx.Exec(ctx, `UPDATE muster_engine_hosts SET fenced = 1 WHERE name = $1`, h.name); err != nil {
			return err
		}
	}
	_, err = tx.Exec(ctx, `INSERT INTO muster_engine_hosts (id, name, term, lease, beat, fenced) VALUES ($1, $2, $3, $4, 0, 0)`,
		h.id, h.name, h.term, h.lease.Milliseconds())
	if err != nil {
		return err
	}
	return tx.Commit(ctx)
}

// beat renews the lease.
func (db *database) beat(ctx context.Context) error {
	result, err := db.sql.ExecContext(ctx, `UPDATE muster_engine_hosts SET beat = beat + 1 WHERE id = $1 AND fenced = 0`, db.host.id)
	if err != nil {
		return err
	}
	if n, err := result.RowsAffected(); err != nil || n == 1 {
		return err
	}
	return errFenced
}

// leave gives the lease back: nothing is under way here any more.
func (db *database) leave(ctx context.Context) error {
	if !db.shared() {
		return nil
	}
	_, err := db.sql.ExecContext(ctx, `DELETE FROM muster_engine_hosts WHERE id = $1`, db.host.id)
	return err
}

// leads says whether this is the oldest host alive.
func (db *database) leads(ctx context.Context) (leads bool, err error) {
	if !db.shared() {
		return true, nil
	}
	err = db.again(ctx, func() error {
		return db.sql.QueryRowContext(ctx, `SELECT count(*) = 0 FROM muster_engine_hosts WHERE fenced = 0 AND term < $1`, db.host.term).Scan(&leads)
	})
	return leads, err
}

// pulse is the last beat of another host that this one has seen, and when.
type pulse struct {
	beat int64
	seen time.Time
}

// watch is what a host knows of the others.
type watch struct {
	pulses map[string]pulse
	last   time.Time           // when it last looked
	lost   map[string]struct{} // runs that are ours by the library's rows and that nobody here had begun when it last looked
}

// keep holds the lease until ctx ends, and looks after the runs of hosts that have lost theirs. Without the lease
// everything here stops.
func (e *Engine) keep(ctx context.Context) {
	lease := e.db.host.lease
	expired := time.AfterFunc(lease, func() { e.lose(ctx, errors.New("the database was out of reach for longer than the lease")) })
	defer expired.Stop()
	tick := time.NewTicker(lease / 12)
	defer tick.Stop()
	w := watch{pulses: map[string]pulse{}}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		began := time.Now()
		limited, cancel := context.WithTimeout(ctx, lease/3)
		err := e.db.beat(limited)
		cancel()
		switch {
		case errors.Is(err, errFenced):
			e.lose(ctx, err)
			return
		case err != nil:
			e.log.WarnContext(ctx, "the lease could not be renewed", "error", err)
			continue
		}
		expired.Reset(lease - time.Since(began))
		if e.launchedNow() {
			if err := e.reap(ctx, &w); err != nil && ctx.Err() == nil {
				e.log.WarnContext(ctx, "look after the runs of other hosts", "error", err)
			}
		}
	}
}

// lose stops the engine: another host may carry on its runs.
func (e *Engine) lose(ctx context.Context, cause error) {
	e.losing.Do(func() {
		e.log.ErrorContext(ctx, "engine stops: it lost its lease", "error", cause)
		close(e.lost)
		go func() { _ = e.Close(context.WithoutCancel(ctx)) }()
	})
}

// Limits of looking after other hosts.
const (
	endSessionsLimit = 10 * time.Second
	endSessionsEvery = 20 * time.Millisecond
)

// reap fences hosts that have not beaten for longer than their lease, and resumes what no living host carries out.
// One host at a time does it; the others' turn comes.
func (e *Engine) reap(ctx context.Context, w *watch) error {
	conn, err := e.db.sql.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	var mine bool
	if err := conn.QueryRowContext(ctx, `SELECT pg_try_advisory_lock($1, 0)`, aloneClass).Scan(&mine); err != nil || !mine {
		return err
	}
	defer func() {
		_, _ = conn.ExecContext(context.WithoutCancel(ctx), `SELECT pg_advisory_unlock($1, 0)`, aloneClass)
	}()
	if err := e.fence(ctx, conn, w); err != nil {
		return err
	}
	return e.resumeOrphans(ctx, conn, w)
}

// fence gives up hosts that do not beat any more.
func (e *Engine) fence(ctx context.Context, conn *sql.Conn, w *watch) error {
	now := time.Now()
	if now.Sub(w.last) > e.db.host.lease/2 {
		w.pulses = map[string]pulse{} // we were away ourselves: what we did not see then says nothing
	}
	w.last = now
	rows, err := conn.QueryContext(ctx, `SELECT id, name, lease, beat FROM muster_engine_hosts WHERE fenced = 0 AND id <> $1`, e.db.host.id)
	if err != nil {
		return err
	}
	defer rows.Close()
	var dead []string
	for rows.Next() {
		var id, name string
		var lease, beat int64
		if err := rows.Scan(&id, &name, &lease, &beat); err != nil {
			return err
		}
		p, known := w.pulses[id]
		switch {
		case !known || p.beat != beat:
			w.pulses[id] = pulse{beat, now}
		case now.Sub(p.seen) > time.Duration(lease)*time.Millisecond*4/3:
			e.log.WarnContext(ctx, "host given up: its lease has run out", "host", name, "id", id)
			dead = append(dead, id)
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for _, id := range dead {
		delete(w.pulses, id)
		if _, err := conn.ExecContext(ctx, `UPDATE muster_engine_hosts SET fenced = 1 WHERE id = $1`, id); err != nil {
			return err
		}
	}
	return nil
}

// resumeOrphans has the runs of fenced hosts, and those that no host knows of, carried on.
func (e *Engine) resumeOrphans(ctx context.Context, conn *sql.Conn, w *watch) error {
	fenced, err := ids(ctx, conn, `SELECT id FROM muster_engine_hosts WHERE fenced <> 0`)
	if err != nil {
		return err
	}
	for id := range fenced {
		if err := endSessions(ctx, conn, id); err != nil {
			return err
		}
	}
	orphans, err := e.orphans(ctx, conn, w)
	if err != nil {
		return err
	}
	for _, id := range orphans {
		if err := e.resume(ctx, id); err != nil {
			return err
		}
	}
	for id := range fenced {
		if _, err := conn.ExecContext(ctx, `DELETE FROM muster_engine_hosts WHERE id = $1`, id); err != nil {
			return err
		}
	}
	return nil
}

// orphans lists the runs in progress that no living host carries out. A run that is this host's by the library's rows,
// and that nobody here had begun already the last time, was lost on the way from its queue to us. One that is missed
// because the list moves while it is read is found the next time.
func (e *Engine) orphans(ctx context.Context, conn *sql.Conn, w *watch) ([]string, error) {
	var pending []dbos.WorkflowStatus
	for offset := 0; ; offset += listPage {
		page, err := dbos.ListWorkflows(e.dbos, dbos.WithFilterStatus(dbos.WorkflowStatusPending), dbos.WithFilterLimit(listPage),
			dbos.WithFilterOffset(offset), dbos.WithFilterLoadInput(false), dbos.WithFilterLoadOutput(false))
		if err != nil {
			return nil, err
		}
		pending = append(pending, page...)
		if len(page) < listPage {
			break
		}
	}
	// Read after the runs: whoever has begun one of them had joined before.
	alive, err := ids(ctx, conn, `SELECT id FROM muster_engine_hosts WHERE fenced = 0`)
	if err != nil {
		return nil, err
	}
	before := w.lost
	w.lost = map[string]struct{}{}
	var out []string
	for _, run := range pending {
		_, living := alive[run.ExecutorID]
		_, again := before[run.ID]
		switch {
		case !living:
			out = append(out, run.ID)
		case run.ExecutorID != e.db.host.id || e.has(run.ID):
		case again:
			out = append(out, run.ID)
		default:
			w.lost[run.ID] = struct{}{}
		}
	}
	return out, nil
}

// resume puts an unfinished run back into the queue.
func (e *Engine) resume(ctx context.Context, id string) error {
	if _, err := dbos.ResumeWorkflow[outcome](e.dbos, id, dbos.WithResumeQueue(queueName)); err != nil {
		return fmt.Errorf("resume run %s: %w", id, err)
	}
	e.log.InfoContext(ctx, "run resumed", "operation", id)
	return nil
}

// endSessions ends what a fenced host has open with the server, and waits until nothing is left. New sessions are
// refused: see admit.
func endSessions(ctx context.Context, conn *sql.Conn, id string) error {
	limited, cancel := context.WithTimeout(ctx, endSessionsLimit)
	defer cancel()
	tick := time.NewTicker(endSessionsEvery)
	defer tick.Stop()
	name := (&host{id: id}).session()
	for {
		var left int
		err := conn.QueryRowContext(limited, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1`, name).Scan(&left)
		if err != nil {
			return fmt.Errorf("end the sessions of a host that was given up: %w", err)
		}
		if left == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-limited.Done():
			return errors.New("end the sessions of a host that was given up: the server does not end them")
		}
	}
}

func ids(ctx context.Context, conn *sql.Conn, query string) (map[string]struct{}, error) {
	rows, err := conn.QueryContext(ctx, query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out := map[string]struct{}{}
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, err
		}
		out[id] = struct{}{}
	}
	return out, rows.Err()
}

// tellEvery is how often other hosts are told how far runs have come, and how soon they reach a run to cancel it.
const tellEvery = 500 * time.Millisecond

// converse tells other hosts how far this one's runs have come, and hears which of them are to be cancelled.
func (e *Engine) converse(ctx context.Context) {
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	told := map[string]doing{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		runs := e.underWay()
		for id := range told {
			if runs[id] == nil {
				delete(told, id)
			}
		}
		if len(runs) == 0 {
			continue
		}
		if err := e.exchange(ctx, runs, told); err != nil && ctx.Err() == nil && !store.Transient(err) {
			e.log.WarnContext(ctx, "tell other hosts of runs", "error", err)
		}
	}
}

func (e *Engine) exchange(ctx context.Context, runs map[string]*Run, told map[string]doing) error {
	names := make([]string, 0, len(runs))
	for id, r := range runs {
		names = append(names, id)
		d := r.doing()
		if before, ok := told[id]; ok && before.same(d) {
			continue
		}
		if err := e.db.tell(ctx, id, r.term, d); err != nil {
			return err
		}
		told[id] = d
	}
	rows, err := dbos.ListWorkflows(e.dbos, dbos.WithFilterWorkflowIDs(names...), dbos.WithFilterLoadInput(false), dbos.WithFilterLoadOutput(false))
	if err != nil {
		return err
	}
	for _, row := range rows {
		if _, marked := row.Attributes[attrCancel]; marked {
			runs[row.ID].cancel(ErrCancelled)
		}
	}
	return nil
}

// same says whether two doings look the same.
func (d doing) same(other doing) bool {
	if d.Step != other.Step || d.Waiting != other.Waiting || (d.Progress == nil) != (other.Progress == nil) {
		return false
	}
	return d.Progress == nil || *d.Progress == *other.Progress
}

// doing is how far the run has come.
func (r *Run) doing() doing {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := doing{Step: r.step, Waiting: r.waiting}
	if r.progress != nil {
		p := *r.progress
		d.Progress = &p
	}
	return d
}

func (e *Engine) launchedNow() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.launched && !e.closed
}

// underWay gives the runs this process carries out.
func (e *Engine) underWay() map[string]*Run {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make(map[string]*Run, len(e.active))
	for id, r := range e.active {
		out[id] = r
	}
	return out
}

// has says whether the library has handed a run to this process.
func (e *Engine) has(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, ok := e.entered[id]
	return ok
}
