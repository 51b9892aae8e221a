package master

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
)

// How often what takes a while is looked at again, however often it is asked for.
const (
	spaceEvery  = 5 * time.Minute
	hostEvery   = time.Minute
	healthEvery = 2 * time.Second
)

// Limits of health.
const (
	checkHealth   = 10 * time.Second // a part that has not answered by then does not work
	aliveLimit    = 15 * time.Minute // since the scheduler last came round
	leastFree     = 1 << 30          // bytes free in the store
	maxOperations = 20_000           // unfinished ones that are counted
)

var _ api.Observer = (*Master)(nil)

// observed is what is remembered between two looks. Each part is locked while it is looked at, so that who asks meanwhile waits for
// the same answer.
type observed struct {
	figures sync.Mutex
	tally   catalog.Tally
	space   []api.StoreFigures
	spaceAt time.Time

	checks sync.Mutex
	health api.Health

	diagnosis sync.Mutex
	host      []api.Finding
	hostAt    time.Time
}

// Figures implements api.Observer. Everything is read from the catalog and the engine; what happened since the last call is added
// to what happened before.
func (m *Master) Figures(ctx context.Context) (api.Figures, error) {
	m.observed.figures.Lock()
	defer m.observed.figures.Unlock()
	out := api.Figures{At: m.Now(), Started: m.started}
	var err error
	if out.Servers, err = m.serverFigures(ctx); err != nil {
		return out, err
	}
	if out.Operations, err = m.operationFigures(ctx); err != nil {
		return out, err
	}
	if out.Tickets, err = m.Catalog.OpenProblems(ctx); err != nil {
		return out, err
	}
	active, err := m.Catalog.Invocations(ctx, false)
	if err != nil {
		return out, err
	}
	out.Invocations = len(active)
	if m.observed.tally, err = m.Catalog.Tally(ctx, m.observed.tally); err != nil {
		return out, err
	}
	out.Since = counts(m.observed.tally)
	if out.Stores, err = m.spaceFigures(ctx); err != nil {
		return out, err
	}
	out.Nodes, err = m.nodes(ctx)
	return out, err
}

func (m *Master) serverFigures(ctx context.Context) ([]api.ServerFigures, error) {
	standings, err := m.Catalog.Figures(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]api.ServerFigures, 0, len(standings))
	for _, s := range standings {
		out = append(out, api.ServerFigures{Name: s.Server.Name, Customer: s.Server.Customer, Promised: s.Server.Objectives,
			Created: s.Server.Created, LKG: s.LKG, Newest: s.Newest, Outcome: s.Outcome})
	}
	return out, nil
}

func (m *Master) operationFigures(ctx context.Context) ([]api.OperationFigures, error) {
	unfinished, err := m.Engine.List(ctx, engine.Filter{Unfinished: true, Limit: maxOperations})
	if err != nil {
		return nil, err
	}
	n := map[api.OperationFigures]int{}
	for _, s := range unfinished {
		n[api.OperationFigures{Kind: s.Kind, State: api.OperationState(s.State)}]++
	}
	// Every kind is there, at nought too: a series that comes and goes cannot be told from one that is broken.
	var out []api.OperationFigures
	for _, kind := range kinds {
		for _, state := range []api.OperationState{api.OperationQueued, api.OperationRunning} {
			of := api.OperationFigures{Kind: kind, State: state}
			of.N = n[of]
			out = append(out, of)
		}
	}
	return out, nil
}

func counts(t catalog.Tally) api.Counts {
	out := api.Counts{Verdicts: map[dr.Outcome]int64{}, Snapshots: map[dr.SnapshotKind]api.SnapshotCounts{},
		Arrivals:   map[dr.SnapshotKind]api.ArrivalCounts{},
		Promotions: t.Promotions, Expired: t.Expired, Invocations: t.Invocations}
	for _, o := range []dr.Outcome{dr.Pass, dr.Fail, dr.Blocked, dr.Inconclusive} {
		out.Verdicts[o] = t.Verdicts[o]
	}
	for _, kind := range []dr.SnapshotKind{dr.SnapshotImage, dr.SnapshotData} {
		out.Snapshots[kind], out.Arrivals[kind] = api.SnapshotCounts(t.Snapshots[kind]), api.ArrivalCounts(t.Arrivals[kind])
	}
	return out
}

func (m *Master) spaceFigures(ctx context.Context) ([]api.StoreFigures, error) {
	now := m.Now()
	if now.Sub(m.observed.spaceAt) <= spaceEvery && !now.Before(m.observed.spaceAt) {
		return m.observed.space, nil
	}
	var out []api.StoreFigures
	err := m.eachStore(ctx, func(st oneStore) error {
		space, err := st.Space(ctx)
		if err == nil {
			out = append(out, api.StoreFigures{Customer: st.Customer, At: now, Bytes: space.Bytes, Free: space.Free})
		}
		return err
	})
	if len(out) == 0 || out[0].Customer != "" {
		return nil, err // the installation's own is missing
	}
	if err != nil {
		m.Log.ErrorContext(ctx, "measure stores", "error", err)
	}
	m.observed.space, m.observed.spaceAt = out, now
	return out, nil
}

// Health implements api.Observer.
func (m *Master) Health(ctx context.Context) api.Health {
	m.observed.checks.Lock()
	defer m.observed.checks.Unlock()
	ctx = context.WithoutCancel(ctx) // the answer is others' too
	now := m.Now()
	if age := now.Sub(m.observed.health.At); age >= 0 && age < healthEvery {
		return m.observed.health
	}
	checks := []func(context.Context) api.HealthCheck{
		timed("scheduler", m.checkScheduler), timed("engine", m.checkEngine), timed("catalog", m.checkCatalog),
		timed("store", m.checkStore), timed("silo", m.checkSilo)}
	if m.Nodes != nil {
		checks = append(checks, timed("nodes", m.checkNodes))
	}
	h := api.Health{Alive: true, Ready: true, At: now, Checks: make([]api.HealthCheck, len(checks))}
	var all sync.WaitGroup
	for i, check := range checks {
		all.Go(func() { h.Checks[i] = check(ctx) })
	}
	all.Wait()
	for i, c := range h.Checks {
		h.Ready = h.Ready && c.OK
		h.Alive = h.Alive && (c.OK || i > 1) // only the scheduler and the engine are mended by a new start
	}
	m.observed.health = h
	return h
}

// timed runs one check, and takes one that does not come back for one that failed. What hangs is left hanging.
func timed(name string, check func(context.Context) (string, error)) func(context.Context) api.HealthCheck {
	return func(ctx context.Context) api.HealthCheck {
		ctx, cancel := context.WithTimeout(ctx, checkHealth)
		defer cancel()
		start := time.Now()
		done := make(chan api.HealthCheck, 1)
		go func() {
			detail, err := check(ctx)
			c := api.HealthCheck{Name: name, OK: err == nil, Detail: detail}
			if err != nil {
				c.Detail = err.Error()
			}
			done <- c
		}()
		var c api.HealthCheck
		select {
		case c = <-done:
		case <-ctx.Done():
			c = api.HealthCheck{Name: name, Detail: "no answer within " + checkHealth.String()}
		}
		c.Took = time.Since(start)
		return c
	}
}

func (m *Master) checkScheduler(context.Context) (string, error) {
	m.mu.Lock()
	woke := m.woke
	m.mu.Unlock()
	age := m.Now().Sub(woke).Round(time.Second)
	if age > aliveLimit {
		return "", fmt.Errorf("it last came round %s ago", age)
	}
	return fmt.Sprintf("came round %s ago", age), nil
}

func (m *Master) checkEngine(ctx context.Context) (string, error) {
	return "carries out operations", m.Engine.Check(ctx)
}

func (m *Master) checkCatalog(ctx context.Context) (string, error) {
	return "can be written to", m.Catalog.Check(ctx)
}

// checkStore looks at all stores, those of customers too: one that cannot be written to is one customer's tonight without a backup.
func (m *Master) checkStore(ctx context.Context) (string, error) {
	var least int64 = -1
	n := 0
	err := m.eachStore(ctx, func(st oneStore) error {
		n++
		free, err := st.Check(ctx)
		switch {
		case err != nil:
			return err
		case free >= 0 && free < leastFree:
			return fmt.Errorf("only %d MiB are free: give it more room, or keep less with 'muster server set NAME --keep-last N'", free>>20)
		case free >= 0 && (least < 0 || free < least):
			least = free
		}
		return nil
	})
	what := "can be written to"
	if n > 1 {
		what = fmt.Sprintf("all %d can be written to", n)
	}
	if least >= 0 {
		what = fmt.Sprintf("%s, %d GiB free", what, least>>30)
	}
	return what, err
}

func (m *Master) checkSilo(ctx context.Context) (string, error) {
	if !m.observed.diagnosis.TryLock() {
		return "", errors.New("the last look at it has not come back")
	}
	defer m.observed.diagnosis.Unlock()
	now := m.Now()
	if m.observed.host == nil || now.Sub(m.observed.hostAt) > hostEvery || now.Before(m.observed.hostAt) {
		var host []api.Finding // of this process's own; the others are watched by their leases
		if own, err := m.Silos.Silo(m.Home); m.Home != "" && err == nil {
			host = own.Diagnose(ctx)
		}
		if err := ctx.Err(); err != nil {
			return "", err // what it says is that it was cut off
		}
		m.observed.host, m.observed.hostAt = append([]api.Finding{}, host...), now
	}
	var bad []string
	for _, f := range m.observed.host {
		if f.State == "fail" {
			bad = append(bad, f.Name+": "+f.Detail)
		}
	}
	if len(bad) > 0 {
		return "", errors.New(strings.Join(bad, "; ") + "; 'muster doctor' says what to do")
	}
	return "this host can boot machines", nil
}

// Meter implements api.Operator.
func (m *Master) Meter(ctx context.Context, month, customer string) ([]dr.Metered, error) {
	meter, err := dr.NewMeter(month, m.Now())
	if err != nil {
		return nil, api.Errorf(api.Invalid, "%w", err)
	}
	if err := m.Catalog.Meter(ctx, meter); err != nil {
		return nil, err
	}
	all := meter.Result()
	if customer == "" {
		return all, nil
	}
	for _, one := range all {
		if one.Customer == customer {
			return []dr.Metered{one}, nil
		}
	}
	return nil, api.Errorf(api.NotFound, "customer %q had nothing in %s", customer, month)
}
