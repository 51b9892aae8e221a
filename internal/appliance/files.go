package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/files"
	"github.com/musterdr/muster/internal/fileset"
)

// Limits of putting back.
const (
	maxPaths    = 1000
	maxRestored = 100_000 // files that are named in an answer
)

// errFar is for whoever asks an appliance for what only a master can do.
var errFar = api.Errorf(api.Invalid, "this appliance looks into its own store: ask the master for what is in the far one")

// ListFiles implements api.Files.
func (a *Appliance) ListFiles(ctx context.Context, q api.FilesQuery) (api.FileListing, error) {
	if q.Far {
		return api.FileListing{}, errFar
	}
	return a.Browser.List(ctx, q)
}

// FindFiles implements api.Files.
func (a *Appliance) FindFiles(ctx context.Context, q api.FindQuery) (api.FoundFiles, error) {
	if q.Far {
		return api.FoundFiles{}, errFar
	}
	return a.Browser.Find(ctx, q)
}

// FileVersions implements api.Files.
func (a *Appliance) FileVersions(ctx context.Context, q api.VersionsQuery) (api.FileHistory, error) {
	if q.Far {
		return api.FileHistory{}, errFar
	}
	return a.Browser.Versions(ctx, q)
}

// GetFile implements api.Files.
func (a *Appliance) GetFile(ctx context.Context, q api.GetQuery, w io.Writer) error {
	if q.Far {
		return errFar
	}
	return a.Browser.Get(ctx, q, w)
}

// server finds a protected server by its name or identifier, in the store: no master is asked.
func (a *Appliance) server(ctx context.Context, name string) (found dr.Server, err error) {
	err = a.Store.Records(ctx, dr.ServerRecord, func(_ string, raw json.RawMessage) error {
		var s dr.Server
		if err := json.Unmarshal(raw, &s); err != nil {
			return err
		}
		if s.Name == name || s.ID == name {
			found = s
		}
		return nil
	})
	if err == nil && found.ID == "" {
		err = api.Errorf(api.NotFound, "%q is no protected server: see 'muster server list'", name)
	}
	return found, err
}

// RestoreFiles implements api.Files.
func (a *Appliance) RestoreFiles(ctx context.Context, r api.RestoreRequest) (api.Restored, error) {
	if r.Far {
		return api.Restored{}, errFar
	}
	p, err := place(r)
	if err != nil {
		return api.Restored{}, api.Errorf(api.Invalid, "%w", err)
	}
	if r.ToServer == "" {
		r.ToServer = r.Server
	}
	to, err := a.server(ctx, r.ToServer)
	if err != nil {
		return api.Restored{}, err
	}
	return a.restore(ctx, r, p, to)
}

// RestoreOnto puts files back on a server that the store need not know.
func (a *Appliance) RestoreOnto(ctx context.Context, r api.RestoreRequest, to dr.Server) (api.Restored, error) {
	p, err := place(r)
	if err != nil {
		return api.Restored{}, api.Errorf(api.Invalid, "%w", err)
	}
	return a.restore(ctx, r, p, to)
}

func (a *Appliance) restore(ctx context.Context, r api.RestoreRequest, p placing, to dr.Server) (api.Restored, error) {
	snap, err := a.Browser.Snapshot(ctx, r.Server, r.Snapshot, p.paths...)
	if err != nil {
		return api.Restored{}, err
	}
	if r.ToPath == "" && to.ID != snap.ServerID {
		return api.Restored{}, api.Errorf(api.Invalid, "put files of %s onto %s: give a folder there with --to-path", snap.Server, to.Name)
	}
	src, err := a.Open(ctx, to.Source)
	if err != nil {
		return api.Restored{}, err
	}
	defer src.Close()
	dst, ok := src.(capture.RestoreSource)
	if !ok {
		return api.Restored{}, api.Errorf(api.Invalid, "put files onto %s: only a server that is reached with --ssh can be written to: fetch them with 'muster files %s get'", to.Name, r.Server)
	}
	rec := a.begun(ctx, r, p, snap, to)
	out, err := a.putBack(ctx, dst, r, p, snap, to)
	a.ended(ctx, rec, out, err)
	return out, err
}

// putBack puts files of a snapshot onto a server. That some were put back before it broke off is no error.
func (a *Appliance) putBack(ctx context.Context, dst capture.RestoreSource, r api.RestoreRequest, p placing, snap dr.Snapshot, to dr.Server) (api.Restored, error) {
	out := api.Restored{Snapshot: snap.ID, Taken: snap.Taken, ToServer: to.Name, Files: []api.RestoredFile{}}
	plan := capture.RestorePlan{Overwrite: r.Overwrite, Suffix: ".restored-" + snap.Taken.UTC().Format("20060102T150405Z")}
	feed := func(ctx context.Context, put func(*fileset.Entry, bool, io.Reader) error) error {
		return a.Browser.Pick(ctx, snap, p.paths, func(e *fileset.Entry, above bool, content io.Reader) error {
			out.Bytes += e.Stored()
			return p.put(e, above, content, put)
		})
	}
	err := dst.Restore(ctx, plan, feed, func(f capture.Placed) error {
		count(&out, f)
		return nil
	})
	if err != nil {
		err = fmt.Errorf("put files of %s onto %s: %w", snap.ID, to.Name, err)
		if len(out.Files) > 0 {
			out.Error, err = err.Error(), nil
		}
	}
	return out, err
}

// count adds what became of one file.
func count(out *api.Restored, f capture.Placed) {
	switch f.What {
	case "restored":
		out.Restored++
	case "replaced":
		out.Replaced++
	case "beside":
		out.Beside++
	case "there":
	default:
		f.What = "failed"
		out.Failed++
	}
	if len(out.Files) < maxRestored {
		out.Files = append(out.Files, api.RestoredFile{Path: files.Text(string(f.Path)), As: files.Text(string(f.As)), What: f.What, Note: f.Note})
	}
}

// placing says where things go.
type placing struct {
	paths []string // in the snapshot; none lies below another
	to    string   // folder on the server; "": their own places
}

func place(r api.RestoreRequest) (p placing, err error) {
	if len(r.Paths) == 0 || len(r.Paths) > maxPaths {
		return p, fmt.Errorf("put back %d paths: name 1 to %d", len(r.Paths), maxPaths)
	}
	if r.ToPath != "" {
		if p.to, err = files.ParsePath(r.ToPath); err != nil {
			return p, err
		}
	}
	for _, text := range r.Paths {
		one, err := files.ParsePath(text)
		switch {
		case err != nil:
			return p, err
		case one == "/":
			return p, errors.New("put back /: that is the whole system: run it with 'muster invoke', or name what you want of it")
		case strings.HasPrefix(one, "/@") && p.to == "":
			return p, fmt.Errorf("put back %s: it is on a file system that the server does not mount: give a folder with --to-path", text)
		}
		p.paths = append(p.paths, one)
	}
	slices.SortFunc(p.paths, fileset.Compare)
	p.paths = slices.CompactFunc(p.paths, func(a, b string) bool { return fileset.Below(b, a) })
	names := map[string]string{}
	for _, one := range p.paths {
		if other, twice := names[path.Base(one)]; twice && p.to != "" {
			return p, fmt.Errorf("put back %s and %s: in one folder they would have the same name; do it one after the other", files.Text(other), files.Text(one))
		}
		names[path.Base(one)] = one
	}
	return p, nil
}

// put gives an entry its place.
func (p placing) put(e *fileset.Entry, above bool, content io.Reader, put func(*fileset.Entry, bool, io.Reader) error) error {
	if p.to == "" {
		return put(e, above, content)
	}
	if above {
		return nil
	}
	moved := *e
	moved.Path = p.moved(e.Path)
	if e.Kind == fileset.Link {
		moved.Target = p.moved(e.Target)
	}
	return put(&moved, false, content)
}

func (p placing) moved(name string) string {
	for _, one := range p.paths {
		if fileset.Below(name, one) {
			return path.Join(p.to, path.Base(one)) + name[len(one):]
		}
	}
	return path.Join(p.to, path.Base(name)) // not reached: a link leads to what was chosen
}
