package boottest

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
)

// Limits of what a guest may write to its serial port.
const (
	maxSerial     = 256 << 20 // bytes in one test
	maxSerialRead = 1 << 20   // bytes looked at in one go
	maxSerialLine = 2 << 10   // bytes of a line that are looked at
	maxSerialKept = 4 << 20   // bytes kept as evidence, the last ones
)

// console follows a serial log that grows, and that is put aside for a new one when it has grown too much.
type console struct {
	path  string
	file  *os.File // the present log; nil before there is one
	off   int64    // how far it was read
	total int64    // read of all logs
	line  []byte   // the line that has not ended yet, cleaned
	esc   escape
}

func (c *console) close() {
	if c.file != nil {
		_ = c.file.Close()
		c.file = nil
	}
}

// next gives the lines that were written since, cleaned, and the line that has not ended yet: a prompt has no end.
func (c *console) next() (lines []string, prompt string, err error) {
	if c.file == nil {
		c.file, err = os.Open(c.path)
		if errors.Is(err, fs.ErrNotExist) {
			c.file = nil
			return nil, "", nil
		}
		if err != nil {
			c.file = nil
			return nil, "", err
		}
	}
	// Whether there is a new log is asked before the old one is read to its end: nothing is written to it later.
	now, gone := os.Stat(c.path)
	mine, err := c.file.Stat()
	if err != nil {
		return nil, "", err
	}
	if mine.Size() < c.off {
		c.off = 0 // emptied
	}
	raw, err := io.ReadAll(io.NewSectionReader(c.file, c.off, maxSerialRead))
	c.off += int64(len(raw))
	c.total += int64(len(raw))
	if err == nil && len(raw) < maxSerialRead && gone == nil && !os.SameFile(now, mine) {
		c.close()
		c.off = 0
	}
	for _, b := range raw {
		switch b, ok := c.esc.clean(b); {
		case !ok:
		case b == '\n':
			if len(c.line) > 0 {
				lines = append(lines, text(c.line))
			}
			c.line = c.line[:0]
		case len(c.line) < maxSerialLine:
			c.line = append(c.line, b)
		}
	}
	return lines, text(c.line), err
}

func text(line []byte) string { return strings.ToValidUTF8(string(line), "?") }

// escape takes the escape sequences out of what was meant for a terminal. Moving the cursor to another line ends a line.
type escape struct {
	state byte // 0 text, 'e' after ESC, '[' in a control sequence, ']' in a string
	n     int  // bytes of the sequence so far
}

// maxEscape bounds a sequence; a longer one is no sequence.
const maxEscape = 256

// clean gives the byte that is to be kept, if any.
func (e *escape) clean(b byte) (byte, bool) {
	if e.state != 0 {
		if e.n++; e.n > maxEscape {
			e.state = 0
		}
	}
	switch e.state {
	case 'e':
		switch b {
		case '[', ']':
			e.state = b
		case '(', ')', '#', '%':
			e.state = '1'
		default:
			e.state = 0
		}
		return 0, false
	case '1': // one byte more
		e.state = 0
		return 0, false
	case '[':
		if b >= 0x40 && b <= 0x7e {
			e.state = 0
			return '\n', b == 'H' || b == 'f' || b == 'J' || b == 'A' || b == 'B' || b == 'd'
		}
		return 0, false
	case ']':
		switch b {
		case 0x07, '\n':
			e.state = 0
		case 0x1b:
			e.state, e.n = 'e', 0
		}
		return 0, false
	}
	switch {
	case b == 0x1b:
		e.state, e.n = 'e', 0
		return 0, false
	case b == '\n', b == '\t':
		return b, true
	case b < 0x20 || b == 0x7f:
		return 0, false
	}
	return b, true
}

// serialTail reads the end of a serial log, and of those put aside before it, cleaned, for people.
func serialTail(path string) ([]byte, error) {
	var raw []byte
	for _, aside := range []string{".1", ".0", ""} { // oldest first, as virtlogd names them
		part, err := tail(path+aside, maxSerialKept)
		if err != nil {
			return nil, err
		}
		raw = append(raw, part...)
	}
	raw = raw[max(len(raw)-maxSerialKept, 0):]
	var esc escape
	clean := raw[:0]
	for _, b := range raw {
		if b, ok := esc.clean(b); ok {
			clean = append(clean, b)
		}
	}
	return []byte(strings.Map(func(r rune) rune {
		if r >= 0x80 && r < 0xa0 || r == 0x202e || r == 0x202d {
			return '?' // C1 controls, and what turns lines around
		}
		return r
	}, strings.ToValidUTF8(string(clean), "?"))), nil
}

// tail reads the last bytes of a file, none if there is no such file.
func tail(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(info.Size()-most, 0), most))
}
