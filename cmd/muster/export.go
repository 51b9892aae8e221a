package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/durable"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/silo"
	"github.com/musterdr/muster/internal/store"
)

func exportCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "export SERVER[@SNAPSHOT] --socket PATH", Short: "Offer a snapshot's disks over NBD on a unix socket", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers,
		Long: `Offer the disks of a snapshot, read-only, over NBD on a unix socket until interrupted. It reads the store itself: no master
need run. SNAPSHOT is an identifier, "newest" (default) or "lkg".`,
		Example: `  muster export shop@lkg --socket /tmp/shop.sock
  muster export till@lkg --customer acme --socket /tmp/till.sock
  nbdinfo 'nbd+unix:///?socket=/tmp/shop.sock'            # the default export is the first disk chosen
  nbdcopy 'nbd+unix:///?socket=/tmp/shop.sock' disk.raw`}
	socket := cmd.Flags().String("socket", "", "path of the unix socket (at most 107 bytes)")
	disk := cmd.Flags().Int("disk", -1, "only this disk, counted from 0; without it all disks, as SNAPSHOT/0, SNAPSHOT/1, …")
	group := cmd.Flags().Int("group", -1, "group that may connect, by number; without it only this user")
	customer := cmd.Flags().String("customer", "", "customer in whose far store it is; without it the installation's own store")
	passphraseFile := cmd.Flags().String("passphrase-file", "", "with --customer, file with the master's passphrase, if it has one (default: ask)")
	leased := cmd.Flags().Bool("leased", false, "what opens the store comes on standard input")
	_ = cmd.Flags().MarkHidden("group")
	_ = cmd.Flags().MarkHidden("leased")
	_ = cmd.MarkFlagRequired("socket")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		serve := func(st *store.Store) error { return exportFrom(cmd, st, args[0], *socket, *disk, *group) }
		if *customer != "" && !*leased {
			return atDesk(cmd, *passphraseFile, func(d customersDesk) error {
				st, err := d.book.Of(cmd.Context(), *customer)
				if err != nil {
					return err
				}
				return serve(st)
			})
		}
		var st *store.Store
		var err error
		if *leased {
			st, err = installation(cmd).openLeased(cmd.Context(), cmd.InOrStdin())
		} else {
			st, _, err = installation(cmd).openStore(cmd)
		}
		if err != nil {
			return err
		}
		defer st.Close(context.Background())
		return serve(st)
	}
	return cmd
}

// exportFrom offers a snapshot of a store.
func exportFrom(cmd *cobra.Command, st *store.Store, which, socket string, disk, group int) error {
	snap, err := findSnapshot(cmd.Context(), st, which)
	if err != nil {
		return err
	}
	if snap.IsData() {
		fmt.Fprintf(cmd.ErrOrStderr(), "muster: %s is of data, which is no disk: this is the image that it goes onto, as it was when that was taken\n", snap.ID)
		if snap, err = st.Snapshot(cmd.Context(), snap.Image); err != nil {
			return err
		}
	}
	return export(cmd, st, snap, socket, disk, group)
}

// findSnapshot reads SERVER, SERVER@newest, SERVER@lkg, SERVER@SNAPSHOT or SNAPSHOT.
func findSnapshot(ctx context.Context, st *store.Store, text string) (dr.Snapshot, error) {
	server, which, _ := strings.Cut(text, "@")
	if strings.HasPrefix(server, "snap-") && which == "" {
		return st.Snapshot(ctx, server)
	}
	if strings.HasPrefix(which, "snap-") {
		return st.Snapshot(ctx, which)
	}
	all, err := st.Snapshots(ctx)
	if err != nil {
		return dr.Snapshot{}, err
	}
	lkg, err := st.LKG(ctx)
	if err != nil {
		return dr.Snapshot{}, err
	}
	var found *dr.Snapshot
	for i, s := range all {
		if s.Server != server {
			continue
		}
		if which == "lkg" && lkg[s.ServerID] == s.ID {
			return s, nil
		}
		if which != "lkg" && (found == nil || s.Taken.After(found.Taken)) {
			found = &all[i]
		}
	}
	switch {
	case which != "" && which != "newest" && which != "lkg":
		return dr.Snapshot{}, withCode(exitUsage, fmt.Errorf("export %q: after @ give a snapshot's identifier, newest or lkg", text))
	case found == nil:
		return dr.Snapshot{}, api.Errorf(api.NotFound, "export %q: the store has no such snapshot; see 'muster snapshots %s'", text, server)
	}
	return *found, nil
}

func export(cmd *cobra.Command, st *store.Store, snap dr.Snapshot, socket string, disk, group int) error {
	if disk >= len(snap.Disks) {
		return withCode(exitUsage, fmt.Errorf("export disk %d: snapshot %s has %d", disk, snap.ID, len(snap.Disks)))
	}
	release := st.Pin(snap.ID)
	defer release()
	server := image.NewServer()
	server.OnError = func(name string, err error) { fmt.Fprintf(cmd.ErrOrStderr(), "muster: read %s: %v\n", name, err) }
	first := max(disk, 0)
	for n := range snap.Disks {
		if disk >= 0 && n != disk {
			continue
		}
		img, err := st.Image(cmd.Context(), snap.ID, n)
		if err != nil {
			return fmt.Errorf("open disk %d: %w", n, err)
		}
		defer img.Close()
		names := []string{silo.ExportName(snap.ID, n)}
		if n == first {
			names = append(names, "") // the default export
		}
		for _, name := range names {
			if err := server.Add(name, img); err != nil {
				return err
			}
		}
	}
	mode := os.FileMode(0o600)
	if group >= 0 {
		mode = 0o660
	}
	l, err := image.Listen(socket, mode, group)
	if err != nil {
		return err
	}
	defer os.Remove(socket)
	fmt.Fprintf(cmd.OutOrStdout(), "Serving %s of %s on %s; stop with Ctrl-C.\n", snap.ID, snap.Server, socket)
	err = server.Serve(cmd.Context(), l)
	if cmd.Context().Err() != nil {
		return nil
	}
	return err
}

// exporter runs "muster export" as a process of its own: an invoked machine's disks must not go away when the platform
// is restarted. It implements silo.Exporter.
type exporter struct {
	install install
	group   int        // under which the hypervisor runs machines
	far     *farStores // of the master that this process is; nil: what opens a store comes with a lease, and it is at the master
}

// told is what an exporter hears on standard input, and keeps in memory.
type told struct {
	api.Access
	Location string // of a customer's store that is this master's; "": it is at the master, at Access.Place
}

// tell says what an exporter has to be told: nothing where it reads the installation's own store, whose key is here.
func (e exporter) tell(ctx context.Context, access *api.Access) (*told, error) {
	switch {
	case e.far == nil && access == nil:
		return nil, errors.New("the lease says nothing of a store")
	case e.far == nil:
		return &told{Access: *access}, nil
	case access == nil || access.Customer == "":
		return nil, nil
	}
	c, err := e.far.book.Customer(ctx, access.Customer)
	return &told{*access, c.Place}, err
}

// Limits of starting and stopping an exporter.
const (
	exporterStart = 30 * time.Second
	exporterStop  = 10 * time.Second
	exporterPoll  = 20 * time.Millisecond
)

// Start implements silo.Exporter.
func (e exporter) Start(ctx context.Context, access *api.Access, snapshot, socket string) error {
	if answers(socket) {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("start exporter: %w", err)
	}
	logFile, err := os.OpenFile(socket+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start exporter: %w", err)
	}
	defer logFile.Close()
	c := exec.Command(self, "export", "--dir", e.install.Dir, snapshot, "--socket", socket, "--group", strconv.Itoa(e.group))
	// Its temporary files must not lie in a /tmp that systemd made for this process and removes with it.
	c.Env = append(os.Environ(), "GOMEMLIMIT=120MiB", "TMPDIR="+e.install.Run)
	tell, err := e.tell(ctx, access)
	if err != nil {
		return fmt.Errorf("start exporter: %w", err)
	}
	if tell != nil {
		raw, err := json.Marshal(tell)
		if err != nil {
			return fmt.Errorf("start exporter: %w", err)
		}
		c.Args, c.Stdin = append(c.Args, "--leased"), bytes.NewReader(raw)
	}
	c.Stdout, c.Stderr = logFile, logFile
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		return fmt.Errorf("start exporter: %w", err)
	}
	if err := durable.WriteFile(socket+".pid", []byte(strconv.Itoa(c.Process.Pid)), 0o600); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	deadline := time.After(exporterStart)
	for !answers(socket) {
		select {
		case err := <-ended:
			return fmt.Errorf("start exporter: it ended at once (%w); see %s.log", err, socket)
		case <-deadline:
			_ = c.Process.Kill()
			return fmt.Errorf("start exporter: it did not answer within %s; see %s.log", exporterStart, socket)
		case <-ctx.Done():
			_ = c.Process.Kill()
			return ctx.Err()
		case <-time.After(exporterPoll):
		}
	}
	return nil
}

func answers(socket string) bool {
	c, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// Stop implements silo.Exporter. A process that merely has the number of a dead exporter is left alone.
func (e exporter) Stop(ctx context.Context, socket string) error {
	defer func() {
		for _, path := range []string{socket, socket + ".pid", socket + ".log"} {
			os.Remove(path)
		}
	}()
	raw, err := os.ReadFile(socket + ".pid")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stop exporter: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || !isExporter(pid, socket) {
		return nil
	}
	deadline := time.Now().Add(exporterStop)
	sig := syscall.SIGTERM
	for isExporter(pid, socket) {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("stop exporter: %w", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(exporterPoll):
		}
		if time.Now().After(deadline) {
			sig = syscall.SIGKILL
		}
	}
	return nil
}

func isExporter(pid int, socket string) bool {
	cmdline, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	return err == nil && strings.Contains(string(cmdline), "\x00export\x00") && strings.Contains(string(cmdline), socket)
}

func init() {
	// Exporters of an earlier process are not our children; those of this one are waited for above.
	signal.Ignore(syscall.SIGPIPE)
}
