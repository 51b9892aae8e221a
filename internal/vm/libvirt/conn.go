package libvirt

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"

	"github.com/musterdr/muster/internal/vm"
)

// connection is a connection to libvirtd that is made when it is needed.
type connection struct {
	path  string
	calls chan struct{} // a token for each call under way

	mu     sync.Mutex
	line   *line
	closed bool
	ended  map[libvirt.UUID]bool // domains whose emulator died, as events told
}

// line is one life of a connection.
type line struct {
	*libvirt.Libvirt
	conn net.Conn
}

func (l *line) dead() bool {
	select {
	case <-l.Disconnected():
		return true
	default:
		return false
	}
}

func newConnection(path string) *connection {
	return &connection{path: path, calls: make(chan struct{}, maxCalls), ended: map[libvirt.UUID]bool{}}
}

// ask makes a call that may be made twice: if the connection broke during it, it is made once more on a new one.
func (c *connection) ask(ctx context.Context, call func(*libvirt.Libvirt) error) error {
	err := c.once(ctx, callLimit, call)
	if errors.Is(err, errCut) && ctx.Err() == nil {
		err = c.once(ctx, callLimit, call)
	}
	return err
}

// errCut means that the connection broke before the answer.
var errCut = errors.New("the connection to libvirtd broke")

// once makes a call and waits for its answer until the context or the limit ends. A call that outlives its caller runs
// on, and writes its results, so results may be read only if the error is nil. A call that reaches the limit takes the
// connection with it: libvirtd no longer answers on it.
func (c *connection) once(ctx context.Context, limit time.Duration, call func(*libvirt.Libvirt) error) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case c.calls <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("libvirtd has not answered %d calls: is it hanging? (systemctl restart libvirtd)", maxCalls)
	}
	done := make(chan error, 1)
	cut := make(chan net.Conn, 1)
	go func() {
		defer func() { <-c.calls }()
		l, err := c.connect(ctx)
		if err != nil {
			done <- err
			return
		}
		cut <- l.conn
		err = call(l.Libvirt)
		if err != nil && (l.dead() || code(err) == 0) {
			_ = l.conn.Close()
			err = fmt.Errorf("%w: %w", errCut, err)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return translate(err)
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		select {
		case conn := <-cut:
			_ = conn.Close()
		default:
		}
		return fmt.Errorf("libvirtd did not answer for %s", limit)
	}
}

// code is libvirt's number of an error, 0 if it is not libvirt's.
func code(err error) libvirt.ErrorNumber {
	var e libvirt.Error
	if errors.As(err, &e) {
		return libvirt.ErrorNumber(e.Code)
	}
	return 0
}

func translate(err error) error {
	if code(err) == libvirt.ErrNoDomain {
		return vm.ErrGone
	}
	return err
}

// connect gives the connection, a new one if the old one is dead.
func (c *connection) connect(ctx context.Context) (*line, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.New("the hypervisor was closed")
	}
	if c.line != nil && !c.line.dead() {
		return c.line, nil
	}
	var dialer net.Dialer
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	conn, err := dialer.DialContext(ctx, "unix", c.path)
	if err != nil {
		return nil, fmt.Errorf("connect to libvirtd: is it running? (systemctl start libvirtd): %w", err)
	}
	l := &line{Libvirt: libvirt.NewWithDialer(dialers.NewAlreadyConnected(conn)), conn: conn}
	// A daemon that accepts and says nothing must not hold the lock for ever.
	silent := time.AfterFunc(callLimit, func() { _ = conn.Close() })
	defer silent.Stop()
	if err := l.ConnectToURI(libvirt.QEMUSystem); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("connect to libvirtd: %w", err)
	}
	events, err := l.LifecycleEvents(context.Background())
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("connect to libvirtd: listen to events: %w", err)
	}
	go c.listen(events)
	c.line = l
	return l, nil
}

// listen remembers which emulators died, because a machine that is gone tells nobody why. It ends with the connection.
func (c *connection) listen(events <-chan libvirt.DomainEventLifecycleMsg) {
	for event := range events {
		if libvirt.DomainEventType(event.Event) != libvirt.DomainEventStopped {
			continue
		}
		switch libvirt.DomainEventStoppedDetailType(event.Detail) {
		case libvirt.DomainEventStoppedCrashed, libvirt.DomainEventStoppedFailed:
			c.mu.Lock()
			if len(c.ended) >= maxEnded {
				clear(c.ended)
			}
			c.ended[event.Dom.UUID] = true
			c.mu.Unlock()
		}
	}
}

// died says whether the emulator of a domain is known to have died.
func (c *connection) died(id libvirt.UUID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended[id]
}

// close ends the connection for good.
func (c *connection) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.line != nil {
		_ = c.line.conn.Close()
		<-c.line.Disconnected()
	}
	return nil
}
