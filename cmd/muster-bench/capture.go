package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/linux/track/cost"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

// The file system on which captures are measured.
const (
	busySize  = 3 << 30
	busyFiles = 20_000
	busyFile  = 100 << 10 // bytes of each
	stuns     = 10        // captures under load of each kind of file system
)

// here is a source that is captured by the real agent, on this machine and without SSH.
type here struct {
	agent string
	disk  string
	peak  int64 // largest resident memory of an agent, bytes
}

func (h *here) Contact(context.Context) (api.Contact, error) { return api.Contact{}, nil }
func (h *here) Close() error                                 { return nil }

func (h *here) Forget(ctx context.Context) error {
	return exec.CommandContext(ctx, h.agent, "forget").Run()
}

func (h *here) Capture(ctx context.Context, sink *capture.Sink, report dr.Progress) error {
	c := exec.CommandContext(ctx, h.agent, "serve")
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		return err
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	gone, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		for {
			if peak, err := peakMemory(c.Process.Pid); err == nil {
				h.peak = max(h.peak, peak) // a high-water mark: little is missed at the end
			}
			select {
			case <-gone:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	talk, err := capture.NewSession(out, in)
	if err == nil {
		err = talk.Capture(ctx, wire.Plan{Disks: []string{h.disk}, FreezeLimit: dr.DefaultFreezeLimit, Track: true}, sink, report)
	}
	_ = in.Close()
	close(gone)
	<-watched
	return errors.Join(err, c.Wait())
}

// busy is a file system on a loop device with files in it.
type busy struct {
	dir, mount, device string
	source             here
	store              *store.Store
	last               string // snapshot
	undo               []func() error
}

func (b *bench) newBusy(ctx context.Context, fstype string, files int) (w *busy, err error) {
	w = &busy{source: here{agent: filepath.Join(b.bin, "muster-agent")}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.dir, err = b.fresh("busy-" + fstype + fmt.Sprint(files)); err != nil {
		return w, err
	}
	w.undo = append(w.undo, func() error { return os.RemoveAll(w.dir) })
	file := filepath.Join(w.dir, "disk")
	w.mount = filepath.Join(w.dir, "mnt")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, busySize), os.Mkdir(w.mount, 0o755)); err != nil {
		return w, err
	}
	out, err := exec.CommandContext(ctx, "losetup", "--find", "--show", "--direct-io=on", file).Output()
	if err != nil {
		return w, fmt.Errorf("make a loop device: %w", err)
	}
	w.device = strings.TrimSpace(string(out))
	w.source.disk = w.device
	w.undo = append(w.undo, func() error { return exec.Command("losetup", "-d", w.device).Run() })
	if out, err := exec.CommandContext(ctx, "mkfs."+fstype, "-q", w.device).CombinedOutput(); err != nil {
		return w, fmt.Errorf("make a file system: %w: %s", err, out)
	}
	if err := unix.Mount(w.device, w.mount, fstype, 0, ""); err != nil {
		return w, fmt.Errorf("mount: %w", err)
	}
	w.undo = append(w.undo, func() error { return unix.Unmount(w.mount, unix.MNT_DETACH) })
	st, _, err := b.newStore(ctx, "busy-store-"+fstype+fmt.Sprint(files))
	if err != nil {
		return w, err
	}
	w.store = st
	w.undo = append(w.undo, func() error { return st.Close(context.WithoutCancel(ctx)) })
	w.undo = append(w.undo, func() error { return w.source.Forget(context.WithoutCancel(ctx)) })
	for i := range files {
		if i%1000 == 0 {
			if err := os.MkdirAll(filepath.Join(w.mount, fmt.Sprint(i/1000)), 0o755); err != nil {
				return w, err
			}
		}
		if err := os.WriteFile(w.file(i), text(uint64(i), busyFile), 0o644); err != nil {
			return w, err
		}
	}
	return w, exec.CommandContext(ctx, "sync", "-f", w.mount).Run()
}

func (w *busy) file(i int) string {
	return filepath.Join(w.mount, fmt.Sprint(i/1000), fmt.Sprint(i))
}

func (w *busy) close() error {
	var errs []error
	for _, undo := range slices.Backward(w.undo) {
		errs = append(errs, undo())
	}
	w.undo = nil
	return errors.Join(errs...)
}

// text makes bytes that compress about as program text does.
func text(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	out := make([]byte, size)
	for i := range out {
		if out[i] = byte('a' + r.IntN(26)); r.IntN(3) > 0 && i > 64 {
			out[i] = out[i-64]
		}
	}
	return out
}

// take captures an increment.
func (w *busy) take(ctx context.Context) (dr.Snapshot, float64, error) {
	start := time.Now()
	s, err := capture.Take(ctx, &w.source, w.store, api.SnapshotTask{ID: dr.NewSnapshotID(time.Now()), Server: dr.Server{ID: "srv-bench", Name: "bench"}, Parent: w.last}, nil)
	if err == nil {
		w.last = s.ID
	}
	return s, time.Since(start).Seconds(), err
}

// change rewrites one file in a hundred in place and adds 50 MB.
func (w *busy) change(ctx context.Context, round int) error {
	for i := round; i < busyFiles; i += 100 {
		f, err := os.OpenFile(w.file(i), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.Write(text(uint64(i+(round+1)*busyFiles), busyFile))
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(w.mount, fmt.Sprint("new-", round)), text(uint64(round)+1<<40, 50<<20), 0o644); err != nil {
		return err
	}
	return exec.CommandContext(ctx, "sync", "-f", w.mount).Run()
}

// captures measures increments of a live file system against programs that walk its files, on the same changes.
func captures(ctx context.Context, b *bench) (rows []Row, err error) {
	w, err := b.newBusy(ctx, "ext4", busyFiles)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	peers, stop, err := b.walkers(ctx, w.mount)
	if err != nil {
		return nil, err
	}
	defer stop()
	if _, _, err := w.take(ctx); err != nil {
		return nil, err
	}
	var ours, theirs, ratio []float64
	detail, compared := "", 0
	for round := range b.runs {
		if err := w.change(ctx, round); err != nil {
			return nil, err
		}
		snap, took, err := w.take(ctx)
		if err != nil {
			return nil, err
		}
		if snap.Pass.Kind != dr.PassTracked {
			compared++ // the kernel left out a write: everything was compared
			fmt.Fprintln(os.Stderr, "not tracked:", snap.Pass.Reason)
		}
		ours = append(ours, took)
		ratio = append(ratio, float64(snap.Stats.Read)/float64(max(1, snap.Stats.Changed)))
		detail = fmt.Sprintf("last round: muster %.2f s", took)
		var best float64
		for _, p := range peers {
			t, err := timed(ctx, p.env, p.args[0], p.args[1:]...)
			if err != nil {
				return nil, err
			}
			if best == 0 || t < best {
				best = t
			}
			detail += fmt.Sprintf(", %s %.2f s", p.args[0], t)
		}
		theirs = append(theirs, best)
	}
	rows = append(rows,
		higher("increment of a live file system vs restic, borg, rsync", median(theirs)/median(ours), 5,
			fmt.Sprintf("seconds the fastest of 'restic backup', 'borg create' and 'rsync -a' takes for an increment of an ext4 file system of %d files (1 %% rewritten in place, 50 MB new), over seconds of a whole tracked capture of its disk (agent started, frozen, kept, read back); medians", busyFiles),
			fmt.Sprintf("%s; %d of %d compared", detail, compared, b.runs)),
		lower("tracked increment: read / changed", median(ratio), 1.1,
			"bytes read from the disk in all passes, over bytes in blocks that changed; median of the same increments", ""),
		lower("memory of the agent while capturing, MiB", float64(w.source.peak)/(1<<20), 150,
			"largest resident memory of the agent over those captures, the first full one included; between captures no process of it runs", ""))
	more, err := stunned(ctx, b)
	if err != nil {
		return rows, err
	}
	rows = append(rows, more...)
	dir, err := b.fresh("cost")
	if err != nil {
		return rows, err
	}
	c, err := cost.Measure(ctx, dir, max(5, b.runs), 3*time.Second)
	if err != nil {
		return rows, err
	}
	return append(rows, lower("cost of tracking, % of 4 KiB random writes", 100*c.Ratio(), 5,
		"by how much the median rate of fio's 4 KiB random writes at full speed is lower with tracking than without, in turns", c.String())), nil
}

// walker is a program that finds what changed by looking at every file.
type walker struct {
	env  []string
	args []string
}

// walkers makes a first full copy with each program.
func (b *bench) walkers(ctx context.Context, mount string) ([]walker, func(), error) {
	dir, err := b.fresh("walkers")
	if err != nil {
		return nil, nil, err
	}
	stop := func() { _ = os.RemoveAll(dir) }
	restic := append(os.Environ(), "RESTIC_PASSWORD=x", "RESTIC_REPOSITORY="+dir+"/restic", "RESTIC_CACHE_DIR="+dir+"/cache")
	borg := append(os.Environ(), "BORG_PASSPHRASE=x", "BORG_BASE_DIR="+dir)
	all := []walker{
		{restic, []string{"restic", "backup", mount}},
		{borg, []string{"borg", "create", "--compression", "zstd,1", dir + "/borg::{now:%H%M%S%f}", mount}},
		{os.Environ(), []string{"rsync", "-a", "--delete", mount + "/", dir + "/rsync/"}},
	}
	_, err1 := timed(ctx, restic, "restic", "init")
	_, err2 := timed(ctx, borg, "borg", "init", "--encryption=repokey-blake2", dir+"/borg")
	if err := errors.Join(err1, err2); err != nil {
		stop()
		return nil, nil, err
	}
	for _, p := range all {
		if _, err := timed(ctx, p.env, p.args[0], p.args[1:]...); err != nil {
			stop()
			return nil, nil, err
		}
	}
	return all, stop, nil
}

// stunned measures how long file systems stand still while fio writes to them as a database does.
func stunned(ctx context.Context, b *bench) ([]Row, error) {
	var all []float64
	compared := 0
	for _, fstype := range []string{"ext4", "xfs"} {
		frozen, n, err := b.stunsOf(ctx, fstype)
		if err != nil {
			return nil, err
		}
		all, compared = append(all, frozen...), compared+n
	}
	const what = "milliseconds for which a file system stands still in a tracked capture while fio writes to it: 4 KiB at random places of a file, with an fsync every 8, and 64 KiB buffered; "
	detail := fmt.Sprintf("%d captures of ext4 and xfs, %d of them compared", len(all), compared)
	return []Row{
		lower("freeze under writes, median ms", median(all), 100, what+"median", detail),
		lower("freeze under writes, worst ms", slices.Max(all), 500, what+"worst", detail),
	}, nil
}

func (b *bench) stunsOf(ctx context.Context, fstype string) (frozen []float64, compared int, err error) {
	w, err := b.newBusy(ctx, fstype, 2000)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	ctx, cancel := context.WithCancel(ctx)
	load := exec.CommandContext(ctx, "fio", "--directory="+w.mount, "--time_based", "--runtime=600", "--size=200m", "--thread",
		"--name=database", "--rw=randwrite", "--bs=4k", "--fsync=8", "--rate_iops=500",
		"--name=files", "--rw=write", "--bs=64k", "--rate=20m")
	if err := load.Start(); err != nil {
		cancel()
		return nil, 0, fmt.Errorf("start fio: %w", err)
	}
	defer func() { cancel(); _ = load.Wait() }()
	if _, _, err := w.take(ctx); err != nil {
		return nil, 0, err
	}
	for range stuns {
		time.Sleep(time.Second) // for the load to change something
		s, _, err := w.take(ctx)
		if err != nil {
			return nil, 0, err
		}
		if s.Pass.Kind != dr.PassTracked {
			compared++
		}
		frozen = append(frozen, float64(s.Stats.Frozen)/float64(time.Millisecond))
	}
	return frozen, compared, nil
}
