package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/musterdr/muster/internal/api"
)

// client gives the master of the folder that the command names.
func client(cmd *cobra.Command) *api.Client { return api.Dial(apiSocket(installation(cmd))) }

// follow shows an operation's progress on standard error until it has finished. Interrupted, it leaves the operation
// running and says so.
func follow(cmd *cobra.Command, c *api.Client, op api.Operation) (api.Operation, error) {
	show := progressOn(cmd)
	for !op.State.Finished() {
		show.update(op)
		next, err := c.Operation(cmd.Context(), op.ID, op.Seen, 2*time.Second)
		if err != nil {
			show.end()
			if errors.Is(err, context.Canceled) {
				return op, fmt.Errorf("interrupted: %s goes on without you; follow it with 'muster operation follow %s', stop it with 'muster operation cancel %s'", op.Kind, op.ID, op.ID)
			}
			return op, err
		}
		op = next
	}
	show.end()
	return op, nil
}

// progress shows how far an operation is: one line that changes on a terminal, a line a step elsewhere.
type progress struct {
	out   io.Writer
	tty   bool
	quiet bool
	start time.Time
	last  string
	said  time.Time
	bar   *progressbar.ProgressBar
}

// sayAgain is how often a long step is mentioned again where output is not a terminal.
const sayAgain = 15 * time.Second

func progressOn(cmd *cobra.Command) *progress {
	return &progress{out: cmd.ErrOrStderr(), tty: term.IsTerminal(int(os.Stderr.Fd())), quiet: wantJSON(cmd) && !term.IsTerminal(int(os.Stderr.Fd())), start: time.Now()}
}

func (p *progress) update(op api.Operation) {
	if p.quiet {
		return
	}
	what := op.Step
	if op.Part != "" {
		what += ": " + op.Part
	}
	if what == "" {
		what = string(op.State)
	}
	if p.tty {
		p.draw(op, what)
		return
	}
	if what == p.last && time.Since(p.said) < sayAgain {
		return
	}
	line := what
	if op.Total > 0 {
		line += fmt.Sprintf(" %d%%", op.Done*100/op.Total)
	}
	fmt.Fprintf(p.out, "%6.1f s  %s\n", time.Since(p.start).Seconds(), tame(line))
	p.last, p.said = what, time.Now()
}

func (p *progress) draw(op api.Operation, what string) {
	if p.bar == nil || what != p.last {
		if p.bar != nil {
			_ = p.bar.Finish()
			fmt.Fprintln(p.out)
		}
		total := op.Total
		if total <= 0 {
			total = -1
		}
		options := []progressbar.Option{progressbar.OptionSetWriter(p.out), progressbar.OptionSetDescription(tame(what)),
			progressbar.OptionSetElapsedTime(true), progressbar.OptionThrottle(100 * time.Millisecond), progressbar.OptionSpinnerType(14)}
		if op.Unit == "bytes" {
			options = append(options, progressbar.OptionShowBytes(true))
		}
		p.bar = progressbar.NewOptions64(total, options...)
		p.last = what
	}
	if op.Total > 0 {
		p.bar.ChangeMax64(op.Total)
		_ = p.bar.Set64(min(op.Done, op.Total))
	} else {
		_ = p.bar.Add(1)
	}
}

func (p *progress) end() {
	if p.bar != nil {
		_ = p.bar.Exit()
		fmt.Fprintln(p.out)
	}
}

// failed turns a finished operation that did not succeed into an error.
func failed(op api.Operation) error {
	switch op.State {
	case api.OperationFailed:
		return withCode(exitFailed, fmt.Errorf("%s failed: %s", op.Kind, op.Error))
	case api.OperationCancelled:
		return withCode(exitFailed, fmt.Errorf("%s was cancelled", op.Kind))
	}
	return nil
}
