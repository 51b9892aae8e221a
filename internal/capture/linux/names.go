package linux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of a walk over the names of files.
const (
	namesLimit = time.Minute // in all
	namesDeep  = 100         // folders within folders
	namesBatch = 512         // entries of a folder in memory
)

// programs are folders of the system's own making: what is in them comes and goes with every upgrade, container and build,
// and a server that lacks it does not boot.
var programs = map[string]bool{
	"/bin": true, "/boot": true, "/dev": true, "/etc": true, "/lib": true, "/lib32": true, "/lib64": true, "/libx32": true, "/proc": true, "/run": true,
	"/sbin": true, "/snap": true, "/sys": true, "/tmp": true, "/usr": true, "/nix": true, "/gnu": true, "/ostree": true,
	"/var/cache": true, "/var/tmp": true, "/var/run": true, "/var/lock": true, "/var/lib/apt": true, "/var/lib/dpkg": true, "/var/lib/rpm": true,
	"/var/lib/docker": true, "/var/lib/containers": true, "/var/lib/containerd": true, "/var/lib/kubelet": true, "/var/lib/snapd": true,
	"/var/lib/flatpak": true, "/var/lib/systemd": true, "/var/lib/lxc": true, "/var/lib/lxcfs": true, "/var/log/journal": true,
}

// Names walks over the files of the mounted, writable file systems on some disks, except those of the system itself, and
// calls each with every one until that says false. Nothing is read but folders, at the lowest priority there is, and no
// other file system is entered. An error means that not all was seen.
func Names(ctx context.Context, disks []*Disk, each func(dir, name string) bool) error {
	systems, err := writableOn("/", kernelNames(disks))
	if err != nil {
		return err
	}
	if len(systems) == 0 {
		return errors.New("no file system of the disks is mounted")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, namesLimit, fmt.Errorf("it would take longer than %s", namesLimit))
	defer cancel()
	walked := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and its priority with it.
		runtime.LockOSThread()
		lowest()
		for _, s := range systems {
			if programs[s.Mount.Mount] {
				continue
			}
			w := walk{ctx: ctx, each: each}
			if err := w.system(s.Path, s.Mount.Mount); err != nil {
				walked <- err
				return
			}
		}
		walked <- nil
	}()
	return <-walked
}

// lowest gives the calling thread the lowest priority for processors and disks. Without it the walk is only less polite.
func lowest() {
	const process, idle = 1, 3 << 13 // IOPRIO_WHO_PROCESS, IOPRIO_CLASS_IDLE
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 19)
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, process, 0, idle)
}

// walk is the walk over one file system.
type walk struct {
	ctx  context.Context
	each func(dir, name string) bool
	dev  uint64
}

func (w *walk) system(at, as string) error {
	var st unix.Stat_t
	if err := unix.Stat(at, &st); err != nil {
		return fmt.Errorf("look at %s: %w", as, err)
	}
	w.dev = st.Dev
	return w.folder(unix.AT_FDCWD, at, as, namesDeep)
}

// folder walks over one folder: name is its path from a folder that is open, as its path for people.
func (w *walk) folder(parent int, name, as string, deep int) error {
	if err := context.Cause(w.ctx); err != nil {
		return err
	}
	if deep == 0 {
		return fmt.Errorf("folders lie more than %d deep", namesDeep)
	}
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if err != nil {
		return nil //nolint:nilerr // it is gone, or became something else
	}
	f := os.NewFile(uintptr(fd), as)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Dev != w.dev {
		return nil //nolint:nilerr // another file system
	}
	for {
		entries, err := f.ReadDir(namesBatch)
		for _, e := range entries {
			inner := path.Join(as, e.Name())
			if e.IsDir() {
				if programs[inner] || strings.HasPrefix(e.Name(), "lost+found") {
					continue
				}
				if err := w.folder(fd, e.Name(), inner, deep-1); err != nil {
					return err
				}
				continue
			}
			if e.Type().IsRegular() && !w.each(as, e.Name()) {
				return errors.New("there are too many")
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read folder %s: %w", as, err)
		}
	}
}
