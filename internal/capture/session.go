package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/klauspost/compress/zstd"

	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/signs"
)

// Limits of a session.
const (
	inFlight   = 64 // blocks that were received and not yet written
	maxPasses  = 64
	maxNotes   = 64
	maxNote    = 500 // characters of one note or failure of an agent
	writersMax = 8
	// freezeBegins is how long after it was announced a freeze begins at the latest.
	freezeBegins = time.Minute
)

// Session is the appliance's side of one conversation with an agent. The agent is hostile input: what it sends is limited,
// checked against what it said before, and is data. It is used by one goroutine.
type Session struct {
	Hello wire.Hello

	r       *wire.Reader
	w       *wire.Writer
	counted *counter
}

// counter counts what is read.
type counter struct {
	r io.Reader
	n atomic.Int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// NewSession waits for an agent's greeting. To end the session early, close what carries it.
func NewSession(out io.Reader, in io.Writer) (*Session, error) {
	s := &Session{counted: &counter{r: out}, w: wire.NewWriter(in)}
	s.r = wire.NewReader(s.counted)
	if err := s.r.Greeting(); err != nil {
		return nil, err
	}
	return s, s.expect(wire.KindHello, &s.Hello)
}

// expect reads a message of a kind, or the agent's failure.
func (s *Session) expect(kind wire.Kind, into any) error {
	got, payload, err := s.r.Next(nil)
	if err != nil {
		return fmt.Errorf("hear from the agent: %w", cut(err))
	}
	if got == wire.KindFailure {
		return failure(payload)
	}
	if got != kind {
		return fmt.Errorf("hear from the agent: %w: kind %q instead of %q", wire.ErrGarbage, byte(got), byte(kind))
	}
	return wire.Decode(payload, into)
}

// lastWord gives what the agent said before it stopped listening, if it said why.
func (s *Session) lastWord(err error) error {
	kind, payload, rerr := s.r.Next(nil)
	if rerr == nil && kind == wire.KindFailure {
		return failure(payload)
	}
	return err
}

// cut turns an end into an unexpected one.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// failure is what an agent gave up with.
func failure(payload []byte) error {
	var f wire.Failure
	if err := wire.Decode(payload, &f); err != nil {
		return err
	}
	return errors.New(plain(f.Text))
}

// plain makes an agent's text fit for a log: limited, and without control characters.
func plain(text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text)
	if r := []rune(text); len(r) > maxNote {
		text = string(r[:maxNote]) + "…"
	}
	return text
}

// Inventory asks what the server is made of.
func (s *Session) Inventory(disks []string) (dr.Inventory, error) {
	var inv dr.Inventory
	if err := s.w.Message(wire.KindAskInventory, wire.Plan{Disks: disks}); err != nil {
		return inv, fmt.Errorf("ask the agent: %w", err)
	}
	return inv, s.expect(wire.KindInventory, &inv)
}

// Capture reads the disks into the sink and has them kept.
func (s *Session) Capture(ctx context.Context, plan wire.Plan, sink *Sink, report dr.Progress) error {
	plan.Names = true
	if plan.Track {
		plan.Snapshot, plan.Since = sink.ID(), sink.Since(ctx, wire.MaxSince)
	}
	out, err := s.read(ctx, plan, sink, report)
	if err != nil {
		return err
	}
	if err := sink.Keep(ctx, out); err != nil {
		return err
	}
	if plan.Track {
		// If it is not heard the agent goes on remembering what was written before this snapshot as well.
		_ = s.w.Kept()
	}
	return nil
}

// read reads the disks into the sink.
func (s *Session) read(ctx context.Context, plan wire.Plan, sink *Sink, report dr.Progress) (Outcome, error) {
	if err := s.w.Message(wire.KindAskCapture, plan); err != nil {
		return Outcome{}, fmt.Errorf("ask the agent: %w", err)
	}
	var layout wire.Layout
	if err := s.expect(wire.KindLayout, &layout); err != nil {
		return Outcome{}, err
	}
	if err := check(layout); err != nil {
		return Outcome{}, err
	}
	begun := Layout{Inventory: layout.Inventory, Disks: layout.Disks, Compares: true}
	sums, err := sink.Begin(ctx, begun)
	if err != nil {
		return Outcome{}, err
	}
	sink.reportHad(begun, report)
	rec := newReceiver(ctx, sink, sums, report)
	defer rec.stop()
	rec.freeze = max(plan.FreezeLimit, dr.DefaultFreezeLimit)
	for i, known := range sums {
		rec.blind[i] = plan.Track && layout.Disks[i].Tracked && sink.Inherits(i)
		if err := s.tell(i, known, rec.blind[i], report); err != nil {
			return Outcome{}, fmt.Errorf("tell the agent what is known of disk %s: %w", layout.Disks[i].Name, s.lastWord(err))
		}
	}
	if err := s.w.Go(); err != nil {
		return Outcome{}, fmt.Errorf("tell the agent to begin: %w", s.lastWord(err))
	}
	done, err := rec.receive(s.r)
	if err != nil {
		return Outcome{}, err
	}
	out, err := outcome(layout.Inventory, done, s.counted.n.Load())
	out.Names, out.NoNames = rec.names, plain(done.NoNames)
	if plan.Track && err == nil {
		if len(done.Reasons) != len(sums) {
			return Outcome{}, fmt.Errorf("end the capture: the agent gives %d reasons: %w", len(done.Reasons), wire.ErrGarbage)
		}
		for _, reason := range done.Reasons {
			out.Reasons = append(out.Reasons, plain(reason))
		}
	}
	return out, err
}

// tell sends the fingerprints of one disk. An agent that knows what was written needs none.
func (s *Session) tell(disk int, known *wire.Sums, blind bool, report dr.Progress) error {
	k := wire.Known{Disk: disk, BlockSize: known.BlockSize, Seed: known.Seed[:], Blind: blind}
	if err := s.w.Message(wire.KindKnown, k); err != nil || blind {
		return err
	}
	report.Report("fingerprints", 0, known.Len(), "blocks")
	return s.w.Sums(disk, known)
}

// check refuses a layout that makes no sense.
func check(l wire.Layout) error {
	if len(l.Disks) == 0 || len(l.Disks) > wire.MaxDisks || len(l.Disks) != len(l.Inventory.Disks) {
		return fmt.Errorf("look at the server's disks: the agent lists %d, and %d in its inventory: %w", len(l.Disks), len(l.Inventory.Disks), wire.ErrGarbage)
	}
	seen := map[string]bool{}
	for i, d := range l.Disks {
		if d.Name == "" || len(d.Name) > 255 || plain(d.Name) != d.Name || d.Size <= 0 || seen[d.Name] {
			return fmt.Errorf("look at the server's disks: disk %d is %q with %d bytes: %w", i, plain(d.Name), d.Size, wire.ErrGarbage)
		}
		seen[d.Name] = true
	}
	return nil
}

// outcome checks the agent's last word.
func outcome(inv dr.Inventory, done wire.Done, sent int64) (Outcome, error) {
	switch done.Consistency {
	case dr.CrashConsistent, dr.FilesystemConsistent:
	case dr.ApplicationConsistent:
		if rested(done.Applications) {
			break
		}
		fallthrough
	default:
		return Outcome{}, fmt.Errorf("end the capture: the agent claims consistency %q: %w", plain(string(done.Consistency)), wire.ErrGarbage)
	}
	if done.Age < 0 || done.Age > 24*time.Hour || done.Frozen < 0 || done.Frozen > 24*time.Hour || done.Read < 0 || len(done.Notes) > maxNotes || len(done.Applications) > dr.MaxApplications {
		return Outcome{}, fmt.Errorf("end the capture: the agent's figures make no sense: %w", wire.ErrGarbage)
	}
	o := Outcome{Inventory: inv, Taken: time.Now().Add(-done.Age), Consistency: done.Consistency, Read: done.Read, Sent: sent, Frozen: done.Frozen}
	for _, n := range done.Notes {
		o.Notes = append(o.Notes, plain(n))
	}
	for _, a := range done.Applications {
		if a.Still < 0 || a.Still > 24*time.Hour {
			return Outcome{}, fmt.Errorf("end the capture: %s stood still for %s: %w", plain(a.Name), a.Still, wire.ErrGarbage)
		}
		a.Name, a.Reason = plain(a.Name), plain(a.Reason)
		o.Applications = append(o.Applications, a)
	}
	if !done.Provider.Known() || len(done.PassedOver) > wire.MaxProviders {
		return Outcome{}, fmt.Errorf("end the capture: the agent claims provider %q, after %d others: %w", plain(string(done.Provider)), len(done.PassedOver), wire.ErrGarbage)
	}
	o.Provider = done.Provider
	for _, p := range done.PassedOver {
		if !p.Provider.Known() {
			return Outcome{}, fmt.Errorf("end the capture: the agent passed over provider %q: %w", plain(string(p.Provider)), wire.ErrGarbage)
		}
		o.PassedOver = append(o.PassedOver, dr.PassedOver{Provider: p.Provider, Reason: plain(p.Reason)})
	}
	return o, nil
}

// rested says whether every application was at rest, and there was one.
func rested(all []dr.Application) bool {
	return len(all) > 0 && !slices.ContainsFunc(all, func(a dr.Application) bool { return !a.AtRest })
}

// receiver takes the blocks of one capture: one goroutine reads frames, several unpack, check and write. Whatever a
// writer waits for, at most inFlight blocks are in memory.
type receiver struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	sink   *Sink
	sums   []*wire.Sums
	report dr.Progress

	work    chan []byte
	free    chan []byte
	pending sync.WaitGroup // blocks of this pass that are not yet written
	workers sync.WaitGroup
	unzip   *zstd.Decoder
	part    string
	passes  int
	freeze  time.Duration // the longest that anything may stand still
	still   time.Time     // nothing stands still after that
	seen    [][]uint64    // by disk, one bit a block: it came in this pass
	blind   []bool        // by disk: the agent has no fingerprints of it
	came    []int64       // by disk: blocks, in all passes
	names   *signs.Listing
}

func newReceiver(ctx context.Context, sink *Sink, sums []*wire.Sums, report dr.Progress) *receiver {
	r := &receiver{sink: sink, sums: sums, report: report, work: make(chan []byte, inFlight), free: make(chan []byte, inFlight)}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	// The options are constants that the library accepts.
	r.unzip, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(wire.MaxBlock), zstd.WithDecoderLowmem(true))
	for _, s := range sums {
		r.seen = append(r.seen, make([]uint64, (s.Len()+63)/64))
		r.blind, r.came = append(r.blind, false), append(r.came, 0)
	}
	for range min(writersMax, max(2, runtime.GOMAXPROCS(0))) {
		r.workers.Go(r.write)
	}
	for range inFlight {
		r.free <- nil
	}
	return r
}

// stop ends the writers.
func (r *receiver) stop() {
	r.cancel(nil)
	close(r.work)
	r.workers.Wait()
	r.unzip.Close()
}

// receive reads frames until the agent is done.
func (r *receiver) receive(from *wire.Reader) (wire.Done, error) {
	var done wire.Done
	for {
		if r.sink.due() && time.Now().After(r.still) { // nobody waits for the store while something stands still
			if err := r.settle(); err != nil {
				return done, err
			}
			r.sink.keepPartial(r.ctx)
		}
		var buf []byte
		select {
		case buf = <-r.free:
		case <-r.ctx.Done():
			return done, context.Cause(r.ctx)
		}
		kind, payload, err := from.Next(buf)
		if cause := context.Cause(r.ctx); cause != nil {
			return done, cause
		}
		if err != nil {
			_ = r.settle() // what came is kept
			return done, fmt.Errorf("hear from the agent: the connection ended in the middle of the capture: %w", cut(err))
		}
		if kind == wire.KindBlock {
			b, err := wire.ParseBlock(payload)
			if err == nil {
				err = r.take(b.Disk, b.Number, 1)
			}
			if err != nil {
				return done, err
			}
			r.pending.Add(1)
			r.work <- payload
			continue
		}
		r.free <- buf
		switch kind {
		case wire.KindDone:
			if err := r.settle(); err != nil {
				return done, err
			}
			if err := wire.Decode(payload, &done); err != nil {
				return done, err
			}
			return done, r.agree(done)
		case wire.KindFailure:
			return done, failure(payload)
		}
		if err := r.control(kind, payload); err != nil {
			return done, err
		}
	}
}

// control handles what is neither a block nor the end.
func (r *receiver) control(kind wire.Kind, payload []byte) error {
	switch kind {
	case wire.KindPass:
		var p wire.Pass
		if err := wire.Decode(payload, &p); err != nil {
			return err
		}
		if r.passes++; r.passes > maxPasses {
			return fmt.Errorf("hear from the agent: more than %d passes: %w", maxPasses, wire.ErrGarbage)
		}
		r.part = fmt.Sprintf("read, pass %d", r.passes)
		if r.sink.had > 0 {
			r.part += ", going on after a cut"
		}
		if p.Frozen {
			r.still = time.Now().Add(r.freeze + freezeBegins)
			r.part = "read at one instant"
		}
		r.report.Report(r.part, 0, max(0, p.Total), "bytes")
		for _, s := range r.seen {
			clear(s)
		}
		return r.settle() // what comes now replaces what came before
	case wire.KindZeros:
		return r.zeros(payload)
	case wire.KindNames:
		if r.names != nil {
			return fmt.Errorf("hear from the agent: a second listing of names: %w", wire.ErrGarbage)
		}
		var err error
		r.names, err = listing(payload)
		return err
	case wire.KindTick:
		var t wire.Tick
		if err := wire.Decode(payload, &t); err != nil {
			return err
		}
		r.report.Report(r.part, max(0, t.Done), max(0, t.Total), "bytes")
		return nil
	}
	return fmt.Errorf("hear from the agent: %w: kind %q in the middle of a capture", wire.ErrGarbage, byte(kind))
}

// take notes that blocks came in this pass, each of them for the first time: two that are written side by side are never
// the same one, and no pass is longer than the disks.
func (r *receiver) take(disk int, first, count int64) error {
	if disk >= len(r.sums) || first+count > r.sums[disk].Len() {
		return fmt.Errorf("receive %d blocks from %d of disk %d: there are none such: %w", count, first, disk, wire.ErrGarbage)
	}
	for b := first; b < first+count; b++ {
		word, bit := &r.seen[disk][b/64], uint64(1)<<(b%64)
		if *word&bit != 0 {
			return fmt.Errorf("receive block %d of disk %d: it came twice in one pass: %w", b, disk, wire.ErrGarbage)
		}
		*word |= bit
	}
	r.came[disk] += count
	return nil
}

// settle waits until everything received is written.
func (r *receiver) settle() error {
	r.pending.Wait()
	return context.Cause(r.ctx)
}

// errDiffers is a capture at whose end both sides do not have the same.
var errDiffers = errors.New("what arrived is not what the agent read")

// agree compares what both sides have now.
func (r *receiver) agree(done wire.Done) error {
	if n := len(r.sums); len(done.Digests) != n || slices.Contains(r.blind, true) && len(done.Sent) != n {
		return fmt.Errorf("end the capture: the agent ends with %d disks: %w", len(done.Digests), wire.ErrGarbage)
	}
	for i, s := range r.sums {
		if r.blind[i] && done.Sent[i] != r.came[i] || !r.blind[i] && !bytes.Equal(done.Digests[i], s.Digest()) {
			return fmt.Errorf("end the capture: disk %d: %w", i, errDiffers)
		}
	}
	return nil
}

func (r *receiver) zeros(payload []byte) error {
	z, err := wire.ParseZeros(payload)
	if err != nil {
		return err
	}
	if err := r.take(z.Disk, z.First, z.Count); err != nil {
		return err
	}
	if err := r.sink.Zero(context.WithoutCancel(r.ctx), z.Disk, z.First, z.Count); err != nil {
		return err
	}
	for b := z.First; b < z.First+z.Count; b++ {
		r.sums[z.Disk].Set(b, wire.Sum{})
	}
	return nil
}

// write is one writer. After a failure it goes on taking blocks without writing them, so that nobody waits for it.
func (r *receiver) write() {
	buf := make([]byte, 0, wire.MaxBlock)
	for payload := range r.work {
		if r.ctx.Err() == nil {
			if err := r.block(payload, buf); err != nil {
				r.cancel(err)
			}
		}
		r.pending.Done()
		r.free <- payload
	}
}

// block unpacks, checks and writes one block.
func (r *receiver) block(payload, buf []byte) error {
	b, err := wire.ParseBlock(payload)
	if err != nil {
		return err
	}
	s, data, frame := r.sums[b.Disk], b.Data, []byte(nil)
	if b.Zstd {
		frame = b.Data
		if data, err = r.unzip.DecodeAll(b.Data, buf[:0]); err != nil {
			return fmt.Errorf("unpack block %d of disk %d: %w: %w", b.Number, b.Disk, wire.ErrGarbage, err)
		}
	}
	if len(data) != s.Length(b.Number) || s.Seed.Sum(b.Number, data) != b.Sum {
		return fmt.Errorf("receive block %d of disk %d: it was damaged on the way: %w", b.Number, b.Disk, wire.ErrGarbage)
	}
	if r.blind[b.Disk] && s.At(b.Number) == b.Sum {
		return nil // written with what was there already
	}
	// What has begun is finished: half of it would leave nothing to go on with.
	if err := r.sink.Write(context.WithoutCancel(r.ctx), b.Disk, b.Number, data, frame); err != nil {
		return err
	}
	s.Set(b.Number, b.Sum)
	return nil
}
