package agent

import (
	"errors"
	"os/exec"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// moment is something that an agent says, after which it dies.
type moment struct {
	name string
	is   func(kind wire.Kind, payload []byte) bool
}

func kindIs(want wire.Kind) func(wire.Kind, []byte) bool {
	return func(kind wire.Kind, _ []byte) bool { return kind == want }
}

func frozenIs(want bool) func(wire.Kind, []byte) bool {
	return func(kind wire.Kind, payload []byte) bool {
		var p wire.Pass
		return kind == wire.KindPass && wire.Decode(payload, &p) == nil && p.Frozen == want
	}
}

// An agent that is killed, whenever that is, leaves a server that goes on, and a next snapshot that holds everything that the
// lost one would have held.
func TestRealAnAgentKilledAtAnyStepCostsNothingButTime(t *testing.T) {
	real(t)
	c := newChain(t, "ext4", 400<<20)
	c.capture(t, true)
	for _, m := range []moment{
		{"before it reads", kindIs(wire.KindLayout)},
		{"when a pass begins", frozenIs(false)},
		{"in the middle of a pass", kindIs(wire.KindBlock)},
		{"before the freeze", frozenIs(true)},
		{"before it hears that the snapshot is safe", kindIs(wire.KindDone)},
	} {
		t.Run(m.name, func(t *testing.T) {
			c.w.await(t, 20)
			agent := startIn(t, trackDir())
			plan := wire.Plan{Disks: []string{c.v.device}, Track: true, Snapshot: "snap-lost", Since: c.kept}
			if err := agent.w.Message(wire.KindAskCapture, plan); err != nil {
				t.Fatal(err)
			}
			for dead := false; !dead; {
				kind, payload, err := agent.r.Next(nil)
				if err != nil {
					t.Fatal(err)
				}
				if kind == wire.KindFailure {
					t.Fatalf("the agent gave up: %s", payload)
				}
				if dead = m.is(kind, payload); !dead && kind == wire.KindLayout {
					var l wire.Layout
					if err := wire.Decode(payload, &l); err != nil {
						t.Fatal(err)
					}
					known := wire.Known{BlockSize: c.sums.BlockSize, Seed: c.sums.Seed[:], Blind: l.Disks[0].Tracked}
					if err := errors.Join(agent.w.Message(wire.KindKnown, known), agent.w.Go()); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := agent.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = agent.cmd.Wait()
			killed := time.Now()
			c.w.await(t, 2)
			if took := time.Since(killed); took > 2*time.Second {
				t.Errorf("the first writes after the kill took %s", took)
			}
			c.capture(t, true) // which examines the image
		})
	}
}

// A file system that is mounted anew while it is copied is frozen as it is then.
func TestRealAFileSystemThatIsMountedAnewMeanwhileIsFrozenAllTheSame(t *testing.T) {
	real(t)
	v := newVolume(t, "ext4", 400<<20)
	fill(t, v, 100)
	w := v.write(t)
	w.end(t)
	acked := w.acked.Load()
	c := startIn(t, trackDir())
	sums := v.sums(t)
	c.begin(t, wire.Plan{Disks: []string{v.device}, Rate: 64 << 20}, sums) // slow enough for what comes now
	for _, step := range [][]string{{"mount", "-o", "remount,ro", v.mount}, {"umount", v.mount}, {"mount", v.device, v.mount}} {
		if out, err := exec.Command(step[0], step[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", step, err, out)
		}
	}
	image := make([]byte, v.size)
	_, done := c.receive(t, image, sums)
	if done.Consistency != dr.FilesystemConsistent || done.Frozen <= 0 {
		t.Errorf("done: %+v", done)
	}
	v.examine(t, image, acked, acked)
}
