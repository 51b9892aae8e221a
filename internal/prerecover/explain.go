package prerecover

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Explain writes for people what was chosen and changed, and why. With verbose it shows every edit with its hashes and
// what differs. Everything that came out of the image is made harmless to show.
func Explain(w io.Writer, p dr.PreRecovery, verbose bool) error {
	e := &explainer{w: w}
	f := p.Facts
	e.line("Pre-recovery %s of snapshot %s", p.ID, p.SnapshotID)
	e.line("")
	e.line("Found")
	e.row("system", "%s", orUnknown(firstOf(f.Distro.Name, f.Distro.ID+" "+f.Distro.Version)))
	e.row("hostname", "%s", orUnknown(f.Hostname))
	e.row("root", "%s (%s), partition table %s", f.RootDevice, f.RootFS, orUnknown(f.PartTable))
	e.row("starts with", "%s, %s, kernel %s", orUnknown(string(f.Firmware)), orUnknown(f.Init), orUnknown(f.Default))
	for _, k := range f.Kernels {
		if k.Version == f.Default {
			e.row("can drive", "%s", orNone(k.Drivers))
		}
	}
	e.line("")
	e.line("Hardware")
	for _, d := range p.Hardware.Reasons {
		e.row(d.What, "%s: %s", d.Chosen, d.Reason)
	}
	if d := p.Data; d != nil {
		e.line("")
		e.line("Data")
		e.row("from", "snapshot %s, taken %s", d.Snapshot, d.Taken.UTC().Format(time.RFC3339))
		e.row("onto", "image %s, %s older", d.Image, d.Taken.Sub(d.ImageTaken).Round(time.Second))
		e.row("folders", "%s: %d files and folders", strings.Join(d.Roots, ", "), d.Entries)
		e.row("written", "%d files that the image did not have so, %d bytes", d.Written, d.Bytes)
		e.row("removed", "%d that are gone since the image", d.Removed)
	}
	if len(p.Notes) > 0 {
		e.line("")
		e.line("Notes")
		for _, d := range p.Notes {
			e.row(d.What, "%s: %s", firstOf(d.Chosen, "-"), d.Reason)
		}
	}
	e.line("")
	e.line("Edits: %d by %d overlays", len(p.Edits), countOverlays(p.Edits))
	for _, edit := range p.Edits {
		e.edit(edit, verbose)
	}
	return e.err
}

type explainer struct {
	w   io.Writer
	err error
}

func (e *explainer) line(format string, args ...any) {
	if e.err == nil {
		_, e.err = fmt.Fprintf(e.w, "%s\n", strings.TrimRight(printable(fmt.Sprintf(format, args...)), " "))
	}
}

func (e *explainer) row(what, format string, args ...any) {
	e.line("  %-18s %s", what, fmt.Sprintf(format, args...))
}

func (e *explainer) edit(edit dr.Edit, verbose bool) {
	e.line("")
	e.line("  %s %s", edit.Action, edit.Path)
	e.line("    overlay  %s", edit.Overlay)
	e.line("    because  %s", edit.Reason)
	if !verbose {
		return
	}
	e.line("    before   %s", firstOf(edit.Before, "nothing there"))
	e.line("    after    %s", firstOf(edit.After, "nothing there"))
	for l := range strings.Lines(edit.Diff) {
		e.line("      %s", strings.TrimRight(l, "\n"))
	}
	e.line("    to undo  %s", edit.Reverse)
}

func firstOf(a, b string) string {
	if strings.TrimSpace(a) != "" {
		return a
	}
	return b
}

func countOverlays(edits []dr.Edit) int {
	seen := map[string]bool{}
	for _, e := range edits {
		seen[e.Overlay] = true
	}
	return len(seen)
}
