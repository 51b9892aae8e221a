package capture

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// comparing is a source whose agent keeps to the protocol: it sends what differs from what the appliance has. Its line ends
// after so many bytes.
type comparing struct {
	data []byte
	cut  int64 // bytes after which the line ends; 0: never
	came int64 // bytes over the line, in all captures
	// wait is called where the agent is done with that many bytes of its disk, and may send.
	at   int
	wait func(w *wire.Writer)
	told wire.Known
	part string // of the progress, first
}

func (c *comparing) Contact(context.Context) (api.Contact, error) { return api.Contact{}, nil }
func (c *comparing) Forget(context.Context) error                 { return nil }
func (c *comparing) Close() error                                 { return nil }

// line is what the agent sends, as far as it comes.
type line struct {
	r    io.Reader
	left int64
	came *int64
}

func (l *line) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, io.EOF
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	*l.came += int64(n)
	return n, err
}

func (c *comparing) Capture(ctx context.Context, sink *Sink, report dr.Progress) error {
	fromAgent, agentOut := io.Pipe()
	agentIn, toAgent := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c.agent(agentIn, agentOut)
		agentOut.Close()
		agentIn.Close()
	}()
	defer func() {
		fromAgent.Close()
		toAgent.Close()
		<-ended
	}()
	l := &line{r: fromAgent, left: c.cut, came: &c.came}
	if c.cut == 0 {
		l.left = 1 << 62
	}
	s, err := NewSession(l, toAgent)
	if err != nil {
		return err
	}
	return s.Capture(ctx, wire.Plan{}, sink, func(part string, done, total int64, unit string) {
		if c.part == "" {
			c.part = part
		}
		report.Report(part, done, total, unit)
	})
}

func (c *comparing) agent(in io.Reader, out io.Writer) {
	r, w := wire.NewReader(in), wire.NewWriter(out)
	size := int64(len(c.data))
	_ = w.Greet()
	_ = w.Message(wire.KindHello, wire.Hello{Version: "test"})
	_, _, _ = r.Next(nil) // the plan
	// It says that it tracks, which it may not be believed without a parent.
	_ = w.Message(wire.KindLayout, wire.Layout{Disks: []wire.Disk{{Name: "sda", Size: size, Tracked: true}}, Inventory: dr.Inventory{Disks: []dr.InventoryDisk{{Name: "sda", Size: size}}}})
	var sums *wire.Sums
	for {
		kind, payload, err := r.Next(nil)
		if err != nil {
			return
		}
		switch kind {
		case wire.KindKnown:
			_ = wire.Decode(payload, &c.told)
			sums, _ = wire.NewSums(wire.Seed(c.told.Seed), c.told.BlockSize, size)
		case wire.KindSums:
			_, first, raw, _ := wire.ParseSums(payload)
			_ = sums.Fill(first, raw)
		case wire.KindGo:
			c.send(w, sums)
			return
		}
	}
}

func (c *comparing) send(w *wire.Writer, sums *wire.Sums) {
	_ = w.Message(wire.KindPass, wire.Pass{Number: 1, Total: int64(len(c.data))})
	for n := range sums.Len() {
		at := n * int64(sums.BlockSize)
		if c.wait != nil && at >= int64(c.at) {
			_ = w.Flush()
			c.wait(w)
			c.wait = nil
		}
		data := c.data[at:min(at+int64(sums.BlockSize), int64(len(c.data)))]
		sum := sums.Seed.Sum(n, data)
		switch {
		case sum == sums.At(n):
			continue
		case sum == (wire.Sum{}):
			_ = w.Zeros(wire.Zeros{First: n, Count: 1})
		default:
			_ = w.Block(wire.Block{Number: n, Sum: sum, Data: data})
		}
		sums.Set(n, sum)
	}
	done(w, sums)
}

// written returns when the appliance has written all that was sent: it does before a pass, and listens on after that.
func written(w *wire.Writer) {
	_ = w.Message(wire.KindPass, wire.Pass{Number: 2})
	_ = w.Message(wire.KindTick, wire.Tick{})
}

// noise is a disk of which nothing compresses, with a short last block.
func noise(size int, seed uint64) []byte {
	r, b := rand.New(rand.NewPCG(seed, 0)), make([]byte, size+8)
	for i := 0; i < size; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b[:size]
}

// capture takes a full snapshot of a server.
func (c *comparing) capture(t *testing.T, st *store.Store, server string) (dr.Snapshot, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c.part = ""
	return Take(ctx, c, st, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: server, Name: "web"}}, nil)
}

// holds requires a snapshot to be what is on the disk now.
func (c *comparing) holds(t *testing.T, st *store.Store, snap dr.Snapshot) {
	t.Helper()
	img, err := st.Image(t.Context(), snap.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got := make([]byte, img.Size())
	if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, c.data) {
		t.Fatalf("%s is not what is on the disk: %v", snap.ID, err)
	}
}

const resumed = 12<<20 + 1536

// overhead is what a capture sends besides blocks.
const overhead = 4 << 10

func TestAFirstCopyThatIsCutOffGoesOnWhereItWas(t *testing.T) {
	c := &comparing{data: noise(resumed, 1)}
	server := dr.NewID("srv")
	r := rand.New(rand.NewPCG(2, 0))
	cuts := 0
	for c.came < resumed-2<<20 {
		c.cut = overhead + r.Int64N(3<<20)
		if _, err := c.capture(t, shared, server); err == nil {
			t.Fatal("a capture whose line ended is complete")
		}
		if cuts++; cuts%2 == 0 { // between the cut and the next attempt
			if _, err := shared.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); err != nil && !errors.Is(err, store.ErrBusy) {
				t.Fatal(err)
			}
		}
	}
	before := c.came
	c.cut = 0
	snap, err := c.capture(t, shared, server)
	if err != nil {
		t.Fatal(err)
	}
	c.holds(t, shared, snap)
	if c.told.Blind {
		t.Error("an agent was not told what an earlier attempt had kept")
	}
	block := int64(snap.Disks[0].BlockSize)
	if most := int64(resumed)*102/100 + int64(cuts)*(block+overhead); c.came > most {
		t.Errorf("%d bytes were sent in %d attempts for %d; want at most %d", c.came, cuts+1, resumed, most)
	}
	st := snap.Stats
	if st.Resumed < before-int64(cuts)*(block+overhead) || st.Resumed+st.Sent > resumed+overhead || snap.Pass.Kind != dr.PassFull || st.Changed != resumed {
		t.Errorf("the record says %+v, %+v after %d bytes in %d attempts", st, snap.Pass, before, cuts)
	}
	if c.part != "going on: kept by an attempt that was cut off" {
		t.Errorf("people see %q first", c.part)
	}
	if _, err := shared.Verify(t.Context(), snap.ID, nil); err != nil {
		t.Error(err)
	}
	// The next full one starts from nothing: what was kept went with the snapshot.
	if snap, err := c.capture(t, shared, server); err != nil || snap.Stats.Resumed != 0 || snap.Stats.Sent < resumed {
		t.Errorf("%+v, %v", snap.Stats, err)
	}
	t.Logf("%d bytes in %d attempts for %d", before+st.Sent, cuts+1, resumed)
}

func TestWhatTheServerWroteSinceTheCutIsSent(t *testing.T) {
	c := &comparing{data: noise(4<<20, 3), cut: 3 << 20}
	server := dr.NewID("srv")
	if _, err := c.capture(t, shared, server); err == nil {
		t.Fatal("a capture whose line ended is complete")
	}
	copy(c.data, "written meanwhile")
	clear(c.data[1<<20 : 2<<20])
	c.cut = 0
	snap, err := c.capture(t, shared, server)
	if err != nil {
		t.Fatal(err)
	}
	c.holds(t, shared, snap)
	if st := snap.Stats; st.Resumed == 0 || st.Resumed > 2<<20 || st.Changed != 3<<20 {
		t.Errorf("the record says %+v", st)
	}
	// What its blocks held is known of all of them, the ones that were not sent again among them.
	if s := snap.Signs; s == nil || s.Content.Random != 3<<20 {
		t.Errorf("signs %+v", s)
	}
	// An increment on it is one like any other.
	copy(c.data[3<<20:], "and once more")
	inc, err := Take(t.Context(), c, shared, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: server, Name: "web"}, Parent: snap.ID}, nil)
	if err != nil || inc.Parent != snap.ID || inc.Stats.Changed != int64(snap.Disks[0].BlockSize) || inc.Stats.Resumed != 0 {
		t.Fatalf("%+v on %q, %v", inc.Stats, inc.Parent, err)
	}
	c.holds(t, shared, inc)
}

func TestADiskOfAnotherSizeIsNotGoneOnWith(t *testing.T) {
	c := &comparing{data: noise(3<<20, 4), cut: 2 << 20}
	server := dr.NewID("srv")
	if _, err := c.capture(t, shared, server); err == nil {
		t.Fatal("a capture whose line ended is complete")
	}
	small := c.data
	c.data, c.cut = noise(4<<20, 5), 1<<20
	if _, err := c.capture(t, shared, server); err == nil {
		t.Fatal("a capture whose line ended is complete")
	}
	// What was kept of the small disk is gone for good: what is there now is of the large one.
	c.data, c.cut = small, 0
	snap, err := c.capture(t, shared, server)
	if err != nil || snap.Stats.Resumed != 0 {
		t.Fatalf("%+v, %v", snap.Stats, err)
	}
	c.holds(t, shared, snap)
}

func TestACancelledCaptureIsGoneOnWith(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c := &comparing{data: noise(4<<20, 6), at: 3 << 20}
	c.wait = func(w *wire.Writer) {
		written(w)
		cancel()
		for w.Message(wire.KindTick, wire.Tick{}) == nil { // until it is not heard any more
		}
	}
	server := dr.NewID("srv")
	if _, err := Take(ctx, c, shared, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: server, Name: "web"}}, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("a cancelled capture: %v", err)
	}
	snap, err := c.capture(t, shared, server)
	if err != nil || snap.Stats.Resumed == 0 {
		t.Fatalf("%+v, %v", snap.Stats, err)
	}
	c.holds(t, shared, snap)
}

func TestAnAgentThatTalksNonsenseLeavesNothingToGoOnWith(t *testing.T) {
	server := dr.NewID("srv")
	for name, nonsense := range map[string]func(*wire.Writer){
		"garbage": func(w *wire.Writer) { _ = w.Go() },
		"a digest of something else": func(w *wire.Writer) {
			_ = w.Message(wire.KindDone, wire.Done{Provider: dr.ProviderFreeze, Consistency: dr.CrashConsistent, Digests: [][]byte{make([]byte, 16)}})
		},
	} {
		c := &comparing{data: noise(2<<20, 7), cut: 1 << 20}
		if _, err := c.capture(t, shared, server); err == nil {
			t.Fatal("a capture whose line ended is complete")
		}
		c.cut, c.at, c.wait = 0, 1<<20, nonsense
		if _, err := c.capture(t, shared, server); err == nil {
			t.Fatalf("%s: a snapshot", name)
		}
		if snap, err := c.capture(t, shared, server); err != nil || snap.Stats.Resumed != 0 {
			t.Errorf("%s: %+v, %v", name, snap.Stats, err)
		}
	}
}

// appliance is what a child of this test does: it captures most of a disk, with partials, says so and waits for its end.
func appliance(place string) {
	ctx := context.Background()
	st, err := store.Open(ctx, folder.Driver{Path: place}, "password")
	if err != nil {
		panic(err)
	}
	task := api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: "srv-killed", Name: "web"}}
	k := &Sink{store: st, task: task, began: time.Now(), resume: resume{pace: pace{bytes: 1}}}
	c := &comparing{data: noise(resumed, 8), at: 9 << 20}
	c.wait = func(w *wire.Writer) {
		written(w)
		for k.fresh.Load() > 0 {
			_ = w.Message(wire.KindTick, wire.Tick{})
		}
		fmt.Println("kept")
		select {} // the line is silent now
	}
	_, err = take(ctx, c, k, nil)
	panic(err)
}

func TestAnApplianceThatIsKilledGoesOnAtItsLastPartial(t *testing.T) {
	place := folder.Driver{Path: filepath.Join(t.TempDir(), "store")}
	if err := store.Create(t.Context(), place, "password"); err != nil {
		t.Fatal(err)
	}
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), "MUSTER_TEST_APPLIANCE="+place.Path)
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	said, err := bufio.NewReader(out).ReadString('\n')
	_ = child.Process.Kill()
	_ = child.Wait()
	if err != nil || said != "kept\n" {
		t.Fatalf("the child said %q, %v", said, err)
	}
	st, err := store.Open(t.Context(), place, "password")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close(context.Background())
	if _, err := st.Collect(t.Context(), store.CollectOptions{Immediate: true}, nil); err != nil {
		t.Fatal(err)
	}
	c := &comparing{data: noise(resumed, 8)}
	snap, err := c.capture(t, st, "srv-killed")
	if err != nil {
		t.Fatal(err)
	}
	c.holds(t, st, snap)
	if _, err := st.Verify(t.Context(), snap.ID, nil); err != nil {
		t.Error(err)
	}
	if s := snap.Stats; s.Resumed != 9<<20 || s.Sent > resumed-9<<20+overhead {
		t.Errorf("%+v: want 9 MiB not to be sent again", s)
	}
}
