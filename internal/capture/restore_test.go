package capture

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"

	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/fileset"
)

// restored plays an agent that is asked to put back three files, and says whether feed had ended when Restore returned.
func restored(t *testing.T, agent func(r *wire.Reader, w *wire.Writer)) (ended bool, err error) {
	t.Helper()
	fromAgent, agentOut := io.Pipe()
	agentIn, toAgent := io.Pipe()
	go func() {
		w := wire.NewWriter(agentOut)
		_ = w.Greet()
		_ = w.Message(wire.KindHello, wire.Hello{Version: "test"})
		agent(wire.NewReader(agentIn), w)
	}()
	defer toAgent.Close()
	s, err := NewSession(fromAgent, toAgent)
	if err != nil {
		t.Fatal(err)
	}
	feed := func(ctx context.Context, put func(*fileset.Entry, bool, io.Reader) error) error {
		defer func() { ended = true }()
		for range 3 {
			e := &fileset.Entry{Kind: fileset.File, Path: "/srv/page", Size: 4 << 20}
			if err := put(e, false, bytes.NewReader(make([]byte, e.Size))); err != nil {
				return err
			}
		}
		return nil
	}
	err = s.Restore(t.Context(), RestorePlan{Suffix: ".x"}, feed, func(Placed) error { return nil }, func() { agentIn.Close() })
	return ended, err
}

func TestWhatFeedsARestoreHasEndedWhenItReturns(t *testing.T) {
	for name, agent := range map[string]func(*wire.Reader, *wire.Writer){
		"that fails and listens on": func(r *wire.Reader, w *wire.Writer) {
			_, _, _ = r.Next(nil)
			_ = w.Message(wire.KindFailure, wire.Failure{Text: "no"})
			for {
				if _, _, err := r.Next(nil); err != nil {
					return
				}
			}
		},
		"that fails and hangs": func(r *wire.Reader, w *wire.Writer) {
			_, _, _ = r.Next(nil)
			_ = w.Message(wire.KindFailure, wire.Failure{Text: "no"})
		},
		"that talks nonsense and hangs": func(r *wire.Reader, w *wire.Writer) {
			_, _, _ = r.Next(nil)
			_ = w.Message(wire.KindLayout, wire.Layout{})
		},
		"that says it is done and hangs": func(r *wire.Reader, w *wire.Writer) {
			_, _, _ = r.Next(nil)
			_ = w.Message(wire.KindDone, wire.RestoreDone{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ended, err := restored(t, agent)
				if !ended || err == nil || errors.Is(err, context.Canceled) {
					t.Errorf("ended %v, %v", ended, err)
				}
			})
		})
	}
}
