// Muster is disaster recovery that proves itself every night: it snapshots servers, makes each snapshot boot, boots it,
// asks it questions, and keeps the newest one that answered as last-known-good.
//
// This program is the master, the appliance and the silo in one process ("muster serve"), and the command line, which
// is a client of that process.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/trust"
)

// version is set when the program is built.
var version = "dev"

// Exit codes, documented in "muster help exit-codes".
const (
	exitOK           = 0
	exitFailed       = 1
	exitUsage        = 2
	exitNotFound     = 3
	exitRefused      = 4
	exitUnavailable  = 5
	exitTestFailed   = 6
	exitInconclusive = 7
	exitDamaged      = 8
)

const exitCodes = `  0  done
  1  it was tried and went wrong
  2  the command was not understood
  3  what was named does not exist
  4  refused: it exists already, is busy, or would break a promise
  5  no master answers, or something it needs is missing
  6  a boot test was held and the image FAILED
  7  a boot test could not decide (INCONCLUSIVE or BLOCKED)
  8  the store is damaged`

// coded is an error with an exit code.
type coded struct {
	code int
	err  error
}

func (c *coded) Error() string { return c.err.Error() }
func (c *coded) Unwrap() error { return c.err }

func withCode(code int, err error) error { return &coded{code, err} }

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	cmd := rootCommand()
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	if !errors.Is(err, errQuiet) {
		fmt.Fprintln(os.Stderr, "muster: "+err.Error())
	}
	return exitCode(err)
}

// errQuiet ends a command whose output has said everything.
var errQuiet = errors.New("")

// usageText is how the errors begin with which the library says that a command was not understood. It has no types for
// them.
var usageText = []string{"unknown command", "required flag", "at least one of the flags", "if any flags in the group"}

func exitCode(err error) int {
	var c *coded
	if errors.As(err, &c) {
		return c.code
	}
	for _, start := range usageText {
		if strings.HasPrefix(err.Error(), start) {
			return exitUsage
		}
	}
	var no *trust.Refusal
	switch {
	case errors.As(err, &no):
		return exitRefused
	case errors.Is(err, trust.ErrUnknown):
		return exitNotFound
	case errors.Is(err, trust.ErrNone):
		return exitUnavailable
	}
	var e *api.Error
	if errors.As(err, &e) {
		switch e.Kind {
		case api.NotFound:
			return exitNotFound
		case api.Conflict, api.Refused:
			return exitRefused
		case api.Invalid:
			return exitUsage
		case api.Unavailable:
			return exitUnavailable
		}
	}
	return exitFailed
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "muster",
		Short: "Disaster recovery that proves itself every night",
		Long: `Muster takes snapshots of servers, makes each one boot in a virtual machine, boots it, asks it questions, and keeps the
newest that answered as last-known-good. On the day, it boots that one for real.`,
		Example: `  muster init                                    # once, on a new machine
  muster serve                                   # leave it running
  muster server add shop --ssh root@10.0.0.5 --key ~/.ssh/id_ed25519
  muster snapshot shop                           # capture, pre-recover, test, promote
  muster invoke shop --reason "site burnt down"  # on the day`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return withCode(exitUsage, fmt.Errorf("%w; see '%s --help'", err, cmd.CommandPath()))
	})
	root.PersistentFlags().String("dir", defaultDir(), "folder of the installation (environment: MUSTER_DIR); where only an appliance or a silo is installed, that one's")
	root.PersistentFlags().Lookup("dir").DefValue = wholeDir // on whatever machine the manual is written
	root.PersistentFlags().Bool("json", false, "print JSON, for programs")
	root.AddGroup(&cobra.Group{ID: "day", Title: "On the day:"}, &cobra.Group{ID: "night", Title: "Every night:"},
		&cobra.Group{ID: "record", Title: "What happened:"}, &cobra.Group{ID: "house", Title: "The installation:"})
	in := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	in("house", initCommand(), serveCommand(), masterCommand(), applianceCommand(), siloCommand(), vmWatchdogCommand(), doctorCommand(), healthCommand(),
		metricsCommand(), meterCommand(), storeCommand(), versionCommand())
	in("night", serverCommand(), snapshotCommand(), replicateCommand(), prerecoverCommand(), testCommand(), exportCommand())
	in("record", snapshotsCommand(), historyCommand(), ticketsCommand(), eventsCommand(), operationCommand())
	in("day", invokeCommand(), invocationCommand(), filesCommand())
	root.AddCommand(&cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: "Exit codes:\n\n" + exitCodes})
	usageErrors(root)
	return root
}

// usageErrors gives wrong arguments the exit code for usage, with the way to help.
func usageErrors(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return withCode(exitUsage, fmt.Errorf("%w; see '%s --help'", err, c.CommandPath()))
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		usageErrors(sub)
	}
}

func versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Say which release this is", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		if wantJSON(cmd) {
			return printJSON(cmd, map[string]string{"version": version})
		}
		fmt.Fprintln(cmd.OutOrStdout(), "muster "+version)
		return nil
	}}
}
