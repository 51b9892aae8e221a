package tree_test

import (
	"context"
	"io/fs"
	"testing"

	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/prerecover/editortest"
	"github.com/musterdr/muster/internal/prerecover/tree"
	"github.com/musterdr/muster/internal/vm"
)

func TestTreeKeepsTheContract(t *testing.T) {
	editortest.Run(t, func(t *testing.T, c editortest.Content) prerecover.Guest {
		f := &tree.Filesystem{Device: prerecover.Device{Name: "/dev/sda", Type: "ext4"}}
		for name, content := range c.Files {
			f.File(name, []byte(content), 0o644)
		}
		for name, target := range c.Links {
			f.Link(name, target)
		}
		for _, name := range c.Folders {
			f.Folder(name)
		}
		for _, name := range c.Pipes {
			f.Special(name, fs.ModeNamedPipe|0o644)
		}
		system := &tree.System{Disks: []prerecover.Disk{{Name: "/dev/sda"}}, Filesystems: []*tree.Filesystem{f}}
		g, err := tree.Opener{System: system}.Open(context.Background(), t.TempDir(), []vm.Layer{{}})
		if err != nil {
			t.Fatal(err)
		}
		return g
	})
}
