package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/musterdr/muster/internal/store/s3/gateway"
)

// TestRealCommandLineOnABucket types what people type, with the store in a bucket of a real S3 service.
func TestRealCommandLineOnABucket(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs an S3 service: set MUSTER_REAL=1")
	}
	program, err := filepath.Abs("../../build/bin/versitygw")
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.Start(t.Context(), program, t.TempDir())
	if err != nil {
		t.Fatalf("%v: build it with 'scripts/deps tools'", err)
	}
	defer g.Close()
	for name, locks := range map[string]bool{"plain": false, "locked": true} {
		if err := g.Client.MakeBucket(t.Context(), name, minio.MakeBucketOptions{ObjectLocking: locks}); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("scripts", func(t *testing.T) {
		testscript.Run(t, testscript.Params{Dir: "testdata/bucket", Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "runs": runs}, Setup: func(e *testscript.Env) error {
			e.Setenv("MUSTER_DIR", e.WorkDir+"/inst")
			e.Setenv("AT", "endpoint=http://"+g.Addr+"&region="+gateway.Region+"&path-style=1")
			for name, secret := range map[string]string{"good": gateway.SecretKey, "bad": "another-secret"} {
				if err := gateway.Credentials(filepath.Join(e.WorkDir, name), gateway.AccessKey, secret); err != nil {
					return err
				}
			}
			return nil
		}})
	})
}

// runs runs a command, whatever comes of it: what a host lacks is not this test's.
func runs(ts *testscript.TestScript, _ bool, args []string) { _ = ts.Exec(args[0], args[1:]...) }
