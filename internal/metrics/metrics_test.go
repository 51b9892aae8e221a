package metrics

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// installation is an observer that knows what it says.
type installation struct {
	figures api.Figures
	health  api.Health
	err     error
}

func (i installation) Figures(context.Context) (api.Figures, error) { return i.figures, i.err }
func (i installation) Health(context.Context) api.Health            { return i.health }

var now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// full has something of everything, and n servers.
func full(n int) installation {
	f := api.Figures{At: now, Started: now.Add(-time.Hour), Tickets: map[string]int{"test-failed": 2}, Invocations: 1,
		Operations: []api.OperationFigures{{Kind: "protect", State: api.OperationQueued, N: 3}},
		Since: api.Counts{Verdicts: map[dr.Outcome]int64{dr.Pass: 4, dr.Fail: 1},
			Snapshots:  map[dr.SnapshotKind]api.SnapshotCounts{dr.SnapshotImage: {N: 5, Read: 1000, Changed: 400, Sent: 200, New: 100, Stored: 50}},
			Arrivals:   map[dr.SnapshotKind]api.ArrivalCounts{dr.SnapshotImage: {N: 2, Changed: 300, Sent: 60}, dr.SnapshotData: {N: 1, Changed: 100, Sent: 40}},
			Promotions: 4, Expired: 2, Invocations: 1},
		Stores: []api.StoreFigures{{At: now, Bytes: 1 << 30, Free: 1 << 40}, {Customer: "acme", At: now, Bytes: 1 << 20, Free: -1}},
		Nodes: []api.NodeFigures{{Role: "silo", Name: "silo-1", Connected: true, Seen: now.Add(-5 * time.Second), Expires: now.Add(24 * time.Hour)},
			{Role: "appliance", Name: "box", Customer: "acme", Seen: now.Add(-time.Hour), Expires: now.Add(-time.Minute)}, {Role: "silo", Name: "silo-2", Revoked: true}}}
	for k := range n {
		s := api.ServerFigures{Name: fmt.Sprintf("s%05d", k), Customer: "acme", Promised: dr.Objectives{RPO: 24 * time.Hour},
			Created: now.Add(-90 * 24 * time.Hour), LKG: now.Add(-30 * time.Hour), Newest: now.Add(-time.Hour), Outcome: dr.Pass}
		if k == 0 {
			s.LKG, s.Outcome, s.Created = time.Time{}, "", now.Add(-25*time.Hour)
		}
		f.Servers = append(f.Servers, s)
	}
	return installation{figures: f, health: api.Health{Alive: true, Ready: true, Checks: []api.HealthCheck{{Name: "catalog", OK: true}}}}
}

func registry(t *testing.T, o api.Observer) *prometheus.Registry {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(collector{o, "1.0", slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestNamesKeepTheRulesOfPrometheus(t *testing.T) {
	problems, err := testutil.GatherAndLint(registry(t, full(2)))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	if n, err := testutil.GatherAndCount(registry(t, full(2))); err != nil || n < 40 {
		t.Errorf("%d series were looked at, %v", n, err)
	}
}

func TestFiguresAreWhatTheyAreOf(t *testing.T) {
	want := `
# HELP muster_capture_dedupe_ratio Of the bytes that changed since the process started, the part that the store had already, 0 to 1. Missing while nothing changed.
# TYPE muster_capture_dedupe_ratio gauge
muster_capture_dedupe_ratio 0.75
# HELP muster_node_certificate_left_seconds For how long the node's certificate is still good; negative: it has expired. Missing while it has none.
# TYPE muster_node_certificate_left_seconds gauge
muster_node_certificate_left_seconds{customer="",node="silo-1",role="silo"} 86400
muster_node_certificate_left_seconds{customer="acme",node="box",role="appliance"} -60
# HELP muster_node_connected 1 if an appliance or silo on another machine is connected, 0 if not.
# TYPE muster_node_connected gauge
muster_node_connected{customer="",node="silo-1",role="silo"} 1
muster_node_connected{customer="",node="silo-2",role="silo"} 0
muster_node_connected{customer="acme",node="box",role="appliance"} 0
# HELP muster_node_revoked 1 if the node is let in no more, 0 if it is.
# TYPE muster_node_revoked gauge
muster_node_revoked{customer="",node="silo-1",role="silo"} 0
muster_node_revoked{customer="",node="silo-2",role="silo"} 1
muster_node_revoked{customer="acme",node="box",role="appliance"} 0
# HELP muster_node_seen_age_seconds How long ago the node was last heard of. Missing if it never was.
# TYPE muster_node_seen_age_seconds gauge
muster_node_seen_age_seconds{customer="",node="silo-1",role="silo"} 5
muster_node_seen_age_seconds{customer="acme",node="box",role="appliance"} 3600
# HELP muster_oldest_lkg_age_seconds Age of the oldest last-known-good; a server without one counts from when it was added.
# TYPE muster_oldest_lkg_age_seconds gauge
muster_oldest_lkg_age_seconds 108000
# HELP muster_server_has_lkg 1 if the server has a last-known-good, 0 if not.
# TYPE muster_server_has_lkg gauge
muster_server_has_lkg{customer="acme",server="s00000"} 0
muster_server_has_lkg{customer="acme",server="s00001"} 1
# HELP muster_server_lkg_age_seconds Age of what the server's last-known-good shows. Missing while it has none.
# TYPE muster_server_lkg_age_seconds gauge
muster_server_lkg_age_seconds{customer="acme",server="s00001"} 108000
# HELP muster_server_rpo_lag_seconds By how much more than promised a disaster now would lose. Missing if nothing was promised.
# TYPE muster_server_rpo_lag_seconds gauge
muster_server_rpo_lag_seconds{customer="acme",server="s00000"} 3600
muster_server_rpo_lag_seconds{customer="acme",server="s00001"} 21600
# HELP muster_servers_behind_rpo Protected servers whose last-known-good is older than was promised.
# TYPE muster_servers_behind_rpo gauge
muster_servers_behind_rpo 2
# HELP muster_boot_tests_total Boot tests since the process started, by outcome.
# TYPE muster_boot_tests_total counter
muster_boot_tests_total{outcome="FAIL"} 1
muster_boot_tests_total{outcome="PASS"} 4
# HELP muster_replicated_bytes_total Bytes that crossed the line for them.
# TYPE muster_replicated_bytes_total counter
muster_replicated_bytes_total{kind="data"} 40
muster_replicated_bytes_total{kind="image"} 60
# HELP muster_transfer_ratio Bytes that crossed the line for snapshots that arrived since the process started, over the bytes that had changed in them. Missing while none arrived.
# TYPE muster_transfer_ratio gauge
muster_transfer_ratio 0.25
`
	err := testutil.GatherAndCompare(registry(t, full(2)), strings.NewReader(want), "muster_capture_dedupe_ratio", "muster_oldest_lkg_age_seconds",
		"muster_node_certificate_left_seconds", "muster_node_connected", "muster_node_revoked", "muster_node_seen_age_seconds",
		"muster_server_has_lkg", "muster_server_lkg_age_seconds", "muster_server_rpo_lag_seconds", "muster_servers_behind_rpo", "muster_boot_tests_total",
		"muster_replicated_bytes_total", "muster_transfer_ratio")
	if err != nil {
		t.Error(err)
	}
}

func TestSeriesAreBounded(t *testing.T) {
	few, err := testutil.GatherAndCount(registry(t, full(MaxServers)))
	if err != nil {
		t.Fatal(err)
	}
	many, err := testutil.GatherAndCount(registry(t, full(MaxServers+1000)))
	if err != nil {
		t.Fatal(err)
	}
	if few != many || few > 5*MaxServers+200 {
		t.Errorf("%d series for %d servers, %d for a thousand more", few, MaxServers, many)
	}
}

func TestWhatCannotBeReadIsSaid(t *testing.T) {
	broken := full(1)
	broken.err = errors.New("the disk is on fire")
	if err := testutil.GatherAndCompare(registry(t, broken), strings.NewReader(`
# HELP muster_up Whether the figures could be read; 0: the others of this scrape are missing.
# TYPE muster_up gauge
muster_up 0
`), "muster_up"); err != nil {
		t.Error(err)
	}
	if n, _ := testutil.GatherAndCount(registry(t, broken), "muster_servers"); n != 0 {
		t.Error("a figure that could not be read was given")
	}
}

func TestHealthAnswersWithAStatusAndDetails(t *testing.T) {
	for _, c := range []struct {
		alive, ready bool
		path         string
		want         int
	}{
		{true, true, api.AlivePath, 200}, {true, true, api.ReadyPath, 200},
		{true, false, api.AlivePath, 200}, {true, false, api.ReadyPath, 503},
		{false, false, api.AlivePath, 503},
	} {
		o := installation{health: api.Health{Alive: c.alive, Ready: c.ready, Checks: []api.HealthCheck{{Name: "store", OK: c.ready, Detail: "so"}}}}
		rec := httptest.NewRecorder()
		Handler(o, "1", slog.New(slog.DiscardHandler)).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, c.path, nil))
		var h api.Health
		if err := json.Unmarshal(rec.Body.Bytes(), &h); err != nil || rec.Code != c.want || len(h.Checks) != 1 || h.Checks[0].Detail != "so" {
			t.Errorf("%+v: status %d, %s", c, rec.Code, rec.Body)
		}
	}
}

func TestNothingCanBeChangedThroughIt(t *testing.T) {
	for _, path := range []string{api.MetricsPath, api.AlivePath, api.ReadyPath} {
		rec := httptest.NewRecorder()
		Handler(full(1), "1", slog.New(slog.DiscardHandler)).ServeHTTP(rec, httptest.NewRequest(http.MethodPost, path, nil))
		if rec.Code != http.StatusMethodNotAllowed {
			t.Errorf("POST %s: %d", path, rec.Code)
		}
	}
}
