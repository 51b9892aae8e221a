package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/dr"
)

func wantJSON(cmd *cobra.Command) bool {
	v, err := cmd.Flags().GetBool("json")
	return err == nil && v
}

func printJSON(cmd *cobra.Command, v any) error {
	enc := json.NewEncoder(cmd.OutOrStdout())
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// table prints rows under a header, columns aligned.
func table(w io.Writer, header string, rows [][]string) {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, strings.ReplaceAll(header, " ", "\t"))
	for _, r := range rows {
		for i, cell := range r {
			r[i] = tame(cell)
		}
		fmt.Fprintln(tw, strings.Join(r, "\t"))
	}
	tw.Flush()
}

// tame makes text that came from a customer's machine safe to print: no control characters reach the terminal.
func tame(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}

// size prints bytes as people read them.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f := float64(n) / 1024
	i := 0
	for f >= 1024 && i < len(units)-1 {
		f /= 1024
		i++
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}

// span prints a duration as people read it.
func span(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < 2*time.Minute:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d < 2*time.Hour:
		return fmt.Sprintf("%.0f min", d.Minutes())
	case d < 48*time.Hour:
		return fmt.Sprintf("%.1f h", d.Hours())
	}
	return fmt.Sprintf("%.1f days", d.Hours()/24)
}

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	if d := time.Since(t); d >= 0 {
		return span(d) + " ago"
	}
	return "in " + span(time.Until(t))
}

func when(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

// proven says in a word where a record stands.
func proven(r dr.Record) string {
	s := string(r.State)
	if r.Verdict != nil && r.State == dr.Rejected {
		s += " (" + string(r.Verdict.Code) + ")"
	}
	switch {
	case r.LKG:
		s += ", last-known-good"
	case r.Ruling != nil && !r.Ruling.Accept:
		s += ", REFUSED"
	case r.HeldBy != "":
		s += ", HELD"
	}
	return s
}

func printRecord(w io.Writer, r dr.Record) {
	s := r.Snapshot
	fmt.Fprintf(w, "snapshot     %s of %s\n", s.ID, s.Server)
	fmt.Fprintf(w, "taken        %s, %s-consistent\n", when(s.Taken), s.Consistency)
	pass := string(s.Pass.Kind)
	if s.Pass.Reason != "" {
		pass += ": " + tame(s.Pass.Reason)
	}
	fmt.Fprintf(w, "pass         %s\n", pass)
	printApplications(w, s.Applications)
	for _, note := range s.Notes {
		fmt.Fprintf(w, "note         %s\n", tame(note))
	}
	if f := s.Files; f != nil {
		fmt.Fprintf(w, "data         %s: %d files and folders, %s; %d are new or changed, %d are gone\n", strings.Join(f.Roots, ", "), f.Entries, size(f.Bytes), f.Changed, f.Gone)
		fmt.Fprintf(w, "onto         image %s\n", s.Image)
	} else {
		fmt.Fprintf(w, "disks        %d, %s in all\n", len(s.Disks), size(s.Size()))
	}
	st := s.Stats
	fmt.Fprintf(w, "bytes        read %s, changed %s, sent %s, new %s, stored %s\n", size(st.Read), size(st.Changed), size(st.Sent), size(st.New), size(st.Stored))
	if st.Resumed > 0 {
		fmt.Fprintf(w, "went on      after a cut: %s were kept of an earlier attempt, and not sent again\n", size(st.Resumed))
	}
	if st.Frozen > 0 {
		fmt.Fprintf(w, "frozen       %s of %s\n", span(st.Frozen), span(st.Duration))
	}
	printSigns(w, r)
	fmt.Fprintf(w, "proven       %s\n", proven(r))
	if r.Verdict != nil {
		printVerdict(w, *r.Verdict)
	}
}

func printVerdict(w io.Writer, v dr.Verdict) {
	fmt.Fprintf(w, "verdict      %s", v.Outcome)
	if v.Code != dr.CodeNone {
		fmt.Fprintf(w, " (%s)", v.Code)
	}
	fmt.Fprintf(w, ": %s\n", tame(v.Summary))
	if v.Rung != "" {
		fmt.Fprintf(w, "ran on       %s, %s%s\n", v.Rung, v.Accelerator, strings.Replace(onSilo(v.Silo), " on ", ", ", 1))
	}
	var phases []string
	for _, p := range v.Phases {
		phases = append(phases, p.Name+" "+span(p.Duration))
	}
	if len(phases) > 0 {
		fmt.Fprintf(w, "phases       %s\n", strings.Join(phases, ", "))
	}
	fmt.Fprintf(w, "RTO, RPO     %s%s measured, %s%s measured\n", span(v.RTA), met(v.RTOMet), span(v.RPA), met(v.RPOMet))
	printResults(w, v.Results)
	for _, e := range v.Evidence {
		fmt.Fprintf(w, "evidence     %s: %s\n", e.Kind, e.Path)
	}
}

func met(m *bool) string {
	switch {
	case m == nil:
		return ""
	case *m:
		return " (promise kept)"
	}
	return " (PROMISE MISSED)"
}

func printResults(w io.Writer, results []dr.CheckResult) {
	for _, r := range results {
		line := tame(r.Got)
		if r.State == dr.CheckFail && r.Want != "" {
			line += "; wanted " + tame(r.Want)
		}
		fmt.Fprintf(w, "  %-5s %-24s %s\n", r.State, tame(r.Name), line)
	}
}
