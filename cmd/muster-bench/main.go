// Muster-bench measures what Muster promises, each as a ratio to a peer or to a physical limit in one run, and prints a
// table, or rows of JSON. It is not a test: it is run by "make bench" on a machine that does nothing else.
//
//	muster-bench --image FILE --work DIR [--dir INSTALLATION] [--json FILE] [--only PART]
//
// The image is the raw disk of a server that boots (the demo's shop). Measures that boot it need root and libvirt.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"text/tabwriter"
)

// Row is one measure.
type Row struct {
	Name       string  `json:"name"`
	Value      float64 `json:"value"`
	Limit      float64 `json:"limit"`
	Better     string  `json:"better"` // lower or higher
	OK         bool    `json:"ok"`
	Definition string  `json:"definition"`
	Detail     string  `json:"detail,omitempty"` // the figures behind the ratio
}

func lower(name string, value, limit float64, definition, detail string) Row {
	return Row{name, value, limit, "lower", value <= limit, definition, detail}
}

func higher(name string, value, limit float64, definition, detail string) Row {
	return Row{name, value, limit, "higher", value >= limit, definition, detail}
}

// bench is one run.
type bench struct {
	image string
	work  string
	bin   string // folder of muster's programs
	dir   string // installation in which the shop is protected
	runs  int
}

type part struct {
	name string
	run  func(ctx context.Context, b *bench) ([]Row, error)
	shop bool // it needs an installation in which the shop is protected
}

var parts = []part{{"ingest", ingest, false}, {"increment", increment, false}, {"signs", lookCost, false}, {"replicate", replicates, false}, {"s3", bucketReading, false}, {"capture", captures, false}, {"files", filesets, false}, {"stun", stunned, false}, {"tracking", tracking, false}, {"boot", boot, true}, {"prerecover", prerecoverSize, false}, {"invoke", invokeTime, true}}

func partNames() string {
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	return strings.Join(names, ", ")
}

func main() {
	b := &bench{}
	var jsonFile, only string
	flag.StringVar(&b.image, "image", "", "raw disk image of a server that boots")
	flag.StringVar(&b.work, "work", "", "folder to work in; what is made there is removed")
	flag.StringVar(&b.bin, "bin", "bin", "folder of muster's programs")
	flag.StringVar(&b.dir, "dir", "", "installation that is served and has a last-known-good of the server 'shop'; boot and invoke need it")
	flag.StringVar(&jsonFile, "json", "", "write rows of JSON to this file")
	flag.StringVar(&only, "only", "", "only these parts, by commas: "+partNames())
	flag.IntVar(&b.runs, "runs", 3, "how often each thing is timed; medians count")
	flag.Parse()
	if b.image == "" || b.work == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	rows, err := b.all(ctx, only)
	printRows(rows)
	if jsonFile != "" {
		if werr := writeRows(jsonFile, rows); werr != nil {
			fmt.Fprintln(os.Stderr, "muster-bench:", werr)
			os.Exit(1)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "muster-bench:", err)
		os.Exit(1)
	}
}

func (b *bench) all(ctx context.Context, only string) ([]Row, error) {
	var rows []Row
	for _, p := range parts {
		if only != "" && !slices.Contains(strings.Split(only, ","), p.name) {
			continue
		}
		if p.shop && b.dir == "" {
			fmt.Fprintf(os.Stderr, "NOT measured: %s; it needs --dir, an installation that is served and has a last-known-good of the server 'shop' (make bench makes one)\n", p.name)
			continue
		}
		fmt.Fprintf(os.Stderr, "measuring %s …\n", p.name)
		got, err := p.run(ctx, b)
		rows = append(rows, got...)
		if err != nil {
			return rows, fmt.Errorf("measure %s: %w", p.name, err)
		}
	}
	return rows, nil
}

func printRows(rows []Row) {
	tw := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "MEASURE\tVALUE\tMUST BE\tOK\tFIGURES")
	for _, r := range rows {
		sign := "≤"
		if r.Better == "higher" {
			sign = "≥"
		}
		ok := "yes"
		if !r.OK {
			ok = "NO"
		}
		fmt.Fprintf(tw, "%s\t%.2f\t%s %g\t%s\t%s\n", r.Name, r.Value, sign, r.Limit, ok, r.Detail)
	}
	tw.Flush()
	for _, r := range rows {
		fmt.Printf("\n%s: %s\n", r.Name, r.Definition)
	}
}

func writeRows(path string, rows []Row) error {
	raw, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(raw, '\n'), 0o644)
}

func median(v []float64) float64 {
	s := slices.Clone(v)
	slices.Sort(s)
	return s[len(s)/2]
}
