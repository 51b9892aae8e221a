package lab

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing/fstest"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/master"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// fresh is an installation that has been made and never started, as files: an empty store and two databases with their
// tables. To derive the store's key and to make the tables is most of the work of a lab, and the same for every one.
var fresh = sync.OnceValues(func() (_ fs.FS, err error) {
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l := Lab{Dir: dir}
	ctx := context.Background()
	if err := store.Create(ctx, folder.Driver{Path: l.StoreFolder()}, password); err != nil {
		return nil, err
	}
	cat, err := catalog.Open(ctx, l.path(catalogFile))
	if err != nil {
		return nil, err
	}
	if err := cat.Close(); err != nil {
		return nil, err
	}
	eng, err := engine.Open(ctx, engine.Config{DSN: l.path(engineFile), Version: master.Shape, Logger: quiet})
	if err != nil {
		return nil, err
	}
	if err := eng.Close(ctx); err != nil {
		return nil, err
	}
	files := fstest.MapFS{}
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		file := &fstest.MapFile{Mode: info.Mode()}
		if info.Mode().IsRegular() {
			if file.Data, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		name, err := filepath.Rel(dir, path)
		files[name] = file
		return err
	})
	return files, err
})

var quiet = slog.New(slog.DiscardHandler)
