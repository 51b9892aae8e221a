package view

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestAViewIsItsPartsAndTheDiskForTheRest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 200).Draw(t, "size")
		disk := rapid.SliceOfN(rapid.Byte(), size, size).Draw(t, "disk")
		elsewhere := rapid.SliceOfN(rapid.Byte(), 400, 400).Draw(t, "elsewhere")
		want, held := slices.Clone(disk), make([]bool, size)
		var parts []Part
		for at := rapid.IntRange(0, 20).Draw(t, "first"); at < size; {
			n := rapid.IntRange(1, min(30, size-at)).Draw(t, "length")
			p := Part{Range: Range{int64(at), int64(n)}}
			switch rapid.IntRange(0, 2).Draw(t, "kind") {
			case 0:
				p.From, p.At = bytes.NewReader(elsewhere), int64(rapid.IntRange(0, 200).Draw(t, "at"))
				copy(want[at:at+n], elsewhere[p.At:])
			case 1:
				p.From = Zeros{}
				clear(want[at : at+n])
			}
			for i := range n {
				held[at+i] = true
			}
			parts = append(parts, p)
			at += n + rapid.IntRange(0, 10).Draw(t, "gap")
		}
		v, err := New(bytes.NewReader(disk), int64(size), rapid.Permutation(parts).Draw(t, "order"))
		if err != nil {
			t.Fatal(err)
		}
		from := rapid.IntRange(0, size).Draw(t, "from")
		got := make([]byte, rapid.IntRange(0, size-from).Draw(t, "count"))
		if n, err := v.ReadAt(got, int64(from)); n != len(got) || err != nil || !bytes.Equal(got, want[from:from+n]) {
			t.Fatalf("%d of %d bytes at %d, %v: %v, want %v", n, len(got), from, err, got, want[from:from+len(got)])
		}
		rest := make([]bool, size)
		for _, r := range v.Rest() {
			for i := r.Offset; i < r.End(); i++ {
				rest[i] = true
			}
		}
		for i := range held {
			if held[i] == rest[i] {
				t.Fatalf("byte %d: in a part %v, in the rest %v", i, held[i], rest[i])
			}
		}
	})
}

func TestPartsThatDoNotFitAreRefused(t *testing.T) {
	for name, parts := range map[string][]Part{
		"two at one place":   {{Range: Range{0, 10}}, {Range: Range{9, 5}}},
		"behind the end":     {{Range: Range{95, 10}}},
		"before the start":   {{Range: Range{-1, 10}}},
		"nothing":            {{Range: Range{5, 0}}},
		"an end that wraps":  {{Range: Range{1 << 62, 1<<63 - 1}}},
		"before its source":  {{Range: Range{0, 1}, At: -1}},
		"more than there is": make([]Part, MaxParts+1),
	} {
		if _, err := New(Zeros{}, 100, parts); err == nil {
			t.Errorf("%s: a view was made", name)
		}
	}
}

func TestASourceThatEndsTooEarlyIsAnError(t *testing.T) {
	v, err := New(Zeros{}, 100, []Part{{Range: Range{10, 50}, From: bytes.NewReader(make([]byte, 20))}})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := v.ReadAt(make([]byte, 100), 0); n != 30 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%d bytes, %v", n, err)
	}
	if n, err := v.ReadAt(make([]byte, 100), 60); n != 40 || !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %d bytes, %v", n, err)
	}
}

func TestWithoutAndJoinAreWhatSetsOfBytesAre(t *testing.T) {
	ranges := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Range {
		return Range{int64(rapid.IntRange(0, 90).Draw(t, "offset")), int64(rapid.IntRange(0, 10).Draw(t, "length"))}
	}), 0, 12)
	set := func(rs []Range) (s [100]bool) {
		for _, r := range rs {
			for i := r.Offset; i < r.End(); i++ {
				s[i] = true
			}
		}
		return s
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := ranges.Draw(t, "a"), ranges.Draw(t, "b")
		out, inA, inB := Without(a, b), set(a), set(b)
		got := set(out)
		for i := range got {
			if got[i] != (inA[i] && !inB[i]) {
				t.Fatalf("byte %d of %v without %v: %v", i, a, b, out)
			}
		}
		for i := 1; i < len(out); i++ {
			if out[i].Offset <= out[i-1].End() {
				t.Fatalf("%v is not in order and joined", out)
			}
		}
	})
}
