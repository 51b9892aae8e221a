// Command muster-agent is the program that runs on a protected server while it is captured. An appliance copies it there
// and starts it over the server's own SSH; nobody needs to run it by hand.
//
//	muster-agent serve              answer one conversation on standard input and output
//	muster-agent inventory          print what this server is made of, as JSON
//	muster-agent forget             end tracking what is written to the disks
//	muster-agent version            print the version
//	muster-agent watchdog COUNT     freeze and thaw the file systems open from descriptor 3 on; started by serve
//	muster-agent hooks              hold the applications at rest, until descriptor 3 ends if serve is gone; started by serve
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/agent"
	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/hooks"
	"github.com/musterdr/muster/internal/capture/linux/track"
)

// version is set when the program is built.
var version = "dev"

const usage = "usage: muster-agent serve | inventory | forget | version"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "muster-agent:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	command := ""
	if len(args) > 0 {
		command = args[0]
	}
	switch command {
	case "serve":
		return serve()
	case "watchdog":
		if len(args) != 2 {
			return fmt.Errorf("%s", usage)
		}
		count, err := strconv.Atoi(args[1])
		if err != nil || count < 1 || count > 4096 {
			return fmt.Errorf("start the watchdog: %q is not a number of file systems", args[1])
		}
		return linux.Watchdog(count)
	case "hooks":
		return hooks.Keep(hooks.DefaultDir, os.Stdin, os.Stdout, os.NewFile(3, "thaw"))
	case "inventory":
		out := json.NewEncoder(os.Stdout)
		out.SetIndent("", "  ")
		inventory, err := agent.Inventory(context.Background())
		if err != nil {
			return err
		}
		return out.Encode(inventory)
	case "forget":
		if err := track.Remove(agent.DefaultTrackDir); err != nil {
			return err
		}
		_ = os.Remove(filepath.Dir(agent.DefaultTrackDir)) // unless somebody put something there
		return nil
	case "version":
		fmt.Println(version)
		return nil
	}
	return fmt.Errorf("%s", usage)
}

func serve() error {
	if err := intoMemory(); err != nil {
		// The copy on disk does as well: its pages are locked before anything is frozen.
		fmt.Fprintln(os.Stderr, "muster-agent: run from disk:", err)
	}
	debug.SetMemoryLimit(1 << 30)
	debug.SetGCPercent(25) // memory is the server's; there is little garbage to collect
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	signal.Ignore(syscall.SIGPIPE)
	a := agent.Agent{
		Version: version, Watchdog: []string{"/proc/self/exe", "watchdog"}, Hooks: []string{"/proc/self/exe", "hooks"}, TrackDir: agent.DefaultTrackDir,
	}
	return a.Serve(ctx, os.Stdin, os.Stdout)
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
