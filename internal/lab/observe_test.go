package lab

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/metrics"
)

// scrape gives the metrics of the present process.
func (l *Lab) scrape(t *testing.T) string {
	t.Helper()
	rec := httptest.NewRecorder()
	metrics.Handler(l.Master, "lab", slog.New(slog.DiscardHandler)).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, api.MetricsPath, nil))
	if rec.Code != http.StatusOK {
		t.Fatalf("scrape: %d\n%s", rec.Code, rec.Body)
	}
	return rec.Body.String()
}

func says(t *testing.T, metrics string, want ...string) {
	t.Helper()
	for _, line := range want {
		if !strings.Contains(metrics, "\n"+line) {
			t.Errorf("no line %q among\n%s", line, grep(metrics, line))
		}
	}
}

// grep gives the lines about what a line is about.
func grep(metrics, line string) string {
	name, _, _ := strings.Cut(strings.Fields(line)[0], "{")
	var out []string
	for _, l := range strings.Split(metrics, "\n") {
		if strings.HasPrefix(l, name) {
			out = append(out, l)
		}
	}
	return strings.Join(out, "\n")
}

func TestOneNightIsSeenInTheMetrics(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	rpo := 26 * time.Hour
	if _, err := l.UpdateServer(ctx, "shop", api.ServerChange{RPO: &rpo, Customer: new("acme")}); err != nil {
		t.Fatal(err)
	}
	says(t, l.scrape(t), "muster_up 1", "muster_servers 1", "muster_servers_without_lkg 1", `muster_server_has_lkg{customer="acme",server="shop"} 0`,
		`muster_boot_tests_total{outcome="PASS"} 0`, `muster_operations{kind="protect",state="running"} 0`)
	l.snapshot(t)
	night := l.scrape(t)
	says(t, night, "muster_servers_without_lkg 0", `muster_server_has_lkg{customer="acme",server="shop"} 1`, `muster_boot_tests_total{outcome="PASS"} 1`,
		`muster_snapshots_total{kind="image"} 1`, `muster_capture_read_bytes_total{kind="image"} `, "muster_promotions_total 1",
		`muster_server_rpo_lag_seconds{customer="acme",server="shop"} 0`, `muster_servers_by_last_test{outcome="PASS"} 1`, "muster_ready 1")
	if strings.Contains(night, "muster_store_size_bytes{customer=\"\"} 0\n") || !strings.Contains(night, "muster_store_free_bytes") {
		t.Error("the store was not measured")
	}
	l.Clock.Turn(27 * time.Hour)
	late := l.scrape(t)
	says(t, late, "muster_servers_behind_rpo 1")
	if strings.Contains(late, `muster_server_rpo_lag_seconds{customer="acme",server="shop"} 0`+"\n") {
		t.Error("an hour behind what was promised is no lag")
	}
	// What was counted was since the process began; where things stand is remembered.
	l.Reopen()
	says(t, l.scrape(t), `muster_boot_tests_total{outcome="PASS"} 0`, `muster_server_has_lkg{customer="acme",server="shop"} 1`)
}

func TestWorkThatWaitsAndRunsIsCounted(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	var once sync.Once
	reached, goOn := make(chan struct{}), make(chan struct{})
	l.Fault = func(ctx context.Context, call string) error {
		if call != "before snapshot" {
			return nil
		}
		once.Do(func() { close(reached) })
		select {
		case <-goOn:
		case <-ctx.Done():
		}
		return errors.New("the line is cut")
	}
	first, err := l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	<-reached
	second, err := l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	says(t, l.scrape(t), `muster_operations{kind="protect",state="running"} 1`, `muster_operations{kind="protect",state="queued"} 1`)
	close(goOn)
	l.Finish(first, nil)
	l.Finish(second, nil)
	says(t, l.scrape(t), `muster_operations{kind="protect",state="running"} 0`, `muster_operations{kind="protect",state="queued"} 0`)
}

func TestHealthNamesWhatDoesNotWork(t *testing.T) {
	t.Parallel()
	l := New(t, Healthy)
	if h := l.Master.Health(ctx); !h.Ready || !h.Alive || len(h.Checks) != 5 {
		t.Fatalf("of what works: %+v", h)
	}
	broken := func(name string, alive bool) {
		t.Helper()
		l.Clock.Turn(time.Minute) // past what is remembered
		h := l.Master.Health(ctx)
		if h.Ready || h.Alive != alive {
			t.Errorf("without %s: alive %t, ready %t", name, h.Alive, h.Ready)
		}
		for _, c := range h.Checks {
			if c.OK == (c.Name == name) {
				t.Errorf("without %s: %+v", name, c)
			}
		}
	}
	// The medium with the store is gone.
	if err := os.Rename(l.StoreFolder(), l.StoreFolder()+".away"); err != nil {
		t.Fatal(err)
	}
	broken("store", true)
	if err := os.Rename(l.StoreFolder()+".away", l.StoreFolder()); err != nil {
		t.Fatal(err)
	}
	l.Clock.Turn(time.Minute)
	if h := l.Master.Health(ctx); !h.Ready {
		t.Errorf("after it came back: %+v", h)
	}
	// The scheduler hangs: nobody calls Wake here.
	l.Clock.Turn(time.Hour)
	broken("scheduler", false)
}

func TestAnEngineThatHasStoppedIsNotAlive(t *testing.T) {
	t.Parallel()
	l := New(t, Healthy)
	if err := l.Master.Engine.Close(ctx); err != nil {
		t.Fatal(err)
	}
	h := l.Master.Health(ctx)
	if h.Alive || h.Ready {
		t.Errorf("%+v", h)
	}
}

func TestACustomerIsMeteredForWhatItHad(t *testing.T) {
	t.Parallel()
	l := protectedShop(t, Healthy)
	if _, err := l.UpdateServer(ctx, "shop", api.ServerChange{Customer: new("acme")}); err != nil {
		t.Fatal(err)
	}
	l.snapshot(t)
	op := l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: "shop", By: "ada", Reason: "fire", Network: dr.NetworkChoice{Kind: dr.NetworkNone}}))
	if op.State != api.OperationSucceeded {
		t.Fatal(op.Error)
	}
	l.Clock.Turn(10 * time.Second)
	month := l.Clock.Now().UTC().Format("2006-01")
	list, err := l.Meter(ctx, month, "acme")
	if err != nil || len(list) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	m := list[0]
	if m.Servers != 1 || m.Protected != 1<<20 || m.Stored == 0 || m.Snapshots != 1 {
		t.Errorf("data: %+v", m)
	}
	if m.Invocations.Machines != 1 || m.Invocations.Seconds < 10 || m.Invocations.Memory < 10*512 {
		t.Errorf("an invocation that runs: %+v", m.Invocations)
	}
	if m.Tests.Machines != 1 {
		t.Errorf("tests: %+v", m.Tests)
	}
	if _, err := l.Meter(ctx, month, "nobody"); api.KindOf(err) != api.NotFound {
		t.Errorf("a customer without anything: %v", err)
	}
	if _, err := l.Meter(ctx, "soon", ""); api.KindOf(err) != api.Invalid {
		t.Errorf("a month that is none: %v", err)
	}
}

func TestHowNodesStandAndWhatHappenedToThemIsTold(t *testing.T) {
	t.Parallel()
	l := New(t, Healthy)
	now := time.Now()
	l.Master.Nodes = func() ([]api.NodeFigures, error) {
		return []api.NodeFigures{{Role: "silo", Name: "here", Connected: true, Expires: now.Add(100 * time.Hour)},
			{Role: "appliance", Name: "gone", Customer: "acme", Expires: now.Add(time.Hour)}, {Role: "silo", Name: "out", Revoked: true}, {Role: "silo", Name: home, Connected: true, Expires: now}}, nil
	}
	h := l.Master.Health(ctx)
	i := slices.IndexFunc(h.Checks, func(c api.HealthCheck) bool { return c.Name == "nodes" })
	if i < 0 || !h.Checks[i].OK || !h.Ready {
		t.Fatalf("%+v", h)
	}
	for _, want := range []string{"2 of 3 connected", "appliance gone is away and was never heard of", "certificate of gone ends in 1h", "silo out is revoked", "certificate of " + home + " has expired"} {
		if !strings.Contains(h.Checks[i].Detail, want) {
			t.Errorf("%q is not said in %q", want, h.Checks[i].Detail)
		}
	}
	f, err := l.Master.Figures(ctx)
	if err != nil || len(f.Nodes) != 4 || !f.Nodes[1].Seen.IsZero() || f.Nodes[3].Seen.IsZero() {
		t.Errorf("%+v, %v", f.Nodes, err)
	}
	for range 2 { // a master that is started again tells it again
		l.Master.Witness(ctx, now, "joined", "gone", "appliance gone of customer acme joined")
	}
	l.Master.Witness(ctx, now.Add(time.Minute), "joined", "gone", "appliance gone of customer acme joined")
	if n := l.count(t, "node.joined"); n != 2 {
		t.Errorf("%d events of two joins", n)
	}
}
