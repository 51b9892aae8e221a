//go:build linux

package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/musterdr/muster/internal/capture/linux"
	"github.com/musterdr/muster/internal/capture/linux/hooks"
	"github.com/musterdr/muster/internal/capture/wire"
)

// The test binary is the agent as well: with these arguments it does what cmd/muster-agent does.
func TestMain(m *testing.M) {
	if os.Getenv("MUSTER_REAL") != "" && len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "-test.") {
		ownMounts()
	}
	switch {
	case len(os.Args) == 2 && os.Args[1] == "serve":
		a := Agent{Version: "test", Watchdog: []string{"/proc/self/exe", "watchdog"}, TrackDir: os.Getenv("MUSTER_TEST_TRACK")}
		if os.Getenv("MUSTER_TEST_HOOKS") != "" {
			a.Hooks = []string{"/proc/self/exe", "hooks"}
		}
		if err := a.Serve(context.Background(), os.Stdin, os.Stdout); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	case len(os.Args) == 2 && os.Args[1] == "hooks":
		if hooks.Keep(os.Getenv("MUSTER_TEST_HOOKS"), os.Stdin, os.Stdout, os.NewFile(3, "thaw")) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	case len(os.Args) == 3 && os.Args[1] == "watchdog":
		count, _ := strconv.Atoi(os.Args[2])
		if linux.Watchdog(count) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is an agent in a process of its own, and the appliance's end of its pipes.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	r   *wire.Reader
	w   *wire.Writer

	blind bool // it was told of no fingerprints
}

// start starts an agent that tracks nothing.
func start(t *testing.T) *child { return startIn(t, "") }

// startIn starts an agent with the tracker's folder.
func startIn(t *testing.T, track string) *child {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &child{cmd: exec.Command(self, "serve")}
	c.cmd.Env = append(os.Environ(), "MUSTER_TEST_TRACK="+track)
	c.cmd.Stderr = os.Stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.in.Close()
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
	})
	c.r, c.w = wire.NewReader(out), wire.NewWriter(c.in)
	if err := c.r.Greeting(); err != nil {
		t.Fatal(err)
	}
	var hello wire.Hello
	c.hear(t, wire.KindHello, &hello)
	if hello.Version != "test" || hello.UID != os.Getuid() {
		t.Fatalf("hello: %+v", hello)
	}
	return c
}

func (c *child) hear(t *testing.T, want wire.Kind, into any) {
	t.Helper()
	kind, payload, err := c.r.Next(nil)
	if err != nil || kind != want {
		t.Fatalf("the agent sent kind %q (%.200q), %v; want %q", byte(kind), payload, err, byte(want))
	}
	if err := wire.Decode(payload, into); err != nil {
		t.Fatal(err)
	}
}

// begin asks for a capture and tells what is known of each disk.
func (c *child) begin(t *testing.T, plan wire.Plan, sums ...*wire.Sums) wire.Layout {
	t.Helper()
	if err := c.w.Message(wire.KindAskCapture, plan); err != nil {
		t.Fatal(err)
	}
	var layout wire.Layout
	c.hear(t, wire.KindLayout, &layout)
	for i, s := range sums {
		if err := errors.Join(c.w.Message(wire.KindKnown, wire.Known{Disk: i, BlockSize: s.BlockSize, Seed: s.Seed[:]}), c.w.Sums(i, s)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.w.Go(); err != nil {
		t.Fatal(err)
	}
	return layout
}

// receive applies what the agent sends to an image, until it is done.
func (c *child) receive(t *testing.T, image []byte, sums *wire.Sums) (blocks int, done wire.Done) {
	t.Helper()
	for {
		kind, payload, err := c.r.Next(nil)
		if err != nil {
			t.Fatal(err)
		}
		switch kind {
		case wire.KindPass:
			var p wire.Pass
			if err := wire.Decode(payload, &p); err != nil {
				t.Fatal(err)
			}
		case wire.KindBlock:
			b, err := wire.ParseBlock(payload)
			if err != nil {
				t.Fatal(err)
			}
			blocks++
			put(t, image, sums, b)
		case wire.KindZeros:
			z, err := wire.ParseZeros(payload)
			if err != nil {
				t.Fatal(err)
			}
			for n := z.First; n < z.First+z.Count; n++ {
				clear(image[n*int64(sums.BlockSize):][:sums.Length(n)])
				sums.Set(n, wire.Sum{})
			}
		case wire.KindFailure:
			t.Fatalf("the agent gave up: %s", payload)
		case wire.KindDone:
			if err := wire.Decode(payload, &done); err != nil {
				t.Fatal(err)
			}
			if len(done.Digests) != 1 || !c.blind && !bytes.Equal(done.Digests[0], sums.Digest()) {
				t.Error("the two sides do not agree on what the disk holds")
			}
			return blocks, done
		}
	}
}

func put(t *testing.T, image []byte, sums *wire.Sums, b wire.Block) {
	t.Helper()
	data := b.Data
	if b.Zstd {
		var err error
		if data, err = unzip.DecodeAll(b.Data, nil); err != nil {
			t.Fatal(err)
		}
	}
	if len(data) != sums.Length(b.Number) || sums.Seed.Sum(b.Number, data) != b.Sum {
		t.Fatalf("block %d of %d bytes does not have its fingerprint", b.Number, len(data))
	}
	copy(image[b.Number*int64(sums.BlockSize):], data)
	sums.Set(b.Number, b.Sum)
}

const blockSize = 64 << 10

var unzip, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(wire.MaxBlock))

// newDisk makes a file of noise, text and zeros that is no multiple of anything.
func newFile(t *testing.T) (path string, content []byte) {
	t.Helper()
	content = make([]byte, 40*blockSize+777)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range content[:10*blockSize] {
		content[i] = byte(r.Uint32())
	}
	copy(content[20*blockSize:], strings.Repeat("a line of text\n", 40000))
	path = filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, content
}

func TestWhatArrivesIsTheDisk(t *testing.T) {
	path, content := newFile(t)
	sums, _ := wire.NewSums(wire.NewSeed(), blockSize, int64(len(content)))
	image := make([]byte, len(content))

	c := start(t)
	layout := c.begin(t, wire.Plan{Disks: []string{path}}, sums)
	if len(layout.Disks) != 1 || layout.Disks[0].Name != "disk.img" || layout.Disks[0].Size != int64(len(content)) || layout.Disks[0].Tracked || layout.Inventory.Kernel == "" {
		t.Errorf("layout: %+v", layout.Disks)
	}
	blocks, done := c.receive(t, image, sums)
	if !bytes.Equal(image, content) {
		t.Error("the image is not the disk")
	}
	if blocks > 22 || done.Read != int64(len(content)) || done.Consistency != "crash" || done.Age < 0 {
		t.Errorf("%d blocks for 20 that are not zero; %+v", blocks, done)
	}

	// The next one knows what is there, and sends one block for one byte.
	content[15*blockSize] = 1
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	c = start(t)
	c.begin(t, wire.Plan{Disks: []string{path}}, sums)
	if blocks, _ = c.receive(t, image, sums); blocks != 1 || !bytes.Equal(image, content) {
		t.Errorf("%d blocks were sent for one that changed", blocks)
	}
}

func TestAnInventoryIsToldAsOftenAsItIsAsked(t *testing.T) {
	path, _ := newFile(t)
	c := start(t)
	for range 2 {
		if err := c.w.Message(wire.KindAskInventory, wire.Plan{Disks: []string{path}}); err != nil {
			t.Fatal(err)
		}
		var inv struct {
			Kernel string `json:"kernel"`
			Disks  []any  `json:"disks"`
		}
		if c.hear(t, wire.KindInventory, &inv); inv.Kernel == "" || len(inv.Disks) != 1 {
			t.Errorf("inventory: %+v", inv)
		}
	}
}

func TestAnAgentSaysWhyItGivesUp(t *testing.T) {
	for name, plan := range map[string]wire.Plan{
		"no such disk": {Disks: []string{"/nowhere/disk.img"}}, "a path in a name": {Disks: []string{"../etc/passwd"}}, "a folder": {Disks: []string{"/"}},
	} {
		c := start(t)
		if err := c.w.Message(wire.KindAskCapture, plan); err != nil {
			t.Fatal(err)
		}
		var f wire.Failure
		if c.hear(t, wire.KindFailure, &f); !strings.Contains(f.Text, "open disk") {
			t.Errorf("%s: %q", name, f.Text)
		}
		if err := c.cmd.Wait(); err == nil {
			t.Errorf("%s: the agent ended as if all were well", name)
		}
	}
}

func TestAnAgentEndsWhenItsApplianceIsGone(t *testing.T) {
	path, content := newFile(t)
	sums, _ := wire.NewSums(wire.NewSeed(), blockSize, int64(len(content)))
	for name, leave := range map[string]func(*child){
		"before asking": func(*child) {},
		"while the agent waits for fingerprints": func(c *child) {
			_ = c.w.Message(wire.KindAskCapture, wire.Plan{Disks: []string{path}})
		},
		"while it reads": func(c *child) { c.begin(t, wire.Plan{Disks: []string{path}}, sums) },
	} {
		c := start(t)
		leave(c)
		c.in.Close()
		ended := make(chan struct{})
		go func() {
			_, _ = c.cmd.Process.Wait()
			close(ended)
		}()
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Errorf("%s: the agent is still there", name)
		}
	}
}

func TestGarbageFromAnApplianceEndsTheAgent(t *testing.T) {
	c := start(t)
	if _, err := c.in.Write([]byte("\xff\xff\xff\xff\xff\xff\xff")); err != nil {
		t.Fatal(err)
	}
	var f wire.Failure
	if c.hear(t, wire.KindFailure, &f); !strings.Contains(f.Text, wire.ErrGarbage.Error()) {
		t.Errorf("it gave up with %q", f.Text)
	}
}

// FuzzAppliance lets an appliance send anything: the agent must end and read nothing that it was not asked to.
func FuzzAppliance(f *testing.F) {
	path := filepath.Join(f.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 10*4096), 0o600); err != nil {
		f.Fatal(err)
	}
	var seed bytes.Buffer
	w := wire.NewWriter(&seed)
	s, _ := wire.NewSums(wire.Seed{}, 4096, 10*4096)
	s.Set(3, wire.Sum{1})
	_ = w.Message(wire.KindKnown, wire.Known{BlockSize: 4096, Seed: make([]byte, wire.SeedSize)})
	_ = w.Sums(0, s)
	_ = w.Go()
	f.Add(seed.Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		d, err := linux.OpenDisk(path)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		disks := []*disk{newDisk(0, d, 1)}
		if err := known(wire.NewReader(bytes.NewReader(in)), disks); err != nil {
			return
		}
		if err := newRun(wire.NewWriter(io.Discard), wire.Plan{FreezeLimit: time.Second}, Agent{}, disks).all(t.Context()); err != nil {
			t.Errorf("capture: %v", err)
		}
	})
}

func TestAHoldGivesBackWhatWasPutAside(t *testing.T) {
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
	var out bytes.Buffer
	r := newRun(wire.NewWriter(&out), wire.Plan{}, Agent{}, disks)
	r.disks[0].prepare()
	r.hold = newHold(5*blockSize, r.disks) // too small for all: the rest is sent while reading
	if _, err := r.pass(t.Context(), r.hold); err != nil {
		t.Fatal(err)
	}
	if len(r.hold.kept) != 5 {
		t.Errorf("%d blocks were put aside where 5 fit", len(r.hold.kept))
	}
	if err := errors.Join(r.hold.send(r.w, r.disks), r.done(t.Context(), linux.Held{Since: time.Now()})); err != nil {
		t.Fatal(err)
	}
	image, have := make([]byte, len(content)), &child{r: wire.NewReader(&out)}
	got, _ := wire.NewSums(seed, blockSize, d.Size)
	if have.receive(t, image, got); !bytes.Equal(image, content) {
		t.Error("what was put aside and what was sent do not make the disk")
	}
}
