// Package enginetest is what an engine promises, as one suite for whatever database it keeps its runs in.
//
// Knows: the promises of engine.
// Must not know: which database is behind a DSN.
package enginetest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/engine"
)

// patience is how long a test waits for what must happen before it says that it did not.
const patience = 60 * time.Second

// Run runs the suite. The test binary calls Main first, which the crash tests need. dsn gives the address of an empty database, another one at each call.
func Run(t *testing.T, dsn func(t *testing.T) string) {
	for name, test := range map[string]func(t *testing.T, dsn string){
		"a finished run keeps its result":                         succeeds,
		"starting under the same id does nothing":                 startTwice,
		"a failed run is undone last first":                       undoesLastFirst,
		"an undo is retried, and one that fails stops no other":   undoFails,
		"a step is retried with backoff but not when permanent":   retries,
		"a step ends at its limit":                                limits,
		"a panic fails the run and not the process":               panics,
		"cancel ends the running step at once and undoes":         cancels,
		"a cancelled step is not retried":                         cancelsRetry,
		"a queued run that is cancelled never begins":             cancelsQueued,
		"two runs of one key never run at once":                   exclusion,
		"a busy key is refused when asked":                        refuses,
		"runs of different keys run at once":                      parallel,
		"a resource is shared by as many as there are":            resources,
		"close leaves unfinished runs to the next launch":         closeResumes,
		"cancel before a restart holds after it":                  cancelSurvives,
		"a queued run survives a restart":                         queuedSurvives,
		"terms grow with every start of every run":                terms,
		"progress is shown while a step runs":                     progress,
		"another version does not carry on begun steps":           versions,
		"steps that are not those of the beginning fail the run":  changedSteps,
		"a result is the same the first time and after a restart": results,
		"old finished runs are pruned":                            prunes,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, dsn(t))
		})
	}
}

// testLease is short, so that tests need not wait long for a host to be given up, and long enough for a busy machine.
const testLease = 5 * time.Second

type nothing struct{}

// world is one process: an engine that is launched.
type world struct {
	*engine.Engine
	t *testing.T
}

func open(t *testing.T, dsn, version string, register func(e *engine.Engine)) world {
	t.Helper()
	return openHost(t, dsn, version, "", register)
}

func openHost(t *testing.T, dsn, version, host string, register func(e *engine.Engine)) world {
	t.Helper()
	e, err := engine.Open(context.Background(), engine.Config{DSN: dsn, Version: version, Host: host, Lease: testLease,
		Resources: map[string]int{"boot": 1}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	w := world{e, t}
	t.Cleanup(w.close)
	register(e)
	if err := e.Launch(context.Background()); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w world) close() {
	w.t.Helper()
	if err := w.Engine.Close(context.Background()); err != nil {
		w.t.Error(err)
	}
}

func (w world) start(kind, id string, o ...engine.StartOptions) {
	w.t.Helper()
	if err := engine.Start(context.Background(), w.Engine, kind, id, nothing{}, o...); err != nil {
		w.t.Fatal(err)
	}
}

func (w world) wait(id string, want engine.State) engine.Status {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := w.Wait(ctx, id)
	if err != nil {
		w.t.Fatal(err)
	}
	if s.State != want {
		w.t.Fatalf("run %s is %s (%s), want %s", id, s.State, s.Error, want)
	}
	return s
}

func await(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("%s did not happen", what)
	}
}

// diary is what happened, in order.
type diary struct {
	mu    sync.Mutex
	lines []string
}

func (d *diary) add(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, fmt.Sprintf(format, args...))
}

func (d *diary) expect(t *testing.T, want ...string) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if got, want := strings.Join(d.lines, ", "), strings.Join(want, ", "); got != want {
		t.Errorf("happened: %s\nwant:     %s", got, want)
	}
}

func do(r *engine.Run, name string, f func(ctx context.Context) error) error {
	return try(r, name, engine.StepOptions{}, f)
}

func try(r *engine.Run, name string, o engine.StepOptions, f func(ctx context.Context) error) error {
	_, err := engine.Step(r, name, o, func(ctx context.Context) (nothing, error) { return nothing{}, f(ctx) })
	return err
}

func fine(context.Context) error { return nil }

var errSick = errors.New("sick")

func sick(context.Context) error { return errSick }

// hang blocks until its context ends, and says when it began.
func hang(began chan<- struct{}) func(ctx context.Context) error {
	return func(ctx context.Context) error {
		began <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	}
}

func succeeds(t *testing.T, dsn string) {
	var got atomic.Value
	type in struct{ Name string }
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "greet", func(r *engine.Run, in in) error {
			out, err := engine.Step(r, "make", engine.StepOptions{}, func(context.Context) (string, error) { return "hello " + in.Name, nil })
			got.Store(out)
			return err
		})
	})
	if err := engine.Start(context.Background(), w.Engine, "greet", "a", in{"you"}); err != nil {
		t.Fatal(err)
	}
	s := w.wait("a", engine.Succeeded)
	if got.Load() != "hello you" {
		t.Errorf("the step gave %v", got.Load())
	}
	if s.Kind != "greet" || s.Created.IsZero() || s.Started.IsZero() || s.Finished.IsZero() || s.Starts != 1 || s.Error != "" {
		t.Errorf("status %+v", s)
	}
	steps, err := w.Steps(context.Background(), "a")
	if err != nil || len(steps) != 1 || steps[0].Name != "make" || steps[0].Error != "" || steps[0].Finished.IsZero() {
		t.Errorf("steps %+v, %v", steps, err)
	}
	if _, err := w.Status(context.Background(), "b"); !errors.Is(err, engine.ErrNotFound) {
		t.Errorf("a run nobody started: %v", err)
	}
}

func startTwice(t *testing.T, dsn string) {
	var n atomic.Int32
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "count", func(r *engine.Run, _ nothing) error {
			return do(r, "count", func(context.Context) error { n.Add(1); return nil })
		})
		engine.Register(e, "other", func(*engine.Run, nothing) error { return nil })
	})
	w.start("count", "a")
	w.start("count", "a")
	w.wait("a", engine.Succeeded)
	w.start("count", "a")
	w.wait("a", engine.Succeeded)
	if n.Load() != 1 {
		t.Errorf("ran %d times", n.Load())
	}
	if err := engine.Start(context.Background(), w.Engine, "other", "a", nothing{}); err == nil {
		t.Error("an id was used for two kinds")
	}
	if err := engine.Start(context.Background(), w.Engine, "count", "b", 7); err == nil {
		t.Error("an input of the wrong type was taken")
	}
	if err := engine.Start(context.Background(), w.Engine, "unknown", "b", nothing{}); err == nil {
		t.Error("a kind nobody registered was taken")
	}
}

func undoesLastFirst(t *testing.T, dsn string) {
	var d diary
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			for _, name := range []string{"a", "b"} {
				r.OnUndo(name, func(context.Context) error { d.add("undo %s", name); return nil })
				if err := do(r, name, func(context.Context) error { d.add("do %s", name); return nil }); err != nil {
					return err
				}
			}
			return do(r, "c", sick)
		})
	})
	w.start("k", "run")
	s := w.wait("run", engine.Failed)
	d.expect(t, "do a", "do b", "undo b", "undo a")
	if s.Error != "step c: sick" {
		t.Errorf("error %q", s.Error)
	}
}

func undoFails(t *testing.T, dsn string) {
	var d diary
	var tries atomic.Int32
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			r.OnUndo("first", func(context.Context) error { d.add("undo first"); return nil })
			r.OnUndo("flaky", func(context.Context) error {
				if tries.Add(1) == 1 {
					return errSick
				}
				d.add("undo flaky")
				return nil
			})
			r.OnUndo("hopeless", func(context.Context) error { return engine.Permanent(errors.New("stuck")) })
			return errSick
		})
	})
	w.start("k", "run")
	s := w.wait("run", engine.Failed)
	d.expect(t, "undo flaky", "undo first")
	if s.Error != "sick; step undo hopeless: stuck" {
		t.Errorf("error %q", s.Error)
	}
}

func retries(t *testing.T, dsn string) {
	var flaky, hopeless, permanent atomic.Int32
	o := engine.StepOptions{Attempts: 3, Backoff: time.Millisecond}
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			if err := try(r, "flaky", o, func(context.Context) error {
				if flaky.Add(1) < 3 {
					return errSick
				}
				return nil
			}); err != nil {
				return err
			}
			if try(r, "hopeless", o, func(context.Context) error { hopeless.Add(1); return errSick }) == nil {
				return errors.New("hopeless succeeded")
			}
			if try(r, "permanent", o, func(context.Context) error {
				permanent.Add(1)
				return fmt.Errorf("no: %w", engine.Permanent(errSick))
			}) == nil {
				return errors.New("permanent succeeded")
			}
			return nil
		})
	})
	w.start("k", "run")
	w.wait("run", engine.Succeeded)
	if flaky.Load() != 3 || hopeless.Load() != 3 || permanent.Load() != 1 {
		t.Errorf("attempts: flaky %d, hopeless %d, permanent %d; want 3, 3, 1", flaky.Load(), hopeless.Load(), permanent.Load())
	}
}

func limits(t *testing.T, dsn string) {
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			return try(r, "slow", engine.StepOptions{Limit: 20 * time.Millisecond}, func(ctx context.Context) error {
				<-ctx.Done()
				return ctx.Err()
			})
		})
		engine.Register(e, "big", func(r *engine.Run, _ nothing) error {
			_, err := engine.Step(r, "big", engine.StepOptions{}, func(context.Context) (string, error) {
				return strings.Repeat("x", engine.MaxRecord), nil
			})
			return err
		})
	})
	w.start("k", "run")
	if s := w.wait("run", engine.Failed); !strings.Contains(s.Error, "it took longer than 20ms") {
		t.Errorf("error %q", s.Error)
	}
	w.start("big", "big")
	if s := w.wait("big", engine.Failed); !strings.Contains(s.Error, "the most is") {
		t.Errorf("error %q", s.Error)
	}
}

func panics(t *testing.T, dsn string) {
	var d diary
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "step", func(r *engine.Run, _ nothing) error {
			r.OnUndo("u", func(context.Context) error { d.add("undone"); return nil })
			return try(r, "bad", engine.StepOptions{Attempts: 5}, func(context.Context) error { d.add("tried"); panic("ouch") })
		})
		engine.Register(e, "function", func(r *engine.Run, _ nothing) error {
			r.OnUndo("u", func(context.Context) error { d.add("undone"); return nil })
			panic("ouch")
		})
	})
	w.start("step", "a")
	if s := w.wait("a", engine.Failed); s.Error != "step bad: panic: ouch" {
		t.Errorf("error %q", s.Error)
	}
	w.start("function", "b")
	w.wait("b", engine.Failed)
	d.expect(t, "tried", "undone", "undone")
}
