// Command muster-guest is the test agent that pre-recovery puts into a rescue image. It answers the questions of the
// host that started the machine, over serial ports that only that host has. It is never put onto a source.
//
//	muster-guest          answer until stopped (as root, from muster-guest.service)
//	muster-guest version  print the version
//
// It reads no configuration and writes to no disk. See docs/formats/guest-protocol.md.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/musterdr/muster/internal/boottest/guest"
)

// version is set by the build.
var version = "unreleased"

const (
	memoryLimit = 64 << 20 // bytes; soft: the collector works harder
	askAsLimit  = time.Minute
	maxAskAs    = 1 << 20 // bytes of the question to a child
)

func main() {
	debug.SetMemoryLimit(memoryLimit)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	switch {
	case len(os.Args) == 1:
		agent := &guest.Agent{Version: version}
		agent.Run(ctx, guest.Ports()...)
	case len(os.Args) == 2 && os.Args[1] == guest.AskAs:
		ctx, cancel := context.WithTimeout(ctx, askAsLimit)
		defer cancel()
		in, err := io.ReadAll(io.LimitReader(os.Stdin, maxAskAs))
		if err != nil {
			fmt.Fprintln(os.Stderr, "muster-guest: read the question:", err)
			os.Exit(1)
		}
		os.Stdout.Write(guest.AnswerAs(ctx, in))
	case len(os.Args) == 2 && os.Args[1] == "version":
		fmt.Println(version)
	default:
		fmt.Fprintln(os.Stderr, "muster-guest: it takes no arguments; see docs/formats/guest-protocol.md")
		os.Exit(2)
	}
}
