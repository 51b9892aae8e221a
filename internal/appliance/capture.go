package appliance

import (
	"context"
	"errors"
	"fmt"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/store"
)

// capturing is the input of protect: all identifiers are chosen before the run begins.
type capturing struct {
	ServerID string `json:"server_id"`
	Snapshot string `json:"snapshot"`
	Data     bool   `json:"data,omitempty"`  // the snapshot is of data
	Image    string `json:"image,omitempty"` // of the image that is taken first and that the data goes onto; "" one that is kept
}

// protect captures a server: (capture image →) capture → make room. What is kept is sent by runs of its own.
func (n *Node) protect(r *engine.Run, in capturing) error {
	if in.Image != "" {
		if err := n.captureStep(r, in, "capture image", in.Image, false); err != nil {
			return err
		}
	}
	if err := n.captureStep(r, in, "capture", in.Snapshot, in.Data); err != nil {
		return err
	}
	_, err := engine.Step(r, "make room", engine.StepOptions{Limit: captureLimit}, func(ctx context.Context) (bool, error) {
		return true, n.makeRoom(ctx)
	})
	return err
}

func (n *Node) captureStep(r *engine.Run, in capturing, step, id string, data bool) error {
	_, err := engine.Step(r, step, engine.StepOptions{Limit: captureLimit}, func(ctx context.Context) (string, error) {
		return id, n.capture(ctx, r, in, id, data)
	})
	if errors.Is(err, engine.ErrCancelled) {
		return err
	}
	_, noted := engine.Step(r, "note "+step, engine.StepOptions{Limit: recordLimit, Attempts: 3}, func(ctx context.Context) (bool, error) {
		if err == nil {
			return true, n.over(ctx, in.ServerID, dr.ProblemCapture)
		}
		return false, n.trouble(ctx, api.SiteProblem{ServerID: in.ServerID, Problem: dr.ProblemCapture, Title: "no snapshot could be taken",
			Detail: err.Error(), Since: n.now().UTC()})
	})
	n.poke()
	return errors.Join(err, noted)
}

// capture takes one snapshot and notes it.
func (n *Node) capture(ctx context.Context, r *engine.Run, in capturing, id string, data bool) error {
	s, ok := n.server(in.ServerID)
	if !ok {
		return engine.Permanent(fmt.Errorf("server %s is not protected any more", in.ServerID))
	}
	if err := n.makeRoom(ctx); err != nil {
		return err
	}
	task := api.SnapshotTask{ID: id, Server: s, Date: n.date}
	if data {
		if task.Image = in.Image; task.Image == "" {
			image, err := n.imageFor(s)
			if err != nil {
				return engine.Permanent(err)
			}
			task.Image = image.ID
		}
	}
	records := dr.OfKind(n.records(s.ID), data)
	if len(records) > 0 {
		task.Parent, task.Trusted, task.Usual = records[len(records)-1].Snapshot.ID, dr.Trusted(records), dr.UsualOf(records)
	}
	snap, err := n.Appliance.Snapshot(ctx, task, r.Report)
	if err != nil {
		return err
	}
	return n.kept(ctx, snap)
}

// imageFor chooses the image onto which a server's data goes.
func (n *Node) imageFor(s dr.Server) (dr.Snapshot, error) {
	of := s.ID
	if !s.HasImage() {
		of = s.Standby
	}
	var last dr.Snapshot
	for _, one := range n.history(of) {
		if !one.IsData() {
			last = one
		}
	}
	if last.ID == "" {
		return last, fmt.Errorf("there is no image yet that the data of %s could go onto", s.Name)
	}
	return last, nil
}

// makeRoom lets old snapshots go until the near store has its reserve free again. An error means that it is too full to capture:
// what may go is gone, and what is left is the floor, last-known-good, or not in the far store yet.
func (n *Node) makeRoom(ctx context.Context) error {
	n.room.Lock()
	defer n.room.Unlock()
	st := n.Appliance.Store
	var dropped int
	for range maxThinnings {
		u, err := st.Usage(ctx)
		if err != nil {
			return err
		}
		n.mu.Lock()
		n.usage = u
		n.mu.Unlock()
		reserve := n.reserve(u)
		if u.Free < 0 || u.Free >= reserve {
			return n.roomy(ctx, nil)
		}
		drop, err := n.thin(ctx, reserve-u.Free)
		if err != nil {
			return err
		}
		dropped += drop
		if drop == 0 && (dropped > 0 || u.Free >= reserve/2) {
			break
		}
		_, err = st.Collect(ctx, store.CollectOptions{Immediate: true}, nil)
		if errors.Is(err, store.ErrBusy) {
			break // something is being captured: what was let go is freed when that is over
		}
		if err != nil {
			return err
		}
		if drop == 0 {
			break
		}
	}
	u, err := st.Usage(ctx)
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.usage = u
	n.mu.Unlock()
	if reserve := n.reserve(u); u.Free < reserve/2 {
		return n.roomy(ctx, fmt.Errorf("the near store is full: %d bytes are free of a reserve of %d, and nothing more may be let go; %d snapshots are not in the far store yet: "+
			"mend the line, widen its windows, or give the appliance a larger disk", u.Free, reserve, n.owed()))
	}
	return n.roomy(ctx, nil)
}

// maxThinnings bounds how often in a row the near store is thinned: what a snapshot frees is only estimated.
const maxThinnings = 5

// reserve is how many bytes are kept free.
func (n *Node) reserve(u store.Usage) int64 {
	if n.Reserve > 0 {
		return n.Reserve
	}
	return (u.Bytes + max(u.Free, 0)) / reserveShare
}

// roomy notes whether there is room to capture.
func (n *Node) roomy(ctx context.Context, full error) error {
	n.mu.Lock()
	n.refuse = full
	n.mu.Unlock()
	if full == nil {
		return n.over(ctx, "", dr.ProblemNearFull)
	}
	err := n.trouble(ctx, api.SiteProblem{Problem: dr.ProblemNearFull, Title: "the near store of appliance " + n.Name + " is full: nothing is captured",
		Detail: full.Error(), Since: n.now().UTC()})
	n.poke()
	return errors.Join(full, err)
}

// thin lets snapshots go that are expected to free so many bytes.
func (n *Node) thin(ctx context.Context, need int64) (dropped int, err error) {
	st := n.Appliance.Store
	stays := map[string]bool{}
	lkg, err := st.LKG(ctx)
	if err != nil {
		return 0, err
	}
	for _, id := range lkg {
		stays[id] = true
	}
	holds, err := st.Holds(ctx)
	if err != nil {
		return 0, err
	}
	for id := range holds {
		stays[id] = true
	}
	for _, s := range n.protected() {
		for _, r := range n.records(s.ID) {
			if r.HeldBy != "" {
				stays[r.Snapshot.ID] = true // evidence, until a person has decided
			}
		}
	}
	near := n.near(n.Far != nil)
	for _, id := range dr.Thin(near, dr.Thinning{Need: need, Floor: n.Floor, Stays: stays, Now: n.now()}) {
		err := st.Forget(ctx, id)
		if errors.Is(err, store.ErrPinned) || errors.Is(err, store.ErrProtected) {
			continue // somebody reads it: next time
		}
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return dropped, err
		}
		if err := n.gone(ctx, id); err != nil {
			return dropped, err
		}
		dropped++
		n.Log.InfoContext(ctx, "snapshot let go to make room", "snapshot", id)
	}
	return dropped, nil
}

// owed counts the snapshots that are not in the far store and should be.
func (n *Node) owed() (owed int) {
	for _, one := range n.near(n.Far != nil) {
		if !one.Replicated {
			owed++
		}
	}
	return owed
}
