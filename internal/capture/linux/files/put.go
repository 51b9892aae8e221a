package files

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/fileset"
)

// Limits of putting back.
const (
	maxFolders = 1 << 20 // folders made, whose times are set at the end
	maxPlaced  = 1 << 20 // files that may get another name
	maxBeside  = 100     // names that are tried beside what is there
	putPrefix  = ".muster-restore-"
)

// What became of an entry that was put back.
const (
	PutRestored = "restored" // nothing was there
	PutReplaced = "replaced" // what was there is gone
	PutBeside   = "beside"   // what is there stays, and this lies beside it under another name
	PutThere    = "there"    // a folder that is there already
	PutFailed   = "failed"
)

// Placed is what became of one entry.
type Placed struct {
	As   string // where it lies now
	What string
	Note string // why, or what of it could not be kept
}

// Put puts entries back on a running server. Folders come before what is in them. Names are looked up one at a time in the
// folder that is held open, and links are never followed, so that whoever changes things meanwhile leads nobody astray. An
// entry is written to a file without a name, made durable, and given its name then: it is complete or absent. It is used by
// one goroutine; the fields are set before.
type Put struct {
	Top       string // folder in which the server's root lies; "" is "/"
	Overwrite bool   // also what is newer than what is put back
	Suffix    string // of the name beside what is there

	top     int
	opened  bool
	dir     int // the folder in which was put last
	dirPath string
	placed  map[string]string // of files: where they lie
	folders []fileset.Entry   // made here, by where they lie
}

// Entry puts one entry back at its path; content is that of a file, holes left out. needed says that it is only wanted for what
// follows: a folder that is there is left as it is.
func (p *Put) Entry(ctx context.Context, e *fileset.Entry, needed bool, content io.Reader) Placed {
	as, what, notes, err := p.put(ctx, e, needed, content)
	if err != nil {
		return Placed{As: e.Path, What: PutFailed, Note: err.Error()}
	}
	return Placed{As: as, What: what, Note: strings.Join(notes, "; ")}
}

func (p *Put) put(ctx context.Context, e *fileset.Entry, needed bool, content io.Reader) (as, what string, notes []string, err error) {
	if err := ctx.Err(); err != nil {
		return "", "", nil, err
	}
	if e.Path == "/" {
		return e.Path, PutThere, nil, nil
	}
	at, err := p.folder(path.Dir(e.Path))
	if err != nil {
		return "", "", nil, err
	}
	name := path.Base(e.Path)
	if e.Kind == fileset.Folder {
		what, err = p.makeFolder(at, name, e, needed)
		return e.Path, what, nil, err
	}
	t := temp{at: at, name: putPrefix + random(), fd: -1}
	defer t.drop()
	if notes, err = p.make(&t, e, content); err != nil {
		return "", "", nil, err
	}
	final, what, why, err := p.place(&t, name, e)
	if err != nil {
		return "", "", nil, err
	}
	if why != "" {
		notes = append([]string{why}, notes...)
	}
	as = path.Join(path.Dir(e.Path), final)
	if e.Kind == fileset.File && len(p.placed) < maxPlaced {
		if p.placed == nil {
			p.placed = map[string]string{}
		}
		p.placed[e.Path] = as
	}
	return as, what, notes, nil
}

func random() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// folder opens a folder, from the top down, following no link.
func (p *Put) folder(dir string) (int, error) {
	if !p.opened {
		top := p.Top
		if top == "" {
			top = "/"
		}
		fd, err := unix.Open(top, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, fmt.Errorf("open %s: %w", top, err)
		}
		p.top, p.opened, p.dir = fd, true, -1
	}
	if p.dir >= 0 && p.dirPath == dir {
		return p.dir, nil
	}
	if err := p.leave(); err != nil {
		return -1, err
	}
	fd, err := p.down(dir)
	if err != nil {
		return -1, err
	}
	p.dir, p.dirPath = fd, dir
	return fd, nil
}

func (p *Put) down(dir string) (int, error) {
	fd, err := unix.Openat(p.top, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	done := ""
	for name := range strings.SplitSeq(strings.Trim(dir, "/"), "/") {
		if name == "" {
			continue
		}
		next, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		done += "/" + name
		switch {
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return -1, fmt.Errorf("%q is a link or no folder on the server: links are not followed; name the real folder", done)
		case errors.Is(err, unix.ENOENT):
			return -1, fmt.Errorf("there is no folder %q on the server", done)
		case err != nil:
			return -1, fmt.Errorf("open folder %q: %w", done, err)
		}
		fd = next
	}
	return fd, nil
}

// leave makes durable what was put into the last folder.
func (p *Put) leave() error {
	if p.dir < 0 {
		return nil
	}
	err := unix.Fsync(p.dir)
	unix.Close(p.dir)
	p.dir = -1
	if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: a file system that cannot
		return fmt.Errorf("write out folder %q: %w", p.dirPath, err)
	}
	return nil
}

// makeFolder makes a folder that only root may enter until everything is in it.
func (p *Put) makeFolder(at int, name string, e *fileset.Entry, needed bool) (string, error) {
	err := unix.Mkdirat(at, name, 0o700)
	switch {
	case err == nil:
		if len(p.folders) >= maxFolders {
			return "", fmt.Errorf("more than %d folders are put back at once", maxFolders)
		}
		p.folders = append(p.folders, *e)
		return PutRestored, nil
	case !errors.Is(err, unix.EEXIST):
		return "", fmt.Errorf("make folder: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return "", errors.New("a folder belongs here, and something else is in its place: move it away first")
	}
	if p.Overwrite && !needed && len(p.folders) < maxFolders {
		p.folders = append(p.folders, *e)
		return PutReplaced, nil
	}
	return PutThere, nil
}

// temp is something that has no name yet that anybody looks for.
type temp struct {
	at    int
	name  string
	named bool // it lies under its own name; otherwise it has none
	fd    int  // of a file
}

func (t *temp) drop() {
	if t.fd >= 0 {
		unix.Close(t.fd)
	}
	if t.named {
		_ = unix.Unlinkat(t.at, t.name, 0) // usually it has got another name
	}
}

// make makes what an entry says, but its name.
func (p *Put) make(t *temp, e *fileset.Entry, content io.Reader) (notes []string, err error) {
	switch e.Kind {
	case fileset.File:
		return p.file(t, e, content)
	case fileset.Link:
		return nil, p.link(t, e)
	case fileset.Symlink:
		err = unix.Symlinkat(e.Target, t.at, t.name)
	case fileset.NamedPipe:
		err = unix.Mknodat(t.at, t.name, unix.S_IFIFO|0o600, 0)
	case fileset.CharDev:
		err = unix.Mknodat(t.at, t.name, unix.S_IFCHR|0o600, int(unix.Mkdev(e.Major, e.Minor)))
	case fileset.BlockDev:
		err = unix.Mknodat(t.at, t.name, unix.S_IFBLK|0o600, int(unix.Mkdev(e.Major, e.Minor)))
	default:
		err = errors.New("there is no such kind of file")
	}
	if err != nil {
		return nil, fmt.Errorf("make it: %w", err)
	}
	t.named = true
	fd, err := unix.Openat(t.at, t.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return dress(fd, e)
}

// file writes a file that has no name; where the file system cannot do that, it has one that says whose it is.
func (p *Put) file(t *temp, e *fileset.Entry, content io.Reader) (notes []string, err error) {
	t.fd, err = unix.Openat(t.at, ".", unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		t.fd, err = unix.Openat(t.at, t.name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		t.named = err == nil
	}
	if err != nil {
		t.fd = -1
		return nil, fmt.Errorf("make a file: %w", err)
	}
	runs := []fileset.Extent{{Length: e.Size}}
	if e.Sparse {
		runs = e.Data
	}
	for _, r := range runs {
		if n, err := io.Copy(&writerAt{fd: t.fd, at: r.Offset}, io.LimitReader(content, r.Length)); err != nil || n != r.Length {
			return nil, fmt.Errorf("write its content: %w", orShort(err))
		}
	}
	if err := unix.Ftruncate(t.fd, e.Size); err != nil {
		return nil, fmt.Errorf("write its content: %w", err)
	}
	if notes, err = dress(t.fd, e); err != nil {
		return nil, err
	}
	if err := unix.Fsync(t.fd); err != nil {
		return nil, fmt.Errorf("write it out: %w", err)
	}
	return notes, nil
}

func orShort(err error) error {
	if err == nil {
		return io.ErrUnexpectedEOF
	}
	return err
}

// writerAt writes a run of a file.
type writerAt struct {
	fd int
	at int64
}

func (w *writerAt) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.Pwrite(w.fd, b[done:], w.at)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return done, err
		}
		done, w.at = done+n, w.at+int64(n)
	}
	return done, nil
}

// link gives a file that was put back another name.
func (p *Put) link(t *temp, e *fileset.Entry) error {
	lies, ok := p.placed[e.Target]
	if !ok {
		return fmt.Errorf("it is another name of %q, which was not put back", e.Target)
	}
	from, err := p.down(path.Dir(lies))
	if err != nil {
		return err
	}
	defer unix.Close(from)
	if err := unix.Linkat(from, path.Base(lies), t.at, t.name, 0); err != nil {
		return fmt.Errorf("link it to %q: %w", lies, err)
	}
	t.named = true
	return nil
}

// dress gives what was made its owner, attributes, mode and times, in the order in which one does not undo another. What
// attributes cannot be kept is noted.
func dress(fd int, e *fileset.Entry) (notes []string, err error) {
	if err := unix.Fchownat(fd, "", int(e.UID), int(e.GID), unix.AT_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("give it to its owner: %w", err)
	}
	for _, a := range e.Attrs {
		if err := unix.Setxattr(through(fd), a.Name, []byte(a.Value), 0); err != nil {
			notes = append(notes, fmt.Sprintf("attribute %q could not be kept: %v", a.Name, err))
		}
	}
	if e.Kind != fileset.Symlink {
		if err := unix.Chmod(through(fd), e.Mode); err != nil {
			return nil, fmt.Errorf("set its mode: %w", err)
		}
	}
	at := unix.Timespec{Sec: e.Mtime.Sec, Nsec: int64(e.Mtime.Nsec)}
	if err := utimes(fd, at); err != nil {
		notes = append(notes, fmt.Sprintf("its time could not be kept: %v", err))
	}
	return notes, nil
}

// utimes sets the times of what a descriptor holds open, a link included.
func utimes(fd int, at unix.Timespec) error {
	err := unix.UtimesNanoAt(fd, "", []unix.Timespec{at, at}, unix.AT_EMPTY_PATH)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // before Linux 5.8
		err = unix.UtimesNanoAt(unix.AT_FDCWD, through(fd), []unix.Timespec{at, at}, 0)
	}
	return err
}

// place gives what was made its name, or one beside what is there and must stay.
func (p *Put) place(t *temp, name string, e *fileset.Entry) (final, what, why string, err error) {
	replace, why, err := p.mayReplace(t.at, name, e)
	switch {
	case err != nil:
		return "", "", "", err
	case replace:
		if err := t.name2(); err != nil {
			return "", "", "", err
		}
		if err := unix.Renameat(t.at, t.name, t.at, name); err != nil {
			return "", "", "", fmt.Errorf("put it in place: %w", err)
		}
		return name, PutReplaced, "", nil
	case why == "":
		if err = t.free(name); err == nil {
			return name, PutRestored, "", nil
		}
		if !errors.Is(err, unix.EEXIST) {
			return "", "", "", fmt.Errorf("put it in place: %w", err)
		}
		why = "something has come there meanwhile"
	}
	for n := 1; n <= maxBeside; n++ {
		suffix := p.Suffix
		if n > 1 {
			suffix += fmt.Sprintf("-%d", n)
		}
		final = name[:min(len(name), fileset.MaxName-len(suffix))] + suffix
		if err = t.free(final); err == nil {
			return final, PutBeside, why, nil
		}
		if !errors.Is(err, unix.EEXIST) {
			break
		}
	}
	return "", "", "", fmt.Errorf("put it beside what is there: %w", err)
}

// mayReplace says whether what is at a name may go. If not, why says what it is; "" if nothing is there.
func (p *Put) mayReplace(at int, name string, e *fileset.Entry) (bool, string, error) {
	var st unix.Stat_t
	err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return false, "", nil
	}
	if err != nil {
		return false, "", fmt.Errorf("look at what is there: %w", err)
	}
	kind := fileset.KindOf(st.Mode)
	want := e.Kind
	if want == fileset.Link {
		want = fileset.File
	}
	there := fileset.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}
	switch {
	case kind == fileset.Folder:
		return false, "a folder is there", nil
	case p.Overwrite:
		return true, "", nil
	case kind != want:
		return false, "something of another kind is there", nil
	case e.Mtime.Before(there):
		return false, "what is there is newer, of " + time.Unix(there.Sec, 0).UTC().Format(time.RFC3339), nil
	}
	return true, "", nil
}

// name2 gives it a name of its own, so that it can be renamed.
func (t *temp) name2() error {
	if t.named {
		return nil
	}
	if err := unix.Linkat(unix.AT_FDCWD, through(t.fd), t.at, t.name, unix.AT_SYMLINK_FOLLOW); err != nil {
		return fmt.Errorf("name it: %w", err)
	}
	t.named = true
	return nil
}

// free gives it a name at which nothing is; otherwise EEXIST.
func (t *temp) free(name string) error {
	if !t.named {
		return unix.Linkat(unix.AT_FDCWD, through(t.fd), t.at, name, unix.AT_SYMLINK_FOLLOW)
	}
	err := unix.Renameat2(t.at, t.name, t.at, name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // the file system cannot
		err = unix.Linkat(t.at, t.name, t.at, name, 0)
	}
	return err
}

// End gives folders what they are to have, the deepest first, and makes everything durable. It gives those that it could not.
func (p *Put) End() (failed []Placed) {
	if !p.opened {
		return nil
	}
	fail := func(at string, err error) {
		failed = append(failed, Placed{As: at, What: PutFailed, Note: err.Error()})
	}
	if err := p.leave(); err != nil {
		fail(p.dirPath, err)
	}
	for _, e := range slices.Backward(p.folders) {
		fd, err := p.down(e.Path)
		if err == nil {
			_, err = dress(fd, &e)
			err = errors.Join(err, ignoreInvalid(unix.Fsync(fd)))
			unix.Close(fd)
		}
		if err == nil {
			var up int
			if up, err = p.down(path.Dir(e.Path)); err == nil {
				err = ignoreInvalid(unix.Fsync(up))
				unix.Close(up)
			}
		}
		if err != nil {
			fail(e.Path, err)
		}
	}
	p.Close()
	return failed
}

// Close lets go of everything. It may be called after End.
func (p *Put) Close() {
	if !p.opened {
		return
	}
	if p.dir >= 0 {
		unix.Close(p.dir)
	}
	unix.Close(p.top)
	p.opened, p.dir = false, -1
}

func ignoreInvalid(err error) error {
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}
