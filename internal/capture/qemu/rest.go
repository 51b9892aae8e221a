package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/musterdr/muster/internal/image"
)

const (
	nbdStart = 20 * time.Second // for qemu-nbd to answer
	nbdPoll  = 10 * time.Millisecond
	nbdWords = 4 << 10 // bytes of what it says that are kept
)

// rest captures a machine that is shut off from its files. No lock is taken that would keep it from being started: a machine
// that is needed goes before its backup, and what was read then is void.
func (p *pass) rest(ctx context.Context) error {
	base, err := p.begin(ctx)
	if err != nil {
		return err
	}
	tracked := p.judge(base)
	var before []image.Mark
	for _, d := range p.m.disks {
		if d.path == "" {
			return fmt.Errorf("read disk %s: its image is on the network, which this release reads only while the machine runs: start it", d.target)
		}
		if err := image.CheckInUse(d.path); err != nil {
			return fmt.Errorf("read disk %s: %w", d.target, err)
		}
		mark, err := image.LookAt(d.path)
		if err != nil {
			return err
		}
		before = append(before, mark)
	}
	p.instant()
	for i := range p.m.disks {
		bitmap := ""
		if tracked[i] {
			bitmap = base.name
		}
		if err := p.readFile(ctx, i, bitmap); err != nil {
			return err
		}
	}
	for i, d := range p.m.disks {
		if now, err := image.LookAt(d.path); err != nil || now != before[i] {
			return errors.Join(fmt.Errorf("read disk %s: %w: try again", d.target, ErrChanged), err)
		}
	}
	if now, err := p.look(ctx); err != nil {
		return err
	} else if now.running {
		return fmt.Errorf("capture %s: %w: try again", p.m.name, ErrChanged)
	}
	p.note("the machine was shut off; its disks are as it left them")
	return p.sink.Keep(ctx, p.out)
}

// readFile reads one disk, by its bitmap if the image has it in order.
func (p *pass) readFile(ctx context.Context, i int, bitmap string) error {
	d := p.m.disks[i]
	n, err := p.serve(ctx, d, bitmap)
	if err != nil && bitmap != "" && ctx.Err() == nil {
		p.out.Reasons[i], bitmap = plain(fmt.Errorf("its dirty bitmap is broken or gone (%w)", err)), ""
		n, err = p.serve(ctx, d, bitmap)
	}
	if err != nil {
		return fmt.Errorf("read disk %s: %w", d.target, err)
	}
	defer n.stop()
	return p.read(ctx, i, n.disk, bitmap != "")
}

// nbd is a qemu-nbd that serves one image to one client.
type nbd struct {
	cmd    *exec.Cmd
	socket string
	disk   *image.Remote
	said   words
	ended  chan struct{}
}

// words keeps the beginning of what a program says.
type words struct{ bytes.Buffer }

func (w *words) Write(p []byte) (int, error) {
	if room := nbdWords - w.Len(); room > 0 {
		w.Buffer.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

// serve starts qemu-nbd on an image and waits until it serves.
func (p *pass) serve(ctx context.Context, d disk, bitmap string) (*nbd, error) {
	place, err := placeOf(d, true)
	if err != nil {
		return nil, err
	}
	n := &nbd{socket: filepath.Join(p.room(p.m), "rest.sock"), ended: make(chan struct{})}
	if err := os.Remove(n.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	args := []string{"--read-only", "--persistent", "--discard=ignore", "--export-name=" + d.target, "--socket=" + n.socket}
	if bitmap != "" {
		args = append(args, "--bitmap="+bitmap)
	}
	n.cmd = exec.Command("qemu-nbd", append(args, place)...)
	n.cmd.Stderr = &n.said
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start qemu-nbd: is it installed? (apt install qemu-utils): %w", err)
	}
	go func() {
		defer close(n.ended)
		_ = n.cmd.Wait()
	}()
	deadline := time.After(nbdStart)
	for {
		// It may listen before it has found the bitmap in order: only a whole handshake says that it serves.
		if n.disk, err = image.Dial(ctx, n.socket, d.target, bitmap); err == nil {
			return n, nil
		}
		select {
		case <-n.ended:
			return nil, fmt.Errorf("start qemu-nbd: %s", strings.TrimSpace(n.said.String()))
		case <-ctx.Done():
			n.stop()
			return nil, context.Cause(ctx)
		case <-deadline:
			n.stop()
			return nil, fmt.Errorf("start qemu-nbd: it did not answer for %s", nbdStart)
		case <-time.After(nbdPoll):
		}
	}
}

func (n *nbd) stop() {
	if n.disk != nil {
		_ = n.disk.Close()
	}
	_ = n.cmd.Process.Kill()
	<-n.ended
	_ = os.Remove(n.socket)
}
