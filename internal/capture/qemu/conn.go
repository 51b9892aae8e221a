package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
)

// usual is where libvirt listens: the one daemon, or the one for QEMU where there is one for each kind.
var usual = []string{"/var/run/libvirt/libvirt-sock", "/var/run/libvirt/virtqemud-sock"}

// Limits of one answer of libvirtd's.
const (
	callLimit  = 60 * time.Second // a call waits up to 30 s for another job on the machine
	dialLimit  = 10 * time.Second
	domainGone = libvirt.ErrNoDomain
)

// errNoMachine is a machine that libvirt does not know.
var errNoMachine = errors.New("libvirt knows no such machine: see 'virsh list --all'")

// connection is a connection to libvirtd, made when it is needed and again when it broke: libvirtd may be restarted while a
// machine is read. It is used by one goroutine at a time.
type connection struct {
	path string // "" for the usual one

	mu   sync.Mutex
	conn net.Conn
	line *libvirt.Libvirt
}

// call makes a call. libvirt's calls take no context: one that outlives its time takes the connection with it. A call that
// may be made twice (again) is, if the connection breaks.
func (c *connection) call(ctx context.Context, again bool, call func(*libvirt.Libvirt) error) error {
	err := c.once(ctx, call)
	if again && err != nil && code(err) == 0 && ctx.Err() == nil {
		_ = c.close()
		err = c.once(ctx, call)
	}
	return err
}

// ask makes a call that changes nothing, or that may be made twice.
func (c *connection) ask(ctx context.Context, call func(*libvirt.Libvirt) error) error {
	return c.call(ctx, true, call)
}

func (c *connection) once(ctx context.Context, call func(*libvirt.Libvirt) error) error {
	line, err := c.connect(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, callLimit, fmt.Errorf("libvirtd did not answer for %s", callLimit))
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- call(line) }()
	select {
	case err = <-done:
	case <-ctx.Done():
		_ = c.close()
		if err := <-done; code(err) != 0 { // what is called writes its results until then
			return err
		}
		return context.Cause(ctx)
	}
	if err != nil && code(err) == 0 {
		_ = c.close()
		return fmt.Errorf("ask libvirtd: the connection broke: %w", err)
	}
	return err
}

func (c *connection) connect(ctx context.Context) (*libvirt.Libvirt, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.line != nil {
		select {
		case <-c.line.Disconnected():
		default:
			return c.line, nil
		}
	}
	dialer := net.Dialer{Timeout: dialLimit}
	conn, err := dialer.DialContext(ctx, "unix", c.socket())
	if err != nil {
		return nil, fmt.Errorf("connect to libvirtd: is it running? (systemctl start libvirtd): %w", err)
	}
	line := libvirt.NewWithDialer(dialers.NewAlreadyConnected(conn))
	silent := time.AfterFunc(callLimit, func() { _ = conn.Close() })
	defer silent.Stop()
	if err := line.ConnectToURI(libvirt.QEMUSystem); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("connect to libvirtd: %w", err)
	}
	c.conn, c.line = conn, line
	return line, nil
}

// socket is the path that is connected to.
func (c *connection) socket() string {
	if c.path != "" {
		return c.path
	}
	for _, path := range usual {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return usual[0]
}

// close ends the connection; the next call makes another.
func (c *connection) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.line == nil {
		return nil
	}
	_ = c.conn.Close()
	<-c.line.Disconnected()
	c.conn, c.line = nil, nil
	return nil
}

// code is libvirt's number of an error, 0 if it is not libvirt's.
func code(err error) libvirt.ErrorNumber {
	var e libvirt.Error
	if errors.As(err, &e) {
		return libvirt.ErrorNumber(e.Code)
	}
	return 0
}
