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
	Logger    *slog.Logger // nil: slog.Default()
}

// Engine keeps runs and carries them out. Its methods may be called from many goroutines.
type Engine struct {
	db        *database
	dbos      dbos.Context
	version   string
	log       *slog.Logger
	resources map[string]chan struct{}

	starting sync.Mutex // one Start at a time, so that Refuse sees every earlier one

	mu       sync.Mutex
	kinds    map[string]kind
	active   map[string]*Run
	launched bool
	closed   bool
	stop     context.CancelFunc // ends the guard
	guarding sync.WaitGroup
}

// kind is one registered function.
type kind struct {
	in reflect.Type
	do func(r *Run, input json.RawMessage) error
}

// Open opens the database of runs, and makes it if there is none. ErrLocked if another process has it, ErrNewer if a later
// release has changed its form. Nothing runs before Launch.
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
	db, err := openDatabase(ctx, c.DSN)
	if err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	e := &Engine{db: db, version: c.Version, log: logger, kinds: map[string]kind{}, active: map[string]*Run{},
		resources: map[string]chan struct{}{}}
	for name, n := range c.Resources {
		e.resources[name] = make(chan struct{}, max(n, 1))
	}
	if err := e.openLibrary(); err != nil {
		return nil, errors.Join(fmt.Errorf("open engine: %w", err), db.close())
	}
	return e, nil
}

// openLibrary prepares DBOS. The engine's life is not that of the context Open was called with, so it gets its own.
func (e *Engine) openLibrary() error {
	// Its admin server stays off, as it is unless asked for: it listens everywhere, without a login.
	config := dbos.Config{
		AppName:            "muster",
		ApplicationVersion: libraryPinned,
		ExecutorID:         fmt.Sprintf("%d-%d", os.Getpid(), time.Now().UnixNano()), // never that of an earlier process
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
	if e.launched || name == "" || len(name) > MaxName || e.kinds[name].do != nil {
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

// Launch begins to carry out runs. What earlier processes left unfinished is resumed at once.
func (e *Engine) Launch(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.launched || e.closed {
		return errors.New("launch engine: once, before Close")
	}
	// Whatever is in progress before we began is of a dead process: nobody else can have the database.
	orphans, err := dbos.ListWorkflows(e.dbos, dbos.WithFilterStatus(dbos.WorkflowStatusPending))
	if err != nil {
		return fmt.Errorf("launch engine: list unfinished runs: %w", err)
	}
	for _, o := range orphans {
		if _, err := dbos.ResumeWorkflow[outcome](e.dbos, o.ID, dbos.WithResumeQueue(queueName)); err != nil {
			return fmt.Errorf("launch engine: resume run %s: %w", o.ID, err)
		}
		e.log.InfoContext(ctx, "run resumed", "operation", o.ID)
	}
	if err := dbos.Launch(e.dbos); err != nil {
		return fmt.Errorf("launch engine: %w", err)
	}
	e.launched = true
	guarded, stop := context.WithCancel(context.WithoutCancel(ctx))
	e.stop = stop
	e.guarding.Go(func() { e.guard(guarded) })
	return nil
}

// guard stops everything when the database is lost to this process: another may have begun to carry on our runs.
func (e *Engine) guard(ctx context.Context) {
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := e.db.held(ctx); err != nil && ctx.Err() == nil {
				e.log.ErrorContext(ctx, "engine stops: it lost its database", "error", err)
				go func() { _ = e.Close(context.WithoutCancel(ctx)) }()
				return
			}
		}
	}
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

// Close stops the engine: the contexts of running steps end, no other step begins, and unfinished runs are left to the
// next Launch. It waits for the steps until ctx ends, at most half a minute. If a step does not come back by then, the
// database stays locked until the process ends, so that nobody carries on what may still be going on here.
func (e *Engine) Close(ctx context.Context) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	stop := e.stop
	e.mu.Unlock()
	if stop != nil {
		stop()
		e.guarding.Wait()
	}
	limit := closeLimit
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, max(time.Until(deadline), time.Millisecond))
	}
	if err := dbos.Shutdown(e.dbos, limit); err != nil {
		return fmt.Errorf("close engine: a step did not stop: %w", err)
	}
	if err := e.db.close(); err != nil {
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
