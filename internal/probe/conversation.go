package probe

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// The pace of a conversation.
const (
	HelloEvery   = time.Second            // between two hellos
	redialFirst  = 100 * time.Millisecond // before a lost channel is opened again; doubles up to redialMost
	redialMost   = 2 * time.Second
	writeLimit   = 10 * time.Second // for one question to leave; a port whose guest does not read fills up
	maxQuestions = 64               // under way at once
)

// ErrRestarted says that the agent that answered is gone and a new one has come up: its machine, or it alone, was
// started again. A new conversation finds out which.
var ErrRestarted = errors.New("the test agent started again")

// Channel is a connection to a port. vm.Channel is one.
type Channel interface {
	io.ReadWriteCloser
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
}

// Open connects to one port of a machine.
type Open func(ctx context.Context) (Channel, error)

// Conversation is the host's end: it talks with the test agent of one boot over whichever port answers first, opens a
// lost channel again, and repeats what was asked on it. Its methods may be called from many goroutines.
type Conversation struct {
	challenge string
	stop      context.CancelFunc
	done      sync.WaitGroup
	lines     []*line

	mu      sync.Mutex
	awake   bool
	chosen  *line
	hello   Hello
	pending map[int64]*question
	next    int64
	err     error // why there will be no more answers

	greeted chan struct{} // closed when hello is there
	over    chan struct{} // closed when err is there
}

type question struct {
	ask   Ask
	sent  int64 // generation of the connection it was sent on
	reply chan Answer
}

// line is one port with its connection of the moment.
type line struct {
	open       Open
	kick       chan struct{}
	stop       context.CancelFunc
	generation atomic.Int64 // counts connections
	garbage    atomic.Int64
	up         atomic.Bool
	ready      atomic.Bool           // the agent has just said so: hello is due at once
	lost       atomic.Pointer[error] // why it was lost, or could not be opened, last
}

// Dial begins a conversation with a fresh challenge over the ports of one machine. It returns at once; the ports are
// opened, and opened again, until Close. Nothing is said before Wake, or before the agent says that it is ready.
func Dial(ctx context.Context, ports ...Open) *Conversation {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic("probe: the system has no randomness: " + err.Error())
	}
	ctx, stop := context.WithCancel(ctx)
	c := &Conversation{
		challenge: hex.EncodeToString(b[:]),
		stop:      stop,
		pending:   map[int64]*question{},
		greeted:   make(chan struct{}),
		over:      make(chan struct{}),
	}
	contexts := make([]context.Context, len(ports))
	for i, open := range ports {
		l := &line{open: open, kick: make(chan struct{}, 1)}
		contexts[i], l.stop = context.WithCancel(ctx)
		c.lines = append(c.lines, l)
	}
	// Only now: the first line may be answered before the others have begun, and stops them.
	for i, l := range c.lines {
		c.done.Go(func() { c.keep(contexts[i], l) })
	}
	return c
}

// Close ends the conversation and closes its channels.
func (c *Conversation) Close() {
	c.fail(errors.New("the conversation was closed"))
	c.stop()
	c.done.Wait()
}

// Challenge is what every answer of this boot must repeat.
func (c *Conversation) Challenge() string { return c.challenge }

// Wake says that the guest's kernel runs: from now on its ports are its own and may be spoken to.
func (c *Conversation) Wake() {
	c.mu.Lock()
	c.awake = true
	c.mu.Unlock()
	c.kickAll()
}

// Connected says whether a port is open now and, where one is not, why.
func (c *Conversation) Connected() (up bool, why error) {
	for _, l := range c.lines {
		if l.up.Load() {
			return true, nil
		}
		if err := l.lost.Load(); err != nil {
			why = *err
		}
	}
	return false, why
}

// Garbage is how many bytes arrived that were no answer, on all ports.
func (c *Conversation) Garbage() (n int64) {
	for _, l := range c.lines {
		n += l.garbage.Load()
	}
	return n
}

// Hello waits until the agent has answered the challenge. The error is ctx's, ErrGarbage or ErrRestarted.
func (c *Conversation) Hello(ctx context.Context) (Hello, error) {
	select {
	case <-c.greeted:
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.hello, nil
	case <-c.over:
		return Hello{}, c.reason()
	case <-ctx.Done():
		return Hello{}, context.Cause(ctx)
	}
}

// Ask asks one question, which must be harmless to repeat, and waits for its answer or the end of ctx, whose error it
// then gives. Others are ErrGarbage, ErrRestarted, and what the agent itself could not do.
func (c *Conversation) Ask(ctx context.Context, ask Ask) (Answer, error) {
	q, err := c.put(ask)
	if err != nil {
		return Answer{}, err
	}
	defer func() {
		c.mu.Lock()
		delete(c.pending, q.ask.ID)
		c.mu.Unlock()
	}()
	c.kickAll()
	select {
	case a := <-q.reply:
		if a.Error != "" {
			return a, fmt.Errorf("the test agent could not answer %s: %s", ask.Ask, a.Error)
		}
		return a, nil
	case <-c.over:
		return Answer{}, c.reason()
	case <-ctx.Done():
		return Answer{}, context.Cause(ctx)
	}
}

func (c *Conversation) put(ask Ask) (*question, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pending) >= maxQuestions {
		return nil, fmt.Errorf("ask %s: %d questions are under way already", ask.Ask, maxQuestions)
	}
	c.next++
	ask.ID, ask.Challenge = c.next, c.challenge
	q := &question{ask: ask, reply: make(chan Answer, 1)}
	c.pending[ask.ID] = q
	return q, nil
}

func (c *Conversation) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *Conversation) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.over)
	}
}

func (c *Conversation) kickAll() {
	for _, l := range c.lines {
		select {
		case l.kick <- struct{}{}:
		default:
		}
	}
}

// keep keeps one port connected until ctx ends or the port is given up.
func (c *Conversation) keep(ctx context.Context, l *line) {
	wait := redialFirst
	for ctx.Err() == nil {
		began := time.Now()
		ch, err := l.open(ctx)
		if err == nil {
			err = c.attend(ctx, l, ch)
		}
		l.lost.Store(&err)
		if errors.Is(err, ErrGarbage) {
			// Also where another port might still answer: no honest guest sends as much.
			c.fail(ErrGarbage)
			return
		}
		if time.Since(began) > redialMost {
			wait = redialFirst // it was a good connection
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, redialMost)
	}
}

// attend reads and writes one connection until it is lost.
func (c *Conversation) attend(ctx context.Context, l *line, ch Channel) error {
	ctx, cancel := context.WithCancel(ctx)
	var talking sync.WaitGroup
	defer talking.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = ch.Close() })()
	defer ch.Close()

	generation := l.generation.Add(1)
	l.up.Store(true)
	defer l.up.Store(false)
	talking.Go(func() {
		defer ch.Close() // wakes the reader
		c.talk(ctx, l, ch, generation)
	})
	in := NewReader(ch, MaxGarbage)
	before := l.garbage.Load()
	in.garbage = before // what an earlier connection carried counts
	for {
		a, err := in.Answer()
		if err == nil && !c.take(l, a) {
			err = in.Refuse()
		}
		l.garbage.Store(in.Garbage())
		if err != nil {
			return err
		}
	}
}

// talk says what there is to say on one connection.
func (c *Conversation) talk(ctx context.Context, l *line, ch Channel, generation int64) {
	tick := time.NewTicker(HelloEvery)
	defer tick.Stop()
	var lastHello time.Time
	for {
		for _, ask := range c.due(l, generation, l.ready.Swap(false) || time.Since(lastHello) >= HelloEvery) {
			if ask.Ask == AskHello {
				lastHello = time.Now()
			}
			if ch.SetWriteDeadline(time.Now().Add(writeLimit)) != nil || Write(ch, ask) != nil {
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-l.kick:
		case <-tick.C:
		}
	}
}

// due gives what is to be said now on a connection: hello until it is answered, then the open questions, each once a
// connection.
func (c *Conversation) due(l *line, generation int64, hello bool) (asks []Ask) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.awake:
	case c.chosen == nil && hello:
		asks = append(asks, Ask{Ask: AskHello, Challenge: c.challenge, Now: time.Now()})
	case c.chosen == l:
		for _, q := range c.pending {
			if q.sent != generation {
				q.sent = generation
				q.ask.Now = time.Now()
				asks = append(asks, q.ask)
			}
		}
	}
	return asks
}

// take accepts an answer. It says no to one that answers nothing.
func (c *Conversation) take(l *line, a Answer) bool {
	if a.Answer == SayReady {
		return c.takeReady(l, a)
	}
	if a.Challenge != c.challenge {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.Answer == AskHello {
		if a.Hello == nil || a.Hello.BootID == "" || c.chosen != nil {
			return false
		}
		c.chosen, c.hello = l, *a.Hello
		close(c.greeted)
		for _, other := range c.lines {
			if other != l {
				other.stop()
			}
		}
		return true
	}
	q := c.pending[a.ID]
	if q == nil || q.ask.Ask != a.Answer || l != c.chosen {
		return false
	}
	if a.Error == "" && (a.Answer == AskStatus && a.Status == nil || a.Answer == AskCheck && a.Result == nil) {
		return false
	}
	delete(c.pending, a.ID)
	q.reply <- a
	return true
}

func (c *Conversation) takeReady(l *line, a Answer) bool {
	c.mu.Lock()
	first := !c.awake
	greeted := c.chosen != nil
	other := c.chosen == l && a.Hello != nil && a.Hello.Agent != c.hello.Agent
	c.awake = true
	c.mu.Unlock()
	if other {
		c.fail(ErrRestarted)
	} else if !greeted {
		l.ready.Store(true)
		c.kickAll()
	}
	return first || other // said more often it is counted, or else it could be said without end
}
