package master

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/store"
)

// storeWork is the input of verify, collect and adopt.
type storeWork struct {
	ID       string `json:"id"` // of the operation
	Snapshot string `json:"snapshot,omitempty"`
	Alone    bool   `json:"alone,omitempty"`
}

const storeKey = "store"

// StoreUsage implements api.Operator.
func (m *Master) StoreUsage(ctx context.Context) (out []api.StoreUsage, err error) {
	err = m.readCustomers(ctx)
	for _, st := range m.stores(ctx) {
		of := api.StoreUsage{Customer: st.Customer, Location: st.Location, Free: -1}
		err := st.Err
		if err == nil {
			err = measure(ctx, st.Store, &of)
		}
		if err != nil {
			of.Error = err.Error()
		}
		out = append(out, of)
	}
	return out, err
}

func measure(ctx context.Context, st *store.Store, of *api.StoreUsage) error {
	u, err := st.Usage(ctx)
	if err != nil {
		return err
	}
	snaps, err := st.Snapshots(ctx)
	if err != nil {
		return err
	}
	of.Bytes, of.Snapshots, of.Free = u.Bytes, len(snaps), u.Free
	for _, s := range snaps {
		of.Logical += s.Size()
	}
	return nil
}

func (m *Master) beginStore(ctx context.Context, kind string, in storeWork) (api.Operation, error) {
	subject := dr.NewID(kind)
	in.ID = operationID(kind, "", subject)
	return begin(ctx, m, kind, "", subject, in, engine.StartOptions{Key: storeKey})
}

// VerifyStore implements api.Operator.
func (m *Master) VerifyStore(ctx context.Context, snapshot string) (api.Operation, error) {
	if snapshot != "" {
		if _, err := m.Record(ctx, snapshot); err != nil {
			return api.Operation{}, err
		}
	}
	return m.beginStore(ctx, kindVerify, storeWork{Snapshot: snapshot})
}

// CollectStore implements api.Operator.
func (m *Master) CollectStore(ctx context.Context, alone bool) (api.Operation, error) {
	return m.beginStore(ctx, kindCollect, storeWork{Alone: alone})
}

// AdoptStore implements api.Operator.
func (m *Master) AdoptStore(ctx context.Context) (api.Operation, error) {
	return m.beginStore(ctx, kindAdopt, storeWork{})
}

func (m *Master) verifyStore(r *engine.Run, in storeWork) error {
	reports, err := engine.Step(r, "verify", engine.StepOptions{Limit: captureLimit}, func(ctx context.Context) ([]store.VerifyReport, error) {
		return m.verify(ctx, r, in.Snapshot)
	})
	m.keepResult(in.ID, reports)
	if err != nil {
		return err
	}
	var damaged int64
	for _, report := range reports {
		damaged += report.Damaged
	}
	if damaged > 0 {
		return engine.Permanent(fmt.Errorf("verify store: %d damaged blocks found; see the tickets", damaged))
	}
	return nil
}

func (m *Master) verify(ctx context.Context, r *engine.Run, only string) (out []store.VerifyReport, err error) {
	err = m.eachStore(ctx, func(st oneStore) error {
		some, err := m.verifyOne(ctx, r, st, only)
		out = append(out, some...)
		return err
	})
	if err == nil && len(out) == 0 {
		err = engine.Permanent(errors.New("verify store: it holds no snapshot, so nothing was verified"))
	}
	return out, err
}

func (m *Master) verifyOne(ctx context.Context, r *engine.Run, st oneStore, only string) (out []store.VerifyReport, err error) {
	if err := st.Refresh(ctx); err != nil {
		return nil, err
	}
	snaps, err := st.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	for _, snap := range snaps {
		if only != "" && snap.ID != only {
			continue
		}
		report, err := st.Verify(ctx, snap.ID, r.Report)
		if err != nil && !errors.Is(err, store.ErrDamaged) {
			return out, fmt.Errorf("verify snapshot %s: %w", snap.ID, err)
		}
		out = append(out, report)
		if report.Damaged > 0 {
			if _, err := m.Catalog.OpenTicket(ctx, snap.ServerID, dr.ProblemStore, "the store is damaged", Found(report), snap.ID, m.Now()); err != nil {
				return out, err
			}
		}
		m.event(ctx, "store.verified", snap.Server, snap.ID, Found(report))
	}
	return out, nil
}

// Found says in a sentence what a verification found, with the first damages by disk and offset.
func Found(r store.VerifyReport) string {
	if r.Damaged == 0 {
		return fmt.Sprintf("%s: %d blocks (%d bytes) and %d files read back and right, %d blocks of zeros", r.SnapshotID, r.Blocks, r.Bytes, r.Files, r.Zero)
	}
	text := fmt.Sprintf("%s: %d DAMAGED, %d blocks and %d files right", r.SnapshotID, r.Damaged, r.Blocks, r.Files)
	for i, d := range r.Damages {
		if i == maxDamagesTold {
			return text + "; …"
		}
		text += "; " + d.String()
	}
	return text
}

// maxDamagesTold is how many damages a ticket lists; the operation's result lists more.
const maxDamagesTold = 10

// Collected is what came of collecting one store.
type Collected struct {
	Customer string `json:",omitempty"` // whose far store it is; "": the installation's own
	store.CollectReport
	Locks *store.LockReport `json:",omitempty"` // nil where the store's place locks nothing
}

func (m *Master) collectStore(r *engine.Run, in storeWork) error {
	reports, err := engine.Step(r, "collect", engine.StepOptions{Limit: captureLimit}, func(ctx context.Context) (out []Collected, err error) {
		err = m.eachStore(ctx, func(st oneStore) error {
			c, err := m.collectOne(ctx, r, st, in.Alone)
			out = append(out, c)
			return err
		})
		return out, err
	})
	m.keepResult(in.ID, reports)
	return err
}

// collectOne extends the locks of what is kept, then frees what is not: a collection that has to wait must not let locks run out.
func (m *Master) collectOne(ctx context.Context, r *engine.Run, st oneStore, alone bool) (c Collected, err error) {
	locks, locking := st.ExtendLocks(ctx, r.Report)
	switch {
	case errors.Is(locking, store.ErrNoLocks):
		locking = nil
	case locking == nil:
		c.Locks = &locks
		m.event(ctx, "store.locked", "", st.Customer, fmt.Sprintf("%d blobs are locked, %d of them for longer than before", locks.Blobs, locks.Extended))
	}
	c.Customer = st.Customer
	c.CollectReport, err = st.Collect(ctx, store.CollectOptions{Immediate: alone}, r.Report)
	if err == nil {
		m.event(ctx, "store.collected", "", st.Customer, fmt.Sprintf("%d bytes freed, %d snapshots kept, %d blobs still locked", c.Freed(), c.Snapshots, c.Locked))
	}
	return c, errors.Join(locking, err)
}

func (m *Master) adoptStore(r *engine.Run, in storeWork) error {
	found, err := engine.Step(r, "adopt", engine.StepOptions{Limit: settleLimit}, func(ctx context.Context) (catalog.Adopted, error) {
		return m.adopt(ctx)
	})
	m.keepResult(in.ID, found)
	return err
}

// adopt completes the catalog from what the stores hold. A customer's store can be written to by the customer's appliances: it is
// believed only about that customer's own servers.
func (m *Master) adopt(ctx context.Context) (catalog.Adopted, error) {
	all := holding{lkg: map[string]string{}}
	if err := m.readCustomers(ctx); err != nil {
		return catalog.Adopted{}, err
	}
	err := m.eachStore(ctx, func(st oneStore) error {
		h, err := m.holdings(ctx, st)
		if err == nil {
			all.add(h)
		}
		return err
	})
	found, failed := m.Catalog.Adopt(ctx, all.servers, all.snapshots, all.pres, all.verdicts, all.rulings, all.lkg)
	return found, errors.Join(failed, err)
}

// holding is what stores say of servers.
type holding struct {
	servers   []dr.Server
	snapshots []dr.Snapshot
	pres      []dr.PreRecovery
	verdicts  []dr.Verdict
	rulings   []dr.Ruling
	lkg       map[string]string
}

func (h *holding) add(o holding) {
	h.servers, h.snapshots, h.pres = append(h.servers, o.servers...), append(h.snapshots, o.snapshots...), append(h.pres, o.pres...)
	h.verdicts, h.rulings = append(h.verdicts, o.verdicts...), append(h.rulings, o.rulings...)
	maps.Copy(h.lkg, o.lkg)
}

func (m *Master) holdings(ctx context.Context, st oneStore) (h holding, err error) {
	if err := st.Refresh(ctx); err != nil {
		return h, err
	}
	if h.servers, err = records[dr.Server](ctx, st.Store, dr.ServerRecord); err != nil {
		return h, err
	}
	if h.pres, err = records[dr.PreRecovery](ctx, st.Store, recordPreRecovery); err != nil {
		return h, err
	}
	if h.verdicts, err = records[dr.Verdict](ctx, st.Store, recordVerdict); err != nil {
		return h, err
	}
	if h.rulings, err = records[dr.Ruling](ctx, st.Store, recordRuling); err != nil {
		return h, err
	}
	if h.snapshots, err = st.Snapshots(ctx); err != nil {
		return h, err
	}
	if h.lkg, err = st.LKG(ctx); err != nil || st.Customer == "" {
		return h, err
	}
	its := map[string]bool{}
	h.servers = slices.DeleteFunc(h.servers, func(s dr.Server) bool {
		its[s.ID] = s.StoredFor() == st.Customer
		return !its[s.ID]
	})
	kept := map[string]bool{}
	h.snapshots = slices.DeleteFunc(h.snapshots, func(s dr.Snapshot) bool {
		kept[s.ID] = its[s.ServerID]
		return !kept[s.ID]
	})
	h.pres = slices.DeleteFunc(h.pres, func(p dr.PreRecovery) bool { return !kept[p.SnapshotID] })
	h.verdicts = slices.DeleteFunc(h.verdicts, func(v dr.Verdict) bool { return !kept[v.SnapshotID] })
	h.rulings = slices.DeleteFunc(h.rulings, func(r dr.Ruling) bool { return !kept[r.SnapshotID] })
	maps.DeleteFunc(h.lkg, func(server, _ string) bool { return !its[server] })
	return h, nil
}

func records[T any](ctx context.Context, st *store.Store, kind string) ([]T, error) {
	var out []T
	err := st.Records(ctx, kind, func(id string, raw json.RawMessage) error {
		var v T
		if err := json.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("read %s %s from the store: %w", kind, id, err)
		}
		out = append(out, v)
		return nil
	})
	return out, err
}
