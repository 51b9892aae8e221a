package linux

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/dr"
)

// ErrVoid is a freeze that did not hold until the end, or during which something wrote: what was read meanwhile is no
// image. Trying again may help.
var ErrVoid = errors.New("the disks did not stand still")

// Freeze holds the writable file systems on some disks still. Prepare makes it, Hold begins and Release ends the time in
// which they stand still. It is used once, by one goroutine.
type Freeze struct {
	open    []*Disk
	disks   []string      // kernel names of those that are block devices
	files   []os.FileInfo // of those that are files, at Hold
	systems []held
	points  []*os.File // open mount points, same order
	devices []string   // whose write counters are watched

	dog    *exec.Cmd
	to     io.WriteCloser
	from   chan string // lines of the watchdog; closed at their end
	limit  time.Duration
	since  time.Time // of the end of Hold: all stood still
	before counters
	notes  []string
	weaker dr.Consistency // what is left of consistency if a file system could not be frozen
	watch  bool           // nothing is frozen: it is only noticed whether anybody writes
}

// answerLimit is how long a watchdog may take for an answer that asks nothing of a file system.
const answerLimit = 15 * time.Second

// Prepare finds the file systems to freeze and starts a watchdog over them; command is the program and arguments that run
// Watchdog, to which the number of file systems is added. Nothing is frozen yet. With nothing to freeze there is no
// watchdog, and Hold and Release only take the time. The watchdog keeps thaw open until it has thawed, unless it is nil.
func Prepare(disks []*Disk, limit time.Duration, command []string, thaw *os.File) (*Freeze, error) {
	f := &Freeze{weaker: dr.FilesystemConsistent, limit: limit, open: disks}
	f.disks = kernelNames(disks)
	var err error
	if f.systems, err = writableOn("/", f.disks); err != nil {
		return nil, err
	}
	f.devices = counted("/", f.disks)
	for _, s := range f.systems {
		point, err := os.Open(s.Path)
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("prepare to freeze %s: %w", s.Path, err)
		}
		f.points = append(f.points, point)
	}
	if len(f.systems) == 0 {
		return f, nil
	}
	if err := f.start(command, thaw); err != nil {
		f.Close()
		return nil, fmt.Errorf("start the watchdog that thaws: %w", err)
	}
	return f, nil
}

// Watch is Prepare for disks whose file systems cannot be frozen: nothing is, and Release says whether anybody wrote to the
// disks since Hold. Where nobody did, they were as they would have been after a power cut.
func Watch(disks []*Disk) (*Freeze, error) {
	f := &Freeze{weaker: dr.CrashConsistent, open: disks, disks: kernelNames(disks), watch: true}
	f.devices = counted("/", f.disks)
	var err error
	f.systems, err = writableOn("/", f.disks)
	return f, err
}

// Writable says whether any file system on the disks could be written to.
func Writable(disks []*Disk) (bool, error) {
	systems, err := writableOn("/", kernelNames(disks))
	return len(systems) > 0, err
}

// Sync has the writable file systems on the disks write what they hold in memory.
func Sync(ctx context.Context, disks []*Disk) error {
	systems, err := writableOn("/", kernelNames(disks))
	for _, s := range systems {
		if err := ctx.Err(); err != nil {
			return err
		}
		point, err := os.Open(s.Path)
		if err == nil {
			err = errors.Join(unix.Syncfs(int(point.Fd())), point.Close())
		}
		if err != nil {
			return fmt.Errorf("sync %s: %w", s.Path, err)
		}
	}
	return err
}

func kernelNames(disks []*Disk) (names []string) {
	for _, d := range disks {
		if d.Kernel != "" {
			names = append(names, d.Kernel)
		}
	}
	return names
}

// Needed says whether anything has to be frozen.
func (f *Freeze) Needed() bool { return len(f.systems) > 0 && !f.watch }

func (f *Freeze) start(command []string, thaw *os.File) error {
	f.dog = exec.Command(command[0], append(slices.Clone(command[1:]), strconv.Itoa(len(f.points)))...)
	f.dog.ExtraFiles = slices.Clone(f.points)
	if thaw != nil {
		f.dog.ExtraFiles = append(f.dog.ExtraFiles, thaw)
	}
	f.dog.Stderr = os.Stderr
	f.dog.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	f.dog.Dir = "/"
	var err error
	if f.to, err = f.dog.StdinPipe(); err != nil {
		return err
	}
	out, err := f.dog.StdoutPipe()
	if err != nil {
		return err
	}
	if err := f.dog.Start(); err != nil {
		f.dog = nil
		return err
	}
	f.from = make(chan string, 8) // more than it ever says, so that nobody has to listen
	go func() {
		defer close(f.from)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			f.from <- lines.Text()
		}
	}()
	_, err = f.answer("ready")
	return err
}

// Sync writes what the file systems hold in memory, so that freezing them takes less time.
func (f *Freeze) Sync(ctx context.Context) error {
	for i, p := range f.points {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := unix.Syncfs(int(p.Fd())); err != nil {
			return fmt.Errorf("sync %s: %w", f.systems[i].Path, err)
		}
	}
	return nil
}

// Hold freezes. On an error everything is thawed.
func (f *Freeze) Hold() error {
	if f.Needed() {
		_, err := f.ask("arm "+strconv.FormatInt(int64(f.limit), 10), "armed")
		o := outcome{}
		if err == nil {
			o, err = f.ask("freeze", "frozen")
		}
		if err != nil {
			f.thawOurselves()
			return fmt.Errorf("freeze: %w: %w", ErrVoid, err)
		}
		if err := f.judge(o); err != nil {
			return err
		}
	}
	var err error
	if f.files, err = f.stat(); err != nil {
		return err
	}
	f.since = time.Now()
	f.before = readCounters("/", f.devices)
	return nil
}

// judge says what an attempt to freeze came to.
func (f *Freeze) judge(o outcome) error {
	if o.Failed >= 0 && o.Failed < len(f.systems) {
		path := f.systems[o.Failed].Path
		if o.Busy {
			return fmt.Errorf("freeze %s: %w: another program has frozen it already; see what it is (fsfreeze, a backup or virtualization agent) and try again", path, ErrVoid)
		}
		return fmt.Errorf("freeze %s: %s", path, o.Error)
	}
	if o.Expired {
		return fmt.Errorf("freeze: the file systems took longer than the limit to stand still: %w", ErrVoid)
	}
	for _, i := range o.Unsupported {
		if i < 0 || i >= len(f.systems) {
			continue
		}
		s := f.systems[i]
		f.notes = append(f.notes, fmt.Sprintf("%s (%s) cannot be frozen: it was synced, and nothing was written to its disk while it was read", s.Path, s.Type))
		if s.Type != "vfat" && s.Type != "msdos" {
			f.weaker = dr.CrashConsistent
		}
	}
	return nil
}

// Held says what a freeze that held was worth.
type Held struct {
	Since       time.Time // the instant that the disks show
	Frozen      time.Duration
	Consistency dr.Consistency
	Notes       []string
}

// Release thaws and says whether the disks really stood still since Hold: the watchdog did not have to thaw, nothing was
// written below the file systems, and none was mounted meanwhile. Otherwise the error is ErrVoid.
func (f *Freeze) Release() (Held, error) {
	after := readCounters("/", f.devices)
	h := Held{Since: f.since, Consistency: f.weaker, Notes: f.notes}
	if f.Needed() {
		o, err := f.ask("thaw", "thawed")
		if err != nil {
			f.thawOurselves()
			return Held{}, fmt.Errorf("thaw: %w: %w", ErrVoid, err)
		}
		if h.Frozen = o.Frozen; o.Expired {
			return Held{}, fmt.Errorf("the watchdog thawed after %s, before everything was read: %w", o.Frozen.Round(time.Millisecond), ErrVoid)
		}
	}
	if err := f.before.disturbed(after); err != nil && f.watch {
		return Held{}, fmt.Errorf("%w: %w", ErrVoid, err)
	} else if err != nil {
		return Held{}, fmt.Errorf("%w: %w while all file systems on it stood still: something writes to it directly", ErrVoid, err)
	}
	if err := f.unchanged(); err != nil {
		return Held{}, err
	}
	if !f.Needed() {
		// Nothing could write through a file system, so the content is what the last unmount left.
		h.Consistency = dr.CrashConsistent
	}
	return h, nil
}

// unchanged says whether the same file systems are mounted as before, and the disks that are files have not changed.
func (f *Freeze) unchanged() error {
	now, err := writableOn("/", f.disks)
	if err != nil {
		return err
	}
	for _, s := range now {
		if !slices.ContainsFunc(f.systems, func(o held) bool { return o.Dev == s.Dev }) {
			return fmt.Errorf("%s was mounted while the disks were read: %w", s.Path, ErrVoid)
		}
	}
	files, err := f.stat()
	if err != nil {
		return err
	}
	for i, before := range f.files {
		if before.Size() != files[i].Size() || !before.ModTime().Equal(files[i].ModTime()) {
			return fmt.Errorf("%s was written to while it was read: %w", before.Name(), ErrVoid)
		}
	}
	return nil
}

// stat looks at the disks that are files.
func (f *Freeze) stat() ([]os.FileInfo, error) {
	var out []os.FileInfo
	for _, d := range f.open {
		if d.Kernel != "" {
			continue
		}
		info, err := d.file.Stat()
		if err != nil {
			return nil, fmt.Errorf("look at disk %s: %w", d.Name, err)
		}
		out = append(out, info)
	}
	return out, nil
}

// ask sends a command to the watchdog and waits for its answer.
func (f *Freeze) ask(command, word string) (outcome, error) {
	if _, err := io.WriteString(f.to, command+"\n"); err != nil {
		return outcome{}, fmt.Errorf("the watchdog is gone: %w", err)
	}
	return f.answer(word)
}

// answer waits for an answer. A watchdog that gives none in time hangs in a freeze; it is left alone, because it thaws as
// soon as the kernel lets go of it.
func (f *Freeze) answer(word string) (outcome, error) {
	limit := time.NewTimer(f.limit + answerLimit)
	defer limit.Stop()
	select {
	case <-limit.C:
		return outcome{}, fmt.Errorf("the watchdog hangs: a file system does not come to a stop: %w", ErrVoid)
	case line, ok := <-f.from:
		got, body, _ := strings.Cut(line, " ")
		o := outcome{Failed: -1}
		if !ok {
			return outcome{}, errors.New("the watchdog ended without an answer")
		}
		if err := json.Unmarshal([]byte(body), &o); err != nil || got != word {
			return outcome{}, fmt.Errorf("the watchdog answered %q instead of %q", line, word)
		}
		return o, nil
	}
}

// thawOurselves is for a watchdog that was killed. What is not frozen answers with an error that means nothing.
func (f *Freeze) thawOurselves() {
	for i := len(f.points) - 1; i >= 0; i-- {
		_ = mountPoint{fd: int(f.points[i].Fd())}.thaw()
	}
}

// Close thaws whatever is still frozen and ends the watchdog.
func (f *Freeze) Close() error {
	var err error
	if f.dog != nil {
		f.to.Close()
		ended := make(chan error, 1)
		go func() { ended <- f.dog.Wait() }()
		select {
		case err = <-ended:
		case <-time.After(answerLimit):
			err = errors.New("end the watchdog: it hangs in a freeze and will thaw when it gets through")
		}
	}
	for _, p := range f.points {
		p.Close()
	}
	return err
}
