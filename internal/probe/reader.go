package probe

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// ErrGarbage says that too much arrived that was no message.
var ErrGarbage = errors.New("the channel carries garbage: give it up")

// ErrLong says that a message does not fit a line.
var ErrLong = fmt.Errorf("the message is longer than the %d bytes of a line", MaxLine)

// maxCommas bounds what a line can grow to when it is decoded: an element of a list costs at least a comma. The largest
// honest answer has a tenth of it.
const maxCommas = 1 << 17

// Reader takes messages off a channel on which anything may arrive, in bounded memory. It is for one goroutine.
type Reader struct {
	in      *bufio.Reader
	line    []byte
	last    int64 // bytes of the line given last
	garbage int64
	limit   int64
}

// NewReader reads messages from in. After limit bytes that are no message it gives up; 0: never.
func NewReader(in io.Reader, limit int64) *Reader {
	return &Reader{in: bufio.NewReaderSize(in, 16<<10), limit: limit}
}

// Garbage is how many bytes were no message.
func (r *Reader) Garbage() int64 { return r.garbage }

// Answer gives the next answer, made harmless: see Answer.Tame. The error is ErrGarbage or that of the channel.
func (r *Reader) Answer() (Answer, error) {
	for {
		message, err := r.next()
		if err != nil {
			return Answer{}, err
		}
		var a Answer
		if err := json.Unmarshal(message, &a); err == nil && a.Answer != "" {
			a.Tame(MaxItems, MaxText)
			return a, nil
		}
		if err := r.Refuse(); err != nil {
			return Answer{}, err
		}
	}
}

// Ask gives the next question. The error is ErrGarbage or that of the channel.
func (r *Reader) Ask() (Ask, error) {
	for {
		message, err := r.next()
		if err != nil {
			return Ask{}, err
		}
		var a Ask
		if err := json.Unmarshal(message, &a); err == nil && a.Ask != "" && len(a.Challenge) <= MaxText {
			return a, nil
		}
		if err := r.Refuse(); err != nil {
			return Ask{}, err
		}
	}
}

// Refuse counts the message given last as garbage, because it answers nothing. The error is ErrGarbage.
func (r *Reader) Refuse() error {
	n := r.last
	r.last = 0
	return r.count(n)
}

func (r *Reader) count(n int64) error {
	r.garbage += n
	if r.limit > 0 && r.garbage > r.limit {
		return ErrGarbage
	}
	return nil
}

// next gives the next line that may be a message, from its first brace on: a kernel's half-written line may precede it.
func (r *Reader) next() ([]byte, error) {
	for {
		line, err := r.nextLine()
		if err != nil {
			return nil, err
		}
		r.last = int64(len(line))
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		if i := bytes.IndexByte(line, '{'); i >= 0 && bytes.Count(line, []byte{','}) <= maxCommas {
			return line[i:], nil
		}
		if err := r.Refuse(); err != nil {
			return nil, err
		}
	}
}

// nextLine gives the next line of at most MaxLine bytes. A longer one is counted as it passes and never kept.
func (r *Reader) nextLine() ([]byte, error) {
	r.line = r.line[:0]
	long := false
	for {
		part, err := r.in.ReadSlice('\n')
		switch {
		case long || len(r.line)+len(part) > MaxLine:
			if !long {
				part, long = append(r.line, part...), true
				r.line = nil
			}
			if err := r.count(int64(len(part))); err != nil {
				return nil, err
			}
		default:
			r.line = append(r.line, part...)
		}
		switch {
		case err == nil && !long:
			return r.line, nil
		case err == nil:
			long = false
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// Write writes one message on a line of its own. It begins with a line feed, which ends whatever half a line something
// else, or a message cut short by a lost connection, left on the port.
func Write(w io.Writer, message any) error {
	text, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(text)+2 > MaxLine {
		return fmt.Errorf("encode message of %d bytes: %w", len(text), ErrLong)
	}
	line := make([]byte, 0, len(text)+2)
	line = append(append(append(line, '\n'), text...), '\n')
	_, err = w.Write(line)
	return err
}
