// Package agent is the role on a protected server: it answers an appliance over its standard input and output, tells what
// the server is made of, and sends what of its disks the appliance does not have yet.
//
//	Agent    answers one conversation (capture/wire) and ends
//	run      one capture: live passes, then one under freeze that makes all blocks those of one instant
//	files    one capture of folders, file by file
//	restore  one putting back of files
//	hold     memory in which a frozen pass puts what it found, so that a slow line never lengthens a freeze
//
// It keeps nothing on the server: what the appliance has already is sent to it as fingerprints and lives in memory. It
// ends when its input ends, so that a lost connection leaves nothing behind.
//
// Knows: the conversation, the passes.
// Must not know: SSH, the store, anything on the appliance.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// Agent answers one conversation.
type Agent struct {
	Version  string
	Watchdog []string // program and arguments that run linux.Watchdog; the number of file systems is added
	Hooks    []string // program and arguments that run hooks.Keep; none: applications are left alone
	TrackDir string   // the tracker's folder; "": nothing is tracked
	Top      string   // where the server's files lie; "" is "/"
}

// unwindLimit is how long a capture may take to thaw and let go after its appliance is gone.
const unwindLimit = 5 * time.Second

// Serve answers until the capture is done or the input ends. The caller ends the process then, whatever still runs.
func (a Agent) Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	r, w := wire.NewReader(in), wire.NewWriter(out)
	if err := w.Greet(); err != nil {
		return err
	}
	if err := w.Message(wire.KindHello, wire.Hello{Version: a.Version, Arch: runtime.GOARCH, UID: os.Getuid()}); err != nil {
		return err
	}
	err := a.answer(ctx, r, w)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, context.Canceled) {
		_ = w.Message(wire.KindFailure, wire.Failure{Text: err.Error()}) // if it does not arrive, nobody listens
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// answer serves inventories, and one capture, of disks or of files, or one putting back.
func (a Agent) answer(ctx context.Context, r *wire.Reader, w *wire.Writer) error {
	for {
		kind, payload, err := r.Next(nil)
		if err != nil {
			return err
		}
		if kind == wire.KindAskFiles {
			var plan wire.FilesPlan
			if err := wire.Decode(payload, &plan); err != nil {
				return err
			}
			return a.files(ctx, r, w, plan)
		}
		if kind == wire.KindAskRestore {
			var plan wire.RestorePlan
			if err := wire.Decode(payload, &plan); err != nil {
				return err
			}
			return a.restore(ctx, r, w, plan)
		}
		var plan wire.Plan
		if kind != wire.KindAskInventory && kind != wire.KindAskCapture {
			return fmt.Errorf("answer the appliance: %w: kind %q", wire.ErrGarbage, byte(kind))
		}
		if err := wire.Decode(payload, &plan); err != nil {
			return err
		}
		if plan.Disks, err = choose(plan.Disks); err != nil {
			return err
		}
		if kind == wire.KindAskCapture {
			return a.capture(ctx, r, w, plan)
		}
		if err := w.Message(wire.KindInventory, inventory(ctx, plan.Disks)); err != nil {
			return err
		}
	}
}

// capture reads disks once the appliance has said what it knows, and stops when its input ends.
func (a Agent) capture(ctx context.Context, r *wire.Reader, w *wire.Writer, plan wire.Plan) error {
	if plan.FreezeLimit <= 0 {
		plan.FreezeLimit = dr.DefaultFreezeLimit
	}
	if len(plan.Since) > wire.MaxSince {
		return fmt.Errorf("read the plan: %d earlier snapshots: %w", len(plan.Since), wire.ErrGarbage)
	}
	opened, err := open(plan.Disks)
	if err != nil {
		return err
	}
	defer closeAll(opened)
	var disks []*disk
	for i, d := range opened {
		disks = append(disks, newDisk(i, d, len(opened)))
	}
	stop, err := follow(a.TrackDir, plan, disks)
	if err != nil {
		return err
	}
	defer stop()
	if err := tidy(ctx); err != nil && plan.Volumes {
		return err
	}
	layout := wire.Layout{Inventory: inventory(ctx, plan.Disks)}
	for i, d := range disks {
		layout.Inventory.Disks[i].Size = d.Size
		layout.Disks = append(layout.Disks, wire.Disk{Name: d.Name, Size: d.Size, Tracked: d.tracked, Reason: d.reason})
	}
	if err := w.Message(wire.KindLayout, layout); err != nil {
		return err
	}
	if err := known(r, disks); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	safe := make(chan struct{})
	go func() {
		// The appliance says nothing more but that the snapshot is safe; then it closes the conversation, or is gone.
		kind, _, err := r.Next(nil)
		if err == nil && kind == wire.KindKept {
			close(safe)
			_, _, err = r.Next(nil)
		}
		cancel(fmt.Errorf("the appliance ended the conversation: %w", errors.Join(context.Canceled, err)))
	}()
	ended := make(chan error, 1)
	go func() { ended <- newRun(w, plan, a, disks).all(ctx) }()
	err = await(ctx, ended)
	if err != nil || !plan.Track {
		return err
	}
	select {
	case <-safe:
		return settle(disks, plan.Snapshot)
	case <-ctx.Done():
		return nil // it was not kept, or that was not heard: the next capture reads it again
	}
}

// await waits for a capture to end, or to let go of everything after it has to.
func await(ctx context.Context, ended <-chan error) (err error) {
	select {
	case err = <-ended:
	case <-ctx.Done():
		select {
		case err = <-ended:
		case <-time.After(unwindLimit):
		}
		err = errors.Join(context.Cause(ctx), err)
	}
	return err
}

// known reads what the appliance has: fingerprints for every disk that is not read blind, and the word to begin.
func known(r *wire.Reader, disks []*disk) error {
	var buf []byte
	for {
		kind, payload, err := r.Next(buf)
		if err != nil {
			return err
		}
		buf = payload
		switch kind {
		case wire.KindKnown:
			var k wire.Known
			if err := wire.Decode(payload, &k); err != nil {
				return err
			}
			if k.Disk < 0 || k.Disk >= len(disks) || disks[k.Disk].block != 0 || len(k.Seed) != wire.SeedSize {
				return fmt.Errorf("read fingerprints of disk %d: %w", k.Disk, wire.ErrGarbage)
			}
			if err := disks[k.Disk].know(k); err != nil {
				return err
			}
		case wire.KindSums:
			disk, first, raw, err := wire.ParseSums(payload)
			if err != nil {
				return err
			}
			if disk >= len(disks) || disks[disk].sums == nil {
				return fmt.Errorf("read fingerprints of disk %d: %w", disk, wire.ErrGarbage)
			}
			if err := disks[disk].sums.Fill(first, raw); err != nil {
				return err
			}
		case wire.KindGo:
			for i, d := range disks {
				if d.block == 0 {
					return fmt.Errorf("begin: nothing is known of disk %d: %w", i, wire.ErrGarbage)
				}
			}
			return nil
		default:
			return fmt.Errorf("read fingerprints: %w: kind %q", wire.ErrGarbage, byte(kind))
		}
	}
}

// know takes what the appliance says of a disk. Without fingerprints only what was written is read, and all of it sent.
func (d *disk) know(k wire.Known) error {
	sums, err := wire.NewSums(wire.Seed(k.Seed), k.BlockSize, d.Size)
	if err != nil {
		return err
	}
	d.block, d.seed = k.BlockSize, wire.Seed(k.Seed)
	if k.Blind && !d.tracked {
		return fmt.Errorf("read of disk %s only what was written: that is not known: %w", d.Name, wire.ErrGarbage)
	}
	if !k.Blind {
		d.sums, d.whole, d.todo = sums, true, nil
		if d.tracked {
			d.reason = "the appliance has nothing to build on"
		}
	}
	return nil
}

func open(names []string) ([]*device, error) {
	var disks []*device
	for _, name := range names {
		d, err := openDisk(name)
		if err != nil {
			closeAll(disks)
			return nil, err
		}
		disks = append(disks, d)
	}
	return disks, nil
}

func closeAll(disks []*device) {
	for _, d := range disks {
		d.Close()
	}
}

// Inventory gathers what this server is made of, with every disk in use.
func Inventory(ctx context.Context) (dr.Inventory, error) {
	disks, err := choose(nil)
	if err != nil {
		return dr.Inventory{}, err
	}
	return inventory(ctx, disks), nil
}
