package image

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestListenReplacesAStaleSocketAndOnlyThat(t *testing.T) {
	dir, err := os.MkdirTemp("", "listen")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")

	l, err := Listen(path, 0o660, os.Getgid())
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != fs.ModeSocket|0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := Listen(path, 0o600, -1); err == nil || !strings.Contains(err.Error(), "serves this socket") {
		t.Errorf("a live socket: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as after a crash
	_ = l.Close()
	again, err := Listen(path, 0o600, -1)
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	_ = again.Close()
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, 0o600, -1); err == nil {
		t.Error("replaced a file")
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file is gone")
	}
}

func TestListenSaysWhichPathsCannotBe(t *testing.T) {
	long := "/" + strings.Repeat("x", MaxSocketPath)
	if _, err := Listen(long, 0o600, -1); err == nil || !strings.Contains(err.Error(), "at most 107 bytes, this one has 108") {
		t.Errorf("too long: %v", err)
	}
	for _, bad := range []string{"", "@abstract", "a\x00b"} {
		if l, err := Listen(bad, 0o600, -1); err == nil {
			_ = l.Close()
			t.Errorf("listens on %q", bad)
		}
	}
}
