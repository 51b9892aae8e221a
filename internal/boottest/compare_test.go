package boottest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
	"github.com/musterdr/muster/internal/vm"
)

// shopQuestions are those of a copy with a cable.
func shopQuestions() Questions {
	return Questions{
		Hardware: dr.Hardware{NICs: []dr.HWNIC{{MAC: "52:54:00:00:00:01"}}}, Networks: []vm.Network{{Bridge: "b"}},
		Baseline: shopInventory.Baseline(),
	}
}

func TestTheComparisonTellsEveryDifference(t *testing.T) {
	type change func(q *Questions, s *probe.Status)
	for name, c := range map[string]struct {
		change change
		result string
		state  dr.CheckState
		code   dr.Code
		words  string
	}{
		"another system": {func(_ *Questions, s *probe.Status) { s.Distro.Version = "11" }, "operating system", dr.CheckFail, dr.CodeBaseline, "debian 11"},
		"a newer kernel": {func(_ *Questions, s *probe.Status) { s.Kernel = "6.1.0-26-amd64" }, "kernel", dr.CheckWarn, "", "6.1.0-26"},
		"another name":   {func(_ *Questions, s *probe.Status) { s.Hostname = "other" }, "host name", dr.CheckFail, dr.CodeBaseline, "other"},
		"the full name":  {func(_ *Questions, s *probe.Status) { s.Hostname = "shop.example.org" }, "host name", dr.CheckPass, "", ""},
		"no name":        {func(_ *Questions, s *probe.Status) { s.Hostname = "localhost" }, "host name", dr.CheckWarn, "", "localhost"},
		"another zone":   {func(_ *Questions, s *probe.Status) { s.Timezone = "Etc/UTC" }, "time zone", dr.CheckWarn, "", "Etc/UTC"},
		"rescue mode":    {func(_ *Questions, s *probe.Status) { s.InitState = "maintenance" }, "init", dr.CheckFail, dr.CodeEmergency, "maintenance"},
		"another init":   {func(_ *Questions, s *probe.Status) { s.InitState = "" }, "init", dr.CheckSkip, "", ""},
		"a failed unit":  {func(_ *Questions, s *probe.Status) { s.FailedUnits = []string{"nginx.service"} }, "failed units", dr.CheckFail, dr.CodeServiceFailed, "nginx.service"},
		"failed before": {func(q *Questions, s *probe.Status) {
			q.Baseline.FailedUnits, s.FailedUnits = []string{"x.service"}, []string{"x.service"}
		}, "failed units", dr.CheckPass, "", ""},
		"no network": {func(_ *Questions, s *probe.Status) { s.FailedUnits = []string{"systemd-networkd-wait-online.service"} }, "failed units", dr.CheckWarn, "", "not here"},
		"masked by us": {func(q *Questions, s *probe.Status) {
			q.PreRecovery.Edits = []dr.Edit{{Path: "/etc/systemd/system/vendor.service", Action: "link"}}
			s.FailedUnits = []string{"vendor.service"}
		}, "failed units", dr.CheckPass, "", ""},
		"a mount is missing": {func(_ *Questions, s *probe.Status) {
			s.Fstab = append(s.Fstab, probe.FstabEntry{Spec: "LABEL=x", Mount: "/srv", Type: "ext4"})
		}, "mounts", dr.CheckFail, dr.CodeBaseline, "/srv (LABEL=x)"},
		"a nofail mount is missing": {func(_ *Questions, s *probe.Status) { s.Mounts = s.Mounts[:1] }, "mounts", dr.CheckWarn, "", "/data"},
		"mounted by hand once": {func(q *Questions, _ *probe.Status) {
			q.Baseline.Filesystems = []dr.Filesystem{{Device: "nas:/x", Mount: "/srv/x", Type: "nfs4"}, {Device: "/dev/sr0", Mount: "/media/cdrom", Type: "iso9660"}}
		}, "mounts", dr.CheckWarn, "", "/srv/x"},
		"a read-only root": {func(_ *Questions, s *probe.Status) { s.ReadOnly = []string{"/"} }, "read-only mounts", dr.CheckFail, dr.CodeBaseline, "/"},
		"read-only before": {func(q *Questions, s *probe.Status) {
			s.ReadOnly = []string{"/"}
			q.Baseline.Filesystems = []dr.Filesystem{{Mount: "/", Options: "ro,noatime"}}
		}, "read-only mounts", dr.CheckPass, "", ""},
		"a renamed card": {func(_ *Questions, s *probe.Status) {
			s.NICs = []dr.NIC{{Name: "enp1s0", MAC: "52:54:00:00:00:01", Addresses: []string{"10.9.0.2/24"}}}
		}, "network interfaces", dr.CheckFail, dr.CodeBaseline, "called enp1s0"},
		"no card":              {func(_ *Questions, s *probe.Status) { s.NICs = nil }, "network interfaces", dr.CheckFail, dr.CodeBaseline, "missing"},
		"an address is lost":   {func(_ *Questions, s *probe.Status) { s.NICs = []dr.NIC{{Name: "ens3", MAC: "52:54:00:00:00:01"}} }, "network interfaces", dr.CheckFail, dr.CodeBaseline, "has lost 10.9.0.2/24"},
		"seen from outside":    {func(q *Questions, _ *probe.Status) { q.Baseline.NICs[0].Name = "" }, "network interfaces", dr.CheckPass, "", ""},
		"a lease is lost":      {func(q *Questions, s *probe.Status) { s.NICs[1].Addresses = nil; q.Baseline.NICs[0].DHCP = true }, "network interfaces", dr.CheckWarn, "", "DHCP"},
		"no cable, no address": {func(q *Questions, s *probe.Status) { s.NICs[1].Addresses = nil; q.Networks[0].Bridge = "" }, "network interfaces", dr.CheckPass, "", ""},
		"the address moved to a bridge": {func(_ *Questions, s *probe.Status) {
			s.NICs = []dr.NIC{{Name: "ens3", MAC: "52:54:00:00:00:01"}, {Name: "br0", Kind: "bridge", MAC: "52:54:00:00:00:01", Addresses: []string{"10.9.0.2/24"}}}
		}, "network interfaces", dr.CheckPass, "", ""},
		"a port is closed": {func(_ *Questions, s *probe.Status) { s.Listening = s.Listening[1:] }, "listening ports", dr.CheckFail, dr.CodeServiceFailed, "tcp/80 (nginx)"},
		"a UDP port is closed": {func(q *Questions, _ *probe.Status) {
			q.Baseline.Listening = append(q.Baseline.Listening, dr.Listener{Proto: "udp", Port: 53, Process: "named"})
		}, "listening ports", dr.CheckWarn, "", "udp/53"},
		"a program is missing": {func(_ *Questions, s *probe.Status) { s.Processes = s.Processes[1:] }, "processes", dr.CheckWarn, "", "nginx"},
		"an oops": {func(_ *Questions, s *probe.Status) {
			s.Oops = []string{"BUG: kernel NULL pointer dereference, address: 0000000000000008"}
		}, "kernel log", dr.CheckFail, dr.CodePanic, "NULL pointer"},
		"a slow host": {func(_ *Questions, s *probe.Status) {
			s.Oops = []string{"watchdog: BUG: soft lockup - CPU#0 stuck for 22s!"}
		}, "kernel log", dr.CheckPass, "", ""},
		"a killed program": {func(_ *Questions, s *probe.Status) { s.Oops = []string{"Out of memory: Killed process 812 (java)"} }, "kernel log", dr.CheckWarn, "", "java"},
		"an error in the log": {func(_ *Questions, s *probe.Status) {
			s.Journal = []probe.LogLine{{Unit: "nginx.service", Text: "bind() failed"}}
		}, "journal", dr.CheckWarn, "", "nginx.service: bind() failed"},
		"a virtual machine": {func(_ *Questions, s *probe.Status) {
			s.Journal = []probe.LogLine{{Unit: "kernel", Text: "piix4_smbus 0000:00:1f.3: SMBus base address uninitialized"}}
		}, "journal", dr.CheckPass, "", ""},
		"something was not read": {func(_ *Questions, s *probe.Status) { s.Unread = []string{"journal: no such file"} }, "status", dr.CheckWarn, "", "journal"},
	} {
		t.Run(name, func(t *testing.T) {
			q, s := shopQuestions(), shopStatus
			s.NICs = append([]dr.NIC(nil), shopStatus.NICs...)
			q.Baseline.NICs = append([]dr.NIC(nil), q.Baseline.NICs...)
			c.change(&q, &s)
			for _, r := range compare(q, s, 0, 0) {
				if r.Name != c.result {
					if r.State == dr.CheckFail {
						t.Errorf("%s fails too: %s", r.Name, r.Got)
					}
					continue
				}
				if r.State != c.state || r.Code != c.code || !strings.Contains(r.Got, c.words) {
					t.Errorf("%+v", r)
				}
				return
			}
			t.Errorf("%s was not asked", c.result)
		})
	}
}

func TestABareImageIsAskedWhatEveryLinuxMustAnswer(t *testing.T) {
	s := shopStatus
	results := compare(Questions{}, s, 0, 0)
	var passed []string
	for _, r := range results {
		if r.State == dr.CheckPass {
			passed = append(passed, r.Name)
		}
	}
	if got := strings.Join(passed, ", "); got != "init, failed units, mounts, read-only mounts, clock, kernel log, journal" {
		t.Error(got)
	}
}

func TestTheClockIsComparedUnlessTheHostsOwnWasSet(t *testing.T) {
	for _, c := range []struct {
		offset, stepped time.Duration
		state           dr.CheckState
	}{
		{time.Second, 0, dr.CheckPass}, {-3 * time.Second, 0, dr.CheckWarn}, {time.Hour, 0, dr.CheckFail}, {-time.Hour, time.Millisecond, dr.CheckFail},
		{-time.Hour, -time.Hour, dr.CheckSkip}, {time.Hour, 3 * time.Second, dr.CheckSkip},
	} {
		if r := timeOffset(c.offset, c.stepped); r.State != c.state {
			t.Errorf("%s off, host set by %s: %+v", c.offset, c.stepped, r)
		}
	}
}

func TestAConsoleIsReadAsAPersonSeesIt(t *testing.T) {
	var e escape
	var out []byte
	for _, b := range []byte("\x1b[0;1;31mred\x1b[0m\x1b]0;title\x07\x1b(B text\r\n\x1b[2;5Hnext\x1bM\x1b[" + strings.Repeat("1;", 200) + "x\x00\x07end") {
		if b, ok := e.clean(b); ok {
			out = append(out, b)
		}
	}
	if got := string(out); !strings.HasPrefix(got, "red text\n\nnext") || !strings.HasSuffix(got, "end") || strings.ContainsAny(got, "\x1b\x07\x00") {
		t.Errorf("%q", got)
	}
}

func TestASerialLogIsFollowedAcrossItsRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "serial.log")
	c := console{path: path}
	defer c.close()
	var got []string
	read := func() string {
		lines, prompt, err := c.next()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, lines...)
		return prompt
	}
	add := func(text string) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err == nil {
			_, err = f.WriteString(text)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	read()
	add("one\r\ntwo\r\nthr")
	if p := read(); p != "thr" {
		t.Errorf("prompt %q", p)
	}
	add("ee\n")
	if err := os.Rename(path, path+".0"); err != nil {
		t.Fatal(err)
	}
	add("four, which is longer than all before it\ngrub> ")
	read()
	if p := read(); p != "grub> " {
		t.Errorf("prompt %q", p)
	}
	if fmt.Sprint(got) != "[one two three four, which is longer than all before it]" {
		t.Errorf("%q", got)
	}
	kept, err := serialTail(path)
	if err != nil || !strings.HasPrefix(string(kept), "one\ntwo\nthree\nfour") {
		t.Errorf("%q, %v", kept, err)
	}
}

func TestABootLoaderIsNotTakenForAKernel(t *testing.T) {
	for line, m := range map[string]mark{
		"Welcome to GRUB!":                           markNone,
		"Loading Linux 6.1.0-25-amd64 ...":           markNone,
		"[    0.000000] Linux version 6.1.0":         markStart,
		"[    1.234567] virtio_blk virtio2":          markKernel,
		"Welcome to Debian GNU/Linux 12 (bookworm)!": markInit,
		"SeaBIOS (version 1.16.2)":                   markFirmware,
	} {
		if got := markOf(line); got != m {
			t.Errorf("%q: %d", line, got)
		}
	}
}

func FuzzConsole(f *testing.F) {
	f.Add([]byte("\x1b[2J\x1b[01;01Hgrub> "))
	f.Add([]byte("\x1b]0;\x1b[\xff\xfe login: "))
	f.Fuzz(func(t *testing.T, in []byte) {
		var e escape
		for _, b := range in {
			if b, ok := e.clean(b); ok && (b < 0x20 && b != '\n' && b != '\t' || b == 0x7f) {
				t.Fatalf("%q came through", b)
			}
		}
		markOf(string(in))
		symptomOf(string(in))
	})
}
