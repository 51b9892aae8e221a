package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/probe"
)

// Limits of a status.
const (
	maxJournal   = 200              // lines
	maxLogText   = 400              // bytes of one line
	maxOops      = 100              // lines
	maxKmsg      = 1 << 16          // records of the kernel's log that are looked at
	commandLimit = 20 * time.Second // for one command of the system
)

// Identity says who booted.
func Identity() probe.Hello {
	return probe.Hello{
		BootID:   linux.BootID("/"),
		Machine:  linux.MachineID("/"),
		Hostname: linux.Hostname("/"),
		Kernel:   linux.Kernel("/"),
		Uptime:   uptime(),
	}
}

// uptime is the time since the kernel started.
func uptime() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}

// Status looks at the machine. What it cannot find out it says in Unread.
func Status(ctx context.Context, brief bool) probe.Status {
	var s probe.Status
	unread := func(what string, err error) {
		if err != nil {
			s.Unread = append(s.Unread, what+": "+err.Error())
		}
	}
	if brief {
		unread("init", manager(ctx, &s))
	} else {
		units, err := linux.Units(ctx)
		unread("units", err)
		s.InitState, s.Jobs, s.FailedUnits, s.ActiveUnits = units.State, units.Jobs, units.Failed, units.Active
		unread("OpenRC", openRC(ctx, &s))
		s.Distro, s.Kernel, s.Hostname, s.Timezone = linux.OSRelease("/"), linux.Kernel("/"), linux.Hostname("/"), linux.Timezone("/")
		s.Processes = linux.Processes("/")
		s.Mounts, err = linux.Mounts("/")
		unread("mounts", err)
		fstab, err := os.ReadFile("/etc/fstab")
		if !os.IsNotExist(err) {
			unread("fstab", err)
		}
		var plainRO []string
		s.Fstab, plainRO = readFstab(string(fstab))
		table, err := linux.Mountinfo("/")
		unread("mount table", err)
		s.ReadOnly = readOnly(table, s.Fstab, plainRO)
		s.NICs, err = linux.NICs()
		unread("network interfaces", err)
		s.Routes, err = linux.Routes()
		unread("routes", err)
		s.Journal, err = journal(ctx)
		unread("journal", err)
		s.Oops, err = kernelLog("/dev/kmsg")
		unread("kernel log", err)
	}
	s.Listening = linux.Listeners("/")
	s.Load1 = load()
	s.Uptime, s.Now = uptime(), time.Now()
	return s
}

// manager asks systemd, in one call, what tells whether it has settled.
func manager(ctx context.Context, s *probe.Status) error {
	if !exists("/run/systemd/system") {
		return nil // another init
	}
	out, err := system(ctx, "systemctl", "show", "--property=SystemState,NJobs,NFailedUnits")
	failed := ""
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "SystemState":
			s.InitState = value
		case "NJobs":
			s.Jobs, _ = strconv.Atoi(value)
		case "NFailedUnits":
			failed = value
		}
	}
	if failed != "" && failed != "0" {
		units, err := system(ctx, "systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager", "--full")
		for line := range strings.Lines(units) {
			if f := strings.Fields(line); len(f) > 0 {
				s.FailedUnits = append(s.FailedUnits, f[0])
			}
		}
		return err
	}
	return err
}

// openRC asks the other init that keeps track of its services.
func openRC(ctx context.Context, s *probe.Status) error {
	if !exists("/run/openrc/softlevel") {
		return nil
	}
	s.InitState = "running"
	out, err := system(ctx, "rc-status", "--crashed", "--nocolor") // exits with 1 when none crashed
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 0 {
			s.FailedUnits = append(s.FailedUnits, f[0])
			s.InitState = "degraded"
		}
	}
	if len(out) == 0 {
		return nil
	}
	return err
}

// system runs a command of the system and gives what it prints.
func system(ctx context.Context, argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	out, exit, err := run(ctx, argv, nil, nil)
	if err == nil && exit != 0 {
		err = fmt.Errorf("%s: exit code %d: %s", argv[0], exit, excerpt(out))
	}
	return string(out), err
}

// readFstab gives what is to be mounted at boot, and the places among them that are to be read-only. What is mounted
// only when somebody uses it counts as nofail: it need not be there.
func readFstab(text string) (entries []probe.FstabEntry, readOnly []string) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || strings.HasPrefix(f[0], "#") {
			continue
		}
		f = append(f, "auto", "defaults")[:max(len(f), 4)]
		e := probe.FstabEntry{Spec: unescape(f[0]), Mount: unescape(f[1]), Type: f[2]}
		options := strings.Split(f[3], ",")
		if e.Type == "swap" || e.Type == "ignore" || !strings.HasPrefix(e.Mount, "/") || slices.Contains(options, "noauto") {
			continue
		}
		e.Nofail = slices.Contains(options, "nofail") || slices.Contains(options, "x-systemd.automount")
		if slices.Contains(options, "ro") {
			readOnly = append(readOnly, e.Mount)
		}
		entries = append(entries, e)
	}
	return entries, readOnly
}

// unescape undoes fstab's \040 form of a space and its like.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// readOnly gives the root and the places of fstab that are mounted read-only though nobody asked for it.
func readOnly(table []linux.Mount, fstab []probe.FstabEntry, wanted []string) (out []string) {
	for _, m := range table {
		known := m.Mount == "/" || slices.ContainsFunc(fstab, func(e probe.FstabEntry) bool { return e.Mount == m.Mount })
		if !known || !strings.HasPrefix(m.Device, "/dev/") || slices.Contains(wanted, m.Mount) || slices.Contains(out, m.Mount) {
			continue
		}
		if m.Type == "iso9660" || m.Type == "squashfs" || m.Type == "erofs" {
			continue // they know no other way
		}
		if !m.Writable() || slices.Contains(strings.Split(m.Options, ","), "ro") {
			out = append(out, m.Mount)
		}
	}
	return out
}

// journal gives the errors of this boot, newest last.
func journal(ctx context.Context) ([]probe.LogLine, error) {
	if !exists("/run/systemd/system") {
		return nil, nil
	}
	out, err := system(ctx, "journalctl", "--boot", "--priority=3", "--quiet", "--no-pager", "--output=json",
		"--lines="+strconv.Itoa(maxJournal), "--output-fields=MESSAGE,PRIORITY,_SYSTEMD_UNIT,UNIT,SYSLOG_IDENTIFIER")
	return readJournal(out), err
}

// readJournal skips lines that it does not understand: the last may be cut.
func readJournal(text string) (lines []probe.LogLine) {
	for line := range strings.Lines(text) {
		var entry map[string]any
		if json.Unmarshal([]byte(line), &entry) != nil {
			continue
		}
		field := func(names ...string) string {
			for _, n := range names {
				if s, ok := entry[n].(string); ok && s != "" {
					return s
				}
			}
			return ""
		}
		priority, err := strconv.Atoi(field("PRIORITY"))
		if err != nil {
			priority = 3
		}
		message := field("MESSAGE")
		if bytesOf, ok := entry["MESSAGE"].([]any); ok { // not UTF-8: the journal gives numbers
			message = fmt.Sprintf("(%d bytes that are no text)", len(bytesOf))
		}
		lines = append(lines, probe.LogLine{
			Priority: priority,
			Unit:     probe.Clean(field("UNIT", "_SYSTEMD_UNIT", "SYSLOG_IDENTIFIER"), maxLogText),
			Text:     probe.Clean(message, maxLogText),
		})
	}
	return lines
}

// The words by which the kernel tells that something went wrong in it, or that it put an end to something.
var oopsWords = []string{
	"Oops", "kernel BUG at", "BUG: ", "general protection fault", "unable to handle", "Internal error:",
	"Out of memory", "oom-kill:", "segfault at", "soft lockup", "hard LOCKUP", "detected stall", "blocked for more than",
	"I/O error", "EXT4-fs error", "XFS (", "BTRFS error", "BTRFS critical", "Remounting filesystem read-only",
}

// kernelLog gives the lines of the kernel's log that tell of trouble.
func kernelLog(path string) ([]string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var out []string
	record := make([]byte, 16<<10)
	for range maxKmsg {
		n, err := unix.Read(fd, record)
		switch {
		case errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EINTR):
			continue // the ring went over the record; the next read gives a later one
		case errors.Is(err, unix.EAGAIN) || err == nil && n == 0:
			return out, nil
		case err != nil:
			return out, err
		}
		if line, ok := trouble(record[:n]); ok && len(out) < maxOops {
			out = append(out, line)
		}
	}
	return out, nil
}

// trouble reads one record, "level,number,time,flags;text", and says whether it is worth telling.
func trouble(record []byte) (string, bool) {
	head, text, ok := bytes.Cut(record, []byte{';'})
	if !ok {
		return "", false
	}
	level, _, _ := strings.Cut(string(head), ",")
	n, err := strconv.Atoi(level)
	if err != nil || n>>3 != 0 {
		return "", false // not the kernel's own: anybody may write to its log
	}
	text, _, _ = bytes.Cut(text, []byte{'\n'})
	for _, word := range oopsWords {
		if !bytes.Contains(text, []byte(word)) {
			continue
		}
		if word == "XFS (" && !bytes.Contains(bytes.ToLower(text), []byte("corrupt")) && !bytes.Contains(text, []byte("error")) {
			continue
		}
		return probe.Clean(string(text), maxLogText), true
	}
	return "", false
}

// load is the load average of the last minute.
func load() float64 {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(b), " ")
	n, _ := strconv.ParseFloat(first, 64)
	return n
}
