package master

import (
	"context"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

// collectEvery is how often the store is asked to free what expired.
const collectEvery = 24 * time.Hour

// keepOperations is how long a finished operation can be asked for. What came of it stays in the catalog.
const keepOperations = 30 * 24 * time.Hour

// Run schedules until ctx ends.
func (m *Master) Run(ctx context.Context) {
	ticker := time.NewTicker(m.Tick)
	defer ticker.Stop()
	for {
		m.Wake(ctx)
		m.mu.Lock()
		m.woke = m.Now()
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// Wake looks at what is and what should be, once: it starts snapshots that are due and tests that are missing, tends
// invocations and collects the store. Of several masters only the one that leads does; what one that has lost its lease
// would still start, the engine refuses.
func (m *Master) Wake(ctx context.Context) {
	if leads, err := m.Engine.Leads(ctx); err != nil || !leads {
		if err != nil && ctx.Err() == nil {
			m.Log.ErrorContext(ctx, "schedule", "error", err)
		}
		return
	}
	running, err := m.running(ctx)
	if err != nil {
		m.Log.ErrorContext(ctx, "schedule", "error", err)
		return
	}
	if err := m.wakeDue(ctx, running); err != nil {
		m.Log.ErrorContext(ctx, "schedule", "error", err)
		return
	}
	m.watchSites(ctx)
	m.overdue(ctx, running)
	m.retest(ctx, running)
	m.tend(ctx)
	m.spreadSoon(ctx)
	// Best when nothing runs; but on a master that is never idle the locks of a bucket would run out.
	if now := m.Now(); m.collectDue(now, len(running) == 0) {
		if _, err := m.CollectStore(ctx, false); err != nil {
			m.Log.ErrorContext(ctx, "collect store", "error", err)
		}
		if _, err := m.Engine.Prune(ctx, now.Add(-keepOperations)); err != nil {
			m.Log.ErrorContext(ctx, "forget old operations", "error", err)
		}
	}
}

// collectDue says whether the store is to be collected now, and says so once.
func (m *Master) collectDue(now time.Time, idle bool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	since := now.Sub(m.collect)
	if since <= collectEvery || since <= 2*collectEvery && !idle {
		return false
	}
	m.collect = now
	return true
}

// wakeDue starts the snapshots that are due of servers nothing is done about.
func (m *Master) wakeDue(ctx context.Context, running map[string]api.Operation) error {
	now := m.Now()
	var last *catalog.Due
	for {
		page, err := m.Catalog.Due(ctx, now, last)
		if err != nil {
			return err
		}
		for _, d := range page {
			if _, busy := running[d.Server.Name]; busy {
				continue
			}
			if err := m.wakeServer(ctx, d.Server, d.Taken, now); err != nil {
				m.Log.ErrorContext(ctx, "schedule server", "server", d.Server.Name, "error", err)
			}
		}
		if len(page) < catalog.MaxList {
			return nil
		}
		last = &page[len(page)-1]
	}
}

func (m *Master) wakeServer(ctx context.Context, s dr.Server, taken dr.Taken, now time.Time) error {
	due := s.Dues(taken, now)
	m.mu.Lock()
	a := m.attempts[s.ID]
	wait := due.Next().After(now) || a.Again(s, now).After(now)
	if !wait {
		m.attempts[s.ID] = a.Begin(taken.Last, now)
	}
	m.mu.Unlock()
	if wait {
		return nil
	}
	_, err := m.beginProtect(ctx, s, !s.HasImage() || due.Image.After(now), true)
	return err
}

// overdue finds snapshots that should have been tested and were not, raises a ticket and tests them (R72); one whose test cannot be
// held at all is tried later and later.
func (m *Master) overdue(ctx context.Context, running map[string]api.Operation) {
	missing, err := m.Catalog.TestsOverdue(ctx, m.Now(), m.Grace)
	if err != nil {
		m.Log.ErrorContext(ctx, "look for missing tests", "error", err)
		return
	}
	m.mu.Lock()
	before := m.tested
	m.mu.Unlock()
	tried := make(map[string]dr.Attempt, len(missing)) // only those that are still missing
	for _, rec := range missing {
		s, err := m.Catalog.Server(ctx, rec.Snapshot.ServerID)
		if err != nil {
			continue // no longer protected
		}
		if _, busy := running[s.Name]; busy || s.Appliance != "" && rec.State == dr.Kept {
			continue // what has not arrived is missed by watchSites
		}
		a := before[rec.Snapshot.ID]
		if tried[rec.Snapshot.ID] = a; a.Again(s, m.Now()).After(m.Now()) {
			continue
		}
		tried[rec.Snapshot.ID] = a.Begin(time.Time{}, m.Now())
		detail := "snapshot " + rec.Snapshot.ID + " was kept at " + rec.Snapshot.Taken.Format(time.RFC3339) + " and has not been tested since; it is tested now"
		if _, err := m.Catalog.OpenTicket(ctx, s.ID, dr.ProblemTestMissing, "a test that should have run did not", detail, rec.Snapshot.ID, m.Now()); err != nil {
			m.Log.ErrorContext(ctx, "open ticket", "server", s.Name, "snapshot", rec.Snapshot.ID, "error", err)
		}
		if _, err := m.Test(ctx, s.Name, rec.Snapshot.ID); err != nil {
			m.Log.ErrorContext(ctx, "start missing test", "server", s.Name, "snapshot", rec.Snapshot.ID, "error", err)
		}
		running[s.Name] = api.Operation{Server: s.Name}
	}
	m.mu.Lock()
	m.tested = tried
	m.mu.Unlock()
}

// retest holds again the tests that said nothing of the image, because there was no room for them or the host had no time.
func (m *Master) retest(ctx context.Context, running map[string]api.Operation) {
	due, err := m.Catalog.Retests(ctx, m.Now())
	if err != nil {
		m.Log.ErrorContext(ctx, "look for tests to be held again", "error", err)
		return
	}
	for _, s := range due {
		if _, busy := running[s.Server.Name]; busy || s.Newest == nil {
			continue
		}
		// Before it begins: one that ends without a verdict has a ticket, and is not begun again and again.
		err := m.Catalog.Retested(ctx, s)
		if err == nil {
			_, err = m.Test(ctx, s.Server.Name, s.Newest.Snapshot.ID)
		}
		if err != nil {
			m.Log.ErrorContext(ctx, "test again", "server", s.Server.Name, "snapshot", s.Newest.Snapshot.ID, "error", err)
		}
	}
}
