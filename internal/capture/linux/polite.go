package linux

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Priorities of a thread. Source: ioprio_set(2), setpriority(2).
const (
	ioprioProcess = 1         // of one thread
	ioprioLast    = 2<<13 | 7 // best effort, after all others
	ioprioFirst   = 2 << 13   // best effort, before all others
	niceLast      = 10
)

// Yield has this process come last wherever others want the processors or the disks as well; Hurry has it come first at the
// disks again, because others wait for it. Threads that begin later are as the one that begins them. What the kernel does not let
// it do is left.
func Yield() { prioritize(niceLast, ioprioLast) }

// Hurry is the opposite of Yield.
func Hurry() { prioritize(0, ioprioFirst) }

func prioritize(nice, ioprio int) {
	threads, _ := os.ReadDir("/proc/self/task")
	for _, t := range threads {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		_ = unix.Setpriority(unix.PRIO_PROCESS, id, nice)
		_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, ioprioProcess, uintptr(id), uintptr(ioprio))
	}
}
