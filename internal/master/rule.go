package master

import (
	"context"
	"fmt"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
)

// rulingWork is the input of rule.
type rulingWork struct {
	ServerID string    `json:"server_id"`
	Ruling   dr.Ruling `json:"ruling"`
}

// Rule implements api.Operator.
func (m *Master) Rule(ctx context.Context, snapshot string, request api.RuleRequest) (api.Operation, error) {
	rec, err := m.Record(ctx, snapshot)
	if err != nil {
		return api.Operation{}, err
	}
	s := rec.Snapshot
	switch {
	case request.By == "" || request.Accept && request.Reason == "":
		return api.Operation{}, api.Errorf(api.Invalid, "say who decides, and to accept a snapshot, why")
	case len(request.Reason) > dr.MaxReason || len(request.By) > dr.MaxReason:
		return api.Operation{}, api.Errorf(api.Invalid, "the reason has %d bytes: the most is %d", len(request.Reason), dr.MaxReason)
	case rec.State == dr.Expired:
		return api.Operation{}, api.Errorf(api.Conflict, "snapshot %s has expired", s.ID)
	case rec.HeldBy == "" && rec.Ruling == nil:
		return api.Operation{}, api.Errorf(api.Conflict, "there is nothing to decide about snapshot %s: it is not held", s.ID)
	case rec.LKG && !request.Accept:
		return api.Operation{}, api.Errorf(api.Conflict, "snapshot %s is last-known-good", s.ID)
	}
	in := rulingWork{ServerID: s.ServerID, Ruling: dr.Ruling{SnapshotID: s.ID, Accept: request.Accept, By: request.By, Reason: request.Reason, At: m.Now().UTC()}}
	return begin(ctx, m, kindRule, s.Server, dr.NewID("ruling"), in, engine.StartOptions{Key: serverKey(s.ServerID)})
}

// rule records what a person said, in the store too, and what it leads to.
func (m *Master) rule(r *engine.Run, in rulingWork) error {
	_, err := engine.Step(r, "rule", engine.StepOptions{Limit: recordLimit, Attempts: 3}, func(ctx context.Context) (bool, error) {
		if err := m.Catalog.Rule(ctx, in.Ruling); err != nil {
			return false, err
		}
		st, err := m.storeOfID(ctx, in.ServerID)
		if err != nil {
			return false, err
		}
		if err := st.PutRecord(ctx, recordRuling, in.Ruling.SnapshotID, in.Ruling); err != nil {
			return false, fmt.Errorf("keep the ruling in the store: %w", err)
		}
		return true, nil
	})
	if err != nil {
		return err
	}
	_, err = engine.Step(r, "settle", engine.StepOptions{Limit: settleLimit, Attempts: 3}, func(ctx context.Context) (bool, error) {
		return true, m.settleRuling(ctx, in.ServerID)
	})
	return err
}

// settleRuling brings the store's last-known-good up to the catalog's.
func (m *Master) settleRuling(ctx context.Context, serverID string) error {
	lkg, ok, err := m.Catalog.LKG(ctx, serverID)
	if err != nil {
		return err
	}
	s, err := m.Catalog.Server(ctx, serverID)
	if err != nil {
		return err
	}
	st, err := m.storeOf(ctx, s)
	if err != nil {
		return err
	}
	kept, err := st.LKG(ctx)
	if err != nil {
		return err
	}
	if ok && kept[serverID] != lkg.Snapshot.ID {
		if err := m.keepLKG(ctx, st, lkg); err != nil {
			return err
		}
	}
	return m.expire(ctx, s)
}
