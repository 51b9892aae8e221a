package catalogtest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

// The child of the crash test is the test binary itself, told by these what to do.
const (
	envDSN   = "MUSTER_CATALOGTEST_DSN"
	envRound = "MUSTER_CATALOGTEST_ROUND"
)

// Main runs the tests, or is the child of one. It is called by TestMain.
func Main(m *testing.M) {
	if dsn := os.Getenv(envDSN); dsn != "" {
		if err := child(dsn, os.Getenv(envRound)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if os.Getenv("MUSTER_REAL") == "" { // the long search is for when there is time
		if err := flag.Set("rapid.checks", "5"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// Crash kills a process -9 that carries out verbs without a pause, again and again, and checks each time that the
// catalog opens and holds what it must.
func Crash(t *testing.T, dsn string, rounds int) {
	for round := range rounds {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), envDSN+"="+dsn, fmt.Sprintf("%s=%d", envRound, round+1))
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var b [1]byte
		if _, err := stdout.Read(b[:]); err != nil { // it has begun to write
			t.Fatalf("the child did not come to write: %v", errors.Join(err, cmd.Wait()))
		}
		<-time.After(time.Duration(1+round*7%23) * time.Millisecond)
		_ = cmd.Process.Kill()
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("the child was not killed but ended: %v", err)
		}
		c, err := catalog.Open(context.Background(), dsn)
		if err != nil {
			t.Fatal(err)
		}
		checkInvariants(t, c)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// child protects a server of its round and records one night after the other until it is killed.
func child(dsn, round string) error {
	ctx := context.Background()
	c, err := catalog.Open(ctx, dsn)
	if err != nil {
		return err
	}
	s := server(0)
	s.ID, s.Name = "srv-r"+round, "round"+round
	if err := c.AddServer(ctx, s); err != nil {
		return err
	}
	for night := 1; ; night++ {
		snap := snapshot(0, night)
		snap.ID, snap.ServerID = fmt.Sprintf("snap-r%s-%d", round, night), s.ID
		outcome := dr.Pass
		if night%3 == 0 {
			outcome = dr.Fail
		}
		if err := errors.Join(c.RecordSnapshot(ctx, snap), c.RecordPreRecovery(ctx, preRecovery(snap, 0))); err != nil {
			return err
		}
		if night == 1 {
			fmt.Println("writing")
		}
		if _, err := c.RecordVerdict(ctx, verdict(snap, 1, outcome)); err != nil {
			return err
		}
	}
}
