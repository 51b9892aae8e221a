package silo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/store"
)

// MaxStores is how many customers' stores a silo has open at once.
const MaxStores = 256

// Leased are the stores of customers whose work this silo has. Each is opened with the key that comes with a lease, shared by
// all work of that customer, and closed with the last of it: then the key is forgotten.
type Leased struct {
	// Driver reaches the place of a store.
	Driver func(place string) (store.Driver, error)

	mu   sync.Mutex
	open map[string]*leased // by place
}

type leased struct {
	key    [sha256.Size]byte // digest of the key that opened it: another key does not get in because one is open
	opened chan struct{}     // closed when store and err are known
	store  *store.Store
	err    error
	users  int
}

// Open implements Stores. The store outlives ctx, which is only that of opening it.
func (l *Leased) Open(ctx context.Context, access *api.Access) (*store.Store, func(), error) {
	if access == nil {
		return nil, nil, errors.New("open store: the lease says nothing of one")
	}
	key := sha256.Sum256([]byte(access.Password))
	l.mu.Lock()
	x := l.open[access.Place]
	switch {
	case x != nil && x.key != key:
		l.mu.Unlock()
		return nil, nil, api.Errorf(api.Refused, "open %s: it is open with another key", access)
	case x == nil && len(l.open) >= MaxStores:
		l.mu.Unlock()
		return nil, nil, api.Errorf(api.Unavailable, "open %s: %d stores are open, which is the most", access, MaxStores)
	case x == nil:
		x = &leased{key: key, opened: make(chan struct{})}
		if l.open == nil {
			l.open = map[string]*leased{}
		}
		l.open[access.Place] = x
		go l.begin(context.WithoutCancel(ctx), x, *access)
	}
	x.users++
	l.mu.Unlock()
	var once sync.Once
	release := func() { once.Do(func() { l.release(access.Place, x) }) }
	select {
	case <-x.opened:
	case <-ctx.Done():
		release()
		return nil, nil, fmt.Errorf("open %s: %w", access, context.Cause(ctx))
	}
	if x.err != nil {
		release()
		return nil, nil, x.err
	}
	return x.store, release, nil
}

func (l *Leased) begin(ctx context.Context, x *leased, access api.Access) {
	defer close(x.opened)
	driver, err := l.Driver(access.Place)
	if err == nil {
		x.store, err = store.Open(ctx, driver, access.Password)
	}
	if err != nil {
		x.err = fmt.Errorf("open %s: %w", access, err)
	}
}

func (l *Leased) release(place string, x *leased) {
	l.mu.Lock()
	x.users--
	last := x.users == 0
	if last {
		delete(l.open, place)
	}
	l.mu.Unlock()
	if !last {
		return
	}
	<-x.opened
	if x.store != nil {
		_ = x.store.Close(context.Background()) // what was written was written through before
	}
}
