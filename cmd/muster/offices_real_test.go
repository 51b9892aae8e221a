package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/lab"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/remote"
	"github.com/musterdr/muster/internal/trust"
)

// siteOf is an office: a master with a make-believe hypervisor, which lets the other's appliance in by the real port for nodes, and an
// appliance as a process of its own, which has joined the other office's master.
type siteOf struct {
	*lab.Lab
	name, bin, dir string
	port           *nodePort
	far            farStores
	end            func()
	run            *exec.Cmd
}

// newSiteOf makes an office whose appliance has joined nobody yet.
func newSiteOf(t *testing.T, name string) *siteOf {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o := &siteOf{Lab: lab.New(t, lab.Healthy), name: name, bin: filepath.Join(dir, "muster"), dir: filepath.Join(dir, "box")}
	if err := os.Symlink(self, o.bin); err != nil { // under that name the test is the program
		t.Fatal(err)
	}
	home := install{Dir: filepath.Join(dir, "master")}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	err = errors.Join(os.Mkdir(home.Dir, 0o700),
		trust.Create(home.trustDir(), trust.Plan{Name: name, Listen: address, Addresses: []string{address}, KeyFile: home.masterKey()}))
	if err != nil {
		t.Fatal(err)
	}
	authority, err := home.openAuthority(serveCommand(), "")
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	o.port = &nodePort{authority: authority, hub: trust.NewHub(authority, log), log: log, listener: listener}
	o.Customers.Key, o.Customers.NewKey = authority.CustomerKey, authority.MakeCustomerKey // the lab's master opens customers' stores with what their appliances get
	o.Reach, o.Whose = o.port.site, o.port.customerOf
	o.far = farStores{home, settings{Store: o.StoreFolder()}, o.Customers}
	handlers, closed := nodeHandlers(o.Master, o.far)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- o.port.serve(ctx, handlers) }()
	o.end = func() {
		if cancel != nil {
			cancel()
			cancel = nil
			if err := errors.Join(<-served, closed()); err != nil {
				t.Error(err)
			}
		}
		if o.run != nil {
			_ = o.run.Process.Signal(syscall.SIGKILL)
			_ = o.run.Wait()
			o.run = nil
		}
	}
	t.Cleanup(o.end)
	return o
}

// joins has an office's appliance join the other's master, and protects its server there.
func (o *siteOf) joins(t *testing.T, other *siteOf, server string, awaited bool) {
	t.Helper()
	err := other.Customers.Add(t.Context(), store.Customer{Name: o.name, Place: filepath.Join(other.Dir, "store.customers", o.name), Awaited: awaited})
	if err != nil {
		t.Fatal(err)
	}
	token, err := other.port.authority.Enrol(trust.Peer{Role: trust.Appliance, Customer: o.name, Name: o.name}, time.Hour, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(o.dir, "node")); err != nil { // of a master that is no more
		t.Fatal(err)
	}
	sh(t, "%s appliance join '%s' --dir %s", o.bin, token, o.dir)
	o.run = exec.Command(o.bin, "appliance", "serve", "--dir", o.dir)
	o.run.Stderr = os.Stderr
	if err := o.run.Start(); err != nil {
		t.Fatal(err)
	}
	o.until(t, "the far store is there", func() bool { _, err := other.Customers.Of(t.Context(), o.name); return err == nil })
	_, err = other.AddServer(t.Context(), dr.Server{Name: server, Customer: o.name, Appliance: o.name, Source: dr.Source{Disks: []string{o.disk()}},
		Schedule: dr.Schedule{Every: 24 * time.Hour}, Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}})
	if err != nil {
		t.Fatal(err)
	}
}

func (o *siteOf) disk() string { return filepath.Join(filepath.Dir(o.dir), "disk.raw") }

func (o *siteOf) until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s: %s has not come about", o.name, what)
		}
		time.Sleep(50 * time.Millisecond) // processes of their own: there is nothing to wait on
	}
}

// good waits until an office has a last-known-good of a server.
func (o *siteOf) good(t *testing.T, server string) (rec dr.Record) {
	t.Helper()
	o.until(t, "last-known-good of "+server, func() bool {
		o.Master.Wake(t.Context())
		s, err := o.Server(t.Context(), server)
		if err == nil && s.LKG != nil {
			rec = *s.LKG
		}
		return err == nil && s.LKG != nil
	})
	return rec
}

// Two offices with real appliances and real lines between them: each has the other's snapshots, tested; what burns in one runs in the
// other; and a new office in its place gets from the other's near store what it had.
func TestTwoOfficesAndOneBurns(t *testing.T) {
	if os.Getenv("MUSTER_REAL") != "1" {
		t.Skip("set MUSTER_REAL=1 to run appliances as processes of their own")
	}
	hamburg, bremen := newSiteOf(t, "hamburg"), newSiteOf(t, "bremen")
	for i, o := range []*siteOf{hamburg, bremen} {
		data := make([]byte, 8<<20)
		for k := range data[:6<<20] {
			data[k] = byte(k * (i + 3) >> 7 * k)
		}
		if err := os.WriteFile(o.disk(), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	hamburg.joins(t, bremen, "till", false)
	bremen.joins(t, hamburg, "mill", false)
	till := bremen.good(t, "till")
	mill := hamburg.good(t, "mill")
	if key, err := bremen.port.authority.CustomerKey("hamburg"); err != nil {
		t.Error(err)
	} else if other, err := hamburg.port.authority.CustomerKey("bremen"); err != nil || key == other {
		t.Errorf("both customers have one key, or %v", err)
	}

	hamburg.end()
	hamburg.Crash()
	if err := errors.Join(os.RemoveAll(hamburg.Dir), os.RemoveAll(hamburg.dir)); err != nil {
		t.Fatal(err)
	}
	op := bremen.Finish(bremen.Invoke(t.Context(), api.InvokeRequest{Server: "till", By: "ann", Reason: "fire in Hamburg"}))
	inv, err := bremen.Invocation(t.Context(), "till")
	if err != nil || inv.State != dr.Running || inv.SnapshotID != till.Snapshot.ID {
		t.Fatalf("%s: %+v, %v", op.Error, inv, err)
	}

	// A new Hamburg: Bremen's appliance joins it with the near store that it has.
	_ = bremen.run.Process.Signal(syscall.SIGKILL)
	_ = bremen.run.Wait()
	again := newSiteOf(t, "hamburg")
	bremen.joins(t, again, "mill", true)
	back := again.good(t, "mill")
	if back.Snapshot.ID == mill.Snapshot.ID {
		t.Errorf("the snapshot of before is last-known-good of a server that was added anew: %+v", back.Snapshot)
	}
	drv, may, err := again.far.open(t.Context(), "bremen")
	if err != nil || may != remote.Append {
		t.Fatalf("%v: what was awaited has come, and none is made any more: %v", may, err)
	}
	key, err := again.port.authority.CustomerKey("bremen")
	if err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(t.Context(), drv, key)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close(context.Background())
	if report, err := st.Verify(t.Context(), back.Snapshot.ID, nil); err != nil || report.Damaged != 0 {
		t.Errorf("%+v, %v", report, err)
	}
}
