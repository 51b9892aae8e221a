package lab

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/musterdr/muster/internal/boottest/guest"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/sim"
)

var boots atomic.Int64

// Healthy is a guest that boots and answers as the real test agent does.
func Healthy(vm.Spec) sim.Guest {
	return sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
		fmt.Fprint(c.Serial(), "SeaBIOS (version 1.16)\r\n[    0.000000] Linux version 6.1.0-25-amd64\r\n[    1.2] Run /init as init process\r\n")
		boot := fmt.Sprintf("boot-%d", boots.Add(1))
		agent := &guest.Agent{Version: "lab",
			Who: func() probe.Hello {
				return probe.Hello{BootID: boot, Machine: "machine-1", Hostname: "shop", Kernel: "6.1.0-25-amd64", Uptime: 10 * time.Millisecond}
			},
			Look: func(context.Context, bool) probe.Status {
				return probe.Status{InitState: "running", Kernel: "6.1.0-25-amd64", Hostname: "shop", Distro: dr.Distro{ID: "debian", Version: "12"},
					Mounts: []dr.Filesystem{{Device: "/dev/sda2", Mount: "/", Type: "ext4"}}, Now: time.Now()}
			},
			Try: func(_ context.Context, check dr.Check) dr.CheckResult {
				return dr.CheckResult{Name: check.Name, State: dr.CheckPass, Got: "as expected"}
			},
		}
		served := make(chan struct{})
		inner, cancel := context.WithCancel(ctx)
		go func() { defer close(served); _ = agent.Serve(inner, port{c.Port(dr.PortVirtio)}) }()
		select {
		case <-ctx.Done():
		case <-c.Button():
		}
		cancel()
		return sim.PowerOff
	})
}

// Panicking is a guest whose kernel gives up.
func Panicking(vm.Spec) sim.Guest {
	return sim.GuestFunc(func(_ context.Context, c *sim.Computer) sim.End {
		fmt.Fprint(c.Serial(), "[    0.000000] Linux version 6.1.0-25-amd64\r\n[    2.1] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n")
		return sim.Panic
	})
}

type port struct{ io.ReadWriter }

func (port) Close() error { return nil }
