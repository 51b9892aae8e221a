// Package lab is the whole platform in one process, for tests: a real store, catalog, engine, master, appliance, silo and
// API over a unix socket, with the two slow things replaced by drivers that pass the same suites: machines by vm/sim,
// images' insides by prerecover/tree. Nothing imports it but tests.
//
// A Lab can be crashed and reopened: what a process has in memory is lost, what it has on disk and on the make-believe
// host stays, as after kill -9.
//
// Knows: how everything is wired.
// Must not know: anything that the parts do not show.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/appliance"
	"github.com/musterdr/muster/internal/boottest"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/files"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/master"
	"github.com/musterdr/muster/internal/prerecover/tree"
	"github.com/musterdr/muster/internal/silo"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/sim"
)

// Password opens a lab's store.
const Password = password

// patience is how long a test waits for what has to come about: long, because a machine may be busy with other tests.
const patience = 3 * time.Minute

const (
	password    = "the lab's"
	home        = "local" // the silo of the lab's own process
	catalogFile = "catalog.db"
	engineFile  = "engine.db"
)

// Lab is one installation on one make-believe host.
type Lab struct {
	*api.Client
	Master *master.Master // of the present process
	Store  *store.Store
	// Appliance is that of the present process; it gives files back also when its Journal is taken away.
	Appliance *appliance.Appliance
	Host      *sim.Host
	Dir       string
	Clock     *Clock
	Customers *store.Customers // of the present process
	// Database, if set, is a postgres:// URL: catalog and work are there, and not in files.
	Database string
	// Fault, if set, is asked before every call of an appliance or a silo, and its error is the call's. It is how a test
	// makes a step fail, or the process die in it: then it calls Crash from another goroutine and waits for ctx.
	Fault func(ctx context.Context, call string) error

	Nodes map[string]*Node // silos elsewhere; without any, this process has one of its own

	t        testing.TB
	system   *tree.System
	networks *networks
	exports  *exporter
	stop     func() // ends the present process
	sites    map[string]*Site
	store    string // folder of the store; "": below Dir
	home     string // the silo of the lab's own process

	// Reach, if set, gives the appliances elsewhere that are no Site of the lab.
	Reach func(name string) (api.Site, error)
	// Whose, if set, says of which customer those are; otherwise they are the installation's own.
	Whose func(appliance string) (string, error)
}

// New makes an installation on which every machine is the given guest and every image holds a small Debian. silos names those
// that live elsewhere, each a node of its own with its host; with none the installation's own process is the silo.
func New(t testing.TB, guest func(spec vm.Spec) sim.Guest, silos ...string) *Lab {
	t.Helper()
	l := host(t, guest)
	made, err := fresh()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(l.Dir, made); err != nil {
		t.Fatal(err)
	}
	for _, name := range silos {
		l.Nodes[name] = newNode(l, name, guest)
	}
	l.Open()
	return l
}

// Beside makes another installation, on another make-believe host, with the same store and the same PostgreSQL.
func (l *Lab) Beside(t testing.TB, guest func(spec vm.Spec) sim.Guest) *Lab {
	t.Helper()
	other := host(t, guest)
	other.Database, other.store, other.home = l.Database, l.StoreFolder(), "beside"
	other.Open()
	return other
}

// Use has the lab use a PostgreSQL database from now on. What is in its files stays there.
func (l *Lab) Use(database string) {
	l.t.Helper()
	l.Crash()
	l.Database = database
	l.Open()
}

// host is an empty folder on a make-believe host.
func host(t testing.TB, guest func(spec vm.Spec) sim.Guest) *Lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "lab") // a test's own folder has too long a name for sockets
	if err != nil {
		t.Fatal(err)
	}
	l := &Lab{home: home, t: t, Dir: dir, Host: &sim.Host{Boot: guest}, system: Debian(), networks: &networks{made: map[string]bool{}},
		Clock: &Clock{}, Nodes: map[string]*Node{}}
	l.exports = &exporter{lab: l, running: map[string]func(){}}
	t.Cleanup(func() {
		l.Crash()
		for _, n := range l.Nodes {
			n.remove()
		}
		l.exports.stopAll()
		if err := l.Host.Close(); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	if err := os.WriteFile(l.path("muster-guest"), []byte("\x7fELF test agent"), 0o755); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *Lab) path(name string) string    { return filepath.Join(l.Dir, name) }
func (l *Lab) driver() folder.Driver      { return folder.Driver{Path: l.StoreFolder()} }
func (l *Lab) CatalogFiles() (f []string) { f, _ = filepath.Glob(l.path(catalogFile + "*")); return f }

// StoreFolder is where the store is.
func (l *Lab) StoreFolder() string {
	if l.store != "" {
		return l.store
	}
	return l.path("store")
}

// dsn is where a database is that could be a file.
func (l *Lab) dsn(file string) string {
	if l.Database != "" {
		return l.Database
	}
	return l.path(file)
}

// Open starts a process on the installation.
func (l *Lab) Open() {
	l.t.Helper()
	if err := l.open(); err != nil {
		l.t.Fatalf("open lab: %v", err)
	}
}

func (l *Lab) open() error {
	ctx, cancel := context.WithCancel(context.Background())
	var closes []func()
	l.stop = func() {
		cancel()
		for i := len(closes) - 1; i >= 0; i-- {
			closes[i]()
		}
	}
	st, err := store.Open(ctx, l.driver(), password)
	if err != nil {
		return err
	}
	closes = append(closes, func() { st.Close(context.Background()) })
	if l.Customers, err = store.OpenCustomers(ctx, store.CustomersConfig{Own: st, Driver: l.farDriver, Key: farKey, NewKey: farKey}); err != nil {
		return err
	}
	closes = append(closes, func() { l.Customers.Close() })
	cat, err := catalog.Open(ctx, l.dsn(catalogFile))
	if err != nil {
		return err
	}
	cat.Now = l.Clock.Now
	closes = append(closes, func() { cat.Close() })
	silos, err := l.openSilos(ctx, &closes)
	if err != nil {
		return err
	}
	eng, err := engine.Open(ctx, engine.Config{DSN: l.dsn(engineFile), Version: master.Shape, Logger: quiet})
	if err != nil {
		return err
	}
	closes = append(closes, func() { eng.Close(context.Background()) })
	browser := files.New(st, nil, l.path("run"))
	closes = append(closes, func() { browser.Close() })
	app := &appliance.Appliance{Store: st, Open: l.openSource, Browser: browser}
	l.Store = st
	config := master.Config{Catalog: cat, Engine: eng, Store: st, Appliance: faultyAppliance{app, l}, Silos: silos, Home: l.home, Sites: l.reach, Customers: l.Customers, CustomerOf: l.customerOf, Access: l.access,
		Log: quiet, Version: "lab", Data: l.Dir, Location: l.StoreFolder(), Now: l.Clock.Now}
	if len(l.Nodes) > 0 {
		config.Home, config.Lease, config.LeaseGrace = "", lease, leaseGrace
	}
	l.Master = master.Open(config)
	app.Journal = l.Master
	if err := app.TellRestores(ctx); err != nil {
		return err
	}
	l.Appliance = app
	listener, err := net.Listen("unix", l.path("api.sock"))
	if err != nil {
		return err
	}
	far := &appliance.Far{Own: app}
	looks := l.Master.Files(app, func(customer string, st *store.Store) master.FarFiles { return far.Of(customer, st) })
	server := &http.Server{Handler: api.Handler(l.Master, looks, "lab"), ReadHeaderTimeout: time.Second}
	go func() { _ = server.Serve(listener) }() // until it is closed
	closes = append(closes, func() { server.Close() })
	l.Client = api.Dial(l.path("api.sock"))
	closes = append(closes, l.Client.Close)
	for _, site := range l.sites {
		site.atHome()
	}
	return l.Master.Start(ctx)
}

// openSilos gives the silos that the master has: its own, or those elsewhere.
func (l *Lab) openSilos(ctx context.Context, closes *[]func()) (master.SiloSet, error) {
	set := master.SiloSet{}
	for name, n := range l.Nodes {
		set[name] = faultySilo{n.reached(), l}
	}
	if len(set) > 0 {
		return set, nil
	}
	hv := l.Host.Open()
	*closes = append(*closes, func() { hv.Close() })
	config := silo.Config{Name: l.home, Stores: own{l.Customers}, Tests: 1, Networks: l.networks,
		Exporter: l.exports, GuestAgent: l.path("muster-guest"), Dir: l.path("silo"), Run: l.path("run")}
	Equip(&config, hv, l.system)
	s, err := silo.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	*closes = append(*closes, func() { s.Close() })
	set[l.home] = faultySilo{s, l}
	return set, nil
}

// Equip gives a silo make-believe machines, and images that all hold the same system.
func Equip(c *silo.Config, hv *sim.Hypervisor, system *tree.System) {
	c.Hypervisor, c.Opener, c.SocketGID = hv, tree.Opener{System: system}, -1
	c.NewLayer, c.Flatten, c.Limits = newLayer, flatten, boottest.Limits{Sample: 10 * time.Millisecond}
}

// Crash ends the present process: whatever is under way ends where it is. Machines and exporters run on.
func (l *Lab) Crash() {
	if l.stop != nil {
		l.stop()
		l.stop = nil
	}
	os.Remove(l.path("api.sock"))
}

// Reopen crashes the process and starts another.
func (l *Lab) Reopen() {
	l.t.Helper()
	l.Crash()
	l.Open()
}

// Finish waits until an operation has finished.
func (l *Lab) Finish(op api.Operation, err error) api.Operation {
	l.t.Helper()
	if err != nil {
		l.t.Fatalf("start operation: %v", err)
	}
	deadline := time.Now().Add(patience)
	for !op.State.Finished() {
		if time.Now().After(deadline) {
			l.t.Fatalf("operation %s has not finished: %+v", op.ID, op)
		}
		if op, err = l.Operation(context.Background(), op.ID, op.Seen, time.Second); err != nil {
			l.t.Fatalf("follow operation: %v", err)
		}
	}
	return op
}

// Clock is a clock that tests can turn. It runs.
type Clock struct {
	mu    sync.Mutex
	ahead time.Duration
}

// Now is the time it shows.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.ahead)
}

// Turn turns it forward, or back if d is negative.
func (c *Clock) Turn(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead += d
}

// newLayer stands for qemu-img: the make-believe machines read no layers below their own.
func newLayer(_ context.Context, path string, _ vm.Layer) (vm.Layer, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return vm.Layer{}, err
	}
	return vm.Layer{Path: path, Format: "qcow2"}, f.Close()
}

// flatten stands for qemu-img too.
func flatten(_ context.Context, layers []vm.Layer, dst string, _ dr.Progress) error {
	top, err := os.ReadFile(layers[0].Path)
	if err != nil {
		return err
	}
	return os.WriteFile(dst, top, 0o600)
}

// networks remembers which bridges there would be.
type networks struct {
	mu   sync.Mutex
	made map[string]bool
}

func (n *networks) HostOnly(_ context.Context, net silo.HostOnlyNet) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.made[net.Name] = true
	return nil
}

func (n *networks) Remove(_ context.Context, name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.made, name)
	return nil
}

func (n *networks) List(context.Context) (names []string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name := range n.made {
		names = append(names, name)
	}
	return names, nil
}

// exporter serves snapshots from a store of its own, as the process of its own does that it stands for: it outlives a
// crash of the lab's process.
type exporter struct {
	lab     *Lab
	mu      sync.Mutex
	running map[string]func()
}

func (e *exporter) Start(ctx context.Context, access *api.Access, snapshot, socket string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.running[socket] != nil {
		return nil
	}
	drv, err := e.lab.driverAt(access.Place)
	if err != nil {
		return err
	}
	st, err := store.Open(ctx, drv, access.Password)
	if err != nil {
		return err
	}
	snap, err := st.Snapshot(ctx, snapshot)
	if err != nil {
		return errors.Join(err, st.Close(ctx))
	}
	server := image.NewServer()
	for n := range snap.Disks {
		img, err := st.Image(ctx, snapshot, n)
		if err == nil {
			err = server.Add(silo.ExportName(snapshot, n), img)
		}
		if err != nil {
			return errors.Join(err, st.Close(ctx))
		}
	}
	l, err := image.Listen(socket, 0o600, -1)
	if err != nil {
		return errors.Join(err, st.Close(ctx))
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(context.Background(), l) }()
	e.running[socket] = func() {
		server.Close()
		<-served
		st.Close(context.Background())
	}
	return nil
}

func (e *exporter) Stop(_ context.Context, socket string) error {
	e.mu.Lock()
	stop := e.running[socket]
	delete(e.running, socket)
	e.mu.Unlock()
	if stop != nil {
		stop()
	}
	return nil
}

func (e *exporter) stopAll() {
	for socket := range e.running {
		_ = e.Stop(context.Background(), socket)
	}
}

// Left lists what there is besides the store and the catalog: machines, exporters, bridges, layers and folders of tests.
func (l *Lab) Left() []string {
	left := leftOn(l.t, l.Host, l.exports, l.networks, l.path("silo"))
	for _, n := range l.Nodes {
		left = append(left, n.Left()...)
	}
	return left
}

func leftOn(t testing.TB, host *sim.Host, exports *exporter, networks *networks, dir string) (left []string) {
	hv := host.Open()
	defer hv.Close()
	machines, err := hv.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range machines {
		left = append(left, "machine "+m.Name)
	}
	exports.mu.Lock()
	for socket := range exports.running {
		left = append(left, "exporter "+socket)
	}
	exports.mu.Unlock()
	bridges, _ := networks.List(context.Background())
	for _, b := range bridges {
		left = append(left, "bridge "+b)
	}
	for _, sub := range []string{"scratch", "live"} {
		list, _ := os.ReadDir(filepath.Join(dir, sub))
		for _, e := range list {
			left = append(left, fmt.Sprintf("%s/%s", sub, e.Name()))
		}
	}
	return left
}
