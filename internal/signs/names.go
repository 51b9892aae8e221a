package signs

import (
	"bytes"
	"cmp"
	"container/heap"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	"github.com/zeebo/xxh3"

	"github.com/musterdr/muster/internal/dr"
)

// Limits of a listing.
const (
	maxSample    = 4096 // hashes: a share is known to about 1.5 %
	maxEndings   = 512  // different ones that are told apart
	maxCounted   = 64 << 10
	maxEnding    = 16 // bytes; what is longer is no ending
	maxNoteNames = 3
	maxName      = 255
	MaxFiles     = 5_000_000 // more are not listed
)

// Listing is what is known of the names of a server's files. It comes from an agent, which may lie.
type Listing struct {
	Files   int64            `json:"files"`
	Endings map[string]int64 `json:"endings,omitempty"` // files by what follows the last dot, lower case: the most frequent
	// Sample holds the smallest hashes of names, 8 bytes each, in order: all those below Below. So the samples of two
	// listings are of the same names.
	Sample    string   `json:"sample"` // base64
	Below     uint64   `json:"below"`  // 0: all names are in the sample
	Notes     int64    `json:"notes,omitempty"`
	NoteNames []string `json:"note_names,omitempty"`
}

// Lister makes a listing. It is used by one goroutine, and its memory is bounded.
type Lister struct {
	l       Listing
	endings map[string]int64
	sample  hashes
	in      map[uint64]bool
}

// NewLister begins a listing.
func NewLister() *Lister {
	return &Lister{endings: map[string]int64{}, in: map[uint64]bool{}}
}

// Add lists a file. More than MaxFiles are refused with false.
func (l *Lister) Add(dir, name string) bool {
	if l.l.Files >= MaxFiles {
		return false
	}
	l.l.Files++
	if e := ending(name); e != "" {
		if _, known := l.endings[e]; known || len(l.endings) < maxCounted {
			l.endings[e]++
		}
	}
	if note(name) {
		l.l.Notes++
		if len(l.l.NoteNames) < maxNoteNames {
			l.l.NoteNames = append(l.l.NoteNames, plain(dir+"/"+name))
		}
	}
	h := xxh3.HashString(dir + "/" + name)
	if !l.in[h] {
		l.keep(h)
	}
	return true
}

// keep puts a hash into the sample, and the largest out of one that is full.
func (l *Lister) keep(h uint64) {
	if len(l.sample) == maxSample && h >= l.sample[0] {
		if l.l.Below == 0 || h < l.l.Below {
			l.l.Below = h
		}
		return
	}
	heap.Push(&l.sample, h)
	l.in[h] = true
	if len(l.sample) > maxSample {
		l.l.Below = heap.Pop(&l.sample).(uint64)
		delete(l.in, l.l.Below)
	}
}

// Listing ends a listing.
func (l *Lister) Listing() Listing {
	out := l.l
	names := slices.SortedFunc(maps.Keys(l.endings), func(a, b string) int {
		return cmp.Or(cmp.Compare(l.endings[b], l.endings[a]), cmp.Compare(a, b))
	})
	out.Endings = map[string]int64{}
	for _, n := range names[:min(len(names), maxEndings)] {
		out.Endings[n] = l.endings[n]
	}
	sorted := slices.Sorted(slices.Values(l.sample))
	raw := make([]byte, 0, 8*len(sorted))
	for _, h := range sorted {
		for i := range 8 {
			raw = append(raw, byte(h>>(56-8*i)))
		}
	}
	out.Sample = base64.StdEncoding.EncodeToString(raw)
	return out
}

// hashes is a heap with the largest on top.
type hashes []uint64

func (h hashes) Len() int           { return len(h) }
func (h hashes) Less(i, j int) bool { return h[i] > h[j] }
func (h hashes) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *hashes) Push(x any)        { *h = append(*h, x.(uint64)) }
func (h *hashes) Pop() any {
	old := *h
	x := old[len(old)-1]
	*h = old[:len(old)-1]
	return x
}

// ending is what follows the last dot, if it looks like an ending of files rather than a part of a name.
func ending(name string) string {
	i := strings.LastIndexByte(name, '.')
	if i <= 0 || len(name)-i-1 > maxEnding || i == len(name)-1 {
		return ""
	}
	e := strings.ToLower(name[i+1:])
	letters := false
	for _, c := range []byte(e) {
		switch {
		case c >= 'a' && c <= 'z':
			letters = true
		case c >= '0' && c <= '9' || c == '_' || c == '-':
		default:
			return ""
		}
	}
	if !letters {
		return "" // a number: log.1, libx.so.3
	}
	return e
}

// What a ransom note's name is made of: something of each, as text or a page.
var (
	noteAbout = []string{"decrypt", "ransom", "recover", "restore", "unlock", "back_files", "back-files", "encrypted"}
	noteCalls = []string{"readme", "read_me", "read-me", "read_it", "how_to", "how-to", "howto", "instruct", "my_files", "my-files", "your_files", "your-files", "_files", "-files", "!!!", "help"}
	noteTypes = []string{"", "txt", "html", "htm", "hta", "md", "rtf"}
)

// note says whether a file is named like a ransom note.
func note(name string) bool {
	if len(name) > 64 || !slices.Contains(noteTypes, ending(name)) {
		return false
	}
	n := strings.ReplaceAll(strings.ToLower(name), " ", "_")
	has := func(part string) bool { return strings.Contains(n, part) }
	return slices.ContainsFunc(noteAbout, has) && slices.ContainsFunc(noteCalls, has)
}

func plain(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return '?'
		}
		return r
	}, s)
	if r := []rune(s); len(r) > maxName {
		s = "…" + string(r[len(r)-maxName:])
	}
	return s
}

// Check refuses a listing that makes no sense, and makes its text fit to be shown.
func (l *Listing) Check() error {
	raw, err := base64.StdEncoding.DecodeString(l.Sample)
	switch {
	case err != nil || len(raw)%8 != 0 || len(raw) > 8*maxSample:
		return fmt.Errorf("read a listing of names: its sample of %d bytes is none", len(raw))
	case l.Files < 0 || l.Files > MaxFiles || int64(len(raw)/8) > l.Files || l.Notes < 0 || l.Notes > l.Files:
		return fmt.Errorf("read a listing of names: %d files, %d notes, a sample of %d", l.Files, l.Notes, len(raw)/8)
	case len(l.Endings) > maxEndings || len(l.NoteNames) > maxNoteNames:
		return fmt.Errorf("read a listing of names: %d endings and %d notes are too many", len(l.Endings), len(l.NoteNames))
	}
	for e, n := range l.Endings {
		if n < 0 || n > l.Files || ending("x."+e) != e {
			return fmt.Errorf("read a listing of names: %d files that end in %.40q", n, e)
		}
	}
	for i := range l.NoteNames {
		l.NoteNames[i] = plain(l.NoteNames[i])
	}
	return nil
}

// Compare gives what differs from an earlier listing. Both have passed Check.
func (l Listing) Compare(before Listing) *dr.NameChange {
	n := &dr.NameChange{Before: before.Files, Now: l.Files}
	below := min(l.Below-1, before.Below-1) // 0, which is no limit, becomes the largest number
	was, is := before.sampled(below), l.sampled(below)
	n.Gone, n.Come = missing(was, is), missing(is, was)
	for _, e := range slices.Sorted(maps.Keys(l.Endings)) {
		// An earlier listing with as many endings as it may name may have had this one too, but less often than those it names.
		if files := l.Endings[e]; before.Endings[e] == 0 && files > n.EndingFiles {
			n.Ending, n.EndingFiles = e, files
		}
	}
	if l.Notes > before.Notes {
		n.Notes, n.NoteNames = l.Notes-before.Notes, l.NoteNames
	}
	return n
}

// sampled gives the hashes up to one.
func (l Listing) sampled(upTo uint64) map[string]bool {
	raw, _ := base64.StdEncoding.DecodeString(l.Sample) // checked
	limit := make([]byte, 8)
	for i := range limit {
		limit[i] = byte(upTo >> (56 - 8*i))
	}
	out := map[string]bool{}
	for ; len(raw) >= 8; raw = raw[8:] {
		if bytes.Compare(raw[:8], limit) <= 0 {
			out[string(raw[:8])] = true
		}
	}
	return out
}

// missing gives the part of some hashes that others lack.
func missing(of, in map[string]bool) float64 {
	if len(of) == 0 {
		return 0
	}
	n := 0
	for h := range of {
		if !in[h] {
			n++
		}
	}
	return float64(n) / float64(len(of))
}
