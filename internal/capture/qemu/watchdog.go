package qemu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/musterdr/muster/internal/dr"
)

// The watchdog is a process of its own, in its own session, that freezes the machine's file systems through the guest agent and
// thaws them again: when told to, at its deadline, or when whoever started it is gone. It freezes as well as thaws, so that a
// freeze that comes through late is undone by the one who asked for it. Lines over pipes:
//
//	→ freeze   ← frozen COUNT | failed REASON
//	→ thaw     ← thawed HELD     (true if nobody thawed in between, and the deadline did not come)
//	→ (end of input): thaws and ends

const (
	freezeLimit  = dr.DefaultFreezeLimit
	thawLimit    = 10 * time.Minute // for which a thaw is tried, should libvirtd or the agent not answer
	thawAgain    = time.Second
	freezeAnswer = freezeLimit + 5*time.Second
)

// Watchdog is the main function of the watchdog process. Its arguments are those that were appended to Host.Watchdog.
func Watchdog(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 3 {
		return errors.New("the watchdog takes a socket, a UUID and a limit")
	}
	limit, err := time.ParseDuration(args[2])
	if err != nil || limit <= 0 {
		return fmt.Errorf("arm the watchdog: %q is no limit", args[2])
	}
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE, syscall.SIGINT)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	w := &watchdog{conn: &connection{path: args[0]}, limit: limit}
	defer w.conn.close() //nolint:errcheck // it ends with us
	if err := w.conn.ask(context.Background(), func(l *libvirt.Libvirt) (err error) {
		w.dom, err = find(l, args[1])
		return err
	}); err != nil {
		return fmt.Errorf("find the machine to watch: %w", err)
	}
	go func() {
		<-stop
		w.thaw()
	}()
	defer w.thaw()
	fmt.Fprintln(out, "ready")
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		switch lines.Text() {
		case "freeze":
			// Beside the loop: a freeze may hang, and the end of the input must be noticed all the same.
			go func() { fmt.Fprintln(out, w.freeze()) }()
		case "thaw":
			fmt.Fprintln(out, "thawed", w.thaw())
		default:
			return fmt.Errorf("the watchdog knows no command %q", lines.Text())
		}
	}
	return lines.Err()
}

type watchdog struct {
	conn  *connection
	dom   libvirt.Domain
	limit time.Duration

	turn    sync.Mutex // held during a freeze, and during a thaw
	frozen  bool
	over    bool // no more freezing
	expired bool
	alarm   *time.Timer
}

// freeze freezes every file system of the machine.
func (w *watchdog) freeze() string {
	w.turn.Lock()
	defer w.turn.Unlock()
	if w.over || w.frozen {
		return "failed it is over"
	}
	// From here on they may be frozen, whatever comes back.
	w.frozen = true
	w.alarm = time.AfterFunc(w.limit, func() {
		w.turn.Lock()
		w.expired = true
		w.turn.Unlock()
		w.thaw()
	})
	var count int32
	err := w.conn.call(context.Background(), false, func(l *libvirt.Libvirt) (err error) {
		count, err = l.DomainFsfreeze(w.dom, nil, 0)
		return err
	})
	if err != nil {
		return "failed " + plain(err)
	}
	return fmt.Sprintf("frozen %d", count)
}

// thaw thaws what a freeze left frozen, trying for as long as thawLimit, and says whether it was still frozen by us.
func (w *watchdog) thaw() bool {
	w.turn.Lock()
	defer w.turn.Unlock()
	w.over = true
	if !w.frozen {
		return false
	}
	w.alarm.Stop()
	for until := time.Now().Add(thawLimit); time.Now().Before(until); time.Sleep(thawAgain) {
		var count int32
		err := w.conn.ask(context.Background(), func(l *libvirt.Libvirt) (err error) {
			count, err = l.DomainFsthaw(w.dom, nil, 0)
			return err
		})
		// A machine that was shut off, or is gone, has nothing frozen.
		if err == nil || code(err) == libvirt.ErrOperationInvalid || code(err) == libvirt.ErrNoDomain {
			w.frozen = false
			return err == nil && count > 0 && !w.expired
		}
	}
	return false
}

// frost is a machine whose file systems are frozen, or why they are not.
type frost struct {
	held   bool // from before the job began until after it
	why    string
	lasted time.Duration

	since  time.Time
	cmd    *exec.Cmd
	say    io.WriteCloser
	hear   *bufio.Reader
	thawed bool
}

// freeze freezes the machine's file systems if it has an agent that does.
func (p *pass) freeze(ctx context.Context) *frost {
	f := &frost{}
	switch {
	case !p.m.agent:
		f.why = "no guest agent answers in it (install qemu-guest-agent there, and give the machine its channel)"
	case len(p.host.Watchdog) == 0:
		f.why = "there is no watchdog"
	default:
		if err := f.start(ctx, p.host.Watchdog, []string{p.conn.socket(), p.m.uuid, freezeLimit.String()}); err != nil {
			f.why = plain(err)
		}
	}
	return f
}

// start starts a watchdog and has it freeze.
func (f *frost) start(ctx context.Context, command, args []string) error {
	f.cmd = exec.Command(command[0], append(append([]string{}, command[1:]...), args...)...)
	f.cmd.Stderr = os.Stderr
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := f.cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := f.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := f.cmd.Start(); err != nil {
		f.cmd = nil
		return fmt.Errorf("start the watchdog: %w", err)
	}
	f.say, f.hear = in, bufio.NewReaderSize(out, 4096)
	// It hears of the end of its input when we end it, so it never outlives this by more than a thaw.
	if _, err := f.expect(ctx, "ready", callLimit); err != nil {
		return err
	}
	f.since = time.Now()
	if _, err := io.WriteString(f.say, "freeze\n"); err != nil {
		return fmt.Errorf("tell the watchdog to freeze: %w", err)
	}
	count, err := f.expect(ctx, "frozen", freezeAnswer)
	if err != nil {
		return err
	}
	if n, err := strconv.Atoi(count); err != nil || n < 1 {
		return errors.New("the guest agent found no file system to freeze")
	}
	f.held = true
	return nil
}

// expect waits for a line that begins with a word.
func (f *frost) expect(ctx context.Context, word string, limit time.Duration) (rest string, err error) {
	type heard struct {
		line string
		err  error
	}
	came := make(chan heard, 1)
	go func() {
		line, err := f.hear.ReadString('\n')
		came <- heard{strings.TrimSpace(line), err}
	}()
	select {
	case h := <-came:
		got, rest, _ := strings.Cut(h.line, " ")
		switch {
		case h.err != nil:
			return "", fmt.Errorf("hear from the watchdog: %w", h.err)
		case got != word:
			return "", fmt.Errorf("%s: %s", got, rest)
		}
		return rest, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	case <-time.After(limit):
		return "", fmt.Errorf("the guest agent did not answer for %s", limit)
	}
}

// thaw ends the frost; called again it does nothing. The watchdog thaws even if it is not heard.
func (f *frost) thaw() {
	if f.cmd == nil || f.thawed {
		return
	}
	f.thawed = true
	_, err := io.WriteString(f.say, "thaw\n")
	var still string
	if err == nil && f.held {
		still, err = f.expect(context.Background(), "thawed", thawLimit)
	}
	if f.held {
		f.lasted = time.Since(f.since)
	}
	if f.held && (err != nil || still != "true") {
		f.held, f.why = false, "the file systems were thawed before the backup had begun"
	}
	_ = f.say.Close()
	cmd := f.cmd
	go func() { _ = cmd.Wait() }() // it may have a freeze to wait for
}
