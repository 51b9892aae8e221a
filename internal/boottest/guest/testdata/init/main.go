// Command init is the whole user space of a test guest: it mounts what the agent looks at, loads the drivers it was
// given unless the kernel's command line says nodrivers, and runs the agent again and again.
package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"unsafe"
)

func main() {
	for dir, fs := range map[string]string{"/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs"} {
		_ = os.MkdirAll(dir, 0o755)
		_ = syscall.Mount(fs, dir, fs, 0, "")
	}
	if line, _ := os.ReadFile("/proc/cmdline"); !strings.Contains(string(line), "nodrivers") {
		modules, _ := filepath.Glob("/modules/*.ko")
		sort.Strings(modules)
		empty := []byte{0}
		for _, m := range modules {
			if code, err := os.ReadFile(m); err == nil {
				_, _, _ = syscall.Syscall(syscall.SYS_INIT_MODULE, uintptr(unsafe.Pointer(&code[0])), uintptr(len(code)), uintptr(unsafe.Pointer(&empty[0])))
			}
		}
	}
	for {
		_ = exec.Command("/muster-guest").Run()
	}
}
