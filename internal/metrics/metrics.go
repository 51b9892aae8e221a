// Package metrics shows an installation to monitoring: its figures in the form of Prometheus, and its health as two yes-or-no
// questions with details.
//
//	Handler    /metrics, /healthz, /readyz over HTTP
//	collector  asks an api.Observer at each scrape and forgets; nothing is counted here
//
// A name says what it is of, its unit last. Series are few: one of each name for the installation, by short closed lists of
// kinds, five for each server, of at most MaxServers servers, and four for each node.
//
// Knows: Prometheus.
// Must not know: where a figure comes from.
package metrics

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// MaxServers is for how many servers there are series of their own, the first by name. What is said of all of them together
// counts every one.
const MaxServers = 20_000

// scrapeLimit is how long one scrape may take.
const scrapeLimit = 30 * time.Second

// maxScrapes is how many may be under way at once; others are told to come back.
const maxScrapes = 4

// Handler offers an Observer to monitoring, read-only, under api.MetricsPath, AlivePath and ReadyPath. It asks nobody who they are:
// whoever serves it says who can reach it.
func Handler(o api.Observer, version string, log *slog.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{o, version, log}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET "+api.MetricsPath, promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: maxScrapes, ErrorLog: errorLog{log}}))
	mux.HandleFunc("GET "+api.AlivePath, health(o, func(h api.Health) bool { return h.Alive }))
	mux.HandleFunc("GET "+api.ReadyPath, health(o, func(h api.Health) bool { return h.Ready }))
	return mux
}

// health answers a question about health, and says why.
func health(o api.Observer, well func(api.Health) bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		h := o.Health(r.Context())
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		if !well(h) {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_ = json.NewEncoder(w).Encode(h) // who asked has gone
	}
}

// errorLog is what the library writes its complaints to.
type errorLog struct{ log *slog.Logger }

func (l errorLog) Println(v ...any) { l.log.Error("answer scrape", "error", v) }

// collector is a prometheus.Collector over an observer.
type collector struct {
	observer api.Observer
	version  string
	log      *slog.Logger
}

var (
	one      = []string{}
	byServer = []string{"server", "customer"}
	byNode   = []string{"node", "role", "customer"}

	buildInfo = desc("build_info", "Which release this is; always 1.", "version", "goversion")
	up        = desc("up", "Whether the figures could be read; 0: the others of this scrape are missing.", one...)
	started   = desc("start_time_seconds", "When this process started, in seconds since 1970.", one...)

	servers    = desc("servers", "Servers that are protected.", one...)
	withoutLKG = desc("servers_without_lkg", "Protected servers of which no image has passed a test.", one...)
	behindRPO  = desc("servers_behind_rpo", "Protected servers whose last-known-good is older than was promised.", one...)
	oldestLKG  = desc("oldest_lkg_age_seconds", "Age of the oldest last-known-good; a server without one counts from when it was added.", one...)
	byOutcome  = desc("servers_by_last_test", "Protected servers by the outcome of their last boot test; NONE: none was held.", "outcome")

	lkgAge      = desc("server_lkg_age_seconds", "Age of what the server's last-known-good shows. Missing while it has none.", byServer...)
	hasLKG      = desc("server_has_lkg", "1 if the server has a last-known-good, 0 if not.", byServer...)
	snapshotAge = desc("server_snapshot_age_seconds", "Age of the server's newest snapshot, tested or not. Missing while it has none.", byServer...)
	rpo         = desc("server_rpo_promised_seconds", "Promised recovery point of the server. Missing if nothing was promised.", byServer...)
	rpoLag      = desc("server_rpo_lag_seconds", "By how much more than promised a disaster now would lose. Missing if nothing was promised.", byServer...)

	operations  = desc("operations", "Unfinished operations by kind, waiting (queued) or under way (running).", "kind", "state")
	tickets     = desc("tickets_open", "Open problems by kind.", "problem")
	invocations = desc("invocations_active", "Rescue machines that run for real.", one...)

	snapshotsTaken = desc("snapshots_total", "Snapshots recorded since the process started.", "kind")
	expired        = desc("snapshots_expired_total", "Snapshots given up since the process started.", one...)
	verdicts       = desc("boot_tests_total", "Boot tests since the process started, by outcome.", "outcome")
	promotions     = desc("promotions_total", "Moves of last-known-good since the process started.", one...)
	invoked        = desc("invocations_total", "Invocations that came to run since the process started.", one...)
	readBytes      = desc("capture_read_bytes_total", "Bytes read from servers for snapshots.", "kind")
	changedBytes   = desc("capture_changed_bytes_total", "Bytes of them that differed from the snapshot before.", "kind")
	sentBytes      = desc("capture_sent_bytes_total", "Bytes that crossed the wire from servers.", "kind")
	newBytes       = desc("capture_new_bytes_total", "Bytes that the store did not have yet, before compression.", "kind")
	storedBytes    = desc("capture_stored_bytes_total", "Bytes by which the store grew, after compression and sealing.", "kind")
	dedupe         = desc("capture_dedupe_ratio", "Of the bytes that changed since the process started, the part that the store had already, 0 to 1. Missing while nothing changed.", one...)

	arrived       = desc("replicated_snapshots_total", "Snapshots that came into the far store over the line since the process started.", "kind")
	arrivedBytes  = desc("replicated_bytes_total", "Bytes that crossed the line for them.", "kind")
	transferRatio = desc("transfer_ratio", "Bytes that crossed the line for snapshots that arrived since the process started, over the bytes that had changed in them. Missing while none arrived.", one...)

	storeBytes = desc("store_size_bytes", "Bytes of everything in a store, by the customer whose far store it is, empty for the installation's own; measured every few minutes.", "customer")
	storeFree  = desc("store_free_bytes", "Bytes free where a store lies. Missing where that is not known.", "customer")

	nodeConnected = desc("node_connected", "1 if an appliance or silo on another machine is connected, 0 if not.", byNode...)
	nodeSeen      = desc("node_seen_age_seconds", "How long ago the node was last heard of. Missing if it never was.", byNode...)
	nodeLeft      = desc("node_certificate_left_seconds", "For how long the node's certificate is still good; negative: it has expired. Missing while it has none.", byNode...)
	nodeRevoked   = desc("node_revoked", "1 if the node is let in no more, 0 if it is.", byNode...)

	healthy = desc("health", "1 if a part of the platform works, 0 if not: scheduler, engine, catalog, store, silo, nodes.", "check")
	ready   = desc("ready", "1 if everything that protecting needs works.", one...)
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("muster_"+name, help, labels, nil)
}

// Describe implements prometheus.Collector. It says nothing: what is missing now may come.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(to chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeLimit)
	defer cancel()
	out := sink{to}
	out.gauge(buildInfo, 1, c.version, runtime.Version())
	h := c.observer.Health(ctx)
	for _, check := range h.Checks {
		out.gauge(healthy, number(check.OK), check.Name)
	}
	out.gauge(ready, number(h.Ready))
	f, err := c.observer.Figures(ctx)
	out.gauge(up, number(err == nil))
	if err != nil {
		c.log.Error("read figures", "error", err)
		return
	}
	out.gauge(started, float64(f.Started.UnixMilli())/1e3)
	out.servers(f)
	out.each(f)
	out.work(f)
	out.counts(f.Since)
	out.nodes(f)
	for _, st := range f.Stores {
		out.gauge(storeBytes, float64(st.Bytes), st.Customer)
		if st.Free >= 0 {
			out.gauge(storeFree, float64(st.Free), st.Customer)
		}
	}
}

type sink struct{ to chan<- prometheus.Metric }

func (s sink) gauge(d *prometheus.Desc, v float64, labels ...string) {
	s.to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func (s sink) counter(d *prometheus.Desc, v int64, labels ...string) {
	s.to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// servers says where all servers stand together.
func (s sink) servers(f api.Figures) {
	none, behind, oldest := 0, 0, time.Duration(0)
	outcomes := map[dr.Outcome]int{dr.Pass: 0, dr.Fail: 0, dr.Blocked: 0, dr.Inconclusive: 0, "NONE": 0}
	for _, srv := range f.Servers {
		if srv.LKG.IsZero() {
			none++
		}
		if srv.Lag(f.At) > 0 {
			behind++
		}
		oldest = max(oldest, srv.Age(f.At))
		if srv.Outcome == "" {
			srv.Outcome = "NONE"
		}
		outcomes[srv.Outcome]++
	}
	s.gauge(servers, float64(len(f.Servers)))
	s.gauge(withoutLKG, float64(none))
	s.gauge(behindRPO, float64(behind))
	s.gauge(oldestLKG, oldest.Seconds())
	for outcome, n := range outcomes {
		s.gauge(byOutcome, float64(n), string(outcome))
	}
}

// each says where each server stands.
func (s sink) each(f api.Figures) {
	for i, srv := range f.Servers {
		if i == MaxServers {
			return
		}
		s.gauge(hasLKG, number(!srv.LKG.IsZero()), srv.Name, srv.Customer)
		if !srv.LKG.IsZero() {
			s.gauge(lkgAge, srv.Age(f.At).Seconds(), srv.Name, srv.Customer)
		}
		if !srv.Newest.IsZero() {
			s.gauge(snapshotAge, f.At.Sub(srv.Newest).Seconds(), srv.Name, srv.Customer)
		}
		if srv.Promised.RPO > 0 {
			s.gauge(rpo, srv.Promised.RPO.Seconds(), srv.Name, srv.Customer)
			s.gauge(rpoLag, srv.Lag(f.At).Seconds(), srv.Name, srv.Customer)
		}
	}
}

func (s sink) work(f api.Figures) {
	for _, o := range f.Operations {
		s.gauge(operations, float64(o.N), o.Kind, string(o.State))
	}
	for problem, n := range f.Tickets {
		s.gauge(tickets, float64(n), problem)
	}
	s.gauge(invocations, float64(f.Invocations))
}

// nodes says how each node stands. There are as many as a master has room for.
func (s sink) nodes(f api.Figures) {
	for _, n := range f.Nodes {
		s.gauge(nodeConnected, number(n.Connected), n.Name, n.Role, n.Customer)
		s.gauge(nodeRevoked, number(n.Revoked), n.Name, n.Role, n.Customer)
		if !n.Seen.IsZero() {
			s.gauge(nodeSeen, f.At.Sub(n.Seen).Seconds(), n.Name, n.Role, n.Customer)
		}
		if !n.Expires.IsZero() {
			s.gauge(nodeLeft, n.Expires.Sub(f.At).Seconds(), n.Name, n.Role, n.Customer)
		}
	}
}

func (s sink) counts(c api.Counts) {
	for outcome, n := range c.Verdicts {
		s.counter(verdicts, n, string(outcome))
	}
	var changed, fresh int64
	for kind, n := range c.Snapshots {
		s.counter(snapshotsTaken, n.N, string(kind))
		s.counter(readBytes, n.Read, string(kind))
		s.counter(changedBytes, n.Changed, string(kind))
		s.counter(sentBytes, n.Sent, string(kind))
		s.counter(newBytes, n.New, string(kind))
		s.counter(storedBytes, n.Stored, string(kind))
		changed, fresh = changed+n.Changed, fresh+n.New
	}
	if changed > 0 {
		s.gauge(dedupe, min(max(1-float64(fresh)/float64(changed), 0), 1))
	}
	changed = 0
	var sent int64
	for kind, n := range c.Arrivals {
		s.counter(arrived, n.N, string(kind))
		s.counter(arrivedBytes, n.Sent, string(kind))
		changed, sent = changed+n.Changed, sent+n.Sent
	}
	if changed > 0 {
		s.gauge(transferRatio, float64(sent)/float64(changed))
	}
	s.counter(promotions, c.Promotions)
	s.counter(expired, c.Expired)
	s.counter(invoked, c.Invocations)
}
