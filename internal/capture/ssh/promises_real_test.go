package ssh

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/capturetest"
)

// The promises of a source, kept by the agent where this machine's kernel notes what is written to block devices: while a
// snapshot is taken, and from one to the next.
func TestRealTrackedDisksKeepThePromisesOfASource(t *testing.T) {
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root and loop devices: set MUSTER_REAL=1")
	}
	for name, resident := range map[string]bool{"WhileASnapshotIsTaken": false, "FromOneSnapshotToTheNext": true} {
		t.Run(name, func(t *testing.T) {
			var one sync.Mutex // a server has one tracker
			capturetest.Run(t, func(t *testing.T) *capturetest.Bench {
				one.Lock()
				t.Cleanup(one.Unlock)
				h, source := newHost(t)
				source.Resident = resident
				b := &capturetest.Bench{Store: shared, Sends: true, Tracks: resident, Cut: h.line}
				var files []string
				for i, name := range []string{"a", "b"} {
					file := filepath.Join(t.TempDir(), name)
					capturetest.Fill(t, file, uint64(i))
					device := command(t, "losetup", "--find", "--show", file)
					t.Cleanup(func() { command(t, "losetup", "--detach", device) })
					files, b.Disks = append(files, file), append(b.Disks, device)
				}
				source.Disks = b.Disks
				b.Grow = func(t *testing.T, disk int) {
					capturetest.Append(t, files[disk])
					command(t, "losetup", "--set-capacity", b.Disks[disk])
				}
				b.Open = func(t *testing.T) capture.Source { return h.open(t, source) }
				t.Cleanup(func() {
					s, err := Open(context.Background(), source, program) // that of the test is over
					if err != nil {
						t.Fatal(err)
					}
					defer s.Close()
					s.cache = h.cache
					if err := s.Forget(context.Background()); err != nil {
						t.Error(err)
					}
				})
				return b
			})
		})
	}
}
