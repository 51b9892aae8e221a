package signs

import (
	"bytes"
	"compress/gzip"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/jpeg"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/musterdr/muster/internal/dr"
)

const block = 128 << 10

// text is real text, program is real machine code, each of n bytes.
func text(t testing.TB, n int) []byte {
	t.Helper()
	root, err := exec.Command("go", "env", "GOROOT").Output() // which a program built with -trimpath does not know
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for _, dir := range []string{"net/http", "go/types", "cmd/compile/internal/ssa", "reflect"} {
		files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(root)), "src", dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if out = append(out, b...); len(out) >= n {
				return out[:n]
			}
		}
	}
	t.Fatalf("only %d bytes of text were found", len(out))
	return nil
}

func program(t testing.TB, n int) []byte {
	t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil || len(b) < n {
		t.Fatalf("%d bytes of program, %v", len(b), err)
	}
	return b[:n]
}

func encrypted(t testing.TB, data []byte) []byte {
	t.Helper()
	var key [32]byte
	var iv [16]byte
	_, _ = rand.Read(key[:]) // never fails
	c, err := aes.NewCipher(key[:])
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, len(data))
	cipher.NewCTR(c, iv[:]).XORKeyStream(out, data)
	return out
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zstandard(t testing.TB, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

// photo is a JPEG of something that has structure and noise.
func photo(t testing.TB, seed uint64) []byte {
	t.Helper()
	r := mathrand.New(mathrand.NewPCG(seed, 1))
	img := image.NewRGBA(image.Rect(0, 0, 1600, 1200))
	for y := range 1200 {
		for x := range 1600 {
			v := uint8(128 + x/20*y/30%90 + r.IntN(40))
			img.Set(x, y, color.RGBA{v, uint8(x / 7), uint8(y/5) + uint8(r.IntN(12)), 255})
		}
	}
	var b bytes.Buffer
	if err := jpeg.Encode(&b, img, &jpeg.Options{Quality: 90}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func newMap(t testing.TB, size int) *Map {
	t.Helper()
	m, err := NewMap(block, int64(size))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// look maps a disk.
func look(t testing.TB, data []byte, before *Map) *Map {
	t.Helper()
	m := newMap(t, len(data))
	for i := int64(0); i*block < int64(len(data)); i++ {
		m.Look(i, data[i*block:min((i+1)*block, int64(len(data)))], before)
	}
	return m
}

func TestContentIsToldApart(t *testing.T) {
	for _, c := range []struct {
		name     string
		data     []byte
		readable float64 // part of the cells, at least
		random   float64
	}{
		{"text", text(t, 4<<20), 0.99, 0},
		{"program", program(t, 4<<20), 0.80, 0}, // some of it is empty
		{"encrypted text", encrypted(t, text(t, 4<<20)), 0, 0.999},
		{"photos", bytes.Join([][]byte{photo(t, 1), photo(t, 2), photo(t, 3)}, nil), 0.95, 0},
	} {
		var is dr.Content
		look(t, c.data, nil).Content(&is)
		n := float64(len(c.data))
		if float64(is.Readable)/n < c.readable || float64(is.Random)/n < c.random || c.random == 0 && float64(is.Random)/n > 0.05 {
			t.Errorf("%s: readable %.3f, random %.3f", c.name, float64(is.Readable)/n, float64(is.Random)/n)
		}
	}
}

func TestOnlyWhatBecameRandomIsStruck(t *testing.T) {
	const n = 8 << 20
	was := append(text(t, n/2), program(t, n/2)...)
	fit := func(data []byte) []byte {
		if len(data) < n {
			data = bytes.Repeat(data, n/len(data)+1)
		}
		return data[:n]
	}
	every16 := bytes.Clone(was)
	for at := 0; at+4096 <= n; at += 16 * 4096 {
		copy(every16[at:], encrypted(t, every16[at:at+4096]))
	}
	for _, c := range []struct {
		name      string
		is        []byte
		low, high float64 // share of blocks that are struck
	}{
		{"nothing", was, 0, 0},
		{"other text", fit(append(program(t, n/2), text(t, n/2)...)), 0, 0.01},
		{"photos in its place", fit(bytes.Join([][]byte{photo(t, 1), photo(t, 2), photo(t, 3), photo(t, 4), photo(t, 5), photo(t, 6)}, nil)), 0, 0.1},
		{"gzip in its place", fit(gzipped(t, text(t, 6<<20))), 0, 0.1},
		{"zstd in its place", fit(zstandard(t, text(t, 6<<20))), 0, 0.15},
		{"zeros", make([]byte, n), 0, 0},
		{"encrypted", encrypted(t, was), 0.95, 1},
		{"every 16th page encrypted", every16, 0.95, 1},
	} {
		before := look(t, was, nil)
		var sum dr.BlockChange
		look(t, c.is, before).Compare(before, &sum)
		if got := float64(sum.Struck) / (n / block); got < c.low || got > c.high {
			t.Errorf("%s: %.2f of the blocks struck, want %.2f to %.2f", c.name, got, c.low, c.high)
		}
	}
}

func TestWhatWasRandomMayChangeAsItLikes(t *testing.T) {
	volume := encrypted(t, make([]byte, 8<<20))
	before := look(t, volume, nil)
	var sum dr.BlockChange
	look(t, encrypted(t, volume), before).Compare(before, &sum)
	if sum.Struck > 2 { // of 2048 cells one may by chance not look like chance
		t.Errorf("an encrypted volume that was written to: %+v", sum)
	}
}

func TestPhotosThatAreEncryptedAreStruck(t *testing.T) {
	var was []byte
	for i := range uint64(6) {
		was = append(was, photo(t, i)...)
	}
	was = was[:len(was)/block*block]
	before := look(t, was, nil)
	var sum dr.BlockChange
	look(t, encrypted(t, was), before).Compare(before, &sum)
	if got := float64(sum.Struck) / float64(len(was)/block); got < 0.9 {
		t.Errorf("%.2f of the blocks struck", got)
	}
}

func TestAMapIsReadBackAsItWas(t *testing.T) {
	m := look(t, append(text(t, 1<<20), make([]byte, 1234)...), nil)
	b, err := m.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	back, err := UnmarshalMap(b)
	if err != nil || !back.Fits(block, 1<<20+1234) {
		t.Fatal(err)
	}
	var sum dr.BlockChange
	if back.Compare(m, &sum); sum.Changed != 0 || sum.Readable == 0 {
		t.Errorf("%+v", sum)
	}
}

func FuzzAMapThatIsNoneIsRefused(f *testing.F) {
	m, err := NewMap(block, 1<<20)
	if err != nil {
		f.Fatal(err)
	}
	b, err := m.MarshalBinary()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:20])
	f.Add([]byte("MUSTSGN1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := UnmarshalMap(b)
		if err != nil {
			return
		}
		var c dr.Content
		m.Content(&c)
		m.Compare(m, &dr.BlockChange{})
	})
}

// list lists files and sends them through JSON, as an agent does.
func list(t *testing.T, names ...string) Listing {
	t.Helper()
	l := NewLister()
	for _, n := range names {
		l.Add(filepath.Split(n))
	}
	raw, err := json.Marshal(l.Listing())
	if err != nil {
		t.Fatal(err)
	}
	var out Listing
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	if err := out.Check(); err != nil {
		t.Fatal(err)
	}
	return out
}

func files(n int, name string) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("/srv/%d/"+name, i%37, i))
	}
	return out
}

func TestNamesThatComeAndGoAreReckoned(t *testing.T) {
	was := files(20_000, "report %d.txt")
	half := append(append([]string(nil), was[:10_000]...), files(10_000, "other %d.md")...)
	for _, c := range []struct {
		name       string
		is         []string
		gone, come float64
		ending     string
		files      int64
	}{
		{"nothing", was, 0, 0, "", 0},
		{"half replaced", half, 0.5, 0.5, "md", 10_000},
		{"all renamed", files(20_000, "report %d.txt.LockD"), 1, 1, "lockd", 20_000},
		{"most deleted", was[:2_000], 0.9, 0, "", 0},
		{"doubled", append(append([]string(nil), was...), files(20_000, "more %d.txt")...), 0, 0.5, "", 0},
		{"numbers are no endings", append(append([]string(nil), was...), files(20_000, "log.%d")...), 0, 0.5, "", 0},
	} {
		n := list(t, c.is...).Compare(list(t, was...))
		if n.Gone < c.gone-0.04 || n.Gone > c.gone+0.04 || n.Come < c.come-0.04 || n.Come > c.come+0.04 {
			t.Errorf("%s: gone %.3f, come %.3f, want %.2f, %.2f", c.name, n.Gone, n.Come, c.gone, c.come)
		}
		if n.Ending != c.ending || n.EndingFiles != c.files {
			t.Errorf("%s: ending %q of %d, want %q of %d", c.name, n.Ending, n.EndingFiles, c.ending, c.files)
		}
	}
}

func TestRansomNotesAreKnownByTheirNames(t *testing.T) {
	for name, want := range map[string]bool{
		"HOW_TO_DECRYPT.txt": true, "Restore-My-Files.txt": true, "!!!READ_ME_TO_RECOVER!!!.hta": true, "RECOVER-abc-FILES.txt": true, "how to back files.html": true,
		"README.md": false, "restore.sh": false, "decrypt.go": false, "recover_files.py": false, "instructions.txt": false,
		strings.Repeat("x", 100) + "decrypt_readme.txt": false,
	} {
		if note(name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
	n := list(t, append(files(10, "a %d"), files(37, "HOW_TO_DECRYPT_%d.txt")...)...).Compare(list(t, files(10, "a %d")...))
	if n.Notes != 37 || len(n.NoteNames) != maxNoteNames {
		t.Errorf("%+v", n)
	}
}

func TestAListingThatMakesNoSenseIsRefused(t *testing.T) {
	for name, l := range map[string]Listing{
		"sample is no base64":  {Files: 3, Sample: "!!"},
		"sample is larger":     {Files: 1, Sample: "AAAAAAAAAAAAAAAAAAAAAA=="},
		"negative":             {Files: -1},
		"too many":             {Files: MaxFiles + 1},
		"more notes":           {Files: 1, Notes: 2},
		"ending of ten files":  {Files: 1, Endings: map[string]int64{"txt": 10}},
		"ending that is none":  {Files: 9, Endings: map[string]int64{"a/b\x1b[2J": 1}},
		"endless note names":   {Files: 9, NoteNames: make([]string, 100)},
		"ending in capitals":   {Files: 9, Endings: map[string]int64{"TXT": 1}},
		"ending of minus five": {Files: 9, Endings: map[string]int64{"txt": -5}},
	} {
		if err := l.Check(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestWhatIsShownOfNamesHasNoControlCharacters(t *testing.T) {
	l := Listing{Files: 1, Notes: 1, NoteNames: []string{"/srv/\x1b[2Jdecrypt_readme.txt"}}
	if err := l.Check(); err != nil || strings.ContainsRune(l.NoteNames[0], '\x1b') {
		t.Errorf("%q, %v", l.NoteNames, err)
	}
}

func BenchmarkLook(b *testing.B) {
	const n = 1 << 20 // blocks come out of a buffer of that size
	for name, data := range map[string][]byte{"text": text(b, n), "program": program(b, n), "random": encrypted(b, make([]byte, n)), "empty": make([]byte, n)} {
		m := newMap(b, len(data))
		b.Run(name, func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				at := i % (len(data) / block)
				m.Look(int64(at), data[at*block:(at+1)*block])
			}
		})
	}
	data := encrypted(b, make([]byte, n))
	before := look(b, text(b, n), nil)
	b.Run("became random", func(b *testing.B) {
		m := newMap(b, n)
		for i := 0; b.Loop(); i++ {
			at := i % (n / block)
			m.Look(int64(at), data[at*block:(at+1)*block], before)
		}
	})
}
