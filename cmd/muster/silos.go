package main

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/trust"
)

func siloCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "silo", Short: "Make this machine a silo; look at silos, take them out of work and back",
		Long: `A silo is a host that makes rescue images, boot-tests them and runs them on the day. 'muster serve' has one of its own, called
"` + homeSilo + `". Work goes to whichever has room for it. One that is not heard of is lost: its tests are held by another, and what runs
there for real stays where it is until a person decides.`,
		Example: `  muster silo join --file silo-1.token             # once, on the silo
  muster silo serve                                # leave it running there
  muster silo list                                 # on the master, as all that follows
  muster silo drain silo-1 --reason "new disks"    # it finishes what it has and takes nothing new
  muster silo resume silo-1`}
	cmd.AddCommand(joinCommand(trust.Silo, "  muster silo join muster1.silo.-.silo-1.…\n  muster silo join --file silo-1.token"), siloServeCommand(), siloListCommand(), siloShowCommand(),
		siloDrainCommand("drain", "Have a silo take no new work; what it has it finishes", true),
		siloDrainCommand("resume", "Have a silo that was drained work again", false), siloRemoveCommand())
	return cmd
}

func siloListCommand() *cobra.Command {
	return &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List the silos, what each can and what it has to do", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		c := client(cmd)
		defer c.Close()
		all, err := c.ListSilos(cmd.Context())
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, all)
		}
		if len(all) == 0 {
			fmt.Fprintln(cmd.OutOrStdout(), "No silo has been heard of yet: nothing can be tested or invoked.")
			return nil
		}
		var rows [][]string
		for _, s := range all {
			memory, tests, machines := work(s.Leases)
			state := string(s.Silo.State)
			if s.Silo.State == dr.SiloLost {
				state = "LOST"
			}
			rows = append(rows, []string{s.Silo.Name, state, ago(s.Silo.Seen), string(s.Silo.Hypervisor),
				fmt.Sprintf("%s of %s", size(int64(memory)<<20), size(int64(s.Silo.Memory)<<20)), fmt.Sprint(s.Silo.Cores), size(s.Silo.Space),
				fmt.Sprint(tests), fmt.Sprint(machines), fmt.Sprint(s.Held), cmp.Or(dr.ClockOff(s.Skew), "right"), reservedFor(s.Silo)})
		}
		table(cmd.OutOrStdout(), "SILO STATE HEARD HYPERVISOR MEMORY CORES FREE TESTS INVOKED HOLDS CLOCK RESERVED", rows)
		return nil
	}}
}

// work adds up what a silo has to do: MiB, tests and pre-recoveries, and machines that run for real or are being moved.
func work(leases []dr.Lease) (memory, tests, machines int) {
	for _, l := range leases {
		memory += l.Work.Memory
		if l.Work.Kind.TakenOver() {
			tests++
		} else {
			machines++
		}
	}
	return memory, tests, machines
}

func reservedFor(s dr.Silo) string {
	if len(s.Reserved) == 0 {
		return "-"
	}
	return tame(strings.Join(s.Reserved, ","))
}

func siloShowCommand() *cobra.Command {
	return &cobra.Command{Use: "show NAME", Short: "Show a silo and its work", Args: cobra.ExactArgs(1), ValidArgsFunction: completeSilos, RunE: func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		s, err := c.ShowSilo(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, s)
		}
		printSilo(cmd, s)
		return nil
	}}
}

func printSilo(cmd *cobra.Command, s api.SiloStatus) {
	out := cmd.OutOrStdout()
	how := "connected"
	if !s.Connected {
		how = "not connected"
	}
	fmt.Fprintf(out, "silo         %s: %s, %s, heard of %s\n", s.Silo.Name, s.Silo.State, how, ago(s.Silo.Seen))
	fmt.Fprintf(out, "can          %s\n", tame(s.Silo.Describe()))
	if off := dr.ClockOff(s.Skew); off != "" {
		fmt.Fprintf(out, "clock        %s of the master's: set it, for its machines begin with it\n", off)
	}
	if s.Silo.Tests > 0 {
		fmt.Fprintf(out, "tests        at most %d at once\n", s.Silo.Tests)
	}
	if len(s.Silo.Networks) > 0 {
		fmt.Fprintf(out, "networks     %s\n", tame(strings.Join(s.Silo.Networks, ", ")))
	}
	if s.Silo.Version != "" {
		fmt.Fprintf(out, "release      %s\n", tame(s.Silo.Version))
	}
	fmt.Fprintf(out, "holds        %d last-known-goods that would boot there at once\n", s.Held)
	if len(s.Leases) == 0 {
		fmt.Fprintln(out, "work         none")
		return
	}
	fmt.Fprintln(out)
	var rows [][]string
	for _, l := range s.Leases {
		rows = append(rows, []string{string(l.Work.Kind), l.Work.Server, l.Work.ID, size(int64(l.Work.Memory) << 20), ago(l.Granted), fmt.Sprint(l.Term)})
	}
	table(out, "WORK SERVER IDENTIFIER MEMORY SINCE TERM", rows)
}

func siloDrainCommand(use, short string, drain bool) *cobra.Command {
	cmd := &cobra.Command{Use: use + " NAME", Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: completeSilos}
	var reason *string
	if drain {
		cmd.Long = short + `. Invoked machines stay: they are named, and 'muster invocation move' brings one elsewhere.
The rescue images that it holds are held by others meanwhile, where there are any.`
		cmd.Example = `  muster silo drain silo-1 --reason "new disks"`
		reason = cmd.Flags().String("reason", "", "why, for the record")
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		request := api.DrainRequest{Drain: drain}
		if reason != nil {
			request.Reason = *reason
		}
		s, err := c.DrainSilo(cmd.Context(), args[0], request)
		if err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, s)
		}
		out := cmd.OutOrStdout()
		if !drain {
			fmt.Fprintf(out, "Silo %s takes work again.\n", s.Silo.Name)
			return nil
		}
		_, tests, machines := work(s.Leases)
		fmt.Fprintf(out, "Silo %s takes no new work. It has %d tests and pre-recoveries to finish and %d invoked machines.\n", s.Silo.Name, tests, machines)
		for _, l := range s.Leases {
			if l.Work.Kind == dr.WorkInvocation {
				fmt.Fprintf(out, "  %s runs there for real (%s); it stays until 'muster invocation move %s' or 'end %s'\n", l.Work.Server, l.Work.ID, l.Work.Server, l.Work.Server)
			}
		}
		return nil
	}
	return cmd
}

func siloRemoveCommand() *cobra.Command {
	return &cobra.Command{Use: "remove NAME", Aliases: []string{"rm"}, Short: "Forget a silo that is drained or lost and has nothing left", Args: cobra.ExactArgs(1), ValidArgsFunction: completeSilos, RunE: func(cmd *cobra.Command, args []string) error {
		c := client(cmd)
		defer c.Close()
		return c.RemoveSilo(cmd.Context(), args[0])
	}}
}

func completeSilos(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c := client(cmd)
	defer c.Close()
	all, err := c.ListSilos(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, s := range all {
		names = append(names, s.Silo.Name+"\t"+string(s.Silo.State))
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
