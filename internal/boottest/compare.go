package boottest

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
)

// Thresholds of the comparison.
const (
	ephemeral   = 32768 // first port that Linux gives to clients
	offsetWarn  = 2 * time.Second
	offsetFail  = 5 * time.Minute
	clockStep   = 2 * time.Second // by which the host's clock was set meanwhile: then nothing can be compared with it
	maxNamed    = 12              // things named in one result
	maxLogLines = 20              // lines of a log told in one result
)

// compare holds a stable machine against its baseline. A result without something in the baseline to compare with is
// left out, but for the questions that every Linux must answer well.
func compare(q Questions, s probe.Status, offset, stepped time.Duration) []dr.CheckResult {
	var out []dr.CheckResult
	add := func(r dr.CheckResult) {
		if r.State != "" {
			out = append(out, r)
		}
	}
	add(initState(s))
	add(failedUnits(q, s))
	add(distro(q.Baseline, s))
	add(same("kernel", q.Baseline.Kernel, s.Kernel, dr.CheckWarn)) // one installed since the original started is no fault
	add(hostname(q.Baseline, s))
	add(mounts(q.Baseline, s))
	add(writable(q.Baseline, s))
	add(nics(q, s))
	add(ports(q, s))
	add(processes(q.Baseline, s))
	add(same("time zone", q.Baseline.Timezone, s.Timezone, dr.CheckWarn))
	add(timeOffset(offset, stepped))
	add(kernelLog(s))
	add(journal(s))
	if len(s.Unread) > 0 {
		add(dr.CheckResult{Name: "status", State: dr.CheckWarn, Want: "the test agent finds out everything", Got: some(s.Unread)})
	}
	return out
}

// machineID is compared where hello is: a status does not carry it.
func machineID(b dr.Baseline, h probe.Hello) dr.CheckResult {
	return same("machine id", b.Machine, h.Machine, dr.CheckFail)
}

// same compares two texts, if both are known.
func same(name, want, got string, otherwise dr.CheckState) dr.CheckResult {
	switch {
	case want == "":
		return dr.CheckResult{}
	case got == "":
		return dr.CheckResult{Name: name, State: dr.CheckSkip, Want: want, Got: "the guest does not say"}
	case want == got:
		return dr.CheckResult{Name: name, State: dr.CheckPass, Want: want, Got: got}
	}
	return verdict(name, otherwise, dr.CodeBaseline, want, got)
}

// verdict makes a result; only a fail has a code.
func verdict(name string, state dr.CheckState, code dr.Code, want, got string) dr.CheckResult {
	if state != dr.CheckFail {
		code = dr.CodeNone
	}
	return dr.CheckResult{Name: name, State: state, Code: code, Want: want, Got: got}
}

func initState(s probe.Status) dr.CheckResult {
	const name, want = "init", "running"
	switch s.InitState {
	case "running":
		return verdict(name, dr.CheckPass, "", want, s.InitState)
	case "degraded": // the failed units decide
		return verdict(name, dr.CheckPass, "", want, s.InitState)
	case "maintenance":
		return verdict(name, dr.CheckFail, dr.CodeEmergency, want, "maintenance: the system is in rescue or emergency mode")
	case "stopping", "offline":
		return verdict(name, dr.CheckFail, dr.CodeDied, want, s.InitState)
	case "":
		return verdict(name, dr.CheckSkip, "", want, "this init does not tell its state")
	}
	return verdict(name, dr.CheckWarn, "", want, fmt.Sprintf("%s, %d start jobs left", s.InitState, s.Jobs))
}

// failedUnits compares with what had failed on the original already. A unit that needs hardware or a network which no
// rescue machine has is only told.
func failedUnits(q Questions, s probe.Status) dr.CheckResult {
	const name = "failed units"
	want := "none but those of the original"
	if len(q.Baseline.FailedUnits) > 0 {
		want += ": " + some(q.Baseline.FailedUnits)
	}
	fresh := unexpected(q, s.FailedUnits)
	var away []string
	for _, u := range s.FailedUnits {
		if outsiders.match(u) && !slices.Contains(q.Baseline.FailedUnits, u) {
			away = append(away, u)
		}
	}
	switch {
	case len(fresh) > 0:
		return verdict(name, dr.CheckFail, dr.CodeServiceFailed, want, some(fresh))
	case len(away) > 0:
		return verdict(name, dr.CheckWarn, "", want, some(away)+": these need hardware or a network that is not here")
	}
	return verdict(name, dr.CheckPass, "", want, fmt.Sprintf("%d failed", len(s.FailedUnits)))
}

// unexpected gives the failed units that must not have failed.
func unexpected(q Questions, failed []string) (out []string) {
	for _, u := range failed {
		if !slices.Contains(q.Baseline.FailedUnits, u) && !outsiders.match(u) && !edited(q.PreRecovery, u) {
			out = append(out, u)
		}
	}
	return out
}

// edited says whether pre-recovery changed a unit.
func edited(p dr.PreRecovery, unit string) bool {
	return slices.ContainsFunc(p.Edits, func(e dr.Edit) bool {
		return strings.Contains(e.Path, "/systemd/") && (path.Base(e.Path) == unit || path.Base(path.Dir(e.Path)) == unit+".d")
	})
}

func distro(b dr.Baseline, s probe.Status) dr.CheckResult {
	if b.Distro.ID == "" {
		return dr.CheckResult{}
	}
	want, got := strings.TrimSpace(b.Distro.ID+" "+b.Distro.Version), strings.TrimSpace(s.Distro.ID+" "+s.Distro.Version)
	return same("operating system", want, got, dr.CheckFail)
}

// hostname fails where the guest has another name of its own. One that it is only given by a network shows as localhost.
func hostname(b dr.Baseline, s probe.Status) dr.CheckResult {
	short, _, _ := strings.Cut(s.Hostname, ".")
	if was, _, _ := strings.Cut(b.Hostname, "."); was != "" && was == short {
		return verdict("host name", dr.CheckPass, "", b.Hostname, s.Hostname)
	}
	if short == "localhost" || short == "(none)" {
		return same("host name", b.Hostname, s.Hostname, dr.CheckWarn)
	}
	return same("host name", b.Hostname, s.Hostname, dr.CheckFail)
}

// mounts holds what is mounted against fstab, and against what was mounted on the original.
func mounts(b dr.Baseline, s probe.Status) dr.CheckResult {
	const name, want = "mounts", "everything of fstab"
	mounted := func(place string) bool {
		return slices.ContainsFunc(s.Mounts, func(f dr.Filesystem) bool { return path.Clean(f.Mount) == path.Clean(place) })
	}
	var missing, absent []string
	count := 0
	for _, e := range s.Fstab {
		if e.Mount == "" || e.Type == "tmpfs" || e.Type == "proc" || e.Type == "sysfs" || e.Type == "devpts" || strings.HasPrefix(e.Type, "fuse") {
			continue // not on a disk: the guest lists only what is
		}
		count++
		switch what := fmt.Sprintf("%s (%s)", e.Mount, e.Spec); {
		case mounted(e.Mount):
		case e.Nofail:
			absent = append(absent, what)
		default:
			missing = append(missing, what)
		}
	}
	for _, f := range b.Filesystems {
		known := slices.ContainsFunc(s.Fstab, func(e probe.FstabEntry) bool { return path.Clean(e.Mount) == path.Clean(f.Mount) })
		if !known && !mounted(f.Mount) && !passing(f) {
			absent = append(absent, fmt.Sprintf("%s (%s, as on the original)", f.Mount, f.Device))
		}
	}
	switch {
	case len(missing) > 0:
		return verdict(name, dr.CheckFail, dr.CodeBaseline, want, "not mounted: "+some(missing))
	case len(absent) > 0:
		return verdict(name, dr.CheckWarn, "", want, "not mounted: "+some(absent))
	case count == 0 && len(b.Filesystems) == 0:
		return verdict(name, dr.CheckSkip, "", want, "fstab has no entry and nothing is known of the original")
	}
	return verdict(name, dr.CheckPass, "", want, fmt.Sprintf("%d mounted", len(s.Mounts)))
}

// passing says whether a file system is mounted only while somebody uses it.
func passing(f dr.Filesystem) bool {
	for _, prefix := range []string{"/run/", "/media/", "/mnt/", "/snap/", "/var/lib/docker/", "/var/lib/containers/", "/var/lib/kubelet/"} {
		if strings.HasPrefix(f.Mount, prefix) {
			return true
		}
	}
	return f.Type == "iso9660" || f.Type == "squashfs" || f.Type == "autofs"
}

func writable(b dr.Baseline, s probe.Status) dr.CheckResult {
	const name, want = "read-only mounts", "none that fstab does not ask for"
	var bad []string
	for _, m := range s.ReadOnly {
		was := slices.ContainsFunc(b.Filesystems, func(f dr.Filesystem) bool {
			return f.Mount == m && slices.Contains(strings.Split(f.Options, ","), "ro")
		})
		if !was {
			bad = append(bad, m)
		}
	}
	if len(bad) > 0 {
		return verdict(name, dr.CheckFail, dr.CodeBaseline, want, some(bad))
	}
	return verdict(name, dr.CheckPass, "", want, "none")
}

// nics looks for the original's cards by their hardware address, and on them for its names and addresses.
func nics(q Questions, s probe.Status) dr.CheckResult {
	const name = "network interfaces"
	var want, bad, warn []string
	for _, n := range q.Baseline.NICs {
		mac := burntIn(n)
		at, carried := slices.IndexFunc(q.Hardware.NICs, func(h dr.HWNIC) bool { return strings.EqualFold(h.MAC, mac) }), false
		if at >= 0 {
			carried = at < len(q.Networks) && q.Networks[at].Bridge != ""
		}
		switch {
		case !n.Physical() && !stacked(n.Kind), n.Physical() && at < 0:
			continue // made by software that runs later or not, or a card the rescue machine was not given
		case !n.Physical():
			if !slices.ContainsFunc(s.NICs, func(g dr.NIC) bool { return g.Name == n.Name }) {
				warn = append(warn, fmt.Sprintf("%s (%s) is missing", n.Name, n.Kind))
			}
			continue
		}
		want = append(want, strings.TrimSpace(fmt.Sprintf("%s (%s)", n.Name, mac)))
		i := slices.IndexFunc(s.NICs, func(g dr.NIC) bool { return g.Physical() && strings.EqualFold(burntIn(g), mac) })
		if i < 0 {
			bad = append(bad, fmt.Sprintf("%s (%s) is missing", n.Name, mac))
			continue
		}
		if got := s.NICs[i].Name; n.Name != "" && got != n.Name { // from outside a machine the names inside are not known
			bad = append(bad, fmt.Sprintf("%s (%s) is called %s", n.Name, mac, got))
		}
		if lost := lostAddresses(n, s.NICs); carried && len(lost) > 0 {
			what := fmt.Sprintf("%s has lost %s", n.Name, some(lost))
			if n.DHCP {
				warn = append(warn, what+", which it was given by DHCP")
			} else {
				bad = append(bad, what)
			}
		}
	}
	switch {
	case len(bad) > 0:
		return verdict(name, dr.CheckFail, dr.CodeBaseline, some(want), some(append(bad, warn...)))
	case len(warn) > 0:
		return verdict(name, dr.CheckWarn, "", some(want), some(warn))
	case len(want) > 0:
		return verdict(name, dr.CheckPass, "", some(want), "all as on the original")
	}
	return dr.CheckResult{}
}

func burntIn(n dr.NIC) string {
	if n.Permanent != "" {
		return n.Permanent
	}
	return n.MAC
}

func stacked(kind string) bool {
	return kind == "bond" || kind == "bridge" || kind == "vlan" || kind == "team"
}

// lostAddresses gives the addresses of the original's interface that no interface has any more. IPv6 addresses that a
// network gives are left out.
func lostAddresses(n dr.NIC, now []dr.NIC) (lost []string) {
	for _, a := range n.Addresses {
		p, err := netip.ParsePrefix(a)
		if err != nil || p.Addr().IsLinkLocalUnicast() || p.Addr().Is6() && p.Bits() == 64 {
			continue
		}
		if !slices.ContainsFunc(now, func(g dr.NIC) bool { return slices.Contains(g.Addresses, a) }) {
			lost = append(lost, a)
		}
	}
	return lost
}

// lasting says whether a socket is a service's and not a client's or a login's, so that it must be there again.
func lasting(l dr.Listener) bool {
	loopback := false
	if a, err := netip.ParseAddr(l.Address); err == nil {
		loopback = a.IsLoopback()
	}
	switch {
	case l.Port <= 0 || l.Port >= ephemeral:
		return false
	case strings.HasPrefix(l.Process, "sshd") && loopback && l.Port != 22:
		return false // somebody's forwarded port
	case l.Proto == "udp":
		return false // told apart from clients too badly; see ports
	}
	return true
}

func portName(l dr.Listener) string {
	if l.Process != "" {
		return fmt.Sprintf("%s/%d (%s)", l.Proto, l.Port, l.Process)
	}
	return fmt.Sprintf("%s/%d", l.Proto, l.Port)
}

// missingPorts names the lasting ports of the baseline on which nothing listens.
func missingPorts(baseline, now []dr.Listener) (missing []string) {
	for _, l := range baseline {
		there := slices.ContainsFunc(now, func(g dr.Listener) bool { return g.Proto == l.Proto && g.Port == l.Port })
		if name := portName(l); lasting(l) && !there && !slices.Contains(missing, name) {
			missing = append(missing, name)
		}
	}
	return missing
}

func ports(q Questions, s probe.Status) dr.CheckResult {
	const name = "listening ports"
	want := portSet(q.Baseline.Listening)
	if missing := missingPorts(q.Baseline.Listening, s.Listening); len(missing) > 0 {
		return verdict(name, dr.CheckFail, dr.CodeServiceFailed, some(want), "nothing listens on "+some(missing))
	}
	var udp []string
	for _, l := range q.Baseline.Listening {
		there := slices.ContainsFunc(s.Listening, func(g dr.Listener) bool { return g.Proto == l.Proto && g.Port == l.Port })
		if l.Proto == "udp" && l.Port < ephemeral && l.Port != 68 && l.Port != 546 && !there {
			udp = append(udp, portName(l))
		}
	}
	switch {
	case len(udp) > 0:
		return verdict(name, dr.CheckWarn, "", some(want), "nothing listens on "+some(udp))
	case len(want) == 0:
		return dr.CheckResult{}
	}
	return verdict(name, dr.CheckPass, "", some(want), "all listen")
}

func processes(b dr.Baseline, s probe.Status) dr.CheckResult {
	var missing []string
	for _, p := range b.Processes {
		if !slices.Contains(s.Processes, p) && !passingProcesses.match(p) {
			missing = append(missing, p)
		}
	}
	want := fmt.Sprintf("%d programs of the original", len(b.Processes))
	switch {
	case len(b.Processes) == 0:
		return dr.CheckResult{}
	case len(missing) > 0:
		return verdict("processes", dr.CheckWarn, "", want, "not running: "+some(missing))
	}
	return verdict("processes", dr.CheckPass, "", want, "all run")
}

// timeOffset compares the clocks. A host whose own clock was set meanwhile has nothing to compare with.
func timeOffset(offset, stepped time.Duration) dr.CheckResult {
	const name = "clock"
	want := fmt.Sprintf("within %s of the host's", offsetWarn)
	got := fmt.Sprintf("%s off", offset.Round(100*time.Millisecond))
	switch {
	case stepped.Abs() > clockStep:
		return verdict(name, dr.CheckSkip, "", want, fmt.Sprintf("the host's own clock was set by %s during the test", stepped.Round(time.Second)))
	case offset.Abs() > offsetFail:
		return verdict(name, dr.CheckFail, dr.CodeBaseline, want, got)
	case offset.Abs() > offsetWarn:
		return verdict(name, dr.CheckWarn, "", want, got)
	}
	return verdict(name, dr.CheckPass, "", want, got)
}

// kernelLog fails on a kernel that broke. What a slow host causes, and what happened to programs, is told.
func kernelLog(s probe.Status) dr.CheckResult {
	const name, want = "kernel log", "no trouble"
	var bad, warn []string
	for _, line := range s.Oops {
		switch {
		case kernelNoise.match(line):
		case brokenKernel.match(line) && !slowHost.match(line):
			bad = append(bad, line)
		default:
			warn = append(warn, line)
		}
	}
	switch {
	case len(bad) > 0:
		return verdict(name, dr.CheckFail, dr.CodePanic, want, lines(bad))
	case len(warn) > 0:
		return verdict(name, dr.CheckWarn, "", want, lines(warn))
	}
	return verdict(name, dr.CheckPass, "", want, "none")
}

// journal tells the errors of this boot that a virtual machine does not explain.
func journal(s probe.Status) dr.CheckResult {
	var told []string
	for _, l := range s.Journal {
		if !kernelNoise.match(l.Text) && !journalNoise.match(l.Text) {
			told = append(told, strings.TrimPrefix(l.Unit+": "+l.Text, ": "))
		}
	}
	const name, want = "journal", "no errors but those of a virtual machine"
	if len(told) > 0 {
		return verdict(name, dr.CheckWarn, "", want, lines(told))
	}
	return verdict(name, dr.CheckPass, "", want, fmt.Sprintf("none in %d lines", len(s.Journal)))
}

// some names the first few of a list.
func some(list []string) string {
	if len(list) > maxNamed {
		return strings.Join(list[:maxNamed], ", ") + fmt.Sprintf(" and %d more", len(list)-maxNamed)
	}
	return strings.Join(list, ", ")
}

// lines quotes the last few lines of a log.
func lines(list []string) string {
	if more := len(list) - maxLogLines; more > 0 {
		return fmt.Sprintf("%d more; ", more) + strings.Join(list[more:], "; ")
	}
	return strings.Join(list, "; ")
}
