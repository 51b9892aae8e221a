package guestfs_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/prerecover/editortest"
	"github.com/musterdr/muster/internal/prerecover/guestfs"
	"github.com/musterdr/muster/internal/vm"
)

// cache keeps the appliance between test runs.
func cache(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("MUSTER_GUESTFS_CACHE"); dir != "" {
		return dir
	}
	return filepath.Join(os.TempDir(), "muster-guestfs-cache")
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// build writes the content into a folder of the host and makes a file system of it.
func build(t *testing.T, c editortest.Content) string {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range c.Folders {
		must(os.MkdirAll(filepath.Join(root, name), 0o755))
	}
	for name, content := range c.Files {
		must(os.MkdirAll(filepath.Join(root, filepath.Dir(name)), 0o755))
		must(os.WriteFile(root+"/"+name, []byte(content), 0o644))
	}
	for name, target := range c.Links {
		must(os.Symlink(target, filepath.Join(root, name)))
	}
	for _, name := range c.Pipes {
		must(syscall.Mkfifo(filepath.Join(root, name), 0o644))
	}
	img := filepath.Join(dir, "base.img")
	run(t, "mke2fs", "-q", "-t", "ext4", "-d", root, "-E", "root_owner=0:0", img, "64M")
	return img
}

func TestGuestfsKeepsTheContract(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to run libguestfs")
	}
	editortest.Run(t, func(t *testing.T, c editortest.Content) prerecover.Guest {
		d := guestfs.Driver{Work: t.TempDir(), Cache: cache(t)}
		g, err := d.Open(context.Background(), t.TempDir(), []vm.Layer{{Path: build(t, c), Format: "raw"}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(g.Abandon)
		return g
	})
}
