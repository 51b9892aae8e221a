package master

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/store"
)

// Limits on the steps of protecting a server.
const (
	captureLimit    = 24 * time.Hour
	preRecoverLimit = 30 * time.Minute
	mergeLimit      = 6 * time.Hour // of a pre-recovery that puts data into the image as well
	testLimit       = time.Hour
	recordLimit     = time.Minute
	settleLimit     = 30 * time.Minute
)

// Kinds under which the store keeps what adopt rebuilds a catalog from.
const (
	recordPreRecovery = "prerecovery"
	recordVerdict     = "verdict"
	recordRuling      = "ruling"
)

// work is the input of protect, prerecover and test: all identifiers are chosen before the run begins.
type work struct {
	ServerID    string    `json:"server_id"`
	SnapshotID  string    `json:"snapshot_id"`
	PreRecovery string    `json:"pre_recovery"` // identifier of a new one; for test "" uses the snapshot's newest
	VerdictID   string    `json:"verdict_id"`
	Data        bool      `json:"data,omitempty"`      // the snapshot is of data
	Image       string    `json:"image,omitempty"`     // of the image that is taken first and that the data goes onto; "" one that is kept
	Appliance   string    `json:"appliance,omitempty"` // that captures, if it is elsewhere
	Arrived     bool      `json:"arrived,omitempty"`   // the snapshot has come from an appliance by itself
	Asked       time.Time `json:"asked"`
}

// Snapshot implements api.Operator.
func (m *Master) Snapshot(ctx context.Context, name string) (api.Operation, error) {
	s, err := m.server(ctx, name)
	if err != nil {
		return api.Operation{}, err
	}
	return m.beginProtect(ctx, s, !s.HasImage(), false)
}

// SnapshotData implements api.Operator.
func (m *Master) SnapshotData(ctx context.Context, name string) (api.Operation, error) {
	s, err := m.server(ctx, name)
	if err != nil {
		return api.Operation{}, err
	}
	if !s.HasData() {
		return api.Operation{}, api.Errorf(api.Conflict, "no data of %s is captured file by file: name folders with 'muster server set %s --tier image+data --data /srv'", s.Name, s.Name)
	}
	if _, err := m.imageFor(ctx, s); err != nil {
		return api.Operation{}, err
	}
	return m.beginProtect(ctx, s, true, false)
}

// beginProtect starts a snapshot: of the image and, where the tier has it, of the data onto it; or of the data alone.
func (m *Master) beginProtect(ctx context.Context, s dr.Server, dataOnly, refuse bool) (api.Operation, error) {
	now := m.Now()
	in := work{ServerID: s.ID, SnapshotID: dr.NewSnapshotID(now), PreRecovery: dr.NewID("pre"), VerdictID: dr.NewID("verdict"), Asked: now,
		Data: s.HasData(), Appliance: s.Appliance}
	if _, err := m.capturer(s.Appliance); err != nil {
		return api.Operation{}, err
	}
	if s.HasData() && !dataOnly {
		in.Image = dr.NewSnapshotID(now)
	}
	return begin(ctx, m, kindProtect, s.Name, in.SnapshotID, in, engine.StartOptions{Key: serverKey(s.ID), Refuse: refuse})
}

// imageFor chooses the image onto which a server's data goes, among those that are kept.
func (m *Master) imageFor(ctx context.Context, s dr.Server) (dr.Snapshot, error) {
	of := s
	if !s.HasImage() {
		var err error
		if of, err = m.server(ctx, s.Standby); err != nil {
			return dr.Snapshot{}, fmt.Errorf("find the standby of %s: %w", s.Name, err)
		}
	}
	records, err := m.Catalog.Snapshots(ctx, of.ID)
	if err != nil {
		return dr.Snapshot{}, err
	}
	image, ok := dr.ImageFor(records)
	if !ok {
		return image, api.Errorf(api.Conflict, "there is no image of %s yet that the data of %s could go onto: take one with 'muster snapshot %s'", of.Name, s.Name, of.Name)
	}
	return image, nil
}

// PreRecover implements api.Operator.
func (m *Master) PreRecover(ctx context.Context, name, snapshot string) (api.Operation, error) {
	s, r, err := m.pick(ctx, name, snapshot)
	if err != nil {
		return api.Operation{}, err
	}
	in := work{ServerID: s.ID, SnapshotID: r.Snapshot.ID, PreRecovery: dr.NewID("pre"), Data: r.Snapshot.IsData(), Asked: m.Now()}
	return begin(ctx, m, kindPreRecover, s.Name, in.PreRecovery, in, engine.StartOptions{Key: serverKey(s.ID)})
}

// Test implements api.Operator.
func (m *Master) Test(ctx context.Context, name, snapshot string) (api.Operation, error) {
	s, r, err := m.pick(ctx, name, snapshot)
	if err != nil {
		return api.Operation{}, err
	}
	in := work{ServerID: s.ID, SnapshotID: r.Snapshot.ID, VerdictID: dr.NewID("verdict"), Data: r.Snapshot.IsData(), Asked: m.Now()}
	if r.PreRecovery == nil {
		in.PreRecovery = dr.NewID("pre")
	}
	return begin(ctx, m, kindTest, s.Name, in.VerdictID, in, engine.StartOptions{Key: serverKey(s.ID)})
}

// pick finds a server and one of its snapshots that is still there, the newest if none is named.
func (m *Master) pick(ctx context.Context, name, snapshot string) (dr.Server, dr.Record, error) {
	s, err := m.server(ctx, name)
	if err != nil {
		return s, dr.Record{}, err
	}
	if snapshot != "" {
		r, err := m.Record(ctx, snapshot)
		switch {
		case err != nil:
		case r.Snapshot.ServerID != s.ID:
			err = api.Errorf(api.NotFound, "snapshot %s is not of server %s", snapshot, s.Name)
		case r.State == dr.Expired:
			err = api.Errorf(api.Conflict, "snapshot %s has expired", snapshot)
		}
		return s, r, err
	}
	records, err := m.Catalog.Snapshots(ctx, s.ID)
	if err != nil {
		return s, dr.Record{}, err
	}
	for _, r := range records {
		if r.State != dr.Expired {
			return s, r, nil
		}
	}
	return s, dr.Record{}, api.Errorf(api.NotFound, "server %s has no snapshot yet: take one with 'muster snapshot %s'", s.Name, s.Name)
}

// protect is the night's work on one server.
func (m *Master) protect(r *engine.Run, in work) error {
	if in.Arrived {
		return m.prepareAndTest(r, in)
	}
	if in.Image != "" {
		if err := m.captureStep(r, in, "capture image", api.SnapshotTask{ID: in.Image}); err != nil {
			return err
		}
	}
	if err := m.captureStep(r, in, "capture", api.SnapshotTask{ID: in.SnapshotID, Image: in.Image}); err != nil {
		return err
	}
	if in.Appliance != "" {
		_, err := engine.Step(r, "replicate", remote(sendLimit), func(ctx context.Context) (string, error) { return m.replicated(ctx, r, in, in.SnapshotID) })
		if err != nil {
			return m.ticket(r, in, dr.ProblemSend, "a snapshot did not come into the far store", err)
		}
	}
	return m.prepareAndTest(r, in)
}

func (m *Master) captureStep(r *engine.Run, in work, step string, task api.SnapshotTask) error {
	options := engine.StepOptions{Limit: captureLimit, Attempts: 1}
	if in.Appliance != "" {
		options = remote(captureLimit)
	}
	_, err := engine.Step(r, step, options, func(ctx context.Context) (string, error) {
		return task.ID, m.capture(ctx, r, in, task)
	})
	if err != nil {
		return m.ticket(r, in, dr.ProblemCapture, "no snapshot could be taken", err)
	}
	return nil
}

// capture takes one snapshot: the one of the data, or the image before it.
func (m *Master) capture(ctx context.Context, r *engine.Run, in work, task api.SnapshotTask) error {
	s, err := m.Catalog.Server(ctx, in.ServerID)
	if err != nil {
		return engine.Permanent(err)
	}
	task.Server = s
	kind := dr.SnapshotImage
	if in.Data && task.ID == in.SnapshotID {
		kind = dr.SnapshotData
	}
	if kind == dr.SnapshotData && task.Image == "" {
		image, err := m.imageFor(ctx, s)
		if err != nil {
			return engine.Permanent(err)
		}
		task.Image = image.ID
	}
	if in.Appliance != "" { // it knows its own history, and brings the snapshot when it sends it
		site, err := m.site(in.Appliance)
		if err != nil {
			return err
		}
		_, err = site.Snapshot(ctx, task, r.Report)
		return lasting(err)
	}
	last, ok, err := m.Catalog.LastSnapshot(ctx, s.ID, kind)
	if err != nil {
		return err
	}
	if ok {
		records, err := m.Catalog.Snapshots(ctx, s.ID)
		if err != nil {
			return err
		}
		records = dr.OfKind(records, kind == dr.SnapshotData)
		task.Parent, task.Trusted, task.Usual = last.Snapshot.ID, dr.Trusted(records), dr.UsualOf(records)
	}
	snap, err := m.Appliance.Snapshot(ctx, task, r.Report)
	if err != nil {
		return err
	}
	return m.Catalog.RecordSnapshot(ctx, snap)
}

// prerecover makes a snapshot's rescue image anew.
func (m *Master) prerecover(r *engine.Run, in work) error {
	rejected, err := m.prepare(r, in)
	if err != nil {
		return m.ticket(r, in, dr.ProblemPreRecovery, "no rescue image could be made", err)
	}
	if rejected != nil {
		return engine.Permanent(rejected)
	}
	return nil
}

// test tests a snapshot again.
func (m *Master) test(r *engine.Run, in work) error {
	if in.PreRecovery != "" {
		return m.prepareAndTest(r, in)
	}
	return m.bootAndSettle(r, in)
}

func (m *Master) prepareAndTest(r *engine.Run, in work) error {
	rejected, err := m.prepare(r, in)
	if err != nil {
		return m.ticket(r, in, dr.ProblemPreRecovery, "no rescue image could be made", err)
	}
	if rejected != nil {
		return m.reject(r, in, *rejected)
	}
	return m.bootAndSettle(r, in)
}

func (m *Master) prepare(r *engine.Run, in work) (*api.Rejected, error) {
	limit := preRecoverLimit
	if in.Data {
		limit = mergeLimit
	}
	return engine.Step(r, "pre-recover", engine.StepOptions{Limit: waitLimit + limit, Attempts: 2}, func(ctx context.Context) (rejected *api.Rejected, err error) {
		s, rec, err := m.load(ctx, in)
		if err != nil {
			return nil, err
		}
		err = m.send(ctx, r, m.preRecoverWork(ctx, in.PreRecovery, s), waitLimit, limit, s, func(ctx context.Context, silo api.Silo, l dr.Lease, g api.Grant) error {
			rejected, err = m.preRecover(ctx, r, silo, l, api.PreRecoverTask{ID: in.PreRecovery, Grant: g, Server: s, Snapshot: rec.Snapshot})
			return err
		})
		return rejected, err
	})
}

// preRecover has a silo make a rescue image, and records it. Each silo makes its own under an identifier of its own: of the deltas of
// one identifier there is only one content, whoever wakes late.
func (m *Master) preRecover(ctx context.Context, r *engine.Run, silo api.Silo, l dr.Lease, task api.PreRecoverTask) (*api.Rejected, error) {
	if l.Silo != m.Home {
		task.ID += "-" + l.Silo
	}
	pre, err := silo.PreRecover(ctx, task, r.Report)
	var rejected *api.Rejected
	if errors.As(err, &rejected) {
		return rejected, nil
	}
	if err != nil {
		return nil, err
	}
	if err := m.Catalog.Under(l).RecordPreRecovery(ctx, pre); err != nil {
		return nil, err
	}
	return nil, m.Catalog.RecordDeltas(ctx, pre.ID, pre.SnapshotID, l.Silo, "")
}

func (m *Master) load(ctx context.Context, in work) (dr.Server, dr.Record, error) {
	s, err := m.Catalog.Server(ctx, in.ServerID)
	if err != nil {
		return s, dr.Record{}, err
	}
	rec, err := m.Catalog.Snapshot(ctx, in.SnapshotID)
	if err == nil {
		rec.Snapshot, err = m.whole(ctx, rec.Snapshot)
	}
	return s, rec, err
}

// whole gives a snapshot as it is booted: data with the disks and the machine of the image that it goes onto.
func (m *Master) whole(ctx context.Context, snap dr.Snapshot) (dr.Snapshot, error) {
	if !snap.IsData() {
		return snap, nil
	}
	image, err := m.Catalog.Snapshot(ctx, snap.Image)
	if err != nil {
		return snap, fmt.Errorf("find the image of %s: %w", snap.ID, err)
	}
	return snap.Onto(image.Snapshot), nil
}

// reject records that a snapshot cannot become a rescue image.
func (m *Master) reject(r *engine.Run, in work, why api.Rejected) error {
	_, err := engine.Step(r, "judge", engine.StepOptions{Limit: recordLimit}, func(ctx context.Context) (bool, error) {
		_, err := m.Catalog.RecordVerdict(ctx, dr.Verdict{ID: in.VerdictID, SnapshotID: in.SnapshotID, PreRecovery: in.PreRecovery,
			Outcome: dr.Fail, Code: why.Code, Summary: why.Reason, Started: in.Asked})
		if err == nil && why.Code == dr.CodeDiskError {
			_, err = m.Catalog.OpenTicket(ctx, in.ServerID, dr.ProblemStore, "the store is damaged", why.Reason, in.SnapshotID, m.Now())
		}
		return false, err
	})
	return err
}

func (m *Master) bootAndSettle(r *engine.Run, in work) error {
	moved, err := engine.Step(r, "test", engine.StepOptions{Limit: waitLimit + testLimit, Attempts: 2}, func(ctx context.Context) (bool, error) {
		return m.boot(ctx, r, in)
	})
	if err != nil {
		return m.ticket(r, in, dr.ProblemTestMissing, "the boot test could not be held", err)
	}
	_, err = engine.Step(r, "settle", engine.StepOptions{Limit: settleLimit, Attempts: 3}, func(ctx context.Context) (bool, error) {
		return moved, m.settle(ctx, in, moved)
	})
	if err != nil {
		return m.ticket(r, in, dr.ProblemStore, "the result of a test could not be kept in the store", err)
	}
	return nil
}

// boot holds a boot test and writes down the verdict.
func (m *Master) boot(ctx context.Context, r *engine.Run, in work) (moved bool, err error) {
	s, rec, err := m.load(ctx, in)
	if err != nil {
		return false, err
	}
	if rec.PreRecovery == nil {
		return false, engine.Permanent(fmt.Errorf("test snapshot %s: it has no rescue image", in.SnapshotID))
	}
	err = m.send(ctx, r, testWork(in.VerdictID, s, *rec.PreRecovery), waitLimit, testLimit, s, func(ctx context.Context, silo api.Silo, l dr.Lease, g api.Grant) error {
		task := api.TestTask{ID: in.VerdictID, Grant: g, Server: s, Snapshot: rec.Snapshot, PreRecovery: *rec.PreRecovery, Asked: m.Now()}
		v, err := m.holdTest(ctx, r, silo, l, task)
		if err != nil {
			return err
		}
		judged, err := m.Catalog.Under(l).RecordVerdict(ctx, v)
		if err == nil && v.Code == dr.CodeDiskError {
			_, err = m.Catalog.OpenTicket(ctx, s.ID, dr.ProblemStore, "the store is damaged", v.Summary, in.SnapshotID, m.Now())
		}
		moved = judged.Moved
		return err
	})
	return moved, err
}

// holdTest has a silo test a rescue image. One whose deltas went with the silo that made them is made anew.
func (m *Master) holdTest(ctx context.Context, r *engine.Run, silo api.Silo, l dr.Lease, task api.TestTask) (dr.Verdict, error) {
	v, err := silo.Test(ctx, task, r.Report)
	if api.KindOf(err) != api.NotFound {
		return v, err
	}
	if err := m.Catalog.ForgetDeltas(ctx, task.PreRecovery.ID, l.Silo); err != nil {
		return v, err
	}
	again := api.PreRecoverTask{ID: task.PreRecovery.ID + "-again", Grant: task.Grant, Server: task.Server, Snapshot: task.Snapshot}
	rejected, err := m.preRecover(ctx, r, silo, l, again)
	if rejected != nil {
		return dr.Verdict{ID: task.ID, SnapshotID: task.Snapshot.ID, PreRecovery: task.PreRecovery.ID, Silo: l.Silo,
			Outcome: dr.Fail, Code: rejected.Code, Summary: rejected.Reason, Started: task.Asked}, nil
	}
	if err != nil {
		return v, err
	}
	rec, err := m.Catalog.Snapshot(ctx, task.Snapshot.ID)
	if err != nil {
		return v, err
	}
	task.PreRecovery = *rec.PreRecovery
	return silo.Test(ctx, task, r.Report)
}

// settle carries what was decided into the store, so that it survives the catalog, and lets old snapshots go.
func (m *Master) settle(ctx context.Context, in work, moved bool) error {
	s, rec, err := m.load(ctx, in)
	if err != nil {
		return err
	}
	if rec.Verdict == nil || rec.PreRecovery == nil {
		return engine.Permanent(fmt.Errorf("settle snapshot %s: it was not tested", in.SnapshotID))
	}
	st, err := m.storeOf(ctx, s)
	if err != nil {
		return err
	}
	if err := st.PutRecord(ctx, recordPreRecovery, rec.PreRecovery.ID, rec.PreRecovery); err != nil {
		return fmt.Errorf("keep record of pre-recovery in the store: %w", err)
	}
	if err := st.PutRecord(ctx, recordVerdict, rec.Verdict.ID, rec.Verdict); err != nil {
		return fmt.Errorf("keep verdict in the store: %w", err)
	}
	if moved {
		if err := m.keepLKG(ctx, st, rec); err != nil {
			return err
		}
	}
	return m.expire(ctx, s)
}

// keepLKG has the store keep what last-known-good is and needs.
func (m *Master) keepLKG(ctx context.Context, st *store.Store, rec dr.Record) error {
	if err := m.keepDeltas(ctx, rec); err != nil {
		return err
	}
	if err := st.SetLKG(ctx, rec.Snapshot.ServerID, rec.Snapshot.ID); err != nil {
		return fmt.Errorf("mark last-known-good in the store: %w", err)
	}
	return nil
}

// expire lets go what the server's retention rule no longer asks for.
func (m *Master) expire(ctx context.Context, s dr.Server) error {
	records, err := m.Catalog.Snapshots(ctx, s.ID)
	if err != nil {
		return err
	}
	lkg, pinned := "", map[string]bool{}
	for _, r := range records {
		if r.LKG {
			lkg = r.Snapshot.ID
		}
	}
	active, err := m.Catalog.Invocations(ctx, false)
	if err != nil {
		return err
	}
	for _, inv := range active {
		pinned[inv.SnapshotID] = true
	}
	st, err := m.storeOf(ctx, s)
	if err != nil {
		return err
	}
	for _, id := range dr.Expirable(records, s.Retention, lkg, pinned) {
		if err := st.Forget(ctx, id); err != nil {
			if errors.Is(err, store.ErrPinned) {
				continue // somebody reads it: the next night will do
			}
			if !errors.Is(err, store.ErrNotFound) {
				return fmt.Errorf("expire snapshot %s: %w", id, err)
			}
		}
		if err := m.discard(ctx, id); err != nil {
			return fmt.Errorf("expire snapshot %s: %w", id, err)
		}
		if err := m.Catalog.Expire(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// ticket opens a ticket for work that failed and returns the failure. Cancelled work is nobody's problem.
func (m *Master) ticket(r *engine.Run, in work, problem dr.Problem, title string, cause error) error {
	if errors.Is(cause, engine.ErrCancelled) {
		return cause
	}
	_, err := engine.Step(r, "ticket", engine.StepOptions{Limit: recordLimit, Attempts: 3}, func(ctx context.Context) (string, error) {
		t, err := m.Catalog.OpenTicket(ctx, in.ServerID, problem, title, cause.Error(), in.SnapshotID, m.Now())
		return t.ID, err
	})
	if err != nil {
		m.Log.ErrorContext(r.Context(), "open ticket", "operation", r.ID(), "snapshot", in.SnapshotID, "problem", problem, "error", err)
	}
	return cause
}
