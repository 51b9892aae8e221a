package appliance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/store"
)

// Hail tells the master how the node stands and what has arrived, and takes over what it answers.
func (n *Node) Hail(ctx context.Context) error {
	if n.Home == nil {
		return nil
	}
	n.hailing.Lock()
	defer n.hailing.Unlock()
	err := n.hail(ctx)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.link = err
	if err == nil {
		n.heard = n.Now()
	}
	return err
}

func (n *Node) hail(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, helloLimit)
	defer cancel()
	asked := n.Now()
	w, err := n.Home.Hello(limited, n.Name, n.hello())
	if err != nil {
		return err
	}
	n.compare(ctx, asked, n.Now(), w.Clock)
	if err := n.welcome(ctx, w); err != nil {
		return fmt.Errorf("take over what the master says: %w", err)
	}
	if n.Far != nil && !n.reached.Swap(true) {
		// So that one which the master awaits is made, and what is wrong with it is known, before there is something to send.
		if _, err := n.openFar(ctx); err != nil {
			n.Log.WarnContext(ctx, "open far store", "error", err)
		}
	}
	return n.tellArrivals(ctx)
}

func (n *Node) hello() api.Hello {
	near := n.near(n.Far != nil)
	n.mu.Lock()
	u := n.usage
	n.mu.Unlock()
	h := api.Hello{Version: n.Version, Clock: n.Now().UTC(), Started: n.started.UTC(), Definitions: n.definitions(), Snapshots: len(near),
		Owed: n.owed(), SSHKey: n.SSHKey, Used: u.Bytes, Free: u.Free, Problems: n.troubles(), Servers: []api.SiteServer{}}
	for _, s := range n.protected() {
		h.Servers = append(h.Servers, n.siteServer(s, near))
	}
	return h
}

func (l *ledger) definitions() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.version
}

func (n *Node) siteServer(s dr.Server, near []dr.Near) api.SiteServer {
	out := api.SiteServer{ID: s.ID, Name: s.Name}
	taken := dr.TakenOf(n.history(s.ID))
	out.Due, out.Kept = s.Dues(taken, n.now()).Next(), taken.Last
	for _, one := range near {
		if one.Snapshot.ServerID != s.ID {
			continue
		}
		out.Snapshots++
		if p, ok := n.passage(one.Snapshot.ID); ok && p.Transfer != nil {
			if one.Snapshot.Taken.After(out.Replicated) {
				out.Replicated = one.Snapshot.Taken
			}
		} else if !one.Replicated {
			out.Owed++
		}
	}
	return out
}

// welcome takes over what the master says. Done again it changes nothing.
func (n *Node) welcome(ctx context.Context, w api.Welcome) error {
	if w.Definitions != n.definitions() {
		for _, s := range w.Servers {
			if err := s.Validate(); err != nil {
				return fmt.Errorf("definition of %.80q: %w", s.Name, err)
			}
		}
		removed, err := n.define(ctx, w.Definitions, w.Servers)
		if err != nil {
			return err
		}
		n.Log.InfoContext(ctx, "definitions of servers taken over", "servers", len(w.Servers), "removed", len(removed))
		for _, s := range removed {
			n.release(ctx, s)
		}
	}
	if err := n.ruled(ctx, w.Rulings); err != nil {
		return err
	}
	return n.keepLKG(ctx, w.LKG)
}

// keepLKG marks in the near store what has to stay.
func (n *Node) keepLKG(ctx context.Context, want map[string]string) error {
	have, err := n.Appliance.Store.LKG(ctx)
	if err != nil {
		return err
	}
	for _, s := range n.protected() {
		id := want[s.ID]
		if _, there := n.passage(id); !there {
			id = ""
		}
		if have[s.ID] == id {
			continue
		}
		if err := n.Appliance.Store.SetLKG(ctx, s.ID, id); err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
	}
	return nil
}

// releaseLimit is how long cleaning a server may take that is not protected any more.
const releaseLimit = 2 * time.Minute

// release ends the work on a server that is not protected any more, and removes what captures left on it. Its snapshots stay
// until the room is needed.
func (n *Node) release(ctx context.Context, s dr.Server) {
	runs, err := n.Engine.List(ctx, engine.Filter{Key: "server/" + s.ID, Unfinished: true})
	for _, r := range runs {
		err = errors.Join(err, n.Engine.Cancel(ctx, r.ID))
	}
	err = errors.Join(err, n.Appliance.Store.DropPartial(ctx, s.ID), n.Appliance.Store.SetLKG(ctx, s.ID, ""))
	if err != nil {
		n.Log.WarnContext(ctx, "let go of server", "server", s.Name, "error", err)
	}
	limited, cancel := context.WithTimeout(ctx, releaseLimit)
	defer cancel()
	if err := n.Appliance.Forget(limited, s.Source); err != nil {
		n.Log.WarnContext(ctx, "the agent's cache folder may be left on the server", "server", s.Name, "error", err)
	}
}

// tellArrivals tells what is in the far store and was not told yet, oldest first.
func (n *Node) tellArrivals(ctx context.Context) error {
	var todo []passage
	n.ledger.mu.Lock()
	for _, p := range n.passages {
		if p.Transfer != nil && !p.Told && p.Refused == "" {
			todo = append(todo, p)
		}
	}
	n.ledger.mu.Unlock()
	slices.SortFunc(todo, func(a, b passage) int { return cmp.Compare(a.Seq, b.Seq) })
	for part := range slices.Chunk(todo, api.MaxArrivals) {
		if err := n.tellPart(ctx, part); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) tellPart(ctx context.Context, part []passage) error {
	var arrivals []api.Arrival
	for _, p := range part {
		whole, err := n.Appliance.Store.Snapshot(ctx, p.snapshot.ID)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		arrivals = append(arrivals, api.Arrival{Snapshot: whole, Transfer: *p.Transfer})
	}
	limited, cancel := context.WithTimeout(ctx, helloLimit)
	defer cancel()
	answers, err := n.Home.Arrived(limited, n.Name, arrivals)
	if err != nil {
		return err
	}
	for id, refused := range answers {
		if err := n.note(ctx, id, func(p *passage) { p.Told, p.Refused = refused == "", refused }); err != nil {
			return err
		}
		if refused != "" {
			n.Log.WarnContext(ctx, "the master refuses a snapshot", "snapshot", id, "why", refused)
		}
	}
	return nil
}

// Look implements api.Site.
func (n *Node) Look(context.Context) error {
	n.poke()
	return nil
}

// Status implements api.Site.
func (n *Node) Status(ctx context.Context) (api.SiteStatus, error) {
	u, err := n.Appliance.Store.Usage(ctx)
	if err != nil {
		return api.SiteStatus{}, err
	}
	runs, err := n.Engine.List(ctx, engine.Filter{Unfinished: true})
	if err != nil {
		return api.SiteStatus{}, err
	}
	n.mu.Lock()
	n.usage = u
	out := api.SiteStatus{Name: n.Name, Link: "connected", Heard: n.heard, Reserve: n.reserve(u), Rate: n.rate()}
	if c := n.clock.Load(); c != nil {
		out.Skew = c.ahead
	}
	switch {
	case n.Home == nil:
		out.Link = "none: this appliance has not joined a master"
	case n.link != nil:
		out.Link = "away: " + n.link.Error()
	}
	n.mu.Unlock()
	out.Hello = n.hello()
	if err := n.Browser.Ready(); err != nil {
		out.Files = err.Error()
	}
	for _, r := range runs {
		out.Working = append(out.Working, operation(r))
	}
	return out, nil
}

// Snapshot implements api.Appliance: a snapshot is taken now, by a run of the node's own, which goes on if the one who asked goes away.
func (n *Node) Snapshot(ctx context.Context, task api.SnapshotTask, report dr.Progress) (dr.Snapshot, error) {
	if err := dr.ValidateID(task.ID); err != nil {
		return dr.Snapshot{}, api.Errorf(api.Invalid, "%w", err)
	}
	s, ok := n.server(task.Server.ID)
	if !ok { // it was added just now
		if err := n.Hail(ctx); err != nil {
			return dr.Snapshot{}, api.Errorf(api.Unavailable, "learn of server %s: %w", task.Server.Name, err)
		}
		if s, ok = n.server(task.Server.ID); !ok {
			return dr.Snapshot{}, api.Errorf(api.NotFound, "appliance %s does not protect %s", n.Name, task.Server.Name)
		}
	}
	in := capturing{ServerID: s.ID, Snapshot: task.ID, Data: task.Image != ""}
	if err := n.begin(ctx, s, in, false); err != nil {
		return dr.Snapshot{}, err
	}
	if err := n.follow(ctx, runID(kindProtect, s.Name, task.ID), report); err != nil {
		return dr.Snapshot{}, err
	}
	return n.Appliance.Store.Snapshot(ctx, task.ID)
}

// follow waits for a run and tells how far it is.
func (n *Node) follow(ctx context.Context, id string, report dr.Progress) error {
	for {
		s, err := n.Engine.Status(ctx, id)
		switch {
		case err != nil:
			return err
		case s.State == engine.Succeeded:
			return nil
		case s.State.Over():
			return errors.New(s.Error)
		case s.Progress != nil:
			report.Report(s.Progress.Part, s.Progress.Done, s.Progress.Total, s.Progress.Unit)
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pollRun):
		return nil
	}
}

// Contact implements api.Appliance.
func (n *Node) Contact(ctx context.Context, source dr.Source) (api.Contact, error) {
	return n.Appliance.Contact(ctx, source)
}

// Forget implements api.Appliance.
func (n *Node) Forget(ctx context.Context, source dr.Source) error {
	return n.Appliance.Forget(ctx, source)
}

// Replicate implements api.Site.
func (n *Node) Replicate(ctx context.Context, server, snapshot string, report dr.Progress) (api.Transfer, error) {
	if n.Far == nil {
		return api.Transfer{}, api.Errorf(api.Conflict, "appliance %s has no far store to send to: it has not joined a master", n.Name)
	}
	if snapshot == "" {
		s, _ := n.server(server)
		history := n.history(s.ID)
		if len(history) == 0 {
			return api.Transfer{}, api.Errorf(api.NotFound, "appliance %s has no snapshot of that server yet", n.Name)
		}
		snapshot = history[len(history)-1].ID
	}
	n.mu.Lock()
	n.wanted[snapshot] = true
	before := n.sends[snapshot]
	delete(n.sends, snapshot) // it is tried now, whatever was before
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		delete(n.wanted, snapshot)
		n.mu.Unlock()
	}()
	n.poke()
	for {
		p, ok := n.passage(snapshot)
		n.mu.Lock()
		failed := n.sends[snapshot]
		n.mu.Unlock()
		switch {
		case !ok:
			return api.Transfer{}, api.Errorf(api.NotFound, "snapshot %s is not in the near store of appliance %s", snapshot, n.Name)
		case p.Refused != "":
			return api.Transfer{}, api.Errorf(api.Refused, "%s", p.Refused)
		case p.Transfer != nil && (p.Told || n.Home == nil):
			return *p.Transfer, nil
		case failed.n > 0 && !failed.last.Equal(before.last):
			return api.Transfer{}, api.Errorf(api.Unavailable, "send snapshot %s: %w; it is tried again by itself", snapshot, failed.err)
		}
		n.reportSending(ctx, report)
		if err := pause(ctx); err != nil {
			return api.Transfer{}, err
		}
	}
}

// reportSending tells how far the snapshot is that is being sent.
func (n *Node) reportSending(ctx context.Context, report dr.Progress) {
	runs, err := n.Engine.List(ctx, engine.Filter{Key: kindReplicate, Unfinished: true, Limit: 1})
	if err != nil || len(runs) == 0 || runs[0].Progress == nil {
		report.Report("waiting to send", 0, 0, "")
		return
	}
	p := runs[0].Progress
	report.Report(p.Part, p.Done, p.Total, p.Unit)
}
