package hooks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// DefaultDir is where a server has hooks of its own. They belong to the server and to nobody else: what a capture runs as
// root is never sent to it.
const DefaultDir = "/etc/muster/hooks.d"

// script is a hook of the server's own: a program that is run with "pre" before the instant and with "post" after it, once
// it was run with "pre".
type script struct {
	path string
	said []string
}

func (s *script) String() string { return "hook " + filepath.Base(s.path) }

// scripts lists the hooks in a folder, in the order of their names, and says of others why they are not run. That there is
// no such folder is no trouble.
func scripts(dir string) (out []*script, ignored []string) {
	info, err := os.Stat(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = private(info)
	}
	if err == nil && !info.IsDir() {
		err = errors.New("it is no folder")
	}
	if err != nil {
		return nil, []string{fmt.Sprintf("the hooks in %s are not run: %v", dir, err)}
	}
	found := list(dir, 1024)
	slices.Sort(found)
	for _, name := range found {
		if strings.HasPrefix(name, ".") || strings.HasSuffix(name, "~") || strings.Contains(name, ".dpkg-") {
			continue // left by an editor or a package
		}
		path := filepath.Join(dir, name)
		info, err := os.Stat(path)
		switch {
		case err != nil:
		case !info.Mode().IsRegular():
			err = errors.New("it is no regular file")
		case info.Mode()&0o100 == 0:
			err = errors.New("it is not executable")
		case len(out) == maxScripts:
			err = fmt.Errorf("there are more than %d", maxScripts)
		default:
			err = private(info)
		}
		if err != nil {
			ignored = append(ignored, fmt.Sprintf("the hook %s is not run: %v", plain(path), err))
			continue
		}
		out = append(out, &script{path: path})
	}
	return out, ignored
}

// private says whether nobody but root may change a file: it is about to be run as root.
func private(info os.FileInfo) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok || stat.Uid != 0 && int(stat.Uid) != os.Geteuid():
		return errors.New("it does not belong to root")
	case info.Mode().Perm()&0o022 != 0:
		return errors.New("others than its owner may write to it")
	}
	return nil
}

func (s *script) begin(ctx context.Context, limit time.Duration) error {
	return s.run(ctx, "pre", limit)
}
func (s *script) lock(context.Context, time.Duration) error { return nil }
func (s *script) unlock(context.Context) error              { return nil }

func (s *script) end(ctx context.Context, limit time.Duration) error {
	return s.run(ctx, "post", limit)
}

func (s *script) stands() bool { return true }

func (s *script) notes() []string { return s.said }

// run runs the hook once. At the limit its whole process group is killed.
func (s *script) run(ctx context.Context, verb string, limit time.Duration) error {
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(bounded, s.path, verb)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "LANG=C", "HOME=/root"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = killGrace
	var out output
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it left something running that still has its output
	}
	said := plain(string(out.b))
	if said != "" {
		s.said = append(s.said, fmt.Sprintf("%s %s: %s", s, verb, said))
	}
	switch {
	case err == nil:
		return nil
	case bounded.Err() != nil && ctx.Err() == nil:
		return fmt.Errorf("%s %s: killed, because it was not done within %s", filepath.Base(s.path), verb, limit)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case said != "":
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(s.path), verb, err, said)
	}
	return fmt.Errorf("%s %s: %w", filepath.Base(s.path), verb, err)
}

// output keeps the first of what a hook says and swallows the rest.
type output struct{ b []byte }

func (o *output) Write(p []byte) (int, error) {
	o.b = append(o.b, p[:min(len(p), max(0, maxOutput-len(o.b)))]...)
	return len(p), nil
}
