package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/appliance"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/durable"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/files"
	filesguestfs "github.com/musterdr/muster/internal/files/guestfs"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/remote"
	"github.com/musterdr/muster/internal/trust"
)

// applianceSettings is the content of appliance.yaml in an appliance's folder.
type applianceSettings struct {
	Near      string `yaml:"near"`      // folder of the near store; "": DIR/near
	Bandwidth string `yaml:"bandwidth"` // how fast may be sent when; see dr.ParseWindows
	TimeZone  string `yaml:"time_zone"` // of the bandwidth; "": this machine's
	Reserve   int64  `yaml:"reserve"`   // GiB that are kept free for captures; 0: a tenth of the room
	Floor     int    `yaml:"keep"`      // newest snapshots of each server that are never let go; 0: 3
}

const applianceFile = "appliance.yaml"

func (i install) applianceSettings() (s applianceSettings, err error) {
	raw, err := os.ReadFile(i.path(applianceFile))
	if err == nil {
		err = yaml.UnmarshalWithOptions(raw, &s, yaml.Strict())
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return s, fmt.Errorf("read settings %s: %w", i.path(applianceFile), err)
	}
	if s.Near == "" {
		s.Near = i.path("near")
	}
	if s.Floor == 0 {
		s.Floor = appliance.DefaultFloor
	}
	return s, s.validate()
}

func (s applianceSettings) validate() error {
	_, _, err := s.windows()
	switch {
	case err != nil:
	case !filepath.IsAbs(s.Near):
		err = fmt.Errorf("near store %q: give an absolute path", s.Near)
	case s.Reserve < 0 || s.Reserve > 1<<20:
		err = fmt.Errorf("reserve of %d GiB: use 0 for a tenth of the room, or up to %d", s.Reserve, 1<<20)
	case s.Floor < 1 || s.Floor > 10_000:
		err = fmt.Errorf("keep %d: at least one snapshot of each server is kept", s.Floor)
	}
	return err
}

func (s applianceSettings) windows() (dr.Windows, *time.Location, error) {
	windows, err := dr.ParseWindows(s.Bandwidth)
	if err != nil {
		return nil, nil, err
	}
	if s.TimeZone == "" {
		return windows, time.Local, nil
	}
	zone, err := time.LoadLocation(s.TimeZone)
	if err != nil {
		return nil, nil, fmt.Errorf("time zone %q: write it as Europe/Berlin (%w)", s.TimeZone, err)
	}
	return windows, zone, nil
}

// nearStore is where the blobs of the near store lie.
func (s applianceSettings) nearStore() folder.Driver {
	return folder.Driver{Path: filepath.Join(s.Near, "store")}
}

func applianceSetCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "set", Short: "Change how this appliance keeps and sends; it counts from the next start on", Args: cobra.NoArgs,
		Long: `Change the settings of this appliance, in DIR/appliance.yaml. Without a flag they are shown. Start 'muster appliance serve' again for
them to count.

--bandwidth says how fast snapshots are sent when: spans of time, with or without days, each with a rate, separated by
semicolons. The first that holds counts; outside of all there is no limit. Rates are KB, MB, GB, KiB, MiB, GiB, kbit, Mbit or Gbit
a second, "unlimited", or "none". Times are those of --time-zone, on the days too on which clocks change.`,
		Example: `  muster appliance set --bandwidth 'mon-fri 08:00-18:00 2MB/s; else unlimited' --time-zone Europe/Berlin
  muster appliance set --near /srv/backup/muster --reserve 200
  muster appliance set`}
	var given applianceSettings
	fl := cmd.Flags()
	fl.StringVar(&given.Near, "near", "", "folder of the near store, before the first start (default DIR/near)")
	fl.StringVar(&given.Bandwidth, "bandwidth", "", "how fast may be sent when; empty: no limit")
	fl.StringVar(&given.TimeZone, "time-zone", "", "of the bandwidth, as Europe/Berlin (default: this machine's)")
	fl.Int64Var(&given.Reserve, "reserve", 0, "GiB that are kept free in the near store; 0: a tenth of its room")
	fl.IntVar(&given.Floor, "keep", appliance.DefaultFloor, "newest snapshots of each server that are never let go to make room")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		i := installation(cmd)
		s, err := i.applianceSettings()
		if err != nil {
			return err
		}
		changed := false
		for name, change := range map[string]func(){"near": func() { s.Near = given.Near }, "bandwidth": func() { s.Bandwidth = given.Bandwidth },
			"time-zone": func() { s.TimeZone = given.TimeZone }, "reserve": func() { s.Reserve = given.Reserve }, "keep": func() { s.Floor = given.Floor }} {
			if fl.Changed(name) {
				change()
				changed = true
			}
		}
		if fl.Changed("near") {
			if s.Near, err = filepath.Abs(s.Near); err != nil {
				return err
			}
		}
		if err := s.validate(); err != nil {
			return withCode(exitUsage, err)
		}
		raw, err := yaml.Marshal(s)
		if err != nil {
			return err
		}
		if changed {
			if err := os.MkdirAll(i.Dir, 0o711); err != nil {
				return fmt.Errorf("make folder: %w", err)
			}
			if err := durable.WriteFile(i.path(applianceFile), raw, 0o644); err != nil {
				return err
			}
		}
		if wantJSON(cmd) {
			return printJSON(cmd, map[string]any{"near": s.Near, "bandwidth": s.Bandwidth, "time_zone": s.TimeZone, "reserve_gib": s.Reserve, "keep": s.Floor})
		}
		fmt.Fprint(cmd.OutOrStdout(), string(raw))
		return nil
	}
	return cmd
}

func applianceServeCommand() *cobra.Command {
	var logs logFlags
	cmd := &cobra.Command{Use: "serve", Short: "Run this appliance: capture, keep, and send to the master", Args: cobra.NoArgs,
		Long: `Run this appliance until interrupted. It captures its servers when they are due, keeps as much of their history as its disk has room
for, and sends it to the master, the newest first. For all but the sending it needs nobody: without the master it goes on for days by
the definitions that it has, and catches up afterwards.

It opens connections to the master and to its servers, and listens nowhere: the only way in is a socket file of this machine, for
'muster appliance status' and 'muster files'. The first start needs the master; it makes the near store with the keys of the customer.`,
		Example: `  muster appliance join --file office.token
  muster appliance set --bandwidth 'mon-fri 08:00-18:00 2MB/s; else unlimited'
  muster appliance serve`,
		RunE: func(cmd *cobra.Command, _ []string) error { return serveAppliance(cmd, installation(cmd), logs) }}
	logs.register(cmd)
	return cmd
}

// masterURL is the base of what a node asks its master.
const masterURL = "https://master"

func serveAppliance(cmd *cobra.Command, i install, logs logFlags) error {
	ctx := cmd.Context()
	log, err := logs.open(ctx, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	p := &platform{log: log}
	defer p.close()
	line, err := trust.OpenNode(i.nodeDir())
	if errors.Is(err, trust.ErrNone) {
		return withCode(exitUnavailable, fmt.Errorf("%s is not the folder of an appliance: join a master first with 'muster appliance join TOKEN'", i.Dir))
	}
	if err != nil {
		return err
	}
	line.Log = p.log
	set, err := i.applianceSettings()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(i.Run, 0o711); err != nil {
		return fmt.Errorf("make folder for sockets: %w", err)
	}
	if err := p.lock(i); err != nil {
		return err
	}
	node, err := p.openNode(ctx, i, set, line)
	if err != nil {
		return err
	}
	listener, err := p.listen(i)
	if err != nil {
		return err
	}
	handler := api.SiteHandler(node)
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	ctx, stop := context.WithCancel(ctx)
	reached := make(chan struct{})
	go func() { defer close(reached); line.Serve(ctx, handler) }()
	ran := make(chan error, 1)
	go func() { ran <- node.Run(ctx) }()
	p.notify(ctx, func(ctx context.Context) error {
		_, err := node.Status(ctx) // its engine and its near store answer
		return err
	})
	p.log.Info("appliance serves", "version", version, "name", node.Name, "dir", i.Dir, "socket", apiSocket(i))
	running := true
	select {
	case <-ctx.Done():
		err = nil
	case err = <-ran:
		running = false
	case err = <-served:
	}
	p.log.Info("appliance stops; work under way goes on at the next start")
	stop()
	if running {
		err = errors.Join(err, <-ran)
	}
	<-reached
	limit, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	return errors.Join(err, server.Shutdown(limit))
}

// openNode opens the parts of an appliance in the order in which they need each other.
func (p *platform) openNode(ctx context.Context, i install, set applianceSettings, line *trust.Node) (*appliance.Node, error) {
	var st *store.Store // the near one, once there is one
	far := func(ctx context.Context) (*store.Store, error) {
		return openFar(ctx, remote.New(line.Client(), masterURL+storePlace), line.CustomerKey(), st)
	}
	st, err := i.openNear(ctx, set, far)
	if err != nil {
		return nil, err
	}
	p.onClose("near store", func() error { return st.Close(context.Background()) })
	var node *appliance.Node
	p.onClose("far store", func() error {
		if node == nil {
			return nil
		}
		return node.Close()
	})
	work := i.path("work")
	if err := os.MkdirAll(work, 0o700); err != nil {
		return nil, fmt.Errorf("make work folder: %w", err)
	}
	browser := files.New(st, filesguestfs.Driver{Work: work, Cache: i.path("guestfs"), KVM: probeKVM(ctx) == ""}, i.Run)
	browser.Host = "the appliance " + line.Peer().Name
	p.onClose("files", browser.Close)
	eng, err := engine.Open(ctx, engine.Config{DSN: i.path("engine.db"), Version: appliance.Shape, Logger: p.log})
	if err != nil {
		return nil, fmt.Errorf("open engine: %w", err)
	}
	p.onClose("engine", func() error {
		limit, cancel := context.WithTimeout(context.Background(), closeLimit)
		defer cancel()
		return eng.Close(limit)
	})
	windows, zone, err := set.windows()
	if err != nil {
		return nil, err
	}
	key, err := i.makeSSHKey(line.Peer().Name)
	if err != nil {
		return nil, err
	}
	node, err = appliance.OpenNode(ctx, appliance.NodeConfig{Appliance: &appliance.Appliance{Store: st, Open: i.openSource, Browser: browser},
		Name: line.Peer().Name, Engine: eng, Home: api.RemoteHome(line.Client(), masterURL), Far: far, Windows: windows, Zone: zone,
		Reserve: set.Reserve << 30, Floor: set.Floor, Log: p.log, Version: version, SSHKey: key})
	return node, err
}

// openFar opens the far store. One that the master awaits from its customer's first appliance is made, like the near store if there is one.
func openFar(ctx context.Context, drv store.Driver, key string, near *store.Store) (*store.Store, error) {
	st, err := store.Open(ctx, drv, key)
	if errors.Is(err, store.ErrNotAStore) {
		if near != nil {
			err = store.CreateLike(ctx, drv, key, near)
		} else {
			err = store.Create(ctx, drv, key)
		}
		if err == nil {
			st, err = store.Open(ctx, drv, key)
		}
		if errors.Is(err, store.ErrForbidden) {
			err = fmt.Errorf("%w, and none is awaited from here: is the disk there on which the master has it? (%w)", store.ErrNotAStore, err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open far store: %w", err)
	}
	return st, nil
}

// openNear opens the near store. The first time it is made, with the secrets of the far one: what is sealed here is good there.
func (i install) openNear(ctx context.Context, set applianceSettings, far func(context.Context) (*store.Store, error)) (*store.Store, error) {
	drv := set.nearStore()
	if _, err := os.Stat(drv.Path); errors.Is(err, os.ErrNotExist) {
		if err := i.makeNear(ctx, drv, far); err != nil {
			return nil, withCode(exitUnavailable, fmt.Errorf("make near store in %s: %w; the first start needs the master", drv, err))
		}
	}
	password, err := i.password()
	if err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, drv, password)
	if err != nil {
		return nil, fmt.Errorf("open near store: %w", err)
	}
	return st, nil
}

func (i install) makeNear(ctx context.Context, drv folder.Driver, far func(context.Context) (*store.Store, error)) error {
	password, err := i.password()
	if err != nil { // an earlier start that was cut off may have made it
		password = newKey()
		if err := durable.WriteFile(i.path("store.key"), []byte(password+"\n"), 0o600); err != nil {
			return err
		}
	}
	like, err := far(ctx)
	if err != nil {
		return err
	}
	part := folder.Driver{Path: drv.Path + ".new"}
	err = errors.Join(os.RemoveAll(part.Path), os.MkdirAll(filepath.Dir(drv.Path), 0o700))
	if err == nil {
		err = store.CreateLike(ctx, part, password, like)
	}
	if err = errors.Join(err, like.Close(ctx)); err != nil {
		return err
	}
	if err := os.Rename(part.Path, drv.Path); err != nil {
		return err
	}
	return durable.Sync(filepath.Dir(drv.Path))
}

func applianceStatusCommand() *cobra.Command {
	return &cobra.Command{Use: "status", Short: "Show how this appliance stands", Args: cobra.NoArgs, Example: "  muster appliance status\n  muster appliance status --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := api.DialSite(apiSocket(installation(cmd))).Status(cmd.Context())
			if api.KindOf(err) == api.Unavailable {
				return withCode(exitUnavailable, fmt.Errorf("no appliance answers on %s: start it with 'muster appliance serve', or name its folder with --dir", apiSocket(installation(cmd))))
			}
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, s)
			}
			printSite(cmd.OutOrStdout(), s)
			return nil
		}}
}

func printSite(out io.Writer, s api.SiteStatus) {
	fmt.Fprintf(out, "appliance    %s, release %s, running since %s\n", s.Name, s.Hello.Version, when(s.Hello.Started))
	fmt.Fprintf(out, "master       %s; it last answered %s\n", tame(s.Link), ago(s.Heard))
	if off := dr.ClockOff(s.Skew); off != "" {
		fmt.Fprintf(out, "clock        %s of the master's, by which snapshots are dated: set it, or let a time server be reached\n", off)
	}
	fmt.Fprintf(out, "near store   %d snapshots, %s; %s free, %s of that are kept free\n", s.Hello.Snapshots, size(s.Hello.Used), size(max(s.Hello.Free, 0)), size(s.Reserve))
	fmt.Fprintf(out, "sending      %s; %d snapshots are still to be sent\n", rateText(s.Rate), s.Hello.Owed)
	if s.Files == "" {
		fmt.Fprintln(out, "files        single files of its snapshots can be looked into")
	} else {
		fmt.Fprintf(out, "files        %s\n", tame(s.Files))
	}
	for _, p := range s.Hello.Problems {
		fmt.Fprintf(out, "PROBLEM      %s, since %s: %s\n", tame(p.Title), when(p.Since), tame(p.Detail))
	}
	for _, op := range s.Working {
		line := op.Step
		if op.Part != "" {
			line += ": " + op.Part
		}
		if op.Total > 0 {
			line += fmt.Sprintf(" %d%%", op.Done*100/op.Total)
		}
		fmt.Fprintf(out, "doing        %s %s: %s\n", op.Kind, op.Server, tame(line))
	}
	if len(s.Hello.Servers) == 0 {
		fmt.Fprintln(out, "\nIt protects no server yet: on the master, 'muster server add NAME --appliance "+s.Name+" …'.")
		return
	}
	fmt.Fprintln(out)
	var rows [][]string
	here := func(at time.Time) string { // by the clock of whoever looks, which is this machine's
		if at.IsZero() {
			return ago(at)
		}
		return ago(at.Add(s.Skew))
	}
	for _, one := range s.Hello.Servers {
		rows = append(rows, []string{one.Name, here(one.Due), here(one.Kept), here(one.Replicated), fmt.Sprint(one.Snapshots), fmt.Sprint(one.Owed)})
	}
	table(out, "SERVER DUE CAPTURED IN-FAR-STORE SNAPSHOTS TO-SEND", rows)
}

func rateText(rate int64) string {
	switch {
	case rate == 0:
		return "without a limit"
	case rate < 0:
		return "not now"
	}
	return "at most " + size(rate) + " a second"
}

func applianceListCommand() *cobra.Command {
	return &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "On a master: list its appliances and how each stands", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		c := client(cmd)
		defer c.Close()
		list, err := c.Appliances(cmd.Context())
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, list)
		}
		if len(list) == 0 {
			fmt.Fprintln(cmd.OutOrStdout(), "No appliance has said hello yet: invite one with 'muster master enrol'.")
			return nil
		}
		var rows [][]string
		for _, a := range list {
			state := "away"
			if a.Connected {
				state = "connected"
			}
			free := "-"
			if a.Hello.Free > 0 {
				free = size(a.Hello.Free)
			}
			clock := cmp.Or(dr.ClockOff(a.Skew), "right")
			rows = append(rows, []string{a.Name, state, ago(a.Seen), orDash(strings.Join(a.Servers, ",")), fmt.Sprint(a.Hello.Snapshots), fmt.Sprint(a.Hello.Owed), free, clock, fmt.Sprint(len(a.Hello.Problems))})
		}
		table(cmd.OutOrStdout(), "APPLIANCE STATE HEARD SERVERS SNAPSHOTS TO-SEND FREE CLOCK PROBLEMS", rows)
		return nil
	}}
}

func completeAppliances(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	c := client(cmd)
	defer c.Close()
	list, err := c.Appliances(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, a := range list {
		names = append(names, a.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func replicateCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "replicate SERVER[@SNAPSHOT]", Short: "Have an appliance send a snapshot to the far store now", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers,
		Long: `Have the appliance of a server send a snapshot to the far store now, before all others; without @SNAPSHOT its newest. Appliances send by
themselves, so this only changes the order. Its bandwidth windows count all the same.`,
		Example: "  muster replicate till\n  muster replicate till@snap-20260101t020000-k3mq2a7x"}
	noWait := noWaitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		server, snapshot, _ := strings.Cut(args[0], "@")
		c := client(cmd)
		defer c.Close()
		op, err := c.Replicate(cmd.Context(), server, snapshot)
		if err != nil {
			return err
		}
		if *noWait {
			return started(cmd, op)
		}
		if op, err = follow(cmd, c, op); err != nil {
			return err
		}
		if err := present(cmd, outcome{Operation: op}, func() {
			if op.State == api.OperationSucceeded {
				fmt.Fprintln(cmd.OutOrStdout(), "It is in the far store.")
			}
		}); err != nil {
			return err
		}
		return failed(op)
	}
	return cmd
}
