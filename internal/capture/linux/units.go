package linux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"
)

// UnitStates is what systemd says of its units. On a system without systemd it is empty.
type UnitStates struct {
	State   string   // systemctl is-system-running: running, degraded, starting, …
	Failed  []string // units of any kind
	Active  []string // services
	Enabled []string // what an administrator or a package had started by another unit
	Jobs    int      // queued; 0 when init has settled
}

const commandLimit = 20 * time.Second

// Units asks systemd for the states of its units. Services that exist only because somebody is logged in are left out.
func Units(ctx context.Context) (UnitStates, error) {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return UnitStates{}, nil // not booted with systemd
	}
	var u UnitStates
	// It exits with 1 for every state but running.
	state, err := run(ctx, "systemctl", "is-system-running")
	if u.State = strings.TrimSpace(state); u.State == "" && err != nil {
		return UnitStates{}, err
	}
	var errs []error
	list := func(args ...string) []string {
		out, err := run(ctx, "systemctl", append(args, "--no-legend", "--no-pager", "--plain", "--full")...)
		errs = append(errs, err)
		return firstWords(out)
	}
	u.Failed = list("list-units", "--state=failed")
	u.Active = withoutLogins(list("list-units", "--type=service", "--state=active"))
	u.Enabled = enabledUnits("/")
	u.Jobs = len(list("list-jobs"))
	return u, errors.Join(errs...)
}

// enabledUnits reads the links that "systemctl enable" makes. Asking systemd instead makes it load every unit file there
// is, which takes seconds on a slow machine.
func enabledUnits(root string) []string {
	const folder = "etc/systemd/system"
	seen := map[string]bool{}
	for _, dir := range names(root, folder) {
		switch filepath.Ext(dir) {
		case ".wants", ".requires", ".upholds":
			for _, unit := range names(root, folder, dir) {
				seen[unit] = true
			}
		}
	}
	return cut(slices.Sorted(maps.Keys(seen)))
}

func withoutLogins(units []string) []string {
	out := units[:0]
	for _, u := range units {
		instance, _, _ := strings.Cut(u, "@")
		switch {
		case !strings.Contains(u, "@"), instance != "user" && instance != "user-runtime-dir" && instance != "ssh" && instance != "sshd":
			out = append(out, u)
		}
	}
	return out
}

// firstWords takes the first word of every line that is one: "●" marks and "No jobs running." are not.
func firstWords(out string) []string {
	var words []string
	for line := range strings.Lines(out) {
		f := strings.Fields(strings.TrimLeft(line, "●*× "))
		if len(f) > 0 && f[0] != "No" {
			words = append(words, f[0])
		}
	}
	sort.Strings(words)
	return cut(words)
}

// run runs a command of the system and gives its output, also when it exits with an error.
func run(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "SYSTEMD_COLORS=0", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.WaitDelay = time.Second
	var out bounded
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("run %s %s: %w", name, strings.Join(args, " "), err)
	}
	return out.String(), nil
}

// bounded keeps the first maxText bytes and swallows the rest.
type bounded struct{ buf bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if room := maxText - b.buf.Len(); room > 0 {
		b.buf.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

func (b *bounded) String() string { return b.buf.String() }
