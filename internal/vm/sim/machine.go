package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	"image/png"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

const serialLog = "serial.log"

// machine is a started machine; it is also the handle that callers hold.
//
//	running ── Pause ──> paused
//	   │── Panic ──> crashed, still on the host
//	   │── PowerOff, Destroy ──> off, gone
//	   └── Die ──> crashed, gone
type machine struct {
	host   *Host
	spec   vm.Spec
	pull   context.CancelFunc
	ended  chan struct{} // closed when the guest has returned for good
	button chan struct{}
	resume chan struct{} // a token ends a pause
	press  sync.Once
	ports  map[dr.GuestPort]*port
	began  time.Time

	mu     sync.Mutex
	state  vm.State
	reason string
	screen image.Image
	log    *os.File
	logged int
	usage  vm.Usage
}

var _ vm.Machine = (*machine)(nil)

// power switches a machine on.
func power(h *Host, spec vm.Spec, guest Guest) (*machine, error) {
	log, err := openLog(spec.Dir)
	if err != nil {
		return nil, err
	}
	ctx, pull := context.WithCancel(context.Background())
	m := &machine{
		host: h, spec: spec, pull: pull, ended: make(chan struct{}), button: make(chan struct{}), resume: make(chan struct{}, 1), began: time.Now(),
		ports: map[dr.GuestPort]*port{dr.PortVirtio: newPort(), dr.PortISA: newPort()},
		state: vm.Running, screen: blank(), log: log,
	}
	if spec.Paused {
		m.state, m.reason = vm.Paused, "paused by an operator"
		guest = late{guest}
	}
	go m.run(ctx, guest)
	return m, nil
}

// late is a guest whose processors wait for the first Resume.
type late struct{ Guest }

func (l late) Run(ctx context.Context, c *Computer) End {
	if c.Runs == 0 {
		c.Pause(ctx, "paused by an operator")
	}
	return l.Guest.Run(ctx, c)
}

// run runs the guest until the machine is off.
func (m *machine) run(ctx context.Context, guest Guest) {
	defer close(m.ended)
	defer m.pull()
	end := PowerOff
	for runs := 0; ; runs++ {
		runCtx, over := context.WithCancel(ctx)
		end = guest.Run(runCtx, &Computer{Spec: m.spec, Runs: runs, m: m})
		over()
		for _, p := range m.ports {
			p.reset(runs + 1)
		}
		if end != Reboot || m.spec.NoReboot || ctx.Err() != nil || m.is(vm.Crashed) {
			break
		}
	}
	if end == Panic && ctx.Err() == nil {
		m.set(vm.Crashed, "the guest panicked")
		<-ctx.Done() // what is left of it can be looked at until it is destroyed
		m.set(vm.Off, "")
	} else if !m.is(vm.Crashed) {
		m.set(vm.Off, "")
	}
	m.host.mu.Lock()
	if m.host.machines[m.spec.Name] == m {
		delete(m.host.machines, m.spec.Name)
	}
	m.host.mu.Unlock()
	for _, p := range m.ports {
		p.unplug()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_ = m.log.Close()
}

func (m *machine) set(state vm.State, reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state, m.reason = state, reason
}

func (m *machine) is(state vm.State) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state == state
}

func (m *machine) Name() string      { return m.spec.Name }
func (m *machine) Owner() vm.Owner   { return m.spec.Owner }
func (m *machine) SerialLog() string { return filepath.Join(m.spec.Dir, serialLog) }

func (m *machine) State(ctx context.Context) (vm.State, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state, m.reason, ctx.Err()
}

func (m *machine) gone() bool {
	select {
	case <-m.ended:
		return true
	default:
		return false
	}
}

func (m *machine) Channel(ctx context.Context, which dr.GuestPort) (vm.Channel, error) {
	p := m.ports[which]
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("connect to %s of %s: %w", which, m.spec.Name, ctx.Err())
	case p == nil:
		return nil, fmt.Errorf("connect to %s: the machine has no port %q", m.spec.Name, which)
	case m.gone():
		return nil, fmt.Errorf("connect to %s of %s: %w", which, m.spec.Name, vm.ErrGone)
	}
	ours, theirs := net.Pipe()
	if !p.plug(theirs) {
		return nil, fmt.Errorf("connect to %s of %s: somebody else is connected", which, m.spec.Name)
	}
	return &channel{Conn: ours, port: p, line: theirs}, nil
}

// channel frees its port when it is closed, before Close returns.
type channel struct {
	net.Conn
	port *port
	line net.Conn
}

func (c *channel) Close() error {
	c.port.mu.Lock()
	if c.port.line == c.line {
		c.port.line = nil
	}
	c.port.mu.Unlock()
	return c.Conn.Close()
}

func (m *machine) Screenshot(ctx context.Context) ([]byte, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("photograph %s: %w", m.spec.Name, ctx.Err())
	}
	if m.gone() {
		return nil, fmt.Errorf("photograph %s: %w", m.spec.Name, vm.ErrGone)
	}
	m.mu.Lock()
	screen := m.screen
	m.mu.Unlock()
	var out bytes.Buffer
	if err := png.Encode(&out, screen); err != nil {
		return nil, fmt.Errorf("photograph %s: %w", m.spec.Name, err)
	}
	return out.Bytes(), nil
}

func (m *machine) Resume(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("resume %s: %w", m.spec.Name, ctx.Err())
	case m.state == vm.Off:
		return fmt.Errorf("resume %s: %w", m.spec.Name, vm.ErrGone)
	case m.state == vm.Crashed:
		return fmt.Errorf("resume %s: it is %s", m.spec.Name, m.state)
	case m.state == vm.Paused:
		m.state, m.reason = vm.Running, ""
		select {
		case m.resume <- struct{}{}:
		default: // it is about to run already
		}
	}
	return nil
}

func (m *machine) Usage(ctx context.Context) (vm.Usage, error) {
	if ctx.Err() != nil {
		return vm.Usage{}, fmt.Errorf("measure %s: %w", m.spec.Name, ctx.Err())
	}
	if m.gone() {
		return vm.Usage{}, fmt.Errorf("measure %s: %w", m.spec.Name, vm.ErrGone)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	usage := m.usage
	usage.CPU = time.Since(m.began)
	return usage, nil
}

func (m *machine) Shutdown(ctx context.Context, limit time.Duration) (bool, error) {
	if m.gone() {
		return true, nil
	}
	m.press.Do(func() { close(m.button) })
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-m.ended:
		return true, nil
	case <-timer.C:
	case <-ctx.Done():
	}
	return false, errors.Join(ctx.Err(), m.stop(context.WithoutCancel(ctx)))
}

func (m *machine) Destroy(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("destroy %s: %w", m.spec.Name, err)
	}
	return m.stop(ctx)
}

// stop pulls the plug and waits until the guest has noticed.
func (m *machine) stop(ctx context.Context) error {
	m.pull()
	for _, p := range m.ports {
		p.unplug()
	}
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	select {
	case <-m.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("destroy %s: its guest does not return: %w", m.spec.Name, ctx.Err())
	}
}
