package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/image"
)

// tick is longer than the kernel's clock for the times of files may stand still.
const tick = 20 * time.Millisecond

// maxClonings is how often several files are cloned before it is given up that they show one instant together.
const maxClonings = 50

// errNoClone is that a file system does not clone files, with the reason.
var errNoClone = errors.New("it cannot be cloned")

// cloneAll opens clones of image files that show them all at one instant, although they may be written to. A clone has no
// name: it is gone when it is closed, or with this process. The error is errNoClone if that cannot be had.
func cloneAll(paths []string) (disks, error) {
	for range maxClonings {
		before, err := lookAll(paths)
		if err != nil {
			return nil, err
		}
		out, err := cloneEach(paths)
		if err != nil {
			return nil, err
		}
		after, err := lookAll(paths)
		if err != nil {
			out.close()
			return nil, err
		}
		if len(paths) == 1 || together(before, after, time.Now()) {
			return out, nil
		}
		out.close()
	}
	return nil, fmt.Errorf("the %d image files were written to whenever they were cloned, and clones made one after another do not show one instant: %w", len(paths), errNoClone)
}

// together says whether nobody wrote to any file between two looks. A file that was written to a moment ago may be written
// to again without a change in its times.
func together(before, after []image.Mark, now time.Time) bool {
	for i, m := range before {
		if m != after[i] || !m.Before(now.Add(-tick)) {
			return false
		}
	}
	return true
}

func lookAll(paths []string) (out []image.Mark, err error) {
	for _, p := range paths {
		m, err := image.LookAt(p)
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}

func cloneEach(paths []string) (disks, error) {
	var out disks
	for _, p := range paths {
		f, err := clone(p)
		if err != nil {
			out.close()
			return nil, err
		}
		out = append(out, &disk{File: f, path: p})
	}
	return out, nil
}

// clone has the file system make a copy of a file that shares its blocks, without a name.
func clone(path string) (*image.File, error) {
	from, err := image.OpenFileInUse(path) // refuses what is no disk, by its own name
	if err != nil {
		return nil, err
	}
	defer from.Close()
	if from.Device() {
		return nil, fmt.Errorf("%s is a block device: %w", path, errNoClone)
	}
	source, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	to, err := os.OpenFile(filepath.Dir(path), unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("no clone of %s can be put beside it (%w): %w", path, err, errNoClone)
	}
	defer to.Close()
	if err := unix.IoctlFileClone(int(to.Fd()), int(source.Fd())); err != nil {
		return nil, fmt.Errorf("the file system of %s does not clone files (%w), as btrfs does and xfs with reflink: %w", path, err, errNoClone)
	}
	return image.OpenFileInUse(fmt.Sprintf("/proc/self/fd/%d", to.Fd()))
}
