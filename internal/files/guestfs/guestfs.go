// Package guestfs opens images for files through libguestfs (guestfish): a customer's file systems are parsed by the kernel of
// a small virtual machine that is thrown away, and below a layer that is thrown away too, so that a journal can be replayed.
//
// Knows: which of guestfish's commands shows what.
// Must not know: what is done with what is seen.
package guestfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/files"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/guestfish"
)

// Driver opens images with libguestfs.
type Driver struct {
	Work  string // an existing folder for what travels between host and appliance
	Cache string // a folder, made if it is missing, in which libguestfs keeps its appliance between guests
	KVM   bool   // this host's KVM has been proved to work
}

// Limits of a guest.
const (
	openLimit  = 10 * time.Minute // until the appliance runs; the first has to be made, and emulated where there is no KVM
	stepLimit  = 10 * time.Minute
	walkLimit  = 2 * time.Hour
	readLimit  = 12 * time.Hour // of one file or folder
	maxSystem  = 64             // file systems
	maxOwn     = 64             // that the system does not mount
	ownPrefix  = "/@"
	systemRoot = "/v0"
)

type guest struct {
	fish *guestfish.Fish
	work string
	own  []string // where the others are mounted, in the order of names
	at   []string // what they are called
}

// Ready implements files.Opener.
func (d Driver) Ready() error { return guestfish.Ready() }

// Open implements files.Opener.
func (d Driver) Open(ctx context.Context, disks []files.Disk) (files.Guest, error) {
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	work, err := os.MkdirTemp(d.Work, "files-")
	if err != nil {
		return nil, fmt.Errorf("make work folder: %w", err)
	}
	g := &guest{work: work}
	if err := g.open(ctx, d, disks); err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

func (g *guest) open(ctx context.Context, d Driver, disks []files.Disk) (err error) {
	var adds [][]string
	for _, disk := range disks {
		adds = append(adds, []string{"add", disk.Export, "readonly:true", "format:raw", "protocol:nbd", "server:unix:" + disk.Socket})
	}
	g.fish, err = guestfish.Launch(ctx, g.work, d.Cache, d.KVM, adds)
	return err
}

// Close implements files.Guest. Nothing has to be written out.
func (g *guest) Close() {
	if g.fish != nil {
		g.fish.Kill()
		g.fish.Quit()
	}
	_ = os.RemoveAll(g.work)
}

func (g *guest) do(ctx context.Context, command string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	out, err := g.fish.Do(ctx, command, args...)
	return string(out), err
}

// mountableRE is what a file system of the appliance may be called.
var mountableRE = regexp.MustCompile(`^(btrfsvol:)?/dev/[A-Za-z0-9+_./@-]{1,250}$`)

// pairs reads a table of guestfish's.
func pairs(text string) (out [][2]string) {
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); ok {
			out = append(out, [2]string{key, value})
		}
	}
	return out
}

// Look implements files.Guest.
func (g *guest) Look(ctx context.Context) (mounts []files.Mount, notes []string, err error) {
	answer, err := g.do(ctx, "list-filesystems")
	if err != nil {
		return nil, nil, err
	}
	types, order := map[string]string{}, []string{}
	for _, p := range pairs(answer) {
		if mountableRE.MatchString(p[0]) && types[p[0]] == "" {
			types[p[0]] = p[1]
			order = append(order, p[0])
		}
	}
	mounts, note, err := g.system(ctx, types)
	if err != nil {
		return nil, nil, err
	}
	if note != "" {
		notes = append(notes, note)
	}
	var own []files.Mount
	for _, device := range order {
		t := types[device]
		switch {
		case t == "crypto_LUKS" || t == "BitLocker":
			notes = append(notes, device+" is encrypted and cannot be seen")
			continue
		case t == "" || t == "swap" || t == "unknown" || strings.HasSuffix(t, "_member") || strings.HasPrefix(device, "btrfsvol:"):
			continue
		case slices.ContainsFunc(mounts, func(m files.Mount) bool {
			return m.Device == device || strings.HasPrefix(m.Device, "btrfsvol:"+device+"/")
		}):
			continue
		case len(own) >= maxOwn:
			notes = append(notes, "there are more file systems than can be shown")
			continue
		}
		own = append(own, files.Mount{Device: device, Type: t, Own: true, At: ownPrefix + strings.ReplaceAll(strings.TrimPrefix(device, "/dev/"), "/", "-")})
	}
	if len(mounts) == 0 && len(own) == 1 {
		own[0].At = "/"
	}
	if len(mounts)+len(own) == 0 {
		notes = append(notes, "there is no file system that can be seen")
	}
	return append(mounts, own...), notes, nil
}

// system finds the file systems of the installed system, those that others lie on first.
func (g *guest) system(ctx context.Context, types map[string]string) (mounts []files.Mount, note string, err error) {
	answer, err := g.do(ctx, "inspect-os")
	if err != nil {
		if g.fish.Broken() != nil {
			return nil, "", err
		}
		return nil, "the installed system could not be recognised: " + err.Error(), nil
	}
	roots := strings.Fields(answer)
	if len(roots) == 0 || !mountableRE.MatchString(roots[0]) {
		return nil, "", nil
	}
	if len(roots) > 1 {
		note = fmt.Sprintf("of %d installed systems %s is shown as /", len(roots), roots[0])
	}
	if answer, err = g.do(ctx, "inspect-get-mountpoints", roots[0]); err != nil {
		return nil, "", err
	}
	for _, p := range pairs(answer) {
		if strings.HasPrefix(p[0], "/") && path.Clean(p[0]) == p[0] && mountableRE.MatchString(p[1]) && len(mounts) < maxSystem {
			mounts = append(mounts, files.Mount{Device: p[1], At: p[0], Type: types[p[1]]})
		}
	}
	slices.SortFunc(mounts, func(a, b files.Mount) int { return fileset.Compare(a.At, b.At) })
	if len(mounts) == 0 || mounts[0].At != "/" {
		return nil, "the installed system mounts no root", nil
	}
	return mounts, note, nil
}

// Mount implements files.Guest.
func (g *guest) Mount(ctx context.Context, mounts []files.Mount) (notes []string, err error) {
	for i, m := range mounts {
		at := systemRoot + strings.TrimSuffix(m.At, "/")
		if m.Own && m.At != "/" {
			at = fmt.Sprintf("/v%d", i+1)
		}
		if m.Own || m.At == "/" {
			if _, err := g.do(ctx, "mkmountpoint", at); err != nil {
				return notes, err
			}
		}
		if _, err := g.do(ctx, "mount-ro", m.Device, at); err != nil {
			if g.fish.Broken() != nil {
				return notes, err
			}
			notes = append(notes, fmt.Sprintf("%s (%s), which belongs at %s, cannot be mounted and is not shown: %v", m.Device, m.Type, files.Text(m.At), err))
			continue
		}
		if m.Own && m.At != "/" {
			g.own, g.at = append(g.own, at), append(g.at, m.At)
		}
	}
	return notes, nil
}

// inside says where a path is in the appliance.
func (g *guest) inside(p string) string {
	for i, at := range g.at {
		if fileset.Below(p, at) {
			return g.own[i] + p[len(at):]
		}
	}
	return systemRoot + strings.TrimSuffix(p, "/")
}

// Walk implements files.Guest.
func (g *guest) Walk(ctx context.Context) (entries []fileset.Entry, notes []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, walkLimit)
	defer cancel()
	lost := 0
	add := func(from, to string) error {
		found, err := g.fish.Walk(ctx, from, filepath.Join(g.work, "walk"), files.MaxNameBytes)
		if err == nil {
			err = g.fish.Targets(ctx, found)
		}
		if err != nil {
			if g.fish.Broken() == nil && to == "/" && errors.Is(err, os.ErrNotExist) {
				return nil // there is no system
			}
			return err
		}
		var buf []byte
		for _, e := range found {
			socket := e.Kind == 0 && e.Inode != 0
			if e.Path = to + e.Path[len(from):]; to == "/" && e.Path != "/" {
				e.Path = e.Path[1:]
			}
			buf = e.AppendBinary(buf[:0])
			if _, _, err := fileset.Decode(buf); err != nil {
				if !socket {
					lost++
				}
				continue
			}
			entries = append(entries, e)
		}
		return nil
	}
	if err := add(systemRoot, "/"); err != nil {
		return nil, nil, err
	}
	for i := range g.own {
		if err := add(g.own[i], g.at[i]); err != nil {
			return nil, nil, err
		}
	}
	if lost > 0 {
		notes = append(notes, fmt.Sprintf("%d names cannot be shown: they are too long, or could not be read", lost))
	}
	slices.SortFunc(entries, func(a, b fileset.Entry) int { return fileset.Compare(a.Path, b.Path) })
	entries = slices.CompactFunc(entries, func(a, b fileset.Entry) bool { return a.Path == b.Path })
	return entries, notes, nil
}

// Attrs implements files.Guest.
func (g *guest) Attrs(ctx context.Context, entries []*fileset.Entry) error {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	moved := make([]fileset.Entry, len(entries))
	ask := make([]*fileset.Entry, len(entries))
	for i, e := range entries {
		moved[i].Path = g.inside(e.Path)
		ask[i] = &moved[i]
	}
	if len(ask) == 0 {
		return nil
	}
	// A mount point lies elsewhere than what is beside it.
	for len(ask) > 0 {
		dir, _ := filepath.Split(ask[0].Path)
		n := 1
		for n < len(ask) && strings.HasPrefix(ask[n].Path, dir) && !strings.Contains(ask[n].Path[len(dir):], "/") {
			n++
		}
		if err := g.fish.Attrs(ctx, dir, ask[:n]); err != nil {
			return err
		}
		ask = ask[n:]
	}
	for i, e := range entries {
		e.Attrs = moved[i].Attrs
	}
	return nil
}

// Read implements files.Guest.
func (g *guest) Read(ctx context.Context, p string, w io.Writer) error {
	err := g.stream(ctx, func(r io.Reader) error { _, err := io.Copy(w, r); return err }, func(ctx context.Context, pipe string) error {
		_, err := g.fish.Do(ctx, "download", g.inside(p), pipe)
		return err
	})
	if err != nil {
		return fmt.Errorf("read %.200q: %w", p, err)
	}
	return nil
}

// Folder implements files.Guest, with the tar of the appliance. It keeps attributes as they are, access lists and labels among
// them; holes it writes out.
func (g *guest) Folder(ctx context.Context, p string, each func(m files.Member, content io.Reader) error) error {
	from := map[string]string{g.inside(p): p}
	if p == "/" {
		for i := range g.own {
			from[g.own[i]] = g.at[i]
		}
	}
	for _, inside := range slices.Sorted(maps.Keys(from)) {
		gave := false
		one := func(m files.Member, content io.Reader) error {
			gave = true
			return each(m, content)
		}
		err := g.stream(ctx, func(r io.Reader) error { return members(r, from[inside], one) }, func(ctx context.Context, pipe string) error {
			_, err := g.fish.Do(ctx, "tar-out", inside, pipe, "numericowner:true", "xattrs:true")
			return err
		})
		if err != nil && !gave && g.fish.Broken() == nil {
			continue // it is read file by file, and that says what is wrong
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// members reads a tar stream of a folder that appears at top.
func members(r io.Reader, top string, each func(m files.Member, content io.Reader) error) error {
	place := func(name string) string { return path.Join(top, "/"+strings.TrimPrefix(name, "./")) }
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			_, err = io.Copy(io.Discard, r) // what fills up the last block
			return err
		}
		if err != nil {
			return err
		}
		m := files.Member{Path: place(h.Name), File: h.Typeflag == tar.TypeReg, Size: h.Size, Attrs: attrs(h.PAXRecords)}
		if h.Typeflag == tar.TypeLink {
			m.Again = place(h.Linkname)
		}
		if err := each(m, t); err != nil {
			return err
		}
	}
}

// attrs reads the attributes in an extended header, as many as an entry may have.
func attrs(records map[string]string) (out []fileset.Attr) {
	total := 0
	for _, key := range slices.Sorted(maps.Keys(records)) {
		name, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if !ok {
			continue
		}
		a := fileset.Attr{Name: strings.NewReplacer("%3D", "=", "%25", "%").Replace(name), Value: records[key]}
		if total += len(a.Name) + len(a.Value); len(out) >= fileset.MaxAttrs || len(a.Name) > fileset.MaxName || len(a.Value) > fileset.MaxAttr || total > fileset.MaxAttrBytes {
			break
		}
		out = append(out, a)
	}
	slices.SortFunc(out, func(a, b fileset.Attr) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// stream has guestfish write into a named pipe what take reads, so that it lies nowhere.
func (g *guest) stream(ctx context.Context, take func(io.Reader) error, write func(ctx context.Context, pipe string) error) error {
	ctx, cancel := context.WithTimeout(ctx, readLimit)
	defer cancel()
	pipe := filepath.Join(g.work, "content")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		return err
	}
	defer os.Remove(pipe)
	// Both ends are held before guestfish is asked, so that nobody waits for the other to open one.
	from, err := os.OpenFile(pipe, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	until, err := os.OpenFile(pipe, os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	taken := make(chan error, 1)
	go func() {
		err := take(from)
		if err != nil {
			g.fish.Kill() // nobody wants the rest
		}
		taken <- err
	}()
	err = write(ctx, pipe)
	until.Close()
	if terr := <-taken; terr != nil {
		return terr
	}
	return err
}
