package master

import (
	"context"
	"io"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
)

// FarFiles looks into a customer's far store, and puts files of it onto servers that this process itself reaches.
type FarFiles interface {
	api.Files
	// RestoreOnto is RestoreFiles for a server that the store need not know.
	RestoreOnto(ctx context.Context, r api.RestoreRequest, to dr.Server) (api.Restored, error)
}

// Files answers what people ask of what is in snapshots: own for servers that this process captures, their appliances for others, and
// far, which is given whose store it is, where it is asked for.
func (m *Master) Files(own api.Files, far func(customer string, st *store.Store) FarFiles) api.Files {
	return siteFiles{m, own, far}
}

type siteFiles struct {
	m   *Master
	own api.Files
	far func(customer string, st *store.Store) FarFiles
}

// ask asks whoever answers for a server. Of one whose appliance cannot, it says how to do without.
func ask[T any](ctx context.Context, f siteFiles, server string, far bool, do func(api.Files) (T, error)) (out T, err error) {
	s, err := f.m.Catalog.Server(ctx, server)
	if err != nil || s.Appliance == "" {
		return do(f.own) // a server that was removed is known to the store still
	}
	if far {
		files, err := f.farOf(ctx, s)
		if err != nil {
			return out, err
		}
		return do(files)
	}
	site, err := f.m.site(s.Appliance)
	if err == nil {
		out, err = do(site)
	}
	if api.KindOf(err) == api.Unavailable {
		err = api.Errorf(api.Unavailable, "%w; 'muster files %s … --far' looks into the far store", err, s.Name)
	}
	return out, err
}

func (f siteFiles) farOf(ctx context.Context, s dr.Server) (FarFiles, error) {
	st, err := f.m.storeOf(ctx, s)
	if err != nil {
		return nil, err
	}
	return f.far(s.StoredFor(), st), nil
}

// ListFiles implements api.Files.
func (f siteFiles) ListFiles(ctx context.Context, q api.FilesQuery) (api.FileListing, error) {
	far := q.Far
	q.Far = false
	return ask(ctx, f, q.Server, far, func(of api.Files) (api.FileListing, error) { return of.ListFiles(ctx, q) })
}

// FindFiles implements api.Files.
func (f siteFiles) FindFiles(ctx context.Context, q api.FindQuery) (api.FoundFiles, error) {
	far := q.Far
	q.Far = false
	return ask(ctx, f, q.Server, far, func(of api.Files) (api.FoundFiles, error) { return of.FindFiles(ctx, q) })
}

// FileVersions implements api.Files.
func (f siteFiles) FileVersions(ctx context.Context, q api.VersionsQuery) (api.FileHistory, error) {
	far := q.Far
	q.Far = false
	return ask(ctx, f, q.Server, far, func(of api.Files) (api.FileHistory, error) { return of.FileVersions(ctx, q) })
}

// GetFile implements api.Files.
func (f siteFiles) GetFile(ctx context.Context, q api.GetQuery, w io.Writer) error {
	far := q.Far
	q.Far = false
	_, err := ask(ctx, f, q.Server, far, func(of api.Files) (struct{}, error) { return struct{}{}, of.GetFile(ctx, q, w) })
	return err
}

// RestoreFiles implements api.Files. An appliance reaches its own servers only, and so does the master.
func (f siteFiles) RestoreFiles(ctx context.Context, r api.RestoreRequest) (api.Restored, error) {
	from, err := f.m.Catalog.Server(ctx, r.Server)
	if err == nil && r.Far && from.Appliance != "" {
		return f.restoreFar(ctx, r, from)
	}
	if err == nil && r.ToServer != "" {
		if to, err := f.m.Catalog.Server(ctx, r.ToServer); err == nil && to.Appliance != from.Appliance {
			return api.Restored{}, api.Errorf(api.Invalid, "put files of %s onto %s: they have different appliances, and each reaches its own servers only; fetch the files with 'muster files %s get'", from.Name, to.Name, from.Name)
		}
	}
	r.Far = false
	return ask(ctx, f, r.Server, false, func(of api.Files) (api.Restored, error) { return of.RestoreFiles(ctx, r) })
}

func (f siteFiles) restoreFar(ctx context.Context, r api.RestoreRequest, from dr.Server) (api.Restored, error) {
	to := from
	if r.ToServer != "" {
		var err error
		if to, err = f.m.server(ctx, r.ToServer); err != nil {
			return api.Restored{}, err
		}
	}
	if to.Appliance != "" {
		return api.Restored{}, api.Errorf(api.Invalid, "put files of %s onto %s from the far store: only appliance %s reaches it; name a server of the master's own with --to-server, or fetch the files with 'muster files %s get … --far'",
			from.Name, to.Name, to.Appliance, from.Name)
	}
	files, err := f.farOf(ctx, from)
	if err != nil {
		return api.Restored{}, err
	}
	r.Far = false
	return files.RestoreOnto(ctx, r, to)
}
