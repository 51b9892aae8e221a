package main

import (
	"cmp"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// hookFlags are the settings for a live server's applications.
type hookFlags struct {
	which    string
	limit    time.Duration
	required bool
}

// The choices of --hooks.
const (
	hooksDetected = "detected"
	hooksOff      = "off"
)

func (f *hookFlags) register(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.which, "hooks", hooksDetected, "with --ssh: 'detected' brings PostgreSQL, MySQL and MariaDB to rest for a snapshot and runs what is in /etc/muster/hooks.d on the server; 'off' leaves applications alone")
	fl.DurationVar(&f.limit, "hook-limit", 0, fmt.Sprintf("longest time one hook may take, then it is killed; 0: %s", dr.DefaultHookLimit))
	fl.BoolVar(&f.required, "hooks-required", false, "take no snapshot if a hook fails, instead of one that is consistent to the file system")
	_ = cmd.RegisterFlagCompletionFunc("hooks", cobra.FixedCompletions([]string{hooksDetected, hooksOff}, cobra.ShellCompDirectiveNoFileComp))
}

// settings are those of a new server.
func (f *hookFlags) settings() (dr.Hooks, error) {
	if f.which != hooksDetected && f.which != hooksOff {
		return dr.Hooks{}, fmt.Errorf("--hooks %q: use %s or %s", f.which, hooksDetected, hooksOff)
	}
	return dr.Hooks{Off: f.which == hooksOff, Limit: f.limit, Required: f.required}, nil
}

// change adds what was given to a change of a server.
func (f *hookFlags) change(cmd *cobra.Command, c *api.ServerChange) error {
	settings, err := f.settings()
	if err != nil {
		return err
	}
	given := cmd.Flags().Changed
	if given("hooks") {
		c.HooksOff = &settings.Off
	}
	if given("hook-limit") {
		c.HookLimit = &settings.Limit
	}
	if given("hooks-required") {
		c.HooksRequired = &settings.Required
	}
	return nil
}

// hooksOf says in words what is done about a server's applications.
func hooksOf(h dr.Hooks) string {
	if h.Off {
		return "off: its applications are left alone"
	}
	s := fmt.Sprintf("databases that are detected, and /etc/muster/hooks.d on it; %s each", span(cmp.Or(h.Limit, dr.DefaultHookLimit)))
	if h.Required {
		s += "; no snapshot if one fails"
	}
	return s
}

func printApplications(w io.Writer, all []dr.Application) {
	for _, a := range all {
		fmt.Fprintf(w, "application  %s: ", tame(a.Name))
		switch {
		case !a.AtRest:
			fmt.Fprintf(w, "not at rest: %s\n", tame(a.Reason))
		case a.Still > 0:
			fmt.Fprintf(w, "at rest, stood still for %s\n", span(a.Still))
		default:
			fmt.Fprintf(w, "at rest, and never stood still\n")
		}
	}
}
