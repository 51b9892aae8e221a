package guestfish

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of the conversation with guestfish.
const (
	maxLine      = 8000    // bytes of one command: guestfish splits lines at 8192
	maxAnswer    = 4 << 20 // bytes of one answer
	maxComplaint = 64 << 10
	stderrPipe   = 1 << 20 // room for complaints that are only read after the mark
	quitLimit    = 30 * time.Second
)

// Fish is a running guestfish, used by one goroutine.
type Fish struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *os.File // read with deadlines
	stderr int      // non-blocking file descriptor
	broken error    // why no more commands can be given
}

// start starts guestfish in a folder, without launching the appliance. env is its whole environment.
func start(env []string, dir string) (*Fish, error) {
	path, err := exec.LookPath("guestfish")
	if err != nil {
		return nil, fmt.Errorf("start libguestfs: %w", err)
	}
	cmd := exec.Command(path)
	cmd.Env = env
	cmd.Dir = dir
	// A group of its own, so that a kill also reaches the emulator below it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var errPipe [2]int
	if err := unix.Pipe2(errPipe[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("start guestfish: %w", err)
	}
	if err := unix.SetNonblock(errPipe[0], true); err != nil {
		return nil, fmt.Errorf("start guestfish: %w", err)
	}
	_, _ = unix.FcntlInt(uintptr(errPipe[1]), unix.F_SETPIPE_SZ, stderrPipe) // smaller only fills up earlier
	errWrite := os.NewFile(uintptr(errPipe[1]), "stderr")
	defer errWrite.Close()
	outRead, outWrite, err := os.Pipe()
	if err != nil {
		unix.Close(errPipe[0])
		return nil, fmt.Errorf("start guestfish: %w", err)
	}
	defer outWrite.Close()
	cmd.Stdout, cmd.Stderr = outWrite, errWrite
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		unix.Close(errPipe[0])
		outRead.Close()
		return nil, fmt.Errorf("start guestfish: %w", err)
	}
	return &Fish{cmd: cmd, stdin: stdin, stdout: outRead, stderr: errPipe[0]}, nil
}

// Do gives one command with its arguments and returns what it answered. Arguments are quoted; the
// command's name is a constant of the caller's.
func (f *Fish) Do(ctx context.Context, command string, args ...string) ([]byte, error) {
	if f.broken != nil {
		return nil, f.broken
	}
	var line strings.Builder
	line.WriteString("-" + command)
	for _, a := range args {
		quoted, err := quote(a)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", command, err)
		}
		line.WriteString(" " + quoted)
	}
	if line.Len() > maxLine {
		return nil, fmt.Errorf("%s: the names are too long for guestfish", command)
	}
	var word [16]byte
	if _, err := rand.Read(word[:]); err != nil {
		return nil, err
	}
	mark := "muster-" + hex.EncodeToString(word[:])
	if _, err := fmt.Fprintf(f.stdin, "%s\necho %s\n", line.String(), mark); err != nil {
		return nil, f.breaks(ctx, command, err)
	}
	answer, err := f.readTo(ctx, []byte(mark+"\n"))
	if err != nil {
		return nil, f.breaks(ctx, command, err)
	}
	if said := f.complaints(); said != "" {
		return nil, complaint(command, said)
	}
	return answer, nil
}

// readTo reads standard output up to the mark.
func (f *Fish) readTo(ctx context.Context, mark []byte) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { _ = f.stdout.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var answer []byte
	buf := make([]byte, 64<<10)
	for {
		n, err := f.stdout.Read(buf)
		answer = append(answer, buf[:n]...)
		if bytes.HasSuffix(answer, mark) {
			return answer[:len(answer)-len(mark)], nil
		}
		if err != nil {
			return nil, err
		}
		if len(answer) > maxAnswer {
			return nil, fmt.Errorf("the answer is %w of %d bytes", ErrTooLarge, maxAnswer)
		}
	}
}

// complaints gives what has been written to standard error by now. guestfish has written its complaint about a command
// before it echoes the mark, so after the mark the complaint is in the pipe.
func (f *Fish) complaints() string {
	var said []byte
	buf := make([]byte, 16<<10)
	for {
		n, err := unix.Read(f.stderr, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n <= 0 || err != nil {
			break
		}
		if len(said) < maxComplaint {
			said = append(said, buf[:n]...)
		}
	}
	return strings.TrimSpace(string(said))
}

// Broken is why no more commands can be given; nil while they can.
func (f *Fish) Broken() error { return f.broken }

// breaks ends the conversation for good.
func (f *Fish) breaks(ctx context.Context, command string, cause error) error {
	f.Kill()
	said := f.complaints()
	switch {
	case ctx.Err() != nil:
		f.broken = fmt.Errorf("%s: %w", command, context.Cause(ctx))
	case said != "":
		f.broken = complaint(command, said)
	default:
		f.broken = fmt.Errorf("%s: guestfish ended: %w", command, cause)
	}
	return f.broken
}

// Quit ends guestfish and with it the appliance, politely first.
func (f *Fish) Quit() {
	_ = f.stdin.Close()
	timer := time.AfterFunc(quitLimit, f.Kill)
	_ = f.cmd.Wait()
	timer.Stop()
	f.close()
}

// Kill ends guestfish and the emulator at once. Quit has to be called all the same.
func (f *Fish) Kill() {
	if f.cmd.Process != nil {
		_ = syscall.Kill(-f.cmd.Process.Pid, syscall.SIGKILL)
	}
}

func (f *Fish) close() {
	_ = f.stdout.Close()
	if f.stderr >= 0 {
		unix.Close(f.stderr)
		f.stderr = -1
	}
	if f.broken == nil {
		f.broken = errors.New("the guest is closed")
	}
}

// quote writes a string as guestfish reads it back, byte for byte.
func quote(s string) (string, error) {
	var b strings.Builder
	b.WriteByte('"')
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == 0:
			return "", errors.New("a name holds a zero byte")
		case c < ' ', c > '~', c == '"', c == '\\':
			fmt.Fprintf(&b, `\x%02x`, c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteByte('"')
	return b.String(), nil
}

// complaint turns what guestfish wrote to standard error into an error.
func complaint(command, said string) error {
	text := said
	if i := strings.Index(text, "libguestfs: error: "); i >= 0 {
		text = text[i+len("libguestfs: error: "):]
	}
	if i := strings.IndexByte(text, '\n'); i >= 0 {
		text = text[:i]
	}
	if len(text) > 400 {
		text = text[:400] + "…"
	}
	text = strings.ToValidUTF8(text, "?")
	switch {
	case strings.Contains(said, "failed to find a suitable kernel"):
		return errors.New("start the libguestfs appliance: there is no kernel in /boot that it can read: install linux-image-cloud-amd64, " +
			"or make /boot/vmlinuz-* readable")
	case strings.HasSuffix(said, ": No such file or directory"), strings.HasSuffix(said, ": Not a directory"),
		strings.HasSuffix(said, ": Too many levels of symbolic links"):
		// The end of the whole complaint: a name in it may hold line ends.
		return fmt.Errorf("%s: %w", text, fs.ErrNotExist)
	}
	return fmt.Errorf("%s: %s", command, text)
}
