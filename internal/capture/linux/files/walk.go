// Package files reads folders of a running server file by file: everything that Linux keeps of each, and the content of those
// that changed. It also puts files back.
//
//	Walk     one reading of a file set, in fileset.Compare's order
//	Known    what is known of one name from the last time
//	Out      where what is found goes
//	Put      one putting back of files, each complete or absent
//
// Names are looked up in the folder that is held open, one at a time, and links are never followed: whoever renames, deletes
// or swaps things meanwhile makes entries be missed or read again, but leads nobody out of the file set. What is opened is
// looked at before it is opened for reading, so that no device is touched and no pipe waited for.
//
// A file is unchanged if its fileset.Identity is: device, inode, size, times and owner. A write through a mapping that was
// begun before the last reading may come to light only when the kernel writes it out; so may one on a file system that keeps
// no times.
//
// Knows: Linux' files.
// Must not know: who asks, how it travels, where it is kept.
package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/fileset"
)

// Limits of a walk.
const (
	MaxPiece  = 1 << 20 // bytes of content given at once
	maxNames  = 2 << 20 // in one folder
	maxLinks  = 1 << 20 // files with several names
	maxTries  = 3       // of reading a file that is written to meanwhile
	maxNotes  = 8       // of one kind; more are counted
	maxSwaps  = 3       // a name that becomes something else each time it is opened
	DefSettle = 3 * time.Second
)

// Known is what is known of one name from the last time.
type Known struct {
	Path     string
	Identity fileset.Identity
}

// Out takes what is found. Same and Gone count names of what is known, in its order; what is neither is there anew or has
// changed. The pieces of a file's content, holes left out, come before its entry.
type Out interface {
	Same(count int64) error
	Gone(count int64) error
	Piece(data []byte) error
	// Again says that the pieces since the last entry are void.
	Again() error
	Entry(e *fileset.Entry) error
}

// Walk is one reading of a file set. The fields are set before Run.
type Walk struct {
	Top    string // folder in which the server's root lies; "" is "/"
	Set    fileset.Set
	Settle time.Duration // how old a change must be before the times of a file are trusted to tell the next; 0: DefSettle
	// Known gives what is known, in fileset.Compare's order; false at its end.
	Known func() (Known, bool, error)
	Out   Out

	// Opened, if set, is called when something has been looked at and is about to be opened. Tests change it then.
	Opened func(path string)

	Read    int64 // bytes of content that were read, those that were read again included
	Entries int64
	Files   int64 // whose content was read

	ctx     context.Context
	next    Known
	more    bool
	same    int64
	gone    int64
	links   map[inode]string
	sockets int64
	notes   map[note]*noted
	buf     []byte
}

// inode names a file while it lives: a number that is given anew comes with another time of birth.
type inode struct {
	dev, ino uint64
	born     fileset.Time
}

type note string

type noted struct {
	paths []string
	count int64
}

// Things an operator may want to know.
const (
	noteUnstable note = "was written to each time it was read and is kept as it was last seen"
	noteEdge     note = "is another file system that is not on a local disk, and is left out"
	noteLong     note = "has a path that is too long, and is left out"
	noteAttrs    note = "has attributes that are too many or too long, which are left out"
	noteSwapped  note = "became something else each time it was opened, and is left out"
	noteLinks    note = "is kept as a file of its own: there are too many files with several names"
)

// Run walks. An error names what cannot be read; what it gave by then is worth nothing.
func (w *Walk) Run(ctx context.Context) error {
	if err := w.Set.Validate(); err != nil {
		return err
	}
	w.ctx, w.links, w.notes, w.buf = ctx, map[inode]string{}, map[note]*noted{}, make([]byte, MaxPiece)
	if w.Settle == 0 {
		w.Settle = DefSettle
	}
	if err := w.advance(); err != nil {
		return err
	}
	roots := slices.Clone(w.Set.Roots)
	slices.SortFunc(roots, fileset.Compare)
	for _, root := range roots {
		if err := w.root(root); err != nil {
			return fmt.Errorf("read %s: %w", root, err)
		}
	}
	for w.more {
		w.gone++
		if err := w.advance(); err != nil {
			return err
		}
	}
	return w.flush()
}

// Notes gives what an operator may want to know of the walk.
func (w *Walk) Notes() (out []string) {
	for _, kind := range []note{noteUnstable, noteEdge, noteLong, noteAttrs, noteSwapped, noteLinks} {
		n := w.notes[kind]
		if n == nil {
			continue
		}
		for _, p := range n.paths {
			out = append(out, fmt.Sprintf("%q %s", p, kind))
		}
		if more := n.count - int64(len(n.paths)); more > 0 {
			out = append(out, fmt.Sprintf("and %d more of which each %s", more, kind))
		}
	}
	if w.sockets > 0 {
		out = append(out, fmt.Sprintf("%d sockets are left out: programs make them anew", w.sockets))
	}
	return out
}

func (w *Walk) note(kind note, path string) {
	n := w.notes[kind]
	if n == nil {
		n = &noted{}
		w.notes[kind] = n
	}
	if n.count++; len(n.paths) < maxNotes {
		n.paths = append(n.paths, path)
	}
}

// advance takes the next of what is known.
func (w *Walk) advance() (err error) {
	w.next, w.more, err = w.Known()
	return err
}

// flush says what was counted.
func (w *Walk) flush() error {
	for w.same > 0 || w.gone > 0 {
		var err error
		if w.same > 0 {
			err, w.same = w.Out.Same(w.same), 0
		} else {
			err, w.gone = w.Out.Gone(w.gone), 0
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// known says whether a name is known just so. What is known of names before it is gone.
func (w *Walk) known(e *fileset.Entry) (bool, error) {
	for w.more {
		order := fileset.Compare(w.next.Path, e.Path)
		if order > 0 {
			return false, nil
		}
		same := order == 0 && w.next.Identity != fileset.Identity{} && w.next.Identity == e.Identity()
		switch {
		case same && w.gone > 0, order < 0 && w.same > 0:
			if err := w.flush(); err != nil {
				return false, err
			}
		}
		switch {
		case same:
			w.same++
		case order < 0:
			w.gone++
		}
		if order == 0 && !same {
			return false, nil // emit takes it, or, if the name vanishes first, whatever comes next counts it as gone
		}
		if err := w.advance(); err != nil || order == 0 {
			return same, err
		}
	}
	return false, nil
}

// emit gives an entry that is new or changed.
func (w *Walk) emit(e *fileset.Entry) error {
	if err := w.flush(); err != nil {
		return err
	}
	if w.more && w.next.Path == e.Path {
		if err := w.advance(); err != nil {
			return err
		}
	}
	return w.Out.Entry(e)
}

// root opens a root, name by name so that no link leads elsewhere, and walks it.
func (w *Walk) root(root string) error {
	top := w.Top
	if top == "" {
		top = "/"
	}
	fd, err := unix.Open(top, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(root[1:], "/") {
		below, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		switch {
		case errors.Is(err, unix.ENOENT):
			return errors.New("there is no such folder: is a file system not mounted? name another with --data, or make it")
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return fmt.Errorf("%s in it is a link or no folder: name the folder where it leads", name)
		case err != nil:
			return err
		}
		fd = below
	}
	at, err := unix.Openat(fd, ".", openFolder, 0)
	unix.Close(fd)
	if err != nil {
		return err
	}
	folder := os.NewFile(uintptr(at), root)
	defer folder.Close()
	st, err := look(at, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	e := w.entry(root, fileset.Folder, &st)
	return w.folder(folder, e, &st)
}

const openFolder = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// look asks the kernel for what it keeps of a name.
func look(at int, name string, flags int) (st unix.Statx_t, err error) {
	for {
		err = unix.Statx(at, name, flags|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st)
		if !errors.Is(err, unix.EINTR) {
			return st, err
		}
	}
}

func device(st *unix.Statx_t) uint64 { return unix.Mkdev(st.Dev_major, st.Dev_minor) }

func instant(t unix.StatxTimestamp) fileset.Time { return fileset.Time{Sec: t.Sec, Nsec: t.Nsec} }

// entry describes a name by what the kernel keeps of it, without its attributes, target and holes.
func (w *Walk) entry(path string, kind fileset.Kind, st *unix.Statx_t) *fileset.Entry {
	e := &fileset.Entry{Kind: kind, Path: path, Mode: uint32(st.Mode) & 0o7777, UID: st.Uid, GID: st.Gid, Mtime: instant(st.Mtime),
		Ctime: instant(st.Ctime), Dev: device(st), Inode: st.Ino}
	switch kind {
	case fileset.File:
		e.Size = int64(min(st.Size, fileset.MaxSize))
	case fileset.CharDev, fileset.BlockDev:
		e.Major, e.Minor = st.Rdev_major, st.Rdev_minor
	}
	return e
}

// recent notes whether a change so soon after the last one might leave the times as they are.
func (w *Walk) recent(e *fileset.Entry) {
	settled := time.Now().Add(-w.Settle)
	e.Recent = !e.Ctime.Before(fileset.Time{Sec: settled.Unix(), Nsec: uint32(settled.Nanosecond())})
}

// folder gives a folder that is open and walks what is in it.
func (w *Walk) folder(f *os.File, e *fileset.Entry, st *unix.Statx_t) error {
	w.Entries++
	same, err := w.known(e)
	if err != nil {
		return err
	}
	if !same {
		w.recent(e)
		if err := w.attrs(int(f.Fd()), e); err != nil {
			return err
		}
		if err := w.emit(e); err != nil {
			return err
		}
	}
	if e.Edge {
		return nil
	}
	names, err := list(f)
	if err != nil {
		return fmt.Errorf("list %q: %w", e.Path, err)
	}
	for _, name := range names {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		path := e.Path + "/" + name
		switch {
		case w.Set.Excluded(path):
			continue
		case len(path) > fileset.MaxPath:
			w.note(noteLong, path)
			continue
		}
		if err := w.child(int(f.Fd()), name, path, device(st)); err != nil {
			return err
		}
	}
	return nil
}

// list gives the names in a folder, sorted by their bytes.
func list(f *os.File) (names []string, err error) {
	for {
		some, err := f.Readdirnames(4096)
		names = append(names, some...)
		if len(names) > maxNames {
			return nil, fmt.Errorf("it has more than %d names: leave it out with --exclude", maxNames)
		}
		if len(some) == 0 {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			slices.Sort(names)
			return names, nil
		}
	}
}

// errSwapped is a name that is something else than it was a moment ago.
var errSwapped = errors.New("it became something else")

// child looks at a name and gives it, again if it becomes something else meanwhile.
func (w *Walk) child(at int, name, path string, dev uint64) error {
	for range maxSwaps {
		st, err := look(at, name, 0)
		if gone(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look at %q: %w", path, err)
		}
		switch err := w.one(at, name, path, &st, dev); {
		case gone(err):
			return nil
		case errors.Is(err, errSwapped):
			continue
		default:
			return err
		}
	}
	w.note(noteSwapped, path)
	return nil
}

// gone says whether a name was deleted meanwhile.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) }

// one gives one name.
func (w *Walk) one(at int, name, path string, st *unix.Statx_t, dev uint64) error {
	kind := fileset.KindOf(uint32(st.Mode))
	switch {
	case kind == 0:
		w.sockets++
		return nil
	case kind == fileset.Folder:
		return w.enter(at, name, path, st, dev)
	}
	e := w.entry(path, kind, st)
	key := inode{dev: device(st), ino: st.Ino, born: instant(st.Btime)}
	several := kind == fileset.File && st.Nlink > 1
	if first, ok := w.links[key]; several && ok {
		e.Kind, e.Target, e.Size = fileset.Link, first, 0
	}
	same, err := w.known(e)
	if err != nil {
		return err
	}
	if !same {
		if e, err = w.changed(at, name, e, st); err != nil {
			return err
		}
	}
	w.Entries++
	if several && e.Kind == fileset.File {
		if len(w.links) < maxLinks {
			w.links[key] = path
		} else {
			w.note(noteLinks, path)
		}
	}
	return nil
}

// enter opens a folder and walks it.
func (w *Walk) enter(at int, name, path string, st *unix.Statx_t, dev uint64) error {
	w.opening(path)
	fd, err := unix.Openat(at, name, openFolder|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		fd, err = unix.Openat(at, name, openFolder, 0)
	}
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return errSwapped
	case gone(err):
		return err
	case err != nil:
		return fmt.Errorf("open %q: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	now, err := look(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("look at %q: %w", path, err)
	}
	e := w.entry(path, fileset.Folder, &now)
	if device(&now) != dev {
		var fs unix.Statfs_t
		if err := unix.Fstatfs(fd, &fs); err != nil {
			return fmt.Errorf("look at %q: %w", path, err)
		}
		if !onLocalDisk[fs.Type] {
			e.Edge = true
			w.note(noteEdge, path)
		}
	}
	err = w.folder(f, e, &now)
	if gone(err) { // it was given already: that something of it is missing now is not that it was never there
		return fmt.Errorf("read %q: part of it vanished: %s", path, err.Error())
	}
	return err
}

func (w *Walk) opening(path string) {
	if w.Opened != nil {
		w.Opened(path)
	}
}

// onLocalDisk has the file systems that keep their files on a disk of this server. All others are entered only if they are
// named: networks, what the kernel makes up, memory, and layers over others.
var onLocalDisk = map[int64]bool{
	unix.EXT4_SUPER_MAGIC: true, unix.XFS_SUPER_MAGIC: true, unix.BTRFS_SUPER_MAGIC: true, unix.F2FS_SUPER_MAGIC: true,
	unix.REISERFS_SUPER_MAGIC: true, unix.MSDOS_SUPER_MAGIC: true, unix.ISOFS_SUPER_MAGIC: true, unix.UDF_SUPER_MAGIC: true,
	0x2fc12fc1: true /* ZFS */, 0x3153464a: true /* JFS */, 0xca451a4e: true /* bcachefs */, 0x2011bab0: true, /* exFAT */
	0x7366746e: true /* NTFS3 */, 0x5346544e: true /* NTFS */, 0x3434: true, /* NILFS */
}
