package libvirt

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

const (
	look       = 200 * time.Millisecond // how often to look whether a machine that was asked to go is gone
	pressAgain = 10 * time.Second       // a guest that is still booting does not hear the button
	dialLimit  = 10 * time.Second
)

// machine is a domain of ours.
type machine struct {
	h   *Hypervisor
	dom libvirt.Domain
	tag tag
}

var _ vm.Machine = (*machine)(nil)

func (m *machine) Name() string      { return m.dom.Name }
func (m *machine) Owner() vm.Owner   { return m.tag.owner() }
func (m *machine) SerialLog() string { return filepath.Join(m.tag.Dir, serialLog) }

func (m *machine) State(ctx context.Context) (vm.State, string, error) {
	var state, reason int32
	err := m.h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		state, reason, err = l.DomainGetState(m.dom, 0)
		return err
	})
	if errors.Is(err, vm.ErrGone) {
		if m.h.conn.died(m.dom.UUID) {
			return vm.Crashed, "the emulator died", nil
		}
		return vm.Off, "", nil
	}
	if err != nil {
		return "", "", fmt.Errorf("ask state of %s: %w", m.dom.Name, err)
	}
	s, why := interpret(libvirt.DomainState(state), reason)
	return s, why, nil
}

// interpret turns libvirt's state into ours.
func interpret(state libvirt.DomainState, reason int32) (vm.State, string) {
	switch state {
	case libvirt.DomainPaused, libvirt.DomainPmsuspended:
		switch libvirt.DomainPausedReason(reason) {
		case libvirt.DomainPausedIoerror:
			return vm.Paused, "I/O error"
		case libvirt.DomainPausedUser:
			return vm.Paused, "paused by an operator"
		case libvirt.DomainPausedWatchdog:
			return vm.Paused, "watchdog"
		case libvirt.DomainPausedCrashed:
			return vm.Crashed, "the guest panicked"
		case libvirt.DomainPausedStartingUp:
			return vm.Paused, "starting"
		}
		return vm.Paused, fmt.Sprintf("libvirt's reason %d", reason)
	case libvirt.DomainCrashed:
		return vm.Crashed, "the guest panicked"
	case libvirt.DomainShutoff:
		return vm.Off, ""
	}
	return vm.Running, "" // also blocked, and shutting down
}

// Channel connects to a port's socket. QEMU serves one connection at a time and lets a second one wait without a word,
// so it is refused here.
func (m *machine) Channel(ctx context.Context, port dr.GuestPort) (vm.Channel, error) {
	name := map[dr.GuestPort]string{dr.PortVirtio: portSocket, dr.PortISA: isaSocket}[port]
	if name == "" {
		return nil, fmt.Errorf("connect to %s: the machine has no port %q", m.dom.Name, port)
	}
	path := filepath.Join(m.tag.Dir, name)
	m.h.lines.Lock()
	defer m.h.lines.Unlock()
	if m.h.busy[path] {
		return nil, fmt.Errorf("connect to %s of %s: somebody else is connected", port, m.dom.Name)
	}
	var dialer net.Dialer
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	conn, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		if state, _, lost := m.State(ctx); lost == nil && state == vm.Off {
			err = vm.ErrGone
		}
		return nil, fmt.Errorf("connect to %s of %s: %w", port, m.dom.Name, err)
	}
	m.h.busy[path] = true
	return &channel{Conn: conn, h: m.h, path: path}, nil
}

// channel gives its port free when it is closed.
type channel struct {
	net.Conn
	h    *Hypervisor
	path string
	once sync.Once
}

func (c *channel) Close() error {
	c.once.Do(func() {
		c.h.lines.Lock()
		defer c.h.lines.Unlock()
		delete(c.h.busy, c.path)
	})
	return c.Conn.Close()
}

// Screenshot goes through virsh: the screen travels as a stream beside the call's answer, and go-libvirt takes whichever
// comes first for the answer.
func (m *machine) Screenshot(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	screen, err := m.h.photograph(ctx, uuidText(m.dom.UUID))
	if err != nil {
		if state, _, lost := m.State(ctx); lost == nil && (state == vm.Off || m.h.conn.died(m.dom.UUID)) {
			err = vm.ErrGone
		}
		return nil, fmt.Errorf("photograph %s: %w", m.dom.Name, err)
	}
	return screen, nil
}

func (m *machine) Usage(ctx context.Context) (vm.Usage, error) {
	var u vm.Usage
	var nanoseconds uint64
	var ops, read, written int64
	err := m.h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		if _, _, _, _, nanoseconds, err = l.DomainGetInfo(m.dom); err != nil || m.tag.NVMe {
			return err
		}
		ops, read, _, written, _, err = l.DomainBlockStats(m.dom, "") // all disks
		return err
	})
	if err == nil && m.tag.NVMe {
		ops, read, written, err = m.askQEMU(ctx)
	}
	var waited time.Duration
	if err == nil {
		waited, err = m.waited(ctx)
	}
	if err != nil {
		return u, fmt.Errorf("measure %s: %w", m.dom.Name, err)
	}
	return vm.Usage{CPU: time.Duration(nanoseconds), Waited: waited, ReadOps: ops, ReadBytes: read, WriteBytes: written}, nil
}

// waited adds up how long the threads of the virtual CPUs stood in the host's run queues. libvirt reads it from the kernel's
// /proc/PID/task/TID/schedstat. Where QEMU emulates all processors in one thread it tells nothing.
func (m *machine) waited(ctx context.Context) (sum time.Duration, err error) {
	var records []libvirt.DomainStatsRecord
	err = m.h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		records, err = l.ConnectGetAllDomainStats([]libvirt.Domain{m.dom}, uint32(libvirt.DomainStatsVCPU), 0)
		return err
	})
	for _, r := range records {
		for _, p := range r.Params {
			if nanoseconds, ok := p.Value.I.(uint64); ok && strings.HasSuffix(p.Field, libvirt.DomainStatsVCPUSuffixDelay) {
				sum += time.Duration(nanoseconds)
			}
		}
	}
	return sum, err
}

// askQEMU asks QEMU itself about disks that libvirt does not know.
func (m *machine) askQEMU(ctx context.Context) (ops, read, written int64, err error) {
	var text string
	err = m.h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		text, err = l.QEMUDomainMonitorCommand(m.dom, `{"execute":"query-blockstats"}`, 0)
		return err
	})
	if err != nil {
		return 0, 0, 0, err
	}
	var answer struct {
		Return []struct {
			Stats struct {
				Ops     int64 `json:"rd_operations"`
				Read    int64 `json:"rd_bytes"`
				Written int64 `json:"wr_bytes"`
			} `json:"stats"`
		} `json:"return"`
	}
	if err := json.NewDecoder(bytes.NewReader([]byte(text))).Decode(&answer); err != nil {
		return 0, 0, 0, fmt.Errorf("read QEMU's answer: %w", err)
	}
	for _, disk := range answer.Return {
		ops, read, written = ops+disk.Stats.Ops, read+disk.Stats.Read, written+disk.Stats.Written
	}
	return ops, read, written, nil
}

func (m *machine) Resume(ctx context.Context) error {
	state, _, err := m.State(ctx)
	switch {
	case err == nil && state == vm.Running:
		return nil
	case err == nil && state == vm.Paused:
		err = m.h.conn.ask(ctx, func(l *libvirt.Libvirt) error { return l.DomainResume(m.dom) })
	case err == nil && state == vm.Off:
		err = vm.ErrGone
	case err == nil:
		err = fmt.Errorf("it is %s", state)
	}
	if err != nil {
		return fmt.Errorf("resume %s: %w", m.dom.Name, err)
	}
	return nil
}

// Shutdown presses the power button, again from time to time, and pulls the plug when the limit or the context ends.
func (m *machine) Shutdown(ctx context.Context, limit time.Duration) (bool, error) {
	end := time.NewTimer(limit)
	defer end.Stop()
	tick := time.NewTicker(look)
	defer tick.Stop()
	for pressed := (time.Time{}); ; {
		state, _, err := m.State(ctx)
		if err == nil && state == vm.Off {
			return true, nil
		}
		if err == nil && state != vm.Running {
			return false, m.Destroy(ctx) // no processor runs that could hear the button
		}
		if err == nil && time.Since(pressed) >= pressAgain {
			pressed = time.Now()
			err = m.h.conn.ask(ctx, func(l *libvirt.Libvirt) error {
				return l.DomainShutdownFlags(m.dom, libvirt.DomainShutdownAcpiPowerBtn)
			})
		}
		if err != nil && !errors.Is(err, vm.ErrGone) && ctx.Err() == nil {
			return false, errors.Join(fmt.Errorf("shut down %s: %w", m.dom.Name, err), m.Destroy(ctx))
		}
		select {
		case <-tick.C:
		case <-end.C:
			return false, m.Destroy(ctx)
		case <-ctx.Done():
			return false, errors.Join(ctx.Err(), m.Destroy(context.WithoutCancel(ctx)))
		}
	}
}

func (m *machine) Destroy(ctx context.Context) error {
	if err := m.h.destroy(ctx, m.dom); err != nil {
		return fmt.Errorf("destroy %s: %w", m.dom.Name, err)
	}
	return nil
}
