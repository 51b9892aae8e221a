package store

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/repo/manifest"
)

// The format of a new repository. BLAKE3 is several times faster than Kopia's default; 128 bits of it, under a key nobody outside knows,
// make maps and indexes half as large, which is most of what a small increment sends beside its blocks. The splitter is never used by
// our own blocks, which are smaller than one of its pieces.
const (
	hashAlgorithm       = "BLAKE3-256-128"
	encryptionAlgorithm = "AES256-GCM-HMAC-SHA256"
	objectSplitter      = "FIXED-8M"
	attachedSplitter    = "FIXED-1M" // of attached files: of one that changed in one place only that is stored anew
	packSize            = 20 << 20
	compressorFast      = "zstd-fastest"
	compressorSmall     = "zstd"
	compressorMap       = compressorFast // identifiers do not compress: the slower one makes no less of them
)

// owner is who runs maintenance: never a stock kopia command, which does not know our locks.
const ownerUser, ownerHost = "muster", "muster"

// shared is the repository that all readers use. Kopia compacts manifests whenever it lists them and finds many, without
// any lock, and could so bring back what somebody is deleting. Ours lets it do that only in mutate, while nobody lists.
type shared struct {
	repo.DirectRepository
	mu *sync.RWMutex
}

func (r shared) FindManifests(ctx context.Context, labels map[string]string) ([]*manifest.EntryMetadata, error) {
	if ctx.Err() != nil { // Kopia would answer from memory, even for a store that is closed
		return nil, context.Cause(ctx)
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.DirectRepository.FindManifests(ctx, labels)
}

func (r shared) GetManifest(ctx context.Context, id manifest.ID, data any) (*manifest.EntryMetadata, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.DirectRepository.GetManifest(ctx, id, data)
}

// connections hands an open place over to Kopia, which wants to open storages by itself from a description.
var connections struct {
	sync.Mutex
	next int
	open map[string]blob.Storage
}

const storageType = "muster-place"

type connection struct {
	ID string `json:"id"`
}

func init() {
	blob.AddSupportedStorage(storageType, connection{}, func(_ context.Context, c *connection, _ bool) (blob.Storage, error) {
		connections.Lock()
		defer connections.Unlock()
		st, ok := connections.open[c.ID]
		if !ok {
			return nil, errors.New("this place is not open in this process")
		}
		return st, nil
	})
}

// lend makes a storage known to Kopia until the returned function is called.
func lend(st blob.Storage) (blob.ConnectionInfo, func()) {
	connections.Lock()
	defer connections.Unlock()
	if connections.open == nil {
		connections.open = make(map[string]blob.Storage)
	}
	connections.next++
	id := strconv.Itoa(connections.next)
	connections.open[id] = st
	return blob.ConnectionInfo{Type: storageType, Config: connection{ID: id}}, func() {
		connections.Lock()
		defer connections.Unlock()
		delete(connections.open, id)
	}
}

// cacheVariable makes Kopia use a cache folder whatever it was told, and then panic because the cache has no size.
const cacheVariable = "KOPIA_CACHE_DIRECTORY"

// connect opens Kopia's view of a storage. dir is a folder of this process for the configuration file it insists on.
func connect(ctx context.Context, st blob.Storage, dir, password string, now func() time.Time, fatal func(error)) (repo.DirectRepository, error) {
	if err := os.Unsetenv(cacheVariable); err != nil {
		return nil, err
	}
	info, forget := lend(st)
	defer forget()
	config, err := json.Marshal(repo.LocalConfig{
		Storage:       &info,
		Caching:       &content.CachingOptions{},
		ClientOptions: repo.ClientOptions{Username: ownerUser, Hostname: ownerHost, Description: "muster"},
	})
	if err != nil {
		return nil, err
	}
	name := filepath.Join(dir, "repository.json")
	if err := os.WriteFile(name, config, 0o600); err != nil {
		return nil, err
	}
	rep, err := repo.Open(ctx, name, password, &repo.Options{
		DisableRepositoryLog: true,
		DoNotWaitForUpgrade:  true,
		TimeNowFunc:          now,
		OnFatalError:         fatal,
	})
	switch {
	case errors.Is(err, repo.ErrInvalidPassword):
		return nil, ErrBadPassword
	case errors.Is(err, blob.ErrBlobNotFound):
		return nil, fmt.Errorf("%w (%w)", ErrNotAStore, err)
	case err != nil:
		return nil, err
	}
	direct, ok := rep.(repo.DirectRepository)
	if !ok {
		return nil, errors.Join(errors.New("kopia gave no direct repository"), rep.Close(ctx))
	}
	return direct, nil
}

// initialize writes a new repository and its parameters.
func initialize(ctx context.Context, place Place, password string, of secrets) error {
	err := repo.Initialize(ctx, place, &repo.NewRepositoryOptions{
		BlockFormat: format.ContentFormat{
			Hash: cmp.Or(of.algorithm, hashAlgorithm), Encryption: encryptionAlgorithm, HMACSecret: of.hash, MasterKey: of.seal,
			MutableParameters: format.MutableParameters{MaxPackSize: packSize},
		},
		ObjectFormat: format.ObjectFormat{Splitter: objectSplitter},
	}, password)
	if errors.Is(err, repo.ErrAlreadyInitialized) {
		return ErrNotEmpty
	}
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "muster-store-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // only a configuration file of this process
	var broken atomic.Pointer[error]
	rep, err := connect(ctx, kept{place}, dir, password, time.Now, func(err error) { broken.Store(&err) })
	if err != nil {
		return err
	}
	err = errors.Join(setParameters(ctx, rep), rep.Close(ctx))
	if p := broken.Load(); p != nil {
		err = errors.Join(err, *p)
	}
	return errors.Join(err, place.Sync(ctx))
}

// setParameters makes index blobs be compacted after minutes, not days, because every look-up asks each of them, and
// makes us the owner of maintenance.
func setParameters(ctx context.Context, rep repo.DirectRepository) error {
	fm := rep.FormatManager()
	mp, err := fm.GetMutableParameters(ctx)
	if err != nil {
		return err
	}
	cfg, err := fm.BlobCfgBlob(ctx)
	if err != nil {
		return err
	}
	ep := &mp.EpochParameters
	ep.EpochRefreshFrequency = 3 * time.Minute
	ep.MinEpochDuration = 10 * time.Minute
	ep.CleanupSafetyMargin = 10 * time.Minute
	ep.EpochAdvanceOnCountThreshold = 10
	if err := fm.SetParameters(ctx, mp, cfg, nil); err != nil {
		return err
	}
	return repo.WriteSession(ctx, rep, repo.WriteSessionOptions{Purpose: "create"}, func(ctx context.Context, w repo.RepositoryWriter) error {
		p := maintenance.DefaultParams()
		p.Owner = ownerUser + "@" + ownerHost
		return maintenance.SetParams(ctx, w, &p)
	})
}

// kept is a place that outlives the repository opened on it.
type kept struct{ Place }

func (kept) Close(context.Context) error { return nil }

// mutate changes manifests: it is alone with them in all processes, sees the newest, and returns when what fn did
// is on the medium and visible to our own readers.
func (s *Store) mutate(ctx context.Context, purpose string, fn func(ctx context.Context, w repo.DirectRepositoryWriter) error) error {
	ctx, done := s.bind(ctx)
	defer done()
	unlock, err := s.lock(ctx, lockPublish, true)
	if err != nil {
		return err
	}
	unlock = sync.OnceFunc(unlock)
	defer unlock()
	if err := s.rep.Refresh(ctx); err != nil {
		return s.explain(err)
	}
	ctx, w, err := s.rep.NewDirectWriter(ctx, repo.WriteSessionOptions{Purpose: purpose})
	if err != nil {
		return s.explain(err)
	}
	err = func() error {
		all, err := s.listCompacting(ctx, w)
		if err != nil {
			return damaged(err)
		}
		s.raiseFloor(newest(all))
		if err := fn(ctx, w); err != nil {
			return err
		}
		if err := w.Flush(ctx); err != nil {
			return err
		}
		return s.place.Sync(ctx)
	}()
	err = errors.Join(err, w.Close(ctx))
	if err != nil {
		return s.explain(err)
	}
	var letting sync.WaitGroup
	letting.Go(unlock) // while the index is read: each is a round trip, perhaps a long one
	defer letting.Wait()
	if err := s.Refresh(context.WithoutCancel(ctx)); err != nil { // it is done; stopping now would only hide that
		return err
	}
	s.tidy(ctx)
	return nil
}

// listCompacting lists all manifests and lets Kopia compact them if there are many.
func (s *Store) listCompacting(ctx context.Context, w repo.DirectRepositoryWriter) ([]*manifest.EntryMetadata, error) {
	s.rep.mu.Lock()
	defer s.rep.mu.Unlock()
	s.guard.compacting.Store(true)
	defer s.guard.compacting.Store(false)
	return w.FindManifests(ctx, nil)
}

func newest(entries []*manifest.EntryMetadata) (t time.Time) {
	for _, e := range entries {
		if e.ModTime.After(t) {
			t = e.ModTime
		}
	}
	return t
}
