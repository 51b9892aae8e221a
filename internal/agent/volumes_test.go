//go:build linux

package agent

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/track"
	"github.com/musterdr/muster/internal/capture/view"
	"github.com/musterdr/muster/internal/capture/wire"
)

// The volume of this disk begins and ends within blocks. Both stages together are the disk at the instant of the snapshot,
// although everything that the snapshot holds changes before it is read.
func TestADiskWithASnapshotIsReadInTwoStagesEachBlockInOne(t *testing.T) {
	path, content := newFile(t)
	d, err := linux.OpenDisk(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	seed := wire.NewSeed()
	disks := []*disk{newDisk(0, d, 1)}
	if err := disks[0].know(wire.Known{Seed: seed[:], BlockSize: blockSize}); err != nil {
		t.Fatal(err)
	}
	volume := view.Range{Offset: 3*blockSize + 512, Length: 25 * blockSize}
	snapshot := bytes.Repeat([]byte("snapshot"), int(volume.Length)/8)
	want := slices.Clone(content)
	copy(want[volume.Offset:], snapshot)
	disks[0].view, err = view.New(d, d.Size, []view.Part{{Range: volume, From: bytes.NewReader(snapshot)}})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	r := newRun(wire.NewWriter(&out), wire.Plan{}, Agent{}, disks)
	disks[0].only(disks[0].view.Rest())
	if _, err := r.pass(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	first := r.read
	disks[0].others()
	if _, err := r.pass(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if r.read != d.Size || first != d.Size-24*blockSize {
		t.Errorf("%d bytes were read first and %d in all, of %d", first, r.read, d.Size)
	}
	if err := errors.Join(r.w.Flush(), r.done(t.Context(), linux.Held{Since: time.Now()})); err != nil {
		t.Fatal(err)
	}
	image, have := make([]byte, len(content)), &child{r: wire.NewReader(&out)}
	got, _ := wire.NewSums(seed, blockSize, d.Size)
	if have.receive(t, image, got); !bytes.Equal(image, want) {
		t.Error("the two stages do not make the disk at the instant of the snapshot")
	}
}

func TestSnapshotsAreMadeOnlyWhereTheyAreAllowed(t *testing.T) {
	tracked := &disk{follower: follower{track: &track.Disk{}}}
	for want, r := range map[string]*run{
		"":                  {plan: wire.Plan{Volumes: true}, disks: []*disk{{}}},
		"--allow-snapshots": {disks: []*disk{{}}},
		"are tracked":       {plan: wire.Plan{Volumes: true}, disks: []*disk{{}, tracked}},
	} {
		err := r.mayUse("vg/home")
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
