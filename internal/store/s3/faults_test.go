package s3_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"

	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/s3"
)

// sick is what a service answers that is not well.
func sick(w http.ResponseWriter, r *http.Request, status int, code string) {
	io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<Error><Code>%s</Code><Message>not now</Message></Error>", code)
}

// isBlob says whether a request is about a blob, not a list or the table of locks.
func isBlob(r *http.Request) bool {
	return strings.Contains(r.URL.Path, "/near/") && !strings.HasSuffix(r.URL.Path, "_muster.lock")
}

// A service that answers with less than was asked for, and says that this is all, is never believed.
func TestATruncatedAnswerIsNoData(t *testing.T) {
	g := start(t, t.TempDir())
	plain := g.bucket(t, false)
	p := create(t, plain)
	if err := p.PutBlob(t.Context(), "p1", store.Bytes(strings.Repeat("0123456789", 1000)), blob.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	// At once, because what is cut off is asked for again after a while.
	var asked sync.WaitGroup
	for _, keep := range []int{0, 1, 99} {
		bad := open(t, proxy(t, g, plain, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
			if !isBlob(r) || r.Method != http.MethodGet {
				pass.ServeHTTP(w, r)
				return
			}
			w.Header().Set("Content-Length", strconv.Itoa(keep))
			w.Header().Set("Content-Range", "bytes 100-199/10000")
			w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(bytes.Repeat([]byte{'0'}, keep))
		}).Brisk())
		asked.Go(func() {
			var out store.Buffer
			if err := bad.GetBlob(t.Context(), "p1", 100, 100, &out); err == nil || out.Len() != 0 {
				t.Errorf("%d bytes of 100: %v, %d bytes came out", keep, err, out.Len())
			}
		})
	}
	whole := open(t, proxy(t, g, plain, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		r.Header.Del("Range") // not signed: the service gives all of it
		pass.ServeHTTP(w, r)
	}))
	asked.Go(func() {
		var out store.Buffer
		if err := whole.GetBlob(t.Context(), "p1", 100, 100, &out); err == nil || out.Len() != 0 {
			t.Errorf("all where a part was asked for: %v, %d bytes", err, out.Len())
		}
	})
	asked.Wait()
	var out store.Buffer
	if err := p.GetBlob(t.Context(), "p1", 100, 100, &out); err != nil || out.Len() != 100 {
		t.Error(err)
	}
	if err := p.GetBlob(t.Context(), "p1", 9990, 100, &out); !errors.Is(err, blob.ErrInvalidRange) {
		t.Errorf("beyond the end: %v", err)
	}
	if err := p.GetBlob(t.Context(), "p2", 0, -1, &out); !errors.Is(err, blob.ErrBlobNotFound) {
		t.Errorf("what is not there: %v", err)
	}
	if err := p.PutBlob(t.Context(), "p1", store.Bytes("other"), blob.PutOptions{}); !errors.Is(err, blob.ErrBlobAlreadyExists) {
		t.Errorf("overwritten: %v", err)
	}
	if err := p.PutBlob(t.Context(), "p1", store.Bytes(strings.Repeat("0123456789", 1000)), blob.PutOptions{}); err != nil {
		t.Errorf("the same again: %v", err)
	}
}

// Of each blob the first read hangs: nobody waits for it.
func TestASlowReadIsAskedForAgain(t *testing.T) {
	g := start(t, t.TempDir())
	plain := g.bucket(t, false)
	p := create(t, plain)
	if err := p.PutBlob(t.Context(), "p1", store.Bytes("0123456789"), blob.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	seen := false
	slow := open(t, proxy(t, g, plain, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		mu.Lock()
		first := isBlob(r) && !seen
		seen = seen || first
		mu.Unlock()
		if first {
			<-r.Context().Done() // until the client gives up
			return
		}
		pass.ServeHTTP(w, r)
	}))
	var out store.Buffer
	began := time.Now()
	if err := slow.GetBlob(t.Context(), "p1", 2, 3, &out); err != nil || out.String() != "234" {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestWhatIsWrongIsSaidWithWhatToDo(t *testing.T) {
	g := start(t, t.TempDir())
	d := g.bucket(t, false)
	create(t, d)
	answer := func(status int, code string) s3.Driver {
		return proxy(t, g, d, func(w http.ResponseWriter, r *http.Request, _ http.Handler) { sick(w, r, status, code) })
	}
	change := func(f func(d *s3.Driver)) s3.Driver {
		c := d
		f(&c)
		return c
	}
	open := filepath.Join(t.TempDir(), "open")
	if err := os.WriteFile(open, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		d    s3.Driver
		says string
	}{
		"no bucket":          {change(func(d *s3.Driver) { d.Bucket = "bucket-none" }), "there is no bucket bucket-none"},
		"wrong key":          {change(func(d *s3.Driver) { d.Credentials = keyFile(t, accessKey, "wrong-secret") }), "does not know these credentials"},
		"unknown user":       {change(func(d *s3.Driver) { d.Credentials = keyFile(t, "nobody", secretKey) }), "does not know these credentials"},
		"no file":            {change(func(d *s3.Driver) { d.Credentials = "/nonexistent" }), "no such file"},
		"others may read":    {change(func(d *s3.Driver) { d.Credentials = open }), "chmod 600"},
		"no store":           {change(func(d *s3.Driver) { d.Prefix = "elsewhere/" }), store.ErrNotAStore.Error()},
		"clock":              {answer(http.StatusForbidden, "RequestTimeTooSkewed"), "clock of this host is wrong"},
		"not allowed":        {answer(http.StatusForbidden, "AccessDenied"), "give the credentials the rights"},
		"nobody there":       {change(func(d *s3.Driver) { d.Endpoint = "127.0.0.1:9" }), "refused"},
		"no TLS where it is": {change(func(d *s3.Driver) { d.Plain = false }), "HTTP response to HTTPS client"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := c.d.Open(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %q", err, c.says)
			} else {
				t.Log(err)
			}
			if err != nil && strings.Contains(err.Error(), "wrong-secret") {
				t.Error("it tells the secret")
			}
		})
	}
}

func TestUnfinishedUploadsAreSwept(t *testing.T) {
	g := start(t, t.TempDir())
	d := g.bucket(t, false)
	p := create(t, d)
	if _, err := g.core().NewMultipartUpload(t.Context(), d.Bucket, d.Prefix+"p1", putOptions); err != nil {
		t.Fatal(err)
	}
	if err := p.Sweep(t.Context(), time.Hour); err != nil || g.uploads(t, d) != 1 {
		t.Fatalf("a young upload: %d are left, %v", g.uploads(t, d), err)
	}
	if err := p.Sweep(t.Context(), -time.Minute); err != nil || g.uploads(t, d) != 0 {
		t.Errorf("%d are left, %v", g.uploads(t, d), err)
	}
}

func TestABucketThatKeepsVersionsIsKeptTidy(t *testing.T) {
	g := start(t, t.TempDir())
	d := g.bucket(t, true)
	p := create(t, d)
	for range 5 {
		if err := p.PutBlob(t.Context(), "kopia.maintenance", store.Bytes(time.Now().String()), blob.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		try(t, p, "publish", true, true)()
	}
	if n := len(versions(t, g, d)); n < 10 {
		t.Fatalf("%d versions: this test proves nothing", n)
	}
	if err := p.Sweep(t.Context(), -time.Minute); err != nil {
		t.Fatal(err)
	}
	if n := len(versions(t, g, d)); n != 2 {
		t.Errorf("%d versions", n)
	}
	try(t, p, "publish", true, true)()
}

func TestABucketIsExamined(t *testing.T) {
	g := start(t, t.TempDir())
	plain, locked := g.bucket(t, false), g.bucket(t, true)
	if h, err := plain.Examine(t.Context()); err != nil || h.Locks || h.Versions || h.Skew.Abs() > 2*time.Second || h.Took == 0 {
		t.Errorf("%+v, %v", h, err)
	}
	if h, err := locked.Examine(t.Context()); err != nil || !h.Locks || !h.Versions || h.Default != "" {
		t.Errorf("%+v, %v", h, err)
	}
	late := proxy(t, g, locked, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		pass.ServeHTTP(&dateShift{w, time.Hour}, r)
	})
	if h, err := late.Examine(t.Context()); err != nil || (h.Skew-time.Hour).Abs() > 2*time.Second {
		t.Errorf("an hour behind: %+v, %v", h, err)
	}
	// A lock's end is counted by the service's clock.
	late.Retention = 3 * time.Hour
	if err := create(t, late).PutBlob(t.Context(), "p1", store.Bytes("x"), blob.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, o := range versions(t, g, locked) {
		if left := time.Until(g.until(t, o)); strings.HasSuffix(o.Key, "p1") && (left-4*time.Hour).Abs() > time.Minute {
			t.Errorf("locked for %s", left)
		}
	}
}

// dateShift is a service whose clock goes wrong.
type dateShift struct {
	http.ResponseWriter
	by time.Duration
}

func (d *dateShift) WriteHeader(status int) {
	d.Header().Set("Date", time.Now().Add(d.by).UTC().Format(http.TimeFormat))
	d.ResponseWriter.WriteHeader(status)
}
