package guestfish

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What is missing is said before anything is started, with what to do about it.
func TestAHostThatCannotLookIntoImagesSaysWhatItLacks(t *testing.T) {
	root := t.TempDir()
	write := func(name, content string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o700); err != nil { //nolint:gosec // one of them is to be run
			t.Fatal(err)
		}
	}
	lacks := func(want string) {
		t.Helper()
		if err := ready(root); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	t.Setenv("LIBGUESTFS_PATH", "")
	t.Setenv("SUPERMIN_KERNEL", "")
	t.Setenv("PATH", filepath.Join(root, "bin"))
	lacks("libguestfs-tools")
	write("bin/guestfish", "#!/bin/sh\n")
	lacks("linux-image-amd64")
	write("boot/vmlinuz-6.1.0-1-amd64", "kernel")
	lacks("linux-image-amd64") // its modules
	write("lib/modules/6.1.0-1-amd64/modules.dep", "")
	if err := ready(root); err != nil {
		t.Errorf("a host that does not say what memory it has: %v", err)
	}
	write("proc/meminfo", "MemTotal:        1000000 kB\nMemAvailable:     409600 kB\nSwapFree:         102400 kB\n")
	lacks("needs 640 MiB of memory, and 500 MiB are free")
	write("proc/meminfo", "MemTotal:        1000000 kB\nMemAvailable:     409600 kB\nSwapFree:         409600 kB\n")
	if err := ready(root); err != nil {
		t.Errorf("with swap: %v", err)
	}
}
