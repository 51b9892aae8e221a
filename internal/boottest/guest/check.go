package guest

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
)

// Limits of one check.
const (
	maxGot       = 512              // bytes of what is told of an answer
	maxBody      = 1 << 20          // bytes of a body, banner or output that are read
	maxBanner    = 4 << 10          // bytes of a banner
	attemptLimit = 30 * time.Second // one attempt, where the check's own limit is not nearer; commands have only their own
	firstPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
)

// Check asks until the answer is as expected or the check's time is over: a service may still be starting, or ask
// another that is. It tells the last answer, and how often it asked.
func Check(ctx context.Context, c dr.Check) dr.CheckResult {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, c.Limit())
	defer cancel()
	result := dr.CheckResult{Name: c.Name, State: dr.CheckFail}
	pause := firstPause
	for tries := 1; ; tries++ {
		got, err := attempt(ctx, c)
		if err == nil {
			result.State, result.Got = dr.CheckPass, got
		} else if ctx.Err() == nil || result.Got == "" {
			// An attempt cut short by the end of time says less than the one before it.
			result.Got = err.Error()
		}
		result.Duration = time.Since(began)
		if err == nil || ctx.Err() != nil || wait(ctx, pause) != nil {
			result.Got = probe.Clean(result.Got, maxGot)
			if err != nil && tries > 1 {
				result.Got = fmt.Sprintf("%s (asked %d times in %s)", result.Got, tries, result.Duration.Round(time.Second))
			}
			return result
		}
		pause = min(pause*3/2, longestPause)
	}
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// attempt asks once. It gives what was answered, or why that is not what was expected.
func attempt(ctx context.Context, c dr.Check) (string, error) {
	if c.Kind != dr.CheckCommand {
		limited, cancel := context.WithTimeout(ctx, attemptLimit)
		defer cancel()
		ctx = limited
	}
	switch c.Kind {
	case dr.CheckHTTP:
		return askHTTP(ctx, c)
	case dr.CheckTCP:
		return askTCP(ctx, c)
	case dr.CheckPostgres, dr.CheckMySQL:
		return askSQL(ctx, c)
	case dr.CheckCommand:
		return askCommand(ctx, c)
	}
	return "", fmt.Errorf("this agent does not know checks of kind %q", c.Kind)
}

// askHTTP fetches a page. A redirect is an answer like any other: a check of where it leads names that place.
func askHTTP(ctx context.Context, c dr.Check) (string, error) {
	want := c.Status
	if want == 0 {
		want = http.StatusOK
	}
	re, err := regexp.Compile(c.Body)
	if err != nil {
		return "", fmt.Errorf("read body pattern: %w", err)
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL, nil)
	if err != nil {
		return "", fmt.Errorf("make request: %w", err)
	}
	request.Header.Set("User-Agent", "muster-guest")
	transport := &http.Transport{
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: 64 << 10,
		TLSClientConfig:        &tls.Config{InsecureSkipVerify: c.InsecureTLS}, //nolint:gosec // the customer's choice, see dr.Check
	}
	client := &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	response, err := client.Do(request)
	if err != nil {
		return "", fmt.Errorf("fetch: %w", err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxBody))
	if err != nil {
		return "", fmt.Errorf("fetch %s: status %d, then the body broke off: %w", c.URL, response.StatusCode, err)
	}
	if response.StatusCode != want {
		return "", fmt.Errorf("status %d instead of %d: %q", response.StatusCode, want, excerpt(body))
	}
	if c.Body != "" && !re.Match(body) {
		return "", fmt.Errorf("status %d, but the body does not match %q: %q", response.StatusCode, c.Body, excerpt(body))
	}
	return fmt.Sprintf("status %d, %d bytes", response.StatusCode, len(body)), nil
}

// askTCP connects and, if a banner is expected, reads until it is there.
func askTCP(ctx context.Context, c dr.Check) (string, error) {
	re, err := regexp.Compile(c.Banner)
	if err != nil {
		return "", fmt.Errorf("read banner pattern: %w", err)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.Address)
	if err != nil {
		return "", fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	if c.Banner == "" {
		return "connected", nil
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	banner := make([]byte, 0, maxBanner)
	for len(banner) < maxBanner {
		n, err := conn.Read(banner[len(banner):maxBanner])
		banner = banner[:len(banner)+n]
		if re.Match(banner) {
			return fmt.Sprintf("%q", excerpt(banner)), nil
		}
		if err != nil {
			break
		}
	}
	return "", fmt.Errorf("connected, but what it says does not match %q: %q", c.Banner, excerpt(banner))
}

// askCommand runs a command as root, in a process group of its own so that it leaves nothing behind.
func askCommand(ctx context.Context, c dr.Check) (string, error) {
	re, err := regexp.Compile(c.Expect)
	if err != nil {
		return "", fmt.Errorf("read pattern: %w", err)
	}
	out, exit, err := run(ctx, c.Command, nil, nil)
	switch {
	case err != nil:
		return "", fmt.Errorf("run %s: %w; it said %q", c.Command[0], err, excerpt(out))
	case exit != c.Exit:
		return "", fmt.Errorf("exit code %d instead of %d; it said %q", exit, c.Exit, excerpt(out))
	case c.Expect != "" && !re.Match(out) && !re.Match(bytes.TrimRight(out, "\n")): // "^yes$" means a line as much as a text
		return "", fmt.Errorf("exit code %d, but the output does not match %q: %q", exit, c.Expect, excerpt(out))
	}
	return fmt.Sprintf("exit code %d: %q", exit, excerpt(out)), nil
}

// run runs a program and gives at most maxBody of what it says and its exit code. The error is that it did not run or
// did not end by itself.
func run(ctx context.Context, argv []string, as *syscall.Credential, in io.Reader) ([]byte, int, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: as}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // a grandchild that left the group may hold the pipe
	cmd.Stdin = in
	out := &bounded{limit: maxBody}
	cmd.Stdout, cmd.Stderr = out, out
	err := cmd.Run()
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // whatever it left running
	}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return out.bytes(), -1, errors.New("its time was over and it was killed")
	case errors.As(err, &exit) && exit.Exited():
		return out.bytes(), exit.ExitCode(), nil
	case errors.Is(err, exec.ErrWaitDelay):
		return out.bytes(), 0, nil
	case err != nil:
		return out.bytes(), -1, err
	}
	return out.bytes(), 0, nil
}

// bounded keeps the beginning of what is written to it and takes the rest without keeping it.
type bounded struct {
	mu    sync.Mutex
	kept  []byte
	limit int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.kept = append(b.kept, p[:min(len(p), b.limit-len(b.kept))]...)
	return len(p), nil
}

func (b *bounded) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.kept
}

// excerpt is the beginning of an answer, for people.
func excerpt(b []byte) string {
	return probe.Clean(strings.TrimSpace(string(b[:min(len(b), 4*maxGot)])), maxGot/2)
}

// exists says whether a path is there, whatever it is.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
