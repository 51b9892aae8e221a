package enginetest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/engine"
)

func cancels(t *testing.T, dsn string) {
	var d diary
	began := make(chan struct{}, 1)
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			r.OnUndo("a", func(ctx context.Context) error { d.add("undo, context %v", ctx.Err()); return nil })
			err := try(r, "a", engine.StepOptions{Attempts: 9}, hang(began))
			d.add("is cancelled %v", errors.Is(err, engine.ErrCancelled))
			_ = do(r, "b", func(context.Context) error { d.add("went on"); return nil })
			return err
		})
	})
	w.start("k", "run")
	await(t, "the step", began)
	if err := w.Cancel(context.Background(), "run"); err != nil {
		t.Fatal(err)
	}
	w.wait("run", engine.Cancelled)
	d.expect(t, "is cancelled true", "undo, context <nil>")
	if err := w.Cancel(context.Background(), "run"); err != nil {
		t.Errorf("cancel what is over: %v", err)
	}
	if err := w.Cancel(context.Background(), "nobody"); !errors.Is(err, engine.ErrNotFound) {
		t.Errorf("cancel what never was: %v", err)
	}
}

func cancelsRetry(t *testing.T, dsn string) {
	var n atomic.Int32
	began := make(chan struct{}, 9)
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			return try(r, "a", engine.StepOptions{Attempts: 9, Backoff: time.Hour}, func(context.Context) error {
				n.Add(1)
				began <- struct{}{}
				return errSick
			})
		})
	})
	w.start("k", "run")
	await(t, "the step", began)
	if err := w.Cancel(context.Background(), "run"); err != nil {
		t.Fatal(err)
	}
	w.wait("run", engine.Cancelled)
	if n.Load() != 1 {
		t.Errorf("tried %d times", n.Load())
	}
}

func cancelsQueued(t *testing.T, dsn string) {
	var d diary
	began, goOn := make(chan struct{}, 1), make(chan struct{})
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			d.add("began %s", r.ID())
			return do(r, "a", func(context.Context) error { began <- struct{}{}; <-goOn; return nil })
		})
	})
	key := engine.StartOptions{Key: "server/s"}
	w.start("k", "first", key)
	await(t, "the step", began)
	w.start("k", "second", key)
	if err := w.Cancel(context.Background(), "second"); err != nil {
		t.Fatal(err)
	}
	w.wait("second", engine.Cancelled) // at once, although the first still has the key
	w.start("k", "third", key)
	close(goOn)
	w.wait("first", engine.Succeeded)
	w.wait("third", engine.Succeeded)
	w.wait("second", engine.Cancelled)
	d.expect(t, "began first", "began third")
}

func exclusion(t *testing.T, dsn string) {
	var inside, most, total atomic.Int32
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			most.Store(max(most.Load(), inside.Add(1)))
			defer inside.Add(-1)
			total.Add(1)
			return do(r, "a", fine)
		})
	})
	for i := range 5 {
		w.start("k", fmt.Sprint("run", i), engine.StartOptions{Key: "server/s"})
	}
	for i := range 5 {
		w.wait(fmt.Sprint("run", i), engine.Succeeded)
	}
	if most.Load() != 1 || total.Load() != 5 {
		t.Errorf("%d at once, %d in all", most.Load(), total.Load())
	}
}

func refuses(t *testing.T, dsn string) {
	began, goOn := make(chan struct{}, 9), make(chan struct{})
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			return do(r, "a", func(context.Context) error { began <- struct{}{}; <-goOn; return nil })
		})
	})
	refuse := engine.StartOptions{Key: "server/s", Refuse: true}
	w.start("k", "first", refuse)
	await(t, "the step", began)
	err := engine.Start(context.Background(), w.Engine, "k", "second", nothing{}, refuse)
	if !errors.Is(err, engine.ErrBusy) {
		t.Errorf("a busy key: %v", err)
	}
	w.start("k", "first", refuse) // the same run is not busy with itself
	if _, err := w.Status(context.Background(), "second"); !errors.Is(err, engine.ErrNotFound) {
		t.Errorf("the refused run: %v", err)
	}
	w.start("k", "else", engine.StartOptions{Key: "server/t", Refuse: true})
	close(goOn)
	w.wait("first", engine.Succeeded)
	w.start("k", "second", refuse)
	w.wait("second", engine.Succeeded)
	w.wait("else", engine.Succeeded)
}

func parallel(t *testing.T, dsn string) {
	const n = 4
	met := make(chan struct{}, n)
	all := make(chan struct{})
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			return do(r, "meet", func(ctx context.Context) error {
				met <- struct{}{}
				select {
				case <-all:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			})
		})
	})
	for i := range n {
		w.start("k", fmt.Sprint("run", i), engine.StartOptions{Key: fmt.Sprint("server/", i%2, i)})
	}
	for range n {
		await(t, "the meeting", met)
	}
	close(all)
	for i := range n {
		w.wait(fmt.Sprint("run", i), engine.Succeeded)
	}
}

func resources(t *testing.T, dsn string) {
	var inside, most atomic.Int32
	w := open(t, dsn, "1", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			return try(r, "boot", engine.StepOptions{Needs: "boot"}, func(context.Context) error {
				most.Store(max(most.Load(), inside.Add(1)))
				defer inside.Add(-1)
				return nil
			})
		})
		engine.Register(e, "unknown", func(r *engine.Run, _ nothing) error {
			return try(r, "boot", engine.StepOptions{Needs: "moon"}, fine)
		})
	})
	for i := range 4 {
		w.start("k", fmt.Sprint("run", i))
	}
	for i := range 4 {
		w.wait(fmt.Sprint("run", i), engine.Succeeded)
	}
	if most.Load() != 1 {
		t.Errorf("%d booted at once", most.Load())
	}
	w.start("unknown", "unknown")
	w.wait("unknown", engine.Failed)
}
