// Package wire is the conversation between an appliance and the agent on a protected server: the frames, the messages
// in them, and the fingerprints by which both sides know what the appliance has already.
//
//	Frame     a kind, a length, a payload; each kind has its own limit
//	Message   a JSON payload: hello, plan, layout, pass, done, …
//	Sums      one fingerprint a block of one disk
//	Was       one fingerprint a name of a file set
//
// # Conversation
//
// It runs over the standard input and output of the agent. Whatever a login shell prints before the agent's greeting is
// skipped.
//
//	agent      "MUSTER-AGENT/1\n" Hello
//	appliance  AskInventory                      → Inventory            (any number of times)
//	appliance  AskCapture{Plan}                  → Layout
//	appliance  Known, Sums … for each disk, Go   → Pass, (Block | Zeros | Tick)…, Pass, …, Names once, Done
//	appliance  Kept, once the snapshot is safe; or it ends the conversation
//
// or, file by file, both sides at the same time:
//
//	appliance  AskFiles{FilesPlan} Was … Go          what is known of each name, in fileset.Compare's order
//	agent      (Same | Gone | Piece … Entry)… Done   what became of it, in the same order; Again voids pieces
//
// or to put files back, both sides at the same time:
//
//	appliance  AskRestore{RestorePlan} (Put Piece …)… Go   or Failure, and nothing more is put back
//	agent      Placed … Done                               what became of each, in the same order
//
// Until Kept an agent that tracks the disks forgets nothing of what was written before this capture.
//
// The agent may send Failure instead of anything; that ends the conversation. A pass that reads under freeze is
// announced like any other, and what it found may arrive after the thaw. Between two passes the later content of a
// block replaces the earlier; within a pass a block is sent at most once.
//
// Both sides take the other for hostile: every length is limited before memory is given to it.
//
// Knows: bytes, frames, fingerprints.
// Must not know: SSH, the store, how a disk is read.
package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/musterdr/muster/internal/fileset"
)

// Greeting is the first thing an agent sends; the number is the version of the protocol.
const Greeting = "MUSTER-AGENT/1\n"

// Limits of the conversation, in bytes unless named otherwise.
const (
	MaxNoise    = 64 << 10 // before the greeting
	MaxMessage  = 256 << 10
	MaxFacts    = 16 << 20 // of a message that holds an inventory
	MaxNames    = 1 << 20  // of one that holds a listing of names
	MinBlock    = 4 << 10
	MaxBlock    = 1 << 20
	MaxDisks    = 32
	SumsAtOnce  = 64 << 10 // fingerprints in one frame
	blockHeader = 2 + 1 + 8 + SumSize
	zerosHeader = 2 + 8 + 8
	sumsHeader  = 2 + 8
)

// Kind is what a frame holds.
type Kind byte

// The kinds of frame.
const (
	KindHello     Kind = 'H' // agent: Hello
	KindInventory Kind = 'I' // agent: dr.Inventory
	KindLayout    Kind = 'L' // agent: Layout
	KindPass      Kind = 'P' // agent: Pass
	KindBlock     Kind = 'B' // agent: Block
	KindZeros     Kind = 'Z' // agent: Zeros
	KindTick      Kind = 'T' // agent: Tick
	KindNames     Kind = 'N' // agent: signs.Listing
	KindDone      Kind = 'D' // agent: Done
	KindFailure   Kind = 'F' // agent: Failure
	KindSame      Kind = 'S' // agent: how many of the names that are known are as they were
	KindGone      Kind = 'G' // agent: how many are not there any more
	KindPiece     Kind = 'C' // agent: a piece of a file's content
	KindAgain     Kind = 'A' // agent: nothing
	KindEntry     Kind = 'E' // agent: fileset.Entry

	KindAskInventory Kind = 'i' // appliance: Plan
	KindAskCapture   Kind = 'c' // appliance: Plan
	KindKnown        Kind = 'k' // appliance: Known
	KindSums         Kind = 's' // appliance: fingerprints
	KindGo           Kind = 'g' // appliance: nothing
	KindKept         Kind = 'e' // appliance: nothing
	KindAskFiles     Kind = 'f' // appliance: FilesPlan
	KindWas          Kind = 'w' // appliance: what is known of some files
	KindAskRestore   Kind = 'r' // appliance: RestorePlan
	KindPut          Kind = 'p' // appliance: whether it is only needed, fileset.Entry; its content follows as pieces
	KindPlaced       Kind = 'O' // agent: Placed
)

// limit is the most a frame of a kind may hold; -1 for a kind that does not exist.
func (k Kind) limit() int {
	switch k {
	case KindInventory, KindLayout:
		return MaxFacts
	case KindNames:
		return MaxNames
	case KindBlock:
		return blockHeader + MaxBlock
	case KindZeros:
		return zerosHeader
	case KindSums:
		return sumsHeader + SumsAtOnce*SumSize
	case KindGo, KindKept, KindAgain:
		return 0
	case KindSame, KindGone:
		return 8
	case KindPiece:
		return 1 + MaxPiece
	case KindEntry:
		return fileset.MaxEntryBytes
	case KindPut:
		return 1 + fileset.MaxEntryBytes
	case KindHello, KindPass, KindTick, KindDone, KindFailure, KindAskInventory, KindAskCapture, KindKnown, KindAskFiles, KindWas, KindAskRestore, KindPlaced:
		return MaxMessage
	}
	return -1
}

// ErrGarbage is what the other side sent that is no part of the conversation.
var ErrGarbage = errors.New("the other side does not speak the agent's protocol")

// Reader reads frames. It is used by one goroutine.
type Reader struct {
	r *bufio.Reader
}

// NewReader reads frames from r.
func NewReader(r io.Reader) *Reader { return &Reader{r: bufio.NewReaderSize(r, 256<<10)} }

// Greeting skips what comes before the agent's greeting, and the greeting.
func (r *Reader) Greeting() error {
	var seen []byte
	for range MaxNoise {
		b, err := r.r.ReadByte()
		if err != nil {
			return fmt.Errorf("wait for the agent's greeting: %w (it sent %q)", noEOF(err), tail(seen))
		}
		if seen = append(seen, b); bytes.HasSuffix(seen, []byte(Greeting)) {
			return nil
		}
	}
	return fmt.Errorf("wait for the agent's greeting: %w (it sent %q …)", ErrGarbage, seen[:80])
}

func tail(b []byte) []byte { return b[max(0, len(b)-200):] }

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Next reads one frame, into buf if it is large enough. io.EOF is an end between frames.
func (r *Reader) Next(buf []byte) (Kind, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r.r, head[:]); err != nil {
		return 0, nil, err // io.EOF or io.ErrUnexpectedEOF
	}
	kind, length := Kind(head[0]), int64(binary.LittleEndian.Uint32(head[1:]))
	if limit := kind.limit(); length > int64(limit) {
		return 0, nil, fmt.Errorf("read a frame: kind %q of %d bytes: %w", byte(kind), length, ErrGarbage)
	}
	if int64(cap(buf)) < length {
		buf = make([]byte, length)
	}
	buf = buf[:length]
	if _, err := io.ReadFull(r.r, buf); err != nil {
		return 0, nil, noEOF(err)
	}
	return kind, buf, nil
}

// Writer writes frames. It may be used from many goroutines.
type Writer struct {
	mu  sync.Mutex
	w   *bufio.Writer
	err error
}

// NewWriter writes frames to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: bufio.NewWriterSize(w, 256<<10)} }

// Greet sends the agent's greeting.
func (w *Writer) Greet() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, w.err = w.w.WriteString(Greeting)
	return w.err
}

// Message sends a value as JSON, and everything buffered before it.
func (w *Writer) Message(kind Kind, value any) error {
	b, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("write a message: %w", err)
	}
	if err := w.frame(kind, b); err != nil {
		return err
	}
	return w.Flush()
}

// Go sends a frame without content, and everything buffered before it.
func (w *Writer) Go() error {
	if err := w.frame(KindGo); err != nil {
		return err
	}
	return w.Flush()
}

// Kept says that the snapshot is safe.
func (w *Writer) Kept() error {
	if err := w.frame(KindKept); err != nil {
		return err
	}
	return w.Flush()
}

// Flush sends everything buffered.
func (w *Writer) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = w.w.Flush()
	}
	return w.err
}

func (w *Writer) frame(kind Kind, parts ...[]byte) error {
	length := 0
	for _, p := range parts {
		length += len(p)
	}
	if length > kind.limit() {
		return fmt.Errorf("write a frame: kind %q of %d bytes is over the limit of %d", byte(kind), length, kind.limit())
	}
	head := [5]byte{byte(kind)}
	binary.LittleEndian.PutUint32(head[1:], uint32(length))
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	_, w.err = w.w.Write(head[:])
	for _, p := range parts {
		if w.err == nil {
			_, w.err = w.w.Write(p)
		}
	}
	return w.err
}

// Decode reads a message.
func Decode(payload []byte, into any) error {
	if err := json.Unmarshal(payload, into); err != nil {
		return fmt.Errorf("read a message: %w: %w", ErrGarbage, err)
	}
	return nil
}
