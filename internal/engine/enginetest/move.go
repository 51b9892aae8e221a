package enginetest

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/musterdr/muster/internal/engine"
)

// Moves checks that runs are left behind only when nothing is under way, and that terms go on above those that were given
// out, in another database and in one that was put back from a copy. Both are empty.
func Moves(t *testing.T, from, to string) {
	ctx := context.Background()
	began := make(chan struct{}, 1)
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
	w := open(t, from, "1", register)
	w.start("k", "run")
	await(t, "the step", began)
	if err := engine.Follow(ctx, from, to); !errors.Is(err, engine.ErrLocked) {
		t.Errorf("moved away under a process that works: %v", err)
	}
	w.close()
	if err := engine.Follow(ctx, from, to); !errors.Is(err, engine.ErrUnfinished) {
		t.Errorf("moved away from a run that is half done: %v", err)
	}
	second.Store(true)
	w = open(t, from, "1", register)
	before := w.wait("run", engine.Succeeded)
	w.close()
	if err := engine.Follow(ctx, from, to); err != nil {
		t.Fatal(err)
	}
	w = open(t, to, "1", register)
	w.start("k", "other")
	after := w.wait("other", engine.Succeeded)
	if after.Term <= before.Term {
		t.Errorf("term %d after %d", after.Term, before.Term)
	}
	w.close()
	if err := engine.Follow(ctx, from, to); err == nil {
		t.Error("moved to where there are runs already")
	}
	if err := engine.Restored(ctx, to); err != nil {
		t.Fatal(err)
	}
	w = open(t, to, "1", register)
	w.start("k", "restored")
	if s := w.wait("restored", engine.Succeeded); s.Term <= after.Term+1<<31 {
		t.Errorf("term %d after a restore; %d before", s.Term, after.Term)
	}
}
