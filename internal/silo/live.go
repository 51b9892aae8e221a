package silo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/boottest"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/durable"
	"github.com/musterdr/muster/internal/invoke"
	"github.com/musterdr/muster/internal/vm"
)

// ShutdownLimit is how long an invoked machine may take to shut down before the plug is pulled.
const ShutdownLimit = 90 * time.Second

// HostOnlyNet is a bridge with only the host on it.
type HostOnlyNet struct {
	Name    string       // of the bridge, at most 15 bytes
	Address netip.Prefix // the host's; zero: none
}

// machineName gives the hypervisor's name for an invocation's machine.
func machineName(invocation string) string { return "mi-" + strings.TrimPrefix(invocation, "inv-") }

// bridgeName gives the name of an invocation's own network. Linux takes 15 bytes.
func bridgeName(invocation string, index int) string {
	short := strings.TrimPrefix(invocation, "inv-")
	return fmt.Sprintf("mu%s%d", short[:min(len(short), 10)], index)
}

func (s *Silo) liveSocket(invocation string) string {
	return filepath.Join(s.Run, strings.TrimPrefix(invocation, "inv-")+".sock")
}

// machineDir is the folder of an invoked machine's own: its sockets and serial log.
func (s *Silo) machineDir(invocation string) string {
	return filepath.Join(s.liveDir(invocation), "machine")
}

// Invoke implements api.Silo. Asked again for an invocation whose machine runs, it answers with that machine.
func (s *Silo) Invoke(ctx context.Context, task api.InvokeTask, report dr.Progress) (api.Invoked, error) {
	ctx, end, err := s.duties.begin(ctx, task.ID, task.Grant)
	if err != nil {
		return api.Invoked{}, err
	}
	defer end()
	plan, err := invoke.Attach(task.Network, task.PreRecovery.Hardware, task.Snapshot.Inventory)
	if err != nil {
		return api.Invoked{}, err
	}
	out := api.Invoked{Machine: machineName(task.ID), Addresses: plan.Addresses}
	if len(plan.Segments) > 0 {
		out.Bridge = segmentBridge(task.ID, plan.Segments[0])
	}
	report.Report("export", 0, 0, "")
	if err := s.Exporter.Start(ctx, task.Grant.Access, task.Snapshot.ImageID(), s.liveSocket(task.ID)); err != nil {
		return api.Invoked{}, fmt.Errorf("export snapshot %s: %w", task.Snapshot.ID, err)
	}
	if _, err := s.Hypervisor.Find(ctx, out.Machine); err == nil {
		return out, nil
	} else if !errors.Is(err, vm.ErrGone) {
		return api.Invoked{}, fmt.Errorf("look for machine of %s: %w", task.ID, err)
	}
	report.Report("layers", 0, 0, "")
	disks, err := s.liveLayers(ctx, task, report)
	if err != nil {
		return api.Invoked{}, err
	}
	networks, err := s.plug(ctx, task.ID, plan)
	if err != nil {
		return api.Invoked{}, err
	}
	dir := s.machineDir(task.ID)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return api.Invoked{}, fmt.Errorf("make folder for machine: %w", err)
	}
	report.Report("start", 0, 0, "")
	_, err = s.Hypervisor.Start(ctx, vm.Spec{
		Name: out.Machine, Owner: vm.Owner{Kind: ownerInvocation, ID: task.ID, Term: task.Grant.Term},
		Hardware: task.PreRecovery.Hardware, Disks: disks, Networks: networks, Dir: dir,
	})
	if err != nil && !errors.Is(err, vm.ErrExists) {
		return api.Invoked{}, fmt.Errorf("start machine: %w", err)
	}
	return out, nil
}

// liveLayers makes the layers an invoked machine writes to, or finds those of an earlier attempt.
func (s *Silo) liveLayers(ctx context.Context, task api.InvokeTask, report dr.Progress) ([]vm.Disk, error) {
	st, closed, err := s.Stores.Open(ctx, task.Grant.Access)
	if err != nil {
		return nil, err
	}
	defer closed()
	deltas, err := s.deltas(ctx, st, task.Snapshot, task.PreRecovery)
	if err != nil {
		return nil, err
	}
	dir := s.liveDir(task.ID)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make folder for live layers: %w", err)
	}
	if err := s.bring(ctx, st, task, report); err != nil {
		return nil, err
	}
	base := layers(s.liveSocket(task.ID), task.Snapshot.ImageID(), len(task.Snapshot.Disks))
	disks := make([]vm.Disk, len(deltas))
	for n, d := range under(deltas, base) {
		path := filepath.Join(dir, liveName(n))
		live := vm.Layer{Path: path, Format: "qcow2"}
		if _, err := os.Stat(path); err != nil {
			if live, err = s.NewLayer(ctx, path, d.Layers[0]); err != nil {
				return nil, fmt.Errorf("make live layer: %w", err)
			}
		}
		disks[n] = vm.Disk{Layers: append([]vm.Layer{live}, d.Layers...)}
	}
	return disks, nil
}

func segmentBridge(id string, seg invoke.Segment) string {
	if seg.Own {
		return bridgeName(id, seg.Index)
	}
	return seg.Bridge
}

func (s *Silo) plug(ctx context.Context, id string, plan invoke.Attachment) ([]vm.Network, error) {
	var out []vm.Network
	for _, seg := range plan.Segments {
		bridge := segmentBridge(id, seg)
		if seg.Own {
			if err := s.Networks.HostOnly(ctx, HostOnlyNet{Name: bridge, Address: seg.Host}); err != nil {
				return nil, fmt.Errorf("make network: %w", err)
			}
		}
		out = append(out, vm.Network{Bridge: bridge})
	}
	return out, nil
}

// CheckInvoked implements api.Silo.
func (s *Silo) CheckInvoked(ctx context.Context, task api.InvokeTask, report dr.Progress) ([]dr.CheckResult, error) {
	m, err := s.Hypervisor.Find(ctx, machineName(task.ID))
	if err != nil {
		return nil, fmt.Errorf("find machine of %s: %w", task.ID, err)
	}
	plan, err := invoke.Attach(task.Network, task.PreRecovery.Hardware, task.Snapshot.Inventory)
	if err != nil {
		return nil, err
	}
	var networks []vm.Network
	for _, seg := range plan.Segments {
		networks = append(networks, vm.Network{Bridge: segmentBridge(task.ID, seg)})
	}
	a, err := boottest.Attend(ctx, m, boottest.Questions{
		Hardware: task.PreRecovery.Hardware, Networks: networks, PreRecovery: task.PreRecovery,
		Baseline: task.Snapshot.Inventory.Baseline(), SourceBoot: task.Snapshot.Inventory.BootID, Checks: task.Server.Checks, Limits: s.Limits,
	}, report)
	return a.Results, err
}

// Tend implements api.Silo.
func (s *Silo) Tend(ctx context.Context, task api.InvokeTask) (bool, error) {
	if _, err := os.Stat(s.liveDir(task.ID)); err != nil {
		return false, nil // it never started, or has ended
	}
	if err := s.Exporter.Start(ctx, task.Grant.Access, task.Snapshot.ImageID(), s.liveSocket(task.ID)); err != nil {
		return false, fmt.Errorf("export snapshot %s again: %w", task.Snapshot.ID, err)
	}
	m, err := s.Hypervisor.Find(ctx, machineName(task.ID))
	if errors.Is(err, vm.ErrGone) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("find machine of %s: %w", task.ID, err)
	}
	state, _, err := m.State(ctx)
	return state == vm.Running || state == vm.Paused, err
}

// EndInvocation implements api.Silo. What is kept is a qcow2 file a disk, complete in itself.
func (s *Silo) EndInvocation(ctx context.Context, task api.InvokeTask, keep bool) (string, error) {
	ctx, end, err := s.duties.begin(ctx, task.ID, task.Grant)
	if err != nil {
		return "", err
	}
	defer end()
	if m, err := s.Hypervisor.Find(ctx, machineName(task.ID)); err == nil {
		if keep {
			_, err = m.Shutdown(ctx, ShutdownLimit) // clean, so that what is kept is whole
		} else {
			err = m.Destroy(ctx)
		}
		if err != nil {
			return "", fmt.Errorf("stop machine: %w", err)
		}
	} else if !errors.Is(err, vm.ErrGone) {
		return "", fmt.Errorf("find machine of %s: %w", task.ID, err)
	}
	var kept string
	if keep {
		var err error
		if kept, err = s.keepLive(ctx, task); err != nil {
			return "", err
		}
	}
	return kept, s.clearInvocation(ctx, task.ID)
}

// keepLive writes each disk, with everything the machine wrote, as one file that needs no store.
func (s *Silo) keepLive(ctx context.Context, task api.InvokeTask) (string, error) {
	st, closed, err := s.Stores.Open(ctx, task.Grant.Access)
	if err != nil {
		return "", err
	}
	defer closed()
	base, _, release, err := s.exports.acquire(ctx, st, task.Snapshot.ImageID(), len(task.Snapshot.Disks))
	if err != nil {
		return "", err
	}
	defer release()
	deltas, err := s.deltas(ctx, st, task.Snapshot, task.PreRecovery)
	if err != nil {
		return "", err
	}
	if err := s.bring(ctx, st, task, nil); err != nil {
		return "", err
	}
	dir := filepath.Join(s.Dir, "kept", task.ID)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return "", fmt.Errorf("make folder for kept disks: %w", err)
	}
	for n := range task.Snapshot.Disks {
		live := filepath.Join(s.liveDir(task.ID), liveName(n))
		dst := filepath.Join(dir, fmt.Sprintf("disk-%d.qcow2", n))
		if _, err := os.Stat(dst); err == nil {
			continue // an earlier attempt finished this one
		}
		if _, err := os.Stat(live); err != nil {
			return "", fmt.Errorf("keep disk %d: %w", n, err)
		}
		layers := []vm.Layer{{Path: live, Format: "qcow2"}, {Path: deltas[n], Format: "qcow2"}, base[n]}
		if err := s.Flatten(ctx, layers, dst, nil); err != nil {
			return "", fmt.Errorf("keep disk %d: %w", n, err)
		}
	}
	return dir, durable.Sync(dir)
}

// clearInvocation removes everything an invocation has on this host but what was kept.
func (s *Silo) clearInvocation(ctx context.Context, id string) error {
	var errs []error
	names, err := s.Networks.List(ctx)
	errs = append(errs, err)
	for _, name := range names {
		if prefix := bridgeName(id, 0); strings.HasPrefix(name, prefix[:len(prefix)-1]) {
			errs = append(errs, s.Networks.Remove(ctx, name))
		}
	}
	errs = append(errs, s.Exporter.Stop(ctx, s.liveSocket(id)), os.RemoveAll(s.liveDir(id)))
	return errors.Join(errs...)
}

// Reap implements api.Silo. What boot tests and pre-recoveries left that are neither named alive nor under way here belongs to a
// process that died.
func (s *Silo) Reap(ctx context.Context, alive []string) ([]string, error) {
	keep := map[string]bool{}
	for _, id := range append(s.duties.doing(), alive...) {
		keep[id] = true
	}
	var removed []string
	var errs []error
	tests, err := boottest.Reap(ctx, s.Hypervisor, s.scratch(), keep)
	errs = append(errs, err)
	for _, id := range tests {
		removed = append(removed, "boot test "+id)
	}
	ended, err := s.endedInvocations(ctx, keep)
	errs = append(errs, err)
	for _, id := range ended {
		if err := s.clearInvocation(ctx, id); err != nil {
			errs = append(errs, fmt.Errorf("remove invocation %s: %w", id, err))
			continue
		}
		removed = append(removed, "invocation "+id)
	}
	s.fetching.Lock() // what is being fetched has no record yet
	defer s.fetching.Unlock()
	for _, snap := range entries(filepath.Join(s.Dir, "images")) {
		for _, pre := range entries(filepath.Join(s.Dir, "images", snap)) {
			if _, err := readRecord(s.imageDir(snap, pre)); err != nil && !keep[pre] {
				errs = append(errs, os.RemoveAll(s.imageDir(snap, pre)))
				removed = append(removed, "unfinished pre-recovery "+pre)
			}
		}
	}
	return removed, errors.Join(errs...)
}

// endedInvocations finds invocations of which something is left on this host though they are over: a machine, which is
// stopped here, or a folder.
func (s *Silo) endedInvocations(ctx context.Context, keep map[string]bool) ([]string, error) {
	over := map[string]bool{}
	for _, id := range entries(s.liveDir("")) {
		if !keep[id] {
			over[id] = true
		}
	}
	machines, err := s.Hypervisor.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	for _, m := range machines {
		if m.Owner.Kind != ownerInvocation || keep[m.Owner.ID] {
			continue
		}
		machine, err := s.Hypervisor.Find(ctx, m.Name)
		if err == nil {
			err = machine.Destroy(ctx)
		}
		if err != nil && !errors.Is(err, vm.ErrGone) {
			return nil, fmt.Errorf("remove machine %s: %w", m.Name, err)
		}
		over[m.Owner.ID] = true
	}
	return slices.Sorted(maps.Keys(over)), nil
}

// ownerInvocation marks a machine as an invocation's.
const ownerInvocation = "invocation"

func entries(dir string) (names []string) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}
