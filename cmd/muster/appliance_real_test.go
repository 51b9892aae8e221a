package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/lab"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/trust"
)

// office is a master, with a lab's make-believe silo, in a network of its own, and an appliance in another: processes with a
// veth between them.
type office struct {
	*place // of the appliance
	t      *testing.T
	l      *lab.Lab
}

func newOffice(t *testing.T) *office {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "muster") // under that name the test is the program
	if err := os.Symlink(self, bin); err != nil {
		t.Fatal(err)
	}
	far := netID("o") + "b"
	o := &office{t: t, place: newPlace(t, bin, netID("o"), "app", filepath.Join(t.TempDir(), "box"), "10.213.77.2/30", far)}
	o.command = []string{"appliance", "serve"}
	sh(t, "ip addr add 10.213.77.1/30 dev %s", far)
	o.l = lab.New(t, lab.Healthy)
	o.serveMaster()
	return o
}

// serveMaster lets nodes in, and has the appliance join.
func (o *office) serveMaster() {
	t := o.t
	home := install{Dir: t.TempDir()}
	listener, err := net.Listen("tcp", "10.213.77.1:0")
	if err != nil {
		t.Fatal(err)
	}
	plan := trust.Plan{Name: "hq", Listen: listener.Addr().String(), Addresses: []string{listener.Addr().String()}, KeyFile: home.masterKey()}
	if err := trust.Create(home.trustDir(), plan); err != nil {
		t.Fatal(err)
	}
	authority, err := home.openAuthority(serveCommand(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := authority.GiveCustomerKey("acme", lab.Password); err != nil {
		t.Fatal(err)
	}
	port := &nodePort{authority: authority, hub: trust.NewHub(authority, slog.New(slog.DiscardHandler)), log: slog.New(slog.DiscardHandler), listener: listener}
	o.l.Reach = port.site
	book, err := store.OpenCustomers(t.Context(), store.CustomersConfig{Own: o.l.Store, OwnOf: "acme"})
	if err != nil {
		t.Fatal(err)
	}
	handlers, end := nodeHandlers(o.l.Master, farStores{home, settings{Store: o.l.StoreFolder()}, book})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- port.serve(ctx, handlers) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := end(); err != nil {
			t.Error(err)
		}
	})
	token, err := authority.Enrol(trust.Peer{Role: trust.Appliance, Customer: "acme", Name: "box"}, time.Hour, nil)
	if err != nil {
		t.Fatal(err)
	}
	o.ok("appliance", "join", token.String())
}

// status asks the appliance on its own machine.
func (o *office) status() (s api.SiteStatus, err error) {
	return s, o.read(&s, "appliance", "status")
}

// until waits for something to become true.
func (o *office) until(what string, is func() bool) {
	o.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !is(); {
		if time.Now().After(deadline) {
			o.t.Fatalf("%s has not come about; the appliance says\n%s", what, o.said())
		}
		time.Sleep(100 * time.Millisecond) // processes of their own: there is nothing to wait on
	}
}

func (o *office) write(day uint64) { noise(o.t, o.disk(), 48<<20, day) }

func (o *office) disk() string { return filepath.Join(filepath.Dir(o.dir), "shop.raw") }

func (o *office) states() (out []dr.State) {
	records, err := o.l.Snapshots(o.t.Context(), "shop")
	if err != nil {
		o.t.Fatal(err)
	}
	for _, r := range records {
		out = append(out, r.State)
	}
	return out
}

func verified(states []dr.State, n int) bool {
	return len(states) == n && !slices.ContainsFunc(states, func(s dr.State) bool { return s != dr.Verified })
}

// An appliance in a network of its own listens nowhere, and what is captured arrives through a line that is slow, loses, is cut,
// and through the death of the process in the middle of sending.
func TestAnApplianceListensNowhereAndSendsThroughABadLine(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to make network namespaces and run processes in them")
	}
	t.Parallel()
	o := newOffice(t)
	o.write(1)
	ctx := t.Context()
	if _, err := o.l.AddServer(ctx, dr.Server{Name: "shop", Appliance: "box", Source: dr.Source{Disks: []string{o.disk()}}, Schedule: dr.Schedule{Every: time.Hour},
		Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}}); err != nil {
		t.Fatal(err)
	}
	o.serve()
	o.until("the first snapshot", func() bool { return verified(o.states(), 1) })
	if open := o.sockets(); open != "" {
		t.Errorf("the appliance listens: %s", open)
	}
	if status := o.ok("appliance", "status"); !strings.Contains(status, "connected") {
		t.Errorf("status: %s", status)
	}

	t.Log("a slow line that loses; then a kill in the middle of sending")
	o.slow("40mbit")
	o.lossy(1)
	o.write(2)
	first := o.begin(ctx, t)
	o.until("a snapshot on its way", func() bool { return o.sending(4 << 20) })
	if open := o.sockets(); open != "" {
		t.Errorf("the appliance listens while it sends: %s", open)
	}
	o.restart()
	o.until("a snapshot on its way again", func() bool { return o.sending(1 << 20) })

	t.Log("a cut in the middle of sending")
	o.cut()
	time.Sleep(3 * time.Second)
	if s, err := o.status(); err != nil || s.Hello.Owed == 0 {
		t.Errorf("while the line is cut %+v, %v", s.Hello, err)
	}
	o.mend()
	o.good()
	o.until("the second snapshot", func() bool { return verified(o.states(), 2) })
	op := o.l.Finish(o.l.Operation(ctx, first.ID, 0, 0))
	if op.State != api.OperationSucceeded {
		t.Errorf("the snapshot that was asked for %s: %s", op.State, op.Error)
	}
	records, err := o.l.Snapshots(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if _, err := o.l.Store.Verify(ctx, r.Snapshot.ID, nil); err != nil {
			t.Error(err)
		}
	}
	if open := o.sockets(); open != "" {
		t.Errorf("the appliance listens: %s", open)
	}

	t.Log("a disk carried by hand, while the appliance runs")
	disk := filepath.Join(t.TempDir(), "usb")
	var seed seedShown
	if err := o.read(&seed, "appliance", "seed", "export", disk, "shop"); err != nil {
		t.Fatal(err)
	}
	if seed.Packs == 0 || seed.Bytes < 40<<20 || len(seed.Snapshots) != 1 || seed.Snapshots[0] != records[0].Snapshot.ID {
		t.Errorf("seed %+v", seed)
	}
	hq := t.TempDir()
	if err := os.WriteFile(filepath.Join(hq, "muster.yaml"), fmt.Appendf(nil, "store: %s\ncustomer: acme\n", o.l.StoreFolder()), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(hq, "store.key"), []byte(lab.Password), 0o600); err != nil {
		t.Fatal(err)
	}
	var taken seedShown
	if err := (&place{bin: o.bin, dir: hq}).read(&taken, "master", "seed", "import", disk, "--customer", "acme", "--digest", seed.Digest); err != nil {
		t.Fatal(err)
	}
	if taken.Packs != seed.Packs || taken.Bytes != seed.Bytes {
		t.Errorf("taken in %+v of %+v", taken, seed)
	}
}

// begin asks for a snapshot, as a person does.
func (o *office) begin(ctx context.Context, t *testing.T) api.Operation {
	t.Helper()
	op, err := o.l.Snapshot(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	return op
}

// sending says whether so many bytes of a snapshot are on their way.
func (o *office) sending(least int64) bool {
	s, err := o.status()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(s.Working, func(op api.Operation) bool { return op.Kind == "replicate" && op.Done >= least })
}
