package remote

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

// lists answers the questions by which Kopia finds out whether the index has changed, which it does before and after everything.
// These are lists of four parts of the index at once and then, when they are there, of two more: what is asked for together is asked
// for in one, of all parts, and that has the later ones as well. Nothing is older than a question that was asked after the last
// change of ours, and no answer is given twice.
type lists struct {
	mu    sync.Mutex
	batch *batch // that more may join, or the last one
}

// batch is one list of the whole index.
type batch struct {
	sent   bool
	done   chan struct{} // closed when it is there
	all    []blob.Metadata
	err    error
	at     time.Time        // when it was there
	served map[blob.ID]bool // what of it was given
	stale  bool             // something was changed since
}

const (
	indexPrefix = "x"                   // what the names of all blobs of an index begin with
	epochPrefix = "xn"                  // those that are asked for when the others are there
	together    = time.Millisecond      // what is asked for in so short a time is asked for at once
	stillFresh  = 50 * time.Millisecond // how long after it was there a list has the later parts
)

// get gives the blobs with a prefix; list asks for them over there.
func (l *lists) get(ctx context.Context, prefix blob.ID, list func(context.Context, blob.ID) ([]blob.Metadata, error)) ([]blob.Metadata, error) {
	if !strings.HasPrefix(string(prefix), indexPrefix) || len(prefix) == len(indexPrefix) {
		return list(ctx, prefix)
	}
	l.mu.Lock()
	b := l.batch
	later := strings.HasPrefix(string(prefix), epochPrefix)
	switch {
	case b != nil && later && !b.stale && !b.at.IsZero() && b.err == nil && time.Since(b.at) < stillFresh && !b.served[prefix]:
	case later:
		l.mu.Unlock()
		return list(ctx, prefix)
	case b == nil || b.sent || b.served[prefix]:
		b = &batch{done: make(chan struct{}), served: map[blob.ID]bool{}}
		l.batch = b
		go l.fetch(context.WithoutCancel(ctx), b, list)
	}
	b.served[prefix] = true
	l.mu.Unlock()
	select {
	case <-b.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	var out []blob.Metadata
	for _, m := range b.all {
		if strings.HasPrefix(string(m.BlobID), string(prefix)) {
			out = append(out, m)
		}
	}
	return out, b.err
}

// fetch asks for a batch, a moment after the first that wanted it.
func (l *lists) fetch(ctx context.Context, b *batch, list func(context.Context, blob.ID) ([]blob.Metadata, error)) {
	time.Sleep(together)
	l.mu.Lock()
	b.sent, b.stale = true, false
	l.mu.Unlock()
	b.all, b.err = list(ctx, indexPrefix)
	l.mu.Lock()
	b.at = time.Now()
	l.mu.Unlock()
	close(b.done)
}

// changed is called before and after whatever changes the place, or what may be done with it.
func (l *lists) changed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.batch != nil {
		l.batch.stale = true
	}
}
