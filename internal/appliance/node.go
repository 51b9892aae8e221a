package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/store"
)

// NodeConfig is what a node is made of.
type NodeConfig struct {
	*Appliance
	Name   string
	Engine *engine.Engine // not launched yet
	// Home is the master; nil: there is none, and the node works by the definitions that it has.
	Home api.Home
	// Far opens the far store; nil: there is none, and nothing is sent.
	Far     func(ctx context.Context) (*store.Store, error)
	Windows dr.Windows     // how fast may be sent when
	Zone    *time.Location // of the windows; nil: time.Local
	Reserve int64          // bytes that are kept free in the near store; 0: a tenth of its room
	Floor   int            // snapshots of each server and kind that are never let go; 0: DefaultFloor
	Log     *slog.Logger
	Version string
	SSHKey  string           // public half of its own key; see api.Hello
	Now     func() time.Time // nil: time.Now
	Tick    time.Duration    // how often it looks what is due; 0: DefaultTick
}

// Defaults and limits of a node.
const (
	DefaultTick    = 5 * time.Second
	DefaultFloor   = 3
	reserveShare   = 10 // the share of the room that is kept free: a tenth
	helloEvery     = 30 * time.Second
	helloLimit     = time.Minute
	firstHello     = 15 * time.Second // how long it is waited for the master's first answer before anything is begun
	roomEvery      = time.Minute      // how often the room is looked at between captures
	collectEvery   = 24 * time.Hour
	keepRuns       = 30 * 24 * time.Hour
	captureLimit   = 24 * time.Hour
	sendLimit      = 7 * 24 * time.Hour // a first copy over a thin line
	recordLimit    = 10 * time.Minute
	sendAttempts   = 8
	firstSendRetry = 10 * time.Second
	lastSendRetry  = 10 * time.Minute
	troubleAfter   = 3 // failed sends in a row that are told
	pollRun        = 100 * time.Millisecond
)

// Shape names the form of a node's runs, as master.Shape does.
const Shape = "1"

// The kinds of run.
const (
	kindProtect   = "protect"
	kindReplicate = "replicate"
)

// Node is an appliance that is a process of its own: it has a schedule, an engine and a memory, and needs nobody in order to capture
// and to keep. It implements api.Site. Its methods may be called from many goroutines.
type Node struct {
	NodeConfig
	*ledger
	started time.Time
	poked   chan struct{} // there is something to tell
	nudged  chan struct{} // there is something to do
	room    sync.Mutex    // one makes room
	hailing sync.Mutex    // one talks to the master
	clock   atomic.Pointer[clock]

	mu       sync.Mutex
	attempts map[string]dr.Attempt // by server: the last scheduled capture
	sends    map[string]failure    // by snapshot: sends that failed
	wanted   map[string]bool       // snapshots that somebody waits for
	far      *store.Store
	reached  atomic.Bool // the far store was tried once
	heard    time.Time   // when the master last answered
	link     error       // why it did not
	roomed   time.Time   // when the room was last looked at
	collect  time.Time
	refuse   error // why nothing is captured: the near store is full
	usage    store.Usage
}

// failure counts failed sends of a snapshot.
type failure struct {
	n    int
	last time.Time
	err  error
}

var _ api.Site = (*Node)(nil)

// OpenNode makes a node and registers its work with the engine. Start sets it going.
func OpenNode(ctx context.Context, c NodeConfig) (*Node, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Zone == nil {
		c.Zone = time.Local
	}
	if c.Tick == 0 {
		c.Tick = DefaultTick
	}
	if c.Floor == 0 {
		c.Floor = DefaultFloor
	}
	l, err := openLedger(ctx, c.Appliance.Store)
	if err != nil {
		return nil, fmt.Errorf("read what the near store remembers: %w", err)
	}
	n := &Node{NodeConfig: c, ledger: l, started: c.Now(), poked: make(chan struct{}, 1), nudged: make(chan struct{}, 1), attempts: map[string]dr.Attempt{},
		sends: map[string]failure{}, wanted: map[string]bool{}, collect: c.Now(), link: errNotYet}
	engine.Register(n.Engine, kindProtect, n.protect)
	engine.Register(n.Engine, kindReplicate, n.replicate)
	return n, nil
}

var errNotYet = errors.New("it has not been asked yet")

// Run carries out what an earlier process left, and then schedules until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	if err := n.Start(ctx); err != nil {
		return err
	}
	var home sync.WaitGroup
	asked := make(chan struct{})
	home.Go(func() { n.keepHome(ctx, asked) })
	defer home.Wait()
	select { // for the time, by which it is known what is due
	case <-asked:
	case <-time.After(firstHello):
	case <-ctx.Done():
	}
	ticker := time.NewTicker(n.Tick)
	defer ticker.Stop()
	for {
		n.Wake(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-n.nudged:
		}
	}
}

// Start carries out what an earlier process left.
func (n *Node) Start(ctx context.Context) error {
	if err := n.Engine.Launch(ctx); err != nil {
		return fmt.Errorf("resume runs: %w", err)
	}
	return nil
}

// keepHome talks to the master, whatever else goes on. asked is closed when that was tried once.
func (n *Node) keepHome(ctx context.Context, asked chan<- struct{}) {
	if n.Home == nil {
		close(asked)
		return
	}
	ticker := time.NewTicker(helloEvery)
	defer ticker.Stop()
	for first := true; ; first = false {
		if err := n.Hail(ctx); err != nil && ctx.Err() == nil {
			n.Log.WarnContext(ctx, "tell the master", "error", err)
		}
		if first {
			close(asked)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-n.poked:
		}
	}
}

// Close lets go of the far store. The engine is closed first.
func (n *Node) Close() error {
	n.closeFar()
	return nil
}

// poke has the master told soon, and what there is to do looked at.
func (n *Node) poke() {
	for _, c := range []chan struct{}{n.poked, n.nudged} {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// Wake looks at what is and what should be, once: it starts captures that are due, sends the next snapshot, keeps the near store from
// filling up.
func (n *Node) Wake(ctx context.Context) {
	runs, err := n.Engine.List(ctx, engine.Filter{Unfinished: true})
	if err != nil {
		n.Log.ErrorContext(ctx, "schedule", "error", err)
		return
	}
	busy, sending := map[string]bool{}, false
	for _, r := range runs {
		kind, server, _ := strings.Cut(r.ID, ".")
		server, _, _ = strings.Cut(server, ".")
		if kind == kindReplicate {
			sending = true
		} else {
			busy[server] = true
		}
	}
	n.look(ctx)
	for _, s := range n.protected() {
		if busy[s.Name] {
			continue
		}
		if err := n.wakeServer(ctx, s); err != nil && !errors.Is(err, engine.ErrBusy) {
			n.Log.ErrorContext(ctx, "schedule server", "server", s.Name, "error", err)
		}
	}
	if !sending {
		if err := n.sendNext(ctx); err != nil {
			n.Log.ErrorContext(ctx, "send", "error", err)
		}
	}
	if now := n.Now(); len(runs) == 0 && (now.Sub(n.collect) > collectEvery || now.Before(n.collect)) {
		n.collect = now
		if _, err := n.Appliance.Store.Collect(ctx, store.CollectOptions{}, nil); err != nil && !errors.Is(err, store.ErrBusy) {
			n.Log.ErrorContext(ctx, "collect near store", "error", err)
		}
		if _, err := n.Engine.Prune(ctx, now.Add(-keepRuns)); err != nil {
			n.Log.ErrorContext(ctx, "forget old runs", "error", err)
		}
	}
}

// look keeps the near store from filling up between captures as well.
func (n *Node) look(ctx context.Context) {
	now := n.Now()
	n.mu.Lock()
	due := now.Sub(n.roomed) > roomEvery || now.Before(n.roomed)
	if due {
		n.roomed = now
	}
	n.mu.Unlock()
	if due {
		if err := n.makeRoom(ctx); err != nil {
			n.Log.WarnContext(ctx, "make room in the near store", "error", err)
		}
	}
}

func (n *Node) wakeServer(ctx context.Context, s dr.Server) error {
	now, taken := n.now(), dr.TakenOf(n.history(s.ID))
	due := s.Dues(taken, now)
	n.mu.Lock()
	a := n.attempts[s.ID]
	wait := due.Next().After(now) || a.Again(s, now).After(now) || n.refuse != nil
	if !wait {
		n.attempts[s.ID] = a.Begin(taken.Last, now)
	}
	n.mu.Unlock()
	if wait {
		return nil
	}
	in := capturing{ServerID: s.ID, Snapshot: dr.NewSnapshotID(now), Data: s.HasData()}
	if s.HasImage() && s.HasData() && !due.Image.After(now) {
		in.Image = dr.NewSnapshotID(now)
	}
	return n.begin(ctx, s, in, true)
}

func runID(kind, server, subject string) string { return kind + "." + server + "." + subject }

func (n *Node) begin(ctx context.Context, s dr.Server, in capturing, refuse bool) error {
	return engine.Start(ctx, n.Engine, kindProtect, runID(kindProtect, s.Name, in.Snapshot), in, engine.StartOptions{Key: "server/" + s.ID, Refuse: refuse})
}

// operation shows a run to people.
func operation(s engine.Status) api.Operation {
	parts := append(strings.SplitN(s.ID, ".", 3), "", "")
	op := api.Operation{ID: s.ID, Kind: parts[0], Server: parts[1], Subject: parts[2], State: api.OperationState(s.State), Step: s.Step, Error: s.Error, Started: s.Created}
	if p := s.Progress; p != nil {
		op.Part, op.Done, op.Total, op.Unit = p.Part, p.Done, p.Total, p.Unit
	}
	return op
}
