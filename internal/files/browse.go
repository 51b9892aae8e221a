package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/store"
)

// Limits of answers.
const (
	DefaultLimit = 1000
	MaxLimit     = 100_000
)

// Browser answers for the snapshots of a store. Its methods may be called from many goroutines.
type Browser struct {
	Store  *store.Store
	Opener Opener // of images; nil: only file sets can be browsed
	Run    string // folder for sockets, short

	*desk
}

// desk is where one image at a time is open.
type desk struct {
	slot   chan struct{} // held by whoever uses what follows
	warm   *guest        // open, and used by nobody
	closed bool
}

// New gives a browser. Close it.
func New(st *store.Store, opener Opener, run string) *Browser {
	return &Browser{Store: st, Opener: opener, Run: run, desk: &desk{slot: make(chan struct{}, 1)}}
}

// Over gives a browser of another store. The two have one image open at a time between them, and are closed together.
func (b *Browser) Over(st *store.Store) *Browser {
	return &Browser{Store: st, Opener: b.Opener, Run: b.Run, desk: b.desk}
}

// Item is an entry of a snapshot.
type Item struct {
	*fileset.Entry
	Content string // names the content of a file, where that is known without reading it

	stored *store.FileEntry // of a file set
}

// errStop ends a reading that has seen enough.
var errStop = errors.New("enough was seen")

// history gives the snapshots of a server, newest first.
func (b *Browser) history(ctx context.Context, server string) ([]dr.Snapshot, error) {
	all, err := b.Store.Snapshots(ctx)
	if err != nil && len(all) == 0 {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(s dr.Snapshot) bool { return s.Server != server && s.ServerID != server })
	slices.Reverse(all)
	if len(all) == 0 {
		return nil, api.Errorf(api.NotFound, "no snapshot of %q is kept: see 'muster server list' and 'muster snapshots SERVER'", server)
	}
	return all, nil
}

// holds says whether a path can lie in a snapshot.
func holds(s *dr.Snapshot, p string) bool {
	return !s.IsData() || fileset.Set{Roots: s.Files.Roots}.Root(p) != ""
}

// Snapshot finds the snapshot of a server in which paths are looked for: by its identifier, "lkg", or "" for the newest that
// can hold them all.
func (b *Browser) Snapshot(ctx context.Context, server, which string, paths ...string) (dr.Snapshot, error) {
	all, err := b.history(ctx, server)
	if err != nil {
		return dr.Snapshot{}, err
	}
	can := func(s *dr.Snapshot) bool {
		return !slices.ContainsFunc(paths, func(p string) bool { return !holds(s, p) })
	}
	id := which
	switch which {
	case "", "newest":
		if i := slices.IndexFunc(all, func(s dr.Snapshot) bool { return can(&s) }); i >= 0 {
			return all[i], nil
		}
		return all[0], nil // data only: its roots are what there is
	case "lkg":
		lkg, err := b.Store.LKG(ctx)
		if err != nil {
			return dr.Snapshot{}, err
		}
		if id = lkg[all[0].ServerID]; id == "" {
			return dr.Snapshot{}, api.Errorf(api.NotFound, "no image of %s has passed a test yet", server)
		}
	}
	i := slices.IndexFunc(all, func(s dr.Snapshot) bool { return s.ID == id })
	if i < 0 {
		return dr.Snapshot{}, api.Errorf(api.NotFound, "%s has no snapshot %q: see 'muster snapshots %s'", server, id, server)
	}
	s := all[i]
	if can(&s) || len(paths) == 1 && below(s.Files.Roots, paths[0]) {
		return s, nil
	}
	if which == "lkg" {
		if j := slices.IndexFunc(all, func(o dr.Snapshot) bool { return o.ID == s.Image }); j >= 0 {
			return all[j], nil
		}
	}
	return s, api.Errorf(api.Invalid, "snapshot %s is of data and holds %s: look for anything else in the image that it goes onto, %s", s.ID,
		strings.Join(s.Files.Roots, ", "), s.Image)
}

// below says whether any of the roots lies below a folder.
func below(roots []string, p string) bool {
	return slices.ContainsFunc(roots, func(r string) bool { return fileset.Below(r, p) })
}

// items calls each for everything in a snapshot, in fileset.Compare's order, until it gives an error. An image without an
// index gets one, if that is allowed; otherwise it is store.ErrNotFound.
func (b *Browser) items(ctx context.Context, snap dr.Snapshot, may bool, each func(*Item) error) (Header, error) {
	if snap.IsData() {
		f, err := b.Store.Files(ctx, snap.ID)
		if err != nil {
			return Header{}, err
		}
		defer f.Close()
		return Header{Made: snap.Taken}, each2(ctx, f, each)
	}
	if may {
		if err := b.ensure(ctx, snap); err != nil {
			return Header{}, err
		}
	}
	var stopped error
	h, err := b.readIndex(ctx, snap.ID, func(e *fileset.Entry) error {
		stopped = each(&Item{Entry: e})
		return stopped
	})
	if stopped != nil {
		err = stopped
	}
	if errors.Is(err, errStop) {
		err = nil
	}
	return h, err
}

// each2 calls each for everything in a file set.
func each2(ctx context.Context, f *store.Files, each func(*Item) error) error {
	for all := f.All(); ; {
		e, err := all.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = each(&Item{Entry: &e.Entry, Content: e.Content.ID(), stored: e})
		}
		if errors.Is(err, errStop) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// ensure sees to it that an image has an index.
func (b *Browser) ensure(ctx context.Context, snap dr.Snapshot) error {
	if b.indexed(ctx, snap.ID) {
		return nil
	}
	if b.Opener == nil {
		return api.Errorf(api.Unavailable, "look into %s: this installation cannot open images", snap.ID)
	}
	return b.makeIndex(ctx, snap)
}

func limitOf(n int) int {
	if n <= 0 {
		return DefaultLimit
	}
	return min(n, MaxLimit)
}

// List lists a folder, or one file.
func (b *Browser) List(ctx context.Context, q api.FilesQuery) (api.FileListing, error) {
	p, err := ParsePath(q.Path)
	if err != nil {
		return api.FileListing{}, api.Errorf(api.Invalid, "%w", err)
	}
	snap, err := b.Snapshot(ctx, q.Server, q.Snapshot, p)
	if err != nil {
		return api.FileListing{}, err
	}
	out := api.FileListing{Snapshot: snap.ID, Taken: snap.Taken, Data: snap.IsData(), Path: Text(p), Files: []api.FileInfo{}}
	limit, found := limitOf(q.Limit), p == "/" || snap.IsData() && below(snap.Files.Roots, p)
	h, err := b.items(ctx, snap, true, func(i *Item) error {
		switch {
		case i.Path == p:
			if found = true; i.Kind == fileset.Folder {
				return nil
			}
		case !fileset.Below(i.Path, p):
			if fileset.Compare(i.Path, p) > 0 {
				return errStop
			}
			return nil
		case !q.Recursive && path.Dir(i.Path) != p && !(snap.IsData() && slices.Contains(snap.Files.Roots, i.Path)):
			return nil
		}
		if len(out.Files) == limit {
			out.More = true
			return errStop
		}
		out.Files = append(out.Files, info(i))
		return nil
	})
	if err != nil {
		return out, err
	}
	if out.Notes = h.Notes; !found {
		return out, api.Errorf(api.NotFound, "snapshot %s has no %s", snap.ID, Text(p))
	}
	return out, nil
}

// Find looks for a pattern in every snapshot of a server, newest first.
func (b *Browser) Find(ctx context.Context, q api.FindQuery) (api.FoundFiles, error) {
	out := api.FoundFiles{Found: []api.FoundFile{}, Unseen: []string{}}
	pattern, err := ParsePattern(q.Pattern)
	if err != nil {
		return out, api.Errorf(api.Invalid, "%w", err)
	}
	limit := limitOf(q.Limit)
	err = b.everywhere(ctx, q.Server, q.All, &out.Unseen, func(snap dr.Snapshot, i *Item) error {
		if !pattern.Match(i.Path) {
			return nil
		}
		if len(out.Found) == limit {
			out.More = true
			return errStop
		}
		out.Found = append(out.Found, api.FoundFile{Snapshot: snap.ID, Taken: snap.Taken, FileInfo: info(i)})
		return nil
	}, func(dr.Snapshot) bool { return !out.More })
	return out, err
}

// everywhere calls each for everything in every snapshot of a server, newest first; after says of each whether to go on.
// Images without an index are named in unseen, unless they are to get one.
func (b *Browser) everywhere(ctx context.Context, server string, may bool, unseen *[]string, each func(dr.Snapshot, *Item) error, after func(dr.Snapshot) bool) error {
	all, err := b.history(ctx, server)
	if err != nil {
		return err
	}
	for _, snap := range all {
		if !snap.IsData() && !may && !b.indexed(ctx, snap.ID) {
			*unseen = append(*unseen, snap.ID)
			continue
		}
		if _, err := b.items(ctx, snap, may, func(i *Item) error { return each(snap, i) }); err != nil {
			if errors.Is(err, store.ErrNotFound) { // forgotten meanwhile
				continue
			}
			return fmt.Errorf("look into %s: %w", snap.ID, err)
		}
		if !after(snap) {
			break
		}
	}
	return nil
}

// Versions tells how one file differed over the history, newest first.
func (b *Browser) Versions(ctx context.Context, q api.VersionsQuery) (api.FileHistory, error) {
	p, err := ParsePath(q.Path)
	if err != nil {
		return api.FileHistory{}, api.Errorf(api.Invalid, "%w", err)
	}
	out := api.FileHistory{Path: Text(p), Versions: []api.FileVersion{}, Unseen: []string{}}
	var now *Item
	var last *Item // of the version before
	ever := false
	err = b.everywhere(ctx, q.Server, q.All, &out.Unseen, func(_ dr.Snapshot, i *Item) error {
		if i.Path == p {
			now = i
		}
		if fileset.Compare(i.Path, p) >= 0 {
			return errStop
		}
		return nil
	}, func(snap dr.Snapshot) bool {
		found := now
		now = nil
		if found == nil && !holds(&snap, p) {
			return true // it says nothing of this path
		}
		n := len(out.Versions)
		if n > 0 && sameVersion(last, found) {
			out.Versions[n-1].First, out.Versions[n-1].FirstTaken = snap.ID, snap.Taken
			out.Versions[n-1].Snapshots++
			return true
		}
		v := api.FileVersion{Snapshot: snap.ID, Taken: snap.Taken, First: snap.ID, FirstTaken: snap.Taken, Snapshots: 1, Gone: found == nil}
		if found != nil {
			f := info(found)
			v.File, ever = &f, true
		}
		out.Versions, last = append(out.Versions, v), found
		return len(out.Versions) < MaxLimit
	})
	for n := len(out.Versions); n > 0 && out.Versions[n-1].Gone; n = len(out.Versions) {
		out.Versions = out.Versions[:n-1] // before it was there for the first time
	}
	if err == nil && !ever && len(out.Unseen) == 0 {
		return out, api.Errorf(api.NotFound, "no snapshot of %s has %s", q.Server, Text(p))
	}
	return out, err
}

// sameVersion says whether a file was the same in two snapshots, as far as can be told without reading it.
func sameVersion(a, b *Item) bool {
	if a == nil || b == nil {
		return a == b
	}
	kind := func(i *Item) fileset.Kind {
		if i.Kind == fileset.Link {
			return fileset.File
		}
		return i.Kind
	}
	return kind(a) == kind(b) && (a.Kind == fileset.Link || b.Kind == fileset.Link || a.Size == b.Size) && a.Mtime == b.Mtime && a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID &&
		(a.Kind != fileset.Symlink || a.Target == b.Target) && (a.Content == b.Content || a.Content == "" || b.Content == "")
}

var kinds = map[fileset.Kind]string{fileset.File: "file", fileset.Folder: "folder", fileset.Symlink: "symlink", fileset.Link: "link",
	fileset.CharDev: "char-device", fileset.BlockDev: "block-device", fileset.NamedPipe: "pipe"}

// info describes an item for people.
func info(i *Item) api.FileInfo {
	f := api.FileInfo{Path: Text(i.Path), Kind: kinds[i.Kind], Mode: fmt.Sprintf("%04o", i.Mode), UID: i.UID, GID: i.GID, Size: i.Size, Content: i.Content}
	if t := time.Unix(i.Mtime.Sec, int64(i.Mtime.Nsec)).UTC(); t.Year() > 0 && t.Year() < 10_000 { // what can be written down
		f.Modified = t
	}
	if i.Target != "" {
		f.Target = Text(i.Target)
	}
	return f
}
