package catalogtest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
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
	envUntil = "MUSTER_CATALOGTEST_UNTIL" // nights after which the child ends by itself; "" never
)

// Main runs the tests, or is the child of one. It is called by TestMain.
func Main(m *testing.M) {
	if dsn := os.Getenv(envDSN); dsn != "" {
		if err := child(dsn, os.Getenv(envRound)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
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
		killWriter(t, dsn, fmt.Sprint(round+1), time.Duration(1+round*7%23)*time.Millisecond)
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

// killWriter starts a process that writes, and kills it a moment after it has begun.
func killWriter(t *testing.T, dsn, round string, after time.Duration) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envDSN+"="+dsn, envRound+"="+round)
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
	<-time.After(after)
	_ = cmd.Process.Kill()
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child was not killed but ended: %v", err)
	}
}

// Processes has two processes write into one catalog at once, on servers of their own and on one that they share, while a
// third is killed again and again, and checks that it holds what it must.
func Processes(t *testing.T, dsn string) {
	const nights = 25
	var running sync.WaitGroup
	for _, name := range []string{"a", "b"} {
		running.Go(func() {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), envDSN+"="+dsn, envRound+"="+name, fmt.Sprintf("%s=%d", envUntil, nights))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	for round := range 3 {
		killWriter(t, dsn, fmt.Sprint(round+1), time.Duration(5+round*7)*time.Millisecond)
	}
	running.Wait()
	c, err := catalog.Open(context.Background(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	checkInvariants(t, c)
	snaps, err := c.Snapshots(context.Background(), sharedServer)
	if err != nil || len(snaps) < 2*nights {
		t.Errorf("of the server that both work on %d snapshots are known, %v; want %d", len(snaps), err, 2*nights)
	}
}

// sharedServer is the one on which all children work.
const sharedServer = "srv-shared"

// child protects a server of its round, and one that is everybody's, and records one night after the other until it is
// killed or has recorded enough.
func child(dsn, round string) error {
	ctx := context.Background()
	c, err := catalog.Open(ctx, dsn)
	if err != nil {
		return err
	}
	until, _ := strconv.Atoi(os.Getenv(envUntil)) // 0 if there is none
	s := server(0)
	s.ID, s.Name = "srv-r"+round, "round"+round
	if err := c.AddServer(ctx, s); err != nil {
		return err
	}
	shared := server(0)
	shared.ID, shared.Name = sharedServer, "shared"
	if err := c.AddServer(ctx, shared); err != nil && !errors.Is(err, catalog.ErrExists) {
		return err
	}
	for night := 1; until == 0 || night <= until; night++ {
		for _, id := range []string{s.ID, shared.ID} {
			if err := recordNight(ctx, c, id, round, night); err != nil {
				return err
			}
		}
		if night == 1 && until == 0 {
			fmt.Println("writing")
		}
	}
	return c.Close()
}

func recordNight(ctx context.Context, c *catalog.Catalog, server, round string, night int) error {
	snap := snapshot(0, night)
	snap.ID, snap.ServerID = fmt.Sprintf("snap-%s-r%s-%d", server, round, night), server
	outcome := dr.Pass
	if night%3 == 0 {
		outcome = dr.Fail
	}
	if err := errors.Join(c.RecordSnapshot(ctx, snap), c.RecordPreRecovery(ctx, preRecovery(snap, 0))); err != nil {
		return err
	}
	_, err := c.RecordVerdict(ctx, verdict(snap, 1, outcome))
	return err
}
