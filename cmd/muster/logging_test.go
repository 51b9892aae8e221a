package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
)

// lines is a log that can be read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// opened gives a log, and puts back what was before.
func opened(t *testing.T, f logFlags, out *lines) *slog.Logger {
	t.Helper()
	before := slog.Default()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); slog.SetDefault(before) })
	log, err := f.open(ctx, out)
	if err != nil {
		t.Fatal(err)
	}
	return log
}

func TestOneNightsStoryCanBeFoundInTheLog(t *testing.T) {
	var out lines
	log := opened(t, logFlags{"json", "debug"}, &out)
	ctx, dir := context.Background(), t.TempDir()
	cat, err := catalog.Open(ctx, filepath.Join(dir, "catalog.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer cat.Close()
	cat.Told = tell(log)
	eng, err := engine.Open(ctx, engine.Config{DSN: filepath.Join(dir, "engine.db"), Version: "1", Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	defer eng.Close(ctx)
	engine.Register(eng, "protect", func(r *engine.Run, server dr.Server) error {
		_, err := engine.Step(r, "capture", engine.StepOptions{}, func(ctx context.Context) (bool, error) {
			slog.WarnContext(ctx, "said by a part that has never heard of operations", "snapshot", "snap-1")
			return true, cat.AddServer(ctx, server)
		})
		return err
	})
	if err := eng.Launch(ctx); err != nil {
		t.Fatal(err)
	}
	const id = "protect.shop.snap-1"
	server := dr.Server{ID: "srv-1", Name: "shop", Source: dr.Source{Disks: []string{"/x"}}}
	if err := engine.Start(ctx, eng, "protect", id, server, engine.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	if s, err := eng.Wait(ctx, id); err != nil || s.State != engine.Succeeded {
		t.Fatalf("%+v, %v", s, err)
	}
	told := map[string]bool{}
	for _, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		var said map[string]any
		if err := json.Unmarshal([]byte(line), &said); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if said["operation"] == id {
			told[fmt.Sprint(said["msg"])] = true
		}
		if said["msg"] == "event" && (said["kind"] != "server.added" || said["server"] != "shop") {
			t.Errorf("an event says %v", said)
		}
	}
	for _, want := range []string{"step begins", "said by a part that has never heard of operations", "event", "step over", "run over"} {
		if !told[want] {
			t.Errorf("nothing of operation %s says %q:\n%s", id, want, out.String())
		}
	}
}

func TestTheJournalGetsNoSecondTime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	for journal, times := range map[string]int{fmt.Sprintf("%d:%d", st.Dev, st.Ino): 0, "1:1": 1, "": 1} {
		t.Setenv("JOURNAL_STREAM", journal)
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
		before := slog.Default()
		ctx, cancel := context.WithCancel(context.Background())
		flags := logFlags{"text", "info"}
		log, err := flags.open(ctx, f)
		cancel()
		slog.SetDefault(before)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("hello")
		text, err := os.ReadFile(path)
		if err != nil || strings.Count(string(text), "time=") != times || !strings.Contains(string(text), "hello") {
			t.Errorf("JOURNAL_STREAM=%s: %q, %v", journal, text, err)
		}
	}
}

func TestTheLevelIsChangedWhileItRuns(t *testing.T) {
	var out lines
	log := opened(t, logFlags{"text", "info"}, &out)
	toggled := func(says string) {
		t.Helper()
		if err := syscall.Kill(os.Getpid(), syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * time.Second); !strings.Contains(out.String(), says); {
			if time.Now().After(deadline) {
				t.Fatalf("no %q in\n%s", says, out.String())
			}
			time.Sleep(time.Millisecond)
		}
	}
	log.Debug("first")
	toggled("level=DEBUG\n")
	log.Debug("second")
	toggled("level=INFO\n")
	log.Debug("third")
	if got := out.String(); strings.Contains(got, "first") || !strings.Contains(got, "second") || strings.Contains(got, "third") {
		t.Error(got)
	}
}

func TestMetricsAreServedOnLoopbackOnly(t *testing.T) {
	p := &platform{log: slog.New(slog.DiscardHandler)}
	defer p.close()
	for _, address := range []string{"0.0.0.0:0", "192.0.2.1:9411", ":9411", "[::]:0", "example.com:80", "127.0.0.1", "unix:/x"} {
		if err := p.listenMetrics(address, nil); exitCode(err) != exitUsage {
			t.Errorf("%s: %v", address, err)
		}
	}
	for _, address := range []string{"127.0.0.1:0", "localhost:0"} {
		if err := p.listenMetrics(address, nil); err != nil {
			t.Errorf("%s: %v", address, err)
		}
	}
}
