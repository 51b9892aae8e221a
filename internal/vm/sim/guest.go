package sim

import (
	"context"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

const (
	maxSerial = 8 << 20  // bytes of a serial log; what comes after is lost
	maxInput  = 64 << 10 // bytes sent to a port that the guest has not read
)

// Guest is what a machine does. Run is called at power-on and again after each reboot; returning ends that run, and
// with it ctx and the ports. When the plug is pulled ctx is done and Run must return at once; what it returns then does
// not matter.
type Guest interface {
	Run(ctx context.Context, c *Computer) End
}

// GuestFunc is a Guest that is one function.
type GuestFunc func(ctx context.Context, c *Computer) End

// Run calls the function.
func (f GuestFunc) Run(ctx context.Context, c *Computer) End { return f(ctx, c) }

// End is how a run of a guest ends.
type End int

// The ends of a run.
const (
	PowerOff End = iota // the guest went down: the machine is off and gone
	Reboot              // it is run again; with Spec.NoReboot the machine is off
	Panic               // the machine stays, crashed, until it is destroyed
)

// Computer is what a guest sees of its machine. Its methods may be called from many goroutines.
type Computer struct {
	Spec vm.Spec
	Runs int // how often the guest was run before: 0 at power-on

	m *machine
}

// Serial is the first serial port: what is written appears in the serial log.
func (c *Computer) Serial() io.Writer { return serial{c.m} }

// Port is the guest's end of the agent's port. Read waits for the host and ends with io.EOF when this run of the guest
// has ended. What is written while no host is connected is lost.
func (c *Computer) Port(which dr.GuestPort) io.ReadWriter {
	return &end{port: c.m.ports[which], run: c.Runs}
}

// Button is closed when the power button is pressed.
func (c *Computer) Button() <-chan struct{} { return c.m.button }

// Show puts a picture on the screen.
func (c *Computer) Show(picture image.Image) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	c.m.screen = picture
}

// Pause stops the machine as an I/O error would, with that reason in its State, until it is resumed or the plug is
// pulled.
func (c *Computer) Pause(ctx context.Context, reason string) {
	c.m.set(vm.Paused, reason)
	select {
	case <-c.m.resume:
		c.m.set(vm.Running, "")
	case <-ctx.Done():
	}
}

// Starve has the guest want a processor for so long and the host give it none, for Usage. No time passes.
func (c *Computer) Starve(d time.Duration) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	c.m.usage.Waited += d
}

// Die ends the machine as if the emulator had crashed: it is gone from the host and its handles say Crashed. Run must
// return after it.
func (c *Computer) Die() { c.m.set(vm.Crashed, "the emulator died") }

// ReadAt reads from a disk whose top layer is a raw file.
func (c *Computer) ReadAt(disk int, p []byte, off int64) (int, error) {
	return c.onDisk(disk, os.O_RDONLY, func(f *os.File) (int, error) {
		n, err := f.ReadAt(p, off)
		c.m.mu.Lock()
		defer c.m.mu.Unlock()
		c.m.usage.ReadBytes += int64(n)
		c.m.usage.ReadOps++
		return n, err
	})
}

// WriteAt writes to a disk whose top layer is a raw file.
func (c *Computer) WriteAt(disk int, p []byte, off int64) (int, error) {
	return c.onDisk(disk, os.O_WRONLY, func(f *os.File) (int, error) {
		n, err := f.WriteAt(p, off)
		c.m.mu.Lock()
		defer c.m.mu.Unlock()
		c.m.usage.WriteBytes += int64(n)
		return n, err
	})
}

func (c *Computer) onDisk(disk, flag int, do func(*os.File) (int, error)) (int, error) {
	if disk < 0 || disk >= len(c.Spec.Disks) {
		return 0, fmt.Errorf("the machine has no disk %d", disk)
	}
	top := c.Spec.Disks[disk].Layers[0]
	if top.Format != "raw" {
		return 0, fmt.Errorf("disk %d: a make-believe machine reads only raw layers, not %s", disk, top.Format)
	}
	f, err := os.OpenFile(top.Path, flag, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return do(f)
}

// nothing is the guest of a disk that does not boot.
type nothing struct{}

func (nothing) Run(ctx context.Context, c *Computer) End {
	fmt.Fprint(c.Serial(), "Booting from Hard Disk...\r\nNo bootable device.\r\n")
	<-ctx.Done()
	return PowerOff
}

// blank is the screen before anything is shown on it: a text mode without text.
func blank() image.Image {
	screen := image.NewGray(image.Rect(0, 0, 720, 400))
	draw.Draw(screen, screen.Bounds(), image.NewUniform(color.Black), image.Point{}, draw.Src)
	return screen
}

// serial appends to the log.
type serial struct{ m *machine }

func (s serial) Write(p []byte) (int, error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if room := maxSerial - s.m.logged; room > 0 {
		n, err := s.m.log.Write(p[:min(len(p), room)])
		s.m.logged += n
		if err != nil {
			return n, err
		}
	}
	return len(p), nil
}

// openLog makes the serial log of a machine.
func openLog(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, serialLog), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open serial log: %w", err)
	}
	return f, nil
}

// port is one agent's port. The host's end is one end of a net.Pipe, the other end is line.
type port struct {
	mu    sync.Mutex
	cond  *sync.Cond
	line  io.ReadWriteCloser // nil: nobody is connected
	input []byte             // sent by the host, not yet read by the guest
	run   int                // which run of the guest has the port
	off   bool
}

// end is the guest's end of a port during one of its runs.
type end struct {
	*port
	run int
}

func newPort() *port {
	p := &port{}
	p.cond = sync.NewCond(&p.mu)
	return p
}

func (p *end) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.input) == 0 && !p.over() {
		p.cond.Wait()
	}
	if p.over() {
		return 0, io.EOF
	}
	n := copy(b, p.input)
	p.input = p.input[n:]
	p.cond.Broadcast()
	return n, nil
}

// over says whether this run no longer has the port. The caller holds the lock.
func (p *end) over() bool { return p.off || p.port.run != p.run }

// Write waits while a connected host does not read.
func (p *end) Write(b []byte) (int, error) {
	p.mu.Lock()
	line, over := p.line, p.over()
	p.mu.Unlock()
	if over {
		return 0, io.ErrClosedPipe
	}
	if line != nil {
		_, _ = line.Write(b) // a host that hung up loses it
	}
	return len(b), nil
}

// plug connects a host. It says whether the port was free.
func (p *port) plug(line io.ReadWriteCloser) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.line != nil || p.off {
		return false
	}
	p.line = line
	go p.carry(line)
	return true
}

// carry takes in what the host sends until it hangs up.
func (p *port) carry(line io.ReadWriteCloser) {
	buf := make([]byte, 4<<10)
	for {
		n, err := line.Read(buf)
		p.mu.Lock()
		for len(p.input)+n > maxInput && !p.off {
			p.cond.Wait()
		}
		p.input = append(p.input, buf[:n]...)
		if err != nil && p.line == line {
			p.line = nil
		}
		p.cond.Broadcast()
		p.mu.Unlock()
		if err != nil {
			_ = line.Close()
			return
		}
	}
}

// reset takes the port from the run that has ended and gives it to the next.
func (p *port) reset(run int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.run, p.input = run, nil
	p.cond.Broadcast()
}

// unplug ends the port for both sides.
func (p *port) unplug() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.off = true
	if p.line != nil {
		_ = p.line.Close()
	}
	p.cond.Broadcast()
}

// stopLimit is how long a guest may take to notice that its plug was pulled.
const stopLimit = 10 * time.Second
