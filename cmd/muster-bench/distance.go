package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/lab/cable"
	"github.com/musterdr/muster/internal/store"
)

// The line over which a first copy is measured.
const (
	roundTrip = 100 * time.Millisecond
	lineRate  = 100_000_000 // bits a second
)

// abroad is a network behind a long cable.
type abroad struct {
	space string
	cable *cable.Cable
}

// newAbroad lays a cable from here to a network of its own. It needs root, and is for one at a time.
func newAbroad(ctx context.Context, l cable.Line) (*abroad, error) {
	const near, far = "mbench0", "mbench1"
	c, err := cable.Lay(near, far, l)
	if err != nil {
		return nil, err
	}
	a := &abroad{space: fmt.Sprintf("mbench%d", os.Getpid()), cable: c}
	for _, line := range []string{
		"netns add " + a.space, "link set " + far + " netns " + a.space, "addr add 10.213.82.1/30 dev " + near, "link set " + near + " up",
		"-n " + a.space + " addr add 10.213.82.2/30 dev " + far, "-n " + a.space + " link set " + far + " up",
	} {
		if out, err := exec.CommandContext(ctx, "sh", "-c", "ip "+line).CombinedOutput(); err != nil {
			return nil, errors.Join(fmt.Errorf("ip %s: %w: %s", line, err, out), a.close())
		}
	}
	return a, nil
}

func (a *abroad) close() error {
	return errors.Join(a.cable.Close(), exec.Command("ip", "netns", "del", a.space).Run())
}

// listen listens over there: a socket belongs to the network in which it was made.
func (a *abroad) listen() (l net.Listener, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with this
		var space *os.File
		if space, err = os.Open("/run/netns/" + a.space); err != nil {
			return
		}
		defer space.Close()
		if err = unix.Setns(int(space.Fd()), unix.CLONE_NEWNET); err == nil {
			l, err = net.Listen("tcp", "10.213.82.2:0")
		}
	}()
	<-done
	return l, err
}

// distance measures a first copy over a line that is long, and not wide.
func (b *bench) distance(ctx context.Context, near *store.Store, id string) (Row, error) {
	a, err := newAbroad(ctx, cable.Line{Delay: roundTrip / 2, Rate: lineRate})
	if err != nil {
		return Row{}, err
	}
	defer a.close() //nolint:errcheck // interfaces, that end with the process
	listener, err := a.listen()
	if err != nil {
		return Row{}, err
	}
	far, err := b.newAwayAt("replicate-abroad", listener)
	if err != nil {
		return Row{}, err
	}
	defer far.close()
	if err := store.CreateLike(ctx, far.drv, password, near); err != nil {
		return Row{}, err
	}
	_, before := a.cable.Carried()
	took, _, what, err := far.replicated(ctx, near, id)
	if err != nil {
		return Row{}, err
	}
	_, after := a.cable.Carried()
	best := float64(what.Sent) * 8 / lineRate
	return higher("replicate: first copy over a long line / what it carries", best/took, 0.7,
		fmt.Sprintf("seconds in which a line of %d Mbit/s carries the blobs of a first copy and nothing else, over seconds it takes to replicate it over that line with a round trip of %s: real TCP and TLS, cold, until it is proven, synced, read back and published there", lineRate/1_000_000, roundTrip),
		fmt.Sprintf("%.0f MB in %.1f s, %.1f s are the least; %.0f MB on the cable", float64(what.Sent)/1e6, took, best, float64(after-before)/1e6)), nil
}
