package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/engine"
)

// The child of a crash test is the test binary itself, told by these what to do.
const (
	envDSN   = "MUSTER_ENGINETEST_DSN"
	envMode  = "MUSTER_ENGINETEST_MODE"  // succeed, fail, cancel
	envKill  = "MUSTER_ENGINETEST_KILL"  // the point at which to die; "" none
	envDiary = "MUSTER_ENGINETEST_DIARY" // file in which every side effect is written down, with the term
	envOnce  = "MUSTER_ENGINETEST_ONCE"  // file that is made by who dies, so that only one does; "" whoever comes there
	envHost  = "MUSTER_ENGINETEST_HOST"
)

// Main runs the tests, or is the child of one. It is called by TestMain.
func Main(m *testing.M) {
	if os.Getenv(envDSN) != "" {
		if os.Getenv(envMode) == zombieMode {
			zombie()
		} else {
			child()
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// points are the instants at which a run of a mode can die, in the order in which they come.
func points(mode string) []string {
	out := []string{"start"}
	for _, step := range []string{"a", "b"} {
		out = append(out, step+" begins", step+" ends", step+" is over")
	}
	if mode != "succeed" {
		out = append(out, "undo b begins", "undo b ends", "undo a begins", "undo a ends")
	}
	return out
}

// Crash kills a process -9 at every point of a run in turn, the next one carrying on what it left, and checks that
// what had ended was never repeated, and that the run and its undos come to their end.
func Crash(t *testing.T, dsn, mode string) {
	diary := t.TempDir() + "/diary"
	kills := points(mode)
	for _, point := range kills {
		if out, err := spawn(t, dsn, mode, point, diary); err == nil {
			t.Fatalf("it did not die at %q: %s", point, out)
		}
	}
	out, err := spawn(t, dsn, mode, "", diary)
	want := map[string]string{"succeed": "succeeded", "fail": "failed", "cancel": "cancelled"}[mode]
	if err != nil || strings.TrimSpace(string(out)) != want {
		t.Errorf("it ended as %q, %v; want %s", out, err, want)
	}
	// Each effect happens twice, once in the process that died before it could be remembered and once in the next, and
	// never after that. Once the run is marked as cancelled its step is not tried again.
	checkDiary(t, diary, map[string]string{
		"succeed": "a a b b",
		"fail":    "a a b b undo-b undo-b undo-a undo-a",
		"cancel":  "a a b undo-b undo-b undo-a undo-a",
	}[mode])
}

// checkDiary: the effects happened in this order, under terms that never fell.
func checkDiary(t *testing.T, file, want string) {
	t.Helper()
	body, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	last := int64(0)
	for line := range strings.Lines(string(body)) {
		effect, term, _ := strings.Cut(strings.TrimSpace(line), "@")
		n, err := strconv.ParseInt(term, 10, 64)
		if err != nil || n < last {
			t.Errorf("term %q after %d", term, last)
		}
		last = n
		got = append(got, strings.ReplaceAll(effect, " ", "-"))
	}
	if strings.Join(got, " ") != want {
		t.Errorf("happened %s\nwant     %s", strings.Join(got, " "), want)
	}
}

// firstToDie says whether nobody died before.
func firstToDie() bool {
	name := os.Getenv(envOnce)
	if name == "" {
		return true
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		check(f.Close())
	}
	return err == nil
}

func spawn(t *testing.T, dsn, mode, kill, diary string) ([]byte, error) {
	t.Helper()
	return spawnHost(t, dsn, mode, kill, diary, "crash", "")
}

// spawnHost runs a child to its end. The error says that it killed itself.
func spawnHost(t *testing.T, dsn, mode, kill, diary, host, once string) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), envDSN+"="+dsn, envMode+"="+mode, envKill+"="+kill, envDiary+"="+diary, envHost+"="+host, envOnce+"="+once)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL && ctx.Err() == nil {
		return out, err
	}
	if err != nil {
		t.Errorf("the child did not die as it was told, but of %v: %s", err, stderr.Bytes())
	}
	return out, nil
}

// child is one process of a crash test.
func child() {
	mode, kill := os.Getenv(envMode), os.Getenv(envKill)
	diary, err := os.OpenFile(os.Getenv(envDiary), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	check(err)
	at := func(point string) {
		if point == kill && firstToDie() {
			check(syscall.Kill(os.Getpid(), syscall.SIGKILL))
			select {}
		}
	}
	e, err := engine.Open(context.Background(), engine.Config{DSN: os.Getenv(envDSN), Version: "1", Host: os.Getenv(envHost), Lease: testLease / 2,
		Logger: slog.New(slog.DiscardHandler)})
	check(err)
	engine.Register(e, "crash", func(r *engine.Run, _ nothing) error {
		effect := func(name string) func(ctx context.Context) error {
			return func(ctx context.Context) error {
				at(name + " begins")
				if name == "b" && mode == "cancel" {
					check(e.Cancel(ctx, r.ID()))
					<-ctx.Done()
				}
				_, err := fmt.Fprintf(diary, "%s@%d\n", name, r.Term())
				check(err)
				at(name + " ends")
				if name == "b" && mode != "succeed" {
					return errSick
				}
				return nil
			}
		}
		at("start")
		for _, name := range []string{"a", "b"} {
			r.OnUndo(name, effect("undo "+name))
			err := do(r, name, effect(name))
			at(name + " is over")
			if err != nil {
				return err
			}
		}
		return nil
	})
	check(e.Launch(context.Background()))
	check(engine.Start(context.Background(), e, "crash", "run", nothing{}, engine.StartOptions{Key: "server/s"}))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := e.Wait(ctx, "run")
	check(err)
	fmt.Println(s.State)
	check(e.Close(ctx))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Kills kills a process -9 from outside, at any instant, over and over, until a run came through.
func Kills(t *testing.T, dsn string, rounds int) {
	for round := range rounds {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(20+17*round)*time.Millisecond)
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), envDSN+"="+dsn, envMode+"=fail", envKill+"=", envDiary+"="+t.TempDir()+"/diary")
		_ = cmd.Run()
		cancel()
	}
	out, err := spawn(t, dsn, "fail", "", t.TempDir()+"/diary")
	if err != nil || strings.TrimSpace(string(out)) != "failed" {
		t.Errorf("it ended as %q, %v", out, err)
	}
}
