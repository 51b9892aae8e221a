package enginetest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/engine"
)

// Hosts is what several processes promise that share a database of runs. dsn gives the address of an empty database,
// another one at each call; bare gives one without any table.
func Hosts(t *testing.T, dsn, bare func(t *testing.T) string) {
	for name, test := range map[string]func(t *testing.T, dsn string){
		"what one host carries out is seen, waited for and cancelled from another": elsewhere,
		"two runs of one key never run at once over all hosts":                     exclusionOverHosts,
		"of two hosts that start at once on one key one is refused":                refusesOverHosts,
		"a host that ends in order leaves its runs to the others":                  handsOver,
		"one host leads, and another when it ends":                                 leads,
		"a host that starts anew takes back what it left":                          sameName,
		"a host that was stopped and wakes up comes too late":                      wakesUp,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, dsn(t))
		})
	}
	t.Run("hosts that start at once make the tables once", func(t *testing.T) {
		t.Parallel()
		startAtOnce(t, bare(t))
	})
}

// KillOne kills one of two hosts -9 at every point of a run that is cancelled on its way, which has every kind of point;
// the other one carries it to its end.
func KillOne(t *testing.T, dsn func(t *testing.T) string) {
	for _, point := range points("cancel") {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			killOne(t, dsn(t), "cancel", point)
		})
	}
}

func elsewhere(t *testing.T, dsn string) {
	var where atomic.Value
	began := make(chan struct{}, 9)
	register := func(host string) func(e *engine.Engine) {
		return func(e *engine.Engine) {
			engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
				return do(r, "a", func(ctx context.Context) error {
					where.Store(host)
					r.Report("read", 3, 7, "blocks")
					return hang(began)(ctx)
				})
			})
		}
	}
	hosts := map[string]world{}
	for _, name := range []string{"a", "b"} {
		hosts[name] = openHost(t, dsn, "1", name, register(name))
	}
	hosts["a"].start("k", "run")
	await(t, "the step", began)
	here := where.Load().(string)
	other := hosts[map[string]string{"a": "b", "b": "a"}[here]]
	want := engine.Progress{Part: "read", Done: 3, Total: 7, Unit: "blocks"}
	until(t, "its progress is seen", func() bool {
		s, err := other.Status(context.Background(), "run")
		if err != nil {
			t.Fatal(err)
		}
		return s.State == engine.Running && s.Host == here && s.Step == "a" && s.Progress != nil && *s.Progress == want
	})
	list, err := other.List(context.Background(), engine.Filter{Unfinished: true})
	if err != nil || len(list) != 1 || list[0].Step != "a" || list[0].Host != here {
		t.Errorf("list %+v, %v", list, err)
	}
	if err := other.Cancel(context.Background(), "run"); err != nil {
		t.Fatal(err)
	}
	other.wait("run", engine.Cancelled)
}

// until waits until something is so.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(patience); !so(); {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("it did not come to be that %s", what)
		}
	}
}

func exclusionOverHosts(t *testing.T, dsn string) {
	const n = 24
	var inside, most, total atomic.Int32
	var hosts []world
	for range 3 {
		hosts = append(hosts, open(t, dsn, "1", func(e *engine.Engine) {
			engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
				most.Store(max(most.Load(), inside.Add(1)))
				defer inside.Add(-1)
				total.Add(1)
				return do(r, "a", fine)
			})
		}))
	}
	var starting sync.WaitGroup
	for i := range n {
		starting.Go(func() {
			if err := engine.Start(context.Background(), hosts[i%len(hosts)].Engine, "k", fmt.Sprint("run", i), nothing{}, engine.StartOptions{Key: "server/s"}); err != nil {
				t.Error(err)
			}
		})
	}
	starting.Wait()
	for i := range n {
		hosts[0].wait(fmt.Sprint("run", i), engine.Succeeded)
	}
	if most.Load() != 1 || total.Load() != n {
		t.Errorf("%d at once, %d in all", most.Load(), total.Load())
	}
}

func refusesOverHosts(t *testing.T, dsn string) {
	const n = 6
	goOn := make(chan struct{})
	var hosts []world
	for range 2 {
		hosts = append(hosts, open(t, dsn, "1", func(e *engine.Engine) {
			engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
				return do(r, "a", func(context.Context) error { <-goOn; return nil })
			})
		}))
	}
	var started, busy atomic.Int32
	var starting sync.WaitGroup
	for i := range n {
		starting.Go(func() {
			err := engine.Start(context.Background(), hosts[i%2].Engine, "k", fmt.Sprint("run", i), nothing{}, engine.StartOptions{Key: "server/s", Refuse: true})
			switch {
			case err == nil:
				started.Add(1)
			case errors.Is(err, engine.ErrBusy):
				busy.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	starting.Wait()
	close(goOn)
	if started.Load() != 1 || busy.Load() != n-1 {
		t.Errorf("%d were started and %d refused", started.Load(), busy.Load())
	}
}

func handsOver(t *testing.T, dsn string) {
	var second atomic.Bool
	began := make(chan struct{}, 1)
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			return do(r, "a", func(ctx context.Context) error {
				if second.Load() {
					return nil
				}
				return hang(began)(ctx)
			})
		})
	}
	a := open(t, dsn, "1", register)
	a.start("k", "run")
	await(t, "the step", began)
	second.Store(true)
	b := open(t, dsn, "1", register)
	a.close()
	if s := b.wait("run", engine.Succeeded); s.Starts != 2 {
		t.Errorf("started %d times", s.Starts)
	}
}

func leads(t *testing.T, dsn string) {
	a, b := open(t, dsn, "1", func(*engine.Engine) {}), open(t, dsn, "1", func(*engine.Engine) {})
	leading := func(w world) bool {
		leads, err := w.Leads(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		return leads
	}
	if !leading(a) || leading(b) {
		t.Error("not the first one leads, or both do")
	}
	a.close()
	if !leading(b) {
		t.Error("nobody leads")
	}
	if _, err := a.Leads(context.Background()); !errors.Is(err, engine.ErrClosed) {
		t.Errorf("an engine that is closed: %v", err)
	}
}

func sameName(t *testing.T, dsn string) {
	var second atomic.Bool
	began := make(chan struct{}, 1)
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			return do(r, "a", func(ctx context.Context) error {
				if second.Load() {
					return nil
				}
				return hang(began)(ctx)
			})
		})
	}
	a := openHost(t, dsn, "1", "site", register)
	a.start("k", "run")
	await(t, "the step", began)
	second.Store(true)
	b := openHost(t, dsn, "1", "site", register) // as if the first one's process had died
	b.wait("run", engine.Succeeded)
	await(t, "the end of the first", a.Lost())
	if err := engine.Start(context.Background(), a.Engine, "k", "late", nothing{}); err == nil {
		t.Error("a host that was given up started a run")
	}
	if _, err := b.Status(context.Background(), "late"); !errors.Is(err, engine.ErrNotFound) {
		t.Errorf("what it would have started: %v", err)
	}
}

func startAtOnce(t *testing.T, dsn string) {
	const n = 3
	var opening sync.WaitGroup
	engines := make([]*engine.Engine, n)
	for i := range n {
		opening.Go(func() {
			e, err := engine.Open(context.Background(), engine.Config{DSN: dsn, Version: "1", Lease: testLease, Logger: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Error(err)
				return
			}
			engine.Register(e, "k", func(r *engine.Run, _ nothing) error { return do(r, "a", fine) })
			if err := e.Launch(context.Background()); err != nil {
				t.Error(err)
			}
			engines[i] = e
		})
	}
	opening.Wait()
	for i, e := range engines {
		if e == nil {
			continue
		}
		w := world{e, t}
		t.Cleanup(w.close)
		w.start("k", fmt.Sprint("run", i))
		w.wait(fmt.Sprint("run", i), engine.Succeeded)
	}
}

// killOne runs two processes that want the same run. Whichever carries it out dies at a point, once.
func killOne(t *testing.T, dsn, mode, point string) {
	diary, once := t.TempDir()+"/diary", t.TempDir()+"/died"
	var died atomic.Int32
	var running sync.WaitGroup
	want := map[string]string{"succeed": "succeeded", "fail": "failed", "cancel": "cancelled"}[mode]
	for _, host := range []string{"a", "b"} {
		running.Go(func() {
			out, err := spawnHost(t, dsn, mode, point, diary, host, once)
			switch {
			case err != nil:
				died.Add(1)
			case strings.TrimSpace(string(out)) != want:
				t.Errorf("it ended as %q; want %s", out, want)
			}
		})
	}
	running.Wait()
	if died.Load() != 1 {
		t.Errorf("%d of two died", died.Load())
	}
	effects := map[string]string{"succeed": "a b", "fail": "a b undo-b undo-a", "cancel": "a b undo-b undo-a"}[mode]
	if got := onceEach(t, diary); got != effects {
		t.Errorf("happened %s\nwant     %s", got, effects)
	}
}

// onceEach reads a diary: its effects, where one that was repeated in place, under a higher term, counts once.
func onceEach(t *testing.T, file string) string {
	t.Helper()
	body, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	last := int64(0)
	for line := range strings.Lines(string(body)) {
		effect, text, _ := strings.Cut(strings.TrimSpace(line), "@")
		term, err := strconv.ParseInt(text, 10, 64)
		if err != nil || term < last {
			t.Errorf("%s under term %q after %d", effect, text, last)
		}
		effect = strings.ReplaceAll(effect, " ", "-")
		if n := len(got); n == 0 || got[n-1] != effect || term == last {
			got = append(got, effect)
		}
		last = term
	}
	return strings.Join(got, " ")
}

// What a zombie test tells its child.
const zombieMode = "zombie"

// wakesUp stops a host in the middle of a step, lets another one carry on, and wakes it up: what its step would record
// does not count, and whoever knows fencing numbers refuses its.
func wakesUp(t *testing.T, dsn string) {
	fence := filepath.Join(t.TempDir(), "term")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envDSN+"="+dsn, envMode+"="+zombieMode, envDiary+"="+fence, envHost+"=zombie")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	said := bufio.NewScanner(stdout)
	hear := func(want string) {
		t.Helper()
		if !said.Scan() || said.Text() != want {
			t.Fatalf("the other host said %q; want %q", said.Text(), want)
		}
	}
	hear("in the step")
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	w := openHost(t, dsn, "1", "rescuer", func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
			out, err := engine.Step(r, "act", engine.StepOptions{}, func(context.Context) (string, error) {
				return "the rescuer's", act(fence, r.Term())
			})
			if err == nil && out != "the rescuer's" {
				t.Errorf("the step's result is %s", out)
			}
			return err
		})
	})
	s := w.wait("run", engine.Succeeded)
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "go on\n"); err != nil {
		t.Fatal(err)
	}
	if !said.Scan() || !strings.HasPrefix(said.Text(), "refused: term ") {
		t.Errorf("what a host did that was given up: %q", said.Text())
	}
	hear("lost")
	if err := cmd.Wait(); err != nil {
		t.Errorf("the host that was given up: %v", err)
	}
	again, err := w.Status(context.Background(), "run")
	if err != nil || again.State != engine.Succeeded || again.Term != s.Term || again.Starts != 2 {
		t.Errorf("after the other woke up: %+v, %v", again, err)
	}
	if steps, err := w.Steps(context.Background(), "run"); err != nil || len(steps) != 1 || steps[0].Error != "" {
		t.Errorf("steps %+v, %v", steps, err)
	}
	if _, err := w.Status(context.Background(), "late"); !errors.Is(err, engine.ErrNotFound) {
		t.Errorf("what a host started that was given up: %v", err)
	}
}

// act stands for whatever a step does to the world: it refuses a term lower than one it has seen.
func act(file string, term int64) error {
	if body, err := os.ReadFile(file); err == nil {
		seen, err := strconv.ParseInt(string(body), 10, 64)
		if err != nil || term < seen {
			return fmt.Errorf("refused: term %d after %s", term, body)
		}
	}
	return os.WriteFile(file, []byte(strconv.FormatInt(term, 10)), 0o600)
}

// zombie is the process that is stopped. Its step does not look at its context, and goes on as soon as it is awake.
func zombie() {
	e, err := engine.Open(context.Background(), engine.Config{DSN: os.Getenv(envDSN), Version: "1", Host: os.Getenv(envHost), Lease: testLease,
		Logger: slog.New(slog.DiscardHandler)})
	check(err)
	acted := make(chan struct{})
	engine.Register(e, "k", func(r *engine.Run, _ nothing) error {
		defer close(acted)
		_, err := engine.Step(r, "act", engine.StepOptions{}, func(context.Context) (string, error) {
			check(act(os.Getenv(envDiary), r.Term()))
			fmt.Println("in the step")
			_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
			fmt.Println(act(os.Getenv(envDiary), r.Term()))
			return "the zombie's", nil
		})
		return err
	})
	check(e.Launch(context.Background()))
	check(engine.Start(context.Background(), e, "k", "run", nothing{}))
	<-e.Lost()
	if err := engine.Start(context.Background(), e, "k", "late", nothing{}); err == nil {
		fmt.Println("started a run all the same")
	}
	<-acted
	fmt.Println("lost")
	check(e.Close(context.Background()))
}

// Disturb does something to the database again and again while two hosts work: restarts it, or turns its clock. Every run
// comes to its end, one of a key at a time, no step that had ended is repeated, and no host is given up.
func Disturb(t *testing.T, dsn string, disturb func()) {
	const keys, each = 4, 4
	var mu sync.Mutex
	inside, done := map[string]int{}, map[string]int{}
	register := func(e *engine.Engine) {
		engine.Register(e, "k", func(r *engine.Run, in string) error {
			mu.Lock()
			inside[in]++
			if inside[in] > 1 {
				t.Errorf("two runs of %s at once", in)
			}
			mu.Unlock()
			defer func() { mu.Lock(); inside[in]--; mu.Unlock() }()
			for n := range 8 {
				name := fmt.Sprint("step ", n)
				if err := do(r, name, func(ctx context.Context) error {
					mu.Lock()
					done[r.ID()+name]++
					mu.Unlock()
					select {
					case <-time.After(20 * time.Millisecond): // work
					case <-ctx.Done():
					}
					return ctx.Err()
				}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	hosts := []world{openHost(t, dsn, "1", "a", register), openHost(t, dsn, "1", "b", register)}
	for i := range keys * each {
		key := fmt.Sprint("key", i%keys)
		if err := engine.Start(context.Background(), hosts[i%2].Engine, "k", fmt.Sprint("run", i), key, engine.StartOptions{Key: key}); err != nil {
			t.Fatal(err)
		}
		if i%6 == 3 {
			disturb()
		}
	}
	disturb()
	for i := range keys * each {
		hosts[i%2].wait(fmt.Sprint("run", i), engine.Succeeded)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(done) != keys*each*8 {
		t.Errorf("%d steps were taken", len(done))
	}
	for step, n := range done {
		if n != 1 {
			t.Errorf("%s was taken %d times", step, n)
		}
	}
	for _, host := range hosts {
		select {
		case <-host.Lost():
			t.Error("a host was given up")
		default:
		}
	}
}
