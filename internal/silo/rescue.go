package silo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/boottest"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/durable"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/vm"
)

// recordName is the file that makes a folder of deltas complete.
const recordName = "prerecovery.json"

// PreRecover implements api.Silo. The deltas are complete once their record is written; what an earlier attempt left
// unfinished is thrown away first.
func (s *Silo) PreRecover(ctx context.Context, task api.PreRecoverTask, report dr.Progress) (dr.PreRecovery, error) {
	ctx, end, err := s.duties.begin(ctx, task.ID, task.Grant)
	if err != nil {
		return dr.PreRecovery{}, err
	}
	defer end()
	pre, err := s.preRecover(ctx, task, report)
	return pre, ended(ctx, err)
}

func (s *Silo) preRecover(ctx context.Context, task api.PreRecoverTask, report dr.Progress) (dr.PreRecovery, error) {
	dir := s.imageDir(task.Snapshot.ID, task.ID)
	if done, err := readRecord(dir); err == nil {
		return done, nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return dr.PreRecovery{}, fmt.Errorf("clear unfinished pre-recovery: %w", err)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return dr.PreRecovery{}, fmt.Errorf("make folder for deltas: %w", err)
	}
	own, err := customerOverlays(task.Server)
	if err != nil {
		return dr.PreRecovery{}, err
	}
	agent, err := os.ReadFile(s.GuestAgent)
	if err != nil {
		return dr.PreRecovery{}, fmt.Errorf("read test agent: %w; build it with 'make build'", err)
	}
	host, err := s.Hypervisor.Host(ctx)
	if err != nil {
		return dr.PreRecovery{}, fmt.Errorf("ask hypervisor: %w", err)
	}
	st, closed, err := s.Stores.Open(ctx, task.Grant.Access)
	if err != nil {
		return dr.PreRecovery{}, err
	}
	defer closed()
	layers, fault, release, err := s.exports.acquire(ctx, st, task.Snapshot.ImageID(), len(task.Snapshot.Disks))
	if err != nil {
		return dr.PreRecovery{}, err
	}
	defer release()
	data, done, err := s.data(ctx, st, task.Snapshot)
	if err != nil {
		return dr.PreRecovery{}, err
	}
	defer done()
	memory, cpus := s.limits(host)
	pre, err := prerecover.Run(ctx, s.Opener, prerecover.Request{Data: data,
		ID: task.ID, Snapshot: task.Snapshot, Base: layers, Dir: dir, Overlays: own, Agent: agent,
		Limits: prerecover.Limits{MaxMemory: memory, MaxCPUs: cpus, Memory: task.Server.Memory, CPUs: task.Server.CPUs, UEFI: host.UEFI},
	}, report)
	if err != nil {
		os.RemoveAll(dir)
		return dr.PreRecovery{}, rejection(err, fault())
	}
	if err := ctx.Err(); err != nil { // who has no lease any more finishes nothing
		os.RemoveAll(dir)
		return dr.PreRecovery{}, err
	}
	pre.Silo = s.Name
	return pre, writeRecord(dir, pre)
}

// data opens the files that go into an image, if the snapshot is of files; done closes them.
func (s *Silo) data(ctx context.Context, st *store.Store, snap dr.Snapshot) (data *prerecover.Data, done func(), err error) {
	if !snap.IsData() {
		return nil, func() {}, nil
	}
	image, err := st.Snapshot(ctx, snap.Image)
	if err != nil {
		return nil, nil, fmt.Errorf("find image %s: %w", snap.Image, err)
	}
	files, err := st.Files(ctx, snap.ID)
	if errors.Is(err, store.ErrDamaged) {
		return nil, nil, &api.Rejected{Code: dr.CodeDiskError, Reason: "the data cannot be read from the store: " + err.Error()}
	}
	if err != nil {
		return nil, nil, err
	}
	return &prerecover.Data{Snapshot: snap.ID, Taken: snap.Taken, Image: image.ID, Before: image.Taken, Set: files.Set(),
		Each: func(ctx context.Context, each func(*fileset.Entry, func() (io.ReadCloser, error)) error) error {
			for all := files.All(); ; {
				e, err := all.Next(ctx)
				if errors.Is(err, io.EOF) {
					return nil
				}
				if err == nil {
					err = each(&e.Entry, func() (io.ReadCloser, error) { return files.Data(ctx, e) })
				}
				if err != nil {
					return err
				}
			}
		}}, files.Close, nil
}

// rejection tells a fault of the snapshot from a fault on the way. fault is the first read error its export saw.
func rejection(err, fault error) error {
	if fault != nil {
		return &api.Rejected{Code: dr.CodeDiskError, Reason: "the snapshot cannot be read from the store: " + fault.Error()}
	}
	if errors.Is(err, store.ErrDamaged) {
		return &api.Rejected{Code: dr.CodeDiskError, Reason: "the data cannot be read from the store: " + err.Error()}
	}
	if errors.Is(err, prerecover.ErrNotRescuable) {
		return &api.Rejected{Code: dr.CodeNotBooted, Reason: err.Error()}
	}
	return err
}

func customerOverlays(server dr.Server) ([]prerecover.Overlay, error) {
	if server.Overlays == "" {
		return nil, nil
	}
	own, err := prerecover.LoadOverlays(server.Overlays)
	if err != nil {
		return nil, fmt.Errorf("load overlays of %s: %w", server.Name, err)
	}
	return own, nil
}

func (s *Silo) limits(host vm.Host) (memory, cpus int) {
	memory, cpus = s.MaxMemory, s.MaxCPUs
	if memory == 0 {
		memory = int(host.Memory >> 21)
	}
	if cpus == 0 {
		cpus = host.CPUs
	}
	return max(memory, 512), max(cpus, 1)
}

func readRecord(dir string) (dr.PreRecovery, error) {
	var pre dr.PreRecovery
	raw, err := os.ReadFile(filepath.Join(dir, recordName))
	if err != nil {
		return pre, err
	}
	if err := json.Unmarshal(raw, &pre); err != nil {
		return pre, fmt.Errorf("read record of pre-recovery %s: %w", dir, err)
	}
	return pre, nil
}

// writeRecord syncs the deltas, then puts the record in place in one step.
func writeRecord(dir string, pre dr.PreRecovery) error {
	for _, path := range pre.Deltas {
		if err := durable.Sync(path); err != nil {
			return err
		}
	}
	raw, err := json.MarshalIndent(pre, "", "  ")
	if err != nil {
		return fmt.Errorf("write record of pre-recovery %s: %w", pre.ID, err)
	}
	return durable.WriteFile(filepath.Join(dir, recordName), raw, 0o600)
}

// DeltaName is the name under which disk n's delta is kept with its snapshot in the store.
func DeltaName(pre string, n int) string { return fmt.Sprintf("%s-delta-%d.qcow2", pre, n) }

// deltas gives the delta files of a pre-recovery, fetched back from the store if this silo does not have them.
func (s *Silo) deltas(ctx context.Context, st *store.Store, snap dr.Snapshot, pre dr.PreRecovery) ([]string, error) {
	s.fetching.Lock()
	defer s.fetching.Unlock()
	dir := s.imageDir(snap.ID, pre.ID)
	_, err := readRecord(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	paths := make([]string, len(snap.Disks))
	for n := range paths {
		paths[n] = filepath.Join(dir, fmt.Sprintf("delta-%d.qcow2", n))
	}
	if err == nil {
		return paths, nil
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make folder for deltas: %w", err)
	}
	for n, path := range paths {
		err := fetch(ctx, st, snap.ID, DeltaName(pre.ID, n), path)
		if errors.Is(err, store.ErrNotFound) { // kept by another silo a moment ago, perhaps
			if err = st.Refresh(ctx); err == nil {
				err = fetch(ctx, st, snap.ID, DeltaName(pre.ID, n), path)
			}
		}
		if errors.Is(err, store.ErrNotFound) {
			return nil, errors.Join(api.Errorf(api.NotFound, "find delta of %s: %w; run 'muster prerecover %s --snapshot %s' to make it anew", snap.ID, err, snap.Server, snap.ID), os.RemoveAll(dir))
		}
		if err != nil {
			return nil, fmt.Errorf("fetch delta of %s: %w", snap.ID, err)
		}
	}
	pre.Deltas = paths
	return paths, writeRecord(dir, pre)
}

func fetch(ctx context.Context, st *store.Store, snapshot, name, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	return st.Fetch(ctx, snapshot, name, f)
}

// KeepDeltas implements api.Silo.
func (s *Silo) KeepDeltas(ctx context.Context, task api.DeltasTask) (string, error) {
	return s.handle(ctx, task, func(st *store.Store, n int, path string) error {
		return keepFile(ctx, st, task.Snapshot.ID, DeltaName(task.PreRecovery.ID, n), path, io.Discard)
	})
}

// HoldDeltas implements api.Silo.
func (s *Silo) HoldDeltas(ctx context.Context, task api.DeltasTask) (string, error) {
	return s.handle(ctx, task, func(*store.Store, int, string) error { return nil })
}

// handle does something with each delta, and gives their digest: SHA-256 over the names and contents of all.
func (s *Silo) handle(ctx context.Context, task api.DeltasTask, do func(st *store.Store, n int, path string) error) (string, error) {
	st, closed, err := s.Stores.Open(ctx, task.Grant.Access)
	if err != nil {
		return "", err
	}
	defer closed()
	paths, err := s.deltas(ctx, st, task.Snapshot, task.PreRecovery)
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	for n, path := range paths {
		if err := do(st, n, path); err != nil {
			return "", fmt.Errorf("keep delta of %s: %w", task.Snapshot.ID, err)
		}
		f, err := os.Open(path)
		if err != nil {
			return "", fmt.Errorf("read delta of %s: %w", task.Snapshot.ID, err)
		}
		size, err := io.Copy(sum, f)
		fmt.Fprintf(sum, "\n%d %d\n", n, size)
		if err := errors.Join(err, f.Close()); err != nil {
			return "", fmt.Errorf("read delta of %s: %w", task.Snapshot.ID, err)
		}
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// keepFile keeps a file with a snapshot, and shows passed what of it is being kept.
func keepFile(ctx context.Context, st *store.Store, snapshot, name, path string, passed io.Writer) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return st.Keep(ctx, snapshot, name, io.TeeReader(f, passed))
}

// Test implements api.Silo. Run clears what an earlier attempt under the same identifier left.
func (s *Silo) Test(ctx context.Context, task api.TestTask, report dr.Progress) (dr.Verdict, error) {
	ctx, end, err := s.duties.begin(ctx, task.ID, task.Grant)
	if err != nil {
		return dr.Verdict{}, err
	}
	defer end()
	v, err := s.test(ctx, task, report)
	return v, ended(ctx, err)
}

func (s *Silo) test(ctx context.Context, task api.TestTask, report dr.Progress) (dr.Verdict, error) {
	st, closed, err := s.Stores.Open(ctx, task.Grant.Access)
	if err != nil {
		return dr.Verdict{}, err
	}
	defer closed()
	paths, err := s.deltas(ctx, st, task.Snapshot, task.PreRecovery)
	if err != nil {
		return dr.Verdict{}, err
	}
	layers, fault, release, err := s.exports.acquire(ctx, st, task.Snapshot.ImageID(), len(task.Snapshot.Disks))
	if err != nil {
		return dr.Verdict{}, err
	}
	defer release()
	v, err := boottest.Run(ctx, s.Hypervisor, boottest.Request{
		VerdictID: task.ID, Term: task.Grant.Term, Snapshot: task.Snapshot, PreRecovery: task.PreRecovery,
		Checks: task.Server.Checks, Objectives: task.Server.Objectives, Disks: under(paths, layers),
		ScratchDir: s.scratch(), EvidenceDir: s.evidenceDir(task.Snapshot.ID, task.ID),
		Asked: task.Asked, DiskError: fault, NewLayer: s.NewLayer, Limits: s.Limits,
	}, report)
	if err != nil {
		return v, err
	}
	// A machine that could not even be started because its image cannot be read is a fault of the image.
	if bad := fault(); bad != nil && v.Outcome == dr.Inconclusive {
		v.Outcome, v.Code, v.Summary = dr.Fail, dr.CodeDiskError, "the snapshot cannot be read from the store: "+bad.Error()
	}
	v.Silo = s.Name
	return v, nil
}

// under puts each delta on top of its disk.
func under(deltas []string, base []vm.Layer) []vm.Disk {
	out := make([]vm.Disk, len(deltas))
	for n, path := range deltas {
		out[n].Layers = []vm.Layer{{Path: path, Format: "qcow2"}, base[n]}
	}
	return out
}

// Discard implements api.Silo.
func (s *Silo) Discard(_ context.Context, snapshot string) error {
	if err := dr.ValidateID(snapshot); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(filepath.Join(s.Dir, "images", snapshot)), os.RemoveAll(filepath.Join(s.Dir, "evidence", snapshot)))
}
