//go:build linux

package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/track"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// trackDir is where the agents of these tests have their tracker; other tests may run beside them.
var trackDir = sync.OnceValue(func() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("muster-track-%d-%d", os.Getpid(), time.Now().UnixNano()))
})

// chainOf is a volume captured again and again by agents that track it, each in a process of its own.
type chainOf struct {
	v     *volume
	w     *writer
	image []byte
	sums  *wire.Sums
	kept  []string // newest first
	n     int
}

func newChain(t *testing.T, fstype string, size int64) *chainOf {
	t.Helper()
	if err := track.Supported(); err != nil {
		t.Fatalf("this machine runs the real tests, so it tracks: %v", err)
	}
	v := newVolume(t, fstype, size)
	t.Cleanup(func() {
		if err := track.Remove(trackDir()); err != nil {
			t.Error(err)
		}
	})
	return &chainOf{v: v, w: v.write(t), image: make([]byte, size), sums: v.sums(t)}
}

// capture takes a snapshot and examines it. Without keep the appliance goes away before it says that the snapshot is safe.
func (c *chainOf) capture(t *testing.T, keep bool) (wire.Disk, wire.Done) {
	t.Helper()
	agent := startIn(t, trackDir())
	c.n++
	id, before := fmt.Sprintf("snap-%d", c.n), c.w.acked.Load()
	plan := wire.Plan{Disks: []string{c.v.device}, FreezeLimit: 20 * time.Second, Track: true, Snapshot: id, Since: c.kept}
	image := append([]byte(nil), c.image...)
	disk := agent.follow(t, plan, c.sums)
	_, done := agent.receive(t, image, c.sums)
	after := c.w.acked.Load()
	if done.Consistency != dr.FilesystemConsistent || len(done.Reasons) != 1 {
		t.Errorf("done: %+v", done)
	}
	if keep {
		if err := agent.w.Kept(); err != nil {
			t.Fatal(err)
		}
		if err := agent.cmd.Wait(); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		c.image, c.kept = image, append([]string{id}, c.kept...)
	} else {
		agent.in.Close()
		_ = agent.cmd.Wait()
		c.sums = c.v.sums(t) // what was received is thrown away, and nothing is compared with it
	}
	c.v.examine(t, image, before, after)
	return disk, done
}

// follow begins a capture, blind where the agent knows what was written.
func (c *child) follow(t *testing.T, plan wire.Plan, sums *wire.Sums) wire.Disk {
	t.Helper()
	if err := c.w.Message(wire.KindAskCapture, plan); err != nil {
		t.Fatal(err)
	}
	var layout wire.Layout
	c.hear(t, wire.KindLayout, &layout)
	d := layout.Disks[0]
	c.blind = d.Tracked
	if err := c.w.Message(wire.KindKnown, wire.Known{BlockSize: sums.BlockSize, Seed: sums.Seed[:], Blind: d.Tracked}); err != nil {
		t.Fatal(err)
	}
	if !d.Tracked {
		if err := c.w.Sums(0, sums); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.w.Go(); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestRealIncrementsReadOnlyWhatWasWrittenAndHoldAllOfIt(t *testing.T) {
	real(t)
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			c := newChain(t, fstype, 400<<20)
			if disk, done := c.capture(t, true); disk.Tracked || done.Reasons[0] == "" {
				t.Errorf("the first capture: tracked %v, %q", disk.Tracked, done.Reasons)
			}
			const increments = 7
			var worst time.Duration
			unseen := 0
			for n := range increments {
				c.w.await(t, 20)
				keep := n%5 != 3 // now and then a snapshot is not kept: the next one holds what it would have held
				disk, done := c.capture(t, keep)
				// Some kernels do not run the programs in every interrupt. Then everything is read, and that is said.
				if strings.HasPrefix(disk.Reason, string(track.Unbalanced)) || strings.HasPrefix(done.Reasons[0], string(track.Unbalanced)) {
					unseen++
				} else if !disk.Tracked || done.Reasons[0] != "" || done.Read > 64<<20 {
					t.Errorf("increment %d: tracked %v (%s), %q, %d MiB read", n, disk.Tracked, disk.Reason, done.Reasons[0], done.Read>>20)
				}
				worst = max(worst, done.Frozen)
			}
			if unseen > increments/2 {
				t.Errorf("%d of %d increments could not be proved", unseen, increments)
			}
			t.Logf("%d increments, %d of them compared, the longest freeze %s; the writer stood still for at most %s", increments, unseen, worst, time.Duration(c.w.worst.Load()))
		})
	}
}

func TestRealWhatIsNotKnownIsComparedAsAWhole(t *testing.T) {
	real(t)
	c := newChain(t, "ext4", 200<<20)
	c.capture(t, true)
	if err := track.Remove(trackDir()); err != nil { // as a reboot does
		t.Fatal(err)
	}
	c.w.await(t, 20)
	if disk, done := c.capture(t, true); disk.Tracked || disk.Reason == "" || done.Reasons[0] == "" {
		t.Errorf("after a reboot: %+v, %q", disk, done.Reasons)
	}
	c.w.await(t, 20)
	if disk, done := c.capture(t, true); !disk.Tracked {
		t.Errorf("the next one: %+v, %q", disk, done.Reasons)
	}
	// The appliance builds on a snapshot of which the server knows nothing.
	c.kept, c.sums = []string{"snap-of-another-time"}, c.v.sums(t)
	c.w.await(t, 20)
	if disk, _ := c.capture(t, true); disk.Tracked || disk.Reason == "" {
		t.Errorf("on a foreign snapshot: %+v", disk)
	}
}

// What is free may be anything: garbage there changes nothing that the file system holds.
func TestRealWhatIsFreeHoldsNothing(t *testing.T) {
	real(t)
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			v := newVolume(t, fstype, 400<<20)
			want := map[string][]byte{}
			random := rand.New(rand.NewPCG(1, 2))
			for i := range 200 {
				name, data := fmt.Sprintf("dir-%d/file-%d", i%7, i), make([]byte, random.IntN(600<<10))
				for j := range data {
					data[j] = byte(random.Uint32())
				}
				path := filepath.Join(v.mount, name)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
					t.Fatal(err)
				}
				if want[name] = data; i%3 == 0 { // what was there and is gone
					if err := os.Remove(path); err != nil {
						t.Fatal(err)
					}
					delete(want, name)
				}
			}
			command(t, "sync", "-f", v.mount)
			free, err := linux.Free(filepath.Base(v.device))
			if err != nil {
				t.Fatal(err)
			}
			command(t, "fsfreeze", "-f", v.mount)
			image, err := os.ReadFile(v.device)
			command(t, "fsfreeze", "-u", v.mount)
			if err != nil {
				t.Fatal(err)
			}
			var total int64
			for _, f := range free {
				total += f.Length
				copy(image[f.Offset:f.Offset+f.Length], bytes.Repeat([]byte("garbage."), int(f.Length)/8))
			}
			if total < 200<<20 && fstype != "btrfs" || total < 60<<20 {
				t.Errorf("only %d MiB of %d are free, in %d pieces", total>>20, v.size>>20, len(free))
			}
			file, at := filepath.Join(t.TempDir(), "image"), filepath.Join(t.TempDir(), "mnt")
			if err := errors.Join(os.WriteFile(file, image, 0o600), os.Mkdir(at, 0o755)); err != nil {
				t.Fatal(err)
			}
			options := "loop"
			switch fstype {
			case "ext4":
				command(t, "e2fsck", "-fn", file)
			case "xfs":
				options += ",nouuid"
			case "btrfs": // which takes two devices of one identity for one
				command(t, "btrfs", "check", "--readonly", file)
				command(t, "btrfstune", "-f", "-u", file)
			}
			command(t, "mount", "-o", options, file, at)
			defer command(t, "umount", at)
			for name, data := range want {
				if got, err := os.ReadFile(filepath.Join(at, name)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s is not what was written: %v", name, err)
				}
			}
		})
	}
}

// An agent that leaves nothing behind tracks what is written while it reads, and its freeze is short for it.
func TestRealACaptureThatLeavesNothingBehindIsFrozenForAMoment(t *testing.T) {
	real(t)
	v := newVolume(t, "ext4", 1<<30)
	fill(t, v, 300)
	w := v.write(t)
	for range 2 {
		c := startIn(t, trackDir())
		sums := v.sums(t)
		before := w.acked.Load()
		c.begin(t, wire.Plan{Disks: []string{v.device}}, sums)
		image := make([]byte, v.size)
		_, done := c.receive(t, image, sums)
		after := w.acked.Load()
		if err := errors.Join(c.in.Close(), c.cmd.Wait()); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		v.examine(t, image, before, after)
		// Where some writes were not seen, which some kernels leave out, all of it is read once more, and that is said.
		unseen := strings.HasPrefix(done.Reasons[0], string(track.Unbalanced))
		if done.Consistency != dr.FilesystemConsistent || done.Read > 600<<20 && !unseen {
			t.Errorf("%d MiB read: %+v", done.Read>>20, done)
		}
		t.Logf("frozen for %s in %d passes, %d MiB read", done.Frozen, done.Passes, done.Read>>20)
		if _, err := os.Stat(trackDir()); !os.IsNotExist(err) {
			t.Errorf("something is left: %v", err)
		}
	}
}

// fill writes files of a megabyte that do not compress.
func fill(t *testing.T, v *volume, files int) {
	t.Helper()
	random := rand.New(rand.NewPCG(9, 9))
	data := make([]byte, 1<<20)
	for i := range files {
		for j := 0; j < len(data); j += 8 {
			binary.LittleEndian.PutUint64(data[j:], random.Uint64())
		}
		if err := os.WriteFile(filepath.Join(v.mount, fmt.Sprintf("filled-%d", i)), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	command(t, "sync", "-f", v.mount)
}

// Somebody else has frozen the file system: it stands still, though not for us.
func TestRealAFileSystemThatSomebodyElseFrozeIsReadInAQuietMoment(t *testing.T) {
	real(t)
	v := newVolume(t, "ext4", 400<<20)
	w := v.write(t)
	w.end(t)
	acked := w.acked.Load()
	command(t, "fsfreeze", "-f", v.mount)
	thaw := sync.OnceFunc(func() { command(t, "fsfreeze", "-u", v.mount) })
	t.Cleanup(thaw)
	c := startIn(t, trackDir())
	sums := v.sums(t)
	c.begin(t, wire.Plan{Disks: []string{v.device}}, sums)
	image := make([]byte, v.size)
	_, done := c.receive(t, image, sums)
	if done.Consistency != dr.CrashConsistent || len(done.Notes) == 0 || !strings.Contains(done.Notes[0], "another program has frozen it") {
		t.Errorf("done: %+v", done)
	}
	thaw() // ours took nothing away from theirs
	v.examine(t, image, acked, acked)
}

// What the kernel swapped out is in no image, and the image's swap file is one all the same.
func TestRealSwapIsLeftOut(t *testing.T) {
	real(t)
	v := newVolume(t, "ext4", 400<<20)
	file := filepath.Join(v.mount, "swapfile")
	secret := bytes.Repeat([]byte("what a program had in memory\n"), 3_000_000)
	if err := os.WriteFile(file, secret, 0o600); err != nil {
		t.Fatal(err)
	}
	command(t, "sync", "-f", v.mount)
	command(t, "mkswap", file)
	command(t, "swapon", file)
	off := sync.OnceFunc(func() { command(t, "swapoff", file) })
	t.Cleanup(off)
	w := v.write(t)
	for _, dir := range []string{trackDir(), ""} {
		c := startIn(t, dir)
		sums := v.sums(t)
		before := w.acked.Load()
		c.begin(t, wire.Plan{Disks: []string{v.device}}, sums)
		image := make([]byte, v.size)
		_, done := c.receive(t, image, sums)
		after := w.acked.Load()
		if err := errors.Join(c.in.Close(), c.cmd.Wait()); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		v.examine(t, image, before, after)
		if left := bytes.Count(image, secret[:290]); left > 8000 { // the header and the blocks at the edges of its parts
			t.Errorf("%d KiB of what was swapped out are in the image", left*290>>10)
		}
		path, at := filepath.Join(t.TempDir(), "image"), filepath.Join(t.TempDir(), "mnt")
		if err := errors.Join(os.WriteFile(path, image, 0o600), os.Mkdir(at, 0o755)); err != nil {
			t.Fatal(err)
		}
		command(t, "mount", "-o", "loop", path, at)
		command(t, "swapon", filepath.Join(at, "swapfile"))
		command(t, "swapoff", filepath.Join(at, "swapfile"))
		command(t, "umount", at)
		t.Logf("%d MiB read", done.Read>>20)
	}
	w.end(t)
	off()
}
