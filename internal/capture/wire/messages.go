package wire

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Hello says who speaks.
type Hello struct {
	Version string `json:"version"` // of the agent
	Arch    string `json:"arch"`    // GOARCH
	UID     int    `json:"uid"`
}

// Plan says what to read. An inventory uses only Disks.
type Plan struct {
	Disks       []string      `json:"disks,omitempty"`   // kernel names or absolute paths; none: every disk in use
	FreezeLimit time.Duration `json:"freeze_limit"`      // the longest that file systems may stand still
	Rate        int64         `json:"rate,omitempty"`    // bytes a second that are read at most while the server goes on; 0: no limit
	Volumes     bool          `json:"volumes,omitempty"` // snapshots of logical volumes may be made, which go before the end
	Track       bool          `json:"track,omitempty"`   // leave programs in the server's kernel that note what is written
	Names       bool          `json:"names,omitempty"`   // list the names of the server's files
	Snapshot    string        `json:"snapshot,omitempty"`
	// Since names the snapshot whose fingerprints the appliance has, and those before it, newest first: what was written
	// since any of them covers what was written since the first.
	Since []string `json:"since,omitempty"`
	// Hooks says what is done about the applications.
	Hooks dr.Hooks `json:"hooks,omitzero"`
}

// MaxSince bounds Plan.Since.
const MaxSince = 64

// Layout is what the agent found to read. Inventory.Disks has the same disks in the same order.
type Layout struct {
	Inventory dr.Inventory `json:"inventory"`
	Disks     []Disk       `json:"disks"`
}

// Disk is one disk to read.
type Disk struct {
	Name    string `json:"name"`
	Size    int64  `json:"size"`              // bytes
	Tracked bool   `json:"tracked,omitempty"` // it is known what was written since one of Plan.Since
	Reason  string `json:"reason,omitempty"`  // why not
}

// Known opens the fingerprints of one disk, which follow in Sums frames; those that do not follow stand for zeros.
type Known struct {
	Disk      int    `json:"disk"`
	BlockSize int    `json:"block_size"`
	Seed      []byte `json:"seed"`            // SeedSize bytes
	Blind     bool   `json:"blind,omitempty"` // of a tracked disk: no fingerprints follow, only what was written is read, and all of it sent
}

// Pass announces that all disks are read from the beginning.
type Pass struct {
	Number int   `json:"number"` // from 1
	Frozen bool  `json:"frozen"` // this is the one that counts, if it holds
	Total  int64 `json:"total"`  // bytes
}

// Tick says how far a pass has come.
type Tick struct {
	Done  int64 `json:"done"`
	Total int64 `json:"total"`
}

// Done says that the blocks sent and known are the disks at one instant.
type Done struct {
	Age         time.Duration  `json:"age"` // how long ago that instant was
	Consistency dr.Consistency `json:"consistency"`
	Frozen      time.Duration  `json:"frozen"`
	Read        int64          `json:"read"` // bytes, all passes
	Passes      int            `json:"passes"`
	Digests     [][]byte       `json:"digests"`            // Sums.Digest of each disk, as the agent has them now; none of a blind one
	Sent        []int64        `json:"sent"`               // blocks of each disk, zeros included, in all passes
	Reasons     []string       `json:"reasons"`            // of each disk: why it was read as a whole; "" if only what was written was
	Notes       []string       `json:"notes,omitempty"`    // what an operator may want to know
	NoNames     string         `json:"no_names,omitempty"` // why no names were listed, where Plan.Names asked for them
	// Applications are those that were found running.
	Applications []dr.Application `json:"applications,omitempty"`

	Provider   dr.Provider     `json:"provider,omitempty"`
	PassedOver []dr.PassedOver `json:"passed_over,omitempty"` // at most MaxProviders
}

// MaxProviders bounds Done.PassedOver.
const MaxProviders = 16

// Failure says why there will be no Done.
type Failure struct {
	Text string `json:"text"`
}

// Block is one block's content.
type Block struct {
	Disk   int
	Zstd   bool
	Number int64
	Sum    Sum // of the content before compression
	Data   []byte
}

// Block sends a block. It is buffered.
func (w *Writer) Block(b Block) error {
	var head [blockHeader]byte
	binary.LittleEndian.PutUint16(head[0:], uint16(b.Disk))
	if b.Zstd {
		head[2] = 1
	}
	binary.LittleEndian.PutUint64(head[3:], uint64(b.Number))
	copy(head[11:], b.Sum[:])
	return w.frame(KindBlock, head[:], b.Data)
}

// ParseBlock reads a block. Data is part of the payload.
func ParseBlock(p []byte) (Block, error) {
	if len(p) <= blockHeader || p[2] > 1 {
		return Block{}, fmt.Errorf("read a block: %w", ErrGarbage)
	}
	b := Block{Disk: int(binary.LittleEndian.Uint16(p)), Zstd: p[2] == 1, Number: int64(binary.LittleEndian.Uint64(p[3:])), Data: p[blockHeader:]}
	copy(b.Sum[:], p[11:])
	if b.Disk >= MaxDisks || b.Number < 0 {
		return Block{}, fmt.Errorf("read a block: disk %d, block %d: %w", b.Disk, b.Number, ErrGarbage)
	}
	return b, nil
}

// Zeros says that blocks hold nothing but zeros.
type Zeros struct {
	Disk  int
	First int64
	Count int64
}

// Zeros sends a run of zero blocks. It is buffered.
func (w *Writer) Zeros(z Zeros) error {
	var head [zerosHeader]byte
	binary.LittleEndian.PutUint16(head[0:], uint16(z.Disk))
	binary.LittleEndian.PutUint64(head[2:], uint64(z.First))
	binary.LittleEndian.PutUint64(head[10:], uint64(z.Count))
	return w.frame(KindZeros, head[:])
}

// ParseZeros reads a run of zero blocks.
func ParseZeros(p []byte) (Zeros, error) {
	if len(p) != zerosHeader {
		return Zeros{}, fmt.Errorf("read a run of zeros: %w", ErrGarbage)
	}
	z := Zeros{Disk: int(binary.LittleEndian.Uint16(p)), First: int64(binary.LittleEndian.Uint64(p[2:])), Count: int64(binary.LittleEndian.Uint64(p[10:]))}
	if z.Disk >= MaxDisks || z.First < 0 || z.Count < 1 || z.First > 1<<62 || z.Count > 1<<62 {
		return Zeros{}, fmt.Errorf("read a run of zeros: disk %d, %d blocks from %d: %w", z.Disk, z.Count, z.First, ErrGarbage)
	}
	return z, nil
}

// Sums sends the fingerprints of a disk, without long runs that stand for zeros.
func (w *Writer) Sums(disk int, s *Sums) error {
	for at := int64(0); at < s.Len(); at += SumsAtOnce {
		var head [sumsHeader]byte
		binary.LittleEndian.PutUint16(head[0:], uint16(disk))
		binary.LittleEndian.PutUint64(head[2:], uint64(at))
		end := min(s.Len(), at+SumsAtOnce)
		if IsZero(s.raw[at*SumSize : end*SumSize]) {
			continue
		}
		if err := w.frame(KindSums, head[:], s.raw[at*SumSize:end*SumSize]); err != nil {
			return err
		}
	}
	return w.Flush()
}

// ParseSums reads some fingerprints of one disk: the block of the first, and 16 bytes each.
func ParseSums(p []byte) (disk int, first int64, raw []byte, err error) {
	if len(p) < sumsHeader || (len(p)-sumsHeader)%SumSize != 0 {
		return 0, 0, nil, fmt.Errorf("read fingerprints: %w", ErrGarbage)
	}
	disk, first = int(binary.LittleEndian.Uint16(p)), int64(binary.LittleEndian.Uint64(p[2:]))
	if disk >= MaxDisks || first < 0 || first > 1<<58 {
		return 0, 0, nil, fmt.Errorf("read fingerprints: disk %d, block %d: %w", disk, first, ErrGarbage)
	}
	return disk, first, p[sumsHeader:], nil
}
