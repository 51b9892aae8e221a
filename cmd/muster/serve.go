package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/appliance"
	"github.com/musterdr/muster/internal/capture"
	capturedisk "github.com/musterdr/muster/internal/capture/disk"
	captureqemu "github.com/musterdr/muster/internal/capture/qemu"
	capturessh "github.com/musterdr/muster/internal/capture/ssh"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/database"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/files"
	filesguestfs "github.com/musterdr/muster/internal/files/guestfs"
	"github.com/musterdr/muster/internal/master"
	"github.com/musterdr/muster/internal/metrics"
	"github.com/musterdr/muster/internal/prerecover/guestfs"
	"github.com/musterdr/muster/internal/silo"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/vm/libvirt"
)

func serveCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "serve", Short: "Run master, appliance and silo in this process", Args: cobra.NoArgs,
		Long: `Run the whole platform on this machine until interrupted: it takes snapshots when they are due, tests each one, and answers
the command line. Work that is under way when it ends goes on when it is started again; invoked machines do not notice.

With --database it keeps catalog and work in PostgreSQL, and remembers that in muster.yaml. Several masters may share one: each
carries out a part of the work, one of them looks at schedules, and what one leaves when it fails the others carry on. A master
that was out of touch with the database for longer than a minute ends with exit code 5; started again it takes part again. What
is in files already goes to PostgreSQL with 'muster master migrate'.

After 'muster master init' it listens for appliances and silos of other machines as well. Started by systemd it says when it serves,
and that it lives.`,
		Example: `  muster serve
  muster serve --database postgres://muster@db.example.com/muster
  muster serve --listen 10.0.0.1:7443
  muster serve --metrics 127.0.0.1:9411 --log-format json`}
	var o serveOptions
	o.log.register(cmd)
	fl := cmd.Flags()
	fl.StringVar(&o.listen, "listen", "", "address for nodes to connect to (default: as 'muster master init' was told)")
	fl.StringVar(&o.passphraseFile, "passphrase-file", "", "file with the master's passphrase, if it has one (default: ask)")
	fl.StringVar(&o.metrics, "metrics", "", "loopback address to serve metrics and health on, as 127.0.0.1:9411; empty: only on the command line's own socket")
	_ = cmd.RegisterFlagCompletionFunc("metrics", cobra.FixedCompletions([]string{"127.0.0.1:9411"}, cobra.ShellCompDirectiveNoFileComp))
	db := fl.String("database", "", "postgres:// URL of the database for catalog and work; empty: what muster.yaml says, or files in DIR")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		i := installation(cmd)
		if *db != "" {
			if err := i.useDatabase(*db); err != nil {
				return err
			}
		}
		return serve(cmd, i, o)
	}
	return cmd
}

// serveOptions are how serve is run, not what is installed.
type serveOptions struct {
	log                             logFlags
	listen, passphraseFile, metrics string
}

// useDatabase remembers where a new installation keeps its catalog. One that has a catalog is not led to another by a flag.
func (i install) useDatabase(dsn string) error {
	s, err := i.settings()
	switch {
	case err != nil:
		return err
	case !database.IsPostgres(dsn):
		return withCode(exitUsage, fmt.Errorf("--database %s: give a postgres:// URL", dsn))
	case s.Database == dsn:
		return nil
	case s.Database != "":
		return withCode(exitRefused, fmt.Errorf("the catalog is in %s, as %s says: move it with 'muster master migrate'", database.Hidden(s.Database), i.path("muster.yaml")))
	case isFile(i.path("catalog.db")):
		return withCode(exitRefused, fmt.Errorf("the catalog is in %s: move it with 'muster master migrate --to %s'", i.path("catalog.db"), database.Hidden(dsn)))
	}
	s.Database = dsn
	return i.writeSettings(s)
}

// platform is everything that serve opens, closed in reverse.
type platform struct {
	log    *slog.Logger
	lost   <-chan struct{} // of the engine
	closes []func() error
}

func (p *platform) onClose(what string, f func() error) {
	p.closes = append(p.closes, func() error {
		if err := f(); err != nil {
			return fmt.Errorf("close %s: %w", what, err)
		}
		return nil
	})
}

func (p *platform) close() {
	for i := len(p.closes) - 1; i >= 0; i-- {
		if err := p.closes[i](); err != nil {
			p.log.Error("stop", "error", err)
		}
	}
}

// closeLimit is how long work under way may take to let go when the process ends.
const closeLimit = 20 * time.Second

func serve(cmd *cobra.Command, i install, o serveOptions) error {
	ctx := cmd.Context()
	log, err := o.log.open(ctx, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	p := &platform{log: log}
	defer p.close()
	if _, err := i.settings(); err != nil {
		return err
	}
	if err := os.MkdirAll(i.Run, 0o711); err != nil {
		return fmt.Errorf("make folder for sockets: %w", err)
	}
	if err := p.lock(i); err != nil {
		return err
	}
	if _, err := i.makeSSHKey("own"); err != nil {
		return err
	}
	nodes, err := i.openNodePort(cmd, o.listen, o.passphraseFile, p.log)
	if err != nil {
		return err
	}
	p.onClose("port for nodes", nodes.close)
	m, app, far, err := p.open(ctx, cmd, i, nodes)
	if err != nil {
		return err
	}
	listener, err := p.listen(i)
	if err != nil {
		return err
	}
	observer := metrics.Handler(m, version, p.log)
	server := &http.Server{Handler: observed(api.Handler(m, m.Files(app, farFiles(app)), version), observer), ReadHeaderTimeout: 10 * time.Second}
	if o.metrics != "" {
		if err := p.listenMetrics(o.metrics, observer); err != nil {
			return err
		}
	}
	served := make(chan error, 2)
	go func() { served <- server.Serve(listener) }()
	if err := m.Start(ctx); err != nil {
		return err
	}
	handlers, end := nodeHandlers(m, far)
	p.onClose("far store of nodes", end)
	nodes.witness(ctx, m)
	noded := make(chan struct{})
	go func() {
		defer close(noded)
		if err := nodes.serve(ctx, handlers); err != nil {
			served <- err
		}
	}()
	p.notify(ctx, lives(m))
	p.log.Info("muster serves", "version", version, "dir", i.Dir, "socket", apiSocket(i))
	scheduled := make(chan struct{})
	go func() { defer close(scheduled); m.Run(ctx) }()
	select {
	case <-ctx.Done():
	case err = <-served:
		return fmt.Errorf("serve: %w", err)
	case <-p.lost:
		return withCode(exitUnavailable, errors.New("serve: this master was out of touch with the database for too long and has stopped its work, which others carry on: start it again"))
	}
	p.log.Info("muster stops; work under way goes on at the next start")
	<-scheduled
	<-noded
	limit, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	return server.Shutdown(limit)
}

// lock makes sure that only one process serves an installation.
func (p *platform) lock(i install) error {
	f, err := os.OpenFile(i.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("lock installation: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return withCode(exitRefused, fmt.Errorf("lock installation %s: another 'muster serve' runs on it", i.Dir))
	}
	p.onClose("lock", f.Close)
	return nil
}

func (p *platform) listen(i install) (net.Listener, error) {
	path := apiSocket(i)
	os.Remove(path) // the lock says that nobody listens there any more
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// open opens the parts in the order in which they need each other.
func (p *platform) open(ctx context.Context, cmd *cobra.Command, i install, nodes *nodePort) (_ *master.Master, _ *appliance.Appliance, far farStores, _ error) {
	st, set, err := i.openStore(cmd)
	if err != nil {
		return nil, nil, far, err
	}
	password, err := i.password()
	if err != nil {
		return nil, nil, far, err
	}
	p.onClose("store", func() error { return st.Close(context.Background()) })
	far = farStores{install: i, set: set}
	if far.book, err = i.openBook(ctx, st, set, nodes.keys()); err != nil {
		return nil, nil, far, err
	}
	p.onClose("customers' stores", far.book.Close)
	cat, err := catalog.Open(ctx, i.catalog(set))
	if moved := new(catalog.MovedError); errors.As(err, &moved) {
		return nil, nil, far, withCode(exitRefused, fmt.Errorf("%w; %s says otherwise: if 'muster master migrate' was cut off, run it again", err, i.path("muster.yaml")))
	}
	if err != nil {
		return nil, nil, far, fmt.Errorf("open catalog: %w", err)
	}
	cat.Told = tell(p.log)
	p.onClose("catalog", cat.Close)
	s, kvm, err := p.openSilo(ctx, i, set, silo.Config{Name: i.homeSilo(set), Stores: far, Tests: max(set.Tests, 1)}, exporter{install: i, far: &far})
	if err != nil {
		return nil, nil, far, err
	}
	eng, err := engine.Open(ctx, engine.Config{DSN: i.engine(set), Version: master.Shape, Host: i.host(set), Logger: p.log})
	if err != nil {
		return nil, nil, far, fmt.Errorf("open engine: %w", err)
	}
	p.lost = eng.Lost()
	p.onClose("engine", func() error {
		limit, cancel := context.WithTimeout(context.Background(), closeLimit)
		defer cancel()
		return eng.Close(limit)
	})
	browser := files.New(st, filesguestfs.Driver{Work: i.path("silo/work"), Cache: i.path("silo/guestfs"), KVM: kvm}, i.Run)
	p.onClose("files", browser.Close)
	app := &appliance.Appliance{Store: st, Open: i.openSource, Browser: browser}
	silos := silosOf{home: master.SiloSet{i.homeSilo(set): s}}
	config := master.Config{Catalog: cat, Engine: eng, Store: st, Appliance: app, Silos: silos, Home: i.homeSilo(set), Customers: far.book, Access: far.access(password),
		Log: p.log, Version: version, Data: i.Dir, Location: set.Store, Lease: leaseTime, LeaseGrace: leaseGrace}
	if nodes != nil {
		config.Sites, config.CustomerOf, config.Nodes = nodes.site, nodes.customerOf, nodes.figures
		silos.hub = nodes.hub
		config.Silos = silos
	}
	m := master.Open(config)
	app.Journal = m
	if err := app.TellRestores(ctx); err != nil {
		p.log.WarnContext(ctx, "files were put back, and it is not among the events yet", "error", err)
	}
	return m, app, far, nil
}

// farFiles looks into customers' far stores with what looks into the installation's own.
func farFiles(own *appliance.Appliance) func(customer string, st *store.Store) master.FarFiles {
	far := &appliance.Far{Own: own}
	return func(customer string, st *store.Store) master.FarFiles { return far.Of(customer, st) }
}

// homeSilo is what the silo of the only master is called.
const homeSilo = "local"

// homeSilo is what the silo of this process is called: by its host's name where other masters have theirs in the same catalog.
func (i install) homeSilo(s settings) string {
	if s.Database == "" {
		return homeSilo
	}
	sum := sha256.Sum256([]byte(i.host(s)))
	return homeSilo + "-" + hex.EncodeToString(sum[:4])
}

// What tests of many machines on one replace: the machines of its silos, and how long those may be silent.
var (
	equip                 = (*platform).equip
	leaseTime, leaseGrace time.Duration // 0: as the rules say
)

// equip gives a silo the hypervisor of its host, and what reads images there. kvm says whether that is quick.
func (p *platform) equip(ctx context.Context, i install, set settings, c *silo.Config) (kvm bool, err error) {
	hv, err := libvirt.Open(ctx, libvirt.Config{Socket: set.Libvirt, ProbeFile: probeFile(i)})
	if err != nil {
		return false, withCode(exitUnavailable, fmt.Errorf("reach libvirt: %w; 'muster doctor' says what is missing", err))
	}
	p.onClose("hypervisor", hv.Close)
	host, err := hv.Host(ctx)
	if err != nil {
		return false, err
	}
	kvm = host.Accelerator == "kvm"
	c.Hypervisor, c.Opener = hv, guestfs.Driver{Work: i.path("silo/work"), Cache: i.path("silo/guestfs"), KVM: kvm}
	_, c.SocketGID = hv.User()
	c.Diagnose = func(ctx context.Context) []api.Finding { return diagnose(ctx, i, set, hv, nil) }
	return kvm, nil
}

// openSilo adds to what is said of a silo what its host has.
func (p *platform) openSilo(ctx context.Context, i install, set settings, c silo.Config, e exporter) (s *silo.Silo, kvm bool, err error) {
	if kvm, err = equip(p, ctx, i, set, &c); err != nil {
		return nil, false, err
	}
	if err := os.MkdirAll(i.path("silo/work"), 0o711); err != nil {
		return nil, false, fmt.Errorf("make work folder: %w", err)
	}
	if c.GuestAgent, err = besides("muster-guest"); err != nil {
		return nil, false, err
	}
	e.group = c.SocketGID
	c.Networks, c.Bridges, c.Exporter = hostNetworks{}, bridges, e
	c.Dir, c.Run, c.Version, c.MaxMemory, c.MaxCPUs = i.path("silo"), i.Run, version, set.MaxMemory, set.MaxCPUs
	s, err = silo.Open(ctx, c)
	if err != nil {
		return nil, false, err
	}
	p.onClose("silo", s.Close)
	return s, kvm, nil
}

// besides finds a program that is delivered beside this one.
func besides(name string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find %s: %w", name, err)
	}
	for _, dir := range []string{filepath.Dir(self), "/usr/lib/muster", "/usr/local/lib/muster"} {
		if path := filepath.Join(dir, name); isFile(path) {
			return path, nil
		}
	}
	return "", withCode(exitUnavailable, fmt.Errorf("find %s: it is neither beside %s nor in /usr/lib/muster; build it with 'make build'", name, self))
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// openSource knows the ways of reading a server.
func (i install) openSource(ctx context.Context, source dr.Source) (capture.Source, error) {
	switch {
	case source.VM != nil:
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find the watchdog: %w", err)
		}
		return captureqemu.Open(*source.VM, captureqemu.Host{Run: i.Run, Scratch: i.path("scratch"), Watchdog: []string{self, watchdogCommand}})
	case source.SSH == nil:
		return capturedisk.Open(source.Disks)
	}
	server := *source.SSH
	if server.KeyFile == "" {
		server.KeyFile = i.sshKey()
	}
	return capturessh.Open(ctx, server, func(system, arch string) ([]byte, error) {
		name := "muster-agent"
		if arch != "amd64" {
			name += "-" + arch
		}
		if system == "windows" {
			name += ".exe"
		}
		path, err := besides(name)
		if err != nil {
			return nil, err
		}
		return os.ReadFile(path)
	})
}

// watchdogCommand is the hidden command under which a capture starts this program as its watchdog.
const watchdogCommand = "vm-watchdog"

func vmWatchdogCommand() *cobra.Command {
	return &cobra.Command{Use: watchdogCommand + " SOCKET UUID LIMIT", Hidden: true, Args: cobra.ExactArgs(3),
		Short: "Freeze and thaw a virtual machine's file systems; started by a capture",
		RunE: func(_ *cobra.Command, args []string) error {
			return captureqemu.Watchdog(args, os.Stdin, os.Stdout)
		}}
}
