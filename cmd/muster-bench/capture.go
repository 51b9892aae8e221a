package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
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
	"github.com/musterdr/muster/internal/capture/here"
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
)

// busy is a file system on a loop device with files in it.
type busy struct {
	dir, mount, device string
	source             here.Source
	peak               int64 // largest resident memory of an agent, bytes
	store              *store.Store
	last               string // snapshot
	pages              [][]byte
	undo               []func() error
}

// watch notes the memory of an agent until it ends.
func (w *busy) watch(pid int) (ends func()) {
	gone, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		for {
			if peak, err := peakMemory(pid); err == nil {
				w.peak = max(w.peak, peak) // a high-water mark: little is missed at the end
			}
			select {
			case <-gone:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	return func() { close(gone); <-watched }
}

func (b *bench) newBusy(ctx context.Context, fstype string, files int) (w *busy, err error) {
	w = &busy{}
	w.source = here.Source{Agent: filepath.Join(b.bin, "muster-agent"), Began: w.watch}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.pages, err = b.real(); err != nil {
		return w, err
	}
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
	w.source.Plan = wire.Plan{Disks: []string{w.device}, FreezeLimit: dr.DefaultFreezeLimit, Track: true}
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
		if err := os.WriteFile(w.file(i), w.content(uint64(i), busyFile), 0o644); err != nil {
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

// page is the unit in which content is made.
const page = 4 << 10

// real gives pages of the server's image that hold something, at most 64 MB of them.
func (b *bench) real() ([][]byte, error) {
	f, err := os.Open(b.image)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var pages [][]byte
	r, buf := bufio.NewReaderSize(f, 1<<20), make([]byte, page)
	for len(pages) < 16<<10 {
		switch _, err := io.ReadFull(r, buf); {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			if len(pages) == 0 {
				return nil, fmt.Errorf("read %s: it is empty", b.image)
			}
			return pages, nil
		case err != nil:
			return nil, err
		}
		if !wire.IsZero(buf) {
			pages = append(pages, bytes.Clone(buf))
		}
	}
	return pages, nil
}

// content makes bytes such as a server has, which are nowhere twice.
func (w *busy) content(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	var out []byte
	for len(out) < size {
		out = append(out, w.pages[r.IntN(len(w.pages))]...)
		binary.LittleEndian.PutUint64(out[len(out)-page+r.IntN(page-8):], r.Uint64())
	}
	return out[:size]
}

// take captures an increment.
func (w *busy) take(ctx context.Context) (dr.Snapshot, float64, error) {
	return w.takeWhen(ctx, func() {})
}

// takeWhen calls a function whenever a pass of the living file system begins, and so the last time before the freeze.
func (w *busy) takeWhen(ctx context.Context, begins func()) (dr.Snapshot, float64, error) {
	start, last := time.Now(), ""
	report := func(part string, _, _ int64, _ string) {
		if part != last && strings.HasPrefix(part, "read, pass") {
			begins()
		}
		last = part
	}
	s, err := capture.Take(ctx, &w.source, w.store, api.SnapshotTask{ID: dr.NewSnapshotID(time.Now()), Server: dr.Server{ID: "srv-bench", Name: "bench"}, Parent: w.last}, report)
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
		_, err = f.Write(w.content(uint64(i+(round+1)*busyFiles), busyFile))
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(w.mount, fmt.Sprint("new-", round)), w.content(uint64(round)+1<<40, 50<<20), 0o644); err != nil {
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
	var rounds [2]walked // with nothing of the file system in memory, and with all of it
	var ratio []float64
	compared := 0
	for round := range 2 * b.runs {
		if err := w.change(ctx, round); err != nil {
			return nil, err
		}
		snap, err := rounds[round/b.runs].round(ctx, w.take, peers, round < b.runs)
		if err != nil {
			return nil, err
		}
		if snap.Pass.Kind != dr.PassTracked {
			compared++ // the kernel left out a write: everything was compared
			fmt.Fprintln(os.Stderr, "not tracked:", snap.Pass.Reason)
		}
		ratio = append(ratio, float64(snap.Stats.Read)/float64(max(1, snap.Stats.Changed)))
	}
	cold, warm := rounds[0], rounds[1]
	return []Row{
		higher("increment of a live file system vs restic, borg, rsync", median(cold.theirs)/median(cold.ours), 5,
			fmt.Sprintf("seconds the fastest of 'restic backup', 'borg create' and 'rsync -a --fsync' takes for an increment of an ext4 file system of %d files (1 %% rewritten in place, 50 MB new), over seconds of a whole tracked capture of its disk (agent started, frozen, kept, read back); medians; each begins with nothing of the file system in memory, as at night", busyFiles),
			fmt.Sprintf("%s; with everything in memory: %.2f (%s); %d of %d compared", cold.last, median(warm.theirs)/median(warm.ours), warm.last, compared, 2*b.runs)),
		lower("tracked increment: read / changed", median(ratio), 1.1,
			"bytes read from the disk in all passes, over bytes in blocks that changed; median of the same increments", ""),
		lower("memory of the agent while capturing, MiB", float64(w.peak)/(1<<20), 150,
			"largest resident memory of the agent over those captures, the first full one included; between captures no process of it runs", ""),
	}, nil
}

// walked is what increments took, in seconds.
type walked struct {
	ours, theirs []float64 // theirs: the fastest of each round
	figure       string    // the program that is timed for people and is no peer; "": none
	last         string    // round, for people
}

// round takes one increment with us and with every peer; cold: with nothing of the file system in memory.
func (r *walked) round(ctx context.Context, take func(context.Context) (dr.Snapshot, float64, error), peers []walker, cold bool) (dr.Snapshot, error) {
	empty := func() error {
		if !cold {
			return nil
		}
		unix.Sync()
		return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	}
	if err := empty(); err != nil {
		return dr.Snapshot{}, err
	}
	snap, took, err := take(ctx)
	if err != nil {
		return snap, err
	}
	best := math.Inf(1)
	r.last = fmt.Sprintf("last round: muster %.2f s", took)
	for _, p := range peers {
		if err := empty(); err != nil {
			return snap, err
		}
		t, err := timed(ctx, p.env, p.args[0], p.args[1:]...)
		if err != nil {
			return snap, err
		}
		if p.args[0] != r.figure {
			best = min(best, t)
		}
		r.last += fmt.Sprintf(", %s %.2f s", p.args[0], t)
	}
	r.ours, r.theirs = append(r.ours, took), append(r.theirs, best)
	return snap, nil
}

// tracking measures what tracking costs a server that does nothing but write.
func tracking(ctx context.Context, b *bench) ([]Row, error) {
	dir, err := b.fresh("cost")
	if err != nil {
		return nil, err
	}
	c, err := cost.Measure(ctx, dir, max(5, b.runs), 3*time.Second)
	if err != nil {
		return nil, err
	}
	return []Row{lower("cost of tracking, % of 4 KiB random writes", 100*c.Ratio(), 5,
		"by how much the median rate of fio's 4 KiB random writes at full speed is lower with tracking than without, in turns", c.String())}, nil
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
		{os.Environ(), []string{"rsync", "-a", "--fsync", "--delete", mount + "/", dir + "/rsync/"}},
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
