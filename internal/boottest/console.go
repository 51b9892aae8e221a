package boottest

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"unicode/utf8"
)

// Limits of what a guest may write to its serial port.
const (
	maxSerial     = 256 << 20 // bytes in one test
	maxSerialRead = 1 << 20   // bytes looked at in one go
	maxSerialLine = 2 << 10   // bytes of a line that are looked at
	maxSerialKept = 4 << 20   // bytes kept as evidence, the last ones
)

// console follows a serial log that grows.
type console struct {
	path string
	off  int64  // how far it was read
	line []byte // the line that has not ended yet, cleaned
	esc  escape
}

// next gives the lines that were written since, cleaned, and the line that has not ended yet: a prompt has no end.
func (c *console) next() (lines []string, prompt string, err error) {
	f, err := os.Open(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() < c.off {
		c.off = 0 // somebody began a new log
	}
	raw, err := io.ReadAll(io.NewSectionReader(f, c.off, maxSerialRead))
	c.off += int64(len(raw))
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

func text(line []byte) string {
	s := strings.ToValidUTF8(string(line), "?")
	if !utf8.ValidString(s) {
		return ""
	}
	return s
}

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

// serialTail reads the end of a serial log, cleaned, for people.
func serialTail(path string) ([]byte, error) {
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
	from := max(info.Size()-maxSerialKept, 0)
	raw, err := io.ReadAll(io.NewSectionReader(f, from, maxSerialKept))
	if err != nil {
		return nil, err
	}
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
