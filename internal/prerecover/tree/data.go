package tree

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/fileset"
)

// Walk implements prerecover.Guest. A tree has no inodes and no times of change: everything in it may have changed.
func (g *Guest) Walk(_ context.Context, folder string) (out []fileset.Entry, err error) {
	top, err := g.walk(folder, false)
	if err != nil {
		return nil, err
	}
	var visit func(name string, n *node)
	visit = func(name string, n *node) {
		if m := g.mounts[n]; m != nil {
			n = m
		}
		e := fileset.Entry{Kind: kindOf(n.mode), Path: name, Mode: uint32(n.mode.Perm()), UID: uint32(n.uid), GID: uint32(n.gid), Mtime: n.mtime}
		if e.Kind == fileset.File {
			e.Size = int64(len(n.data))
		}
		out = append(out, e)
		for child, below := range n.children {
			visit(name+"/"+child, below)
		}
	}
	visit(folder, top)
	slices.SortFunc(out, func(a, b fileset.Entry) int { return fileset.Compare(a.Path, b.Path) })
	return out, nil
}

func kindOf(m fs.FileMode) fileset.Kind {
	switch {
	case m.IsRegular():
		return fileset.File
	case m.IsDir():
		return fileset.Folder
	case m&fs.ModeSymlink != 0:
		return fileset.Symlink
	case m&fs.ModeNamedPipe != 0:
		return fileset.NamedPipe
	case m&fs.ModeCharDevice != 0:
		return fileset.CharDev
	}
	return fileset.BlockDev
}

// RemoveAll implements prerecover.Guest.
func (g *Guest) RemoveAll(_ context.Context, name string) error {
	if _, err := g.walk(name, false); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return g.drop(name)
}

// Unpack implements prerecover.Guest.
func (g *Guest) Unpack(_ context.Context, from io.Reader) error {
	r := tar.NewReader(from)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, from)
			return err
		}
		if err == nil {
			err = g.unpackOne(h, r)
		}
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
	}
}

func (g *Guest) unpackOne(h *tar.Header, content io.Reader) error {
	name := "/" + strings.TrimSuffix(h.Name, "/")
	n := &node{mode: h.FileInfo().Mode(), uid: h.Uid, gid: h.Gid, link: h.Linkname,
		mtime: fileset.Time{Sec: h.ModTime.Unix(), Nsec: uint32(h.ModTime.Nanosecond())}}
	switch h.Typeflag {
	case tar.TypeDir:
		if old, err := g.walk(name, false); err == nil && old.mode.IsDir() {
			old.mode, old.uid, old.gid, old.mtime = n.mode, n.uid, n.gid, n.mtime
			n = old
			break
		}
		n.children = map[string]*node{}
	case tar.TypeLink:
		target, err := g.walk("/"+h.Linkname, false)
		if err != nil {
			return err
		}
		n = target
	case tar.TypeReg:
		data, err := io.ReadAll(content)
		if err != nil {
			return err
		}
		n.data = data
	}
	for key, value := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			n.setXattr(strings.NewReplacer("%3D", "=", "%25", "%").Replace(attr), value)
		}
	}
	_, err := g.create(name, n)
	return err
}
