package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// rulingCommand is accept or refuse.
func rulingCommand(verb, short string, accept bool) *cobra.Command {
	use := verb + " SNAPSHOT"
	if accept {
		use += " --reason TEXT"
	}
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: completeHeld,
		Long: short + `.

The decision, who took it and why are recorded with the snapshot, in the store too. It may be changed by another one until the
snapshot expires. See what is suspicious with 'muster tickets' or 'muster snapshots SERVER --show SNAPSHOT'.`}
	reason := cmd.Flags().String("reason", "", "why, for the record")
	if accept {
		_ = cmd.MarkFlagRequired("reason")
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if accept && strings.TrimSpace(*reason) == "" {
			return withCode(exitUsage, errors.New("accept a snapshot: say why with --reason"))
		}
		c := client(cmd)
		defer c.Close()
		op, err := c.Rule(cmd.Context(), args[0], api.RuleRequest{Accept: accept, By: whoami(), Reason: *reason})
		if err != nil {
			return err
		}
		if op, err = follow(cmd, c, op); err != nil {
			return err
		}
		rec, err := c.Record(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		rec.Snapshot.Inventory = dr.Inventory{}
		if err := present(cmd, outcome{Operation: op, Record: &rec}, func() { printRuling(cmd.OutOrStdout(), rec) }); err != nil {
			return err
		}
		return failed(op)
	}
	return cmd
}

func printRuling(w io.Writer, rec dr.Record) {
	s := rec.Snapshot
	switch {
	case rec.Ruling == nil:
	case !rec.Ruling.Accept:
		fmt.Fprintf(w, "%s is refused. Last-known-good of %s stays as it was; snapshots that build on this one are held until one shows the damage undone.\n", s.ID, s.Server)
	case rec.LKG:
		fmt.Fprintf(w, "%s is accepted, and is last-known-good of %s now.\n", s.ID, s.Server)
	case rec.State == dr.Verified:
		fmt.Fprintf(w, "%s is accepted. A newer snapshot is last-known-good of %s.\n", s.ID, s.Server)
	default:
		fmt.Fprintf(w, "%s is accepted. It is %s: it becomes last-known-good of %s when it passes its test.\n", s.ID, rec.State, s.Server)
	}
}

// printSigns prints what a snapshot shows of tampering, if it was looked for.
func printSigns(w io.Writer, r dr.Record) {
	s := r.Snapshot.Signs
	if s == nil {
		return
	}
	if s.Last == nil {
		fmt.Fprintln(w, "signs        none to compare with yet")
	} else {
		fmt.Fprintf(w, "signs        %s\n", changed(*s.Last, s.NoNames))
	}
	if r.HeldBy != "" || r.Ruling != nil {
		for _, sign := range r.Snapshot.Evidence() {
			fmt.Fprintf(w, "SUSPICIOUS   %s\n", tame(sign.Text))
		}
	}
	switch {
	case r.Ruling != nil:
		said := "refused"
		if r.Ruling.Accept {
			said = "accepted"
		}
		fmt.Fprintf(w, "decided      %s by %s, %s", said, tame(r.Ruling.By), when(r.Ruling.At))
		if r.Ruling.Reason != "" {
			fmt.Fprintf(w, ": %s", tame(r.Ruling.Reason))
		}
		fmt.Fprintln(w)
	case r.HeldBy == r.Snapshot.ID:
		fmt.Fprintf(w, "HELD         until somebody decides: 'muster snapshot accept %s --reason …' or 'muster snapshot refuse %s'\n", r.HeldBy, r.HeldBy)
	case r.HeldBy != "":
		fmt.Fprintf(w, "HELD         it builds on %s, which nobody has accepted\n", r.HeldBy)
	}
}

// changed says in a line what was measured.
func changed(c dr.Change, noNames string) string {
	var parts []string
	if b := c.Blocks; b != nil {
		parts = append(parts, fmt.Sprintf("%d of %d changed blocks became random", b.Struck, b.Changed))
	}
	if n := c.Names; n != nil {
		parts = append(parts, fmt.Sprintf("%d files, %.0f %% of names gone, %.0f %% new", n.Now, 100*n.Gone, 100*n.Come))
	} else if noNames != "" {
		parts = append(parts, "no names: "+tame(noNames))
	}
	return strings.Join(parts, "; ")
}

// completeHeld completes the snapshots about which somebody has to decide.
func completeHeld(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c := client(cmd)
	defer c.Close()
	list, err := c.Tickets(cmd.Context(), false)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var ids []string
	for _, t := range list {
		if t.Problem == dr.ProblemTampering {
			ids = append(ids, t.Snapshot)
		}
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}
