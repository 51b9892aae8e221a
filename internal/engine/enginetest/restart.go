package enginetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/engine"
)

func closeResumes(t *testing.T, dsn string) {
	var d diary
	began := make(chan struct{}, 1)
	var second atomic.Bool
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			r.OnUndo("u", func(context.Context) error { d.add("undone"); return nil })
			if err := do(r, "a", func(context.Context) error { d.add("a"); return nil }); err != nil {
				return err
			}
			return do(r, "b", func(ctx context.Context) error {
				if second.Load() {
					d.add("b")
					return nil
				}
				return hang(began)(ctx)
			})
		})
	}
	w := open(t, dsn, "1", register)
	w.start("k", "run")
	await(t, "the step", began)
	w.close()
	if err := engine.Start(context.Background(), w.Engine, "k", "late", nothing{}); !errors.Is(err, engine.ErrClosed) {
		t.Errorf("start after close: %v", err)
	}
	second.Store(true)
	w = open(t, dsn, "1", register)
	s := w.wait("run", engine.Succeeded)
	d.expect(t, "a", "b")
	if s.Starts != 2 {
		t.Errorf("started %d times", s.Starts)
	}
}

func cancelSurvives(t *testing.T, dsn string) {
	var d diary
	began, deaf := make(chan struct{}, 1), make(chan struct{})
	var second atomic.Bool
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			r.OnUndo("u", func(ctx context.Context) error {
				if !second.Load() {
					return hang(began)(ctx)
				}
				d.add("undone")
				return nil
			})
			return do(r, "a", func(ctx context.Context) error {
				d.add("a")
				began <- struct{}{}
				<-ctx.Done()
				<-deaf
				return ctx.Err()
			})
		})
	}
	w := open(t, dsn, "1", register)
	w.start("k", "run")
	await(t, "the step", began)
	if err := w.Cancel(context.Background(), "run"); err != nil {
		t.Fatal(err)
	}
	close(deaf)
	await(t, "the undo", began)
	w.close()
	second.Store(true)
	w = open(t, dsn, "1", register)
	w.wait("run", engine.Cancelled)
	d.expect(t, "a", "undone")
}

func queuedSurvives(t *testing.T, dsn string) {
	began := make(chan struct{}, 9)
	var second atomic.Bool
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			return do(r, "a", func(ctx context.Context) error {
				if second.Load() {
					return nil
				}
				return hang(began)(ctx)
			})
		})
	}
	w := open(t, dsn, "1", register)
	key := engine.StartOptions{Key: "server/s"}
	w.start("k", "first", key)
	await(t, "the step", began)
	w.start("k", "second", key)
	if s, err := w.Status(context.Background(), "second"); err != nil || s.State != engine.Queued {
		t.Errorf("the second is %s, %v", s.State, err)
	}
	w.close()
	second.Store(true)
	w = open(t, dsn, "1", register)
	first, last := w.wait("first", engine.Succeeded), w.wait("second", engine.Succeeded)
	if first.Term >= last.Term {
		t.Errorf("the one that was begun has term %d, the one that waited %d", first.Term, last.Term)
	}
}

func terms(t *testing.T, dsn string) {
	var seen []int64
	began := make(chan struct{}, 1)
	var second atomic.Bool
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			seen = append(seen, r.Term()) // one run at a time here
			return do(r, "a", func(ctx context.Context) error {
				if r.ID() == "b" && !second.Load() {
					return hang(began)(ctx)
				}
				return nil
			})
		})
	}
	w := open(t, dsn, "1", register)
	w.start("k", "a")
	w.wait("a", engine.Succeeded)
	w.start("k", "b")
	await(t, "the step", began)
	w.close()
	second.Store(true)
	w = open(t, dsn, "1", register)
	w.wait("b", engine.Succeeded)
	w.start("k", "c")
	s := w.wait("c", engine.Succeeded)
	if len(seen) != 4 || seen[0] < 1 || seen[0] >= seen[1] || seen[1] >= seen[2] || seen[2] >= seen[3] || s.Term != seen[3] {
		t.Errorf("terms %v, the last by its status %d", seen, s.Term)
	}
}

func progress(t *testing.T, dsn string) {
	began, goOn := make(chan struct{}, 1), make(chan struct{})
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			return try(r, "a", engine.StepOptions{Needs: "boot"}, func(context.Context) error {
				r.Report("read", 3, 7, "blocks")
				began <- struct{}{}
				<-goOn
				return nil
			})
		})
	})
	w.start("k", "run", engine.StartOptions{Key: "x"})
	await(t, "the step", began)
	s, err := w.Status(context.Background(), "run")
	want := engine.Progress{Part: "read", Done: 3, Total: 7, Unit: "blocks"}
	if err != nil || s.State != engine.Running || s.Step != "a" || s.Waiting != "" || s.Progress == nil || *s.Progress != want {
		t.Errorf("status %+v, %v", s, err)
	}
	list, err := w.List(context.Background(), engine.Filter{Kind: "k", Key: "x", Unfinished: true})
	if err != nil || len(list) != 1 || list[0].Step != "a" {
		t.Errorf("list %+v, %v", list, err)
	}
	close(goOn)
	if s := w.wait("run", engine.Succeeded); s.Step != "" || s.Progress != nil {
		t.Errorf("status when over %+v", s)
	}
	if list, err := w.List(context.Background(), engine.Filter{Unfinished: true}); err != nil || len(list) != 0 {
		t.Errorf("unfinished when over %+v, %v", list, err)
	}
}

func versions(t *testing.T, dsn string) {
	began := make(chan struct{}, 9)
	var second atomic.Bool
	var went atomic.Int32
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			went.Add(1)
			if r.ID() == "begun" {
				if err := do(r, "a", fine); err != nil {
					return err
				}
			}
			return do(r, "b", func(ctx context.Context) error {
				if second.Load() {
					return nil
				}
				return hang(began)(ctx)
			})
		})
	}
	w := open(t, dsn, "1", register)
	w.start("k", "begun")
	w.start("k", "fresh")
	await(t, "the step", began)
	await(t, "the step", began)
	w.close()
	second.Store(true)
	w = open(t, dsn, "2", register)
	if s := w.wait("begun", engine.Failed); !strings.Contains(s.Error, "version 1") {
		t.Errorf("error %q", s.Error)
	}
	w.wait("fresh", engine.Succeeded) // none of its steps had ended: nothing to carry on wrongly
	if went.Load() != 3 {
		t.Errorf("the function was called %d times", went.Load())
	}
}

func changedSteps(t *testing.T, dsn string) {
	var d diary
	began := make(chan struct{}, 1)
	var second atomic.Bool
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			name := "a"
			if second.Load() {
				name = "other"
			}
			r.OnUndo("u", func(context.Context) error { d.add("undone"); return nil })
			if err := do(r, name, func(context.Context) error { d.add("%s", name); return nil }); err != nil {
				return err
			}
			return do(r, "b", hang(began))
		})
	}
	w := open(t, dsn, "1", register)
	w.start("k", "run")
	await(t, "the step", began)
	w.close()
	second.Store(true)
	w = open(t, dsn, "1", register)
	if s := w.wait("run", engine.Failed); !strings.Contains(s.Error, "not those it began with") {
		t.Errorf("error %q", s.Error)
	}
	d.expect(t, "a", "undone")
}

func results(t *testing.T, dsn string) {
	type fact struct {
		At    time.Time
		Big   int64
		Text  string
		Lists map[string][]string
	}
	began := make(chan struct{}, 1)
	var second atomic.Bool
	var seen []string
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			f, err := engine.Step(r, "a", engine.StepOptions{}, func(context.Context) (fact, error) {
				return fact{At: time.Now(), Big: 1<<62 + 1, Text: "\x00 ü \U0001f600", Lists: map[string][]string{"x": {"y"}}}, nil
			})
			if err != nil {
				return err
			}
			failure := try(r, "c", engine.StepOptions{}, func(context.Context) error { return fmt.Errorf("no: %w", errSick) })
			seen = append(seen, fmt.Sprintf("%#v, %v, matched %v", f, failure, errors.Is(failure, errSick)))
			return do(r, "b", func(ctx context.Context) error {
				if second.Load() {
					return nil
				}
				return hang(began)(ctx)
			})
		})
	}
	w := open(t, dsn, "1", register)
	w.start("k", "run")
	await(t, "the step", began)
	w.close()
	second.Store(true)
	w = open(t, dsn, "1", register)
	w.wait("run", engine.Succeeded)
	if len(seen) != 2 || seen[0] != seen[1] || !strings.Contains(seen[0], "step c: no: sick, matched false") {
		t.Errorf("the function saw\n%s", strings.Join(seen, "\n"))
	}
}

func prunes(t *testing.T, dsn string) {
	began, goOn := make(chan struct{}, 1), make(chan struct{})
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error { return do(r, "a", fine) })
		engine.Register(e, "slow", func(r *engine.Run, _ nothing) error {
			return do(r, "a", func(context.Context) error { began <- struct{}{}; <-goOn; return nil })
		})
	})
	for i := range 3 {
		w.start("k", fmt.Sprint("run", i))
	}
	for i := range 3 {
		w.wait(fmt.Sprint("run", i), engine.Succeeded)
	}
	w.start("slow", "slow")
	await(t, "the step", began)
	if n, err := w.Prune(context.Background(), time.Now().Add(-time.Hour)); n != 0 || err != nil {
		t.Errorf("pruned %d young ones, %v", n, err)
	}
	if n, err := w.Prune(context.Background(), time.Now().Add(time.Hour)); n != 3 || err != nil {
		t.Errorf("pruned %d, %v", n, err)
	}
	if list, err := w.List(context.Background(), engine.Filter{}); err != nil || len(list) != 1 || list[0].ID != "slow" {
		t.Errorf("left %+v, %v", list, err)
	}
	close(goOn)
	w.wait("slow", engine.Succeeded)
}

// Exclusive checks that of a database that only one process may have, a second one is kept out of.
func Exclusive(t *testing.T, dsn string) {
	w := open(t, dsn, "1", func(*engine.Engine) {})
	if _, err := engine.Open(context.Background(), engine.Config{DSN: dsn, Version: "1"}); !errors.Is(err, engine.ErrLocked) {
		t.Errorf("a second process: %v", err)
	}
	w.close()
	open(t, dsn, "1", func(*engine.Engine) {})
}
