package engine

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
)

func TestARunThatKeepsKillingItsProcessIsGivenUpAndUndone(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	e, err := Open(ctx, Config{DSN: filepath.Join(t.TempDir(), "runs.db"), Version: "1",
		Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	undone := map[string]bool{}
	Register(e, "k", func(r *Run, _ struct{}) error {
		r.OnUndo("u", func(context.Context) error { undone[r.ID()] = true; return nil })
		_, err := Step(r, "deadly", StepOptions{}, func(context.Context) (struct{}, error) {
			t.Errorf("%s was tried again", r.ID())
			return struct{}{}, nil
		})
		return err
	})
	if err := e.Launch(ctx); err != nil {
		t.Fatal(err)
	}
	for id, starts := range map[string]int{"often": MaxStarts, "undo deadly too": 2 * MaxStarts} {
		if _, err := e.db.sql.Exec(`INSERT INTO muster_engine_starts (run, starts, term) VALUES (?, ?, 1)`, id, starts); err != nil {
			t.Fatal(err)
		}
		if err := Start(ctx, e, "k", id, struct{}{}); err != nil {
			t.Fatal(err)
		}
		s, err := e.Wait(ctx, id)
		if err != nil || s.State != Failed || !strings.Contains(s.Error, "given up") {
			t.Errorf("%s: %+v, %v", id, s, err)
		}
	}
	if !undone["often"] || undone["undo deadly too"] {
		t.Errorf("undone: %v", undone)
	}
	if err := e.Close(ctx); err != nil {
		t.Error(err)
	}
}

func TestTheLibraryCannotBeReconfiguredFromTheEnvironment(t *testing.T) {
	t.Setenv("DBOS__APPVERSION", "2")
	if _, err := Open(context.Background(), Config{DSN: filepath.Join(t.TempDir(), "runs.db"), Version: "1"}); err == nil {
		t.Error("opened in spite of DBOS__APPVERSION")
	}
}
