package fileset

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// Kind is what an entry is.
type Kind byte

// The kinds of entry.
const (
	File      Kind = 'f'
	Folder    Kind = 'd'
	Symlink   Kind = 'l'
	Link      Kind = 'h' // another name of the file at Target
	CharDev   Kind = 'c'
	BlockDev  Kind = 'b'
	NamedPipe Kind = 'p'
)

// KindOf says what the mode of a file stands for, as stat(2) gives it on Linux; 0 for a socket and anything else that is not kept.
func KindOf(mode uint32) Kind {
	const kinds = 0o170000 // inode(7)
	return map[uint32]Kind{0o100000: File, 0o040000: Folder, 0o120000: Symlink, 0o020000: CharDev, 0o060000: BlockDev, 0o010000: NamedPipe}[mode&kinds]
}

// Limits of an entry. Linux allows no more of the first three.
const (
	MaxPath       = 4095      // bytes
	MaxName       = 255       // bytes of one component
	MaxAttr       = 64 << 10  // bytes of one attribute's value
	MaxAttrs      = 512       // attributes of one entry
	MaxAttrBytes  = 256 << 10 // names and values of one entry's attributes
	MaxExtents    = 16 << 10  // runs of data in one file; more are joined, and their holes read as zeros
	MaxSize       = 8<<60 - 1 // bytes of a file: what Linux can count
	MaxEntryBytes = 1 << 20   // of an encoded entry
)

// Time is an instant as a file system keeps it, also one before 1970.
type Time struct {
	Sec  int64
	Nsec uint32
}

// Before says whether t is earlier than u.
func (t Time) Before(u Time) bool { return t.Sec < u.Sec || t.Sec == u.Sec && t.Nsec < u.Nsec }

// Attr is an extended attribute. Labels and access control lists are attributes, too.
type Attr struct {
	Name  string
	Value string
}

// Extent is a run of data in a file; what lies between two is a hole. In bytes.
type Extent struct {
	Offset int64
	Length int64
}

// Entry is one name of a file set.
type Entry struct {
	Kind   Kind
	Path   string // absolute, of the server
	Mode   uint32 // permissions, set-uid, set-gid, sticky: the low 12 bits
	UID    uint32
	GID    uint32
	Mtime  Time
	Target string // of a Symlink: where it leads; of a Link: the path of the File, which came before
	Major  uint32 // of a device
	Minor  uint32
	Size   int64    // of a File
	Sparse bool     // Data says where there is any; otherwise all of it is data
	Data   []Extent // in order, apart from one another, inside of Size
	Attrs  []Attr   // by name

	// By what the next capture sees whether anything changed.
	Dev   uint64
	Inode uint64
	Ctime Time

	Recent   bool // it was written so shortly before it was read that its times cannot tell a later change: read it again
	Unstable bool // it was written to while it was read, each time
	Edge     bool // a folder of which nothing below was captured: another file system begins here
}

// Stored is how many bytes of content the entry has, holes left out.
func (e *Entry) Stored() (n int64) {
	switch {
	case e.Kind != File:
		return 0
	case !e.Sparse:
		return e.Size
	}
	for _, x := range e.Data {
		n += x.Length
	}
	return n
}

// ErrBad is what is no entry, or no file set.
var ErrBad = errors.New("this is no file set that this release can read")

const (
	flagSparse = 1 << iota
	flagRecent
	flagUnstable
	flagEdge
	flagsAll = flagSparse | flagRecent | flagUnstable | flagEdge
)

// AppendBinary appends the encoding, docs/formats/files.md. The same entry always has the same one.
func (e *Entry) AppendBinary(b []byte) []byte {
	flags := byte(0)
	for flag, on := range map[byte]bool{flagSparse: e.Sparse, flagRecent: e.Recent, flagUnstable: e.Unstable, flagEdge: e.Edge} {
		if on {
			flags |= flag
		}
	}
	b = append(b, byte(e.Kind), flags)
	b = appendString(b, e.Path)
	for _, n := range []uint64{uint64(e.Mode), uint64(e.UID), uint64(e.GID)} {
		b = binary.AppendUvarint(b, n)
	}
	b = appendTime(b, e.Mtime)
	b = appendTime(b, e.Ctime)
	b = binary.AppendUvarint(b, e.Dev)
	b = binary.AppendUvarint(b, e.Inode)
	b = binary.AppendUvarint(b, uint64(len(e.Attrs)))
	for _, a := range e.Attrs {
		b = appendString(appendString(b, a.Name), a.Value)
	}
	switch e.Kind {
	case File:
		b = binary.AppendUvarint(b, uint64(e.Size))
		if e.Sparse {
			b = binary.AppendUvarint(b, uint64(len(e.Data)))
			at := int64(0)
			for _, x := range e.Data {
				b = binary.AppendUvarint(b, uint64(x.Offset-at))
				b = binary.AppendUvarint(b, uint64(x.Length))
				at = x.Offset + x.Length
			}
		}
	case Symlink, Link:
		b = appendString(b, e.Target)
	case CharDev, BlockDev:
		b = binary.AppendUvarint(b, uint64(e.Major))
		b = binary.AppendUvarint(b, uint64(e.Minor))
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendTime(b []byte, t Time) []byte {
	return binary.AppendUvarint(binary.AppendVarint(b, t.Sec), uint64(t.Nsec))
}

// Decode reads one entry from the front of b and gives what follows it.
func Decode(b []byte) (e Entry, rest []byte, err error) {
	d := decoder{b: b}
	d.entry(&e)
	if d.bad == "" {
		d.bad = e.wrong()
	}
	if d.bad != "" {
		return Entry{}, nil, fmt.Errorf("read entry %.100q: %w: %s", e.Path, ErrBad, d.bad)
	}
	return e, d.b, nil
}

// decoder reads numbers and strings. The first thing that is wrong sticks.
type decoder struct {
	b   []byte
	bad string
}

func (d *decoder) number(limit uint64) uint64 {
	n, used := binary.Uvarint(d.b)
	if used <= 0 || n > limit {
		d.fail("a number is cut off or too large")
		return 0
	}
	d.b = d.b[used:]
	return n
}

func (d *decoder) string(limit int) string {
	n := d.number(uint64(limit))
	if n > uint64(len(d.b)) {
		d.fail("it is cut off")
		return ""
	}
	s := string(d.b[:n])
	d.b = d.b[n:]
	return s
}

func (d *decoder) time() (t Time) {
	n, used := binary.Varint(d.b)
	if used <= 0 {
		d.fail("a time is cut off")
		return t
	}
	d.b = d.b[used:]
	return Time{Sec: n, Nsec: uint32(d.number(999_999_999))}
}

func (d *decoder) fail(why string) {
	if d.bad == "" {
		d.bad, d.b = why, nil
	}
}

func (d *decoder) entry(e *Entry) {
	if len(d.b) < 2 {
		d.fail("it is cut off")
		return
	}
	flags := d.b[1]
	e.Kind, d.b = Kind(d.b[0]), d.b[2:]
	if flags&^flagsAll != 0 {
		d.fail("it has flags of a later release")
	}
	e.Sparse, e.Recent, e.Unstable, e.Edge = flags&flagSparse != 0, flags&flagRecent != 0, flags&flagUnstable != 0, flags&flagEdge != 0
	e.Path = d.string(MaxPath)
	e.Mode, e.UID, e.GID = uint32(d.number(0o7777)), uint32(d.number(1<<32-1)), uint32(d.number(1<<32-1))
	e.Mtime, e.Ctime = d.time(), d.time()
	e.Dev, e.Inode = d.number(1<<64-1), d.number(1<<64-1)
	total := 0
	for range d.number(MaxAttrs) {
		a := Attr{Name: d.string(MaxName), Value: d.string(MaxAttr)}
		if total += len(a.Name) + len(a.Value); total > MaxAttrBytes {
			d.fail("its attributes are too long")
		}
		if d.bad != "" {
			return
		}
		e.Attrs = append(e.Attrs, a)
	}
	switch e.Kind {
	case File:
		e.Size = int64(d.number(MaxSize))
		if e.Sparse {
			d.extents(e)
		}
	case Symlink, Link:
		e.Target = d.string(MaxPath)
	case CharDev, BlockDev:
		e.Major, e.Minor = uint32(d.number(1<<32-1)), uint32(d.number(1<<32-1))
	}
}

func (d *decoder) extents(e *Entry) {
	at := int64(0)
	for range d.number(MaxExtents) {
		gap, length := int64(d.number(MaxSize)), int64(d.number(MaxSize))
		if gap > e.Size-at || length < 1 || length > e.Size-at-gap {
			d.fail("its data lies outside of it")
			return
		}
		e.Data = append(e.Data, Extent{Offset: at + gap, Length: length})
		at += gap + length
	}
}

// wrong says what makes an entry impossible, "" for nothing.
func (e *Entry) wrong() string {
	if why := badPath(e.Path); why != "" {
		return why
	}
	switch e.Kind {
	case File, Folder, CharDev, BlockDev, NamedPipe:
	case Symlink:
		if e.Target == "" || strings.IndexByte(e.Target, 0) >= 0 {
			return "its target is empty or holds a zero byte"
		}
	case Link:
		if why := badPath(e.Target); why != "" {
			return "its target: " + why
		}
	default:
		return "there is no such kind of entry"
	}
	if e.Sparse && e.Kind != File || e.Edge && e.Kind != Folder {
		return "its flags do not fit its kind"
	}
	for i, a := range e.Attrs {
		if a.Name == "" || strings.IndexByte(a.Name, 0) >= 0 || i > 0 && e.Attrs[i-1].Name >= a.Name {
			return "its attributes are not sorted by name"
		}
	}
	return ""
}

// badPath says what is wrong with an absolute path, "" for nothing. Only a clean one is right.
func badPath(p string) string {
	if p == "/" {
		return ""
	}
	if len(p) > MaxPath || !strings.HasPrefix(p, "/") || strings.IndexByte(p, 0) >= 0 {
		return "its path is not absolute, too long or holds a zero byte"
	}
	for name := range strings.SplitSeq(p[1:], "/") {
		if name == "" || name == "." || name == ".." || len(name) > MaxName {
			return "its path is not a clean one"
		}
	}
	return ""
}

// Identity is a fingerprint of what tells, without reading it, that a name still stands for the same content and everything
// else is as it was. Its zero value is never that of an entry.
type Identity [16]byte

// Identity gives the entry's. One that says it must be read again has the zero value, which equals no other.
func (e *Entry) Identity() (id Identity) {
	if e.Recent || e.Unstable {
		return id
	}
	bare := Entry{Kind: e.Kind, Path: e.Path, Mode: e.Mode, UID: e.UID, GID: e.GID, Mtime: e.Mtime, Ctime: e.Ctime, Dev: e.Dev, Inode: e.Inode,
		Size: e.Size, Major: e.Major, Minor: e.Minor, Edge: e.Edge}
	if e.Kind == Link {
		bare.Target = e.Target
	}
	sum := sha256.Sum256(bare.AppendBinary(make([]byte, 0, 256)))
	copy(id[:], sum[:])
	return id
}

// Equal says whether two entries are the same in everything.
func (e *Entry) Equal(other *Entry) bool {
	return bytes.Equal(e.AppendBinary(nil), other.AppendBinary(nil))
}
