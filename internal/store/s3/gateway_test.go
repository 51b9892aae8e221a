package s3_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/minio/minio-go/v7"

	"github.com/musterdr/muster/internal/store/s3"
	"github.com/musterdr/muster/internal/store/s3/gateway"
)

const accessKey, secretKey = gateway.AccessKey, gateway.SecretKey

// service is a real S3 service on loopback.
type service struct {
	addr string
	c    *minio.Client
	n    int
}

// start starts a service whose data lies in dir.
func start(t *testing.T, dir string) *service {
	t.Helper()
	program, err := filepath.Abs("../../../build/bin/versitygw")
	if err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		if os.Getenv("MUSTER_REAL") != "" {
			t.Fatalf("%v: build it with 'scripts/deps tools'", err)
		}
		t.Skipf("%v: build it with 'scripts/deps tools'", err)
	}
	g, err := gateway.Start(t.Context(), program, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return &service{addr: g.Addr, c: g.Client}
}

// bucket makes a bucket and gives a driver for a prefix of it.
func (g *service) bucket(t *testing.T, locks bool) s3.Driver {
	t.Helper()
	g.n++
	d := s3.Driver{Endpoint: g.addr, Plain: true, Region: gateway.Region, Bucket: fmt.Sprintf("bucket-%d", g.n), Prefix: "near/", PathStyle: true, Credentials: keyFile(t, accessKey, secretKey)}
	if err := g.c.MakeBucket(t.Context(), d.Bucket, minio.MakeBucketOptions{ObjectLocking: locks}); err != nil {
		t.Fatal(err)
	}
	return d
}

func keyFile(t *testing.T, access, secret string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "credentials")
	if err := gateway.Credentials(path, access, secret); err != nil {
		t.Fatal(err)
	}
	return path
}

// proxy stands before a service and does what fault says; it must pass on what it does not answer itself.
func proxy(t *testing.T, g *service, d s3.Driver, fault func(w http.ResponseWriter, r *http.Request, pass http.Handler)) s3.Driver {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	forward := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { pass(g, w, r) })
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fault(w, r, forward) })}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	d.Endpoint = l.Addr().String()
	return d
}

// pass hands a request on as it was signed: Host is part of the signature.
func pass(g *service, w http.ResponseWriter, r *http.Request) {
	out := r.Clone(r.Context())
	out.RequestURI = ""
	out.URL.Scheme, out.URL.Host = "http", g.addr
	a, err := http.DefaultTransport.RoundTrip(out)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer a.Body.Close()
	for k, v := range a.Header {
		w.Header()[k] = v
	}
	w.WriteHeader(a.StatusCode)
	io.Copy(w, a.Body)
}

var putOptions minio.PutObjectOptions

func (g *service) core() minio.Core { return minio.Core{Client: g.c} }

func (g *service) uploads(t *testing.T, d s3.Driver) (n int) {
	t.Helper()
	for u := range g.c.ListIncompleteUploads(t.Context(), d.Bucket, d.Prefix, true) {
		if u.Err != nil {
			t.Fatal(u.Err)
		}
		n++
	}
	return n
}
