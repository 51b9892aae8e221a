package ssh

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// CacheDir is the only folder on a server that captures write to.
const CacheDir = "/var/cache/muster"

// Limits of what a server says outside of the agent's conversation.
const (
	maxSaid      = 16 << 10 // bytes
	commandLimit = 2 * time.Minute
)

// Exit codes of the scripts in shell.go.
const (
	exitForeign = 71 // the cache folder is not a folder of root's own
	exitMake    = 72 // it cannot be made
	exitWrite   = 73 // the agent cannot be written
	exitDamaged = 74 // the agent is not what was sent
	exitNoSum   = 75 // there is no sha256sum
	exitTracked = 76 // tracking cannot be ended
	exitNoExec  = 126
)

// platform is what a server answers when it is looked at.
type platform struct {
	system string // as Go calls it
	arch   string // as Go calls it
	cache  bool   // the cache folder is there
}

// look asks what kind of system it is and refuses what the agent cannot run on.
func (s *Source) look(ctx context.Context) (platform, error) {
	said, err := s.script(ctx, s.shell.look, "", nil)
	if ctx.Err() == nil && (err != nil || len(strings.Fields(said)) < 4) {
		// There is no POSIX shell. If there is no PowerShell either, that was the error.
		s.use(powershell)
		if answer, failed := s.script(ctx, s.shell.look, "", nil); failed == nil && len(strings.Fields(answer)) >= 4 {
			said, err = answer, nil
		} else {
			s.use(posix)
		}
	}
	if err != nil {
		return platform{}, err
	}
	f := strings.Fields(said)
	if len(f) < 4 {
		return platform{}, fmt.Errorf("look at the server: its shell answered %q: this release captures Linux servers with a POSIX shell, and Windows servers with PowerShell", said)
	}
	f = f[len(f)-4:] // a login may have printed something before
	arch := map[string]string{"x86_64": "amd64", "amd64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "arm64": "arm64"}[f[1]]
	switch {
	case f[0] != "Linux" && f[0] != "Windows":
		return platform{}, fmt.Errorf("look at the server: it runs %s: this release captures Linux and Windows", f[0])
	case arch == "" || f[0] == "Windows" && arch != "amd64":
		return platform{}, fmt.Errorf("look at the server: its processor is %s: this release captures x86_64, and on Linux aarch64", f[1])
	case f[0] == "Windows" && f[2] != "True":
		return platform{}, fmt.Errorf("look at the server: user %s is no administrator, and only one can read disks and make shadow copies: log in as one", s.source.User)
	case f[0] == "Linux" && f[2] != "0":
		return platform{}, fmt.Errorf("look at the server: user %s is not root (uid %s), and only root can read disks: log in as root; this release does not use sudo", s.source.User, f[2])
	}
	return platform{system: strings.ToLower(f[0]), arch: arch, cache: f[3] == "there" || f[3] == "True"}, nil
}

// use has the server told in another language.
func (s *Source) use(sh shell) { s.shell, s.cache = sh, sh.dir }

// install sees to it that the agent for the server's processor is there, and gives its sum.
func (s *Source) install(ctx context.Context, p platform) (sum string, err error) {
	program, err := s.agents(p.system, p.arch)
	if err != nil {
		return "", fmt.Errorf("find the agent for %s on %s: %w", p.system, p.arch, err)
	}
	digest := sha256.Sum256(program)
	sum = hex.EncodeToString(digest[:])
	said, err := s.script(ctx, s.shell.have, sum, nil)
	if err != nil {
		return "", err
	}
	if f := strings.Fields(said); len(f) > 0 && f[0] == sum {
		return sum, nil
	}
	if _, err := s.script(ctx, s.shell.upload, sum, program); err != nil {
		return "", fmt.Errorf("put the agent on the server: %w", err)
	}
	return sum, nil
}

// script runs a script to its end.
func (s *Source) script(ctx context.Context, script, sum string, input []byte) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	session, err := s.client.NewSession()
	if err != nil {
		return "", fmt.Errorf("open a session: %w", s.blame(ctx, err))
	}
	defer session.Close()
	stop := context.AfterFunc(ctx, func() { session.Close() })
	defer stop()
	var out, problem said
	session.Stdin, session.Stdout, session.Stderr = bytes.NewReader(input), &out, &problem
	if err := session.Run(s.shell.command(s.cache, script, sum)); err != nil {
		return "", s.blame(ctx, s.meaning(err, problem.String()))
	}
	return out.String(), nil
}

// meaning turns the end of a script or the agent into a sentence.
func (s *Source) meaning(err error, problem string) error {
	var exit *ssh.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	problem = strings.TrimSpace(problem)
	switch exit.ExitStatus() {
	case exitForeign:
		return fmt.Errorf("%s is not a folder that belongs to root alone: see what it is and remove it", s.cache)
	case exitMake:
		return fmt.Errorf("%s cannot be made: %s", s.cache, problem)
	case exitWrite:
		return fmt.Errorf("%s cannot be written to: %s: make room for the agent (about 10 MB)", s.cache, problem)
	case exitDamaged:
		return fmt.Errorf("the agent in %s is not the one that was sent: try again; if it stays, see what changes it", s.cache)
	case exitNoSum:
		return errors.New("the server has no sha256sum, with which the agent is checked before it runs: install coreutils")
	case exitTracked:
		return fmt.Errorf("tracking cannot be ended: %s: try again when no capture is running, or restart the server", problem)
	case exitNoExec:
		return fmt.Errorf("programs in %s may not be run (%s): is it on a file system mounted noexec, or does a security policy forbid it? allow it there", s.cache, problem)
	}
	return fmt.Errorf("exit code %d: %s", exit.ExitStatus(), problem)
}

// said keeps the first of what a server says, and swallows the rest.
type said struct{ b []byte }

func (w *said) Write(p []byte) (int, error) {
	w.b = append(w.b, p[:min(len(p), max(0, maxSaid-len(w.b)))]...)
	return len(p), nil
}

func (w *said) String() string { return string(w.b) }

var _ io.Writer = (*said)(nil)
