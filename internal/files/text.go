package files

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/musterdr/muster/internal/fileset"
)

// Text writes a name so that it can be shown: a backslash is \\, and every byte of what cannot be printed is \xNN.
func Text(name string) string {
	var b strings.Builder
	for len(name) > 0 {
		r, n := utf8.DecodeRuneInString(name)
		switch {
		case r == '\\':
			b.WriteString(`\\`)
		case r == utf8.RuneError && n <= 1, !unicode.IsPrint(r):
			for i := range n {
				fmt.Fprintf(&b, `\x%02x`, name[i])
			}
		default:
			b.WriteString(name[:n])
		}
		name = name[n:]
	}
	return b.String()
}

// errEscape is a backslash that begins no escape.
var errEscape = errors.New(`after a backslash give another one, or x and two digits of a byte: \\ or \x0a`)

// FromText reads what Text wrote. What needs no escape may be given as it is.
func FromText(text string) (string, error) {
	if !strings.Contains(text, `\`) {
		return text, nil
	}
	var b strings.Builder
	for len(text) > 0 {
		switch {
		case strings.HasPrefix(text, `\\`):
			b.WriteByte('\\')
			text = text[2:]
		case text[0] == '\\':
			if len(text) < 4 || text[1] != 'x' {
				return "", errEscape
			}
			n, err := strconv.ParseUint(text[2:4], 16, 8)
			if err != nil {
				return "", errEscape
			}
			b.WriteByte(byte(n))
			text = text[4:]
		default:
			b.WriteByte(text[0])
			text = text[1:]
		}
	}
	return b.String(), nil
}

// ParsePath reads a path as people give it: absolute, or below the root; "" is the root.
func ParsePath(text string) (string, error) {
	p, err := FromText(text)
	if err == nil && slices.Contains(strings.Split(p, "/"), "..") { // refused, not read as another
		err = errors.New("give it without ..")
	}
	if p = path.Clean("/" + p); err == nil && (len(p) > fileset.MaxPath || strings.IndexByte(p, 0) >= 0) {
		err = fmt.Errorf("a path has at most %d bytes, and none of them is zero", fileset.MaxPath)
	}
	if err != nil {
		return "", fmt.Errorf("path %q: %w", text, err)
	}
	return p, nil
}

// Pattern says which names are looked for.
type Pattern string

// ParsePattern reads a pattern of path.Match: with a / in front of the whole path, otherwise of the last name.
func ParsePattern(text string) (Pattern, error) {
	if _, err := path.Match(text, "x"); err != nil || text == "" || len(text) > fileset.MaxPath || !strings.HasPrefix(text, "/") && strings.Contains(text, "/") {
		return "", fmt.Errorf("pattern %q: give a name (budget.xls) or a pattern of one (*.xls), or one of a whole path that begins with / (/home/*/budget.xls); \\ takes the meaning of *, ? and [", text)
	}
	return Pattern(text), nil
}

// Match says whether a path is one of those.
func (p Pattern) Match(name string) bool {
	if !strings.HasPrefix(string(p), "/") {
		name = path.Base(name)
	}
	ok, _ := path.Match(string(p), name) // ParsePattern has seen it
	return ok
}
