package appliance

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

// The kinds of record that a node keeps in its near store, besides the definitions of its servers.
const (
	recordPassage = "passage" // by snapshot: where it is on its way
	recordRuling  = "ruling"  // by snapshot: what a person said of it
	recordProblem = "problem" // by server and problem: what keeps the node from its work
	recordVersion = "definitions"
	versionID     = "version"
)

// passage is a snapshot of the near store on its way into the far one.
type passage struct {
	Seq      int64         `json:"seq"`                // the order in which snapshots were kept
	Spent    int64         `json:"spent,omitempty"`    // bytes that crossed the line in attempts that broke off
	Transfer *api.Transfer `json:"transfer,omitempty"` // it is in the far store
	Told     bool          `json:"told,omitempty"`     // the master has said that it is
	Refused  string        `json:"refused,omitempty"`  // why the master does not want it

	snapshot dr.Snapshot // without its inventory
}

// ledger is what a node remembers. All of it is in the near store, and survives the loss of everything else.
type ledger struct {
	store *store.Store

	mu       sync.Mutex
	seq      int64
	passages map[string]passage // by snapshot; of those that are in the near store
	servers  map[string]dr.Server
	version  string // of the servers' definitions
	rulings  map[string]dr.Ruling
	problems map[string]api.SiteProblem
}

// openLedger reads the ledger. A snapshot that it does not know, because the process died between keeping it and noting it, is
// taken in; one that is gone is left out.
func openLedger(ctx context.Context, st *store.Store) (*ledger, error) {
	l := &ledger{store: st, passages: map[string]passage{}}
	var err error
	if l.servers, err = readRecords[dr.Server](ctx, st, dr.ServerRecord); err != nil {
		return nil, err
	}
	if l.rulings, err = readRecords[dr.Ruling](ctx, st, recordRuling); err != nil {
		return nil, err
	}
	if l.problems, err = readRecords[api.SiteProblem](ctx, st, recordProblem); err != nil {
		return nil, err
	}
	versions, err := readRecords[string](ctx, st, recordVersion)
	if err != nil {
		return nil, err
	}
	l.version = versions[versionID]
	known, err := readRecords[passage](ctx, st, recordPassage)
	if err != nil {
		return nil, err
	}
	for _, p := range known {
		l.seq = max(l.seq, p.Seq)
	}
	snapshots, err := st.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range snapshots { // oldest first
		p, ok := known[s.ID]
		if !ok {
			if err := l.kept(ctx, s); err != nil {
				return nil, err
			}
			continue
		}
		delete(known, s.ID)
		p.snapshot = brief(s)
		l.passages[s.ID] = p
	}
	for id := range known { // let go, and the process died before it was noted
		if err := st.DeleteRecord(ctx, recordPassage, id); err != nil {
			return nil, err
		}
	}
	return l, nil
}

func readRecords[T any](ctx context.Context, st *store.Store, kind string) (map[string]T, error) {
	out := map[string]T{}
	err := st.Records(ctx, kind, func(id string, raw json.RawMessage) error {
		var v T
		if err := json.Unmarshal(raw, &v); err != nil {
			return fmt.Errorf("read %s %s from the near store: %w", kind, id, err)
		}
		out[id] = v
		return nil
	})
	return out, err
}

func brief(s dr.Snapshot) dr.Snapshot {
	s.Inventory = dr.Inventory{}
	return s
}

// kept notes a snapshot of the near store. Noted again it stays as it is.
func (l *ledger) kept(ctx context.Context, s dr.Snapshot) error {
	l.mu.Lock()
	_, known := l.passages[s.ID]
	l.seq++
	p := passage{Seq: l.seq, snapshot: brief(s)}
	l.mu.Unlock()
	if known {
		return nil
	}
	return l.put(ctx, s.ID, p)
}

// note changes what is known of a snapshot. One that has been let go is not noted again.
func (l *ledger) note(ctx context.Context, id string, change func(p *passage)) error {
	l.mu.Lock()
	p, ok := l.passages[id]
	l.mu.Unlock()
	if !ok {
		return nil
	}
	change(&p)
	return l.put(ctx, id, p)
}

func (l *ledger) put(ctx context.Context, id string, p passage) error {
	if err := l.store.PutRecord(ctx, recordPassage, id, p); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.passages[id] = p
	return nil
}

// gone notes that a snapshot was let go.
func (l *ledger) gone(ctx context.Context, id string) error {
	l.mu.Lock()
	delete(l.passages, id)
	l.mu.Unlock()
	return l.store.DeleteRecord(ctx, recordPassage, id)
}

func (l *ledger) passage(id string) (passage, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.passages[id]
	return p, ok
}

// near gives the snapshots of the near store. Without a far store none is owed to it; nor is one of a server that is not protected
// any more, or that the master refused.
func (l *ledger) near(far bool) (out []dr.Near) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.passages {
		_, protected := l.servers[p.snapshot.ServerID]
		out = append(out, dr.Near{Snapshot: p.snapshot, Seq: p.Seq, Replicated: p.Transfer != nil || !far || !protected || p.Refused != ""})
	}
	return out
}

// history gives a server's snapshots in the order in which they were kept.
func (l *ledger) history(serverID string) (out []dr.Snapshot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var its []passage
	for _, p := range l.passages {
		if p.snapshot.ServerID == serverID {
			its = append(its, p)
		}
	}
	slices.SortFunc(its, func(a, b passage) int { return int(a.Seq - b.Seq) })
	for _, p := range its {
		out = append(out, p.snapshot)
	}
	return out
}

// records gives a server's snapshots with what is known of each here: what is held, and what people said.
func (l *ledger) records(serverID string) []dr.Record {
	var out []dr.Record
	for _, s := range l.history(serverID) {
		r := dr.Record{Snapshot: s, State: dr.Kept}
		l.mu.Lock()
		if ruling, ok := l.rulings[s.ID]; ok {
			r.Ruling = &ruling
		}
		l.mu.Unlock()
		out = append(out, r)
	}
	held := dr.Holds(out)
	for i := range out {
		out[i].HeldBy = held[out[i].Snapshot.ID]
	}
	return out
}

// protected gives the servers by name.
func (l *ledger) protected() []dr.Server {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.SortedFunc(maps.Values(l.servers), func(a, b dr.Server) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
}

func (l *ledger) server(nameOrID string) (dr.Server, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s, ok := l.servers[nameOrID]; ok {
		return s, true
	}
	for _, s := range l.servers {
		if s.Name == nameOrID {
			return s, true
		}
	}
	return dr.Server{}, false
}

// define takes over the servers' definitions, and gives those that are not protected any more. The version is written last: cut
// off, all of it is done again.
func (l *ledger) define(ctx context.Context, version string, servers []dr.Server) (removed []dr.Server, err error) {
	l.mu.Lock()
	before := maps.Clone(l.servers)
	l.mu.Unlock()
	after := map[string]dr.Server{}
	for _, s := range servers {
		if err := l.store.PutRecord(ctx, dr.ServerRecord, s.ID, s); err != nil {
			return nil, err
		}
		after[s.ID] = s
		delete(before, s.ID)
	}
	for id, s := range before {
		if err := l.store.DeleteRecord(ctx, dr.ServerRecord, id); err != nil {
			return nil, err
		}
		removed = append(removed, s)
	}
	if err := l.store.PutRecord(ctx, recordVersion, versionID, version); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.servers, l.version = after, version
	return removed, nil
}

// ruled takes over what people said of held snapshots.
func (l *ledger) ruled(ctx context.Context, rulings []dr.Ruling) error {
	for _, r := range rulings {
		l.mu.Lock()
		same := l.rulings[r.SnapshotID] == r
		l.mu.Unlock()
		if same {
			continue
		}
		if err := l.store.PutRecord(ctx, recordRuling, r.SnapshotID, r); err != nil {
			return err
		}
		l.mu.Lock()
		l.rulings[r.SnapshotID] = r
		l.mu.Unlock()
	}
	return nil
}

func problemKey(serverID string, p dr.Problem) string {
	if serverID == "" {
		serverID = "appliance"
	}
	return serverID + "/" + string(p)
}

// trouble notes a problem; noted again it keeps when it began.
func (l *ledger) trouble(ctx context.Context, p api.SiteProblem) error {
	key := problemKey(p.ServerID, p.Problem)
	l.mu.Lock()
	if before, ok := l.problems[key]; ok {
		p.Since = before.Since
	}
	same := l.problems[key] == p
	l.problems[key] = p
	l.mu.Unlock()
	if same {
		return nil
	}
	return l.store.PutRecord(ctx, recordProblem, key, p)
}

// over notes that a problem is gone.
func (l *ledger) over(ctx context.Context, serverID string, p dr.Problem) error {
	key := problemKey(serverID, p)
	l.mu.Lock()
	_, there := l.problems[key]
	delete(l.problems, key)
	l.mu.Unlock()
	if !there {
		return nil
	}
	return l.store.DeleteRecord(ctx, recordProblem, key)
}

// troubles gives the problems of the node and of the servers that it protects.
func (l *ledger) troubles() (out []api.SiteProblem) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(l.problems)) {
		p := l.problems[key]
		if _, protected := l.servers[p.ServerID]; protected || p.ServerID == "" {
			out = append(out, p)
		}
	}
	return out
}
