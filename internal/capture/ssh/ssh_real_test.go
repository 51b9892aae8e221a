package ssh

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/musterdr/muster/internal/agent"
	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
)

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// sshd starts the system's own SSH server on the loopback with throw-away keys.
func sshd(t *testing.T) dr.SSHSource {
	t.Helper()
	dir := t.TempDir()
	hostKey, hostFile := newKey(t)
	login, keyFile := newKey(t)
	authorized := filepath.Join(dir, "authorized_keys")
	if err := os.WriteFile(authorized, ssh.MarshalAuthorizedKey(login.PublicKey()), 0o600); err != nil {
		t.Fatal(err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	config := filepath.Join(dir, "sshd_config")
	text := fmt.Sprintf("ListenAddress 127.0.0.1\nHostKey %s\nAuthorizedKeysFile %s\nStrictModes no\nPermitRootLogin prohibit-password\nPidFile none\nUsePAM no\n", hostFile, authorized)
	if err := errors.Join(os.WriteFile(config, []byte(text), 0o600), os.MkdirAll("/run/sshd", 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/usr/sbin/sshd", "-f", config, "-D", "-e", "-p", fmt.Sprint(port))
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("sshd said:\n%s", log.String())
		}
	})
	for limit := time.Now().Add(10 * time.Second); ; {
		if c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			c.Close()
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("sshd does not listen: %s", log.String())
		}
		<-time.After(20 * time.Millisecond)
	}
	return dr.SSHSource{User: "root", Host: "127.0.0.1", Port: port, KeyFile: keyFile,
		HostKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(hostKey.PublicKey())))}
}

func TestRealServerIsCapturedThroughItsOwnSSH(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root, sshd and loop devices: set MUSTER_REAL=1")
	}
	dir := t.TempDir()
	file, mount := filepath.Join(dir, "disk.img"), filepath.Join(dir, "mnt")
	if err := errors.Join(os.Mkdir(mount, 0o755), os.WriteFile(file, nil, 0o600), os.Truncate(file, 300<<20)); err != nil {
		t.Fatal(err)
	}
	device := command(t, "losetup", "--find", "--show", file)
	t.Cleanup(func() { command(t, "losetup", "--detach", device) })
	command(t, "mkfs.ext4", "-q", device)
	command(t, "mount", device, mount)
	t.Cleanup(func() { command(t, "umount", mount) })
	write := func(name string, size int) {
		if err := os.WriteFile(filepath.Join(mount, name), bytes.Repeat([]byte(name), size/len(name)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("before", 20<<20)

	source := sshd(t)
	source.Disks = []string{device}
	cache := filepath.Join(dir, "cache", "muster")
	capture1 := func(parent string) dr.Snapshot {
		s, err := Open(t.Context(), source, program)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.cache = cache
		snap, err := capture.Take(t.Context(), s, shared, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: "srv-1", Name: "web"}, Parent: parent}, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s pass %s: read %d MB, sent %d kB, changed %d kB, stored %d kB, frozen %s, took %s", snap.Consistency, snap.Pass.Kind,
			snap.Stats.Read>>20, snap.Stats.Sent>>10, snap.Stats.Changed>>10, snap.Stats.Stored>>10, snap.Stats.Frozen, snap.Stats.Duration)
		return snap
	}
	first := capture1("")
	if first.Consistency != dr.FilesystemConsistent || first.Stats.Frozen <= 0 || first.Inventory.Kernel == "" {
		t.Errorf("first: %s, %+v", first.Consistency, first.Stats)
	}
	write("after", 1<<20)
	second := capture1(first.ID)
	if second.Parent != first.ID || second.Stats.Changed > 8<<20 || second.Stats.Sent > 8<<20 {
		t.Errorf("second: parent %q, %+v", second.Parent, second.Stats)
	}
	image := filepath.Join(dir, "image")
	img, err := shared.Image(t.Context(), second.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	out, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, io.NewSectionReader(img, 0, img.Size())); err != nil {
		t.Fatal(err)
	}
	out.Close()
	command(t, "e2fsck", "-fn", image)
	for _, name := range []string{"before", "after"} {
		want, _ := os.ReadFile(filepath.Join(mount, name))
		got, err := exec.Command("debugfs", "-R", "cat /"+name, image).Output()
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s in the image: %d bytes, want %d, %v", name, len(got), len(want), err)
		}
	}
	// The server can be written to, and keeps nothing but the agent.
	write("later", 1<<10)
	if left, err := os.ReadDir(cache); err != nil || len(left) != 1 {
		t.Errorf("left on the server: %v, %v", left, err)
	}

	// With what is written noted in its kernel the next one compares, and the one after it reads only that.
	source.Resident = true
	third := capture1(second.ID)
	if third.Pass.Kind != dr.PassCompare || third.Pass.Reason == "" {
		t.Errorf("third: pass %+v", third.Pass)
	}
	write("tracked", 1<<20)
	fourth := capture1(third.ID)
	// Some kernels leave out writes; then everything is compared, and that is said.
	if fourth.Pass.Kind != dr.PassTracked && !strings.Contains(fourth.Pass.Reason, "unbalanced") || fourth.Pass.Kind == dr.PassTracked && fourth.Stats.Read > 50<<20 {
		t.Errorf("fourth: pass %+v, %+v", fourth.Pass, fourth.Stats)
	}
	s, err := Open(t.Context(), source, program)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.cache = cache
	if err := s.Forget(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{cache, filepath.Dir(agent.DefaultTrackDir)} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left on the server: %v", path, err)
		}
	}
}
