package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/database/pgserver"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"muster": main, makeBelieve: simulated})
}

// TestCommandLine types what people type. Everything that needs a hypervisor is tested with real guests elsewhere.
func TestCommandLine(t *testing.T) {
	cmds := map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "nodeport": nodeport, "fill": fill, "unfinished": unfinished, "postgres": postgres(t)}
	has := func(what string) (bool, error) { return what == "postgres" && pgserver.Installed(), nil }
	testscript.Run(t, testscript.Params{Dir: "testdata", Cmds: cmds, Condition: has, Setup: func(e *testscript.Env) error {
		e.Setenv("MUSTER_DIR", e.WorkDir+"/inst")
		return os.MkdirAll(e.WorkDir+"/images", 0o755)
	}})
}

// postgres makes an empty database and puts its URL into a variable: postgres NAME.
func postgres(t *testing.T) func(ts *testscript.TestScript, _ bool, args []string) {
	start := sync.OnceValue(func() pgserver.Tested { return pgserver.ForTest(t) })
	return func(ts *testscript.TestScript, _ bool, args []string) {
		ts.Setenv(args[0], start().Database(t))
	}
}

// fill writes servers and their history into the catalog of the installation: fill.
func fill(ts *testscript.TestScript, _ bool, _ []string) {
	ctx := context.Background()
	c, err := catalog.Open(ctx, filepath.Join(ts.Getenv("MUSTER_DIR"), "catalog.db"))
	ts.Check(err)
	for n := range 3 {
		id := fmt.Sprint("srv-", n)
		ts.Check(c.AddServer(ctx, dr.Server{ID: id, Name: fmt.Sprint("shop", n), Created: time.Now(), Source: dr.Source{Disks: []string{"/srv/shop.img"}}, Schedule: dr.Schedule{Every: dr.DefaultEvery}}))
		ts.Check(c.RecordSnapshot(ctx, dr.Snapshot{ID: fmt.Sprint("snap-", n), ServerID: id, Server: fmt.Sprint("shop", n), Taken: time.Now(),
			Disks: []dr.SnapshotDisk{{Name: "sda \x01 ü '\"", Size: 4 << 30, BlockSize: 64 << 10, Root: "k01"}}}))
	}
	ts.Check(c.Close())
}

// unfinished leaves a run that has begun, or ends it: unfinished start|end.
func unfinished(ts *testscript.TestScript, _ bool, args []string) {
	ctx := context.Background()
	e, err := engine.Open(ctx, engine.Config{DSN: filepath.Join(ts.Getenv("MUSTER_DIR"), "engine.db"), Version: "1", Logger: slog.New(slog.DiscardHandler)})
	ts.Check(err)
	began := make(chan struct{})
	engine.Register(e, "protect", func(r *engine.Run, _ string) error {
		_, err := engine.Step(r, "wait", engine.StepOptions{}, func(ctx context.Context) (bool, error) {
			if args[0] == "end" {
				return true, nil
			}
			close(began)
			<-ctx.Done()
			return false, ctx.Err()
		})
		return err
	})
	ts.Check(e.Launch(ctx))
	ts.Check(engine.Start(ctx, e, "protect", "protect.shop.x", ""))
	if args[0] == "end" {
		_, err := e.Wait(ctx, "protect.shop.x")
		ts.Check(err)
	} else {
		<-began
	}
	ts.Check(e.Close(ctx))
}

// exits runs a command and insists on its exit code: exits CODE COMMAND ARG…
func exits(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	code := "0"
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		code = strconv.Itoa(ended.ExitCode())
	}
	if code != args[0] {
		ts.Fatalf("exit code %s, want %s", code, args[0])
	}
}

// nodeport serves the port for nodes of the master in a folder, as 'muster serve' does beside what needs a hypervisor,
// until the script ends. Its address is in $ADDRESS then: nodeport DIR.
func nodeport(ts *testscript.TestScript, _ bool, args []string) {
	port, err := install{Dir: ts.MkAbs(args[0])}.openNodePort(serveCommand(), "127.0.0.1:0", "", slog.New(slog.DiscardHandler))
	ts.Check(err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- port.serve(ctx, nil) }()
	ts.Defer(func() {
		cancel()
		ts.Check(<-ended)
	})
	ts.Setenv("ADDRESS", port.listener.Addr().String())
}
