package remote_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/kopia/kopia/repo/blob"
	"github.com/zeebo/blake3"
	"go.uber.org/goleak"

	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/remote"
	"github.com/musterdr/muster/internal/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// served serves a new folder with some rights.
func served(t *testing.T, rights *remote.Rights) (drv store.Driver, base string, c *http.Client) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store")
	s := remote.NewServer(func(*http.Request) (store.Driver, remote.Rights, error) {
		return folder.Driver{Path: path}, *rights, nil
	})
	server := httptest.NewUnstartedServer(s)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			t.Error(err)
		}
		server.CloseClientConnections()
		server.Close()
	})
	return remote.New(server.Client(), server.URL), server.URL, server.Client()
}

func TestAStoreElsewhereKeepsThePromisesOfAStore(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) store.Driver {
		own := remote.Own
		drv, _, _ := served(t, &own)
		return drv
	})
}

func TestSnapshotsGetFromAFolderToAStoreElsewhere(t *testing.T) {
	t.Parallel()
	storetest.RunReplication(t,
		func(t *testing.T) store.Driver { return folder.Driver{Path: filepath.Join(t.TempDir(), "store")} },
		func(t *testing.T) store.Driver {
			own := remote.Own
			drv, _, _ := served(t, &own)
			return drv
		})
}

// put asks a server by hand.
func put(t *testing.T, c *http.Client, base, id string, data []byte, whole []byte, offset int, more ...string) (status int) {
	t.Helper()
	sum := blake3.Sum256(whole)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, base+"/blobs/"+id, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Muster-Digest", hex.EncodeToString(sum[:]))
	req.Header.Set("X-Muster-Size", strconv.Itoa(len(whole)))
	req.Header.Set("X-Muster-Offset", strconv.Itoa(offset))
	for i := 0; i+1 < len(more); i += 2 {
		req.Header.Set(more[i], more[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

func TestWhoMayAppendCanTakeNothingAway(t *testing.T) {
	rights := remote.Make
	drv, base, c := served(t, &rights)
	if err := store.Create(t.Context(), drv, "correct horse"); err != nil {
		t.Fatal(err)
	}
	rights = remote.Append
	near := folder.Driver{Path: filepath.Join(t.TempDir(), "near")}
	far, err := store.Open(t.Context(), drv, "correct horse")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close(context.Background()) //nolint:errcheck // only a test's
	if err := store.CreateLike(t.Context(), near, "near horse", far); err != nil {
		t.Fatal(err)
	}
	p, err := drv.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.PutBlob(t.Context(), "p0", store.Bytes("a block"), blob.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	all, err := blob.ListAllBlobs(t.Context(), p, "")
	if err != nil || len(all) < 2 {
		t.Fatal(all, err)
	}
	for _, m := range all {
		if err := p.DeleteBlob(t.Context(), m.BlobID); !errors.Is(err, store.ErrForbidden) {
			t.Errorf("delete %s: %v", m.BlobID, err)
		}
		if err := p.PutBlob(t.Context(), m.BlobID, store.Bytes("another"), blob.PutOptions{}); !errors.Is(err, store.ErrForbidden) {
			t.Errorf("overwrite %s: %v", m.BlobID, err)
		}
		same, err := storetest.ReadBlob(t.Context(), p, m.BlobID)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.PutBlob(t.Context(), m.BlobID, store.Bytes(same), blob.PutOptions{}); err != nil {
			t.Errorf("put %s again as it is: %v", m.BlobID, err)
		}
	}
	if err := p.Sweep(t.Context(), 0); !errors.Is(err, store.ErrForbidden) {
		t.Errorf("sweep: %v", err)
	}
	rights = remote.Read
	if status := put(t, c, base, "pnew", []byte("x"), []byte("x"), 0); status != http.StatusForbidden {
		t.Errorf("a reader puts: %d", status)
	}
	rights = remote.None
	if _, err := drv.Open(t.Context()); !errors.Is(err, store.ErrForbidden) {
		t.Errorf("somebody with no rights opens: %v", err)
	}
}

func TestABlobIsWholeOrNotThere(t *testing.T) {
	rights := remote.Make
	drv, base, c := served(t, &rights)
	p, err := drv.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 1<<20)
	storetest.Noise(data, 1)
	flipped := bytes.Clone(data)
	flipped[5] ^= 1
	for what, status := range map[string]int{
		"flipped on the way":       put(t, c, base, "pa", flipped, data, 0),
		"without its beginning":    put(t, c, base, "pa", data[10:], data, 10),
		"of a negative offset":     put(t, c, base, "pa", data, data, -1),
		"under a name with a path": put(t, c, base, "..%2f..%2fetc", data, data, 0),
		"under the name ..":        put(t, c, base, "..pa%00", data, data, 0),
		"under a lost lock":        put(t, c, base, "pa", data, data, 0, "X-Muster-Locks", "0123456789abcdef"),
		"too large":                put(t, c, base, "pa", nil, nil, 0, "X-Muster-Size", strconv.Itoa(remote.MaxBlob+1)),
	} {
		if status < 400 {
			t.Errorf("a blob %s is answered with %d", what, status)
		}
	}
	if all, err := blob.ListAllBlobs(t.Context(), p, ""); err != nil || len(all) != 0 {
		t.Errorf("there is %v, %v", all, err)
	}
}

// cutting is a transport that cuts what is sent off after a number of bytes, once.
type cutting struct {
	http.RoundTripper
	after atomic.Int64 // -1: never
	sent  atomic.Int64
}

func (c *cutting) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil && r.Method == http.MethodPut {
		r = r.Clone(r.Context())
		r.Body = &cutBody{r.Body, c}
	}
	return c.RoundTripper.RoundTrip(r)
}

type cutBody struct {
	io.ReadCloser
	c *cutting
}

func (b *cutBody) Read(p []byte) (int, error) {
	left := b.c.after.Load()
	if left == 0 {
		b.c.after.Store(-1)
		return 0, errors.New("the line was cut")
	}
	if left > 0 && int64(len(p)) > left {
		p = p[:left]
	}
	n, err := b.ReadCloser.Read(p)
	b.c.sent.Add(int64(n))
	if left > 0 {
		b.c.after.Add(-int64(n))
	}
	return n, err
}

func TestABlobThatIsCutOffGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	rights := remote.Make
	_, base, c := served(t, &rights)
	line := &cutting{RoundTripper: c.Transport}
	drv := remote.New(&http.Client{Transport: line}, base)
	line.after.Store(-1)
	p, err := drv.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 4<<20)
	storetest.Noise(data, 2)
	r := rand.New(rand.NewPCG(1, 1))
	var extra int64
	for n := range 10 {
		data[0] = byte(n)
		cut := r.Int64N(int64(len(data)))
		line.after.Store(cut)
		line.sent.Store(0)
		id := blob.ID(fmt.Sprintf("p%d", n))
		if err := p.PutBlob(t.Context(), id, store.Bytes(data), blob.PutOptions{}); err != nil {
			t.Fatalf("cut after %d bytes: %v", cut, err)
		}
		extra += line.sent.Load() - int64(len(data))
		if got, err := storetest.ReadBlob(t.Context(), p, id); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("cut after %d bytes: what is there differs (%v)", cut, err)
		}
	}
	// What the line had taken and not delivered is lost; the rest is not sent again.
	if extra > int64(len(data)) {
		t.Errorf("ten cuts in ten blobs of 4 MiB sent %d bytes twice", extra)
	}
}

func TestWhoLostALockChangesNothing(t *testing.T) {
	rights := remote.Own
	path := filepath.Join(t.TempDir(), "store")
	s := remote.NewServer(func(*http.Request) (store.Driver, remote.Rights, error) {
		return folder.Driver{Path: path}, rights, nil
	})
	server := httptest.NewUnstartedServer(s)
	server.EnableHTTP2 = true
	server.StartTLS()
	defer func() {
		_ = s.Close(context.Background())
		server.CloseClientConnections()
		server.Close()
	}()
	first := server.Client()
	second := &http.Client{Transport: first.Transport.(*http.Transport).Clone()} //nolint:forcetypeassert // httptest's
	defer second.CloseIdleConnections()
	p, err := remote.New(first, server.URL).Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	other, err := remote.New(second, server.URL).Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	unlock, taken, err := p.TryLock("ingest", true)
	if err != nil || !taken {
		t.Fatal(taken, err)
	}
	if _, taken, err := other.TryLock("ingest", false); taken || err != nil {
		t.Fatalf("two have it: %v", err)
	}
	if err := p.PutBlob(t.Context(), "pa", store.Bytes("a"), blob.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	server.CloseClientConnections()
	var release func()
	for ok := false; !ok; { // it is let go when the server notices
		if release, ok, err = other.TryLock("ingest", true); err != nil {
			t.Fatal(err)
		}
	}
	defer release()
	if err := p.PutBlob(t.Context(), "pb", store.Bytes("b"), blob.PutOptions{}); err == nil {
		t.Error("who lost a lock could put")
	}
	if err := p.DeleteBlob(t.Context(), "pa"); err == nil {
		t.Error("who lost a lock could delete")
	}
	unlock()
	if err := p.PutBlob(t.Context(), "pb", store.Bytes("b"), blob.PutOptions{}); err != nil {
		t.Errorf("after letting the lost lock go: %v", err)
	}
}

// deaf loses the answer to the first blob that is put.
type deaf struct {
	http.RoundTripper
	puts atomic.Int64
}

func (d *deaf) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := d.RoundTripper.RoundTrip(r)
	if err == nil && r.Method == http.MethodPut && d.puts.Add(1) == 1 {
		_ = resp.Body.Close()
		return nil, errors.New("the line broke")
	}
	return resp, err
}

func TestABlobWhoseAnswerWasLostIsNotSentAgain(t *testing.T) {
	rights := remote.Make
	_, base, c := served(t, &rights)
	d := &deaf{RoundTripper: c.Transport}
	p, err := remote.New(&http.Client{Transport: d}, base).Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a, ok := p.(store.Attesting)
	if !ok {
		t.Fatal("a place far away does not attest")
	}
	blocks, rooms := store.Bytes(bytes.Repeat([]byte("block"), 50_000)), 0
	room := func() error { rooms++; return nil }
	for i := range 2 { // the second time it was there
		if sent, err := a.Bring(t.Context(), "p1", blocks, room); err != nil || sent != (i == 0) {
			t.Errorf("bring %d: sent %t, %v", i, sent, err)
		}
	}
	if d.puts.Load() != 1 || rooms != 1 {
		t.Errorf("it was sent %d times; room was asked for %d times", d.puts.Load(), rooms)
	}
	full := errors.New("full")
	if sent, err := a.Bring(t.Context(), "p2", blocks, func() error { return full }); sent || !errors.Is(err, full) || d.puts.Load() != 1 {
		t.Errorf("without room: sent %t, %v", sent, err)
	}
	if sent, err := a.Bring(t.Context(), "p1", blocks[:9], room); sent && err == nil {
		t.Error("another blob took its place")
	}
}
