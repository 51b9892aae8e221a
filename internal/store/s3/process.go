package s3

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// process says which process a session is: enough to know on the same host whether it is gone.
type process struct {
	Host  string `json:"host"`
	Boot  string `json:"boot"`  // of the host's kernel
	Space string `json:"space"` // in which the number counts
	PID   int    `json:"pid"`
	Start string `json:"start"` // when it began, by the kernel's count
}

var self = sync.OnceValue(func() process {
	p := process{PID: os.Getpid()}
	p.Host, _ = os.Hostname()
	if raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		p.Boot = strings.TrimSpace(string(raw))
	}
	p.Space, _ = os.Readlink("/proc/self/ns/pid")
	p.Start = started(p.PID)
	return p
})

// gone says whether it is a process of this host, as me sees it, that has ended. If in doubt it has not.
func (p process) gone(me process) bool {
	if p.Boot == "" || p.Space == "" || p.Start == "" || p.Boot != me.Boot || p.Space != me.Space {
		return false
	}
	return started(p.PID) != p.Start
}

// started says when a process began; "" if there is none.
func started(pid int) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(raw), ") ") // the name may hold anything, even ") "; then the field differs and is the same each time
	fields := strings.Fields(rest)
	if len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return fields[19]
}

// bootTime goes on while the process is stopped and while the host sleeps.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("s3: the kernel has no clock: " + err.Error())
	}
	return time.Duration(ts.Nano())
}
