package folder_test

import (
	"path/filepath"
	"testing"

	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
	"github.com/musterdr/muster/internal/store/storetest"
)

func TestFolderKeepsThePromisesOfAStore(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) store.Driver {
		return folder.Driver{Path: filepath.Join(t.TempDir(), "store")}
	})
}

func TestSnapshotsGetFromFolderToFolder(t *testing.T) {
	t.Parallel()
	open := func(t *testing.T) store.Driver { return folder.Driver{Path: filepath.Join(t.TempDir(), "store")} }
	storetest.RunReplication(t, open, open)
}
