package wire

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/fileset"
)

func TestFramesArriveAsTheyWereSent(t *testing.T) {
	var pipe bytes.Buffer
	w := NewWriter(&pipe)
	block := Block{Disk: 3, Zstd: true, Number: 1 << 40, Sum: Sum{1, 2, 3}, Data: []byte("content")}
	zero := Zeros{Disk: 1, First: 7, Count: 9}
	pipe.WriteString("Last login: yesterday\n")
	for _, err := range []error{w.Greet(), w.Message(KindHello, Hello{Version: "1"}), w.Block(block), w.Zeros(zero), w.Go()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	r := NewReader(&pipe)
	if err := r.Greeting(); err != nil {
		t.Fatal(err)
	}
	next := func(want Kind) []byte {
		t.Helper()
		k, p, err := r.Next(nil)
		if err != nil || k != want {
			t.Fatalf("got kind %q, %v; want %q", byte(k), err, byte(want))
		}
		return p
	}
	var hello Hello
	if err := Decode(next(KindHello), &hello); err != nil || hello.Version != "1" {
		t.Errorf("hello: %+v, %v", hello, err)
	}
	got, err := ParseBlock(next(KindBlock))
	if err != nil || got.Disk != block.Disk || got.Number != block.Number || got.Sum != block.Sum || !got.Zstd || string(got.Data) != "content" {
		t.Errorf("block: %+v, %v", got, err)
	}
	if z, err := ParseZeros(next(KindZeros)); err != nil || z != zero {
		t.Errorf("zeros: %+v, %v", z, err)
	}
	next(KindGo)
	if _, _, err := r.Next(nil); !errors.Is(err, io.EOF) {
		t.Errorf("after the last frame: %v, want EOF", err)
	}
}

func TestAFrameOverItsLimitIsRefusedBeforeMemoryIsGivenToIt(t *testing.T) {
	for _, head := range []string{"B\xff\xff\xff\xff", "H\x00\x00\x00\x10", "g\x01\x00\x00\x00", "?\x00\x00\x00\x00"} {
		if _, _, err := NewReader(strings.NewReader(head)).Next(nil); !errors.Is(err, ErrGarbage) {
			t.Errorf("frame %q: %v, want ErrGarbage", head, err)
		}
	}
}

func TestNoiseWithoutAGreetingIsGivenUp(t *testing.T) {
	err := NewReader(strings.NewReader(strings.Repeat("noise ", MaxNoise))).Greeting()
	if !errors.Is(err, ErrGarbage) {
		t.Errorf("endless noise: %v", err)
	}
	err = NewReader(strings.NewReader("sh: not found\n")).Greeting()
	if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "not found") {
		t.Errorf("a shell's complaint: %v", err)
	}
}

func TestFingerprintsTellBlocksPlacesAndSeedsApart(t *testing.T) {
	seed, data := NewSeed(), bytes.Repeat([]byte("x"), 128<<10)
	sum := seed.Sum(5, data)
	if sum != seed.Sum(5, bytes.Clone(data)) {
		t.Error("the same content at the same place has two fingerprints")
	}
	if sum == seed.Sum(6, data) || sum == NewSeed().Sum(5, data) {
		t.Error("another place or another seed has the same fingerprint")
	}
	data[77777] ^= 1
	if sum == seed.Sum(5, data) {
		t.Error("a flipped bit keeps the fingerprint")
	}
	if seed.Sum(5, make([]byte, 4096)) != (Sum{}) || sum == (Sum{}) {
		t.Error("the zero fingerprint must stand for zeros and for nothing else")
	}
}

func TestKeptFingerprintsAreReadBack(t *testing.T) {
	s, err := NewSums(NewSeed(), 4096, 10*4096+1)
	if err != nil {
		t.Fatal(err)
	}
	s.Set(10, Sum{9})
	if n := s.Length(10); n != 1 {
		t.Errorf("the last block has %d bytes, want 1", n)
	}
	b, _ := s.MarshalBinary()
	got, err := UnmarshalSums(b)
	if err != nil || !bytes.Equal(got.Digest(), s.Digest()) || got.Size != s.Size || got.Seed != s.Seed || got.At(10) != (Sum{9}) {
		t.Errorf("read back: %+v, %v", got, err)
	}
	for cut := range len(b) {
		if _, err := UnmarshalSums(b[:cut]); err == nil {
			t.Fatalf("%d of %d bytes were taken for whole", cut, len(b))
		}
	}
}

func TestSumsTravelInPieces(t *testing.T) {
	s, _ := NewSums(NewSeed(), MinBlock, MinBlock*(SumsAtOnce+5))
	for i := range s.Len() {
		s.Set(i, Sum{byte(i), byte(i >> 8)})
	}
	var pipe bytes.Buffer
	if err := NewWriter(&pipe).Sums(2, s); err != nil {
		t.Fatal(err)
	}
	got, _ := NewSums(s.Seed, s.BlockSize, s.Size)
	r := NewReader(&pipe)
	for {
		_, p, err := r.Next(nil)
		if errors.Is(err, io.EOF) {
			break
		}
		disk, first, raw, perr := ParseSums(p)
		if err != nil || perr != nil || disk != 2 {
			t.Fatal(err, perr, disk)
		}
		if err := got.Fill(first, raw); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got.Digest(), s.Digest()) {
		t.Error("the fingerprints changed on the way")
	}
	if got.Fill(got.Len(), make([]byte, SumSize)) == nil {
		t.Error("a fingerprint beyond the end was taken")
	}
}

func TestADiskOfWhichNothingIsKnownCostsNothingToTell(t *testing.T) {
	s, _ := NewSums(NewSeed(), MinBlock, 3*MinBlock*SumsAtOnce)
	s.Set(2*SumsAtOnce, Sum{1})
	var pipe bytes.Buffer
	if err := NewWriter(&pipe).Sums(0, s); err != nil {
		t.Fatal(err)
	}
	if max := SumsAtOnce*SumSize + 100; pipe.Len() > max {
		t.Errorf("%d bytes were sent for one fingerprint in three pieces, want at most %d", pipe.Len(), max)
	}
}

func TestVeryLargeDisksGetLargerBlocks(t *testing.T) {
	for size, want := range map[int64]int{1 << 40: 128 << 10, 3 << 40: 256 << 10, 14 << 40: 1 << 20} {
		got := BlockSizeFor(size, 128<<10)
		if got != want || (size+int64(got)-1)/int64(got) > MaxSums/SumSize {
			t.Errorf("a disk of %d bytes: blocks of %d, want %d", size, got, want)
		}
	}
}

func FuzzFrames(f *testing.F) {
	var seed bytes.Buffer
	w := NewWriter(&seed)
	_ = w.Message(KindPass, Pass{Number: 1})
	_ = w.Block(Block{Data: []byte("x")})
	_ = w.Zeros(Zeros{Count: 1})
	_ = w.Same(3)
	_ = w.Piece(false, []byte("x"))
	_ = w.Entry(&fileset.Entry{Kind: fileset.Folder, Path: "/srv"})
	was := w.Was()
	_ = was.Add(KnownFile{Path: "/srv"})
	_ = was.Go()
	f.Add(seed.Bytes())
	f.Add([]byte("B\xff\xff\xff\x7f"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := NewReader(bytes.NewReader(in))
		for {
			kind, p, err := r.Next(nil)
			if err != nil {
				return
			}
			if len(p) > kind.limit() {
				t.Fatalf("kind %q gave %d bytes", byte(kind), len(p))
			}
			if b, err := ParseBlock(p); err == nil && (b.Disk < 0 || b.Disk >= MaxDisks || b.Number < 0) {
				t.Fatalf("block %+v", b)
			}
			if z, err := ParseZeros(p); err == nil && (z.Count < 1 || z.First < 0 || z.First+z.Count < 0) {
				t.Fatalf("zeros %+v", z)
			}
			if e, err := ParseEntry(p); err == nil && e.Path == "" {
				t.Fatalf("entry %+v", e)
			}
			if n, err := ParseCount(p); err == nil && n < 1 {
				t.Fatalf("count %d", n)
			}
			if list, err := ParseWas(p); err == nil && len(list) > len(p)/16 {
				t.Fatalf("%d names of %d bytes", len(list), len(p))
			}
			_, _, _ = ParsePiece(p)
			if _, first, raw, err := ParseSums(p); err == nil {
				s, _ := NewSums(Seed{}, MinBlock, 100*MinBlock)
				_ = s.Fill(first, raw)
			}
		}
	})
}

func FuzzKeptSums(f *testing.F) {
	s, _ := NewSums(NewSeed(), 4096, 12345)
	b, _ := s.MarshalBinary()
	f.Add(b)
	f.Fuzz(func(t *testing.T, in []byte) {
		if s, err := UnmarshalSums(in); err == nil && (s.Len()*SumSize != int64(len(s.raw)) || (s.Len() > 0 && s.Length(s.Len()-1) < 1)) {
			t.Fatalf("a disk of %d bytes with %d fingerprints", s.Size, s.Len())
		}
	})
}

func BenchmarkSum(b *testing.B) {
	seed, data := NewSeed(), make([]byte, 128<<10)
	data[len(data)-1] = 1
	b.SetBytes(int64(len(data)))
	for i := range b.N {
		seed.Sum(int64(i), data)
	}
}
