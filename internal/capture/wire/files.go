package wire

import (
	"encoding/binary"
	"fmt"

	"github.com/musterdr/muster/internal/fileset"
)

// Limits of the part of the conversation that is about files, in bytes.
const (
	MaxPiece  = 1 << 20
	knownSize = 64 << 10 // of a frame of what is known
)

// FilesPlan says what to read file by file.
type FilesPlan struct {
	Roots   []string `json:"roots"`
	Exclude []string `json:"exclude,omitempty"`
	Rate    int64    `json:"rate,omitempty"` // bytes of content a second that are read at most; 0: no limit
}

// FilesDone says that every file was read.
type FilesDone struct {
	Entries int64    `json:"entries"` // those that are as they are known included
	Read    int64    `json:"read"`    // bytes of content, also of what had to be read again
	Files   int64    `json:"files"`   // whose content was read
	Notes   []string `json:"notes,omitempty"`
}

// KnownFile is what is known of one name.
type KnownFile struct {
	Path     string
	Identity fileset.Identity
}

// Was gathers what is known of files and sends it, in as few frames as may be. It is used by one goroutine.
type Was struct {
	w   *Writer
	buf []byte
}

// Was begins to tell what is known of files, in fileset.Compare's order. Go ends it.
func (w *Writer) Was() *Was { return &Was{w: w} }

// Add tells what is known of one name.
func (k *Was) Add(f KnownFile) error {
	k.buf = binary.AppendUvarint(k.buf, uint64(len(f.Path)))
	k.buf = append(append(k.buf, f.Path...), f.Identity[:]...)
	if len(k.buf) < knownSize {
		return nil
	}
	return k.flush()
}

func (k *Was) flush() error {
	if len(k.buf) == 0 {
		return nil
	}
	err := k.w.frame(KindWas, k.buf)
	k.buf = k.buf[:0]
	return err
}

// Go says that this was all.
func (k *Was) Go() error {
	if err := k.flush(); err != nil {
		return err
	}
	return k.w.Go()
}

// ParseWas reads what is known of some files.
func ParseWas(p []byte) (out []KnownFile, err error) {
	for len(p) > 0 {
		n, used := binary.Uvarint(p)
		if used <= 0 || n > fileset.MaxPath || uint64(len(p)-used) < n+uint64(len(fileset.Identity{})) {
			return nil, fmt.Errorf("read what is known of files: %w", ErrGarbage)
		}
		k := KnownFile{Path: string(p[used : used+int(n)])}
		p = p[used+int(n):]
		p = p[copy(k.Identity[:], p):]
		out = append(out, k)
	}
	return out, nil
}

// Same says that the next names that are known are as they are known; Gone that they are not there any more. Both are buffered.
func (w *Writer) Same(count int64) error { return w.count(KindSame, count) }

// Gone says that the next names that are known are not there any more.
func (w *Writer) Gone(count int64) error { return w.count(KindGone, count) }

func (w *Writer) count(kind Kind, count int64) error {
	return w.frame(kind, binary.LittleEndian.AppendUint64(nil, uint64(count)))
}

// ParseCount reads what Same and Gone wrote.
func ParseCount(p []byte) (int64, error) {
	if len(p) != 8 || int64(binary.LittleEndian.Uint64(p)) < 1 {
		return 0, fmt.Errorf("read a count of files: %w", ErrGarbage)
	}
	return int64(binary.LittleEndian.Uint64(p)), nil
}

// Piece sends a piece of the content of the file whose entry follows. It is buffered.
func (w *Writer) Piece(zstd bool, data []byte) error {
	var head [1]byte
	if zstd {
		head[0] = 1
	}
	return w.frame(KindPiece, head[:], data)
}

// ParsePiece reads a piece. Data is part of the payload.
func ParsePiece(p []byte) (zstd bool, data []byte, err error) {
	if len(p) < 2 || p[0] > 1 {
		return false, nil, fmt.Errorf("read a piece of a file: %w", ErrGarbage)
	}
	return p[0] == 1, p[1:], nil
}

// Again says that the pieces since the last entry are void: the file is read again. It is buffered.
func (w *Writer) Again() error { return w.frame(KindAgain) }

// Entry sends a name that is new or changed, after its content. It is buffered.
func (w *Writer) Entry(e *fileset.Entry) error {
	return w.frame(KindEntry, e.AppendBinary(make([]byte, 0, 512)))
}

// ParseEntry reads an entry.
func ParseEntry(p []byte) (fileset.Entry, error) {
	e, rest, err := fileset.Decode(p)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes follow", len(rest))
	}
	if err != nil {
		return e, fmt.Errorf("%w: %w", ErrGarbage, err)
	}
	return e, nil
}
