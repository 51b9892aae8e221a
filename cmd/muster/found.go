package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/master"
	"github.com/musterdr/muster/internal/store"
)

// printFound prints what an operation on the store found.
func printFound(cmd *cobra.Command, op api.Operation) {
	out := cmd.OutOrStdout()
	switch op.Kind {
	case "verify":
		var reports []store.VerifyReport
		if json.Unmarshal(op.Result, &reports) == nil {
			for _, r := range reports {
				fmt.Fprintln(out, master.Found(r))
			}
		}
	case "collect":
		var reports []master.Collected
		if json.Unmarshal(op.Result, &reports) != nil {
			return
		}
		for _, r := range reports {
			if r.Customer != "" {
				fmt.Fprintf(out, "Store of %s: ", r.Customer)
			}
			fmt.Fprintf(out, "Freed %s; %d snapshots are kept in %s.\n", size(r.Freed()), r.Snapshots, size(r.After))
			if r.Locks != nil {
				fmt.Fprintf(out, "%d blobs are locked, %d of them for longer than before; %d that nobody needs are locked still.\n", r.Locks.Blobs, r.Locks.Extended, r.Locked)
			}
		}
	case "adopt":
		var a catalog.Adopted
		if json.Unmarshal(op.Result, &a) != nil {
			return
		}
		fmt.Fprintf(out, "Adopted %d servers, %d snapshots, %d rescue images, %d verdicts; %d servers have a last-known-good that had none.\n",
			a.Servers, a.Snapshots, a.PreRecoveries, a.Verdicts, a.LKG)
		for _, left := range a.Left {
			fmt.Fprintf(out, "  left out: %s\n", tame(left))
		}
	}
}
