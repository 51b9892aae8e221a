// Package guest is what the test agent does inside a booted rescue image: it answers the questions of package probe on
// the ports the host gave the machine.
//
//	Agent   answers questions, on any number of ports at once
//	Ports   where they are on Linux: a virtio-serial port, the second serial port
//	Status  the machine seen from inside
//	Check   one question of the customer's own, asked again until it is answered well or its time is over
//
// The agent runs as root in an image that may be a real recovered server, not only a test: it writes to no disk, listens
// on no network, starts nothing by itself, and does only what the host asks over a port that only the host has. Its own
// memory and what it says are bounded whatever the server is like.
//
// Knows: Linux, the questions, how each is carried out.
// Must not know: what was expected of the answers, what a verdict is, what happens on the host.
package guest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
)

// Limits of the agent.
const (
	maxAtOnce   = 32               // questions answered at the same time
	unasked     = time.Second      // without a question before the agent announces itself
	statusLimit = 90 * time.Second // to gather a status; what is not there by then is left out
	sayLimit    = 10 * time.Second // for one answer to leave; a host that went away does not read
)

// Agent answers questions. The zero Agent answers for the machine it runs on. What its functions return belongs to it and is
// cut to size where it lies.
type Agent struct {
	Version string
	Who     func() probe.Hello                                   // nil: Identity
	Look    func(ctx context.Context, brief bool) probe.Status   // nil: Status
	Try     func(ctx context.Context, c dr.Check) dr.CheckResult // nil: Check

	once  sync.Once
	id    string // see probe.Hello.Agent
	brief memo
	asked atomic.Int64 // when it was asked something last, Unix nanoseconds
}

// name gives the agent's identity of this run.
func (a *Agent) name() string {
	a.once.Do(func() { a.id = rand.Text() })
	return a.id
}

// Serve answers on one open port until ctx ends or the port does. The error is the port's, and never nil.
func (a *Agent) Serve(ctx context.Context, port io.ReadWriteCloser) error {
	ctx, cancel := context.WithCancel(ctx)
	var busy sync.WaitGroup
	defer busy.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = port.Close() })()

	out := &mouth{port: port}
	busy.Go(func() { a.announce(ctx, out) })
	slots := make(chan struct{}, maxAtOnce)
	in := probe.NewReader(port, 0)
	for {
		ask, err := in.Ask()
		if err != nil {
			return err
		}
		a.asked.Store(time.Now().UnixNano())
		select {
		case slots <- struct{}{}:
			busy.Go(func() {
				defer func() { <-slots }()
				a.reply(ctx, out, ask)
			})
		default:
			_ = out.say(probe.Answer{Answer: ask.Ask, Challenge: ask.Challenge, ID: ask.ID,
				Error: fmt.Sprintf("%d questions are being answered already", maxAtOnce)})
		}
	}
}

// announce says that the agent is ready whenever nobody has asked anything for a while: often while a host is likely to
// wait for it, seldom later.
func (a *Agent) announce(ctx context.Context, out *mouth) {
	ready := probe.Answer{Answer: probe.SayReady, Hello: &probe.Hello{Agent: a.name()}}
	began := time.Now()
	for {
		if time.Since(time.Unix(0, a.asked.Load())) > unasked {
			_ = out.say(ready)
		}
		pause := 5 * time.Second
		switch age := time.Since(began); {
		case age < 10*time.Second:
			pause = 250 * time.Millisecond
		case age < 15*time.Minute:
			pause = time.Second
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// memo is the last brief status of a machine that was starting. Looking costs the machine some of its processors, and just
// then it needs them: the better part of the time between two looks belongs to the machine.
type memo struct {
	mu    sync.Mutex
	last  *probe.Status
	until time.Time
}

// Limits of a memo.
const (
	memoShare = 8 // times what looking took
	memoLimit = 3 * time.Second
)

func (m *memo) status(ctx context.Context, look func(context.Context, bool) probe.Status, brief bool) probe.Status {
	if !brief {
		return look(ctx, false)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.last != nil && time.Now().Before(m.until) {
		again := *m.last
		again.Uptime, again.Now = uptime(), time.Now()
		return again
	}
	began := time.Now()
	now := look(ctx, true)
	if m.last = nil; now.Jobs > 0 || now.InitState == "starting" || now.InitState == "initializing" {
		m.last, m.until = &now, time.Now().Add(min(memoLimit, memoShare*time.Since(began)))
	}
	return now
}

// reply answers one question.
func (a *Agent) reply(ctx context.Context, out *mouth, ask probe.Ask) {
	answer := probe.Answer{Answer: ask.Ask, Challenge: ask.Challenge, ID: ask.ID}
	switch ask.Ask {
	case probe.AskHello:
		who := Identity
		if a.Who != nil {
			who = a.Who
		}
		hello := who()
		hello.Agent, hello.Version = a.name(), a.Version
		answer.Hello = &hello
	case probe.AskStatus:
		look := Status
		if a.Look != nil {
			look = a.Look
		}
		limited, cancel := context.WithTimeout(ctx, statusLimit)
		status := a.brief.status(limited, look, ask.Brief)
		cancel()
		answer.Status = &status
	case probe.AskCheck:
		try := Check
		if a.Try != nil {
			try = a.Try
		}
		if ask.Check == nil {
			answer.Error = "the question names no check"
		} else if err := ask.Check.Validate(); err != nil {
			answer.Error = "the check is not valid: " + err.Error()
		} else {
			result := try(ctx, *ask.Check)
			answer.Result = &result
		}
	default:
		answer.Error = "this agent does not know that question"
	}
	_ = out.say(answer) // a host that does not hear it asks again
}

// mouth writes whole answers, one at a time.
type mouth struct {
	mu   sync.Mutex
	port io.Writer
}

func (m *mouth) say(a probe.Answer) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p, ok := m.port.(interface{ SetWriteDeadline(time.Time) error }); ok {
		_ = p.SetWriteDeadline(time.Now().Add(sayLimit)) // a port without deadlines blocks; its answers wait
	}
	// Well inside probe's limits: a serial port without a driver carries some 10 KB a second. A server with more than
	// that to tell of tells less, but it does answer.
	for items := maxList; ; items /= 2 {
		a.Tame(items, maxGot)
		if err := probe.Write(m.port, a); !errors.Is(err, probe.ErrLong) || items == 0 {
			return err
		}
	}
}

// maxList is how many entries of one list are told.
const maxList = 512
