package master

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

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
func (m *Master) StoreUsage(ctx context.Context) (api.StoreUsage, error) {
	u, err := m.Store.Usage(ctx)
	if err != nil {
		return api.StoreUsage{}, err
	}
	snaps, err := m.Store.Snapshots(ctx)
	if err != nil {
		return api.StoreUsage{}, err
	}
	out := api.StoreUsage{Location: m.Location, Bytes: u.Bytes, Snapshots: len(snaps), Free: u.Free}
	for _, s := range snaps {
		out.Logical += s.Size()
	}
	return out, nil
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

func (m *Master) verify(ctx context.Context, r *engine.Run, only string) ([]store.VerifyReport, error) {
	if err := m.Store.Refresh(ctx); err != nil {
		return nil, err
	}
	snaps, err := m.Store.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	var out []store.VerifyReport
	for _, snap := range snaps {
		if only != "" && snap.ID != only {
			continue
		}
		report, err := m.Store.Verify(ctx, snap.ID, r.Report)
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
	if len(out) == 0 {
		return nil, engine.Permanent(errors.New("verify store: it holds no snapshot, so nothing was verified"))
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

// Collected is what came of a collection.
type Collected struct {
	store.CollectReport
	Locks *store.LockReport `json:",omitempty"` // nil where the store's place locks nothing
}

// collectStore extends the locks of what is kept, then frees what is not: a collection that has to wait must not let locks run out.
func (m *Master) collectStore(r *engine.Run, in storeWork) error {
	report, err := engine.Step(r, "collect", engine.StepOptions{Limit: captureLimit}, func(ctx context.Context) (c Collected, err error) {
		locks, locking := m.Store.ExtendLocks(ctx, r.Report)
		switch {
		case errors.Is(locking, store.ErrNoLocks):
			locking = nil
		case locking == nil:
			c.Locks = &locks
			m.event(ctx, "store.locked", "", "", fmt.Sprintf("%d blobs are locked, %d of them for longer than before", locks.Blobs, locks.Extended))
		}
		c.CollectReport, err = m.Store.Collect(ctx, store.CollectOptions{Immediate: in.Alone}, r.Report)
		if err == nil {
			m.event(ctx, "store.collected", "", "", fmt.Sprintf("%d bytes freed, %d snapshots kept, %d blobs still locked", c.Freed(), c.Snapshots, c.Locked))
		}
		return c, errors.Join(locking, err)
	})
	m.keepResult(in.ID, report)
	return err
}

func (m *Master) adoptStore(r *engine.Run, in storeWork) error {
	found, err := engine.Step(r, "adopt", engine.StepOptions{Limit: settleLimit}, func(ctx context.Context) (catalog.Adopted, error) {
		return m.adopt(ctx)
	})
	m.keepResult(in.ID, found)
	return err
}

func (m *Master) adopt(ctx context.Context) (catalog.Adopted, error) {
	if err := m.Store.Refresh(ctx); err != nil {
		return catalog.Adopted{}, err
	}
	servers, err := records[dr.Server](ctx, m.Store, dr.ServerRecord)
	if err != nil {
		return catalog.Adopted{}, err
	}
	pres, err := records[dr.PreRecovery](ctx, m.Store, recordPreRecovery)
	if err != nil {
		return catalog.Adopted{}, err
	}
	verdicts, err := records[dr.Verdict](ctx, m.Store, recordVerdict)
	if err != nil {
		return catalog.Adopted{}, err
	}
	rulings, err := records[dr.Ruling](ctx, m.Store, recordRuling)
	if err != nil {
		return catalog.Adopted{}, err
	}
	snaps, err := m.Store.Snapshots(ctx)
	if err != nil {
		return catalog.Adopted{}, err
	}
	lkg, err := m.Store.LKG(ctx)
	if err != nil {
		return catalog.Adopted{}, err
	}
	return m.Catalog.Adopt(ctx, servers, snaps, pres, verdicts, rulings, lkg)
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
