package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/musterdr/muster/internal/dr"
)

// Limits of calls between nodes.
const (
	maxMessage    = 64 << 20               // bytes of a question or an answer
	progressEvery = 250 * time.Millisecond // how often progress travels at most
)

// procedure is one call between nodes: connect's server streaming, with our own types as JSON. Progress comes first, as
// often as there is any; the last message is the answer or the error.
type procedure[In, Out any] string

// part is one message of an answer: progress, an error, or the answer itself.
type part[Out any] struct {
	Progress *progress `json:"progress,omitempty"`
	Error    *Error    `json:"error,omitempty"`
	Rejected *Rejected `json:"rejected,omitempty"`
	Done     bool      `json:"done,omitempty"`
	Answer   Out       `json:"answer,omitzero"` // with Done
}

type progress struct {
	Part  string `json:"part"`
	Done  int64  `json:"done"`
	Total int64  `json:"total"`
	Unit  string `json:"unit"`
}

// serve carries a procedure out with do, whose context ends when the one who asked goes away.
func (p procedure[In, Out]) serve(mux *http.ServeMux, do func(ctx context.Context, in In, report dr.Progress) (Out, error)) {
	mux.Handle(string(p), connect.NewServerStreamHandler(string(p),
		func(ctx context.Context, req *connect.Request[In], stream *connect.ServerStream[part[Out]]) error {
			t := teller[Out]{stream: stream}
			out, err := do(ctx, *req.Msg, t.report)
			return t.end(out, err)
		}, connect.WithCodec(plainJSON{}), connect.WithReadMaxBytes(maxMessage)))
}

// teller writes the messages of one answer, each whole, from any goroutine.
type teller[Out any] struct {
	stream *connect.ServerStream[part[Out]]
	mu     sync.Mutex
	last   time.Time
	part   string
	over   bool
}

func (t *teller[Out]) report(name string, done, total int64, unit string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over || name == t.part && done != total && time.Since(t.last) < progressEvery {
		return
	}
	t.last, t.part = time.Now(), name
	// One that cannot be told is gone, and ends the context of the work by that.
	_ = t.stream.Send(&part[Out]{Progress: &progress{name, done, total, unit}})
}

func (t *teller[Out]) end(out Out, err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	var rejected *Rejected
	var known *Error
	switch {
	case err == nil:
		return t.stream.Send(&part[Out]{Done: true, Answer: out})
	case errors.As(err, &rejected):
		return t.stream.Send(&part[Out]{Rejected: rejected})
	case errors.As(err, &known): // with what was said around it
		return t.stream.Send(&part[Out]{Error: &Error{Kind: known.Kind, Message: err.Error()}})
	}
	return t.stream.Send(&part[Out]{Error: &Error{Kind: Internal, Message: err.Error()}})
}

// ask asks for a procedure and returns with its answer. A node that is not there, or goes away, is Unavailable: whatever is asked
// of a node may be asked again.
func (p procedure[In, Out]) ask(ctx context.Context, c *http.Client, base string, in In, report dr.Progress) (Out, error) {
	var none Out
	client := connect.NewClient[In, part[Out]](c, base+string(p), connect.WithCodec(plainJSON{}), connect.WithReadMaxBytes(maxMessage))
	stream, err := client.CallServerStream(ctx, connect.NewRequest(&in))
	if err != nil {
		return none, p.broken(ctx, err)
	}
	defer stream.Close() //nolint:errcheck // the answer is here, or what is wrong is known
	for stream.Receive() {
		switch m := stream.Msg(); {
		case m.Progress != nil:
			report.Report(m.Progress.Part, m.Progress.Done, m.Progress.Total, m.Progress.Unit)
		case m.Rejected != nil:
			return none, m.Rejected
		case m.Error != nil:
			return none, m.Error
		case m.Done:
			return m.Answer, nil
		}
	}
	err = stream.Err()
	if err == nil {
		err = errors.New("the answer broke off")
	}
	return none, p.broken(ctx, err)
}

func (p procedure[In, Out]) broken(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("ask node: %w", context.Cause(ctx))
	}
	return Errorf(Unavailable, "ask node for %s: %w", p, err)
}

// plainJSON is the codec of our own types, in the place of connect's for protocol buffers.
type plainJSON struct{}

func (plainJSON) Name() string                    { return "json" }
func (plainJSON) Marshal(m any) ([]byte, error)   { return json.Marshal(m) }
func (plainJSON) Unmarshal(d []byte, m any) error { return json.Unmarshal(d, m) }
