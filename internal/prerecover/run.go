package prerecover

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

// Request asks for a rescue image.
type Request struct {
	ID       string // of the pre-recovery
	Snapshot dr.Snapshot
	Base     []vm.Layer // one a disk of the snapshot, in its order; only read
	Dir      string     // existing folder in which the deltas are made
	Overlays []Overlay  // the customer's own, applied after the standard ones
	Agent    []byte     // the test agent, a static program for the guest
	Limits   Limits     // Disks and Seed are filled in
	Data     *Data      // put into the image before it is edited; nil for none
}

// The parts of which Run reports progress, in order.
const (
	PartOpen  = "open"
	PartLook  = "look"
	PartData  = "data"
	PartApply = "apply"
	PartClose = "close"
)

// Run makes a rescue image: it opens the image below fresh deltas, looks, decides, edits and closes. On error no delta is
// left. ErrNotRescuable means that the image cannot be made to boot here whatever is tried.
func Run(ctx context.Context, opener Opener, req Request, report dr.Progress) (dr.PreRecovery, error) {
	if len(req.Base) == 0 || len(req.Base) != len(req.Snapshot.Disks) {
		return dr.PreRecovery{}, fmt.Errorf("pre-recover %s: %d layers were given for %d disks", req.Snapshot.ID, len(req.Base), len(req.Snapshot.Disks))
	}
	report.Report(PartOpen, 0, 1, "")
	g, err := opener.Open(ctx, req.Dir, req.Base)
	if err != nil {
		return dr.PreRecovery{}, fmt.Errorf("pre-recover %s: %w", req.Snapshot.ID, err)
	}
	p, err := prepare(ctx, g, req, report)
	if err != nil {
		g.Abandon()
		return dr.PreRecovery{}, fmt.Errorf("pre-recover %s: %w", req.Snapshot.ID, err)
	}
	return p, nil
}

func prepare(ctx context.Context, g Guest, req Request, report dr.Progress) (dr.PreRecovery, error) {
	overlays := append(Standard(), req.Overlays...)
	report.Report(PartLook, 0, 1, "")
	inv := req.Snapshot.Inventory
	found, merged, err := lookAndMerge(ctx, g, req, wanted(overlays), report)
	if err != nil {
		return dr.PreRecovery{}, err
	}
	limits := req.Limits
	limits.Disks, limits.Seed = len(req.Base), req.Snapshot.ServerID
	hardware, err := Decide(found.facts, inv, limits)
	if err != nil {
		return dr.PreRecovery{}, err
	}
	plan, err := PlanEdits(PlanInput{
		Facts: found.facts, View: found.view, Inventory: inv, NICs: hardware.NICs, Overlays: overlays, Agent: req.Agent,
		Variables: Variables{"server": req.Snapshot.Server, "snapshot": req.Snapshot.ID},
	})
	if err != nil {
		return dr.PreRecovery{}, err
	}
	if err := checkSpace(ctx, g, found.view, plan.Edits); err != nil {
		return dr.PreRecovery{}, err
	}
	for i, e := range plan.Edits {
		report.Report(PartApply, int64(i), int64(len(plan.Edits)), "edits")
		if err := apply(ctx, g, e); err != nil {
			return dr.PreRecovery{}, fmt.Errorf("apply overlay %s: %s %s: %w", e.Overlay, e.Action, e.Path, err)
		}
	}
	report.Report(PartClose, 0, 1, "")
	if err := g.Close(ctx); err != nil {
		return dr.PreRecovery{}, err
	}
	report.Report(PartClose, 1, 1, "")
	p := dr.PreRecovery{ID: req.ID, SnapshotID: req.Snapshot.ID, Hardware: hardware, Overlays: plan.Applied, Facts: found.facts,
		Deltas: g.Deltas(), Notes: append(found.notes, plan.Notes...), Data: merged}
	for _, e := range plan.Edits {
		p.Edits = append(p.Edits, e.Edit)
	}
	return p, nil
}

// lookAndMerge looks into the image and puts the data into it. If that changed what was looked at, it looks again.
func lookAndMerge(ctx context.Context, g Guest, req Request, paths []string, report dr.Progress) (seen, *dr.MergedData, error) {
	var roots []string
	if req.Data != nil {
		roots = req.Data.Set.Roots
	}
	found, err := look(ctx, g, req.Snapshot.Inventory, paths, roots)
	if err != nil || req.Data == nil {
		return found, nil, err
	}
	merged, err := mergeData(ctx, g, found.view, found.blind, req.Data, report)
	if err != nil {
		return found, nil, err
	}
	if found.view.holdsBelow(roots) {
		if err := g.Unmount(ctx); err != nil {
			return found, nil, err
		}
		found, err = look(ctx, g, req.Snapshot.Inventory, paths, roots)
	}
	return found, &merged, err
}

// apply makes one edit.
func apply(ctx context.Context, g Guest, e PlannedEdit) error {
	var err error
	switch e.Action {
	case "write", "replace", "copy":
		if e.Fresh {
			err = g.Remove(ctx, e.Path)
		}
		if err == nil {
			err = g.Write(ctx, e.Path, e.Content)
		}
		if err == nil && e.Before == "" && e.Mode.Perm() != 0o644 && e.Mode != 0 {
			err = g.Chmod(ctx, e.Path, e.Mode)
		}
	case "link":
		err = g.Symlink(ctx, e.Target, e.Path)
	case "remove":
		err = g.Remove(ctx, e.Path)
	case "mkdir":
		if err = g.Mkdir(ctx, e.Path); err == nil && e.Mode.Perm() != 0o755 {
			err = g.Chmod(ctx, e.Path, e.Mode)
		}
	case "chmod":
		err = g.Chmod(ctx, e.Path, e.Mode)
	default:
		return errors.New("there is no such action")
	}
	if err == nil && e.Label != "" {
		err = g.SetXattr(ctx, e.Path, selinuxAttr, e.Label)
	}
	return err
}

// Room that must be left on a file system beside what is written.
const (
	spareBytes  = 256 << 10
	spareInodes = 16
	perEdit     = 8 << 10 // what a new file or folder takes beside its content
)

// checkSpace refuses to begin what would not fit.
func checkSpace(ctx context.Context, g Guest, view *View, edits []PlannedEdit) error {
	bytes, inodes := map[string]int64{}, map[string]int64{}
	for _, e := range edits {
		at := mountOf(view, e.Path)
		bytes[at] += int64(len(e.Content)) + perEdit
		inodes[at]++
	}
	for _, at := range slices.Sorted(maps.Keys(bytes)) {
		s, err := g.Space(ctx, at)
		if err != nil {
			return err
		}
		if s.Free < bytes[at]+spareBytes {
			return fmt.Errorf("%w: the file system at %s is full: %d KiB are free and %d KiB are needed; free some on the server",
				ErrNotRescuable, at, s.Free>>10, (bytes[at]+spareBytes)>>10)
		}
		if s.Inodes >= 0 && s.Inodes < inodes[at]+spareInodes {
			return fmt.Errorf("%w: the file system at %s has only %d inodes left and %d are needed", ErrNotRescuable, at, s.Inodes, inodes[at]+spareInodes)
		}
	}
	return nil
}

// mountOf is the mount point a path lies below.
func mountOf(view *View, name string) string {
	best := "/"
	for at := range view.Mounts {
		if strings.HasPrefix(name, at+"/") && len(at) > len(best) {
			best = at
		}
	}
	return best
}
