package boottest

import (
	"regexp"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// symptom is a text on the serial port that tells why a guest does not come up.
type symptom struct {
	code dr.Code
	// settle is how long nothing may contradict it: a boot loader may try the next disk, a shell may run a script.
	settle time.Duration
	final  bool // nothing contradicts it
	text   string
	words  []string
}

// symptoms, the more telling first: a later one does not displace an earlier one.
var symptoms = []*symptom{
	{
		code: dr.CodePanic, settle: 500 * time.Millisecond, final: true,
		text: "the kernel panicked", words: []string{"Kernel panic - not syncing"},
	},
	{
		code: dr.CodeInitrdTimeout, settle: 2 * time.Second,
		text: "the initial RAM disk did not find the root file system",
		words: []string{
			"Dropping to a shell!", "Gave up waiting for root", "(initramfs)", // initramfs-tools
			"rdsosreport.txt", "dracut:/#", "Dracut Emergency Shell", "switch_root:/#", "Warning: Could not boot", // dracut
			"initramfs emergency recovery shell", "Mounting root failed", // mkinitfs
		},
	},
	{
		code: dr.CodeInitrdTimeout, settle: 90 * time.Second, // a degraded array is started by just these scripts
		text:  "the initial RAM disk still waits for the root file system",
		words: []string{"dracut-initqueue: timeout", "dracut-initqueue timeout"},
	},
	{
		code: dr.CodeEmergency, settle: 2 * time.Second,
		text: "the system stopped in emergency mode",
		words: []string{
			"You are in emergency mode", "You are in rescue mode", "Give root password for maintenance",
			"Press Enter for maintenance", "Cannot open access to console, the root account is locked",
			"Reached target Emergency Mode", "Reached target emergency.target",
		},
	},
	{
		code: dr.CodeGrubRescue, settle: 2 * time.Second,
		text:  "GRUB stopped at its prompt",
		words: []string{"grub rescue>", "Entering rescue mode...", "grub>", "Minimal BASH-like line editing"},
	},
	{
		code: dr.CodeGrubRescue, settle: 15 * time.Second,
		text:  "GRUB did not find the kernel",
		words: []string{"you need to load the kernel first"},
	},
	{
		code: dr.CodeNoBootable, settle: 2 * time.Second,
		text: "the firmware found nothing to boot",
		words: []string{
			"No bootable device.", "No bootable option or device was found", "No bootable medium found",
			"Missing operating system", "Error loading operating system", "Invalid partition table",
			"Operating system not found",
		},
	},
	{
		code: dr.CodeNoBootable, settle: 8 * time.Second, // it may run a script
		text:  "the firmware found nothing to boot and started its shell",
		words: []string{"UEFI Interactive Shell", "Shell>"},
	},
}

// mark is a point that a boot passes.
type mark int

const (
	markNone     mark = iota
	markFirmware      // the firmware runs: power-on, or a reboot
	markStart         // the kernel's very first line: it runs, or runs again
	markKernel        // any line of the kernel's
	markInit          // the first process
)

var (
	kernelRE = regexp.MustCompile(`^\[ {0,6}\d{1,6}\.\d{6}\]`)
	loginRE  = regexp.MustCompile(`^\S{1,80} login: ?$`)
)

var markWords = []struct {
	mark  mark
	words []string
}{
	{markFirmware, []string{"SeaBIOS (version", "BdsDxe: starting Boot", "BdsDxe: loading Boot"}},
	{markStart, []string{"] Linux version "}},
	{markInit, []string{"systemd[1]:", "Welcome to ", "INIT: version", "OpenRC 0.", "as init process", "Loading, please wait..."}},
}

// markOf says which point of a boot a line marks.
func markOf(line string) mark {
	if strings.Contains(line, "Welcome to GRUB") {
		return markNone // to a boot loader everything that is said is a key
	}
	for _, m := range markWords {
		for _, w := range m.words {
			if strings.Contains(line, w) {
				return m.mark
			}
		}
	}
	if kernelRE.MatchString(line) {
		return markKernel
	}
	return markNone
}

// symptomOf finds the most telling symptom in a line; -1 if there is none.
func symptomOf(line string) int {
	for i, s := range symptoms {
		for _, w := range s.words {
			if strings.Contains(line, w) {
				return i
			}
		}
	}
	return -1
}
