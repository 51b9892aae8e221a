package ssh

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/linux/hooks/hookstest"
	"github.com/musterdr/muster/internal/dr"
)

func TestRealADatabaseIsAtRestInASnapshotTakenThroughSSH(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root, sshd, loop devices and PostgreSQL: set MUSTER_REAL=1")
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
	pg := hookstest.Postgres(t, filepath.Join(mount, "pg"))
	pg.Write(t)
	source := sshd(t)
	source.Disks = []string{device}
	take := func(h dr.Hooks) dr.Snapshot {
		source.Hooks = h
		s, err := Open(t.Context(), source, program)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.cache = filepath.Join(dir, "cache", "muster")
		snap, err := capture.Take(t.Context(), s, shared, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: "srv-1", Name: "web"}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return snap
	}
	snap := take(dr.Hooks{Limit: time.Minute})
	if snap.Consistency != dr.ApplicationConsistent || len(snap.Applications) != 1 || !strings.Contains(snap.Applications[0].Name, pg.Socket) {
		t.Errorf("%s: %+v, %q", snap.Consistency, snap.Applications, snap.Notes)
	}
	if snap := take(dr.Hooks{Off: true}); snap.Consistency != dr.FilesystemConsistent || len(snap.Applications) != 0 {
		t.Errorf("with hooks off: %s, %+v", snap.Consistency, snap.Applications)
	}
}
