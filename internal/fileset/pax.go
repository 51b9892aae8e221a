package fileset

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// TarWriter writes a tar stream in which nothing of an entry is lost: archive/tar writes neither holes nor names of attributes
// with an =, so the few blocks that make the format are written here. Everything that does not fit the old header goes into
// an extended one before it (POSIX.1-2001), with GNU tar's keys for holes (1.0) and attributes.
//
// It is used by one goroutine. What goes wrong sticks.
type TarWriter struct {
	w   io.Writer
	err error
}

// NewTarWriter writes a tar stream to w.
func NewTarWriter(w io.Writer) *TarWriter { return &TarWriter{w: w} }

const tarBlock = 512

var tarZeros [2 * tarBlock]byte

// Entry writes an entry; content gives its data, holes left out.
func (p *TarWriter) Entry(e *Entry, content io.Reader) error {
	var x paxRecords
	name := strings.TrimPrefix(e.Path, "/")
	size, holes, runs := e.Stored(), []byte(nil), []Extent{{Length: e.Stored()}}
	if e.Sparse {
		runs = blockRuns(e)
		holes, size = sparseMap(e, runs), 0
		for _, r := range runs {
			size += r.Length
		}
		x.add("GNU.sparse.major", "1")
		x.add("GNU.sparse.minor", "0")
		x.add("GNU.sparse.name", name)
		x.add("GNU.sparse.realsize", strconv.FormatInt(e.Size, 10))
		size += int64(len(holes))
	} else {
		x.add("path", name)
	}
	if e.Kind == Symlink || e.Kind == Link {
		x.add("linkpath", strings.TrimPrefix(e.Target, map[Kind]string{Link: "/"}[e.Kind]))
	}
	if e.Kind == File {
		x.add("size", strconv.FormatInt(size, 10))
	}
	x.add("uid", strconv.FormatUint(uint64(e.UID), 10))
	x.add("gid", strconv.FormatUint(uint64(e.GID), 10))
	x.add("mtime", paxTime(e.Mtime))
	for _, a := range e.Attrs {
		x.add("SCHILY.xattr."+strings.NewReplacer("%", "%25", "=", "%3D").Replace(a.Name), a.Value)
	}
	p.block('x', "pax", 0o600, int64(x.Len()), nil)
	p.padded(x.Bytes())
	p.block(tarType(e.Kind), "entry", e.Mode, size, e)
	p.padded(holes)
	for _, r := range runs {
		p.run(e, r, content)
	}
	return p.err
}

// run writes the content of one run, with zeros where the file has a hole in it.
func (p *TarWriter) run(e *Entry, r Extent, content io.Reader) {
	data, end := e.Data, r.Offset+r.Length
	if !e.Sparse {
		data = []Extent{r}
	}
	for at := r.Offset; at < end && p.err == nil; {
		for len(data) > 0 && data[0].Offset+data[0].Length <= at {
			data = data[1:]
		}
		if len(data) > 0 && data[0].Offset <= at {
			n := min(data[0].Offset+data[0].Length, end) - at
			_, p.err = io.CopyN(p.w, content, n)
			at += n
			continue
		}
		hole := end
		if len(data) > 0 {
			hole = min(hole, data[0].Offset)
		}
		p.write(tarZeros[:hole-at]) // shorter than two blocks
		at = hole
	}
	p.pad(r.Length)
}

// blockRuns widens the data of a sparse file to whole blocks of the archive, which GNU tar asks for.
func blockRuns(e *Entry) (out []Extent) {
	for _, x := range e.Data {
		from, to := x.Offset/tarBlock*tarBlock, x.Offset+x.Length
		if over := to % tarBlock; over > 0 {
			to = min(to-over+tarBlock, e.Size)
		}
		if n := len(out); n > 0 && from <= out[n-1].Offset+out[n-1].Length {
			out[n-1].Length = to - out[n-1].Offset
			continue
		}
		out = append(out, Extent{Offset: from, Length: to - from})
	}
	return out
}

// End writes what ends the stream.
func (p *TarWriter) End() error {
	p.write(tarZeros[:])
	return p.err
}

func tarType(k Kind) byte {
	return map[Kind]byte{File: '0', Link: '1', Symlink: '2', CharDev: '3', BlockDev: '4',
		Folder: '5', NamedPipe: '6'}[k]
}

// block writes a header. What an extended header says is more than what this one can hold.
func (p *TarWriter) block(kind byte, name string, mode uint32, size int64, e *Entry) {
	var b [tarBlock]byte
	octal := func(at, length int, n int64) {
		copy(b[at:at+length], fmt.Sprintf("%0*o", length-1, min(max(n, 0), 1<<(3*(length-1))-1)))
	}
	copy(b[0:], name)
	octal(100, 8, int64(mode))
	octal(108, 8, 0)
	octal(116, 8, 0)
	octal(124, 12, size)
	octal(136, 12, 0)
	b[156] = kind
	copy(b[257:], "ustar\x0000")
	if e != nil && (e.Kind == CharDev || e.Kind == BlockDev) {
		octal(329, 8, int64(e.Major))
		octal(337, 8, int64(e.Minor))
	}
	copy(b[148:156], "        ")
	sum := int64(0)
	for _, c := range b {
		sum += int64(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	p.write(b[:])
}

func (p *TarWriter) write(b []byte) {
	if p.err == nil {
		_, p.err = p.w.Write(b)
	}
}

func (p *TarWriter) padded(b []byte) {
	p.write(b)
	p.pad(int64(len(b)))
}

func (p *TarWriter) pad(n int64) { p.write(tarZeros[:(tarBlock-n%tarBlock)%tarBlock]) }

// paxRecords are the lines of an extended header: each begins with its own length.
type paxRecords struct{ bytes.Buffer }

func (x *paxRecords) add(key, value string) {
	body := " " + key + "=" + value + "\n"
	length := len(body)
	for n := len(strconv.Itoa(length)); ; n = len(strconv.Itoa(length)) {
		if length = len(body) + n; len(strconv.Itoa(length)) == n {
			break
		}
	}
	x.WriteString(strconv.Itoa(length) + body)
}

// paxTime writes an instant as a decimal number of seconds; before 1970 the fraction counts the other way.
func paxTime(t Time) string {
	sec, nsec, sign := t.Sec, int64(t.Nsec), ""
	if sec < 0 {
		if sign, sec = "-", -sec; nsec > 0 {
			sec, nsec = sec-1, 1_000_000_000-nsec
		}
	}
	return fmt.Sprintf("%s%d.%09d", sign, sec, nsec)
}

// sparseMap lists the runs of data in a sparse file as it stands before it, filled up to whole blocks. A hole at the end is an extent
// of nothing there.
func sparseMap(e *Entry, data []Extent) []byte {
	if n := len(data); n == 0 || data[n-1].Offset+data[n-1].Length < e.Size {
		data = append(data[:n:n], Extent{Offset: e.Size})
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%d\n", len(data))
	for _, x := range data {
		fmt.Fprintf(&b, "%d\n%d\n", x.Offset, x.Length)
	}
	b.Write(tarZeros[:(tarBlock-b.Len()%tarBlock)%tarBlock])
	return b.Bytes()
}
