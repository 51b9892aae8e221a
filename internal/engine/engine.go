package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
)

// Errors of this package, matched with errors.Is.
var (
	ErrLocked    = errors.New("another process has the database of runs open")
	ErrBusy      = errors.New("another run works on it")
	ErrNotFound  = errors.New("no such run")
	ErrCancelled = errors.New("the run was cancelled")
	ErrClosed    = errors.New("the engine is closed")
	ErrNewer     = errors.New("a newer release of Muster has written to the database of runs: install that one again, or go back to a copy from before")
)

// Limits.
const (
	MaxStarts     = 50      // times a run is started before it is given up and undone: it seems to kill its process
	MaxRecord     = 8 << 20 // bytes of an input or of a step's result, as JSON
	MaxRunning    = 256     // runs in progress at once; others are queued
	MaxName       = 200     // bytes of the name of a run, key, kind or step
	DefaultLease  = time.Minute
	MinLease      = 200 * time.Millisecond
	closeLimit    = 30 * time.Second
	pollEvery     = 100 * time.Millisecond // how often the queue is looked at
	queueName     = "runs"
	workflowName  = "run"
	libraryPinned = "1" // the library's own idea of our version; ours is in the run's envelope
)

// Config says where runs are kept and who carries them out.
type Config struct {
	DSN string // path of a SQLite file, or a postgres:// URL
	// Version names the shape of the registered functions. It changes when a step is added, removed, renamed or moved;
	// a run begun under another version is failed rather than carried on wrongly.
	Version string
	// Resources are what this host has a few of: a step that Needs one waits until one is free.
	Resources map[string]int
	// Host is what people call this process among those that share a PostgreSQL database. Of one name there is one at a
	// time: what an earlier process of that name left is carried on at once. "": nobody's.
	Host string
	// Lease is how long this process may be out of touch with PostgreSQL before its runs are others'. 0: DefaultLease.
	Lease  time.Duration
	Logger *slog.Logger // nil: slog.Default()
}

// Engine keeps runs and carries them out. Its methods may be called from many goroutines.
type Engine struct {
	db        *database
	dbos      dbos.Context
	version   string
	log       *slog.Logger
	resources map[string]chan struct{}

	starting sync.Mutex // one Start at a time, so that Refuse sees every earlier one

	mu                          sync.Mutex
	kinds                       map[string]kind
	active                      map[string]*Run
	entered                     map[string]struct{} // runs that the library has handed to this process
	launching, launched, closed bool

	stop    context.CancelFunc // ends keep and converse
	keeping sync.WaitGroup
	losing  sync.Once
	lost    chan struct{}
}

// kind is one registered function.
type kind struct {
	in reflect.Type
	do func(r *Run, input json.RawMessage) error
}

// Open opens the database of runs, and makes it if there is none. ErrLocked if it is a file that another process has,
// ErrNewer if a later release has changed its form. Nothing runs before Launch.
func Open(ctx context.Context, c Config) (*Engine, error) {
	if c.DSN == "" || c.Version == "" {
		return nil, errors.New("open engine: it needs a DSN and a Version")
	}
	for _, pair := range os.Environ() {
		// The library lets these override its configuration: its version, its identity, whom it reports to.
		if name, _, _ := strings.Cut(pair, "="); strings.HasPrefix(name, "DBOS_") {
			return nil, fmt.Errorf("open engine: unset the environment variable %s", name)
		}
	}
	logger := c.Logger
	if logger == nil {
		logger = slog.Default()
	}
	lease := c.Lease
	if lease == 0 {
		lease = DefaultLease
	}
	if lease < MinLease || len(c.Host) > MaxName {
		return nil, fmt.Errorf("open engine: a lease is at least %s and the name of a host at most %d bytes", MinLease, MaxName)
	}
	db, err := openDatabase(c.DSN, c.Host, lease)
	if err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	e := &Engine{db: db, version: c.Version, log: logger, kinds: map[string]kind{}, active: map[string]*Run{},
		entered: map[string]struct{}{}, resources: map[string]chan struct{}{}, stop: func() {}, lost: make(chan struct{})}
	for name, n := range c.Resources {
		e.resources[name] = make(chan struct{}, max(n, 1))
	}
	if err := db.prepare(ctx, e.openLibrary); err != nil {
		return nil, errors.Join(fmt.Errorf("open engine: %w", err), db.close())
	}
	if db.shared() {
		kept, stop := context.WithCancel(context.WithoutCancel(ctx))
		e.stop = stop
		e.keeping.Go(func() { e.keep(kept) })
		e.keeping.Go(func() { e.converse(kept) })
	}
	return e, nil
}

// Lost is closed when the engine has stopped by itself, because it lost its lease: other processes carry on its runs.
// What is left to do is to end the process.
func (e *Engine) Lost() <-chan struct{} { return e.lost }

// Leads says whether this is the one of all processes with the database that does what only one must do, as looking at
// a schedule. There is one at any time, or none while the last one's lease runs out.
func (e *Engine) Leads(ctx context.Context) (bool, error) {
	if !e.launchedNow() {
		return false, ErrClosed
	}
	leads, err := e.db.leads(ctx)
	if err != nil {
		return false, fmt.Errorf("ask which host leads: %w", err)
	}
	return leads, nil
}

// openLibrary prepares DBOS. The engine's life is not that of the context Open was called with, so it gets its own.
func (e *Engine) openLibrary() error {
	// Its admin server stays off, as it is unless asked for: it listens everywhere, without a login.
	config := dbos.Config{
		AppName:            "muster",
		ApplicationVersion: libraryPinned,
		Logger:             slog.New(quiet{e.log.Handler()}),
	}
	e.db.configure(&config)
	var err error
	if e.dbos, err = dbos.NewContext(context.Background(), config); err != nil {
		return err
	}
	dbos.RegisterWorkflow(e.dbos, e.execute, dbos.WithWorkflowName(workflowName), dbos.WithMaxRecoveryAttempts(0))
	_, err = dbos.RegisterQueue(e.dbos, queueName, dbos.WithPartitionConcurrency(1), dbos.WithWorkerConcurrency(MaxRunning),
		dbos.WithQueueBasePollingInterval(pollEvery), dbos.WithQueueOnConflict(dbos.QueueConflictAlwaysUpdate))
	if err != nil {
		_ = dbos.Shutdown(e.dbos, closeLimit)
	}
	return err
}

// Register names a function, so that runs of it can be started and, after a restart, carried on. It is called before
// Launch, for every kind that was ever started; a mistake here is a mistake in the program and panics.
func Register[In any](e *Engine, name string, fn func(r *Run, in In) error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.launching || name == "" || len(name) > MaxName || e.kinds[name].do != nil {
		panic("engine: register " + name + ": once, with a name, before Launch")
	}
	e.kinds[name] = kind{in: reflect.TypeFor[In](), do: func(r *Run, input json.RawMessage) error {
		var in In
		if err := json.Unmarshal(input, &in); err != nil {
			return fmt.Errorf("read the input of run %s: %w", r.id, err)
		}
		return fn(r, in)
	}}
}

// Launch begins to carry out runs. What earlier processes left unfinished is resumed at once; on PostgreSQL, if they
// ended in order or had this one's name, and otherwise when their lease has run out.
func (e *Engine) Launch(ctx context.Context) error {
	e.mu.Lock()
	again := e.launching || e.closed
	e.launching = true
	e.mu.Unlock()
	if again {
		return errors.New("launch engine: once, before Close")
	}
	if err := e.recover(ctx); err != nil {
		return fmt.Errorf("launch engine: %w", err)
	}
	if err := dbos.Launch(e.dbos); err != nil {
		return fmt.Errorf("launch engine: %w", err)
	}
	e.mu.Lock()
	e.launched = true
	e.mu.Unlock()
	return nil
}

// recover resumes what is known to be orphaned before anything runs here.
func (e *Engine) recover(ctx context.Context) error {
	if e.db.shared() {
		return e.db.again(ctx, func() error { return e.reap(ctx, &watch{}) })
	}
	// Whatever is in progress is of a dead process: nobody else can have the file.
	orphans, err := dbos.ListWorkflows(e.dbos, dbos.WithFilterStatus(dbos.WorkflowStatusPending))
	if err != nil {
		return fmt.Errorf("list unfinished runs: %w", err)
	}
	for _, o := range orphans {
		if err := e.resume(ctx, o.ID); err != nil {
			return err
		}
	}
	return nil
}

// Check says why no run is carried out: the engine was not launched, is closed, or lost its database.
func (e *Engine) Check(ctx context.Context) error {
	e.mu.Lock()
	launched, closed := e.launched, e.closed
	e.mu.Unlock()
	switch {
	case closed:
		return ErrClosed
	case !launched:
		return errors.New("the engine was not launched")
	}
	return e.db.answers(ctx)
}

// Close stops the engine: the contexts of running steps end, no other step begins, and unfinished runs are left to other
// processes and the next Launch. It waits for the steps until ctx ends, at most half a minute. If a step does not come
// back by then, the database stays locked, or the lease is held, until the process ends, so that nobody carries on what
// may still be going on here.
func (e *Engine) Close(ctx context.Context) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.mu.Unlock()
	limit := closeLimit
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, max(time.Until(deadline), time.Millisecond))
	}
	if err := dbos.Shutdown(e.dbos, limit); err != nil {
		return fmt.Errorf("close engine: a step did not stop: %w", err)
	}
	e.stop()
	e.keeping.Wait()
	var left error
	select {
	case <-e.lost: // it has been given up
	default:
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
		left = e.db.leave(limited)
		cancel()
	}
	if err := errors.Join(left, e.db.close()); err != nil {
		return fmt.Errorf("close engine: %w", err)
	}
	return nil
}

// quiet lets only warnings and errors of the workflow library through: it is talkative, and its words are not ours.
type quiet struct{ slog.Handler }

func (q quiet) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && q.Handler.Enabled(ctx, level)
}
func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(attrs)} }
func (q quiet) WithGroup(name string) slog.Handler       { return quiet{q.Handler.WithGroup(name)} }
