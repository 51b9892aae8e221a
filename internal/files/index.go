package files

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/musterdr/muster/internal/fileset"
)

// indexName is the file kept with a snapshot.
const indexName = "files.index"

const indexMagic = "muster-index-1\n"

// Limits of an index.
const (
	MaxEntries     = 8 << 20   // names; what comes after them is left out, and that is said
	MaxNameBytes   = 256 << 20 // of all names
	maxIndexHeader = 1 << 20   // bytes
	maxIndexBytes  = 4 << 30   // of entries, unpacked
	maxMounts      = 256
	maxNotes       = 64
)

// Mount is a file system of an image and where its files appear.
type Mount struct {
	Device string `json:"device"`        // as the opener calls it, options of a btrfs subvolume included
	At     string `json:"at"`            // "/" is the system; "/@NAME" what the system does not mount
	Type   string `json:"type"`          // ext4, xfs, …
	Own    bool   `json:"own,omitempty"` // the system does not mount it
}

// Header is what an index says of itself.
type Header struct {
	Made    time.Time `json:"made"`
	Mounts  []Mount   `json:"mounts"`
	Notes   []string  `json:"notes,omitempty"` // what could not be seen, and why
	Entries int64     `json:"entries"`
}

// writeIndex writes an index, docs/formats/files.md. Entries are in fileset.Compare's order.
func writeIndex(w io.Writer, h Header, entries []fileset.Entry) error {
	h.Entries = int64(len(entries))
	head, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(w, indexMagic); err != nil {
		return err
	}
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err != nil {
		return err
	}
	_, err = z.Write(append(binary.AppendUvarint(nil, uint64(len(head))), head...))
	var buf []byte
	for i := 0; err == nil && i < len(entries); i++ {
		buf = entries[i].AppendBinary(buf[:0])
		_, err = z.Write(append(binary.AppendUvarint(nil, uint64(len(buf))), buf...))
	}
	return errors.Join(err, z.Close())
}

var errIndex = errors.New("the index of the files is not one that this release can read")

// readIndex reads an index, which comes from a store that somebody else may have written to, and calls each for its entries.
func readIndex(r io.Reader, each func(*fileset.Entry) error) (h Header, err error) {
	magic := make([]byte, len(indexMagic))
	if _, err := io.ReadFull(r, magic); err != nil || string(magic) != indexMagic {
		return h, errors.Join(errIndex, err)
	}
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
	if err != nil {
		return h, err
	}
	defer z.Close()
	in := bufio.NewReaderSize(io.LimitReader(z, maxIndexBytes), 256<<10)
	var buf []byte
	next := func(limit uint64) error {
		n, err := binary.ReadUvarint(in)
		if err != nil || n > limit {
			return errors.Join(errIndex, err)
		}
		if uint64(cap(buf)) < n {
			buf = make([]byte, n)
		}
		buf = buf[:n]
		if _, err := io.ReadFull(in, buf); err != nil {
			return errors.Join(errIndex, err)
		}
		return nil
	}
	if err := next(maxIndexHeader); err != nil {
		return h, err
	}
	if err := json.Unmarshal(buf, &h); err != nil || h.Entries < 0 || h.Entries > MaxEntries || len(h.Mounts) > maxMounts || len(h.Notes) > maxNotes {
		return h, errors.Join(errIndex, err)
	}
	last := ""
	for range h.Entries {
		if err := next(fileset.MaxEntryBytes); err != nil {
			return h, err
		}
		e, rest, err := fileset.Decode(buf)
		if err != nil || len(rest) > 0 || last != "" && fileset.Compare(last, e.Path) >= 0 {
			return h, fmt.Errorf("%w: after %.100q: %w", errIndex, last, errors.Join(err))
		}
		last = e.Path
		if err := each(&e); err != nil {
			return h, err
		}
	}
	if _, err := in.ReadByte(); !errors.Is(err, io.EOF) {
		return h, errIndex
	}
	return h, nil
}
