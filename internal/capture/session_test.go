package capture

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

var shared *store.Store

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if place := os.Getenv("MUSTER_TEST_APPLIANCE"); place != "" {
		appliance(place)
	}
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "muster")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	place := folder.Driver{Path: filepath.Join(dir, "store")}
	if err := store.Create(ctx, place, "password"); err != nil {
		panic(err)
	}
	if shared, err = store.Open(ctx, place, "password"); err != nil {
		panic(err)
	}
	defer shared.Close(ctx)
	return m.Run()
}

// script is an agent that plays a part: it gets the appliance's fingerprints and sends what the test wants.
type script func(w *wire.Writer, seed wire.Seed, sums *wire.Sums)

// played is a source whose agent plays a script.
type played struct {
	play    script
	size    int64
	tracked bool // it says that it knows what was written, and the appliance wants that
	heard   wire.Known
	safe    chan bool // whether it was told that the snapshot is safe
}

func (p *played) Contact(context.Context) (api.Contact, error) { return api.Contact{}, nil }
func (p *played) Forget(context.Context) error                 { return nil }
func (p *played) Close() error                                 { return nil }

func (p *played) Capture(ctx context.Context, sink *Sink, report dr.Progress) error {
	fromAgent, agentOut := io.Pipe()
	agentIn, toAgent := io.Pipe()
	go func() {
		p.agent(agentIn, agentOut)
		agentOut.Close()
		agentIn.Close()
	}()
	defer fromAgent.Close()
	s, err := NewSession(fromAgent, toAgent)
	if err != nil {
		return err
	}
	defer toAgent.Close()
	return s.Capture(ctx, wire.Plan{Track: p.tracked}, sink, report)
}

func (p *played) agent(in io.Reader, out io.Writer) {
	r, w := wire.NewReader(in), wire.NewWriter(out)
	_ = w.Greet()
	_ = w.Message(wire.KindHello, wire.Hello{Version: "test"})
	_, _, _ = r.Next(nil) // the plan
	_ = w.Message(wire.KindLayout, wire.Layout{Disks: []wire.Disk{{Name: "sda", Size: p.size, Tracked: p.tracked}}, Inventory: dr.Inventory{Disks: []dr.InventoryDisk{{Name: "sda", Size: p.size}}}})
	known := &p.heard
	for {
		kind, payload, err := r.Next(nil)
		if err != nil {
			return
		}
		switch kind {
		case wire.KindKnown:
			_ = wire.Decode(payload, known)
		case wire.KindGo:
			sums, _ := wire.NewSums(wire.Seed(known.Seed), known.BlockSize, p.size)
			p.play(w, sums.Seed, sums)
			if p.tracked {
				_ = w.Flush()
				kind, _, err := r.Next(nil)
				p.safe <- err == nil && kind == wire.KindKept
			}
			return
		}
	}
}

const testDisk = 1 << 20

func play(t *testing.T, play script) (dr.Snapshot, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return Take(ctx, &played{play: play, size: testDisk}, shared, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: "srv-1", Name: "web"}}, nil)
}

func block(w *wire.Writer, sums *wire.Sums, number int64, fill byte) {
	data := bytes.Repeat([]byte{fill}, sums.Length(number))
	sum := sums.Seed.Sum(number, data)
	_ = w.Block(wire.Block{Number: number, Sum: sum, Data: data})
	sums.Set(number, sum)
}

func done(w *wire.Writer, sums *wire.Sums) {
	_ = w.Message(wire.KindDone, wire.Done{Provider: dr.ProviderFreeze, Consistency: dr.CrashConsistent, Digests: [][]byte{sums.Digest()}})
}

// increment plays a tracked increment of a kept snapshot in which every block is of one byte.
func increment(t *testing.T, parent dr.Snapshot, play script) (snap dr.Snapshot, safe bool, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	p := &played{play: play, size: testDisk, tracked: true, safe: make(chan bool, 1)}
	snap, err = Take(ctx, p, shared, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: "srv-1", Name: "web"}, Parent: parent.ID}, nil)
	if !p.heard.Blind {
		t.Error("an agent that knows what was written was told fingerprints")
	}
	return snap, <-p.safe, err
}

func TestATrackedIncrementIsWhatWasWrittenOverItsParent(t *testing.T) {
	parent, err := play(t, func(w *wire.Writer, _ wire.Seed, sums *wire.Sums) {
		for n := range sums.Len() {
			block(w, sums, n, 'a')
		}
		done(w, sums)
	})
	if err != nil {
		t.Fatal(err)
	}
	tracked := func(sent int64, reason string) wire.Done {
		return wire.Done{Provider: dr.ProviderFreeze, Consistency: dr.CrashConsistent, Digests: [][]byte{nil}, Sent: []int64{sent}, Reasons: []string{reason}}
	}
	snap, safe, err := increment(t, parent, func(w *wire.Writer, _ wire.Seed, sums *wire.Sums) {
		block(w, sums, 2, 'b')
		block(w, sums, 3, 'a') // written with what was there
		_ = w.Message(wire.KindDone, tracked(2, ""))
	})
	if err != nil || !safe || snap.Pass.Kind != dr.PassTracked || snap.Parent != parent.ID {
		t.Fatalf("pass %+v on %q, told that it is safe: %v, %v", snap.Pass, snap.Parent, safe, err)
	}
	bs := int64(snap.Disks[0].BlockSize)
	if snap.Stats.Changed != bs {
		t.Errorf("%d bytes changed, want one block of %d", snap.Stats.Changed, bs)
	}
	img, err := shared.Image(t.Context(), snap.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got, want := make([]byte, testDisk), bytes.Repeat([]byte{'a'}, testDisk)
	copy(want[2*bs:3*bs], bytes.Repeat([]byte{'b'}, int(bs)))
	if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the image is not what was written over its parent: %v", err)
	}
	// One that was read as a whole after all says why.
	if snap, _, err := increment(t, snap, func(w *wire.Writer, _ wire.Seed, sums *wire.Sums) {
		_ = w.Message(wire.KindDone, tracked(0, "unbalanced: 8 sectors"))
	}); err != nil || snap.Pass.Kind != dr.PassCompare || !strings.Contains(snap.Pass.Reason, "sda: unbalanced") {
		t.Errorf("pass %+v, %v", snap.Pass, err)
	}
	// Fewer blocks than the agent says it sent are no snapshot, and nothing is safe.
	if _, safe, err := increment(t, parent, func(w *wire.Writer, _ wire.Seed, sums *wire.Sums) {
		block(w, sums, 2, 'b')
		_ = w.Message(wire.KindDone, tracked(2, ""))
	}); err == nil || safe || !strings.Contains(err.Error(), "not what the agent read") {
		t.Errorf("told that it is safe: %v, %v", safe, err)
	}
}

func TestALaterPassReplacesAnEarlierOne(t *testing.T) {
	snap, err := play(t, func(w *wire.Writer, _ wire.Seed, sums *wire.Sums) {
		for pass := range 3 {
			_ = w.Message(wire.KindPass, wire.Pass{Number: pass + 1})
			for n := range sums.Len() {
				block(w, sums, n, byte('a'+pass))
			}
		}
		_ = w.Message(wire.KindPass, wire.Pass{Number: 4})
		_ = w.Zeros(wire.Zeros{First: 1, Count: 1})
		sums.Set(1, wire.Sum{})
		done(w, sums)
	})
	if err != nil {
		t.Fatal(err)
	}
	img, err := shared.Image(t.Context(), snap.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got := make([]byte, testDisk)
	if _, err := img.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	bs := snap.Disks[0].BlockSize
	want := bytes.Repeat([]byte{'c'}, testDisk)
	clear(want[bs : 2*bs])
	if !bytes.Equal(got, want) {
		t.Error("the image is not what the last pass sent")
	}
}

func TestAHostileAgentGetsNoSnapshot(t *testing.T) {
	before, err := shared.Snapshots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		play script
		want string
	}{
		"says nothing": {func(*wire.Writer, wire.Seed, *wire.Sums) {}, "in the middle of the capture"},
		"block beyond end": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Block(wire.Block{Number: 1 << 40, Data: []byte("x")})
			done(w, s)
		}, "none such"},
		"disk beyond end": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Block(wire.Block{Disk: 5, Data: []byte("x")})
			done(w, s)
		}, "none such"},
		"zeros beyond end": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Zeros(wire.Zeros{First: 3, Count: 1 << 50})
			done(w, s)
		}, "none such"},
		"short block": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Block(wire.Block{Data: []byte("x")})
			done(w, s)
		}, "damaged"},
		"wrong sum": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Block(wire.Block{Data: make([]byte, s.Length(0)), Sum: wire.Sum{1}})
			done(w, s)
		}, "damaged"},
		"packed garbage": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Block(wire.Block{Zstd: true, Data: []byte("garbage")})
			done(w, s)
		}, "unpack"},
		"digest of other": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			block(w, s, 1, 'x')
			s.Set(2, wire.Sum{7})
			done(w, s)
		}, "not what the agent read"},
		"failure": {func(w *wire.Writer, _ wire.Seed, _ *wire.Sums) {
			_ = w.Message(wire.KindFailure, wire.Failure{Text: "no\x1b[2J disk"})
		}, "no [2J disk"},
		"claims applications": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Message(wire.KindDone, wire.Done{Provider: dr.ProviderFreeze, Consistency: dr.ApplicationConsistent, Digests: [][]byte{s.Digest()}})
		}, "consistency"},
		"claims an application that was not at rest": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Message(wire.KindDone, wire.Done{Provider: dr.ProviderTracking, Consistency: dr.ApplicationConsistent, Digests: [][]byte{s.Digest()},
				Applications: []dr.Application{{Name: "a", AtRest: true}, {Name: "b"}}})
		}, "consistency"},
		"names too many applications": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Message(wire.KindDone, wire.Done{Provider: dr.ProviderTracking, Consistency: dr.CrashConsistent, Digests: [][]byte{s.Digest()},
				Applications: make([]dr.Application, dr.MaxApplications+1)})
		}, "make no sense"},
		"an application that stood still before the server was built": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			_ = w.Message(wire.KindDone, wire.Done{Provider: dr.ProviderTracking, Consistency: dr.CrashConsistent, Digests: [][]byte{s.Digest()},
				Applications: []dr.Application{{Name: "a", Still: 1 << 60}}})
		}, "stood still"},
		"endless passes": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			for w.Message(wire.KindPass, wire.Pass{}) == nil {
			}
		}, "passes"},
		"a block twice": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
			for w.Zeros(wire.Zeros{Count: s.Len()}) == nil {
			}
		}, "twice in one pass"},
		"speaks as the appliance": {func(w *wire.Writer, _ wire.Seed, s *wire.Sums) { _ = w.Go(); done(w, s) }, "in the middle of a capture"},
	} {
		t.Run(name, func(t *testing.T) {
			snap, err := play(t, func(w *wire.Writer, seed wire.Seed, s *wire.Sums) {
				c.play(w, seed, s)
				_ = w.Flush()
			})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("snapshot %q, %v: want an error with %q", snap.ID, err, c.want)
			}
		})
	}
	if all, err := shared.Snapshots(t.Context()); err != nil || len(all) != len(before) {
		t.Errorf("%d snapshots are kept, %d were: %v", len(all), len(before), err)
	}
}

func TestALayoutThatMakesNoSenseIsRefused(t *testing.T) {
	disk := func(name string, size int64) wire.Layout {
		return wire.Layout{Disks: []wire.Disk{{Name: name, Size: size}}, Inventory: dr.Inventory{Disks: make([]dr.InventoryDisk, 1)}}
	}
	for name, l := range map[string]wire.Layout{
		"none": {}, "no name": disk("", 1), "control characters": disk("a\nb", 1), "no size": disk("sda", 0), "negative": disk("sda", -1),
		"other inventory": {Disks: []wire.Disk{{Name: "sda", Size: 1}}},
	} {
		if err := check(l); !errors.Is(err, wire.ErrGarbage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestASnapshotNamesTheApplicationsThatWereAtRest(t *testing.T) {
	snap, err := play(t, func(w *wire.Writer, _ wire.Seed, s *wire.Sums) {
		_ = w.Message(wire.KindDone, wire.Done{Provider: dr.ProviderTracking, Consistency: dr.ApplicationConsistent, Digests: [][]byte{s.Digest()},
			Applications: []dr.Application{{Name: "Maria\x1bDB", AtRest: true, Still: time.Second}, {Name: "PostgreSQL", AtRest: true}}})
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []dr.Application{{Name: "Maria DB", AtRest: true, Still: time.Second}, {Name: "PostgreSQL", AtRest: true}}
	if snap.Consistency != dr.ApplicationConsistent || !slices.Equal(snap.Applications, want) {
		t.Errorf("%s, %+v", snap.Consistency, snap.Applications)
	}
}

// FuzzAgent lets an agent send anything after the layout: the appliance must end, with an error or a snapshot, and stay
// within its limits.
func FuzzAgent(f *testing.F) {
	var seed bytes.Buffer
	w := wire.NewWriter(&seed)
	_ = w.Message(wire.KindPass, wire.Pass{Number: 1})
	_ = w.Block(wire.Block{Data: make([]byte, 4096)})
	_ = w.Zeros(wire.Zeros{Count: 1})
	_ = w.Message(wire.KindTick, wire.Tick{})
	_ = w.Message(wire.KindDone, wire.Done{Provider: dr.ProviderFreeze, Consistency: dr.CrashConsistent, Digests: [][]byte{make([]byte, 16)}})
	f.Add(seed.Bytes())
	ctx := context.Background()
	snap, err := shared.Begin(ctx, dr.NewID("snap"), "")
	if err != nil {
		f.Fatal(err)
	}
	defer snap.Abort(ctx)
	disk, err := snap.Disk(ctx, "sda", 10*4096, 4096)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		sums, _ := wire.NewSums(wire.Seed{}, 4096, 10*4096)
		rec := newReceiver(t.Context(), &Sink{writer: snap, disks: []*store.DiskWriter{disk}}, []*wire.Sums{sums}, nil)
		defer rec.stop()
		_, _ = rec.receive(wire.NewReader(bytes.NewReader(in)))
	})
}
