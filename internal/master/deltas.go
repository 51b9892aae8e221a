package master

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// Limits of spreading deltas.
const (
	holdLimit = 10 * time.Minute // for one silo to fetch the deltas of one image
	maxSpread = 64               // copies asked for in one go

	spreadEvery = time.Minute // every server is looked at for that
)

// keepDeltas has a silo that holds the deltas of a rescue image put them into the store.
func (m *Master) keepDeltas(ctx context.Context, rec dr.Record) error {
	pre := *rec.PreRecovery
	s, err := m.Catalog.Server(ctx, rec.Snapshot.ServerID)
	if err != nil {
		return err
	}
	held, err := m.Catalog.Where(ctx, pre.ID)
	if err != nil {
		return err
	}
	names := slices.Sorted(maps.Keys(held[pre.ID]))
	for _, name := range m.Silos.Names() { // one that does not have them finds them in the store, if they are there already
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	errs := []error{api.Errorf(api.Unavailable, "keep deltas of %s: no silo that has them answers", rec.Snapshot.ID)}
	for _, name := range names {
		silo, err := m.Silos.Silo(name)
		if err == nil {
			var task api.DeltasTask
			var digest string
			if task, err = m.deltasTask(ctx, s, rec.Snapshot, pre); err == nil {
				digest, err = silo.KeepDeltas(ctx, task)
			}
			if err == nil {
				return m.Catalog.RecordDeltas(ctx, pre.ID, rec.Snapshot.ID, name, digest)
			}
		}
		errs = append(errs, fmt.Errorf("silo %s: %w", name, err))
	}
	return errors.Join(errs...)
}

func (m *Master) deltasTask(ctx context.Context, s dr.Server, snap dr.Snapshot, pre dr.PreRecovery) (api.DeltasTask, error) {
	access, err := m.access(ctx, s)
	return api.DeltasTask{Grant: api.Grant{Access: access}, Snapshot: snap, PreRecovery: pre}, err
}

// spreadSoon spreads deltas now and then, without waiting for it, unless that is under way.
func (m *Master) spreadSoon(ctx context.Context) {
	if !m.farm.spreading.TryLock() {
		return
	}
	if age := m.Now().Sub(m.farm.spread); age >= 0 && age < spreadEvery {
		m.farm.spreading.Unlock()
		return
	}
	go func() {
		defer m.farm.spreading.Unlock()
		if more := m.spread(ctx); !more {
			m.farm.spread = m.Now()
		}
	}()
}

// spread has the deltas of every last-known-good held by as many silos as dr.Spread wants. It says whether it left some for the next
// time.
func (m *Master) spread(ctx context.Context) (more bool) {
	silos, err := m.reached(ctx)
	if err != nil {
		m.Log.ErrorContext(ctx, "look at silos", "error", err)
		return false
	}
	active := 0
	for _, s := range silos {
		if s.State == dr.SiloActive {
			active++
		}
	}
	if active < 2 {
		return false
	}
	thin, err := m.Catalog.Thin(ctx)
	if err != nil || len(thin) == 0 {
		if err != nil {
			m.Log.ErrorContext(ctx, "look for deltas that few hold", "error", err)
		}
		return false
	}
	var images []dr.Rescue
	servers := map[string]string{}
	var pres []string
	for _, t := range thin {
		s, err := m.Catalog.Server(ctx, t.ServerID)
		if err != nil {
			continue // removed meanwhile
		}
		pre, err := m.Catalog.PreRecovery(ctx, t.PreRecovery)
		if err != nil {
			continue
		}
		images = append(images, dr.Rescue{PreRecovery: pre.ID, Customer: s.Customer, Memory: pre.Hardware.Memory})
		servers[pre.ID], pres = s.ID, append(pres, pre.ID)
	}
	where, err := m.where(ctx, pres...)
	if err != nil {
		m.Log.ErrorContext(ctx, "look for deltas", "error", err)
		return false
	}
	copies := dr.Spread(images, silos, where)
	for _, c := range copies[:min(len(copies), maxSpread)] {
		if ctx.Err() != nil {
			return false
		}
		if err := m.hold(ctx, servers[c.PreRecovery], c); err != nil {
			m.Log.ErrorContext(ctx, "have deltas held by another silo", "silo", c.Silo, "pre_recovery", c.PreRecovery, "error", err)
		}
	}
	return len(copies) > maxSpread
}

// hold has one silo fetch the deltas of a last-known-good, and takes its word for it only with the right digest.
func (m *Master) hold(ctx context.Context, serverID string, c dr.Copy) error {
	ctx, cancel := context.WithTimeout(ctx, holdLimit)
	defer cancel()
	rec, ok, err := m.Catalog.LKG(ctx, serverID)
	if err != nil || !ok || rec.PreRecovery == nil || rec.PreRecovery.ID != c.PreRecovery {
		return err // another one by now
	}
	if rec.Snapshot, err = m.whole(ctx, rec.Snapshot); err != nil {
		return err
	}
	s, err := m.Catalog.Server(ctx, serverID)
	if err != nil {
		return err
	}
	held, err := m.Catalog.Where(ctx, c.PreRecovery)
	if err != nil {
		return err
	}
	want := ""
	for _, digest := range held[c.PreRecovery] {
		want = max(want, digest)
	}
	if want == "" {
		return nil // not in the store yet, or no silo left that made them: the next test will do
	}
	silo, err := m.Silos.Silo(c.Silo)
	if err != nil {
		return err
	}
	task, err := m.deltasTask(ctx, s, rec.Snapshot, *rec.PreRecovery)
	if err != nil {
		return err
	}
	got, err := silo.HoldDeltas(ctx, task)
	if err != nil {
		return err
	}
	if got != want {
		m.event(ctx, "deltas.differ", s.Name, rec.Snapshot.ID, fmt.Sprintf("silo %s fetched deltas of %s that are not those that were tested; they are not counted", c.Silo, c.PreRecovery))
		return fmt.Errorf("their digest is %s, not %s", got, want)
	}
	if err := m.Catalog.RecordDeltas(ctx, c.PreRecovery, rec.Snapshot.ID, c.Silo, got); err != nil {
		return err
	}
	m.event(ctx, "deltas.held", s.Name, rec.Snapshot.ID, fmt.Sprintf("last-known-good of %s would boot at once on silo %s too", s.Name, c.Silo))
	return nil
}

// discard has every silo that answers forget an expired snapshot.
func (m *Master) discard(ctx context.Context, snapshot string) error {
	var errs []error
	for _, name := range m.Silos.Names() {
		silo, err := m.Silos.Silo(name)
		if err == nil {
			err = silo.Discard(ctx, snapshot)
		}
		if err != nil && api.KindOf(err) != api.Unavailable {
			errs = append(errs, fmt.Errorf("silo %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
