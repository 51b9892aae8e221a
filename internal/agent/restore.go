//go:build linux

package agent

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/files"
	"github.com/musterdr/muster/internal/capture/wire"
)

// restore puts files back and says of each what became of it, until the appliance has sent all or is gone. A file of which
// not all arrived is not put in place.
func (a Agent) restore(ctx context.Context, r *wire.Reader, w *wire.Writer, plan wire.RestorePlan) error {
	if len(plan.Suffix) < 2 || len(plan.Suffix) > wire.MaxSuffix || strings.ContainsAny(plan.Suffix, "/\x00") {
		return fmt.Errorf("read the plan: a name beside what is there cannot end in %.80q: %w", plan.Suffix, wire.ErrGarbage)
	}
	linux.Yield()
	put := &files.Put{Top: a.Top, Overwrite: plan.Overwrite, Suffix: plan.Suffix}
	defer put.Close()
	var done wire.RestoreDone
	tell := func(path string, p files.Placed) error {
		done.Entries++
		if p.What == files.PutFailed {
			done.Failed++
		}
		return w.Message(wire.KindPlaced, wire.Placed{Path: []byte(path), As: []byte(p.As), What: p.What, Note: p.Note})
	}
	content := &restored{r: r}
	for {
		kind, payload, err := r.Next(nil)
		if err != nil {
			return fmt.Errorf("the appliance ended the conversation: %w", err)
		}
		switch kind {
		case wire.KindPut:
		case wire.KindGo:
			for _, p := range put.End() {
				if err := tell(p.As, p); err != nil {
					return err
				}
			}
			return w.Message(wire.KindDone, done)
		default:
			return gaveUp(kind, payload)
		}
		e, needed, err := wire.ParsePut(payload)
		if err != nil {
			return err
		}
		content.left = e.Stored()
		p := put.Entry(ctx, &e, needed, content)
		if _, err := io.Copy(io.Discard, content); err != nil { // of what could not be put back
			return err
		}
		if needed && p.What != files.PutFailed {
			continue
		}
		if err := tell(e.Path, p); err != nil {
			return err
		}
	}
}

// gaveUp is the error for what is neither an entry nor the end.
func gaveUp(kind wire.Kind, payload []byte) error {
	var f wire.Failure
	if kind == wire.KindFailure && wire.Decode(payload, &f) == nil {
		return fmt.Errorf("the appliance gave up: %s", f.Text)
	}
	return fmt.Errorf("put files back: %w: kind %q", wire.ErrGarbage, byte(kind))
}

// restored reads the content of one file from the conversation.
type restored struct {
	r    *wire.Reader
	left int64 // of the content
	now  []byte
}

func (p *restored) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	if len(p.now) == 0 {
		kind, payload, err := p.r.Next(nil)
		if err != nil {
			return 0, fmt.Errorf("the appliance ended the conversation: %w", err)
		}
		if kind != wire.KindPiece {
			return 0, gaveUp(kind, payload)
		}
		zstd, data, err := wire.ParsePiece(payload)
		if err != nil || zstd || int64(len(data)) > p.left {
			return 0, fmt.Errorf("read a content: %w", wire.ErrGarbage)
		}
		p.now = data
	}
	n := copy(b, p.now)
	p.now, p.left = p.now[n:], p.left-int64(n)
	return n, nil
}
