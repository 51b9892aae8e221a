package s3_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/musterdr/muster/internal/store/s3"
)

const accessKey, secretKey = "muster-test", "not-a-secret-for-tests"

// gateway is a real S3 service on loopback: versitygw over a folder.
type gateway struct {
	addr string
	data string
	c    *minio.Client
	n    int
}

// start starts a service whose data lies in dir. "scripts/deps tools" builds the program.
func start(t *testing.T, dir string) *gateway {
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
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gateway{addr: l.Addr().String(), data: filepath.Join(dir, "data")}
	l.Close()
	for _, d := range []string{g.data, filepath.Join(dir, "versions")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "gateway.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "--port", g.addr, "--quiet", "--keep-alive", "posix", "--versioning-dir", filepath.Join(dir, "versions"), g.data)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+accessKey, "ROOT_SECRET_KEY="+secretKey)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		out.Close()
	})
	g.c, err = minio.New(g.addr, &minio.Options{Creds: credentials.NewStaticV4(accessKey, secretKey, ""), Region: "us-east-1", BucketLookup: minio.BucketLookupPath})
	if err != nil {
		t.Fatal(err)
	}
	until := time.Now().Add(20 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, err := g.c.ListBuckets(ctx)
		cancel()
		if err == nil {
			return g
		}
		if time.Now().After(until) {
			log, _ := os.ReadFile(out.Name())
			t.Fatalf("the service does not answer: %v\n%s", err, log)
		}
		<-time.After(20 * time.Millisecond) // until another process listens
	}
}

// bucket makes a bucket and gives a driver for a prefix of it.
func (g *gateway) bucket(t *testing.T, locks bool) s3.Driver {
	t.Helper()
	g.n++
	d := s3.Driver{Endpoint: g.addr, Plain: true, Region: "us-east-1", Bucket: fmt.Sprintf("bucket-%d", g.n), Prefix: "near/", PathStyle: true, Credentials: keyFile(t, accessKey, secretKey)}
	if err := g.c.MakeBucket(t.Context(), d.Bucket, minio.MakeBucketOptions{ObjectLocking: locks}); err != nil {
		t.Fatal(err)
	}
	return d
}

func keyFile(t *testing.T, access, secret string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "credentials")
	text := "[default]\naws_access_key_id = " + access + "\naws_secret_access_key = " + secret + "\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// proxy stands before a service and does what fault says; it must pass on what it does not answer itself.
func proxy(t *testing.T, g *gateway, d s3.Driver, fault func(w http.ResponseWriter, r *http.Request, pass http.Handler)) s3.Driver {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	forward := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { pass(t, g, w, r) })
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fault(w, r, forward) })}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	d.Endpoint = l.Addr().String()
	return d
}

// pass hands a request on as it was signed: Host is part of the signature.
func pass(t *testing.T, g *gateway, w http.ResponseWriter, r *http.Request) {
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

func (g *gateway) core() minio.Core { return minio.Core{Client: g.c} }

func (g *gateway) uploads(t *testing.T, d s3.Driver) (n int) {
	t.Helper()
	for u := range g.c.ListIncompleteUploads(t.Context(), d.Bucket, d.Prefix, true) {
		if u.Err != nil {
			t.Fatal(u.Err)
		}
		n++
	}
	return n
}
