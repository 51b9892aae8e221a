// Package packaging_test proves what the packages promise, without installing them.
package packaging_test

import (
	"bytes"
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// maxExposure is the most that systemd-analyze may make of a unit, in tenths: 0 is shut in, 100 is bare. What is left is root with
// the powers to read devices, hand files to the hypervisor's user and make bridges, in the host's network.
const maxExposure = "36"

func units(t *testing.T) []string {
	t.Helper()
	units, err := filepath.Glob("systemd/*.service")
	if err != nil || len(units) != 3 {
		t.Fatalf("%d units, and there is one a role: %v", len(units), err)
	}
	return units
}

// less is what a unit may at most be that needs less: an appliance boots no machines and makes no bridges.
var less = map[string]string{"muster-appliance.service": "30"}

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
		text = []byte(strings.ReplaceAll(string(text), "ExecStart=/usr/lib/muster/box-medium", "ExecStart=/bin/true"))
		if err := os.WriteFile(there, text, 0o644); err != nil {
			t.Fatal(err)
		}
		most := cmp.Or(less[filepath.Base(unit)], maxExposure)
		if out, err := exec.Command("systemd-analyze", "verify", "--man=no", there).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("verify %s: %v\n%s", unit, err, out)
		}
		out, err := exec.Command("systemd-analyze", "--no-pager", "security", "--offline=true", "--threshold="+most, there).CombinedOutput()
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
		if unit == "systemd/muster-appliance.service" {
			continue // it recovers nothing
		}
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

// A unit that waits for its machine to join waits for the file that joining makes, and the role that joined is then started.
func TestUnitsOfNodesWaitForWhatJoiningMakes(t *testing.T) {
	for _, role := range []string{"appliance", "silo"} {
		file := "/var/lib/muster-" + role + "/node/node.json"
		for unit, line := range map[string]string{"service": "ConditionPathExists=" + file, "path": "PathChanged=" + file} {
			text, err := os.ReadFile("systemd/muster-" + role + "." + unit)
			if err != nil || !strings.Contains(string(text), "\n"+line+"\n") {
				t.Errorf("muster-%s.%s has no line %s: %v", role, unit, line, err)
			}
		}
	}
}

// A box that somebody can log in to, or that something in it listens on, is not what was promised.
func TestTheBoxLetsNobodyIn(t *testing.T) {
	install, err := os.ReadFile("box/install")
	if err != nil {
		t.Fatal(err)
	}
	masked := regexp.MustCompile(`(?s)systemctl --quiet mask (.*?[^\\])\n`).FindSubmatch(install)
	if masked == nil {
		t.Fatal("nothing is masked")
	}
	for _, unit := range []string{"getty@.service", "serial-getty@.service", "autovt@.service", "console-getty.service", "debug-shell.service",
		"systemd-firstboot.service", "emergency.service", "rescue.service"} {
		if !slices.Contains(strings.Fields(string(masked[1])), unit) {
			t.Errorf("%s is not masked", unit)
		}
	}
	image, err := os.ReadFile("../scripts/appliance")
	if err != nil {
		t.Fatal(err)
	}
	for _, server := range []string{"openssh-server", "avahi", "dnsmasq", "rpcbind", "libvirt"} {
		if bytes.Contains(image, []byte(server)) {
			t.Errorf("the box has %s", server)
		}
	}
	firewall, err := os.ReadFile("box/root/etc/nftables.conf")
	if err != nil || !bytes.Contains(firewall, []byte("hook input priority filter; policy drop;")) || bytes.Contains(firewall, []byte("dport")) {
		t.Errorf("the firewall lets in more than answers: %v\n%s", err, firewall)
	}
}

func TestMaintainerScriptsAreShell(t *testing.T) {
	scripts, err := filepath.Glob("deb/*")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, script := range scripts {
		if out, err := exec.Command("sh", "-n", script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
	}
}
