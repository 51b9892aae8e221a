package guestfish

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/fileset"
)

// lineRoom is room for a command's name and its first argument in a line of names.
const lineRoom = 64

// Walk gives a folder and everything below it in fileset.Compare's order, as entries that have what can be told without
// reading a file: kind, path, mode, owner, size, mtime, ctime, device and inode. Links are not followed, mounted file systems
// are entered. A name that cannot be asked about has nothing but its path. scratch is a path of the host's at which a file
// may be made. More than limit bytes of names are ErrTooLarge.
func (f *Fish) Walk(ctx context.Context, folder, scratch string, limit int64) ([]fileset.Entry, error) {
	if _, err := f.Do(ctx, "find0", folder, scratch); err != nil {
		return nil, err
	}
	raw, err := ReadHost(scratch, limit)
	if err != nil {
		return nil, fmt.Errorf("walk: %w", err)
	}
	out := []fileset.Entry{{Path: folder}}
	below := strings.TrimSuffix(folder, "/") + "/"
	for name := range bytes.SplitSeq(bytes.TrimSuffix(raw, []byte{0}), []byte{0}) {
		name = bytes.TrimPrefix(name, []byte("/"))
		if path := below + string(name); len(name) > 0 && len(path) <= fileset.MaxPath {
			out = append(out, fileset.Entry{Path: path})
		}
	}
	slices.SortFunc(out, func(a, b fileset.Entry) int { return fileset.Compare(a.Path, b.Path) })
	out = slices.CompactFunc(out, func(a, b fileset.Entry) bool { return a.Path == b.Path })
	inside := map[string][]*fileset.Entry{} // by folder: one is asked about at a time
	for i := range out {
		dir, name := filepath.Split(out[i].Path)
		if strings.Contains(name, "'") || i == 0 { // a list cannot hold it
			if err := f.statOne(ctx, &out[i]); err != nil {
				return nil, fmt.Errorf("walk: %w", err)
			}
			continue
		}
		inside[dir] = append(inside[dir], &out[i])
	}
	for dir, entries := range inside {
		if err := f.inLists(dir, entries, func(some []*fileset.Entry, words string) error {
			answer, err := f.Do(ctx, "lstatnslist", dir, words)
			if err != nil {
				return err
			}
			return fillAll(some, string(answer))
		}); err != nil {
			return nil, fmt.Errorf("walk: %w", err)
		}
	}
	return out, nil
}

// statOne asks for one path. One that cannot be asked for stays as it is.
func (f *Fish) statOne(ctx context.Context, e *fileset.Entry) error {
	answer, err := f.Do(ctx, "lstatns", e.Path)
	if err == nil {
		err = fillAll([]*fileset.Entry{e}, "[0] = {\n"+string(answer))
	}
	if f.broken != nil {
		return err
	}
	return nil
}

// inLists calls each with entries of one folder and their names as guestfish writes a list, as many at once as a line holds.
// Names that hold a quote are left out, and so is what lies so deep that no line holds it.
func (f *Fish) inLists(dir string, entries []*fileset.Entry, each func(some []*fileset.Entry, words string) error) error {
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
		if n == 0 {
			entries = entries[1:]
			continue
		}
		if err := each(entries[:n], words.String()); err != nil {
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
	e.Kind = fileset.KindOf(uint32(mode))
	e.Mode, e.UID, e.GID = uint32(mode&0o7777), uint32(field["st_uid"]), uint32(field["st_gid"])
	e.Dev, e.Inode = uint64(field["st_dev"]), uint64(field["st_ino"])
	if e.Kind == fileset.CharDev || e.Kind == fileset.BlockDev {
		e.Major, e.Minor = unix.Major(uint64(field["st_rdev"])), unix.Minor(uint64(field["st_rdev"]))
	}
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

// Targets fills in where symbolic links lead. One that cannot be asked about keeps none.
func (f *Fish) Targets(ctx context.Context, entries []fileset.Entry) error {
	inside := map[string][]*fileset.Entry{}
	var single []*fileset.Entry
	for i := range entries {
		if e := &entries[i]; e.Kind == fileset.Symlink {
			dir, name := filepath.Split(e.Path)
			if strings.Contains(name, "'") {
				single = append(single, e)
				continue
			}
			inside[dir] = append(inside[dir], e)
		}
	}
	for dir, links := range inside {
		err := f.inLists(dir, links, func(some []*fileset.Entry, words string) error {
			answer, err := f.Do(ctx, "readlinklist", dir, words)
			if err != nil {
				return err
			}
			lines := strings.Split(strings.TrimSuffix(string(answer), "\n"), "\n")
			if len(lines) != len(some) { // a target holds a line end
				single = append(single, some...)
				return nil
			}
			for i, e := range some {
				e.Target = lines[i]
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("read links: %w", err)
		}
	}
	for _, e := range single {
		answer, err := f.Do(ctx, "readlink", e.Path)
		if f.broken != nil {
			return fmt.Errorf("read links: %w", err)
		}
		if err == nil {
			e.Target = strings.TrimSuffix(string(answer), "\n")
		}
	}
	return nil
}

// Attrs fills in the extended attributes of entries of one folder.
func (f *Fish) Attrs(ctx context.Context, dir string, entries []*fileset.Entry) error {
	var ask []*fileset.Entry
	var listed []*fileset.Entry
	for _, e := range entries {
		if strings.Contains(filepath.Base(e.Path), "'") {
			ask = append(ask, e)
			continue
		}
		listed = append(listed, e)
	}
	err := f.inLists(dir, listed, func(some []*fileset.Entry, words string) error {
		answer, err := f.Do(ctx, "lxattrlist", dir, words)
		if err != nil {
			if f.broken != nil {
				return err
			}
			return nil // a file system without attributes
		}
		// An entry without a name, and the number of attributes that follow, begins each file.
		n := -1
		for _, a := range attrList(string(answer)) {
			if a.Name != "" {
				continue
			}
			if n++; n < len(some) && a.Value != "" && !strings.HasPrefix(a.Value, "0") {
				ask = append(ask, some[n])
			}
		}
		return nil
	})
	for i := 0; err == nil && i < len(ask); i++ {
		err = f.attrs(ctx, ask[i])
	}
	if err != nil {
		return fmt.Errorf("read attributes: %w", err)
	}
	return nil
}

func (f *Fish) attrs(ctx context.Context, e *fileset.Entry) error {
	answer, err := f.Do(ctx, "lgetxattrs", e.Path)
	if err != nil {
		return f.broken
	}
	total := 0
	for _, a := range attrList(string(answer)) {
		if a.Name == "" || len(e.Attrs) >= fileset.MaxAttrs {
			continue
		}
		if strings.Contains(a.Value, `\`) { // an escape, or one that only looks like it
			value, err := f.Do(ctx, "lgetxattr", e.Path, a.Name)
			if f.broken != nil {
				return err
			}
			if err != nil {
				continue
			}
			a.Value = string(value)
		}
		if total += len(a.Name) + len(a.Value); len(a.Name) > fileset.MaxName || len(a.Value) > fileset.MaxAttr || total > fileset.MaxAttrBytes {
			break
		}
		e.Attrs = append(e.Attrs, a)
	}
	slices.SortFunc(e.Attrs, func(a, b fileset.Attr) int { return strings.Compare(a.Name, b.Name) })
	e.Attrs = slices.CompactFunc(e.Attrs, func(a, b fileset.Attr) bool { return a.Name == b.Name })
	return nil
}

// attrList reads a list of attributes as guestfish prints it.
func attrList(answer string) (out []fileset.Attr) {
	for line := range strings.Lines(answer) {
		line = strings.TrimSuffix(line, "\n")
		if name, ok := strings.CutPrefix(line, "  attrname: "); ok {
			out = append(out, fileset.Attr{Name: name})
		} else if value, ok := strings.CutPrefix(line, "  attrval: "); ok && len(out) > 0 {
			out[len(out)-1].Value = value
		}
	}
	return out
}
