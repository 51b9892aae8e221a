package remote

import (
	"context"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/zeebo/blake3"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"

	"github.com/musterdr/muster/internal/store"
)

// Server serves places. It is an http.Handler.
type Server struct {
	open    func(r *http.Request) (store.Driver, Rights, error)
	mux     *http.ServeMux
	uploads *semaphore.Weighted // bytes
	buffers sync.Pool           // of []byte, as blobs are received into

	opening singleflight.Group // of places, by name

	mu       sync.Mutex
	places   map[string]store.Place
	locks    map[string]*held // by token
	partials map[string]partial
	coming   map[string]chan struct{} // blobs that are being received and kept, by the same; closed when that is over
	closed   bool
}

// held is a lock that somebody has.
type held struct {
	place string
	let   context.CancelFunc
	gone  chan struct{} // closed when it was let go
}

// partial is the beginning of a blob whose sender was cut off, by its digest.
type partial struct {
	data []byte
	at   time.Time
}

// NewServer serves the places that open names for a request, to whom it gives rights. Its errors are answered with 403.
func NewServer(open func(r *http.Request) (store.Driver, Rights, error)) *Server {
	s := &Server{open: open, uploads: semaphore.NewWeighted(maxUploads), places: map[string]store.Place{}, locks: map[string]*held{},
		partials: map[string]partial{}, coming: map[string]chan struct{}{}, mux: http.NewServeMux()}
	s.handle("POST "+pathPlace, Make, s.create)
	s.handle("GET "+pathPlace, Read, func(*request) error { return nil })
	s.handle("GET "+pathList, Read, s.list)
	s.handle("GET "+pathBlobs+"{id}", Read, s.get) // and HEAD
	s.handle("PUT "+pathBlobs+"{id}", Append, s.put)
	s.handle("DELETE "+pathBlobs+"{id}", Append, s.delete)
	s.handle("GET "+pathArrived, Append, s.arrived)
	s.handle("POST "+pathLocks, Read, s.lock)
	s.handle("DELETE "+pathLocks, Read, s.unlock)
	s.handle("GET "+pathCapacity, Read, s.capacity)
	s.handle("POST "+pathSync, Append, func(r *request) error { return r.place.Sync(r.Context()) })
	s.handle("POST "+pathSweep, Own, s.sweep)
	return s
}

// nameInPath is the part of a path that names a place.
const nameInPath = "place"

// Named serves places by names: below PREFIX/NAME/ what the server serves by itself. NameOf tells which name a request gave.
func (s *Server) Named(prefix string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc(prefix+"/{name}/", func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("name")
		http.StripPrefix(prefix+"/"+name, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.SetPathValue(nameInPath, name) // the next pattern forgets what this one has matched
			s.ServeHTTP(w, r)
		})).ServeHTTP(w, r)
	})
	return mux
}

// NameOf gives the name below which a request came, "" if it came below none.
func NameOf(r *http.Request) string { return r.PathValue(nameInPath) }

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Close closes the places. Requests that run fail.
func (s *Server) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for _, l := range s.locks {
		l.let()
	}
	places := maps.Clone(s.places)
	clear(s.places)
	clear(s.partials)
	s.mu.Unlock()
	var errs []error
	for _, p := range places {
		errs = append(errs, p.Close(ctx))
	}
	return errors.Join(errs...)
}

// request is a question of somebody who may ask it.
type request struct {
	*http.Request
	w      http.ResponseWriter
	name   string // of the place
	place  store.Place
	rights Rights
}

// status is an error that is answered with a status.
type status struct {
	code int
	error
}

func refuse(code int, format string, args ...any) error {
	return status{code, fmt.Errorf(format, args...)}
}

func (s *Server) handle(pattern string, least Rights, do func(*request) error) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		err := s.serve(w, r, pattern == "POST "+pathPlace, least, do)
		if err == nil {
			return
		}
		code := http.StatusInternalServerError
		var st status
		switch {
		case errors.As(err, &st):
			code = st.code
		case errors.Is(err, blob.ErrBlobNotFound):
			code = http.StatusNotFound
		case errors.Is(err, blob.ErrInvalidRange):
			code = http.StatusRequestedRangeNotSatisfiable
		case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
			code = statusFull
		case errors.Is(err, store.ErrNotAStore):
			code = statusNoStore
		case errors.Is(err, store.ErrNotEmpty):
			code = statusExists
		case r.Context().Err() != nil: // nobody waits for the answer any more
			return
		default:
			slog.WarnContext(r.Context(), "a place could not answer", "method", r.Method, "path", r.URL.Path, "error", err.Error())
		}
		http.Error(w, err.Error(), code)
	})
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, create bool, least Rights, do func(*request) error) error {
	drv, rights, err := s.open(r)
	if err != nil {
		return status{http.StatusForbidden, err}
	}
	if rights < least {
		return refuse(http.StatusForbidden, "%w: %s %s", store.ErrForbidden, r.Method, r.URL.Path)
	}
	q := &request{Request: r, w: w, name: drv.String(), rights: rights}
	if q.place, err = s.openPlace(r.Context(), drv, create); err != nil {
		return err
	}
	return do(q)
}

// openPlace gives the place of a driver, which stays open. One that takes long keeps nobody from the others.
func (s *Server) openPlace(ctx context.Context, drv store.Driver, create bool) (store.Place, error) {
	name := drv.String()
	s.mu.Lock()
	p, there := s.places[name]
	s.mu.Unlock()
	switch {
	case there && create:
		return nil, store.ErrNotEmpty
	case there:
		return p, nil
	}
	select {
	case r := <-s.opening.DoChan(fmt.Sprint(create, name), func() (any, error) { return s.begin(context.WithoutCancel(ctx), drv, create) }):
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(store.Place), nil //nolint:forcetypeassert // begin's
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// begin opens a place, and keeps it.
func (s *Server) begin(ctx context.Context, drv store.Driver, create bool) (p store.Place, err error) {
	if create {
		p, err = drv.Create(ctx)
	} else {
		p, err = drv.Open(ctx)
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before, there := s.places[drv.String()]
	switch {
	case s.closed:
		return nil, errors.Join(refuse(http.StatusServiceUnavailable, "this master is closing"), p.Close(ctx))
	case there:
		return before, p.Close(ctx)
	}
	s.places[drv.String()] = p
	return p, nil
}

func (s *Server) create(r *request) error { r.w.WriteHeader(http.StatusCreated); return nil }

// blobNameRE is what Kopia calls blobs: nothing that could lead out of a folder.
var blobNameRE = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)

func (r *request) blob() (blob.ID, error) { return blobName(r.PathValue("id")) }

func blobName(id string) (blob.ID, error) {
	if len(id) > maxName || !blobNameRE.MatchString(id) {
		return "", refuse(http.StatusBadRequest, "%.80q is no name of a blob", id)
	}
	return blob.ID(id), nil
}

// listed is one line of a list. The last line says that it is whole.
type listed struct {
	ID   blob.ID   `json:"id,omitempty"`
	Size int64     `json:"size,omitempty"`
	Time time.Time `json:"time,omitzero"`
	End  bool      `json:"end,omitempty"`
}

func (s *Server) list(r *request) error {
	prefix := r.URL.Query().Get("prefix")
	if prefix != "" && (len(prefix) > maxName || !blobNameRE.MatchString(prefix)) {
		return refuse(http.StatusBadRequest, "%.80q is no beginning of a name", prefix)
	}
	r.w.Header().Set("Content-Type", "application/x-ndjson")
	e := json.NewEncoder(r.w)
	err := r.place.ListBlobs(r.Context(), blob.ID(prefix), func(m blob.Metadata) error {
		return e.Encode(listed{ID: m.BlobID, Size: m.Length, Time: m.Timestamp})
	})
	if err != nil {
		return err // the list has no last line then
	}
	return e.Encode(listed{End: true})
}

func (s *Server) get(r *request) error {
	id, err := r.blob()
	if err != nil {
		return err
	}
	meta, err := r.place.GetMetadata(r.Context(), id)
	if err != nil {
		return err
	}
	offset, length, ranged, err := rangeOf(r.Header.Get("Range"), meta.Length)
	if err != nil {
		return err
	}
	h := r.w.Header()
	h.Set(headerTime, meta.Timestamp.Format(time.RFC3339Nano))
	h.Set(headerSize, strconv.FormatInt(meta.Length, 10))
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Length", strconv.FormatInt(length, 10))
	if r.Method == http.MethodHead {
		return nil
	}
	out := &answerBody{r: r, left: length, partial: ranged}
	if ranged {
		err = r.place.GetBlob(r.Context(), id, offset, length, out)
	} else {
		err = r.place.GetBlob(r.Context(), id, 0, -1, out)
	}
	if out.began && (err != nil || out.left != 0) {
		panic(http.ErrAbortHandler) // the reader must not take a part for the whole
	}
	if err == nil && !out.began { // an empty one
		out.start()
	}
	return err
}

// rangeOf reads the one form of a range that a client of ours asks for.
func rangeOf(header string, size int64) (offset, length int64, ranged bool, err error) {
	if header == "" {
		return 0, size, false, nil
	}
	var last int64
	if n, err := fmt.Sscanf(header, "bytes=%d-%d", &offset, &last); err != nil || n != 2 || offset < 0 || last < offset-1 || last >= size {
		return 0, 0, false, fmt.Errorf("%w: %.60q of %d bytes", blob.ErrInvalidRange, header, size)
	}
	return offset, last - offset + 1, true, nil
}

// answerBody is where a place writes what it reads, straight into the answer.
type answerBody struct {
	r       *request
	left    int64
	n       int
	partial bool
	began   bool
}

func (a *answerBody) start() {
	a.began = true
	if a.partial {
		a.r.w.WriteHeader(http.StatusPartialContent)
	}
}

func (a *answerBody) Write(p []byte) (int, error) {
	if !a.began {
		a.start()
	}
	if int64(len(p)) > a.left {
		return 0, errors.New("the blob is longer than it was")
	}
	n, err := a.r.w.Write(p)
	a.left, a.n = a.left-int64(n), a.n+n
	return n, err
}

func (a *answerBody) Length() int { return a.n }

// Reset is called before anything was written, or by a driver that tries again, which is too late then.
func (a *answerBody) Reset() {
	if a.began {
		panic(http.ErrAbortHandler)
	}
}

// underLocks requires that the locks under which a change is made are held still.
func (s *Server) underLocks(r *request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, token := range strings.FieldsFunc(r.Header.Get(headerLocks), func(c rune) bool { return c == ',' }) {
		if l := s.locks[token]; l == nil || l.place != r.name {
			return status{statusLockLost, errLockLost}
		}
	}
	return nil
}

func (s *Server) put(r *request) error {
	id, err := r.blob()
	if err != nil {
		return err
	}
	if err := s.underLocks(r); err != nil {
		return err
	}
	size, serr := strconv.ParseInt(r.Header.Get(headerSize), 10, 64)
	offset, oerr := strconv.ParseInt(r.Header.Get(headerOffset), 10, 64)
	digest, derr := hex.DecodeString(r.Header.Get(headerDigest))
	if serr != nil || oerr != nil || derr != nil || len(digest) != 32 || size < 0 || size > MaxBlob || offset < 0 || offset > size {
		return refuse(http.StatusBadRequest, "put blob %s: its size (at most %d), offset or digest is wrong", id, MaxBlob)
	}
	if err := s.uploads.Acquire(r.Context(), size); err != nil {
		return context.Cause(r.Context())
	}
	defer s.uploads.Release(size)
	defer s.comes(partialKey(r.name, digest))()
	data, err := s.receive(r, digest, size, offset)
	if err == nil {
		err = s.keep(r, id, data, digest)
	}
	if err == nil && size >= resumable {
		s.buffers.Put(&data) // a place that has put it needs it no more
	}
	return err
}

// buffer gives memory for a blob.
func (s *Server) buffer(size int64) []byte {
	if b, ok := s.buffers.Get().(*[]byte); ok && int64(cap(*b)) >= size {
		return (*b)[:0]
	}
	return make([]byte, 0, max(size, resumable))
}

// receive reads a blob, the beginning of which may have come before. What comes of one that is cut off is kept.
func (s *Server) receive(r *request, digest []byte, size, offset int64) ([]byte, error) {
	key := partialKey(r.name, digest)
	data := s.takePartial(key)
	if int64(len(data)) < offset {
		return nil, refuse(http.StatusRequestedRangeNotSatisfiable, "%d bytes of it are here, not %d", len(data), offset)
	}
	data = append(s.buffer(size), data[:offset]...)
	n, err := io.ReadFull(r.Body, data[offset:size])
	data = data[:offset+int64(n)]
	if err == nil && int64(len(data)) == size {
		if sum := blake3.Sum256(data); subtle.ConstantTimeCompare(sum[:], digest) != 1 {
			return nil, refuse(http.StatusBadRequest, "what arrived is not what was sent: the digest differs")
		}
		return data, nil
	}
	if size == offset {
		return data, nil
	}
	if len(data) >= resumable {
		s.keepPartial(key, partial{data: slices.Clip(slices.Clone(data)), at: time.Now()})
	}
	return nil, refuse(http.StatusBadRequest, "it broke off after %d of %d bytes: %w", len(data), size, err)
}

func partialKey(place string, digest []byte) string { return hex.EncodeToString(digest) + " " + place }

// comes says that a blob is coming, until the function that it gives is called.
func (s *Server) comes(key string) (over func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.coming[key] != nil { // of somebody else too, who came first
		return func() {}
	}
	done := make(chan struct{})
	s.coming[key] = done
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.coming, key)
		close(done)
	}
}

// settleLimit is how long somebody who was cut off and asks again waits for what was received to be kept.
const settleLimit = 5 * time.Second

// settled waits until a blob that is coming has come, or its line is seen to be cut: whoever asks for it has most likely been cut off and is
// back before that was noticed here, and what was received is still being kept.
func (s *Server) settled(ctx context.Context, key string) {
	s.mu.Lock()
	done := s.coming[key]
	s.mu.Unlock()
	if done == nil {
		return
	}
	limit := time.NewTimer(settleLimit)
	defer limit.Stop()
	select {
	case <-done:
	case <-limit.C:
	case <-ctx.Done():
	}
}

func (s *Server) takePartial(key string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.partials[key]
	delete(s.partials, key)
	return p.data
}

// keepPartial keeps the beginning of a blob, in place of older ones if there is no room.
func (s *Server) keepPartial(key string, p partial) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.partials[key] = p
	total := 0
	for k, other := range s.partials {
		if time.Since(other.at) > partialLife {
			delete(s.partials, k)
		} else {
			total += cap(other.data)
		}
	}
	for total > maxPartials {
		oldest := key
		for k, other := range s.partials {
			if other.at.Before(s.partials[oldest].at) {
				oldest = k
			}
		}
		total -= cap(s.partials[oldest].data)
		delete(s.partials, oldest)
	}
}

// arrived says how much of a blob is here, and whether one of a name is here just so.
func (s *Server) arrived(r *request) error {
	q := r.URL.Query()
	digest, err := hex.DecodeString(q.Get("digest"))
	if err != nil || len(digest) != 32 {
		return refuse(http.StatusBadRequest, "name a digest")
	}
	s.settled(r.Context(), partialKey(r.name, digest))
	var a arrived
	if id := q.Get("id"); id != "" {
		name, err := blobName(id)
		if err != nil {
			return err
		}
		there, err := s.digest(r.Context(), r.place, name)
		if err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
			return err
		}
		a.There = err == nil && subtle.ConstantTimeCompare(there, digest) == 1
	}
	s.sayRoom(r)
	s.mu.Lock()
	a.Have = int64(len(s.partials[partialKey(r.name, digest)].data))
	s.mu.Unlock()
	return json.NewEncoder(r.w).Encode(a)
}

// keep puts a blob and reads it back. One that is there already as it is stays.
func (s *Server) keep(r *request, id blob.ID, data, digest []byte) error {
	ctx := context.WithoutCancel(r.Context()) // all of it is here: the line may break now
	opts := blob.PutOptions{}
	if t := r.Header.Get(headerTime); t != "" {
		at, err := time.Parse(time.RFC3339Nano, t)
		if err != nil {
			return refuse(http.StatusBadRequest, "the time %.40q is none", t)
		}
		opts.SetModTime = at
	}
	if r.rights < Own {
		switch there, err := s.digest(ctx, r.place, id); {
		case err == nil && subtle.ConstantTimeCompare(there, digest) == 1:
			return s.say(r, id)
		case err == nil:
			if fresh, ferr := s.fresh(ctx, r.place, id); ferr != nil || !fresh {
				return errors.Join(ferr, refuse(http.StatusForbidden, "put blob %s: %w: it is there, and is another one", id, store.ErrForbidden))
			}
		case !errors.Is(err, blob.ErrBlobNotFound):
			return err
		}
	}
	if err := store.PutBlob(ctx, r.place, id, store.Bytes(data), opts); err != nil {
		return err
	}
	return s.say(r, id)
}

// fresh says whether a blob holds the settings of a store that is being created: Kopia writes them twice.
func (s *Server) fresh(ctx context.Context, p store.Place, id blob.ID) (bool, error) {
	if !strings.HasPrefix(string(id), settingsPrefix) {
		return false, nil
	}
	any := errors.New("there is one")
	err := p.ListBlobs(ctx, packPrefix, func(blob.Metadata) error { return any })
	if errors.Is(err, any) {
		return false, nil
	}
	return err == nil, err
}

// say answers with the time at which a blob was put.
func (s *Server) say(r *request, id blob.ID) error {
	meta, err := r.place.GetMetadata(context.WithoutCancel(r.Context()), id)
	if err != nil {
		return err
	}
	r.w.Header().Set(headerTime, meta.Timestamp.Format(time.RFC3339Nano))
	s.sayRoom(r)
	r.w.WriteHeader(http.StatusNoContent)
	return nil
}

// sayRoom says along with another answer how much room there is, if the place can say.
func (s *Server) sayRoom(r *request) {
	if c, err := r.place.GetCapacity(r.Context()); err == nil {
		r.w.Header().Set(headerRoom, fmt.Sprint(c.SizeB, c.FreeB))
	}
}

// digest is that of a blob that is there, read from the medium.
func (s *Server) digest(ctx context.Context, p store.Place, id blob.ID) ([]byte, error) {
	if _, err := p.GetMetadata(ctx, id); err != nil {
		return nil, err
	}
	var d digester
	d.Reset()
	if err := store.GetFromMedium(ctx, p, id, &d); err != nil {
		return nil, err
	}
	return d.h.Sum(nil), nil
}

type digester struct {
	h *blake3.Hasher
	n int
}

func (d *digester) Write(p []byte) (int, error) { d.n += len(p); return d.h.Write(p) }
func (d *digester) Length() int                 { return d.n }
func (d *digester) Reset()                      { d.h, d.n = blake3.New(), 0 }

// What Kopia's names of blobs begin with.
const (
	sessionPrefix  = "s"      // markers of sessions
	settingsPrefix = "kopia." // the store's settings, and its keys under the password
	packPrefix     = "p"      // blocks
)

func (s *Server) delete(r *request) error {
	id, err := r.blob()
	if err != nil {
		return err
	}
	if r.rights < Own && !strings.HasPrefix(string(id), sessionPrefix) {
		return refuse(http.StatusForbidden, "delete blob %s: %w", id, store.ErrForbidden)
	}
	if err := s.underLocks(r); err != nil {
		return err
	}
	if err := r.place.DeleteBlob(r.Context(), id); err != nil {
		return err
	}
	r.w.WriteHeader(http.StatusNoContent)
	return nil
}

// lock holds a lock until the one who asked goes away or unlocks it.
func (s *Server) lock(r *request) error {
	q := r.URL.Query()
	name, token := q.Get("name"), q.Get("token")
	exclusive, err := strconv.ParseBool(q.Get("exclusive"))
	if err != nil || name == "" || len(name) > maxName || len(token) < 16 || len(token) > maxName {
		return refuse(http.StatusBadRequest, "name a lock, its token, and whether it is exclusive")
	}
	unlock, taken, err := r.place.TryLock(name, exclusive)
	if err != nil {
		return err
	}
	if !taken {
		return refuse(statusTaken, "somebody else has it")
	}
	ctx, let := context.WithCancel(r.Context())
	defer let()
	s.mu.Lock()
	if _, again := s.locks[token]; again || s.closed {
		s.mu.Unlock()
		unlock()
		return refuse(http.StatusBadRequest, "that token is in use")
	}
	mine := &held{place: r.name, let: let, gone: make(chan struct{})}
	s.locks[token] = mine
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.locks, token)
		s.mu.Unlock()
		unlock()
		close(mine.gone)
	}()
	r.w.WriteHeader(http.StatusOK)
	if err := http.NewResponseController(r.w).Flush(); err != nil {
		return nil //nolint:nilerr // gone already
	}
	<-ctx.Done()
	return nil
}

// unlock lets a lock go, and returns when somebody else can have it.
func (s *Server) unlock(r *request) error {
	s.mu.Lock()
	l := s.locks[r.URL.Query().Get("token")]
	s.mu.Unlock()
	if l == nil || l.place != r.name {
		return nil // it is gone
	}
	l.let()
	select {
	case <-l.gone:
	case <-r.Context().Done():
	}
	return nil
}

func (s *Server) capacity(r *request) error {
	c, err := r.place.GetCapacity(r.Context())
	if err != nil {
		return refuse(http.StatusNotImplemented, "measure place: %w", err)
	}
	return json.NewEncoder(r.w).Encode(c)
}

func (s *Server) sweep(r *request) error {
	age, err := time.ParseDuration(r.URL.Query().Get("age"))
	if err != nil {
		return refuse(http.StatusBadRequest, "the age is none")
	}
	return r.place.Sweep(r.Context(), age)
}
