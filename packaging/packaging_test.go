// Package packaging_test proves what the packages promise, without installing them.
package packaging_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// maxExposure is the most that systemd-analyze may make of a unit, in tenths: 0 is shut in, 100 is bare. What is left is root with
// the powers to read devices, hand files to the hypervisor's user and make bridges, in the host's network.
const maxExposure = "36"

func units(t *testing.T) []string {
	t.Helper()
	units, err := filepath.Glob("systemd/*.service")
	if err != nil || len(units) == 0 {
		t.Fatalf("no units: %v", err)
	}
	return units
}

func TestUnitsAreRightAndShutIn(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("systemd-analyze is not installed: apt-get install systemd")
	}
	for _, unit := range units(t) {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		// What it starts need not be installed here.
		there := filepath.Join(t.TempDir(), filepath.Base(unit))
		text = []byte(strings.ReplaceAll(string(text), "ExecStart=/usr/bin/muster", "ExecStart=/bin/true"))
		if err := os.WriteFile(there, text, 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("systemd-analyze", "verify", "--man=no", there).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("verify %s: %v\n%s", unit, err, out)
		}
		out, err := exec.Command("systemd-analyze", "--no-pager", "security", "--offline=true", "--threshold="+maxExposure, there).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		if err != nil {
			t.Errorf("security of %s: %v\n%s", unit, err, out)
		}
		t.Log(lines[len(lines)-1])
	}
}

// A restart must not take the disk of a machine that runs for real away, nor leave frozen what a watchdog would thaw.
func TestUnitsEndNothingButTheirMainProcess(t *testing.T) {
	for _, unit := range units(t) {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{"KillMode=process", "RuntimeDirectoryPreserve=yes", "Type=notify", "Restart=always", "WatchdogSec="} {
			if !strings.Contains(string(text), "\n"+line) {
				t.Errorf("%s has no line %s", unit, line)
			}
		}
	}
}

// libguestfs boots this host's kernel with its modules, and rescue machines' bridges are kept from routing through /proc/sys: what
// hides the ones or locks the other looks harmless, and stops every recovery.
func TestUnitsLeaveWhatRecoveringNeeds(t *testing.T) {
	for _, unit := range units(t) {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{"ProtectKernelModules=yes", "ProtectKernelTunables=yes", "PrivateDevices=yes", "MemoryDenyWriteExecute=yes", "UMask=0077"} {
			if strings.Contains(string(text), "\n"+line) {
				t.Errorf("%s has the line %s", unit, line)
			}
		}
	}
}

func TestMaintainerScriptsAreShell(t *testing.T) {
	scripts, err := filepath.Glob("deb/*")
	if err != nil || len(scripts) == 0 {
		t.Fatal(err)
	}
	for _, script := range scripts {
		if out, err := exec.Command("sh", "-n", script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
	}
}
