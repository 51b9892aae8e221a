package guestfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/prerecover"
)

// unpackLimit is how long unpacking may take.
const unpackLimit = 12 * time.Hour

// room for the command's name and its first argument in a line of names.
const lineRoom = 64

// Walk implements prerecover.Guest. The names come in one piece, the rest folder by folder. A name that fits into no line of
// guestfish's has nothing but its path.
func (g *guest) Walk(ctx context.Context, folder string) ([]fileset.Entry, error) {
	host := filepath.Join(g.work, "walk")
	if _, err := g.do(ctx, "find0", folder, host); err != nil {
		return nil, err
	}
	raw, err := readHost(host, prerecover.MaxWalk)
	if err != nil {
		return nil, fmt.Errorf("walk: %w", err)
	}
	out := []fileset.Entry{{Path: folder}}
	for name := range bytes.SplitSeq(bytes.TrimSuffix(raw, []byte{0}), []byte{0}) {
		name = bytes.TrimPrefix(name, []byte("/"))
		if path := folder + "/" + string(name); len(name) > 0 && len(path) <= fileset.MaxPath {
			out = append(out, fileset.Entry{Path: path})
		}
	}
	slices.SortFunc(out, func(a, b fileset.Entry) int { return fileset.Compare(a.Path, b.Path) })
	out = slices.CompactFunc(out, func(a, b fileset.Entry) bool { return a.Path == b.Path })
	inside := map[string][]*fileset.Entry{} // by folder: one is asked about at a time
	for i := range out {
		dir, name := filepath.Split(out[i].Path)
		if strings.Contains(name, "'") || i == 0 { // a list cannot hold it
			if err := g.statOne(ctx, &out[i]); err != nil {
				return nil, fmt.Errorf("walk: %w", err)
			}
			continue
		}
		inside[dir] = append(inside[dir], &out[i])
	}
	for dir, entries := range inside {
		if err := g.statSome(ctx, dir, entries); err != nil {
			return nil, fmt.Errorf("walk: %w", err)
		}
	}
	return out, nil
}

// statOne asks for one path. One that cannot be asked for stays as it is.
func (g *guest) statOne(ctx context.Context, e *fileset.Entry) error {
	answer, err := g.do(ctx, "lstatns", e.Path)
	if err == nil {
		err = fillAll([]*fileset.Entry{e}, "[0] = {\n"+string(answer))
	}
	if g.fish.broken != nil {
		return err
	}
	return nil
}

// statSome asks for names in one folder, as many at once as a line holds.
func (g *guest) statSome(ctx context.Context, dir string, entries []*fileset.Entry) error {
	room := maxLine - lineRoom - quotedLen(dir)
	for len(entries) > 0 {
		var words strings.Builder
		n, length := 0, 0
		for ; n < len(entries); n++ {
			word := "'" + filepath.Base(entries[n].Path) + "' "
			if length += quotedLen(word); length > room {
				break
			}
			words.WriteString(word)
		}
		if n == 0 { // so deep that no line holds it
			entries = entries[1:]
			continue
		}
		answer, err := g.do(ctx, "lstatnslist", dir, words.String())
		if err != nil {
			return err
		}
		if err := fillAll(entries[:n], string(answer)); err != nil {
			return err
		}
		entries = entries[n:]
	}
	return nil
}

// quotedLen is how long a string becomes when it is quoted.
func quotedLen(s string) int {
	q, err := quote(s)
	if err != nil {
		return maxLine
	}
	return len(q)
}

// fillAll reads a list of stats into as many entries.
func fillAll(entries []*fileset.Entry, answer string) error {
	n := -1
	field := map[string]int64{}
	flush := func() {
		if n >= 0 && n < len(entries) && field["st_ino"] > 0 { // a name that vanished has -1
			fill(entries[n], field)
		}
		clear(field)
	}
	for line := range strings.Lines(answer) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			flush()
			n++
			continue
		}
		if key, value, ok := strings.Cut(line, ": "); ok {
			if v, err := strconv.ParseInt(value, 10, 64); err == nil {
				field[key] = v
			}
		}
	}
	flush()
	if n+1 != len(entries) {
		return fmt.Errorf("%d names were asked about and %d answered", len(entries), n+1)
	}
	return nil
}

// fill turns the fields of a stat into an entry.
func fill(e *fileset.Entry, field map[string]int64) {
	mode := field["st_mode"]
	e.Kind = map[int64]fileset.Kind{unix.S_IFREG: fileset.File, unix.S_IFDIR: fileset.Folder, unix.S_IFLNK: fileset.Symlink, unix.S_IFCHR: fileset.CharDev,
		unix.S_IFBLK: fileset.BlockDev, unix.S_IFIFO: fileset.NamedPipe}[mode&unix.S_IFMT]
	e.Mode, e.UID, e.GID = uint32(mode&0o7777), uint32(field["st_uid"]), uint32(field["st_gid"])
	e.Inode = uint64(field["st_ino"])
	e.Mtime = fileset.Time{Sec: field["st_mtime_sec"], Nsec: uint32(field["st_mtime_nsec"])}
	e.Ctime = fileset.Time{Sec: field["st_ctime_sec"], Nsec: uint32(field["st_ctime_nsec"])}
	if e.Kind == fileset.File {
		// What it takes is what its removal gives back.
		e.Size = field["st_size"]
		if taken := field["st_blocks"] * 512; taken < e.Size {
			e.Sparse = true
			if taken > 0 {
				e.Data = []fileset.Extent{{Length: taken}}
			}
		}
	}
}

// RemoveAll implements prerecover.Guest.
func (g *guest) RemoveAll(ctx context.Context, path string) error {
	if !strings.HasPrefix(path, "/") || path == "/" || len(path) > fileset.MaxPath {
		return fmt.Errorf("remove %.80q: use an absolute path", path)
	}
	_, err := g.do(ctx, "rm-rf", path)
	return err
}

// Unpack implements prerecover.Guest. The stream reaches guestfish through a named pipe, so that it lies nowhere.
func (g *guest) Unpack(ctx context.Context, tar io.Reader) error {
	began := time.Now()
	defer func() { g.deadline = g.deadline.Add(time.Since(began)) }()
	ctx, cancel := context.WithTimeout(ctx, unpackLimit)
	defer cancel()
	pipe := filepath.Join(g.work, "tar")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	defer os.Remove(pipe)
	fed := make(chan error, 1)
	go func() { fed <- feed(pipe, tar) }()
	// Labels and access lists are attributes in the stream. Asked for access lists, tar would take them from elsewhere, find
	// none, and remove those that it has just set.
	_, err := g.fish.do(ctx, "tar-in", pipe, "/", "xattrs:true")
	// If guestfish never opened the pipe, or stopped reading it, whoever feeds it must not wait for ever.
	if f, oerr := os.OpenFile(pipe, os.O_RDONLY|syscall.O_NONBLOCK, 0); oerr == nil {
		f.Close()
	}
	ferr := <-fed
	switch {
	case err != nil && ferr != nil && !errors.Is(ferr, syscall.EPIPE):
		return fmt.Errorf("unpack: %w", errors.Join(ferr, err)) // what it was fed was cut off
	case err != nil:
		return fmt.Errorf("unpack: %w", err)
	case ferr != nil:
		return fmt.Errorf("unpack: %w", ferr)
	}
	return nil
}

// feed writes a stream into a named pipe.
func feed(pipe string, from io.Reader) error {
	f, err := os.OpenFile(pipe, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	return errors.Join(err, f.Close())
}
