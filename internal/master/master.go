// Package master is the role that holds the catalog and the rules: what to do next, what is proven, who may. It asks an
// appliance to capture and a silo to prepare, test and run, writes down what came of it, and never touches a disk or a
// virtual machine itself.
//
// Every piece of long work is a run of the engine, called an operation. Its identifier says what it is about:
//
//	KIND.SERVER.SUBJECT    protect.shop.snap-20260101t020000-k3mq2a7x
//
// What a silo is to do waits until one has room for it, and is done under a lease (farm.go). Which silo that is, is dr.Place's to
// say; a silo that is not heard of loses what it has to another (beat.go), but for invoked machines.
//
// Runs of one server wait for each other. Each step of a run may be repeated after a crash: everything asked of an
// appliance or a silo is asked under an identifier chosen before the run began.
//
//	protect    (capture image →) capture → pre-recover → test → settle     every scheduled or wanted snapshot;
//	           capture → replicate → …                                     one wanted of a server whose appliance is elsewhere;
//	           pre-recover → test → settle                                 one that such an appliance took by itself, when it has arrived
//	replicate  replicate                                                   an appliance is asked to send a snapshot now
//	prerecover pre-recover
//	test       (pre-recover →) test → settle
//	rule       rule → settle                             a person accepts or refuses a held snapshot
//	invoke     boot → check → hand over                  undone if it does not come to run
//	end        stop, keep or discard
//	verify, collect, adopt                               of the store
//
// Knows: the order of things, the catalog, when a ticket is due.
// Must not know: how a disk is read, how an image is changed, how a machine is started.
package master

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/store"
)

// Config is what a master is made of. All fields are needed but those with a default.
type Config struct {
	Catalog   *catalog.Catalog
	Engine    *engine.Engine // not launched yet
	Store     *store.Store   // the installation's own
	Appliance api.Appliance
	// Customers have far stores of their own; nil: there are none.
	Customers *store.Customers
	// CustomerOf says whose an appliance elsewhere is; an error if it is nobody's. nil: nobody asks.
	CustomerOf func(appliance string) (string, error)
	// Sites gives the appliance elsewhere of a name; an error if it is not connected. nil: there are none.
	Sites func(name string) (api.Site, error)
	// Far makes sure that a snapshot, of which an appliance says that it was replicated, is in the far store. nil: the master looks there.
	// An error of kind api.Refused is for good.
	Far   func(ctx context.Context, server dr.Server, snapshot string) error
	Silos Silos
	// Nodes gives the appliances and silos elsewhere that were enrolled; what it does not know of when they were heard of the master adds. nil:
	// nobody can be.
	Nodes    func() ([]api.NodeFigures, error)
	Home     string // the silo that is part of this process; "" none
	Log      *slog.Logger
	Version  string
	Data     string           // folder of the installation, for people
	Location string           // of the installation's own store, for people
	Now      func() time.Time // nil: time.Now
	Tick     time.Duration    // how often the scheduler looks; 0: DefaultTick
	Grace    time.Duration    // how long a snapshot may stay untested; 0: DefaultGrace
	Away     time.Duration    // how long an appliance may be silent; 0: DefaultAway
	// Access gives what a silo elsewhere needs to open the store of a server's customer; nil: silos have it.
	Access func(ctx context.Context, server dr.Server) (*api.Access, error)
	// Lease is how long leases of silos last unless they are renewed, and LeaseGrace how much later their work is given away; 0: dr's.
	Lease, LeaseGrace time.Duration
}

// Defaults of Config.
const (
	DefaultTick  = 5 * time.Second
	DefaultGrace = 2 * time.Hour
)

// Master implements api.Operator. Its methods may be called from many goroutines.
type Master struct {
	Config
	started time.Time
	farm    *farm

	mu       sync.Mutex
	results  map[string]json.RawMessage // of finished verify, collect and adopt operations of this process
	attempts map[string]dr.Attempt      // per server: the last scheduled capture
	tested   map[string]dr.Attempt      // per snapshot: the last try of a test that is overdue; replaced, never changed
	warned   map[string]bool            // invocations whose machine was found dead
	collect  time.Time                  // when the store was last collected
	woke     time.Time                  // when the scheduler last came round
	sites    map[string]siteSeen        // appliances elsewhere, as they last said
	said     map[string]bool            // problems that were said, so that they are not said again at every look
	watched  time.Time                  // when the arrivals were last looked at

	observed observed
}

var (
	_ api.Operator = (*Master)(nil)
	_ api.Home     = (*Master)(nil)
	_ api.Journal  = (*Master)(nil)
)

// Open makes a master and registers its work with the engine. Start sets it going.
func Open(config Config) *Master {
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.Tick == 0 {
		config.Tick = DefaultTick
	}
	if config.Grace == 0 {
		config.Grace = DefaultGrace
	}
	if config.Away == 0 {
		config.Away = DefaultAway
	}
	if config.Lease == 0 {
		config.Lease, config.LeaseGrace = dr.LeaseTime, dr.LeaseGrace
	}
	m := &Master{Config: config, started: config.Now(), farm: newFarm(), sites: map[string]siteSeen{}, said: map[string]bool{},
		results: map[string]json.RawMessage{}, attempts: map[string]dr.Attempt{}, warned: map[string]bool{}, collect: config.Now(), woke: config.Now()}
	if m.Far == nil {
		m.Far = m.inStore
	}
	engine.Register(m.Engine, kindProtect, m.protect)
	engine.Register(m.Engine, kindReplicate, m.replicate)
	engine.Register(m.Engine, kindPreRecover, m.prerecover)
	engine.Register(m.Engine, kindTest, m.test)
	engine.Register(m.Engine, kindRule, m.rule)
	engine.Register(m.Engine, kindInvoke, m.invoke)
	engine.Register(m.Engine, kindMove, m.move)
	engine.Register(m.Engine, kindEnd, m.end)
	engine.Register(m.Engine, kindVerify, m.verifyStore)
	engine.Register(m.Engine, kindCollect, m.collectStore)
	engine.Register(m.Engine, kindAdopt, m.adoptStore)
	return m
}

// Shape names the form of the runs below: it changes when a step is added, removed, renamed or moved, so that a run begun
// by an older release is failed and started anew rather than carried on wrongly. The program gives it to the engine.
const Shape = "4"

// The kinds of operation.
const (
	kindProtect    = "protect"
	kindReplicate  = "replicate"
	kindPreRecover = "prerecover"
	kindTest       = "test"
	kindRule       = "rule"
	kindInvoke     = "invoke"
	kindMove       = "move"
	kindEnd        = "end"
	kindVerify     = "verify"
	kindCollect    = "collect"
	kindAdopt      = "adopt"
)

var kinds = []string{kindProtect, kindPreRecover, kindTest, kindRule, kindInvoke, kindMove, kindEnd, kindVerify, kindCollect, kindAdopt}

// Start makes the platform whole again after whatever ended the last process: machines and layers nobody owns are
// removed, invocations are tended, and unfinished operations go on. Until ctx ends it keeps in touch with the silos.
func (m *Master) Start(ctx context.Context) error {
	if err := m.loadSites(ctx); err != nil {
		return fmt.Errorf("start master: %w", err)
	}
	for _, name := range m.Silos.Names() {
		if _, err := m.hear(ctx, name); err != nil {
			m.Log.ErrorContext(ctx, "silo does not answer", "silo", name, "error", err)
		}
	}
	if err := m.adoptInvocations(ctx); err != nil {
		return fmt.Errorf("start master: %w", err)
	}
	if err := m.Engine.Launch(ctx); err != nil {
		return fmt.Errorf("resume operations: %w", err)
	}
	m.tend(ctx)
	seq, err := m.Catalog.LastEvent(ctx)
	m.observed.tally.Seq = seq // what is counted happened since
	go m.beat(ctx)
	return err
}

// Version implements api.Operator.
func (m *Master) Version(context.Context) (api.Version, error) {
	return api.Version{Version: m.Config.Version, Started: m.started, Data: m.Data}, nil
}

// event writes an event that no other transaction writes; its loss is not worth failing for.
func (m *Master) event(ctx context.Context, kind, server, subject, message string) {
	if err := m.Catalog.AddEvent(ctx, dr.Event{At: m.Now(), Kind: kind, Server: server, Subject: subject, Message: message}); err != nil {
		m.Log.ErrorContext(ctx, "write event", "kind", kind, "error", err)
	}
}

func operationID(kind, server, subject string) string { return kind + "." + server + "." + subject }

func serverKey(server string) string { return "server/" + server }

// begin starts an operation and answers with how it stands.
func begin[In any](ctx context.Context, m *Master, kind, server, subject string, in In, o engine.StartOptions) (api.Operation, error) {
	id := operationID(kind, server, subject)
	if err := engine.Start(ctx, m.Engine, kind, id, in, o); err != nil {
		if errors.Is(err, engine.ErrBusy) {
			return api.Operation{}, api.Errorf(api.Conflict, "%s is being worked on: wait for it, see 'muster operations' (%w)", server, err)
		}
		return api.Operation{}, fmt.Errorf("start %s: %w", id, err)
	}
	return m.Operation(ctx, id, 0, 0)
}

// Operations implements api.Operator.
func (m *Master) Operations(ctx context.Context) ([]api.Operation, error) {
	all, err := m.Engine.List(ctx, engine.Filter{})
	if err != nil {
		return nil, err
	}
	var out []api.Operation
	for _, s := range all {
		out = append(out, m.view(s))
	}
	return out, nil
}

// view shows a run of the engine as an operation.
func (m *Master) view(s engine.Status) api.Operation {
	parts := strings.SplitN(s.ID, ".", 3)
	for len(parts) < 3 {
		parts = append(parts, "")
	}
	op := api.Operation{ID: s.ID, Kind: parts[0], Server: parts[1], Subject: parts[2], State: api.OperationState(s.State),
		Step: s.Step, Error: s.Error, Started: s.Created}
	if p := s.Progress; p != nil {
		op.Part, op.Done, op.Total, op.Unit = p.Part, p.Done, p.Total, p.Unit
	}
	if op.State.Finished() {
		finished := s.Finished
		op.Finished = &finished
	}
	m.mu.Lock()
	op.Result = m.results[s.ID]
	m.mu.Unlock()
	op.Silo = m.siloOfRun(s.ID)
	op.Seen = fingerprint(op)
	return op
}

// fingerprint changes whenever an operation does.
func fingerprint(op api.Operation) int64 {
	h := uint64(14695981039346656037)
	for _, b := range fmt.Appendf(nil, "%s|%s|%s|%d|%d|%s|%s", op.State, op.Step, op.Part, op.Done, op.Total, op.Error, op.Silo) {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return int64(h >> 1)
}

// pollOperation is how often a waiting request looks again.
const pollOperation = 100 * time.Millisecond

// Operation implements api.Operator.
func (m *Master) Operation(ctx context.Context, id string, seen int64, wait time.Duration) (api.Operation, error) {
	deadline := time.Now().Add(min(wait, api.MaxWait))
	for {
		s, err := m.Engine.Status(ctx, id)
		if errors.Is(err, engine.ErrNotFound) {
			return api.Operation{}, api.Errorf(api.NotFound, "there is no operation %q: see 'muster operations'", id)
		}
		if err != nil {
			return api.Operation{}, err
		}
		op := m.view(s)
		if op.Seen != seen || op.State.Finished() || time.Now().After(deadline) {
			return op, nil
		}
		select {
		case <-ctx.Done():
			return op, ctx.Err()
		case <-time.After(pollOperation):
		}
	}
}

// CancelOperation implements api.Operator.
func (m *Master) CancelOperation(ctx context.Context, id string) error {
	err := m.Engine.Cancel(ctx, id)
	if errors.Is(err, engine.ErrNotFound) {
		return api.Errorf(api.NotFound, "there is no operation %q: see 'muster operations'", id)
	}
	return err
}

// keepResult remembers what an operation found, for whoever asks until this process ends; its event stays longer.
func (m *Master) keepResult(id string, v any) {
	raw, err := json.Marshal(v)
	if err != nil {
		return
	}
	m.mu.Lock()
	m.results[id] = raw
	m.mu.Unlock()
}
