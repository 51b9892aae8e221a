package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"muster": main})
}

// TestCommandLine types what people type. Everything that needs a hypervisor is tested with real guests elsewhere.
func TestCommandLine(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata", Cmds: map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "nodeport": nodeport}, Setup: func(e *testscript.Env) error {
		e.Setenv("MUSTER_DIR", e.WorkDir+"/inst")
		return os.MkdirAll(e.WorkDir+"/images", 0o755)
	}})
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
