package prerecover

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// Limits of what is shown of a change.
const (
	maxDiff      = 4096 // bytes
	maxDiffLines = 400  // lines that differ, on either side, for which the smallest difference is looked for
)

// diffText shows what changed, a line each with - and + in front, in at most maxDiff bytes. Of what is no text only the
// sizes are shown. Control characters cannot reach a terminal.
func diffText(before, after []byte) string {
	if !isText(before) || !isText(after) || len(before)+len(after) > 4*maxConfig {
		if before == nil {
			return fmt.Sprintf("(binary, %d bytes)\n", len(after))
		}
		return fmt.Sprintf("(binary, %d bytes became %d)\n", len(before), len(after))
	}
	a, b := splitLines(before), splitLines(after)
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	var out strings.Builder
	for _, l := range changedLines(a, b) {
		line := printable(l)
		if out.Len()+len(line)+1 > maxDiff {
			out.WriteString("… (more)\n")
			break
		}
		out.WriteString(line + "\n")
	}
	return out.String()
}

func splitLines(b []byte) []string {
	if len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
}

// changedLines gives the lines of a that are gone and those of b that are new, in order, by their longest common row.
func changedLines(a, b []string) []string {
	var out []string
	if len(a) > maxDiffLines || len(b) > maxDiffLines {
		for _, l := range a[:min(len(a), maxDiffLines)] {
			out = append(out, "-"+l)
		}
		for _, l := range b[:min(len(b), maxDiffLines)] {
			out = append(out, "+"+l)
		}
		return out
	}
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			i, j = i+1, j+1
		case i < len(a) && (j == len(b) || common[i+1][j] >= common[i][j+1]):
			out = append(out, "-"+a[i])
			i++
		default:
			out = append(out, "+"+b[j])
			j++
		}
	}
	return out
}

// printable makes a line that came out of an image harmless to show.
func printable(l string) string {
	const longest = 400
	l = strings.ToValidUTF8(l, "?")
	if len(l) > longest {
		cut := longest
		for !utf8.RuneStart(l[cut]) {
			cut--
		}
		l = l[:cut] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r == '\t' {
			return r
		}
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, l)
}
