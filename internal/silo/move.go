package silo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/durable"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/vm"
)

// An invoked machine is moved cold: it is shut down, its live layers go into the store of its customer, beside the image they lie on, and
// another silo fetches them. They need not be compared on the way: the store proves what it gives.

func liveName(n int) string { return fmt.Sprintf("live-%d.qcow2", n) }

// Leave implements api.Silo.
func (s *Silo) Leave(ctx context.Context, task api.InvokeTask, report dr.Progress) (api.Left, error) {
	ctx, end, err := s.duties.begin(ctx, task.ID, task.Grant)
	if err != nil {
		return api.Left{}, err
	}
	defer end()
	out := api.Left{Clean: true}
	report.Report("shut down", 0, 0, "")
	switch m, err := s.Hypervisor.Find(ctx, machineName(task.ID)); {
	case errors.Is(err, vm.ErrGone): // it went down by itself, or in an earlier attempt
	case err != nil:
		return out, fmt.Errorf("find machine of %s: %w", task.ID, err)
	default:
		if out.Clean, err = m.Shutdown(ctx, ShutdownLimit); err != nil {
			return out, fmt.Errorf("stop machine: %w", err)
		}
	}
	st, closed, err := s.Stores.Open(ctx, task.Grant.Access)
	if err != nil {
		return out, err
	}
	defer closed()
	var files []string
	for _, path := range s.liveFiles(task) {
		info, err := os.Stat(path)
		if errors.Is(err, os.ErrNotExist) && filepath.Base(path) == vm.NVRAMFile {
			continue // it has no firmware that remembers anything
		}
		if err != nil {
			return out, fmt.Errorf("keep what %s wrote: %w", task.ID, err)
		}
		files = append(files, path)
		out.Size += info.Size()
	}
	passed := passing{part: "keep", total: out.Size, report: report}
	for _, path := range files {
		if err := keepFile(ctx, st, task.Snapshot.ID, task.KeptName(filepath.Base(path)), path, &passed); err != nil {
			return out, fmt.Errorf("keep %s of %s: %w", filepath.Base(path), task.ID, err)
		}
	}
	return out, nil
}

// passing reports bytes that pass.
type passing struct {
	part        string
	done, total int64
	report      dr.Progress
}

func (p *passing) Write(b []byte) (int, error) {
	p.done += int64(len(b))
	p.report.Report(p.part, p.done, p.total, "bytes") // which is no more often on a line than it must be
	return len(b), nil
}

// liveFiles lists what an invoked machine writes to: its layers, and what its firmware remembers.
func (s *Silo) liveFiles(task api.InvokeTask) (paths []string) {
	for n := range task.Snapshot.Disks {
		paths = append(paths, filepath.Join(s.liveDir(task.ID), liveName(n)))
	}
	return append(paths, filepath.Join(s.machineDir(task.ID), vm.NVRAMFile))
}

// bring fetches what an invoked machine wrote on another silo, unless it is here. A file is here when it is whole and on the medium: the copy
// in the store does not stay.
func (s *Silo) bring(ctx context.Context, st *store.Store, task api.InvokeTask, report dr.Progress) error {
	if task.Moved == "" {
		return nil
	}
	if err := os.MkdirAll(s.machineDir(task.ID), 0o711); err != nil {
		return fmt.Errorf("make folder for machine: %w", err)
	}
	if err := st.Refresh(ctx); err != nil { // another silo kept it a moment ago
		return err
	}
	kept, err := st.Kept(ctx, task.Snapshot.ID)
	if err != nil {
		return err
	}
	passed := passing{part: "fetch", report: report}
	var missing []string
	for _, path := range s.liveFiles(task) {
		if _, err := os.Stat(path); err == nil {
			continue
		}
		name := task.KeptName(filepath.Base(path))
		n := slices.IndexFunc(kept, func(f store.KeptFile) bool { return f.Name == name })
		if n >= 0 {
			missing = append(missing, path)
			passed.total += kept[n].Size
		} else if filepath.Base(path) != vm.NVRAMFile { // that of a machine with a BIOS was never there
			return fmt.Errorf("fetch %s of %s: it is neither here nor %w", filepath.Base(path), task.ID, store.ErrNotFound)
		}
	}
	for _, path := range missing {
		if err := fetchWhole(ctx, st, task.Snapshot.ID, task.KeptName(filepath.Base(path)), path, &passed); err != nil {
			return fmt.Errorf("fetch %s of %s: %w", filepath.Base(path), task.ID, err)
		}
	}
	return nil
}

// fetchWhole fetches a file that is there complete and on the medium, or not at all.
func fetchWhole(ctx context.Context, st *store.Store, snapshot, name, path string, passed io.Writer) error {
	part := path + ".part"
	f, err := os.OpenFile(part, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = st.Fetch(ctx, snapshot, name, io.MultiWriter(f, passed))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(part))
	}
	if err := os.Rename(part, path); err != nil {
		return err
	}
	return durable.Sync(filepath.Dir(path))
}
