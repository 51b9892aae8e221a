package linux

import (
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
)

// process is one line of /proc/PID/stat.
type process struct {
	pid, parent, session int
	name                 string
	state                byte
	kernel               bool
}

const kernelThread = 0x00200000 // PF_KTHREAD

// Processes lists the distinct command names of user-space processes. It leaves out whoever asks: this process, its
// session, and the login it came through, none of which a copy of the machine would show.
func Processes(root string) []string {
	self := 0
	if root == "/" {
		self = os.Getpid()
	}
	all := processes(root)
	ours := lineage(all, self)
	seen := map[string]bool{}
	var out []string
	for _, p := range all {
		// A session's PAM helper exists only while somebody is logged in.
		if p.kernel || p.state == 'Z' || ours[p.pid] || p.name == "(sd-pam)" || seen[p.name] {
			continue
		}
		seen[p.name] = true
		out = append(out, p.name)
	}
	sort.Strings(out)
	return cut(out)
}

func processes(root string) map[int]process {
	out := map[int]process{}
	for _, name := range names(root, "proc") {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if p, ok := parseStat(content(root, "proc", name, "stat")); ok && p.pid == pid {
			out[pid] = p
		}
	}
	return out
}

// parseStat reads a stat line. The name is in parentheses and may itself hold parentheses and spaces.
func parseStat(line string) (process, bool) {
	open, shut := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 0 || shut < open {
		return process{}, false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line[:open]))
	f := strings.Fields(line[shut+1:])
	if err != nil || len(f) < 7 {
		return process{}, false
	}
	parent, _ := strconv.Atoi(f[1])
	session, _ := strconv.Atoi(f[3])
	flags, _ := strconv.ParseUint(f[6], 10, 64)
	return process{pid: pid, parent: parent, session: session, name: line[open+1 : shut], state: f[0][0], kernel: flags&kernelThread != 0}, true
}

// lineage gives a process, everything in its session, and its ancestors below the services that init started.
func lineage(all map[int]process, self int) map[int]bool {
	ours := map[int]bool{}
	me, ok := all[self]
	if !ok {
		return ours
	}
	for pid, p := range all {
		if p.session == me.session {
			ours[pid] = true
		}
	}
	for p, ok := me, true; ok && p.pid > 1 && p.parent > 1; p, ok = all[p.parent] {
		if ours[p.pid] && p.pid != self && p.session != me.session {
			break // a loop: the table changed while it was read
		}
		ours[p.pid] = true
	}
	ours[self] = true
	return ours
}

// holders maps the inode of every open socket to the name of a process that holds it.
func holders(root string) map[uint64]string {
	out := map[uint64]string{}
	for pid, p := range processes(root) {
		fds := filepath.Join(root, "proc", strconv.Itoa(pid), "fd")
		for _, fd := range names(fds) {
			target, err := os.Readlink(filepath.Join(fds, fd))
			if err != nil || !strings.HasPrefix(target, "socket:[") {
				continue
			}
			inode, err := strconv.ParseUint(strings.TrimSuffix(target[len("socket:["):], "]"), 10, 64)
			// Init holds the sockets it activates services by; the service itself is the better answer.
			if err == nil && (out[inode] == "" || pid != 1) {
				out[inode] = p.name
			}
		}
	}
	return out
}
