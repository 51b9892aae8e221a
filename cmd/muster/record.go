package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

func snapshotsCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "snapshots NAME", Short: "List a server's snapshots and what is proven of each", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers}
	show := cmd.Flags().String("show", "", "show this snapshot in full")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		if *show != "" {
			rec, err := c.Record(cmd.Context(), *show)
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, rec)
			}
			printRecord(cmd.OutOrStdout(), rec)
			return nil
		}
		list, err := c.Snapshots(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, list)
		}
		if len(list) == 0 {
			fmt.Fprintf(cmd.OutOrStdout(), "%s has no snapshot yet: take one with 'muster snapshot %s'.\n", args[0], args[0])
			return nil
		}
		var rows [][]string
		for _, r := range list {
			s := r.Snapshot
			kind := dr.SnapshotImage
			if s.IsData() {
				kind = dr.SnapshotData
			}
			rows = append(rows, []string{s.ID, when(s.Taken), string(kind), string(s.Consistency), string(s.Pass.Kind), size(s.Size()), size(s.Stats.Changed), size(s.Stats.Stored), goesOnto(r)})
		}
		table(cmd.OutOrStdout(), "SNAPSHOT TAKEN KIND CONSISTENCY PASS SIZE CHANGED STORED PROVEN", rows)
		return nil
	}
	return cmd
}

// goesOnto says where a record stands, and of data which image it was tested with.
func goesOnto(r dr.Record) string {
	if r.Snapshot.IsData() {
		return proven(r) + ", onto " + r.Snapshot.Image
	}
	return proven(r)
}

func historyCommand() *cobra.Command {
	return &cobra.Command{Use: "promote-history NAME", Aliases: []string{"history"}, Short: "List how last-known-good moved", Args: cobra.ExactArgs(1), ValidArgsFunction: completeServers, RunE: func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		list, err := c.Promotions(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, list)
		}
		if len(list) == 0 {
			fmt.Fprintf(cmd.OutOrStdout(), "No image of %s has passed a test yet.\n", args[0])
			return nil
		}
		var rows [][]string
		for _, p := range list {
			rows = append(rows, []string{when(p.At), p.SnapshotID, p.Previous, p.VerdictID})
		}
		table(cmd.OutOrStdout(), "AT LAST-KNOWN-GOOD BEFORE BY-VERDICT", rows)
		return nil
	}}
}

func ticketsCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "tickets", Short: "List open problems", Args: cobra.NoArgs}
	all := cmd.Flags().Bool("all", false, "also closed ones")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c := client(cmd)
		defer c.Close()
		list, err := c.Tickets(cmd.Context(), *all)
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, list)
		}
		if len(list) == 0 {
			fmt.Fprintln(cmd.OutOrStdout(), "No open tickets.")
			return nil
		}
		for _, t := range list {
			printTicket(cmd, t)
		}
		return nil
	}
	closing := &cobra.Command{Use: "close TICKET --reason TEXT", Short: "Close a ticket", Args: cobra.ExactArgs(1)}
	reason := closing.Flags().String("reason", "", "why it is no problem any more")
	_ = closing.MarkFlagRequired("reason")
	closing.RunE = func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		return c.CloseTicket(cmd.Context(), args[0], *reason)
	}
	cmd.AddCommand(closing)
	return cmd
}

func printTicket(cmd *cobra.Command, t dr.Ticket) {
	out := cmd.OutOrStdout()
	state := "open"
	if t.Closed != nil {
		state = "closed " + when(*t.Closed) + " (" + tame(t.Reason) + ")"
	}
	fmt.Fprintf(out, "%s  %s: %s\n", t.ID, t.Server, tame(t.Title))
	fmt.Fprintf(out, "  problem  %s, %s\n", t.Problem, state)
	fmt.Fprintf(out, "  seen     %d times, first %s, last %s\n", t.Count, when(t.Opened), when(t.LastSeen))
	if t.Snapshot != "" {
		fmt.Fprintf(out, "  snapshot %s\n", t.Snapshot)
	}
	if t.Detail != "" {
		fmt.Fprintf(out, "  detail   %s\n", tame(t.Detail))
	}
}

// eventsPoll is how often 'events --follow' looks again.
const eventsPoll = time.Second

func eventsCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "events", Short: "List what happened", Args: cobra.NoArgs}
	after := cmd.Flags().Int64("after", 0, "only events after this number")
	limit := cmd.Flags().Int("limit", 200, "at most so many")
	server := cmd.Flags().String("server", "", "only this server's")
	followUp := cmd.Flags().Bool("follow", false, "go on as events happen")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c := client(cmd)
		defer c.Close()
		for {
			list, err := c.Events(cmd.Context(), *after, *limit, *server)
			if err != nil {
				return err
			}
			if wantJSON(cmd) && (len(list) > 0 || !*followUp) {
				if err := printJSON(cmd, list); err != nil {
					return err
				}
			}
			for _, e := range list {
				if !wantJSON(cmd) {
					fmt.Fprintf(cmd.OutOrStdout(), "%6d  %s  %-24s %-12s %s\n", e.Seq, when(e.At), e.Kind, e.Server, tame(e.Message))
				}
				*after = e.Seq
			}
			if !*followUp {
				return nil
			}
			select {
			case <-cmd.Context().Done():
				return nil
			case <-time.After(eventsPoll):
			}
		}
	}
	return cmd
}

func operationCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "operation", Aliases: []string{"operations"}, Short: "Look at long work, follow it, cancel it", Args: cobra.NoArgs}
	list := func(cmd *cobra.Command, _ []string) error {
		c := client(cmd)
		defer c.Close()
		ops, err := c.Operations(cmd.Context())
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, ops)
		}
		var rows [][]string
		for _, op := range ops {
			rows = append(rows, []string{op.ID, string(op.State), op.Step, when(op.Started), span(ran(op)), op.Error})
		}
		table(cmd.OutOrStdout(), "OPERATION STATE STEP STARTED TOOK ERROR", rows)
		return nil
	}
	cmd.RunE = list
	cmd.AddCommand(
		&cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List operations, newest first", Args: cobra.NoArgs, RunE: list},
		&cobra.Command{Use: "follow OPERATION", Short: "Show an operation's progress until it ends", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			c := client(cmd)
			defer c.Close()
			op, err := c.Operation(cmd.Context(), args[0], 0, 0)
			if err != nil {
				return err
			}
			if op, err = follow(cmd, c, op); err != nil {
				return err
			}
			err = present(cmd, outcome{Operation: op}, func() {
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s after %s.\n", op.Kind, op.State, span(ran(op)))
			})
			if err != nil {
				return err
			}
			return failed(op)
		}},
		&cobra.Command{Use: "cancel OPERATION", Short: "Cancel an operation; what it began is undone", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			c := client(cmd)
			defer c.Close()
			return c.CancelOperation(cmd.Context(), args[0])
		}},
	)
	return cmd
}

func storeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "store", Short: "Look after the store: usage, verify, collect, adopt", Args: cobra.NoArgs}
	usage := &cobra.Command{Use: "usage", Short: "Say what each store holds", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		c := client(cmd)
		defer c.Close()
		all, err := c.StoreUsage(cmd.Context())
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, all)
		}
		rows := [][]string{}
		for _, u := range all {
			free := "-" // a bucket has no end
			if u.Free >= 0 {
				free = size(u.Free)
			}
			if u.Error != "" {
				fmt.Fprintf(cmd.ErrOrStderr(), "muster: store of %s: %s\n", customerName(u.Customer), u.Error)
			}
			rows = append(rows, []string{customerName(u.Customer), strconv.Itoa(u.Snapshots), size(u.Logical), size(u.Bytes), free, u.Location})
		}
		table(cmd.OutOrStdout(), "CUSTOMER SNAPSHOTS DISKS STORED FREE LOCATION", rows)
		return nil
	}}
	verify := &cobra.Command{Use: "verify", Short: "Read back every block and say what is damaged", Args: cobra.NoArgs,
		Long: "Read back every block of every snapshot, or of one, through decryption and its hash, and count them. Exit code 8 if any is damaged."}
	snapshot := verify.Flags().String("snapshot", "", "only this snapshot")
	verify.RunE = storeWork(func(cmd *cobra.Command, c *api.Client) (api.Operation, error) {
		return c.VerifyStore(cmd.Context(), *snapshot)
	})
	collect := &cobra.Command{Use: "collect", Short: "Free the space of expired snapshots", Args: cobra.NoArgs}
	alone := collect.Flags().Bool("alone", false, "free at once what is not needed; only where nobody else writes to this store")
	collect.RunE = storeWork(func(cmd *cobra.Command, c *api.Client) (api.Operation, error) {
		return c.CollectStore(cmd.Context(), *alone)
	})
	adopt := &cobra.Command{Use: "adopt", Short: "Rebuild the catalog from the store alone", Args: cobra.NoArgs,
		Long: "Rebuild a lost catalog from what the store holds: servers, snapshots, verdicts and last-known-good. What the catalog has already stays.",
		RunE: storeWork(func(cmd *cobra.Command, c *api.Client) (api.Operation, error) { return c.AdoptStore(cmd.Context()) })}
	cmd.AddCommand(usage, verify, collect, adopt)
	return cmd
}

func storeWork(begin func(cmd *cobra.Command, c *api.Client) (api.Operation, error)) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		c := client(cmd)
		defer c.Close()
		op, err := begin(cmd, c)
		if err != nil {
			return err
		}
		if op, err = follow(cmd, c, op); err != nil {
			return err
		}
		if err := present(cmd, outcome{Operation: op}, func() { printFound(cmd, op) }); err != nil {
			return err
		}
		if err := failed(op); err != nil {
			if op.Kind == "verify" {
				return withCode(exitDamaged, err)
			}
			return err
		}
		return nil
	}
}
