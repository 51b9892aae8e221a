package s3_test

import (
	"bytes"
	"net/http"
	"os"
	"sync/atomic"
	"testing"

	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/storetest"
)

// real leaves a test that takes long to the real lane.
func real(t *testing.T) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("takes long: set MUSTER_REAL=1")
	}
}

func TestS3KeepsThePromisesOfAStore(t *testing.T) {
	real(t)
	g := start(t, t.TempDir())
	storetest.Run(t, func(t *testing.T) store.Driver { return g.bucket(t, false) })
}

// Every kind of trouble at once, each at a request of its own: nothing of it is felt.
func TestAServiceThatIsNotWellLosesNothing(t *testing.T) {
	real(t)
	g := start(t, t.TempDir())
	var n, hurt atomic.Int64
	d := proxy(t, g, g.bucket(t, false), func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		switch i := n.Add(1); {
		case i%7 == 0:
			hurt.Add(1)
			sick(w, r, http.StatusServiceUnavailable, "SlowDown")
		case i%11 == 0:
			hurt.Add(1)
			sick(w, r, http.StatusInternalServerError, "InternalError")
		case i%13 == 0:
			hurt.Add(1)
			panic(http.ErrAbortHandler) // the connection breaks before the request was done
		case i%5 == 0 && r.Method == http.MethodPut:
			hurt.Add(1)
			pass.ServeHTTP(&deaf{header: http.Header{}}, r)
			panic(http.ErrAbortHandler) // and here after it was
		case i%4 == 0 && r.Method == http.MethodGet:
			hurt.Add(1)
			pass.ServeHTTP(&short{ResponseWriter: w}, r)
			panic(http.ErrAbortHandler) // in the middle of the body
		default:
			pass.ServeHTTP(w, r)
		}
	})
	s := fill(t, d, "snap-1")
	if _, err := s.Verify(t.Context(), "snap-1", nil); err != nil {
		t.Fatal(err)
	}
	disk := storetest.NewDisk(1<<20, 0)
	m, err := s.Image(t.Context(), "snap-1", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	got := make([]byte, disk.Size())
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, disk.Data) {
		t.Errorf("the disk differs: %v", err)
	}
	if hurt.Load() < 10 {
		t.Errorf("only %d of %d requests were hurt", hurt.Load(), n.Load())
	}
}

// deaf hears no answer.
type deaf struct{ header http.Header }

func (d *deaf) Header() http.Header         { return d.header }
func (d *deaf) Write(b []byte) (int, error) { return len(b), nil }
func (d *deaf) WriteHeader(int)             {}

// short lets half of a body through.
type short struct{ http.ResponseWriter }

func (s *short) Write(b []byte) (int, error) {
	s.ResponseWriter.Write(b[:len(b)/2])
	s.ResponseWriter.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}
