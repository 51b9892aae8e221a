package hooks

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// session is one connection to a database: its client program, to whose standard input statements are written. It is used
// by one goroutine.
type session struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string // what it says; closed when it has ended
	gone  chan struct{}
	over  sync.Once
	marks int
}

// errGone is a client that ended, with its last words.
var errGone = errors.New("its client ended")

// dial starts a client as the user that the server runs as. home is that user's.
func dial(s server, program string, args, env []string) (*session, error) {
	c := &session{cmd: exec.Command(program, args...), lines: make(chan string), gone: make(chan struct{})}
	c.cmd.Env = append([]string{"PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C", "LANG=C"}, env...)
	c.cmd.Dir = "/"
	// A group of its own, so that all of it can be killed.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if os.Geteuid() == 0 {
		c.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: s.uid, Gid: s.gid, Groups: s.groups}
	}
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	c.cmd.Stdout, c.cmd.Stderr = w, w // one pipe, so that an error stands where it happened
	err = c.cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("start %s: %w", program, err)
	}
	go func() {
		defer close(c.lines)
		defer r.Close()
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, maxLine)
		for lines.Scan() {
			select {
			case c.lines <- lines.Text():
			case <-c.gone:
				return
			}
		}
	}()
	return c, nil
}

// ask has a statement carried out and gives what the client said about it, at most maxAnswer lines. Without an answer in
// time the client is killed, and the session is over.
func (c *session) ask(ctx context.Context, limit time.Duration, statement string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c.marks++
	mark := "muster-mark-" + strconv.Itoa(c.marks)
	if _, err := io.WriteString(c.in, statement+"\nSELECT '"+mark+"';\n"); err != nil {
		return c.last(ctx, nil)
	}
	var answer []string
	for {
		select {
		case <-ctx.Done():
			c.close()
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return answer, fmt.Errorf("it gave no answer within %s", limit)
			}
			return answer, context.Cause(ctx)
		case line, ok := <-c.lines:
			switch {
			case !ok:
				return answer, gone(answer)
			case line == mark:
				return answer, nil
			case len(answer) < maxAnswer:
				answer = append(answer, line)
			}
		}
	}
}

// last gives what a client said before it ended.
func (c *session) last(ctx context.Context, answer []string) ([]string, error) {
	for {
		select {
		case line, ok := <-c.lines:
			if !ok {
				return answer, gone(answer)
			}
			if len(answer) < maxAnswer {
				answer = append(answer, line)
			}
		case <-ctx.Done():
			return answer, gone(answer)
		}
	}
}

func gone(answer []string) error {
	if why := plain(strings.Join(answer, " ")); why != "" {
		return fmt.Errorf("%w: %s", errGone, why)
	}
	return errGone
}

// close ends the client, and with it the connection and all that the server held for it.
func (c *session) close() {
	c.over.Do(func() {
		close(c.gone)
		c.in.Close()
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		_ = c.cmd.Wait()
	})
}

// trouble gives the first line of an answer that is not one of those expected, as a reason.
func trouble(answer []string) error {
	for _, line := range answer {
		if at := strings.Index(line, "ERROR"); at >= 0 {
			return errors.New(plain(line[at:]))
		}
	}
	if said := plain(strings.Join(answer, " ")); said != "" {
		return errors.New(said)
	}
	return errors.New("it said nothing")
}

// account gives the name and home of the user that a server runs as.
func (s server) account() (name, home string, err error) {
	u, err := user.LookupId(strconv.Itoa(int(s.uid)))
	if err != nil {
		return "", "", fmt.Errorf("its user %d has no name on this server", s.uid)
	}
	return u.Username, u.HomeDir, nil
}

// client finds a client program: beside the server's own, and where programs are. For a server that runs as root only the
// latter, because whoever started it need not be the one who may change what lies beside it.
func (s server) client(names ...string) (string, error) {
	dirs := []string{"/usr/bin", "/usr/local/bin", "/bin"}
	if s.uid != 0 {
		beside := filepath.Dir(s.program)
		dirs = slices.Insert(dirs, 0, beside, filepath.Join(filepath.Dir(beside), "bin"))
	}
	for _, dir := range dirs {
		for _, name := range names {
			path := filepath.Join(dir, name)
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("its client %s is not installed on the server", strings.Join(names, " or "))
}
