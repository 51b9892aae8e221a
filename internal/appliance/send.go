package appliance

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

// sending is the input of replicate.
type sending struct {
	ServerID string `json:"server_id"`
	Snapshot string `json:"snapshot"`
}

// sendNext starts to send the snapshot whose turn it is. While the master does not answer nothing is begun; what was begun goes on
// when it is back.
func (n *Node) sendNext(ctx context.Context) error {
	if n.Far == nil || n.rate() < 0 {
		return nil
	}
	now := n.now()
	n.mu.Lock()
	away := n.Home != nil && n.link != nil
	not, wanted := map[string]bool{}, ""
	for id, f := range n.sends {
		wait := min(firstSendRetry<<min(f.n-1, 10), lastSendRetry)
		if f.last.Add(wait).After(now) && !f.last.After(now) {
			not[id] = true
		}
	}
	for id := range n.wanted {
		if p, ok := n.passage(id); ok && p.Transfer == nil && !not[id] && (wanted == "" || id > wanted) {
			wanted = id
		}
	}
	n.mu.Unlock()
	if away {
		return nil
	}
	servers := map[string]dr.Server{}
	for _, s := range n.protected() {
		servers[s.ID] = s
	}
	near := n.near(true)
	id := dr.NextToSend(near, servers, not, now)
	if wanted != "" {
		p, _ := n.passage(wanted)
		id = wanted
		if image, ok := n.passage(p.snapshot.Image); ok && image.Transfer == nil {
			id = image.snapshot.ID
		}
	}
	p, ok := n.passage(id)
	s, protected := n.server(p.snapshot.ServerID)
	if !ok || !protected {
		return nil
	}
	subject := id + "." + dr.NewID("send")
	return engine.Start(ctx, n.Engine, kindReplicate, runID(kindReplicate, s.Name, subject), sending{ServerID: s.ID, Snapshot: id}, engine.StartOptions{Key: kindReplicate})
}

// rate is how many bytes a second may be sent now.
func (n *Node) rate() int64 { return n.Windows.Rate(n.now().In(n.Zone)) }

// replicate sends one snapshot: send → note.
func (n *Node) replicate(r *engine.Run, in sending) error {
	transfer, err := engine.Step(r, "send", engine.StepOptions{Limit: sendLimit, Attempts: sendAttempts}, func(ctx context.Context) (api.Transfer, error) {
		return n.send(ctx, r, in.Snapshot)
	})
	_, noted := engine.Step(r, "note", engine.StepOptions{Limit: recordLimit, Attempts: 3}, func(ctx context.Context) (bool, error) {
		if err == nil {
			return true, n.sent(ctx, in, transfer)
		}
		return false, n.sendFailed(ctx, in, err)
	})
	n.poke()
	return errors.Join(err, noted)
}

// send brings a snapshot into the far store. Each block that is put there was read back before the put was answered.
func (n *Node) send(ctx context.Context, r *engine.Run, id string) (api.Transfer, error) {
	p, ok := n.passage(id)
	switch {
	case !ok:
		return api.Transfer{}, engine.Permanent(fmt.Errorf("snapshot %s was let go before it was sent", id))
	case p.Transfer != nil:
		return *p.Transfer, nil
	}
	far, err := n.openFar(ctx)
	if err != nil {
		return api.Transfer{}, err
	}
	start := time.Now()
	done, err := store.Replicate(ctx, n.Appliance.Store, far, id, store.ReplicateOptions{Rate: n.rate}, r.Report)
	if err != nil {
		n.closeFar() // it may be the reason
		if done.Sent > 0 {
			err = errors.Join(err, n.note(context.WithoutCancel(ctx), id, func(p *passage) { p.Spent += done.Sent }))
		}
		return api.Transfer{}, err
	}
	return api.Transfer{Snapshot: id, At: n.now().UTC(), Sent: p.Spent + done.Sent, Took: time.Since(start)}, nil
}

func (n *Node) sent(ctx context.Context, in sending, t api.Transfer) error {
	n.mu.Lock()
	delete(n.sends, in.Snapshot)
	n.mu.Unlock()
	if err := n.note(ctx, in.Snapshot, func(p *passage) { p.Transfer = &t }); err != nil {
		return err
	}
	n.Log.InfoContext(ctx, "snapshot is in the far store", "snapshot", in.Snapshot, "sent", t.Sent)
	return n.over(ctx, in.ServerID, dr.ProblemSend)
}

func (n *Node) sendFailed(ctx context.Context, in sending, cause error) error {
	n.mu.Lock()
	f := n.sends[in.Snapshot]
	f = failure{n: f.n + 1, last: n.now(), err: cause}
	n.sends[in.Snapshot] = f
	n.mu.Unlock()
	if f.n < troubleAfter || errors.Is(cause, engine.ErrCancelled) {
		return nil
	}
	return n.trouble(ctx, api.SiteProblem{ServerID: in.ServerID, Problem: dr.ProblemSend, Title: "a snapshot could not be sent",
		Detail: cause.Error(), Since: n.now().UTC()})
}

// openFar gives the far store, which stays open until something goes wrong with it.
func (n *Node) openFar(ctx context.Context) (*store.Store, error) {
	n.mu.Lock()
	far := n.far
	n.mu.Unlock()
	if far != nil {
		return far, nil
	}
	far, err := n.Far(ctx)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.far = far
	return far, nil
}

func (n *Node) closeFar() {
	n.mu.Lock()
	far := n.far
	n.far = nil
	n.mu.Unlock()
	if far != nil {
		if err := far.Close(context.Background()); err != nil {
			n.Log.Warn("close far store", "error", err)
		}
	}
}
