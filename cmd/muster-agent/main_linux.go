package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/agent"
	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/hooks"
	"github.com/musterdr/muster/internal/capture/linux/track"
)

// own are the commands that only Linux needs.
func own(args []string) error {
	if len(args) == 1 && args[0] == "hooks" {
		return hooks.Keep(hooks.DefaultDir, os.Stdin, os.Stdout, os.NewFile(3, "thaw"))
	}
	if len(args) != 2 || args[0] != "watchdog" {
		return errors.New(usage)
	}
	count, err := strconv.Atoi(args[1])
	if err != nil || count < 1 || count > 4096 {
		return fmt.Errorf("start the watchdog: %q is not a number of file systems", args[1])
	}
	return linux.Watchdog(count)
}

func forget(ctx context.Context) error {
	err := errors.Join(track.Remove(agent.DefaultTrackDir), linux.RemoveSnapshots(ctx))
	if err == nil {
		_ = os.Remove(filepath.Dir(agent.DefaultTrackDir)) // unless somebody put something there
	}
	return err
}

// prepare makes the agent ready to run while the file systems of this server stand still.
func prepare() {
	if err := intoMemory(); err != nil {
		// The copy on disk does as well: its pages are locked before anything is frozen.
		fmt.Fprintln(os.Stderr, "muster-agent: run from disk:", err)
	}
	signal.Ignore(syscall.SIGPIPE)
}

// intoMemory starts this program again from a copy in memory, so that it needs no file system to run.
func intoMemory() error {
	const name = "muster-agent"
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	if strings.HasPrefix(self, "/memfd:") {
		return nil // this is the copy
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	memory := os.NewFile(uintptr(fd), name)
	defer memory.Close()
	if _, err := memory.Write(program); err != nil {
		return err
	}
	return unix.Exec(fmt.Sprintf("/proc/self/fd/%d", fd), os.Args, os.Environ())
}
