package dr

import (
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"
)

// Signs are what a capture measured that may mean tampering: what became unreadable, and what became of the files' names.
// They are evidence about a snapshot, taken from it when it was kept and never changed.
type Signs struct {
	// Last is the change since the snapshot before it; nil if there is none to compare with.
	Last *Change `json:"last,omitempty"`
	// Trusted is the change since the last snapshot that nobody has to decide about, while that is another one.
	Trusted *Change       `json:"trusted,omitempty"`
	Content Content       `json:"content"`
	Files   int64         `json:"files,omitempty"`    // listed; 0 with NoNames
	NoNames string        `json:"no_names,omitempty"` // why no names were listed, "" if they were
	Took    time.Duration `json:"took"`               // in looking at blocks, of all that looked, waiting for a processor included
}

// Content is what the disks hold, in bytes, as far as a sample of it shows.
type Content struct {
	Readable int64 `json:"readable"` // text, programs, tables, and what is compressed in a way that can be told
	Random   int64 `json:"random"`   // what cannot be told from chance: encrypted, or compressed very well
}

// Change is what differs between a snapshot and an earlier one.
type Change struct {
	Against string       `json:"against"` // the earlier snapshot
	Blocks  *BlockChange `json:"blocks,omitempty"`
	Names   *NameChange  `json:"names,omitempty"` // nil if one of the two has no listing
	Found   []Sign       `json:"found,omitempty"` // the limits that were crossed; none: nothing suspicious
}

// BlockChange is measured in blocks of the store and in bytes.
type BlockChange struct {
	Changed  int64 `json:"changed"`  // blocks that differ
	Struck   int64 `json:"struck"`   // of them, those in which something readable became random, wholly or in part
	Became   int64 `json:"became"`   // bytes that were readable and are random
	Readable int64 `json:"readable"` // bytes that were readable before
	New      int64 `json:"new"`      // bytes that were empty and are random: copied media and archives too, so no sign
}

// NameChange is measured in files.
type NameChange struct {
	Before      int64    `json:"before"`
	Now         int64    `json:"now"`
	Gone        float64  `json:"gone"` // part of the earlier names that are there no more, from a sample
	Come        float64  `json:"come"` // part of today's names that are new, from a sample
	Ending      string   `json:"ending,omitempty"`
	EndingFiles int64    `json:"ending_files,omitempty"` // files with Ending, the most frequent one that no file had before
	Notes       int64    `json:"notes,omitempty"`        // files named like a ransom note, more than before
	NoteNames   []string `json:"note_names,omitempty"`   // some of them
}

// Sign is one limit that was crossed.
type Sign struct {
	Kind SignKind `json:"kind"`
	Text string   `json:"text"` // for people
}

// SignKind tells signs apart.
type SignKind string

// The kinds of sign.
const (
	SignBlocks  SignKind = "blocks-became-random"
	SignRenamed SignKind = "files-renamed"
	SignGone    SignKind = "files-gone"
	SignEnding  SignKind = "new-ending"
	SignNotes   SignKind = "ransom-notes"
)

// SignLevel says how soon a snapshot of a server is suspicious.
type SignLevel string

// The levels. "" is SignsNormal.
const (
	SignsOff    SignLevel = "off" // measured, never suspicious
	SignsLow    SignLevel = "low"
	SignsNormal SignLevel = "normal"
	SignsHigh   SignLevel = "high"
)

// Validate refuses a level that there is not.
func (l SignLevel) Validate() error {
	switch l {
	case "", SignsOff, SignsLow, SignsNormal, SignsHigh:
		return nil
	}
	return fmt.Errorf("signs %q: use off, low, normal or high", string(l))
}

// The limits at SignsNormal. At SignsHigh half of each, at SignsLow twice. Shares are never judged without a number of
// blocks or files, below which a share says nothing.
const (
	StruckShare   = 0.40 // of changed blocks: something readable in them became random
	StruckBlocks  = 256  // 32 MiB in blocks of the usual size
	BecameShare   = 0.10 // of all that was readable
	BecameBytes   = 32 << 20
	RenamedShare  = 0.20 // of names gone, and of names come
	GoneShare     = 0.40 // of names gone
	ChangedFiles  = 50   // renamed or gone
	EndingShare   = 0.10 // of all files
	EndingFiles   = 50
	NoteFiles     = 3    // a note lies in every folder; one may be anything
	usualFactor   = 3    // how many times its usual share a server may reach
	maxShareLimit = 0.95 // whatever is usual, more than this is suspicious
	// UsualNights is how many snapshots tell what is usual. Half of them do: whoever wants to make more of it usual has to
	// go slowly for a week.
	UsualNights = 14
)

// Usual is what a server's snapshots change from one to the next, each as a share.
type Usual struct {
	Struck float64 `json:"struck"` // of changed blocks
	Became float64 `json:"became"` // of readable bytes
	Gone   float64 `json:"gone"`   // of names
}

// UsualOf looks at the newest UsualNights snapshots that are not held: the median of each share, or the largest that a
// person accepted if that is more. records are of one kind.
func UsualOf(records []Record) Usual {
	sorted := slices.Clone(records)
	sort.SliceStable(sorted, func(i, j int) bool { return sorted[i].Snapshot.Taken.After(sorted[j].Snapshot.Taken) })
	var struck, became, gone []float64
	var usual Usual
	for _, r := range sorted {
		c := r.Snapshot.Signs.last()
		if c == nil || r.HeldBy != "" || len(struck) == UsualNights {
			continue
		}
		now := c.shares()
		struck, became, gone = append(struck, now.Struck), append(became, now.Became), append(gone, now.Gone)
		if r.Ruling != nil && r.Ruling.Accept {
			usual.Struck, usual.Became, usual.Gone = max(usual.Struck, now.Struck), max(usual.Became, now.Became), max(usual.Gone, now.Gone)
		}
	}
	usual.Struck, usual.Became, usual.Gone = max(usual.Struck, median(struck)), max(usual.Became, median(became)), max(usual.Gone, median(gone))
	return usual
}

// median gives the lower middle: 0 of none.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Clone(v)
	slices.Sort(v)
	return v[(len(v)-1)/2]
}

func (s *Signs) last() *Change {
	if s == nil {
		return nil
	}
	return s.Last
}

func share(part, of int64) float64 {
	if of <= 0 {
		return 0
	}
	return float64(part) / float64(of)
}

func (c *Change) shares() (u Usual) {
	if b := c.Blocks; b != nil {
		u.Struck, u.Became = share(b.Struck, b.Changed), share(b.Became, b.Readable)
	}
	if c.Names != nil {
		u.Gone = c.Names.Gone
	}
	return u
}

// Judge gives the limits that a change crosses.
func (c *Change) Judge(level SignLevel, usual Usual) []Sign {
	factor := 1.0
	switch level {
	case SignsOff:
		return nil
	case SignsLow:
		factor = 2
	case SignsHigh:
		factor = 0.5
	}
	j := judgement{factor: factor, usual: usual}
	if c.Blocks != nil {
		j.blocks(*c.Blocks)
	}
	if c.Names != nil {
		j.names(*c.Names)
	}
	return j.found
}

type judgement struct {
	factor float64
	usual  Usual
	found  []Sign
}

func (j *judgement) add(kind SignKind, format string, args ...any) {
	j.found = append(j.found, Sign{kind, fmt.Sprintf(format, args...)})
}

// over says whether a share is over its limit, or over a multiple of what is usual where that is more.
func (j *judgement) over(share, limit, usual float64) bool {
	return share >= min(maxShareLimit, max(limit*j.factor, usualFactor*usual))
}

func (j *judgement) many(n int64, limit float64) bool { return float64(n) >= limit*j.factor }

func (j *judgement) blocks(b BlockChange) {
	struck, became := share(b.Struck, b.Changed), share(b.Became, b.Readable)
	switch {
	case j.over(struck, StruckShare, j.usual.Struck) && j.many(b.Struck, StruckBlocks):
		j.add(SignBlocks, "%s of the changed blocks (%s of %s) became random, wholly or in part (usual for this server: %s)",
			percent(struck), count(b.Struck), count(b.Changed), percent(j.usual.Struck))
	case j.over(became, BecameShare, j.usual.Became) && j.many(b.Became, BecameBytes):
		j.add(SignBlocks, "%s of what was readable (%d MiB of %d MiB) became random (usual for this server: %s)",
			percent(became), b.Became>>20, b.Readable>>20, percent(j.usual.Became))
	}
}

func (j *judgement) names(n NameChange) {
	gone, come := int64(n.Gone*float64(n.Before)+0.5), int64(n.Come*float64(n.Now)+0.5)
	switch {
	case j.over(n.Gone, RenamedShare, j.usual.Gone) && j.over(n.Come, RenamedShare, j.usual.Gone) && j.many(min(gone, come), ChangedFiles):
		j.add(SignRenamed, "about %s of %s files were renamed or replaced by others (usual for this server: %s of them)",
			count(min(gone, come)), count(n.Before), percent(j.usual.Gone))
	case j.over(n.Gone, GoneShare, j.usual.Gone) && j.many(gone, ChangedFiles):
		j.add(SignGone, "about %s of %s files are gone (usual for this server: %s of them)", count(gone), count(n.Before), percent(j.usual.Gone))
	}
	if share(n.EndingFiles, n.Now) >= EndingShare*j.factor && j.many(n.EndingFiles, EndingFiles) {
		j.add(SignEnding, "%s of %s files now end in .%s, as none did before", count(n.EndingFiles), count(n.Now), n.Ending)
	}
	if j.many(n.Notes, NoteFiles) {
		j.add(SignNotes, "%s new files are named like a ransom note: %s", count(n.Notes), strings.Join(n.NoteNames, ", "))
	}
}

// percent prints a share as people read it.
func percent(share float64) string {
	if share > 0 && share < 0.01 {
		return "under 1 %"
	}
	return fmt.Sprintf("%.0f %%", 100*share)
}

// count prints a number with its thousands apart.
func count(n int64) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
