//go:build linux

package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/time/rate"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/files"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/fileset"
)

// knownAhead is how many known names wait to be compared.
const knownAhead = 1024

// files reads folders file by file, comparing with what the appliance tells meanwhile, and stops when its input ends.
func (a Agent) files(ctx context.Context, r *wire.Reader, w *wire.Writer, plan wire.FilesPlan) error {
	linux.Yield()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	known := make(chan files.Known, knownAhead)
	go func() { cancel(listen(ctx, r, known)) }()
	out := &filesOut{ctx: ctx, Writer: w}
	if plan.Rate > 0 {
		out.rate = rate.NewLimiter(rate.Limit(plan.Rate), files.MaxPiece)
	}
	walk := &files.Walk{Top: a.Top, Set: fileset.Set{Roots: plan.Roots, Exclude: plan.Exclude}, Out: out, Known: func() (files.Known, bool, error) {
		select {
		case k, more := <-known:
			return k, more, nil
		case <-ctx.Done():
			return files.Known{}, false, context.Cause(ctx)
		}
	}}
	out.walk = walk
	if err := walk.Run(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return err
	}
	return w.Message(wire.KindDone, wire.FilesDone{Entries: walk.Entries, Read: walk.Read, Files: walk.Files, Notes: walk.Notes()})
}

// listen passes on what the appliance knows, closes known after the last, and then waits for the end of the conversation. It
// gives why it ended.
func listen(ctx context.Context, r *wire.Reader, known chan<- files.Known) error {
	last := ""
	for {
		kind, payload, err := r.Next(nil)
		if err != nil {
			return fmt.Errorf("the appliance ended the conversation: %w", errors.Join(context.Canceled, err))
		}
		switch {
		case known != nil && kind == wire.KindGo:
			close(known)
			known = nil
			continue
		case known == nil || kind != wire.KindWas:
			return fmt.Errorf("listen to the appliance: %w: kind %q", wire.ErrGarbage, byte(kind))
		}
		list, err := wire.ParseWas(payload)
		if err != nil {
			return err
		}
		for _, k := range list {
			if last != "" && fileset.Compare(last, k.Path) >= 0 {
				return fmt.Errorf("listen to the appliance: what it knows is not in order: %w", wire.ErrGarbage)
			}
			last = k.Path
			select {
			case known <- files.Known(k):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
}

// filesOut sends what a walk finds.
type filesOut struct {
	ctx context.Context
	*wire.Writer
	rate   *rate.Limiter // nil: no limit
	walk   *files.Walk
	packed []byte
	ticked time.Time
}

// Piece sends a piece, compressed where that is worth it, and comes back when the next one may be read.
func (o *filesOut) Piece(data []byte) error {
	if err := o.tick(); err != nil {
		return err
	}
	if o.rate != nil {
		if err := o.rate.WaitN(o.ctx, len(data)); err != nil {
			return err
		}
	}
	var smaller bool
	if o.packed, smaller = pack(o.packed, data); smaller {
		data = o.packed
	}
	return o.Writer.Piece(smaller, data)
}

// tick says now and then how far the walk is, and sends what is buffered.
func (o *filesOut) tick() error {
	if now := time.Now(); now.Sub(o.ticked) > tickEvery {
		o.ticked = now
		return o.Message(wire.KindTick, wire.Tick{Done: o.walk.Read})
	}
	return nil
}
