package storetest

import (
	"cmp"
	"context"
	"errors"
	"sync"

	"github.com/kopia/kopia/repo/blob"
	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/store"
)

// ErrPower is what everything answers after the power was cut.
var ErrPower = errors.New("the power was cut")

// Faulty is a driver over another one whose place can be made to fail.
type Faulty struct {
	store.Driver
	Attests bool // its place reads back by itself, if that of the other one does, and cannot lie then

	mu      sync.Mutex
	changes int // puts and deletes so far
	cutAt   int // the power is cut before this change; 0 never
	cut     func()
	dead    bool
	full    bool // the medium is full
	lie     bool // the medium changes what is written
}

// CutAt cuts the power before the nth change from now: from then on nothing works, and then is called. 0 mends all.
func (f *Faulty) CutAt(n int, then func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.changes, f.cutAt, f.cut, f.dead = 0, n, then, false
}

// Full fills the medium up or makes room again.
func (f *Faulty) Full(full bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.full = full
}

// Lie makes the medium change a bit of every pack of blocks that is written.
func (f *Faulty) Lie(lie bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lie = lie
}

// Create implements store.Driver.
func (f *Faulty) Create(ctx context.Context) (store.Place, error) {
	p, err := f.Driver.Create(ctx)
	return f.over(p), err
}

// Open implements store.Driver.
func (f *Faulty) Open(ctx context.Context) (store.Place, error) {
	p, err := f.Driver.Open(ctx)
	return f.over(p), err
}

func (f *Faulty) over(p store.Place) store.Place {
	out := &faultyPlace{Place: p, f: f}
	if a, ok := p.(store.Attesting); ok && f.Attests {
		return faultyAttesting{out, a}
	}
	if u, ok := p.(store.Unbuffered); ok {
		return faultyUnbuffered{out, u}
	}
	return out
}

type faultyAttesting struct {
	*faultyPlace
	a store.Attesting
}

func (p faultyAttesting) Bring(ctx context.Context, id blob.ID, data blob.Bytes, room func() error) (bool, error) {
	if err := p.f.alive(); err != nil {
		return false, err
	}
	return p.a.Bring(ctx, id, data, func() error { return cmp.Or(p.f.change(true), room()) })
}

type faultyUnbuffered struct {
	*faultyPlace
	u store.Unbuffered
}

func (p faultyUnbuffered) GetFromMedium(ctx context.Context, id blob.ID, out blob.OutputBuffer) error {
	if err := p.f.alive(); err != nil {
		return err
	}
	return p.u.GetFromMedium(ctx, id, out)
}

type faultyPlace struct {
	store.Place
	f *Faulty
}

// change counts a change and says whether it may happen.
func (f *Faulty) change(put bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.changes++
	if f.cutAt > 0 && f.changes >= f.cutAt && !f.dead {
		f.dead = true
		f.cut()
	}
	if f.dead {
		return ErrPower
	}
	if put && f.full {
		return unix.ENOSPC
	}
	return nil
}

func (f *Faulty) alive() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dead {
		return ErrPower
	}
	return nil
}

func (p *faultyPlace) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	if err := p.f.change(true); err != nil {
		return err
	}
	p.f.mu.Lock()
	lie := p.f.lie && id[0] == 'p'
	p.f.mu.Unlock()
	if err := p.Place.PutBlob(ctx, id, data, opts); err != nil || !lie {
		return err
	}
	return FlipByte(ctx, p.Place, id, int64(data.Length()/2))
}

func (p *faultyPlace) DeleteBlob(ctx context.Context, id blob.ID) error {
	if err := p.f.change(false); err != nil {
		return err
	}
	return p.Place.DeleteBlob(ctx, id)
}

func (p *faultyPlace) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	if err := p.f.alive(); err != nil {
		return err
	}
	return p.Place.GetBlob(ctx, id, offset, length, out)
}

func (p *faultyPlace) ListBlobs(ctx context.Context, prefix blob.ID, cb func(blob.Metadata) error) error {
	if err := p.f.alive(); err != nil {
		return err
	}
	return p.Place.ListBlobs(ctx, prefix, cb)
}

func (p *faultyPlace) Sync(ctx context.Context) error {
	if err := p.f.alive(); err != nil {
		return err
	}
	return p.Place.Sync(ctx)
}
