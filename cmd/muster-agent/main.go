// Command muster-agent is the program that runs on a protected server while it is captured. An appliance copies it there
// and starts it over the server's own SSH; nobody needs to run it by hand.
//
//	muster-agent serve              answer one conversation on standard input and output
//	muster-agent inventory          print what this server is made of, as JSON
//	muster-agent forget             remove what captures have left on this server
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
	"runtime/debug"
	"syscall"

	"github.com/musterdr/muster/internal/agent"
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
	case "inventory":
		out := json.NewEncoder(os.Stdout)
		out.SetIndent("", "  ")
		inventory, err := agent.Inventory(context.Background())
		if err != nil {
			return err
		}
		return out.Encode(inventory)
	case "forget":
		return forget(context.Background())
	case "version":
		fmt.Println(version)
		return nil
	}
	return own(args)
}

func serve() error {
	prepare()
	debug.SetMemoryLimit(1 << 30)
	debug.SetGCPercent(25) // memory is the server's; there is little garbage to collect
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	a := agent.Agent{
		Version: version, Watchdog: []string{"/proc/self/exe", "watchdog"}, Hooks: []string{"/proc/self/exe", "hooks"}, TrackDir: agent.DefaultTrackDir,
	}
	return a.Serve(ctx, os.Stdin, os.Stdout)
}
