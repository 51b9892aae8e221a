// Package cost measures what tracking costs those who write: for benchmarks, not for tests, which could only guess a limit.
package cost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/capture/linux/track"
)

// Result is what fio reached in operations a second, run by run, without and with tracking in turns.
type Result struct {
	Without []float64
	With    []float64
	// Unproved says that some run with tracking did not balance, and why.
	Unproved error
}

// Ratio gives how much slower the median run with tracking was than that without: 0.04 is 4 %.
func (r Result) Ratio() float64 { return 1 - median(r.With)/median(r.Without) }

func (r Result) String() string {
	return fmt.Sprintf("tracking costs %.1f %% of 4 KiB random writes (%.0f against %.0f IOPS, %d runs each)",
		100*r.Ratio(), median(r.With), median(r.Without), len(r.With))
}

func median(x []float64) float64 {
	s := slices.Sorted(slices.Values(x))
	if len(s) == 0 {
		return 0
	}
	return (s[len(s)/2] + s[(len(s)-1)/2]) / 2
}

const diskSize = 1 << 30

// Measure lets fio write 4 KiB at random places of a loop device on a file in memory, around the page cache, rounds times
// without and with tracking in turns, each for about a time. It needs root, fio and losetup; dir is an empty folder for
// what it makes, all of which it removes.
func Measure(ctx context.Context, dir string, rounds int, each time.Duration) (r Result, err error) {
	if err := unix.Mount("muster-cost", dir, "tmpfs", 0, "size=1200m"); err != nil {
		return r, fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)) }()
	file, state := filepath.Join(dir, "disk"), filepath.Join(dir, "track")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return r, err
	}
	if err := os.Truncate(file, diskSize); err != nil {
		return r, err
	}
	out, err := exec.CommandContext(ctx, "losetup", "--find", "--show", file).Output()
	if err != nil {
		return r, fmt.Errorf("make a loop device: %w", err)
	}
	device := strings.TrimSpace(string(out))
	defer func() { err = errors.Join(err, exec.Command("losetup", "-d", device).Run()) }()
	defer func() { err = errors.Join(err, track.Remove(state)) }()
	if _, err := fio(ctx, device, each); err != nil { // fills memory
		return r, err
	}
	for range rounds {
		n, err := fio(ctx, device, each)
		if err != nil {
			return r, err
		}
		r.Without = append(r.Without, n)
		if n, err = r.tracked(ctx, state, device, each); err != nil {
			return r, err
		}
		r.With = append(r.With, n)
	}
	return r, nil
}

// tracked makes one run with tracking, and removes it again.
func (r *Result) tracked(ctx context.Context, state, device string, each time.Duration) (float64, error) {
	t, err := track.Start(state, []string{filepath.Base(device)})
	if err != nil {
		return 0, err
	}
	d := t.Disk(filepath.Base(device))
	_, _ = d.Take() // first contact: everything is unknown, and marked from now on
	n, err := fio(ctx, device, each)
	if proof := d.Prove(); proof != nil {
		r.Unproved = proof
	}
	return n, errors.Join(err, t.Close(), track.Remove(state))
}

func fio(ctx context.Context, device string, each time.Duration) (float64, error) {
	out, err := exec.CommandContext(ctx, "fio", "--name=cost", "--filename="+device, "--rw=randwrite", "--bs=4k", "--direct=1",
		"--ioengine=libaio", "--iodepth=32", "--time_based", fmt.Sprintf("--runtime=%dms", each.Milliseconds()), "--output-format=json").Output()
	if err != nil {
		return 0, fmt.Errorf("run fio: %w", err)
	}
	var result struct {
		Jobs []struct {
			Write struct {
				IOPS float64 `json:"iops"`
			} `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &result); err != nil || len(result.Jobs) != 1 {
		return 0, fmt.Errorf("read fio's result: %w", errors.Join(err, errors.New("it has no single job")))
	}
	return result.Jobs[0].Write.IOPS, nil
}
