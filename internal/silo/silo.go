// Package silo is the role of a host with a hypervisor: it makes rescue images of snapshots, boot-tests them, runs them
// for real, and cleans up after itself and after crashes.
//
// # Where things lie
//
//	DIR/images/SNAPSHOT/PRERECOVERY/   deltas and their record, kept as long as the snapshot
//	DIR/evidence/SNAPSHOT/VERDICT/     screenshot, serial log, answers
//	DIR/scratch/                       of boot tests; emptied at every start
//	DIR/live/INVOCATION/               what an invoked machine writes; kept until the invocation ends
//	RUN/                               sockets, and short names for scratch/ and live/; gone after a reboot
//
// A boot test reads the store through an export inside this process: if the process dies, so does the test. An invoked
// machine reads through an exporter process of its own, so that it lives on when this process is restarted.
//
// # Leases
//
// What a silo does it does under a lease of the master's. If that is not renewed, because the master does not reach this silo, a
// boot test or a pre-recovery is ended and its machine removed, before another silo can be given the same work. An invoked
// machine is not: it serves people, who may reach it although the master does not.
//
// Knows: which stage needs what of the others; where files of a silo lie; leases by their term.
// Must not know: the catalog, last-known-good, why it is asked.
package silo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/boottest"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/vm"
)

// Config is what a silo is made of. All fields are needed but those with a default.
type Config struct {
	Name       string // see dr.ValidateName
	Stores     Stores
	Hypervisor vm.Hypervisor
	Opener     prerecover.Opener
	Networks   Networks
	Exporter   Exporter
	GuestAgent string          // path of the static test agent that is put into rescue images
	Dir        string          // data, see the package comment
	Run        string          // sockets; short
	SocketGID  int             // group under which the hypervisor's machines run
	MaxMemory  int             // MiB a rescue machine may have at most; 0: half the host's
	MaxCPUs    int             // 0: the host's
	Memory     int             // MiB that rescue machines may have all together; 0: seven eighths of the host's
	Tests      int             // boot tests at once; 0: as many as memory and processors allow
	Reserved   []string        // customers that it is for; none: everybody's
	Version    string          // of the program, for people
	Bridges    func() []string // of the host, that a machine can be plugged into; nil: none
	Diagnose   func(ctx context.Context) []api.Finding
	Limits     boottest.Limits                                                                    // of boot tests and of the checks of invocations
	NewLayer   func(ctx context.Context, path string, below vm.Layer) (vm.Layer, error)           // nil: vm.NewLayer
	Flatten    func(ctx context.Context, layers []vm.Layer, dst string, report dr.Progress) error // nil: vm.Flatten
	Clock      func() time.Duration                                                               // that nobody sets; nil: the host's since it started
}

// Stores opens the store of the customer that a piece of work is for.
type Stores interface {
	// Open gives the store, which stays open until release is called. access is what came with the lease: nil means a
	// store that the silo has without being given any.
	Open(ctx context.Context, access *api.Access) (st *store.Store, release func(), err error)
}

// Networks makes and removes the bridges of rescue machines.
type Networks interface {
	// HostOnly makes a bridge on which only the host and the machines plugged into it are. A zero address leaves the
	// host without one. Making one that exists with the same address is no error.
	HostOnly(ctx context.Context, net HostOnlyNet) error
	Remove(ctx context.Context, name string) error
	List(ctx context.Context) ([]string, error)
}

// Exporter runs a process that serves a snapshot's disks on a unix socket and outlives this one.
type Exporter interface {
	// Start makes sure that the snapshot is served on the socket, as exports SNAPSHOT/0, SNAPSHOT/1, …
	Start(ctx context.Context, access *api.Access, snapshot, socket string) error
	Stop(ctx context.Context, socket string) error
}

// Silo does the work of one host. Its methods may be called from many goroutines.
type Silo struct {
	Config
	exports *exports
	duties  *duties

	fetching sync.Mutex // of deltas: they are small, and fetched once
}

var _ api.Silo = (*Silo)(nil)

// Open starts a silo: its folders exist and its exports are served until ctx ends or Close is called.
func Open(ctx context.Context, config Config) (*Silo, error) {
	for _, dir := range []string{"images", "evidence", "scratch", "live"} {
		if err := os.MkdirAll(filepath.Join(config.Dir, dir), 0o711); err != nil {
			return nil, fmt.Errorf("open silo: %w", err)
		}
	}
	if err := os.MkdirAll(config.Run, 0o711); err != nil {
		return nil, fmt.Errorf("open silo: %w", err)
	}
	// Machines' folders hold sockets, whose paths are short, and layers, which are large: a short name for a large place.
	for _, dir := range []string{"scratch", "live"} {
		short := filepath.Join(config.Run, dir)
		os.Remove(short)
		if err := os.Symlink(filepath.Join(config.Dir, dir), short); err != nil {
			return nil, fmt.Errorf("open silo: %w", err)
		}
	}
	if config.NewLayer == nil {
		config.NewLayer = vm.NewLayer
	}
	if config.Flatten == nil {
		config.Flatten = vm.Flatten
	}
	if config.Diagnose == nil {
		config.Diagnose = func(context.Context) []api.Finding { return nil }
	}
	if config.Clock == nil {
		config.Clock = sinceBoot
	}
	s := &Silo{Config: config, duties: newDuties(config.Clock)}
	socket := filepath.Join(config.Run, "exports.sock")
	l, err := image.Listen(socket, 0o660, config.SocketGID)
	if err != nil {
		return nil, fmt.Errorf("open silo: %w", err)
	}
	s.exports = serveExports(socket, l)
	return s, nil
}

// Close stops serving. Machines of boot tests that still run lose their disks; invoked machines do not notice.
func (s *Silo) Close() error { return s.exports.close() }

// Diagnose implements api.Silo.
func (s *Silo) Diagnose(ctx context.Context) []api.Finding { return s.Config.Diagnose(ctx) }

func (s *Silo) imageDir(snapshot, pre string) string {
	return filepath.Join(s.Dir, "images", snapshot, pre)
}
func (s *Silo) evidenceDir(snapshot, verdict string) string {
	return filepath.Join(s.Dir, "evidence", snapshot, verdict)
}
func (s *Silo) liveDir(invocation string) string { return filepath.Join(s.Run, "live", invocation) }
func (s *Silo) scratch() string                  { return filepath.Join(s.Run, "scratch") }

// exports serves snapshots' disks to machines of this process, opened once however many read them.
type exports struct {
	socket string
	server *image.Server
	cancel context.CancelFunc
	served chan error

	mu   sync.Mutex // not held by the server's callbacks, because Remove waits for them
	open map[string]*export

	faults sync.Mutex
	bad    map[string]error // export → first read error, until it is released
}

type export struct {
	images []*store.Image
	users  int
}

func serveExports(socket string, l net.Listener) *exports {
	ctx, cancel := context.WithCancel(context.Background())
	e := &exports{socket: socket, server: image.NewServer(), cancel: cancel, served: make(chan error, 1),
		open: map[string]*export{}, bad: map[string]error{}}
	e.server.OnError = func(name string, err error) {
		e.faults.Lock()
		defer e.faults.Unlock()
		if e.bad[name] == nil {
			e.bad[name] = err
		}
	}
	go func() { e.served <- e.server.Serve(ctx, l) }()
	return e
}

func (e *exports) close() error {
	e.cancel()
	err := errors.Join(e.server.Close(), <-e.served)
	os.Remove(e.socket)
	return err
}

// ExportName is how disk n of a snapshot is called on an NBD server.
func ExportName(snapshot string, n int) string { return fmt.Sprintf("%s/%d", snapshot, n) }

// layers names the disks of a snapshot on an NBD socket.
func layers(socket, snapshot string, disks int) []vm.Layer {
	out := make([]vm.Layer, disks)
	for n := range out {
		out[n] = vm.Layer{Socket: socket, Export: ExportName(snapshot, n), Format: "raw"}
	}
	return out
}

// acquire serves a snapshot's disks out of its store, which stays open at least as long, until release is called. fault gives the first read error of any of them.
func (e *exports) acquire(ctx context.Context, st *store.Store, snapshot string, disks int) (disksOf []vm.Layer, fault func() error, release func(), err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	x := e.open[snapshot]
	if x == nil {
		x = &export{}
		for n := range disks {
			img, err := st.Image(ctx, snapshot, n)
			if err == nil {
				x.images = append(x.images, img)
				err = e.server.Add(ExportName(snapshot, n), img)
			}
			if err != nil {
				e.drop(snapshot, x)
				return nil, nil, nil, fmt.Errorf("export snapshot %s: %w", snapshot, err)
			}
		}
		e.open[snapshot] = x
	}
	x.users++
	var once sync.Once
	release = func() {
		once.Do(func() {
			e.mu.Lock()
			defer e.mu.Unlock()
			if x.users--; x.users == 0 {
				e.drop(snapshot, x)
			}
		})
	}
	fault = func() error {
		e.faults.Lock()
		defer e.faults.Unlock()
		for n := range disks {
			if err := e.bad[ExportName(snapshot, n)]; err != nil {
				return err
			}
		}
		return nil
	}
	return layers(e.socket, snapshot, disks), fault, release, nil
}

func (e *exports) drop(snapshot string, x *export) {
	for n, img := range x.images {
		name := ExportName(snapshot, n)
		e.server.Remove(name)
		img.Close()
		e.faults.Lock()
		delete(e.bad, name)
		e.faults.Unlock()
	}
	delete(e.open, snapshot)
}
