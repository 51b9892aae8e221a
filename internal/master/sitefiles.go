package master

import (
	"context"
	"io"

	"github.com/musterdr/muster/internal/api"
)

// sitesFiles asks the appliance of the server that is asked about.
type sitesFiles struct {
	m   *Master
	own api.Files // of this process's store
}

func (f sitesFiles) of(ctx context.Context, server string) (api.Files, error) {
	s, err := f.m.Catalog.Server(ctx, server)
	if err != nil || s.Appliance == "" {
		return f.own, nil // a server that was removed is known to the store still
	}
	return f.m.site(s.Appliance)
}

// ListFiles implements api.Files.
func (f sitesFiles) ListFiles(ctx context.Context, q api.FilesQuery) (api.FileListing, error) {
	files, err := f.of(ctx, q.Server)
	if err != nil {
		return api.FileListing{}, err
	}
	return files.ListFiles(ctx, q)
}

// FindFiles implements api.Files.
func (f sitesFiles) FindFiles(ctx context.Context, q api.FindQuery) (api.FoundFiles, error) {
	files, err := f.of(ctx, q.Server)
	if err != nil {
		return api.FoundFiles{}, err
	}
	return files.FindFiles(ctx, q)
}

// FileVersions implements api.Files.
func (f sitesFiles) FileVersions(ctx context.Context, q api.VersionsQuery) (api.FileHistory, error) {
	files, err := f.of(ctx, q.Server)
	if err != nil {
		return api.FileHistory{}, err
	}
	return files.FileVersions(ctx, q)
}

// GetFile implements api.Files.
func (f sitesFiles) GetFile(ctx context.Context, q api.GetQuery, w io.Writer) error {
	files, err := f.of(ctx, q.Server)
	if err != nil {
		return err
	}
	return files.GetFile(ctx, q, w)
}

// RestoreFiles implements api.Files. An appliance reaches its own servers only.
func (f sitesFiles) RestoreFiles(ctx context.Context, r api.RestoreRequest) (api.Restored, error) {
	from, err := f.m.Catalog.Server(ctx, r.Server)
	if err == nil && r.ToServer != "" {
		if to, err := f.m.Catalog.Server(ctx, r.ToServer); err == nil && to.Appliance != from.Appliance {
			return api.Restored{}, api.Errorf(api.Invalid, "put files of %s onto %s: they have different appliances, and each reaches its own servers only; fetch the files with 'muster files %s get'", from.Name, to.Name, from.Name)
		}
	}
	files, err := f.of(ctx, r.Server)
	if err != nil {
		return api.Restored{}, err
	}
	return files.RestoreFiles(ctx, r)
}
