package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// probeLimit is how long the guest may take; a processor that works needs a tenth of a second.
const probeLimit = 5 * time.Second

// countdown is a boot sector that counts down from 2^26 and then ends QEMU with exit code 33. That KVM starts a processor
// is not enough: there are hosts on which it interprets, far slower than emulation would.
//
//	mov ecx, 1<<26    again: loop again    mov al, 16    out 0xf4, al    hlt
var countdown = append(append([]byte{0x66, 0xb9, 0, 0, 0, 4, 0x67, 0xe2, 0xfd, 0xb0, 0x10, 0xe6, 0xf4, 0xf4}, make([]byte, 496)...), 0x55, 0xaa)

const countedDown = 33

// probeKVM says why KVM does not work, "" if it does.
func probeKVM(ctx context.Context, device string) string {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "/dev/kvm does not exist: the processor cannot virtualise, or that is switched off in the firmware"
	case err != nil:
		return fmt.Sprintf("/dev/kvm cannot be opened: %v", err)
	}
	_ = f.Close()
	return runCountdown(ctx, "kvm", "host")
}

// runCountdown runs the guest and says why it did not come to its end, "" if it did.
func runCountdown(ctx context.Context, accelerator, cpu string) string {
	dir, err := os.MkdirTemp("", "muster-doctor-")
	if err != nil {
		return fmt.Sprintf("KVM could not be probed: %v", err)
	}
	defer os.RemoveAll(dir)
	disk := filepath.Join(dir, "disk")
	if err := os.WriteFile(disk, countdown, 0o600); err != nil {
		return fmt.Sprintf("KVM could not be probed: %v", err)
	}
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", accelerator, "-cpu", cpu, "-m", "16", "-nodefaults", "-no-user-config",
		"-display", "none", "-device", "isa-debug-exit,iobase=0xf4", "-drive", "format=raw,snapshot=on,file="+disk)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Sprintf("a guest of fourteen bytes did not end within %s under KVM", probeLimit)
	case errors.As(err, &exit) && exit.ExitCode() == countedDown:
		return ""
	case err != nil && len(out) == 0:
		return fmt.Sprintf("no guest runs under KVM: %v", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return "no guest runs under KVM: " + lines[len(lines)-1]
}
