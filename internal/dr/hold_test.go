package dr

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var (
	struck  = []Sign{{Kind: SignBlocks, Text: "61 % became random"}}
	renamed = []Sign{{Kind: SignRenamed, Text: "12,400 of 13,000 renamed"}}
)

// night is a snapshot in the order of a history: what it shows against the one before and, if against is set, against that one.
type night struct {
	id      string
	last    []Sign
	against string
	trusted []Sign
	blind   string // what could not be compared with against: "names" or "blocks"
	ruling  string // accept or refuse
	data    bool   // of files, not of disks
}

func (n night) record(i int) Record {
	s := Snapshot{ID: n.id, Taken: noon.Add(time.Duration(i) * time.Hour), Signs: &Signs{Last: &Change{Against: "before", Found: n.last}}}
	if n.against != "" {
		c := &Change{Against: n.against, Found: n.trusted, Blocks: &BlockChange{}, Names: &NameChange{}}
		switch n.blind {
		case "names":
			c.Names = nil
		case "blocks":
			c.Blocks = nil
		}
		s.Signs.Trusted = c
	}
	if n.data {
		s.Kind = SnapshotData
	}
	r := Record{Snapshot: s, State: Verified}
	if n.ruling != "" {
		r.Ruling = &Ruling{SnapshotID: n.id, Accept: n.ruling == "accept"}
	}
	return r
}

func history(nights ...night) (records []Record) {
	for i, n := range nights {
		records = append(records, n.record(i))
	}
	return records
}

func TestASuspicionIsInheritedUntilItIsDecidedOrUndone(t *testing.T) {
	a, quiet := night{id: "a"}, night{id: "c", against: "a", trusted: struck}
	for _, c := range []struct {
		name   string
		nights []night
		held   map[string]string
	}{
		{"nothing happened", []night{a, {id: "b"}, {id: "c"}}, nil},
		{"one suspicious", []night{a, {id: "b", last: struck}}, map[string]string{"b": "b"}},
		{"a quiet night after it shows the damage still", []night{a, {id: "b", last: struck}, quiet}, map[string]string{"b": "b", "c": "b"}},
		{"a quiet night that was not compared", []night{a, {id: "b", last: struck}, {id: "c"}}, map[string]string{"b": "b", "c": "b"}},
		{"a full one in between blinds nobody", []night{a, {id: "b", last: struck}, {id: "c"}, {id: "d"}}, map[string]string{"b": "b", "c": "b", "d": "b"}},
		{"undone", []night{a, {id: "b", last: struck}, {id: "c", against: "a"}, {id: "d"}}, map[string]string{"b": "b"}},
		{"undoing it changes much", []night{a, {id: "b", last: renamed}, {id: "c", last: renamed, against: "a"}}, map[string]string{"b": "b"}},
		{"undone, seen from one that is itself held", []night{a, {id: "b", last: struck}, {id: "c", against: "b"}}, map[string]string{"b": "b", "c": "b"}},
		{"names are back, and nobody looked at blocks", []night{a, {id: "b", last: struck}, {id: "c", against: "a", blind: "blocks"}}, map[string]string{"b": "b", "c": "b"}},
		{"blocks are back, and nobody looked at names", []night{a, {id: "b", last: renamed}, {id: "c", against: "a", blind: "names"}}, map[string]string{"b": "b", "c": "b"}},
		{"names do not matter where blocks were suspected", []night{a, {id: "b", last: struck}, {id: "c", against: "a", blind: "names"}}, map[string]string{"b": "b"}},
		{"accepted", []night{a, {id: "b", last: struck, ruling: "accept"}, quiet}, nil},
		{"accepted, and then it happens again", []night{a, {id: "b", last: struck, ruling: "accept"}, {id: "c", last: struck}, {id: "d"}}, map[string]string{"c": "c", "d": "c"}},
		{"two in a row, the second accepted", []night{a, {id: "b", last: struck}, {id: "c", last: struck, ruling: "accept"}, {id: "d"}}, map[string]string{"b": "b"}},
		{"two in a row, the first accepted", []night{a, {id: "b", last: struck, ruling: "accept"}, {id: "c", last: renamed}, {id: "d"}}, map[string]string{"c": "c", "d": "c"}},
		{"one that inherits is accepted", []night{a, {id: "b", last: struck}, {id: "c", ruling: "accept"}, {id: "d"}}, map[string]string{"b": "b"}},
		{"refused", []night{a, {id: "b", last: struck, ruling: "refuse"}, quiet}, map[string]string{"b": "b", "c": "b"}},
		{"refused, then undone", []night{a, {id: "b", last: struck, ruling: "refuse"}, {id: "c", against: "a"}, {id: "d"}}, map[string]string{"b": "b"}},
		{"refused, then a later one accepted", []night{a, {id: "b", last: struck, ruling: "refuse"}, {id: "c", ruling: "accept"}, {id: "d"}}, map[string]string{"b": "b"}},
		{"one that inherits is refused", []night{a, {id: "b", last: struck}, {id: "c", ruling: "refuse"}, {id: "d", against: "a"}}, map[string]string{"b": "b", "c": "c"}},
		{"data is suspicious, and what follows of disks is held too", []night{a, {id: "b", data: true, last: struck}, {id: "c"}, {id: "d", data: true}}, map[string]string{"b": "b", "c": "b", "d": "b"}},
		{"disks that show nothing do not clear data", []night{a, {id: "b", data: true, last: struck}, {id: "c", against: "a"}, {id: "d", data: true}}, map[string]string{"b": "b", "c": "b", "d": "b"}},
		{"data that shows nothing does not clear disks", []night{a, {id: "x", data: true}, {id: "b", last: struck}, {id: "c", data: true, against: "x"}}, map[string]string{"b": "b", "c": "b"}},
		{"both, disks undone", []night{a, {id: "x", data: true}, {id: "b", last: struck}, {id: "c", data: true, last: struck}, {id: "d", against: "a"}, {id: "e", data: true}}, map[string]string{"b": "b", "c": "c", "d": "c", "e": "c"}},
		{"both undone", []night{a, {id: "x", data: true}, {id: "b", last: struck}, {id: "c", data: true, last: struck}, {id: "d", against: "a"}, {id: "e", data: true, against: "x"}}, map[string]string{"b": "b", "c": "c", "d": "c"}},
		{"both, the disks accepted", []night{a, {id: "b", last: struck, ruling: "accept"}, {id: "c", data: true, last: struck}, {id: "d"}}, map[string]string{"c": "c", "d": "c"}},
		{"both, the data accepted with its disks", []night{a, {id: "b", last: struck}, {id: "c", data: true, last: struck, ruling: "accept"}, {id: "d"}}, map[string]string{"b": "b"}},
		{"data held for its disks, which are accepted", []night{a, {id: "b", last: struck, ruling: "accept"}, {id: "c", data: true}}, nil},
	} {
		if held := Holds(history(c.nights...)); !maps.Equal(held, c.held) {
			t.Errorf("%s: held %v, want %v", c.name, held, c.held)
		}
	}
}

func TestAClockThatWasSteppedBackPutsNothingBeforeASuspicion(t *testing.T) {
	records := history(night{id: "a"}, night{id: "b", last: struck}, night{id: "c"})
	records[2].Snapshot.Taken = records[1].Snapshot.Taken.Add(-30 * time.Minute)
	if held := Holds(records); held["c"] != "b" {
		t.Errorf("held %v", held)
	}
}

func TestNothingThatIsHeldIsPromoted(t *testing.T) {
	tested := snap("b", noon)
	if Promotes(Verdict{SnapshotID: "b", Outcome: Pass}, tested, "b", nil) || Promotes(Verdict{SnapshotID: "b", Outcome: Pass}, tested, "a", nil) {
		t.Error("a held snapshot was promoted")
	}
	if after := StateAfter(Verdict{Outcome: Pass}, PreRecovered, &Ruling{}); after != Rejected {
		t.Errorf("a refused snapshot that passes is %s", after)
	}
	if after := StateAfter(Verdict{Outcome: Pass}, PreRecovered, &Ruling{Accept: true}); after != Verified {
		t.Errorf("an accepted snapshot that passes is %s", after)
	}
}

// Whatever happens in whichever order: what is not held was never preceded by a suspicion that is neither accepted nor
// seen undone from a trusted one.
func TestNoHistoryLetsASuspicionThrough(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var nights []night
		for i := range rapid.IntRange(1, 12).Draw(t, "nights") {
			n := night{id: fmt.Sprintf("s%02d", i), data: rapid.Bool().Draw(t, "data")}
			n.last = rapid.SampledFrom([][]Sign{nil, nil, struck, renamed}).Draw(t, "last")
			n.ruling = rapid.SampledFrom([]string{"", "", "", "accept", "refuse"}).Draw(t, "ruling")
			if i > 0 && rapid.Bool().Draw(t, "compared") {
				n.against = nights[rapid.IntRange(0, i-1).Draw(t, "against")].id
				n.trusted = rapid.SampledFrom([][]Sign{nil, struck}).Draw(t, "trusted")
			}
			nights = append(nights, n)
		}
		held := Holds(history(nights...))
		for i, n := range nights {
			if held[n.id] != "" {
				continue
			}
			if n.ruling == "refuse" {
				t.Fatalf("%s was refused and is not held", n.id)
			}
			// Of disks and of data the nearest thing before it that decides must not be a suspicion.
			for _, data := range []bool{false, true} {
				for j := i; j >= 0; j-- {
					m := nights[j]
					clean := m.against != "" && m.trusted == nil && held[m.against] == "" && m.ruling == "" && held[m.id] != m.id
					if m.ruling == "accept" && (m.data == data || m.data) || m.data == data && clean || n.ruling == "accept" {
						break
					}
					if m.data == data && m.last != nil {
						t.Fatalf("%s is not held, and %s is suspicious: %+v", n.id, m.id, nights)
					}
				}
			}
		}
	})
}

func TestRetentionSparesTheEvidenceAndWhatWasBeforeIt(t *testing.T) {
	records := history(night{id: "a"}, night{id: "b"}, night{id: "c", last: struck}, night{id: "d"}, night{id: "e"}, night{id: "f"})
	held := Holds(records)
	for i := range records {
		records[i].HeldBy = held[records[i].Snapshot.ID]
	}
	if got := Expirable(records, Retention{KeepLast: 1}, "", nil); !slices.Equal(got, []string{"a", "d", "e"}) {
		t.Errorf("expired %v: b is the last before the suspicion, c the evidence, f the newest", got)
	}
	if Trusted(records) != "b" {
		t.Errorf("trusted %s", Trusted(records))
	}
	records[2].Ruling = &Ruling{Accept: true}
	for i := range records {
		records[i].HeldBy = ""
	}
	if got := Expirable(records, Retention{KeepLast: 1}, "", nil); len(got) != 5 {
		t.Errorf("once it is decided only %v expired", got)
	}
}

func TestRetentionSparesTheLastImageBeforeASuspicion(t *testing.T) {
	records := history(night{id: "a"}, night{id: "b"}, night{id: "data"}, night{id: "c", last: struck}, night{id: "d"})
	records[2].Snapshot.Kind, records[2].Snapshot.Image = SnapshotData, "a" // b failed its test
	held := Holds(records)
	for i := range records {
		records[i].HeldBy = held[records[i].Snapshot.ID]
	}
	if got := Expirable(records, Retention{KeepLast: 1}, "", nil); slices.Contains(got, "b") || slices.Contains(got, "data") || Trusted(OfKind(records, false)) != "b" || Trusted(OfKind(records, true)) != "data" {
		t.Errorf("expired %v: later images are compared with b, later data with data", got)
	}
}

func TestSignsAreJudgedByTheServersOwnHistory(t *testing.T) {
	blocks := func(struck, changed, became, readable int64) Change {
		return Change{Blocks: &BlockChange{Struck: struck, Changed: changed, Became: became, Readable: readable}}
	}
	names := func(n NameChange) Change { return Change{Names: &n} }
	const gb = 1 << 30
	for _, c := range []struct {
		name   string
		change Change
		level  SignLevel
		usual  Usual
		want   []SignKind
	}{
		{"nothing", blocks(0, 900, 0, 8*gb), "", Usual{}, nil},
		{"a few", blocks(100, 110, 12<<20, 8*gb), "", Usual{}, nil},
		{"most of what changed", blocks(6100, 10000, 700<<20, 80*gb), "", Usual{}, []SignKind{SignBlocks}},
		{"little of what changed, much of all", blocks(6000, 90000, gb, 8*gb), "", Usual{}, []SignKind{SignBlocks}},
		{"as always", blocks(6100, 10000, 700<<20, 80*gb), "", Usual{Struck: 0.5}, nil},
		{"always much, now all", blocks(9900, 10000, 700<<20, 80*gb), "", Usual{Struck: 0.5}, []SignKind{SignBlocks}},
		{"off", blocks(9900, 10000, 7*gb, 8*gb), SignsOff, Usual{}, nil},
		{"low", blocks(6100, 10000, 700<<20, 80*gb), SignsLow, Usual{}, nil},
		{"low, all of it", blocks(9000, 10000, 700<<20, 80*gb), SignsLow, Usual{}, []SignKind{SignBlocks}},
		{"high", blocks(200, 800, 20<<20, 80*gb), SignsHigh, Usual{}, []SignKind{SignBlocks}},
		{"renamed", names(NameChange{Before: 13000, Now: 13000, Gone: .95, Come: .95, Ending: "lockd", EndingFiles: 12398}), "", Usual{}, []SignKind{SignRenamed, SignEnding}},
		{"deleted", names(NameChange{Before: 13000, Now: 600, Gone: .95}), "", Usual{}, []SignKind{SignGone}},
		{"a spool is emptied every night", names(NameChange{Before: 13000, Now: 6000, Gone: .55}), "", Usual{Gone: .5}, nil},
		{"few files", names(NameChange{Before: 20, Now: 20, Gone: 1, Come: 1, Ending: "new", EndingFiles: 20}), "", Usual{}, nil},
		{"twice as many", names(NameChange{Before: 13000, Now: 26000, Come: .5}), "", Usual{}, nil},
		{"notes", names(NameChange{Before: 130, Now: 140, Notes: 10, NoteNames: []string{"/srv/HOW_TO_DECRYPT.txt"}}), "", Usual{}, []SignKind{SignNotes}},
		{"one note", names(NameChange{Before: 130, Now: 131, Notes: 1}), "", Usual{}, nil},
		{"never compared", Change{}, SignsHigh, Usual{}, nil},
	} {
		var kinds []SignKind
		for _, s := range c.change.Judge(c.level, c.usual) {
			kinds = append(kinds, s.Kind)
			if s.Text == "" || strings.Contains(s.Text, "%!") {
				t.Errorf("%s: text %q", c.name, s.Text)
			}
		}
		if !slices.Equal(kinds, c.want) {
			t.Errorf("%s: %v, want %v", c.name, kinds, c.want)
		}
	}
}

func TestWhatIsUsualIsLearntSlowlyOrFromAPerson(t *testing.T) {
	at := func(i int, struck int64, ruling *Ruling, heldBy string) Record {
		return Record{Snapshot: Snapshot{ID: fmt.Sprint(i), Taken: noon.Add(time.Duration(i) * time.Hour),
			Signs: &Signs{Last: &Change{Blocks: &BlockChange{Struck: struck, Changed: 100}}}}, Ruling: ruling, HeldBy: heldBy}
	}
	var records []Record
	for i := range 20 {
		records = append(records, at(i, 3, nil, ""))
	}
	if got := UsualOf(records).Struck; got != 0.03 {
		t.Errorf("usual %v", got)
	}
	records = append(records, at(21, 38, nil, ""), at(22, 38, nil, ""), at(23, 90, nil, "23"))
	if got := UsualOf(records).Struck; got != 0.03 {
		t.Errorf("two nights below the limit and one that is held made %v usual", got)
	}
	records = append(records, at(24, 60, &Ruling{Accept: true}, ""))
	if got := UsualOf(records).Struck; got != 0.6 {
		t.Errorf("what a person accepted made %v usual", got)
	}
	if UsualOf(nil) != (Usual{}) || UsualOf([]Record{{}}) != (Usual{}) {
		t.Error("a server without a history has something usual")
	}
}

func TestSignsAreWrittenForPeople(t *testing.T) {
	c := Change{Blocks: &BlockChange{Struck: 6100, Changed: 10000}, Names: &NameChange{Before: 13000, Now: 13000, Gone: .954, Come: .954, Ending: "lockd", EndingFiles: 12398}}
	var all []string
	for _, s := range c.Judge("", Usual{Struck: 0.03}) {
		all = append(all, s.Text)
	}
	want := "61 % of the changed blocks (6,100 of 10,000) became random, wholly or in part (usual for this server: 3 %); " +
		"about 12,402 of 13,000 files were renamed or replaced by others (usual for this server: 0 % of them); 12,398 of 13,000 files now end in .lockd, as none did before"
	if got := strings.Join(all, "; "); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
