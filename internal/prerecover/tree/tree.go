// Package tree is a guest in memory: the same contract as a real image behind libguestfs, at the speed of a map. It is
// what everything above pre-recovery is tested with, and it passes the same suite.
//
// Knows: files, folders, links, mounts, as far as prerecover.Guest shows them.
// Must not know: qcow2, any program.
package tree

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/vm"
)

// System is what an image holds.
type System struct {
	Disks       []prerecover.Disk
	Filesystems []*Filesystem
}

// Filesystem is one device and, if it can be mounted, the files on it.
type Filesystem struct {
	Device prerecover.Device
	Free   int64 // bytes left; 0: plenty
	root   *node
}

// node is a file, folder, link or special file.
type node struct {
	mode     fs.FileMode
	mtime    fileset.Time
	uid, gid int
	data     []byte
	link     string
	children map[string]*node
	xattr    map[string]string
}

func newFolder() *node { return &node{mode: fs.ModeDir | 0o755, children: map[string]*node{}} }

// File puts a regular file on the file system, making the folders above it.
func (f *Filesystem) File(name string, content []byte, mode fs.FileMode) *Filesystem {
	f.put(name, &node{mode: mode, data: content})
	return f
}

// Folder makes a folder.
func (f *Filesystem) Folder(name string) *Filesystem {
	f.folder(strings.Split(strings.Trim(name, "/"), "/"))
	return f
}

// Link makes a symbolic link.
func (f *Filesystem) Link(name, target string) *Filesystem {
	f.put(name, &node{mode: fs.ModeSymlink | 0o777, link: target})
	return f
}

// Special makes a file that is none, such as a pipe.
func (f *Filesystem) Special(name string, mode fs.FileMode) *Filesystem {
	f.put(name, &node{mode: mode})
	return f
}

// Label sets an extended attribute of something that is there.
func (f *Filesystem) Label(name, attr, value string) *Filesystem {
	n := f.root
	for _, p := range strings.Split(strings.Trim(name, "/"), "/") {
		if p != "" && n != nil {
			n = n.children[p]
		}
	}
	if n != nil {
		n.setXattr(attr, value)
	}
	return f
}

func (n *node) setXattr(name, value string) {
	if n.xattr == nil {
		n.xattr = map[string]string{}
	}
	n.xattr[name] = value
}

func (f *Filesystem) put(name string, n *node) {
	parts := strings.Split(strings.TrimPrefix(name, "/"), "/")
	f.folder(parts[:len(parts)-1]).children[parts[len(parts)-1]] = n
}

func (f *Filesystem) folder(parts []string) *node {
	if f.root == nil {
		f.root = newFolder()
	}
	n := f.root
	for _, p := range parts {
		if p == "" {
			continue
		}
		if n.children[p] == nil {
			n.children[p] = newFolder()
		}
		n = n.children[p]
	}
	return n
}

// FromFolder fills a file system with what lies in a folder of the host: files, folders and links.
func (f *Filesystem) FromFolder(dir string) error {
	f.folder(nil)
	return filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		switch {
		case e.IsDir():
			f.Folder(name)
		case e.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			f.Link(name, target)
		case e.Type().IsRegular():
			content, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			f.File(name, content, info.Mode().Perm())
		}
		return nil
	})
}

func (n *node) clone() *node {
	if n == nil {
		return nil
	}
	c := *n
	c.data = slices.Clone(n.data)
	c.xattr = map[string]string{}
	for k, v := range n.xattr {
		c.xattr[k] = v
	}
	if n.children != nil {
		c.children = make(map[string]*node, len(n.children))
		for name, child := range n.children {
			c.children[name] = child.clone()
		}
	}
	return &c
}

// Opener opens copies of one system, whatever the bases are: the system stands for the image. The delta of the first
// disk is a JSON list of the paths that were changed, the others are empty.
type Opener struct {
	System *System
	// Opened, if set, is told each guest as it is opened, so that a test can look into it afterwards.
	Opened func(*Guest)
}

// Open implements prerecover.Opener.
func (o Opener) Open(_ context.Context, dir string, base []vm.Layer) (prerecover.Guest, error) {
	if len(base) != len(o.System.Disks) {
		return nil, fmt.Errorf("open image: %d disks were given and the tree has %d", len(base), len(o.System.Disks))
	}
	g := &Guest{disks: o.System.Disks, mounts: map[*node]*node{}}
	for _, f := range o.System.Filesystems {
		c := *f
		c.root = f.root.clone()
		g.filesystems = append(g.filesystems, &c)
	}
	for i := range base {
		p := filepath.Join(dir, fmt.Sprintf("delta-%d.qcow2", i))
		file, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			g.Abandon()
			return nil, fmt.Errorf("open image: make delta: %w", err)
		}
		file.Close()
		g.deltas = append(g.deltas, p)
	}
	if o.Opened != nil {
		o.Opened(g)
	}
	return g, nil
}

// Guest implements prerecover.Guest on a tree.
type Guest struct {
	disks       []prerecover.Disk
	filesystems []*Filesystem
	top         *node           // mounted at /
	mounts      map[*node]*node // folder → root of what is mounted on it
	deltas      []string
	changed     []string
	closed      bool
}

var errClosed = errors.New("the guest is closed")

// Disks implements prerecover.Guest.
func (g *Guest) Disks(context.Context) ([]prerecover.Disk, error) { return slices.Clone(g.disks), nil }

// Devices implements prerecover.Guest.
func (g *Guest) Devices(context.Context) ([]prerecover.Device, error) {
	var out []prerecover.Device
	for _, f := range g.filesystems {
		if len(out) < prerecover.MaxDevices {
			out = append(out, f.Device)
		}
	}
	return out, nil
}

// Mount implements prerecover.Guest. Of the options only subvol=NAME means something.
func (g *Guest) Mount(_ context.Context, device, at, options string) error {
	i := slices.IndexFunc(g.filesystems, func(f *Filesystem) bool { return f.Device.Name == device })
	if i < 0 || g.filesystems[i].root == nil {
		return fmt.Errorf("mount %s at %s: no file system there", device, at)
	}
	root := g.filesystems[i].root
	for _, o := range strings.Split(options, ",") {
		if name, ok := strings.CutPrefix(o, "subvol="); ok {
			if root = root.children[strings.Trim(name, "/")]; root == nil {
				return fmt.Errorf("mount %s at %s: no subvolume %q", device, at, name)
			}
		}
	}
	if at == "/" {
		g.top = root
		return nil
	}
	n, err := g.walk(at, true)
	if err != nil {
		return err
	}
	if !n.mode.IsDir() {
		return fmt.Errorf("mount %s at %s: it is no folder", device, at)
	}
	g.mounts[n] = root
	return nil
}

// Unmount implements prerecover.Guest.
func (g *Guest) Unmount(context.Context) error {
	g.top, g.mounts = nil, map[*node]*node{}
	return nil
}

// maxLinks is how many links Linux follows before it gives up.
const maxLinks = 40

// walk finds a path. Links are followed inside the tree; the last one only if follow.
func (g *Guest) walk(name string, follow bool) (*node, error) {
	if g.closed {
		return nil, errClosed
	}
	if !strings.HasPrefix(name, "/") || len(name) > prerecover.MaxPath || strings.ContainsRune(name, 0) {
		return nil, fmt.Errorf("path %.80q: use an absolute path of at most %d bytes", name, prerecover.MaxPath)
	}
	if g.top == nil {
		return nil, errors.New("nothing is mounted")
	}
	stack := []*node{g.top}
	todo := strings.Split(name, "/")
	for links := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		here := stack[len(stack)-1]
		if part == "" || part == "." {
			continue
		}
		if part == ".." {
			if len(stack) > 1 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		next := here.children[part]
		if next == nil {
			return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
		}
		if next.mode&fs.ModeSymlink != 0 && (follow || len(todo) > 0) {
			if links++; links > maxLinks {
				return nil, fmt.Errorf("%s: too many links: %w", name, fs.ErrNotExist)
			}
			todo = append(strings.Split(next.link, "/"), todo...)
			if strings.HasPrefix(next.link, "/") {
				stack = stack[:1]
			}
			continue
		}
		if m := g.mounts[next]; m != nil {
			next = m
		}
		stack = append(stack, next)
	}
	return stack[len(stack)-1], nil
}

func (n *node) stat() prerecover.Stat {
	return prerecover.Stat{Mode: n.mode, Size: int64(len(n.data)), UID: n.uid, GID: n.gid, Link: n.link}
}

// Stat implements prerecover.Guest.
func (g *Guest) Stat(_ context.Context, name string) (prerecover.Stat, error) {
	n, err := g.walk(name, true)
	if err != nil {
		return prerecover.Stat{}, err
	}
	return n.stat(), nil
}

// Lstat implements prerecover.Guest.
func (g *Guest) Lstat(_ context.Context, name string) (prerecover.Stat, error) {
	n, err := g.walk(name, false)
	if err != nil {
		return prerecover.Stat{}, err
	}
	return n.stat(), nil
}

// List implements prerecover.Guest.
func (g *Guest) List(_ context.Context, name string, limit int) ([]string, error) {
	n, err := g.walk(name, true)
	if err != nil {
		return nil, err
	}
	if !n.mode.IsDir() {
		return nil, fmt.Errorf("list: not a folder: %w", fs.ErrNotExist)
	}
	if len(n.children) > limit {
		return nil, fmt.Errorf("list: %w of %d names", prerecover.ErrTooLarge, limit)
	}
	var names []string
	for child := range n.children {
		names = append(names, child)
	}
	slices.Sort(names)
	return names, nil
}

// Read implements prerecover.Guest.
func (g *Guest) Read(_ context.Context, name string, limit int64) ([]byte, error) {
	n, err := g.walk(name, true)
	switch {
	case err != nil:
		return nil, err
	case !n.mode.IsRegular():
		return nil, prerecover.ErrNotRegular
	case int64(len(n.data)) > limit:
		return nil, fmt.Errorf("%w: %d bytes of at most %d", prerecover.ErrTooLarge, len(n.data), limit)
	}
	return slices.Clone(n.data), nil
}

// Space implements prerecover.Guest. It is that of the root file system.
func (g *Guest) Space(_ context.Context, name string) (prerecover.Space, error) {
	if _, err := g.walk(name, true); err != nil {
		return prerecover.Space{}, err
	}
	for _, f := range g.filesystems {
		if f.root == g.top && f.Free > 0 {
			return prerecover.Space{Free: f.Free, Inodes: -1}, nil
		}
	}
	return prerecover.Space{Free: 1 << 40, Inodes: -1}, nil
}

// Xattr implements prerecover.Guest.
func (g *Guest) Xattr(_ context.Context, name, attr string) (string, error) {
	n, err := g.walk(name, false)
	if err != nil {
		return "", err
	}
	return n.xattr[attr], nil
}

// Write implements prerecover.Guest.
func (g *Guest) Write(_ context.Context, name string, content []byte) error {
	n, err := g.walk(name, true)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if l, lerr := g.walk(name, false); lerr == nil && l.mode&fs.ModeSymlink != 0 {
			return fmt.Errorf("write %s: it is a link to nowhere: %w", name, fs.ErrNotExist)
		}
		if n, err = g.create(name, &node{mode: 0o644}); err != nil {
			return err
		}
	case err != nil:
		return err
	case !n.mode.IsRegular():
		return prerecover.ErrNotRegular
	}
	n.data = slices.Clone(content)
	g.changed = append(g.changed, name)
	return nil
}

// create puts a new node where nothing is.
func (g *Guest) create(name string, n *node) (*node, error) {
	dir, err := g.walk(path.Dir(name), true)
	if err != nil {
		return nil, err
	}
	if !dir.mode.IsDir() {
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	dir.children[path.Base(name)] = n
	g.changed = append(g.changed, name)
	return n, nil
}

// Mkdir implements prerecover.Guest.
func (g *Guest) Mkdir(ctx context.Context, name string) error {
	n, err := g.walk(name, true)
	if err == nil {
		if n.mode.IsDir() {
			return nil
		}
		return prerecover.ErrNotRegular
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := g.Mkdir(ctx, path.Dir(name)); err != nil {
		return err
	}
	_, err = g.create(name, newFolder())
	return err
}

// Symlink implements prerecover.Guest.
func (g *Guest) Symlink(ctx context.Context, target, name string) error {
	if err := g.Remove(ctx, name); err != nil {
		return err
	}
	_, err := g.create(name, &node{mode: fs.ModeSymlink | 0o777, link: target})
	return err
}

// Remove implements prerecover.Guest.
func (g *Guest) Remove(_ context.Context, name string) error {
	n, err := g.walk(name, false)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case n.mode.IsDir():
		return fmt.Errorf("remove: it is a folder: %w", prerecover.ErrNotRegular)
	}
	return g.drop(name)
}

// drop takes what is there out of its folder.
func (g *Guest) drop(name string) error {
	dir, err := g.walk(path.Dir(name), true)
	if err != nil {
		return err
	}
	delete(dir.children, path.Base(name))
	g.changed = append(g.changed, name)
	return nil
}

// Chmod implements prerecover.Guest.
func (g *Guest) Chmod(_ context.Context, name string, mode fs.FileMode) error {
	n, err := g.walk(name, true)
	if err != nil {
		return err
	}
	n.mode = n.mode.Type() | mode.Perm()
	g.changed = append(g.changed, name)
	return nil
}

// Chown implements prerecover.Guest.
func (g *Guest) Chown(_ context.Context, name string, uid, gid int) error {
	n, err := g.walk(name, false)
	if err != nil {
		return err
	}
	n.uid, n.gid = uid, gid
	return nil
}

// SetXattr implements prerecover.Guest.
func (g *Guest) SetXattr(_ context.Context, name, attr, value string) error {
	n, err := g.walk(name, false)
	if err != nil {
		return err
	}
	n.setXattr(attr, value)
	return nil
}

// Deltas implements prerecover.Guest.
func (g *Guest) Deltas() []string { return slices.Clone(g.deltas) }

// Close implements prerecover.Guest.
func (g *Guest) Close(context.Context) error {
	if g.closed {
		return nil
	}
	list, err := json.Marshal(g.changed)
	if err == nil {
		err = os.WriteFile(g.deltas[0], list, 0o600)
	}
	if err != nil {
		return fmt.Errorf("close image: %w", err)
	}
	g.closed = true
	return nil
}

// Abandon implements prerecover.Guest.
func (g *Guest) Abandon() {
	g.closed = true
	for _, d := range g.deltas {
		_ = os.Remove(d)
	}
}

// Reopen lets a test look at a guest that was closed.
func (g *Guest) Reopen() { g.closed = false }
