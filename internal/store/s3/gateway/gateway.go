// Package gateway starts a real S3 service on loopback, versitygw over a folder, for tests and measurements.
//
// Knows: versitygw ("scripts/deps tools" builds it).
// Must not know: stores.
package gateway

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// What whoever starts the service may do everything with.
const (
	AccessKey = "muster-test"
	SecretKey = "not-a-secret-for-tests"
	Region    = "us-east-1"
)

// Gateway is a running service.
type Gateway struct {
	Addr   string
	Client *minio.Client
	cmd    *exec.Cmd
	said   bytes.Buffer
}

// startLimit is how long the service may take to answer, on a machine that does much else.
const startLimit = 30 * time.Second

// Start starts a service whose data lies in dir; program is versitygw. Close ends it.
func Start(ctx context.Context, program, dir string) (*Gateway, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g := &Gateway{Addr: l.Addr().String()}
	if err := l.Close(); err != nil {
		return nil, err
	}
	data, versions := filepath.Join(dir, "data"), filepath.Join(dir, "versions")
	for _, d := range []string{data, versions} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	g.cmd = exec.Command(program, "--port", g.Addr, "--quiet", "--keep-alive", "posix", "--versioning-dir", versions, data) //nolint:gosec // the caller's
	g.cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+AccessKey, "ROOT_SECRET_KEY="+SecretKey)
	g.cmd.Stdout, g.cmd.Stderr = &g.said, &g.said
	if err := g.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start S3 service: %w", err)
	}
	g.Client, err = minio.New(g.Addr, &minio.Options{Creds: credentials.NewStaticV4(AccessKey, SecretKey, ""), Region: Region, BucketLookup: minio.BucketLookupPath})
	for began := time.Now(); err == nil; {
		once, cancel := context.WithTimeout(ctx, time.Second)
		_, asked := g.Client.ListBuckets(once)
		cancel()
		if asked == nil {
			return g, nil
		}
		if time.Since(began) > startLimit || ctx.Err() != nil {
			err = asked
		}
		<-time.After(20 * time.Millisecond) // until another process listens
	}
	g.Close()
	return nil, fmt.Errorf("start S3 service: it does not answer: %w; it said %q", err, g.said.String())
}

// Close ends the service.
func (g *Gateway) Close() {
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait()
}

// Credentials writes a file of credentials.
func Credentials(path, access, secret string) error {
	return os.WriteFile(path, []byte("[default]\naws_access_key_id = "+access+"\naws_secret_access_key = "+secret+"\n"), 0o600)
}
