package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
)

// errNotLoopback is why an address is no place for metrics.
var errNotLoopback = errors.New("metrics ask nobody who they are, so they are served on this machine's loopback only: give 127.0.0.1:PORT, and let a proxy that asks stand before it")

// listenMetrics serves metrics and health alone on a loopback address.
func (p *platform) listenMetrics(address string, handler http.Handler) error {
	at, err := netip.ParseAddrPort(strings.Replace(address, "localhost:", "127.0.0.1:", 1))
	if err != nil {
		return withCode(exitUsage, fmt.Errorf("serve metrics on %q: write it as 127.0.0.1:9411 or [::1]:9411", address))
	}
	if !at.Addr().IsLoopback() {
		return withCode(exitUsage, fmt.Errorf("serve metrics on %s: %w", address, errNotLoopback))
	}
	l, err := net.Listen("tcp", at.String())
	if err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	go func() { _ = server.Serve(l) }() // until it is closed
	p.onClose("metrics", server.Close)
	p.log.Info("metrics are served", "address", l.Addr().String())
	return nil
}

// observed puts metrics and health beside the operators' interface.
func observed(operator, observer http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", operator)
	for _, path := range []string{api.MetricsPath, api.AlivePath, api.ReadyPath} {
		mux.Handle(path, observer)
	}
	return mux
}

// notify tells systemd, if it started us, that we serve, and then as often as it wants to hear it that we live. If we do not, it
// starts us anew.
func (p *platform) notify(ctx context.Context, o api.Observer) {
	if told, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil || !told {
		if err != nil {
			p.log.WarnContext(ctx, "tell systemd", "error", err)
		}
		return
	}
	p.onClose("notification", func() error {
		_, err := daemon.SdNotify(false, daemon.SdNotifyStopping)
		return err
	})
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return
	}
	go func() {
		tick := time.NewTicker(every / 3)
		defer tick.Stop()
		for {
			if h := o.Health(ctx); h.Alive {
				_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog) // what does not reach it is what it watches for
			} else if ctx.Err() == nil {
				p.log.ErrorContext(ctx, "not alive", "health", fmt.Sprint(h.Checks))
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
}

func metricsCommand() *cobra.Command {
	return &cobra.Command{Use: "metrics", Short: "Print the metrics, as Prometheus reads them", Args: cobra.NoArgs,
		Long: `Print where everything stands in numbers, in the form that Prometheus reads. 'muster serve --metrics 127.0.0.1:9411' serves the same
at /metrics, with /healthz and /readyz. docs/operator/monitoring.md says what each means and when to be woken.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := client(cmd)
			defer c.Close()
			return c.Metrics(cmd.Context(), cmd.OutOrStdout())
		}}
}

func healthCommand() *cobra.Command {
	return &cobra.Command{Use: "health", Short: "Say what of the running platform works", Args: cobra.NoArgs,
		Long: `Ask the running platform what works. Exit code 0: everything that protecting needs. 1: it answers, and something does not
work. 5: nobody answers. What this host lacks before anything runs on it is what 'muster doctor' says.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := client(cmd)
			defer c.Close()
			h, err := c.Health(cmd.Context())
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				if err := printJSON(cmd, h); err != nil {
					return err
				}
			} else {
				printHealth(cmd, h)
			}
			if !h.Ready {
				return withCode(exitFailed, errQuiet)
			}
			return nil
		}}
}

func printHealth(cmd *cobra.Command, h api.Health) {
	for _, c := range h.Checks {
		state := "ok"
		if !c.OK {
			state = "FAIL"
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%-5s %-10s %s\n", state, c.Name, tame(c.Detail))
	}
	switch {
	case !h.Alive:
		fmt.Fprintln(cmd.OutOrStdout(), "It is NOT ALIVE: start it anew.")
	case !h.Ready:
		fmt.Fprintln(cmd.OutOrStdout(), "It is NOT READY to protect anything.")
	default:
		fmt.Fprintln(cmd.OutOrStdout(), "It is ready.")
	}
}

func meterCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "meter", Short: "Say what each customer had of the platform in a month", Args: cobra.NoArgs,
		Long: `Add up, for each customer and one month in UTC: what of its servers is protected, what that takes in the store, what was sent by the
servers and over the line into the far store, and the memory and processors that rescue machines had in boot tests and invocations. It is worked out from the record each time, so
that any month can be asked for again. A server counts for the customer that its definition names now: see 'muster server set --customer'.`,
		Example: `  muster meter --month 2026-11
  muster meter --month 2026-11 --customer acme --json
  muster meter --month 2026-11 --csv > november.csv`}
	month := cmd.Flags().String("month", time.Now().UTC().Format("2006-01"), "month, as 2026-11")
	customer := cmd.Flags().String("customer", "", "only this customer")
	asCSV := cmd.Flags().Bool("csv", false, "print CSV, for spreadsheets")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *asCSV && wantJSON(cmd) {
			return withCode(exitUsage, errors.New("give one of --json and --csv"))
		}
		c := client(cmd)
		defer c.Close()
		list, err := c.Meter(cmd.Context(), *month, *customer)
		if err != nil {
			return err
		}
		switch {
		case wantJSON(cmd):
			return printJSON(cmd, list)
		case *asCSV:
			return meterCSV(cmd, list)
		case len(list) == 0:
			fmt.Fprintf(cmd.OutOrStdout(), "Nothing was recorded up to the end of %s.\n", *month)
			return nil
		}
		printMeter(cmd, list)
		return nil
	}
	return cmd
}

func customerName(name string) string {
	if name == "" {
		return "(own)"
	}
	return name
}

func printMeter(cmd *cobra.Command, list []dr.Metered) {
	var rows [][]string
	for _, m := range list {
		rows = append(rows, []string{customerName(m.Customer), strconv.Itoa(m.Servers), size(m.Protected), size(m.Stored), size(m.Added), size(m.Sent), size(m.Replicated),
			fmt.Sprint(m.Snapshots), capacity(m.Tests), capacity(m.Invocations)})
	}
	table(cmd.OutOrStdout(), "CUSTOMER SERVERS PROTECTED STORED ADDED SENT REPLICATED SNAPSHOTS TESTS INVOCATIONS", rows)
}

// capacity prints what machines had as people charge for it.
func capacity(c dr.Capacity) string {
	return fmt.Sprintf("%d: %.2f h, %.2f GiB·h, %.2f CPU·h", c.Machines, hours(c.Seconds), gibHours(c.Memory), hours(c.CPUs))
}

func hours(seconds int64) float64       { return float64(seconds) / 3600 }
func gibHours(mibSeconds int64) float64 { return float64(mibSeconds) / 1024 / 3600 }

func meterCSV(cmd *cobra.Command, list []dr.Metered) error {
	w := csv.NewWriter(cmd.OutOrStdout())
	_ = w.Write([]string{"month", "customer", "servers", "protected_bytes", "stored_bytes", "added_bytes", "sent_bytes", "replicated_bytes", "snapshots",
		"tests", "test_hours", "test_memory_gib_hours", "test_cpu_hours",
		"invocations", "invocation_hours", "invocation_memory_gib_hours", "invocation_cpu_hours"}) // Error tells
	for _, m := range list {
		row := []string{m.Month, m.Customer}
		for _, n := range []int64{int64(m.Servers), m.Protected, m.Stored, m.Added, m.Sent, m.Replicated, int64(m.Snapshots)} {
			row = append(row, strconv.FormatInt(n, 10))
		}
		for _, c := range []dr.Capacity{m.Tests, m.Invocations} {
			row = append(row, strconv.Itoa(c.Machines))
			for _, h := range []float64{hours(c.Seconds), gibHours(c.Memory), hours(c.CPUs)} {
				row = append(row, strconv.FormatFloat(h, 'f', 4, 64))
			}
		}
		_ = w.Write(row)
	}
	w.Flush()
	return w.Error()
}
