package capture

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

// A first copy of a server may take days, and a line does not hold for days. What a full capture has written is kept now and
// then in the store as a partial, with the fingerprints and signs of its blocks. The next capture of that server begins with
// it: it compares everything, as with a parent, and only what is missing is sent. An increment needs none of this: what its
// parent has is not sent in any case.

// pace says when a partial is kept. It is also kept when a capture ends that is not finished, so that only what kills the
// appliance costs as much.
type pace struct {
	bytes int64         // written since the last one,
	every time.Duration // or so long after it if anything was
	share int           // and never so often that it takes more than one part in so many of the time, however large the disks are
}

var usualPace = pace{bytes: 1 << 30, every: 5 * time.Minute, share: 20}

// leaveLimit is how long a capture that was cut off may take to keep what it has.
const leaveLimit = time.Minute

// resume is what a Sink knows of going on, and of being gone on with.
type resume struct {
	resumes bool // the next capture can go on with this one: it is full, of a source that compares
	pace    pace
	had     int64        // bytes that an earlier attempt had kept
	fresh   atomic.Int64 // bytes written since the last partial
	last    time.Time    // when that was
	took    time.Duration
}

// goOn begins with what an earlier attempt left, if that is of use: its fingerprints, and what its blocks held.
func (k *Sink) goOn(ctx context.Context, layout Layout) (sums []*wire.Sums, held *base, err error) {
	if !layout.Compares {
		return nil, nil, nil
	}
	k.resumes, k.last = true, time.Now()
	went, err := k.writer.GoOn(ctx, k.task.Server.ID, func(p *store.Partial) error {
		with := attached(func(name string) ([]byte, error) { return p.Attachment(ctx, name) })
		held = readBase("", p.Disks(), layout.Disks, with)
		var why string
		if sums, why = fit(layout, p.Disks(), held, with); why != "" {
			return errors.New(why)
		}
		for _, d := range p.Disks() {
			k.had += d.Data
		}
		return nil
	})
	if !went {
		return nil, nil, err
	}
	return sums, held, nil
}

// attachSums attaches the fingerprints of the blocks.
func (k *Sink) attachSums(to func(name string, data []byte)) error {
	for i, s := range k.sums {
		b, err := s.MarshalBinary()
		if err != nil {
			return err
		}
		to(sumsName(i), b)
	}
	return nil
}

// due says whether it is time to keep a partial.
func (k *Sink) due() bool {
	fresh := k.fresh.Load()
	if !k.resumes || fresh == 0 {
		return false
	}
	since := time.Since(k.last)
	return (fresh >= k.pace.bytes || since >= k.pace.every) && since >= time.Duration(k.pace.share)*k.took
}

// keepPartial keeps what was written so far. Nothing may be written meanwhile, and the fingerprints have to be those of what
// was: a fingerprint of something else would hide a block that is missing. That it did not work out costs nothing but time
// later.
func (k *Sink) keepPartial(ctx context.Context) {
	began := time.Now()
	files := map[string][]byte{}
	attach := func(name string, data []byte) { files[name] = data }
	err := errors.Join(k.attachSums(attach), k.watch.attach(attach))
	if err == nil {
		err = k.writer.KeepPartial(ctx, k.task.Server.ID, k.task.Server.Name, files)
	}
	if err != nil {
		slog.WarnContext(ctx, "what was captured so far could not be kept", "snapshot", k.task.ID, "server", k.task.Server.Name, "error", err.Error())
	}
	k.fresh.Store(0)
	k.last = time.Now()
	k.took = k.last.Sub(began)
}

// leave keeps what a capture that ends without a snapshot has written, or if that may be the reason why it did, nothing.
func (k *Sink) leave(ctx context.Context, cause error) {
	if !k.resumes {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveLimit)
	defer cancel()
	if errors.Is(cause, wire.ErrGarbage) || errors.Is(cause, errDiffers) || errors.Is(cause, store.ErrDamaged) {
		if err := k.store.DropPartial(ctx, k.task.Server.ID); err != nil {
			slog.WarnContext(ctx, "a capture that went wrong could not be cleaned up", "snapshot", k.task.ID, "server", k.task.Server.Name, "error", err.Error())
		}
		return
	}
	if k.fresh.Load() > 0 {
		k.keepPartial(ctx)
	}
}

// reportHad says where a snapshot that goes on begins.
func (k *Sink) reportHad(layout Layout, report dr.Progress) {
	if k.had == 0 {
		return
	}
	var total int64
	for _, d := range layout.Disks {
		total += d.Size
	}
	report.Report("going on: kept by an attempt that was cut off", k.had, total, "bytes")
}
