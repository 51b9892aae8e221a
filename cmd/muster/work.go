package main

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/prerecover"
)

// outcome is what a command that waited for an operation prints as JSON.
type outcome struct {
	Operation  api.Operation  `json:"operation"`
	Record     *dr.Record     `json:"record,omitempty"`
	Invocation *dr.Invocation `json:"invocation,omitempty"`
}

// present prints what came of an operation, for programs or for people.
func present(cmd *cobra.Command, out outcome, text func()) error {
	if wantJSON(cmd) {
		return printJSON(cmd, out)
	}
	text()
	return nil
}

func noWaitFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("no-wait", false, "start it and return at once")
}

// started prints an operation that nobody waits for.
func started(cmd *cobra.Command, op api.Operation) error {
	if wantJSON(cmd) {
		return printJSON(cmd, outcome{Operation: op})
	}
	fmt.Fprintf(cmd.OutOrStdout(), "Started. Follow it with 'muster operation follow %s'.\n", op.ID)
	return nil
}

func snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "snapshot NAME", Short: "Take a snapshot now, and prepare, test and promote it", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers,
		Long: `Take a snapshot of a server now. What is kept is pre-recovered and boot-tested at once; if it passes it becomes
last-known-good. The exit code tells a test that failed (6) from one that could not decide (7).

Of a server with --tier image+data both are taken, the disks and then the data; with --data only the data, which goes onto the
last image.

A snapshot that shows signs of tampering (much that was readable became random, files renamed or gone, ransom notes) is kept and
tested as well, but is held: last-known-good stays until a person accepts or refuses it. Those after it are held too, unless
they show the damage undone.`,
		Example: `  muster snapshot shop
  muster snapshot shop --data
  muster snapshot accept snap-20260101t020000-k3mq2a7x --reason "we encrypted the archive ourselves"
  muster snapshot refuse snap-20260101t020000-k3mq2a7x`}
	cmd.AddCommand(rulingCommand("accept", "Accept a held snapshot: if it passed its test it becomes last-known-good", true),
		rulingCommand("refuse", "Refuse a held snapshot: it is rejected, last-known-good stays", false))
	data := cmd.Flags().Bool("data", false, "only the data, file by file; it goes onto the last image")
	noWait := noWaitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		take := c.Snapshot
		if *data {
			take = c.SnapshotData
		}
		op, err := take(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if *noWait {
			return started(cmd, op)
		}
		return waitForVerdict(cmd, c, op, op.Subject)
	}
	return cmd
}

func prerecoverCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "prerecover NAME", Short: "Make a snapshot's rescue image anew, or explain the one there is", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers,
		Example: `  muster prerecover shop             # make it anew from the newest snapshot
  muster prerecover shop --explain   # what was chosen and changed, and why`}
	snapshot := cmd.Flags().String("snapshot", "", "snapshot; empty: the newest")
	explain := cmd.Flags().Bool("explain", false, "print the virtual hardware chosen and every edit with its reason, before and after; makes nothing if there is a rescue image")
	noWait := noWaitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		rec, err := findRecord(cmd.Context(), c, args[0], *snapshot)
		if err != nil {
			return err
		}
		out := outcome{}
		if !*explain || rec.PreRecovery == nil {
			if out.Operation, err = c.PreRecover(cmd.Context(), args[0], rec.Snapshot.ID); err != nil {
				return err
			}
			if *noWait {
				return started(cmd, out.Operation)
			}
			if out.Operation, err = follow(cmd, c, out.Operation); err != nil {
				return err
			}
			if err := failed(out.Operation); err != nil {
				return err
			}
			if rec, err = c.Record(cmd.Context(), rec.Snapshot.ID); err != nil {
				return err
			}
		}
		if wantJSON(cmd) {
			out.Record = &rec
			return printJSON(cmd, out)
		}
		if rec.PreRecovery == nil {
			return fmt.Errorf("explain %s: it has no rescue image", rec.Snapshot.ID)
		}
		return prerecover.Explain(cmd.OutOrStdout(), *rec.PreRecovery, *explain)
	}
	return cmd
}

// findRecord finds a snapshot of a server in full: the named one, or the newest that has not expired.
func findRecord(ctx context.Context, c *api.Client, server, snapshot string) (dr.Record, error) {
	if snapshot == "" {
		s, err := c.Server(ctx, server)
		if err != nil {
			return dr.Record{}, err
		}
		if s.Newest == nil {
			return dr.Record{}, api.Errorf(api.NotFound, "server %s has no snapshot yet: take one with 'muster snapshot %s'", server, server)
		}
		snapshot = s.Newest.Snapshot.ID
	}
	return c.Record(ctx, snapshot)
}

func testCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "test NAME", Short: "Boot-test a snapshot again", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers,
		Long: `Boot a snapshot's rescue image on a scratch layer, isolated, ask it every question, and throw the machine away. A PASS
makes it last-known-good if it is newer than the present one.`}
	snapshot := cmd.Flags().String("snapshot", "", "snapshot; empty: the newest")
	noWait := noWaitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		rec, err := findRecord(cmd.Context(), c, args[0], *snapshot)
		if err != nil {
			return err
		}
		op, err := c.Test(cmd.Context(), args[0], rec.Snapshot.ID)
		if err != nil {
			return err
		}
		if *noWait {
			return started(cmd, op)
		}
		return waitForVerdict(cmd, c, op, rec.Snapshot.ID)
	}
	return cmd
}

// waitForVerdict follows an operation that ends in a verdict on a snapshot, prints it, and turns it into an exit code.
func waitForVerdict(cmd *cobra.Command, c *api.Client, op api.Operation, snapshot string) error {
	op, err := follow(cmd, c, op)
	if err != nil {
		return err
	}
	rec, recErr := c.Record(cmd.Context(), snapshot)
	if wantJSON(cmd) {
		out := outcome{Operation: op}
		if recErr == nil {
			rec.Snapshot.Inventory = dr.Inventory{}
			out.Record = &rec
		}
		if err := printJSON(cmd, out); err != nil {
			return err
		}
	} else if recErr == nil {
		printRecord(cmd.OutOrStdout(), rec)
	}
	if err := failed(op); err != nil {
		return err
	}
	if recErr != nil {
		return recErr
	}
	return verdictError(rec)
}

func verdictError(rec dr.Record) error {
	if rec.Verdict == nil {
		return withCode(exitInconclusive, fmt.Errorf("snapshot %s has no verdict", rec.Snapshot.ID))
	}
	switch v := rec.Verdict; v.Outcome {
	case dr.Pass:
		return nil
	case dr.Fail:
		return withCode(exitTestFailed, fmt.Errorf("the boot test failed (%s): last-known-good stays as it was; see 'muster tickets'", v.Code))
	default:
		return withCode(exitInconclusive, fmt.Errorf("the boot test is %s (%s): %s", v.Outcome, v.Code, tame(v.Summary)))
	}
}

func invokeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "invoke NAME", Short: "Run a server's last-known-good for real", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers,
		Long: `Boot a server's last-known-good image for real, on a layer of its own that keeps what it writes, run the checks, and say how
long it took (RTO) and how much data was lost (RPO). The machine goes on running, also when muster is restarted, until
'muster invocation end'.

Networks:
  host-only      a network of its own on which this host takes the place of the server's gateway and reaches the server at its
                 production address (default)
  bridge:NAME    an existing bridge of this host, which may lead to your production network
  none           no network`,
		Example: `  muster invoke shop --reason "site burnt down"
  muster invoke shop --network bridge:br0 --yes`}
	yes := cmd.Flags().Bool("yes", false, "do not ask")
	reason := cmd.Flags().String("reason", "", "why, for the record")
	network := cmd.Flags().String("network", "host-only", "host-only, bridge:NAME or none")
	noWait := noWaitFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		choice, err := parseNetwork(*network)
		if err != nil {
			return withCode(exitUsage, err)
		}
		c := client(cmd)
		defer c.Close()
		s, err := c.Server(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if !*yes {
			if err := confirmInvoke(cmd, s); err != nil {
				return err
			}
		}
		op, err := c.Invoke(cmd.Context(), api.InvokeRequest{Server: args[0], By: whoami(), Reason: *reason, Network: choice})
		if err != nil {
			return err
		}
		return comesToRun(cmd, c, op, op.Subject, *noWait)
	}
	return cmd
}

// comesToRun follows an operation after which an invocation is to run, shows what became of it, and fails if it does not run, or not as it should.
func comesToRun(cmd *cobra.Command, c *api.Client, op api.Operation, invocation string, noWait bool) error {
	if noWait {
		return started(cmd, op)
	}
	op, err := follow(cmd, c, op)
	if err != nil {
		return err
	}
	inv, err := c.Invocation(cmd.Context(), invocation)
	if err != nil {
		return err
	}
	if err := present(cmd, outcome{Operation: op, Invocation: &inv}, func() { printInvocation(cmd, inv) }); err != nil {
		return err
	}
	if err := failed(op); err != nil {
		return err
	}
	if inv.Failure != "" {
		return withCode(exitTestFailed, fmt.Errorf("%s", tame(inv.Failure)))
	}
	return nil
}

func parseNetwork(text string) (dr.NetworkChoice, error) {
	kind, bridge, _ := strings.Cut(text, ":")
	choice := dr.NetworkChoice{Kind: dr.NetworkKind(kind), Bridge: bridge}
	switch choice.Kind {
	case dr.NetworkHostOnly, dr.NetworkNone:
		if bridge == "" {
			return choice, nil
		}
	case dr.NetworkBridge:
		if bridge != "" {
			return choice, nil
		}
	}
	return choice, fmt.Errorf("network %q: use host-only, bridge:NAME or none", text)
}

func confirmInvoke(cmd *cobra.Command, s api.ServerStatus) error {
	if s.LKG == nil {
		return api.Errorf(api.Refused, "server %s has no last-known-good: no image of it has passed a test yet; see 'muster tickets'", s.Server.Name)
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "Invoke %s for real from %s, taken %s? Never let it meet its original on one network. Type the server's name: ",
		s.Server.Name, s.LKG.Snapshot.ID, ago(s.LKG.Snapshot.Taken))
	return confirm(cmd, "invoke", s.Server.Name)
}

// confirm reads a name, after it was asked for.
func confirm(cmd *cobra.Command, what, name string) error {
	var line string
	if _, err := fmt.Fscanln(cmd.InOrStdin(), &line); err != nil || line != name {
		return withCode(exitRefused, fmt.Errorf("%s %s: not confirmed, nothing was changed; give --yes where nobody can answer", what, name))
	}
	return nil
}

func whoami() string {
	name := os.Getenv("SUDO_USER")
	if u, err := user.Current(); name == "" && err == nil {
		name = u.Username
	}
	return name
}

// onSilo names where something is; nothing where there was only one place.
func onSilo(name string) string {
	if name == "" {
		return ""
	}
	return " on silo " + tame(name)
}

func printInvocation(cmd *cobra.Command, inv dr.Invocation) {
	out := cmd.OutOrStdout()
	fmt.Fprintf(out, "invocation   %s of %s: %s\n", inv.ID, inv.Server, inv.State)
	fmt.Fprintf(out, "image        %s\n", inv.SnapshotID)
	fmt.Fprintf(out, "asked        %s by %s", when(inv.Requested), tame(inv.By))
	if inv.Reason != "" {
		fmt.Fprintf(out, ": %s", tame(inv.Reason))
	}
	fmt.Fprintln(out)
	if inv.Machine != "" {
		fmt.Fprintf(out, "machine      %s%s, %s\n", inv.Machine, onSilo(inv.Silo), inv.Network.Kind)
	}
	if len(inv.Addresses) > 0 {
		fmt.Fprintf(out, "reach it at  %s\n", strings.Join(inv.Addresses, ", "))
	}
	for _, s := range inv.Steps {
		line := s.Detail
		if s.Error != "" {
			line = "FAILED: " + s.Error
		}
		fmt.Fprintf(out, "step         %s, %s: %s\n", s.Name, span(s.Duration), tame(line))
	}
	printResults(out, inv.Results)
	if inv.Served != nil {
		fmt.Fprintf(out, "measured     RTO %s, RPO %s\n", span(inv.RTA), span(inv.RPA))
	}
	if inv.Failure != "" {
		fmt.Fprintf(out, "failure      %s\n", tame(inv.Failure))
	}
	if inv.Ended != nil {
		fmt.Fprintf(out, "ended        %s\n", when(*inv.Ended))
	}
	if inv.KeptAt != "" {
		fmt.Fprintf(out, "kept         %s\n", inv.KeptAt)
	}
}

func invocationCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "invocation", Short: "Look at invocations, move and end them"}
	list := &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List invocations", Args: cobra.NoArgs}
	all := list.Flags().Bool("all", false, "also those that have ended")
	list.RunE = func(cmd *cobra.Command, _ []string) error {
		c := client(cmd)
		defer c.Close()
		invs, err := c.Invocations(cmd.Context(), *all)
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, invs)
		}
		if len(invs) == 0 {
			fmt.Fprintln(cmd.OutOrStdout(), "Nothing is invoked.")
			return nil
		}
		var rows [][]string
		for _, i := range invs {
			rows = append(rows, []string{i.ID, i.Server, string(i.State), when(i.Requested), strings.Join(i.Addresses, ","), span(i.RTA), span(i.RPA)})
		}
		table(cmd.OutOrStdout(), "INVOCATION SERVER STATE ASKED ADDRESS RTO RPO", rows)
		return nil
	}
	show := &cobra.Command{Use: "show NAME", Short: "Show an invocation, by its identifier or its server", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers, RunE: func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		inv, err := c.Invocation(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, inv)
		}
		printInvocation(cmd, inv)
		return nil
	}}
	cmd.AddCommand(list, show, invocationMoveCommand(), invocationEndCommand())
	return cmd
}

func invocationMoveCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "move NAME [--to SILO]", Short: "Bring an invoked machine to another silo", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers,
		Long: `Bring an invoked machine to another silo, as before maintenance of the one that it is on. Room is made there first, for which boot
tests give way if they must. Then the machine is shut down, what it wrote goes through its customer's store, and it boots on the other
silo and is asked its checks. It stands still meanwhile: for its shutdown, for what it wrote to be kept and fetched, and for its boot.

If anything goes wrong before it runs there, it boots again where it was, with all that it wrote.`,
		Example: `  muster invocation move shop
  muster invocation move shop --to silo-2 --reason "new disks for silo-1" --yes`}
	to := cmd.Flags().String("to", "", "the silo that is to have it (default: the best of those with room)")
	reason := cmd.Flags().String("reason", "", "why, for the record")
	yes := cmd.Flags().Bool("yes", false, "do not ask for confirmation")
	noWait := noWaitFlag(cmd)
	_ = cmd.RegisterFlagCompletionFunc("to", func(cmd *cobra.Command, _ []string, begun string) ([]string, cobra.ShellCompDirective) {
		return completeSilos(cmd, nil, begun)
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		inv, err := c.Invocation(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if !*yes {
			fmt.Fprintf(cmd.ErrOrStderr(), "Shut down the machine of %s%s, and boot it elsewhere? Nobody reaches it meanwhile. Type the server's name: ", inv.Server, onSilo(inv.Silo))
			if err := confirm(cmd, "move", inv.Server); err != nil {
				return err
			}
		}
		op, err := c.MoveInvocation(cmd.Context(), inv.ID, api.MoveRequest{To: *to, By: whoami(), Reason: *reason})
		if err != nil {
			return err
		}
		return comesToRun(cmd, c, op, inv.ID, *noWait)
	}
	return cmd
}

func invocationEndCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "end NAME (--keep | --discard | --abandon --reason TEXT)", Short: "Stop an invoked machine, keeping or discarding what it wrote", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers,
		Long: `Stop an invoked machine. With --keep it is shut down cleanly and each of its disks, with everything it wrote, is written to one
qcow2 file that needs nothing else. With --discard the plug is pulled and what it wrote is gone.

Where the silo that it runs on is lost, neither can be done, and nobody can know from here whether the machine still runs. If you have
made sure that it does not, or that nobody reaches it (the power is off, its port is closed), say so with --abandon: the server may
then be invoked again elsewhere, from last-known-good. Should the silo come back, the machine is stopped and what it wrote is kept there.`,
		Example: `  muster invocation end shop --keep
  muster invocation end shop --abandon --reason "silo-1 is switched off"`}
	keep := cmd.Flags().Bool("keep", false, "keep what the machine wrote")
	cmd.Flags().Bool("discard", false, "throw away what the machine wrote")
	abandon := cmd.Flags().Bool("abandon", false, "give up a machine whose silo is lost, and which cannot run any more")
	reason := cmd.Flags().String("reason", "", "with --abandon: how that was made sure")
	cmd.MarkFlagsMutuallyExclusive("keep", "discard", "abandon")
	cmd.MarkFlagsOneRequired("keep", "discard", "abandon")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		inv, err := c.Invocation(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if *abandon {
			if inv, err = c.AbandonInvocation(cmd.Context(), inv.ID, api.AbandonRequest{By: whoami(), Reason: *reason}); err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, inv)
			}
			printInvocation(cmd, inv)
			return nil
		}
		op, err := c.EndInvocation(cmd.Context(), inv.ID, *keep)
		if err != nil {
			return err
		}
		if op, err = follow(cmd, c, op); err != nil {
			return err
		}
		if inv, err = c.Invocation(cmd.Context(), inv.ID); err != nil {
			return err
		}
		if err := present(cmd, outcome{Operation: op, Invocation: &inv}, func() { printInvocation(cmd, inv) }); err != nil {
			return err
		}
		return failed(op)
	}
	return cmd
}

// ran says how long an operation took, or has been taking.
func ran(op api.Operation) time.Duration {
	if op.Finished != nil {
		return op.Finished.Sub(op.Started)
	}
	return time.Since(op.Started)
}
