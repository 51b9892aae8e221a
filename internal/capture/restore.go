package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/fileset"
)

// RestorePlan says how files are put back on a server.
type RestorePlan = wire.RestorePlan

// Placed says what became of an entry that was put back.
type Placed = wire.Placed

// RestoreSource is a Source that can also put files back.
type RestoreSource interface {
	// Restore puts back what feed gives, and tells of each what became of it, in the same order. feed is called at most once,
	// from another goroutine than placed, and has ended when Restore returns, whatever the server did.
	Restore(ctx context.Context, plan RestorePlan, feed Feed, placed func(Placed) error) error
}

// Feed calls put for every entry, a folder before what is in it; content gives exactly as many bytes as the entry stores. needed
// says that a folder is only wanted for what follows. It ends soon after ctx does, which is when nobody wants more.
type Feed func(ctx context.Context, put func(e *fileset.Entry, needed bool, content io.Reader) error) error

// lastWords is how long an agent that is told nothing more is given to take what is on its way to it.
const lastWords = 10 * time.Second

// Restore puts files back. hangUp ends what carries the session, so that whoever waits to send on it does not any more; it is
// called of an agent that does not listen.
func (s *Session) Restore(ctx context.Context, plan RestorePlan, feed Feed, placed func(Placed) error, hangUp func()) error {
	if err := s.w.Message(wire.KindAskRestore, plan); err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	feeding, enough := context.WithCancel(ctx)
	defer enough()
	fed := make(chan error, 1)
	go func() {
		err := feed(feeding, func(e *fileset.Entry, needed bool, content io.Reader) error {
			return s.put(feeding, e, needed, content)
		})
		if err == nil {
			err = s.w.Go()
		} else {
			_ = s.w.Message(wire.KindFailure, wire.Failure{Text: err.Error()}) // and the agent ends
		}
		fed <- err
	}()
	err := s.takePlaced(placed)
	select {
	case ferr := <-fed: // what was wrong first
		return errors.Join(ferr, err)
	default:
	}
	if err == nil {
		// It has answered the end, which is the last thing that feed does, or it claims so.
		err = errNotAll
	}
	enough()
	timer := time.NewTimer(lastWords)
	defer timer.Stop()
	select {
	case ferr := <-fed:
		if errors.Is(err, errNotAll) && (ferr == nil || !errors.Is(ferr, context.Canceled)) {
			return ferr
		}
	case <-timer.C:
		hangUp()
		if ferr := <-fed; err == nil { // it was hung up on, and that is all it has to say
			err = ferr
		}
	}
	return err
}

// errNotAll is what an agent did that said it was done too early.
var errNotAll = errors.New("the agent ended before it had been told everything")

// put sends one entry and its content.
func (s *Session) put(ctx context.Context, e *fileset.Entry, needed bool, content io.Reader) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.w.Put(e, needed); err != nil {
		return err
	}
	buf := make([]byte, min(max(e.Stored(), 1), wire.MaxPiece))
	for left := e.Stored(); left > 0; {
		n, err := io.ReadFull(content, buf[:min(left, int64(len(buf)))])
		if err != nil {
			return fmt.Errorf("read %.200q: %w", e.Path, noEOF(err))
		}
		if err := errors.Join(ctx.Err(), s.w.Piece(false, buf[:n])); err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// takePlaced hears what became of everything.
func (s *Session) takePlaced(placed func(Placed) error) error {
	for {
		kind, payload, err := s.r.Next(nil)
		switch {
		case err != nil:
			return fmt.Errorf("hear from the agent: %w", cut(err))
		case kind == wire.KindDone:
			return nil
		case kind == wire.KindFailure:
			return failure(payload)
		case kind != wire.KindPlaced:
			return fmt.Errorf("hear from the agent: %w: kind %q", wire.ErrGarbage, byte(kind))
		}
		var p Placed
		if err := wire.Decode(payload, &p); err != nil {
			return err
		}
		p.Note = plain(p.Note)
		if len(p.Path) > fileset.MaxPath || len(p.As) > fileset.MaxPath+wire.MaxSuffix || len(p.What) > 20 {
			return fmt.Errorf("hear from the agent: %w", wire.ErrGarbage)
		}
		if err := placed(p); err != nil {
			return err
		}
	}
}
