package lab

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// tenants is a master of two customers, each with an appliance and a server; both servers' disks are the same.
func tenants(t *testing.T, silos ...string) (l *Lab, acme, bank *Site) {
	t.Helper()
	l = New(t, Healthy, silos...)
	writeDisk(t, l, 1)
	at := map[string]*Site{}
	for _, customer := range []string{"acme", "bank"} {
		l.AddCustomer(customer)
		at[customer] = l.NewSiteOf(customer, "box-"+customer)
		if _, err := l.AddServer(ctx, shopOf(l, customer)); err != nil {
			t.Fatal(err)
		}
	}
	return l, at["acme"], at["bank"]
}

func shopOf(l *Lab, customer string) dr.Server {
	return dr.Server{Name: customer + "-shop", Appliance: "box-" + customer, Source: dr.Source{Disks: []string{l.path("shop.raw")}},
		Schedule: dr.Schedule{Every: 24 * time.Hour}, Checks: []dr.Check{{Name: "page", Kind: dr.CheckHTTP, URL: "http://127.0.0.1/"}}}
}

// good gives the last-known-good of a server.
func (l *Lab) good(t *testing.T, server string) dr.Record {
	t.Helper()
	s, err := l.Server(ctx, server)
	if err != nil || s.LKG == nil {
		t.Fatalf("%s has no last-known-good: %+v, %v", server, s.Newest, err)
	}
	return *s.LKG
}

func (l *Lab) storeOf(t *testing.T, customer string) *store.Store {
	t.Helper()
	st, err := l.Customers.Of(ctx, customer)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// ids lists the snapshots in the far store of a customer.
func (l *Lab) ids(t *testing.T, customer string) (out []string) {
	t.Helper()
	st := l.storeOf(t, customer)
	if err := st.Refresh(ctx); err != nil {
		t.Fatal(err)
	}
	snaps, err := st.Snapshots(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range snaps {
		out = append(out, s.ID)
	}
	return out
}

func TestEachCustomersDataLieInItsOwnStoreUnderItsOwnKey(t *testing.T) {
	t.Parallel()
	l, acme, bank := tenants(t)
	acme.Night()
	bank.Night()
	l.settled(t)
	of := map[string]dr.Record{"acme": l.good(t, "acme-shop"), "bank": l.good(t, "bank-shop")}
	for customer, rec := range of {
		if got := l.ids(t, customer); !slices.Equal(got, []string{rec.Snapshot.ID}) {
			t.Errorf("store of %s has %v, not only %s", customer, got, rec.Snapshot.ID)
		}
		lkg, err := l.storeOf(t, customer).LKG(ctx)
		if err != nil || lkg[rec.Snapshot.ServerID] != rec.Snapshot.ID || len(lkg) != 1 {
			t.Errorf("store of %s says last-known-good is %v, %v", customer, lkg, err)
		}
	}
	if got := l.ids(t, ""); len(got) != 0 {
		t.Errorf("the installation's own store has %v", got)
	}
	// The same disk again, and nobody who sends it learns that somebody else has it.
	a, b := of["acme"].Snapshot.Stats, of["bank"].Snapshot.Stats
	if a.New == 0 || b.New < a.New*9/10 {
		t.Errorf("acme kept %d new bytes, and bank, which has the same, %d", a.New, b.New)
	}
	key, _ := farKey("bank")
	if st, err := store.Open(ctx, folder.Driver{Path: l.path("store.customers/acme")}, key); !errors.Is(err, store.ErrBadPassword) {
		t.Errorf("the key of bank on the store of acme: %v, %v", st, err)
	}
	usage, err := l.StoreUsage(ctx)
	if err != nil || len(usage) != 3 || usage[1].Customer != "acme" || usage[1].Snapshots != 1 || usage[1].Bytes == 0 || usage[0].Snapshots != 0 {
		t.Errorf("usage %+v, %v", usage, err)
	}
}

func TestASiloOpensACustomersStoreWithWhatComesWithItsWork(t *testing.T) {
	t.Parallel()
	l, acme, bank := tenants(t, "a")
	acme.Night()
	bank.Night()
	l.settled(t)
	l.good(t, "acme-shop")
	for _, server := range []string{"acme-shop", "bank-shop"} {
		if op := l.Finish(l.Invoke(ctx, api.InvokeRequest{Server: server, By: "ann", Reason: "fire"})); op.State != api.OperationSucceeded {
			t.Fatalf("invoke %s: %s", server, op.Error)
		}
	}
	for _, server := range []string{"acme-shop", "bank-shop"} {
		inv, err := l.Invocation(ctx, server)
		if err != nil || inv.State != dr.Running || inv.SnapshotID != l.good(t, server).Snapshot.ID {
			t.Errorf("%s runs as %+v, %v", server, inv, err)
		}
		if op := l.Finish(l.EndInvocation(ctx, inv.ID, false)); op.State != api.OperationSucceeded {
			t.Errorf("end %s: %s", server, op.Error)
		}
	}
	l.clean(t)
}

func TestAnAppliancesServersAreItsCustomers(t *testing.T) {
	t.Parallel()
	l, acme, _ := tenants(t)
	s := shopOf(l, "acme")
	s.Name, s.Customer = "stolen", "bank"
	if _, err := l.AddServer(ctx, s); api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), "box-acme") {
		t.Errorf("a server of bank behind the appliance of acme: %v", err)
	}
	bank := "bank"
	if _, err := l.UpdateServer(ctx, "acme-shop", api.ServerChange{Customer: &bank}); api.KindOf(err) != api.Invalid {
		t.Errorf("a server given to another customer: %v", err)
	}
	s.Name, s.Customer, s.Appliance = "nobodys", "", "box-of-nobody"
	if _, err := l.AddServer(ctx, s); api.KindOf(err) != api.Invalid {
		t.Errorf("a server of no appliance: %v", err)
	}
	acme.Night()
	l.settled(t)
	rec := l.good(t, "acme-shop")
	// The name goes to an appliance of the other customer: it is told nothing, and nothing that it says is believed.
	acme.customer = "bank"
	w, err := l.Master.Hello(ctx, "box-acme", api.Hello{Clock: time.Now()})
	if err != nil || len(w.Servers) != 0 || len(w.LKG) != 0 || len(w.Rulings) != 0 {
		t.Errorf("an appliance of bank is told of acme: %+v, %v", w, err)
	}
	again := rec.Snapshot
	again.ID = dr.NewSnapshotID(time.Now())
	out, err := l.Master.Arrived(ctx, "box-acme", []api.Arrival{{Snapshot: again}})
	if err != nil || !strings.Contains(out[again.ID], "not captured by") {
		t.Errorf("a snapshot of acme's server from an appliance of bank: %v, %v", out, err)
	}
}

func TestAStoreThatIsAwayIsOneCustomersTrouble(t *testing.T) {
	t.Parallel()
	l, acme, bank := tenants(t)
	at := l.path("store.customers/bank")
	l.Crash()
	if err := os.Rename(at, at+".away"); err != nil {
		t.Fatal(err)
	}
	l.Open()
	acme.Night()
	l.settled(t)
	l.good(t, "acme-shop")
	bank.Wake(ctx)
	_ = bank.Hail(ctx)
	usage, err := l.StoreUsage(ctx)
	if err != nil || len(usage) != 3 || usage[1].Error != "" || usage[2].Error == "" {
		t.Errorf("usage %+v, %v", usage, err)
	}
	for _, c := range l.Master.Health(ctx).Checks {
		if c.Name == "store" && (c.OK || !strings.Contains(c.Detail, "bank")) {
			t.Errorf("health says %+v", c)
		}
	}
	op := l.Finish(l.CollectStore(ctx, true))
	if op.State != api.OperationFailed || !strings.Contains(op.Error, "bank") || strings.Contains(op.Error, "acme") {
		t.Errorf("collection: %s %s", op.State, op.Error)
	}
	if err := os.Rename(at+".away", at); err != nil {
		t.Fatal(err)
	}
	until(t, "the store of bank is there again", func() bool { _, err := l.Customers.Of(ctx, "bank"); return err == nil })
	bank.Night()
	l.settled(t)
	l.good(t, "bank-shop")
}

// A catalog that is lost is rebuilt from all stores; a customer's store, which its appliances can write to, is believed only about its own servers.
func TestALostCatalogOfManyCustomersIsRebuiltAndNobodyCanForge(t *testing.T) {
	t.Parallel()
	l, acme, bank := tenants(t)
	acme.Night()
	bank.Night()
	l.settled(t)
	before := map[string]string{}
	for _, server := range []string{"acme-shop", "bank-shop"} {
		before[server] = l.good(t, server).Snapshot.ID
	}
	forged := l.good(t, "acme-shop")
	st := l.storeOf(t, "bank")
	victim, err := l.Server(ctx, "acme-shop")
	if err != nil {
		t.Fatal(err)
	}
	evil := victim.Server
	evil.Source.Disks = []string{"/dev/evil"}
	verdict := *forged.Verdict
	verdict.ID, verdict.Outcome = dr.NewID("verdict"), dr.Fail
	if err := errors.Join(st.PutRecord(ctx, dr.ServerRecord, evil.ID, evil), st.PutRecord(ctx, "verdict", verdict.ID, verdict)); err != nil {
		t.Fatal(err)
	}
	l.Crash()
	for _, f := range append(l.CatalogFiles(), mustGlob(t, l.path(engineFile+"*"))...) {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	l.Open()
	if op := l.Finish(l.AdoptStore(ctx)); op.State != api.OperationSucceeded {
		t.Fatalf("adopt: %s", op.Error)
	}
	for server, id := range before {
		if got := l.good(t, server).Snapshot.ID; got != id {
			t.Errorf("last-known-good of %s is %s, was %s", server, got, id)
		}
	}
	s, err := l.Server(ctx, "acme-shop")
	if err != nil || slices.Contains(s.Server.Source.Disks, "/dev/evil") {
		t.Errorf("acme's server is what bank's store says: %+v, %v", s.Server.Source, err)
	}
	records, err := l.Snapshots(ctx, "acme-shop")
	if err != nil || len(records) != 1 || records[0].Verdict == nil || records[0].Verdict.Outcome != dr.Pass {
		t.Errorf("acme's snapshots %+v, %v", records, err)
	}
}

func mustGlob(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return files
}
