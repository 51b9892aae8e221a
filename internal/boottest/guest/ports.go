package guest

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/probe"
)

// The pace at which ports are looked for.
const (
	lookOften  = 100 * time.Millisecond // while the machine starts
	lookSeldom = 5 * time.Second        // later: a driver loaded by hand
	eagerFor   = 2 * time.Minute
	absentWait = 100 * time.Millisecond // between two reads of a port to which no host is connected
)

// A Port finds and opens one of the machine's ports. An error means that it is not there, or not there yet.
type Port func() (io.ReadWriteCloser, error)

// Ports are the two ports of a machine that Muster started: see dr.GuestPort.
func Ports() []Port {
	return []Port{
		func() (io.ReadWriteCloser, error) { return OpenVirtio("/", probe.PortName) },
		func() (io.ReadWriteCloser, error) { return OpenTTY("/dev/ttyS1") },
	}
}

// Run serves every port whenever it is there, until ctx ends.
func (a *Agent) Run(ctx context.Context, ports ...Port) {
	done := make(chan struct{})
	for _, open := range ports {
		go func() {
			defer func() { done <- struct{}{} }()
			a.keep(ctx, open)
		}()
	}
	for range ports {
		<-done
	}
}

// keep looks for one port and serves it, again and again.
func (a *Agent) keep(ctx context.Context, open Port) {
	began := time.Now()
	for ctx.Err() == nil {
		if port, err := open(); err == nil {
			_ = a.Serve(ctx, port) // it ended; whatever the reason, look again
			_ = port.Close()
		}
		pause := lookOften
		if time.Since(began) > eagerFor {
			pause = lookSeldom
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// OpenVirtio opens the virtio-serial port of that name. It does not need udev's link: early in boot only the kernel's
// own name for the device is there.
func OpenVirtio(root, name string) (io.ReadWriteCloser, error) {
	path := filepath.Join(root, "dev/virtio-ports", name)
	if _, err := os.Stat(path); err != nil {
		if path, err = findVirtio(root, name); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	return patient{f}, nil
}

func findVirtio(root, name string) (string, error) {
	class := filepath.Join(root, "sys/class/virtio-ports")
	entries, err := os.ReadDir(class)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(class, e.Name(), "name"))
		if err == nil && strings.TrimSpace(string(text)) == name {
			return filepath.Join(root, "dev", e.Name()), nil
		}
	}
	return "", fs.ErrNotExist
}

// patient is a port that reads as ended while no host is connected: it waits for the next one.
type patient struct{ *os.File }

func (p patient) Read(b []byte) (int, error) {
	for {
		n, err := p.File.Read(b)
		if n > 0 || !errors.Is(err, io.EOF) {
			return n, err
		}
		// There is nothing to wait on: the port polls as hung up, which is ready.
		time.Sleep(absentWait)
	}
}

// OpenTTY opens a serial port and makes it a plain stream of bytes: no echo, no line editing, no flow control.
func OpenTTY(path string) (io.ReadWriteCloser, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := raw(f); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// raw is cfmakeraw. The error tells a port that exists in name only: Linux always has /dev/ttyS0 to ttyS3.
func raw(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Control(func(fd uintptr) {
		t, err := unix.IoctlGetTermios(int(fd), unix.TCGETS)
		if err != nil {
			failed = err
			return
		}
		t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON | unix.IXOFF
		t.Oflag &^= unix.OPOST
		t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
		t.Cflag &^= unix.CSIZE | unix.PARENB | unix.HUPCL | unix.CBAUD | unix.CRTSCTS
		t.Cflag |= unix.CS8 | unix.CLOCAL | unix.CREAD | unix.B115200
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		failed = unix.IoctlSetTermios(int(fd), unix.TCSETS, t)
	})
	return errors.Join(err, failed)
}
