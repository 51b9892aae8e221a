package silo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

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
	files := s.liveFiles(task)
	for _, path := range files {
		if info, err := os.Stat(path); err == nil {
			out.Size += info.Size()
		}
	}
	var kept int64
	for _, path := range files {
		report.Report("keep", kept, out.Size, "bytes")
		err := keepFile(ctx, st, task.Snapshot.ID, task.KeptName(filepath.Base(path)), path)
		if errors.Is(err, os.ErrNotExist) && filepath.Base(path) == vm.NVRAMFile {
			continue // it has no firmware that remembers anything
		}
		if err != nil {
			return out, fmt.Errorf("keep %s of %s: %w", filepath.Base(path), task.ID, err)
		}
		if info, err := os.Stat(path); err == nil {
			kept += info.Size()
		}
	}
	return out, nil
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
func (s *Silo) bring(ctx context.Context, st *store.Store, task api.InvokeTask) error {
	if task.Moved == "" {
		return nil
	}
	if err := os.MkdirAll(s.machineDir(task.ID), 0o711); err != nil {
		return fmt.Errorf("make folder for machine: %w", err)
	}
	refreshed := false
	for _, path := range s.liveFiles(task) {
		if _, err := os.Stat(path); err == nil {
			continue
		}
		name := task.KeptName(filepath.Base(path))
		err := fetch(ctx, st, task.Snapshot.ID, name, path+".part")
		if errors.Is(err, store.ErrNotFound) && !refreshed { // it was kept by another silo a moment ago
			if refreshed, err = true, st.Refresh(ctx); err == nil {
				err = fetch(ctx, st, task.Snapshot.ID, name, path+".part")
			}
		}
		if errors.Is(err, store.ErrNotFound) && filepath.Base(path) == vm.NVRAMFile {
			if err := os.Remove(path + ".part"); err != nil {
				return err
			}
			continue
		}
		if err == nil {
			err = durable.Sync(path + ".part")
		}
		if err == nil {
			err = os.Rename(path+".part", path)
		}
		if err == nil {
			err = durable.Sync(filepath.Dir(path))
		}
		if err != nil {
			return fmt.Errorf("fetch %s of %s: %w", filepath.Base(path), task.ID, err)
		}
	}
	return nil
}
