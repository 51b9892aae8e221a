package prerecover

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/fileset"
)

// View is what was read of a guest: files, folders and devices by value. It answers only for paths that were looked at;
// every other path is as if it were not there.
type View struct {
	Disks   []Disk
	Devices []Device
	Mounts  map[string]string // mount point → device
	entries map[string]*entry
}

// entry is one path that was looked at.
type entry struct {
	exists  bool // what the path leads to is there
	stat    Stat // of what the path leads to
	isLink  bool // the path itself is a symbolic link
	content []byte
	loaded  bool // content holds it all
	names   []string
	label   string // SELinux
}

// NewView gives a view of nothing. Tests build on it.
func NewView() *View { return &View{Mounts: map[string]string{}, entries: map[string]*entry{}} }

// WithFile adds a file as if it had been read.
func (v *View) WithFile(name string, content []byte) *View {
	v.entries[name] = &entry{exists: true, stat: Stat{Mode: 0o644, Size: int64(len(content))}, content: content, loaded: true}
	v.WithFolder(path.Dir(name), path.Base(name))
	return v
}

// WithFolder adds a folder with names in it, and the folders above it.
func (v *View) WithFolder(name string, names ...string) *View {
	for {
		e := v.entries[name]
		if e == nil {
			e = &entry{exists: true, stat: Stat{Mode: fs.ModeDir | 0o755}}
			v.entries[name] = e
		}
		for _, n := range names {
			if i, found := slices.BinarySearch(e.names, n); !found {
				e.names = slices.Insert(e.names, i, n)
			}
		}
		if name == "/" {
			return v
		}
		name, names = path.Dir(name), []string{path.Base(name)}
	}
}

// holdsBelow says whether anything below one of the folders was looked at.
func (v *View) holdsBelow(roots []string) bool {
	for p := range v.entries {
		for _, r := range roots {
			if fileset.Below(p, r) {
				return true
			}
		}
	}
	return false
}

func (v *View) exists(name string) bool {
	e := v.entries[name]
	return e != nil && e.exists
}

func (v *View) isFolder(name string) bool { return v.exists(name) && v.entries[name].stat.Mode.IsDir() }

// content gives a file that was read whole.
func (v *View) content(name string) ([]byte, bool) {
	e := v.entries[name]
	if e == nil || !e.exists || !e.loaded {
		return nil, false
	}
	return e.content, true
}

func (v *View) names(dir string) []string {
	if e := v.entries[dir]; e != nil {
		return e.names
	}
	return nil
}

// clone gives a view that can be changed without changing this one.
func (v *View) clone() *View {
	c := *v
	c.entries = maps.Clone(v.entries) // entries are replaced, never changed
	return &c
}

// deviceOf finds a device of the guest by what fstab calls it; see Namer.
func (v *View) device(name string) (Device, bool) {
	i := slices.IndexFunc(v.Devices, func(d Device) bool { return d.Name == name })
	if i < 0 {
		return Device{}, false
	}
	return v.Devices[i], true
}

// Limits of what is looked at.
const (
	maxConfig = 1 << 20  // bytes of a file of /etc or of a boot loader's configuration
	maxBinary = 32 << 20 // bytes of a boot loader
	maxNamesD = 20_000   // names in a folder
)

// looker reads a guest into a view.
type looker struct {
	ctx  context.Context
	g    Guest
	view *View
}

// stat looks at a path without reading it.
func (l *looker) stat(name string) (*entry, error) {
	if e := l.view.entries[name]; e != nil {
		return e, nil
	}
	e := &entry{}
	s, err := l.g.Lstat(l.ctx, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		l.view.entries[name] = e
		return e, nil
	case err != nil:
		return nil, err
	}
	if e.isLink = s.Mode&fs.ModeSymlink != 0; e.isLink {
		if s, err = l.g.Stat(l.ctx, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		e.exists = err == nil
	} else {
		e.exists = true
	}
	e.stat = s
	l.view.entries[name] = e
	return e, nil
}

// read looks at a path and, if it is a file of at most limit bytes, reads it. One that is longer or no file is looked at
// only; mustRead makes that an error.
func (l *looker) read(name string, limit int64) (*entry, error) {
	e, err := l.stat(name)
	if err != nil || !e.exists || e.loaded || !e.stat.Mode.IsRegular() || e.stat.Size > limit {
		return e, err
	}
	if e.content, err = l.g.Read(l.ctx, name, limit); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	e.loaded = true
	return e, nil
}

// text reads a file of which a decision depends. One that is not there is "".
func (l *looker) text(name string) (string, error) {
	e, err := l.read(name, maxConfig)
	switch {
	case err != nil:
		return "", err
	case !e.exists:
		return "", nil
	case !e.loaded:
		return "", fmt.Errorf("%w: %s is no file of at most %d bytes", ErrNotRescuable, name, maxConfig)
	}
	return string(e.content), nil
}

// list looks into a folder. One that is not there has no names; one with too many has none either.
func (l *looker) list(dir string) ([]string, error) {
	e, err := l.stat(dir)
	if err != nil || !e.exists || !e.stat.Mode.IsDir() || e.names != nil {
		return e.namesOrNil(), err
	}
	names, err := l.g.List(l.ctx, dir, maxNamesD)
	if errors.Is(err, ErrTooLarge) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	e.names = names
	return names, nil
}

func (e *entry) namesOrNil() []string {
	if e == nil {
		return nil
	}
	return e.names
}

// plainName says whether a name found in an image is one that a system would give. Others are not hostile to us, but
// nothing we look for is called so.
func plainName(name string) bool {
	return name != "" && len(name) <= 200 && name != "." && name != ".." && !strings.ContainsFunc(name, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._+~@:-", r))
	})
}
