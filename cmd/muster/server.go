package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/musterdr/muster/internal/api"
	captureqemu "github.com/musterdr/muster/internal/capture/qemu"
	"github.com/musterdr/muster/internal/dr"
)

func serverCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "server", Short: "Protect servers: add, list, show, set, remove"}
	cmd.AddCommand(serverAddCommand(), serverListCommand(), serverShowCommand(), serverSetCommand(), serverRemoveCommand())
	return cmd
}

// serverFlags are the settings that add and set share.
type serverFlags struct {
	every, rto, rpo, freeze time.Duration
	memory, cpus, keepLast  int
	overlays, key, signs    string
	resident, snapshots     bool
	readLimit               int64
	checks                  []string
	hooks                   hookFlags

	tier, standby, customer string
	data, exclude           []string
	dataEvery               time.Duration
}

func (f *serverFlags) register(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.customer, "customer", "", "whose server it is, for metering; empty: the installation's own")
	fl.DurationVar(&f.every, "every", dr.DefaultEvery, "how often a snapshot is taken")
	fl.DurationVar(&f.rto, "rto", 0, "promised recovery time (15m); 0 promises nothing")
	fl.DurationVar(&f.rpo, "rpo", 0, "promised recovery point (24h); 0 promises nothing")
	fl.StringArrayVar(&f.checks, "check", nil, "YAML file with a list of checks (may be repeated; see docs/formats/checks.md)")
	fl.IntVar(&f.memory, "memory", 0, "MiB of the rescue machine; 0: as the original, within this host's limits")
	fl.IntVar(&f.cpus, "cpus", 0, "processors of the rescue machine; 0: as the original, within this host's limits")
	fl.StringVar(&f.overlays, "overlays", "", "folder with overlays of your own for this server")
	fl.IntVar(&f.keepLast, "keep-last", 0, "snapshots to keep besides last-known-good; 0 keeps all")
	fl.StringVar(&f.signs, "signs", string(dr.SignsNormal), "how soon a snapshot is held for signs of tampering: off, low, normal or high")
	fl.StringVar(&f.key, "key", "", "private SSH key of the user; empty: the one that this installation, or the appliance, has made: 'muster appliance key'")
	fl.BoolVar(&f.resident, "resident", false, "with --ssh: leave programs in the server's kernel that note what is written, so that a snapshot reads only that")
	fl.StringVar(&f.tier, "tier", string(dr.TierImage), "what is captured: image, image+data or data")
	fl.StringArrayVar(&f.data, "data", nil, "folder that is captured file by file, as /srv (may be repeated)")
	fl.StringArrayVar(&f.exclude, "exclude", nil, "what of it is left out: a name as '*.tmp', or a whole path as /srv/cache (may be repeated)")
	fl.DurationVar(&f.dataEvery, "data-every", dr.DefaultEvery, "how often the data is captured")
	fl.StringVar(&f.standby, "standby", "", "with --tier data: the server whose image the data goes onto")
	_ = cmd.RegisterFlagCompletionFunc("tier", cobra.FixedCompletions([]string{
		string(dr.TierImage) + "\tall disks, every time", string(dr.TierImageData) + "\tall disks now and then, folders more often",
		string(dr.TierData) + "\tfolders only, onto the image of a standby"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("standby", func(cmd *cobra.Command, _ []string, text string) ([]string, cobra.ShellCompDirective) {
		return completeServers(cmd, nil, text)
	})
	for _, name := range []string{"data", "exclude"} { // paths of the server, not of this host
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	fl.Int64Var(&f.readLimit, "read-limit", 0, "with --ssh: MiB a second that are read of the server's disks or files at most; 0: no limit. It always comes after the server's own work")
	fl.BoolVar(&f.snapshots, "allow-snapshots", false, "with --ssh: let a capture make LVM snapshots on the server, if its kernel cannot note what is written, and remove them again")
	fl.DurationVar(&f.freeze, "freeze-limit", 0, fmt.Sprintf("longest time a file system may stand still; 0: %s", dr.DefaultFreezeLimit))
	f.hooks.register(cmd)
}

func serverAddCommand() *cobra.Command {
	var f serverFlags
	var ssh, hostKey, vm, connect, appliance string
	var disks, only []string
	var accept bool
	cmd := &cobra.Command{
		Use:   "add NAME (--ssh USER@HOST[:PORT] [--key FILE] | --vm DOMAIN | --disk PATH…)",
		Short: "Protect a server",
		Long: `Protect a server. With --ssh a live Linux server is captured over its own SSH: a small agent is copied into
/var/cache/muster there, runs as root while a snapshot is taken, and changes nothing else. With --vm a virtual machine that
libvirt runs on this host is captured through its QEMU, and nothing is installed in it. With --disk a raw disk image file or block
device on this machine is captured as it is.

With --resident small programs stay in the server's kernel (eBPF; no module, no process) and note which blocks are written, so
that a snapshot reads only those. They are gone after 'muster server remove' and after a reboot, when the next snapshot compares
everything once. Without it they are there while a snapshot is taken, and every snapshot reads all that is in use on the disks.
Either way file systems stand still for a moment only, where the server's kernel can run them (5.10 or newer, with BTF).

With --allow-snapshots a server whose kernel cannot is read from LVM snapshots of its logical volumes, so that its file systems
stand still only while those are made. That writes to the server's volume groups, which Muster otherwise never does: it
needs free room there (a fifth of a volume is good, a fiftieth and 64 MiB the least), and writing is slower until
the snapshots are removed, which is at the end of the capture, or if that was killed by the next one.
'muster server show' says which way was used and why no better one.

A virtual machine's qcow2 disks get a dirty bitmap, which QEMU keeps in them, so that a snapshot reads only what was written
since the last one, over restarts too; 'muster server remove' takes it out again. While it is there libvirt refuses to make an
external snapshot of the machine or to go back to one ('virsh checkpoint-delete' makes way). Raw disks hold none and are read as a whole. If
qemu-guest-agent runs in the machine, its file systems are frozen for the moment in which a backup begins; otherwise a snapshot is
as after a power cut. While it is read QEMU puts aside what the machine overwrites, in a file beside each image.

PostgreSQL, MySQL and MariaDB on a server reached by --ssh are brought to rest for the moment of a snapshot, which is then application-consistent,
and so is whatever has a hook in /etc/muster/hooks.d there: an executable file of root's, run with "pre" before and "post" after.

With --tier image+data the disks are captured now and then (--every), and the folders named with --data file by file more often
(--data-every); only files that changed are read. The rescue image is the last image with the newest data put into it, and is
tested so. With --tier data no disk is captured: the data goes onto the image of another server (--standby), which has a
compatible system and the application installed.

The server's host key is shown on first contact and must be confirmed; afterwards only that key is accepted.`,
		Example: `  muster server add shop --ssh root@10.0.0.5 --key /root/.ssh/muster --resident --rto 15m --rpo 24h --check shop-checks.yaml
  muster server add till --appliance office --ssh root@10.1.0.5
  muster server add mail --vm mail-1 --rto 15m --rpo 24h
  muster server add lab --vm lab --connect 'qemu:///system?socket=/run/other/libvirt-sock' --only-disk vda
  muster server add old --disk /images/old.raw
  muster server add web --ssh root@10.0.0.6 --key /root/.ssh/muster --tier image+data --every 168h --data /srv --data /var/lib/app --exclude '*.tmp' --data-every 24h
  muster server add web2 --ssh root@10.0.0.7 --key /root/.ssh/muster --tier data --data /srv --standby old`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s := dr.Server{Name: args[0], Customer: f.customer, Appliance: appliance, Schedule: dr.Schedule{Every: f.every}, Objectives: dr.Objectives{RTO: f.rto, RPO: f.rpo},
				Memory: f.memory, CPUs: f.cpus, Retention: dr.Retention{KeepLast: f.keepLast}, Signs: dr.SignLevel(f.signs),
				Tier: dr.Tier(f.tier), Standby: f.standby, Data: dr.DataSet{Paths: f.data, Exclude: f.exclude}}
			if s.HasData() {
				s.Data.Every = f.dataEvery
			}
			if err := dr.ValidateName(s.Name); err != nil {
				return withCode(exitUsage, err)
			}
			var err error
			if s.Checks, err = readChecks(f.checks); err != nil {
				return withCode(exitUsage, err)
			}
			if s.Overlays, err = absolute(f.overlays); err != nil {
				return err
			}
			for _, d := range disks {
				d, err := absolute(d)
				if err != nil {
					return err
				}
				s.Source.Disks = append(s.Source.Disks, d)
			}
			if ssh != "" {
				source, err := dr.ParseSSH(ssh)
				if err != nil {
					return withCode(exitUsage, err)
				}
				source.HostKey, source.FreezeLimit, source.Disks, source.Resident = hostKey, f.freeze, only, f.resident
				source.Snapshots, source.ReadLimit = f.snapshots, f.readLimit<<20
				if source.KeyFile, err = absolute(f.key); err != nil {
					return err
				}
				if source.Hooks, err = f.hooks.settings(); err != nil {
					return withCode(exitUsage, err)
				}
				s.Source.SSH = &source
			}
			if vm != "" {
				s.Source.VM = &dr.VMSource{URI: connect, Domain: vm, Disks: only}
				if _, err := s.Source.VM.Socket(); err != nil {
					return withCode(exitUsage, err)
				}
			}
			return addServer(cmd, s, accept)
		},
	}
	f.register(cmd)
	cmd.Flags().StringVar(&appliance, "appliance", "", "appliance on another machine that captures it; --ssh, --disk, --vm and --key are then as that machine sees them")
	_ = cmd.RegisterFlagCompletionFunc("appliance", completeAppliances)
	cmd.Flags().StringVar(&ssh, "ssh", "", "live Linux server: USER@HOST[:PORT]")
	cmd.Flags().StringArrayVar(&disks, "disk", nil, "raw disk image or block device (may be repeated, in the server's own order)")
	cmd.Flags().StringArrayVar(&only, "only-disk", nil, "with --ssh or --vm: only this disk of the server, as sda (may be repeated); without it every disk in use")
	cmd.Flags().StringVar(&vm, "vm", "", "virtual machine of this host's libvirt: its name or UUID")
	cmd.Flags().StringVar(&connect, "connect", "", "with --vm: libvirt to ask, "+dr.DefaultVMURI+" or "+dr.DefaultVMURI+"?socket=/PATH (default "+dr.DefaultVMURI+")")
	cmd.Flags().StringVar(&hostKey, "host-key", "", "host key to expect, as in known_hosts: 'ssh-ed25519 AAAA…'")
	cmd.Flags().BoolVar(&accept, "accept-host-key", false, "accept the host key shown on first contact without asking")
	cmd.MarkFlagsMutuallyExclusive("ssh", "disk", "vm")
	cmd.MarkFlagsOneRequired("ssh", "disk", "vm")
	for _, other := range []string{"key", "host-key", "accept-host-key", "resident", "freeze-limit", "read-limit"} {
		cmd.MarkFlagsMutuallyExclusive("vm", other)
	}
	for _, other := range []string{"ssh", "disk"} {
		cmd.MarkFlagsMutuallyExclusive("connect", other)
	}
	_ = cmd.RegisterFlagCompletionFunc("vm", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		names, err := captureqemu.Machines(cmd.Context(), dr.VMSource{URI: connect})
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	_ = cmd.RegisterFlagCompletionFunc("connect", cobra.FixedCompletions([]string{dr.DefaultVMURI}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

// maxChecksFile bounds a file of checks in bytes.
const maxChecksFile = 1 << 20

func readChecks(files []string) ([]dr.Check, error) {
	var out []dr.Check
	for _, name := range files {
		info, err := os.Stat(name)
		if err != nil {
			return nil, fmt.Errorf("read checks: %w", err)
		}
		if info.Size() > maxChecksFile {
			return nil, fmt.Errorf("read checks: %s is larger than %s", name, size(maxChecksFile))
		}
		raw, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read checks: %w", err)
		}
		var list []dr.Check
		if err := yaml.UnmarshalWithOptions(raw, &list, yaml.Strict()); err != nil {
			return nil, fmt.Errorf("read checks %s: %s", name, yaml.FormatError(err, false, true))
		}
		for i, c := range list {
			if err := c.Validate(); err != nil {
				return nil, fmt.Errorf("read checks %s: check %d: %w", name, i+1, err)
			}
		}
		out = append(out, list...)
	}
	return out, nil
}

func addServer(cmd *cobra.Command, s dr.Server, accept bool) error {
	c := client(cmd)
	defer c.Close()
	contact, err := c.Contact(cmd.Context(), s.Appliance, s.Source)
	if err != nil {
		return err
	}
	if ssh := s.Source.SSH; ssh != nil && ssh.HostKey == "" {
		if err := confirmHostKey(cmd, *ssh, contact, accept); err != nil {
			return err
		}
		ssh.HostKey = contact.HostKey
		if contact, err = c.Contact(cmd.Context(), s.Appliance, s.Source); err != nil {
			return err
		}
	}
	added, err := c.AddServer(cmd.Context(), s)
	if err != nil {
		return err
	}
	if wantJSON(cmd) {
		return printJSON(cmd, added)
	}
	out := cmd.OutOrStdout()
	inv := contact.Inventory
	fmt.Fprintf(out, "%s is protected.\n", added.Name)
	if inv.Distro.Name != "" {
		fmt.Fprintf(out, "  %s, kernel %s, %s firmware, %d processors, %s memory\n", tame(inv.Distro.Name), tame(inv.Kernel), inv.Firmware, inv.CPU.Count, size(inv.Memory))
	} else if inv.CPU.Count > 0 {
		fmt.Fprintf(out, "  %s firmware, %d processors, %s memory\n", inv.Firmware, inv.CPU.Count, size(inv.Memory))
	}
	for _, d := range inv.Disks {
		fmt.Fprintf(out, "  disk %s, %s\n", tame(d.Name), size(d.Size))
	}
	fmt.Fprintf(out, "Its first snapshot is taken at once; follow it with 'muster server show %s', or take one now with 'muster snapshot %s'.\n", added.Name, added.Name)
	return nil
}

func confirmHostKey(cmd *cobra.Command, ssh dr.SSHSource, contact api.Contact, accept bool) error {
	fmt.Fprintf(cmd.ErrOrStderr(), "%s shows the host key %s\n", ssh, contact.Fingerprint)
	if accept {
		return nil
	}
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return withCode(exitRefused, errors.New("confirm host key: nobody is there to ask; give --accept-host-key, or the key with --host-key"))
	}
	fmt.Fprint(cmd.ErrOrStderr(), "Is that the right one? Compare it on the server with 'ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub'. Type yes: ")
	line, err := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "yes" {
		return withCode(exitRefused, errors.New("confirm host key: not confirmed, nothing was added"))
	}
	return nil
}

func serverListCommand() *cobra.Command {
	return &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List the servers and where each stands", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		c := client(cmd)
		defer c.Close()
		list, err := api.AllServers(cmd.Context(), c)
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, list)
		}
		if len(list) == 0 {
			fmt.Fprintln(cmd.OutOrStdout(), "No server is protected yet: add one with 'muster server add'.")
			return nil
		}
		var rows [][]string
		for _, s := range list {
			lkg, newest, doing := "none", "none", "-"
			if s.LKG != nil {
				lkg = ago(s.LKG.Snapshot.Taken)
			}
			if s.Newest != nil {
				newest = string(s.Newest.State) + ", " + ago(s.Newest.Snapshot.Taken)
				if s.Newest.HeldBy != "" {
					newest += ", HELD"
				}
			}
			if s.Operation != nil {
				doing = s.Operation.Kind
			}
			if s.Invocation != nil {
				doing = "INVOKED (" + string(s.Invocation.State) + ")"
			}
			rows = append(rows, []string{s.Server.Name, lkg, newest, ago(s.Due), fmt.Sprint(s.Tickets), doing})
		}
		table(cmd.OutOrStdout(), "SERVER LAST-KNOWN-GOOD NEWEST DUE TICKETS DOING", rows)
		return nil
	}}
}

func serverShowCommand() *cobra.Command {
	return &cobra.Command{Use: "show NAME", Short: "Show a server and where it stands", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers, RunE: func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		s, err := c.Server(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, s)
		}
		printServer(cmd, s)
		return nil
	}}
}

func printServer(cmd *cobra.Command, s api.ServerStatus) {
	out := cmd.OutOrStdout()
	fmt.Fprintf(out, "server       %s (%s)\n", s.Server.Name, s.Server.ID)
	if s.Server.Customer != "" {
		fmt.Fprintf(out, "customer     %s\n", s.Server.Customer)
	}
	fmt.Fprintf(out, "source       %s: %s\n", s.Server.Source.Kind(), s.Server.Source)
	if s.Server.Appliance != "" {
		printNear(out, s)
	}
	if ssh := s.Server.Source.SSH; ssh != nil && s.Server.HasImage() {
		fmt.Fprintf(out, "hooks        %s\n", hooksOf(ssh.Hooks))
	}
	if s.Server.Source.VM != nil {
		fmt.Fprintf(out, "read         %s\n", howReadVM(s.Newest))
	} else {
		printProvider(out, s.Server.Source, s.Newest)
	}
	printSchedule(out, s)
	if o := s.Server.Objectives; o.RTO > 0 || o.RPO > 0 {
		fmt.Fprintf(out, "promised     RTO %s, RPO %s\n", span(o.RTO), span(o.RPO))
	}
	for _, c := range s.Server.Checks {
		fmt.Fprintf(out, "check        %s (%s)\n", c.Name, c.Kind)
	}
	fmt.Fprintf(out, "tampering    %s\n", howWatched(s.Server.Signs))
	if !s.Retest.IsZero() {
		fmt.Fprintf(out, "test again   %s: the last one was inconclusive\n", ago(s.Retest))
	}
	fmt.Fprintf(out, "tickets      %d open\n", s.Tickets)
	if s.Operation != nil {
		fmt.Fprintf(out, "doing        %s: %s%s %s\n", s.Operation.Kind, s.Operation.Step, onSilo(s.Operation.Silo), tame(s.Operation.Part))
	}
	if s.Invocation != nil {
		fmt.Fprintf(out, "invoked      %s, %s%s, at %s\n", s.Invocation.ID, s.Invocation.State, onSilo(s.Invocation.Silo), strings.Join(s.Invocation.Addresses, ", "))
	}
	if s.LKG == nil {
		fmt.Fprintln(out, "\nNo snapshot of it has passed a test yet.")
	} else {
		fmt.Fprintln(out, "\nLast-known-good:")
		if len(s.Holders) > 0 {
			fmt.Fprintf(out, "at once on   silo %s\n", tame(strings.Join(s.Holders, ", ")))
		} else {
			fmt.Fprintln(out, "at once on   no silo: its deltas are fetched from the store first")
		}
		printRecord(out, *s.LKG)
	}
	if s.Newest != nil && !s.Newest.LKG {
		fmt.Fprintln(out, "\nNewest:")
		printRecord(out, *s.Newest)
	}
}

// printNear says what a server's appliance has of it.
func printNear(out io.Writer, s api.ServerStatus) {
	if s.Near == nil {
		fmt.Fprintf(out, "appliance    %s, which has not spoken of it yet\n", s.Server.Appliance)
		return
	}
	fmt.Fprintf(out, "appliance    %s: captured %s, in the far store %s; %d snapshots there, %d still to be sent\n",
		s.Server.Appliance, ago(s.Near.Kept), ago(s.Near.Replicated), s.Near.Snapshots, s.Near.Owed)
}

// howWatched says what becomes of signs of tampering.
func howWatched(level dr.SignLevel) string {
	switch level {
	case dr.SignsOff:
		return "signs are measured, and nothing is held for them; 'muster server set NAME --signs normal' changes that"
	case "":
		level = dr.SignsNormal
	}
	return "a snapshot that shows signs of it is held until somebody decides; sensitivity " + string(level)
}

// ways says in words how each provider sees the disks.
var ways = map[dr.Provider]string{
	dr.ProviderTracking: "its kernel notes what is written; a short freeze",
	dr.ProviderLVM:      "snapshots of its logical volumes",
	dr.ProviderZFS:      "snapshots of its ZFS volumes",
	dr.ProviderFreeze:   "every disk compared as a whole, then once more while its file systems stand still",
	dr.ProviderCrash:    "every disk compared as a whole while nobody wrote to it",
	dr.ProviderQEMU:     "its hypervisor notes what is written",
	dr.ProviderVSS:      "shadow copies of its volumes",
	dr.ProviderReflink:  "a clone of its image files",
	dr.ProviderRest:     "as it is; refused if anybody writes to it",
	dr.ProviderFiles:    "folders, file by file; only what changed is read",
}

// printProvider says how a server was captured the last time, and why not in a better way.
func printProvider(out io.Writer, source dr.Source, newest *dr.Record) {
	if newest == nil || newest.Snapshot.Pass.Provider == "" {
		fmt.Fprintln(out, "read         not yet")
		return
	}
	pass := newest.Snapshot.Pass
	fmt.Fprintf(out, "read         %s: %s\n", pass.Provider, ways[pass.Provider])
	if pass.Provider == dr.ProviderTracking && source.SSH != nil && !source.SSH.Resident {
		fmt.Fprintln(out, "  in full    it forgets between snapshots; 'muster server set NAME --resident' has it remember, and only that is read")
	}
	for _, p := range pass.PassedOver {
		fmt.Fprintf(out, "  not %-7s %s\n", p.Provider+":", tame(p.Reason))
	}
}

// printSchedule says what is captured when.
func printSchedule(out io.Writer, s api.ServerStatus) {
	if s.Server.HasImage() {
		fmt.Fprintf(out, "schedule     every %s, next %s\n", span(s.Server.Schedule.Every), ago(s.Due))
	}
	if !s.Server.HasData() {
		return
	}
	d := s.Server.Data
	fmt.Fprintf(out, "data         %s every %s, next %s\n", strings.Join(d.Paths, ", "), span(d.Schedule().Every), ago(s.DataDue))
	if len(d.Exclude) > 0 {
		fmt.Fprintf(out, "left out     %s\n", strings.Join(d.Exclude, ", "))
	}
	if s.Server.Standby != "" {
		fmt.Fprintf(out, "standby      %s\n", s.Server.Standby)
	}
}

// howReadVM says how a virtual machine is captured, and why it is not done better.
func howReadVM(newest *dr.Record) string {
	if newest == nil {
		return "through its QEMU, from outside"
	}
	how := "through its QEMU: "
	switch pass := newest.Snapshot.Pass; pass.Kind {
	case dr.PassTracked:
		how += "only what was written, which its bitmaps note"
	case dr.PassFull:
		how += "in full the last time"
	default:
		how += "compared as a whole the last time: " + tame(pass.Reason)
	}
	if newest.Snapshot.Consistency == dr.CrashConsistent {
		how += "; not frozen (is qemu-guest-agent installed in it?)"
	}
	return how
}

func serverSetCommand() *cobra.Command {
	var f serverFlags
	cmd := &cobra.Command{Use: "set NAME", Short: "Change a server's settings; what is not named stays", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers,
		Example: `  muster server set shop --every 4h --rto 30m
  muster server set shop --tier image+data --every 168h --data /srv --data-every 4h
  muster server set shop --hook-limit 5m --hooks-required
  muster server set shop --hooks off`,
		RunE: func(cmd *cobra.Command, args []string) error {
			change, err := f.change(cmd)
			if err != nil {
				return withCode(exitUsage, err)
			}
			c := client(cmd)
			defer c.Close()
			s, err := c.UpdateServer(cmd.Context(), args[0], change)
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, s)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is changed.\n", s.Name)
			return nil
		}}
	f.register(cmd)
	return cmd
}

func (f *serverFlags) change(cmd *cobra.Command) (c api.ServerChange, err error) {
	given := cmd.Flags().Changed
	for _, d := range []struct {
		flag string
		from *time.Duration
		to   **time.Duration
	}{{"every", &f.every, &c.Every}, {"rto", &f.rto, &c.RTO}, {"rpo", &f.rpo, &c.RPO}, {"freeze-limit", &f.freeze, &c.FreezeTime}} {
		if given(d.flag) {
			*d.to = d.from
		}
	}
	for _, n := range []struct {
		flag string
		from *int
		to   **int
	}{{"memory", &f.memory, &c.Memory}, {"cpus", &f.cpus, &c.CPUs}, {"keep-last", &f.keepLast, &c.KeepLast}} {
		if given(n.flag) {
			*n.to = n.from
		}
	}
	if given("signs") {
		level := dr.SignLevel(f.signs)
		if err := level.Validate(); err != nil {
			return c, err
		}
		c.Signs = &level
	}
	if given("customer") {
		c.Customer = &f.customer
	}
	if given("read-limit") {
		limit := f.readLimit << 20
		c.ReadLimit = &limit
	}
	if given("resident") {
		c.Resident = &f.resident
	}
	if given("tier") {
		tier := dr.Tier(f.tier)
		c.Tier = &tier
		if tier == dr.TierImage { // what only the others have
			c.DataPaths, c.DataExclude, c.Standby = new([]string), new([]string), new(string)
		} else if tier == dr.TierImageData {
			c.Standby = new(string)
		}
	}
	if given("data") {
		c.DataPaths = &f.data
	}
	if given("exclude") {
		c.DataExclude = &f.exclude
	}
	if given("data-every") {
		c.DataEvery = &f.dataEvery
	}
	if given("standby") {
		c.Standby = &f.standby
	}
	if err := f.hooks.change(cmd, &c); err != nil {
		return c, err
	}
	if given("allow-snapshots") {
		c.Snapshots = &f.snapshots
	}
	if given("check") {
		checks, err := readChecks(f.checks)
		if err != nil {
			return c, err
		}
		c.Checks = &checks
	}
	if given("overlays") {
		path, err := absolute(f.overlays)
		if err != nil {
			return c, err
		}
		c.Overlays = &path
	}
	if given("key") {
		path, err := absolute(f.key)
		if err != nil {
			return c, err
		}
		c.KeyFile = &path
	}
	return c, nil
}

func serverRemoveCommand() *cobra.Command {
	return &cobra.Command{Use: "remove NAME", Aliases: []string{"rm"}, Short: "Stop protecting a server; what is kept of it stays", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers, RunE: func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		if err := c.RemoveServer(cmd.Context(), args[0]); err != nil {
			return err
		}
		if !wantJSON(cmd) {
			fmt.Fprintf(cmd.OutOrStdout(), "%s is no longer protected. Its snapshots are still in the store.\n", args[0])
		}
		return nil
	}}
}

// completeServers completes the names of servers, if a master answers.
func completeServers(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c := client(cmd)
	defer c.Close()
	list, err := api.AllServers(cmd.Context(), c)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, s := range list {
		names = append(names, s.Server.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
