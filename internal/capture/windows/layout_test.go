package windows

import (
	"bytes"
	"encoding/binary"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/capture/view"
)

// extents lays an answer out as Windows does.
func extents(es ...Extent) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(es)))
	b = append(b, 0, 0, 0, 0)
	for _, e := range es {
		b = binary.LittleEndian.AppendUint32(b, e.Disk)
		b = append(b, 0xcc, 0xcc, 0xcc, 0xcc) // what the compiler leaves between
		b = binary.LittleEndian.AppendUint64(b, uint64(e.Offset))
		b = binary.LittleEndian.AppendUint64(b, uint64(e.Length))
	}
	return b
}

func bitmap(first, count uint64, bits ...byte) []byte {
	return append(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, first), count), bits...)
}

func TestExtentsAreReadAsWindowsWritesThem(t *testing.T) {
	want := []Extent{{1, view.Range{Offset: 1 << 20, Length: 500 << 20}}, {0, view.Range{Offset: 0, Length: 7}}}
	if got, err := ParseExtents(extents(want...)); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for name, b := range map[string][]byte{
		"nothing": nil, "no extent": extents(), "cut off": extents(want...)[:40],
		"a negative offset": extents(Extent{0, view.Range{Offset: -1, Length: 5}}), "no length": extents(Extent{}),
		"an end that wraps": extents(Extent{0, view.Range{Offset: 1 << 62, Length: 1 << 62}}), "a disk that cannot be": extents(Extent{1 << 20, view.Range{Length: 1}}),
	} {
		if got, err := ParseExtents(b); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestFreeClustersAreThoseWithoutABit(t *testing.T) {
	got, err := FreeClusters(bitmap(0, 20, 0b11110011, 0xff, 0b0001), 4096, 20*4096+512)
	want := []view.Range{{Offset: 2 * 4096, Length: 2 * 4096}, {Offset: 17 * 4096, Length: 3 * 4096}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for name, b := range map[string][]byte{
		"nothing": nil, "cut off": bitmap(0, 20, 1, 2), "more than the volume has": bitmap(0, 2000, make([]byte, 250)...), "not from the beginning": bitmap(8, 8, 1),
		"a count that wraps": bitmap(0, 1<<63, 1),
	} {
		if got, err := FreeClusters(b, 4096, 21*4096); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
	for _, cluster := range []int64{0, -4096, 511, 5000, 4 << 20} {
		if _, err := FreeClusters(bitmap(0, 0), cluster, 1<<20); err == nil {
			t.Errorf("clusters of %d bytes were taken", cluster)
		}
	}
}

func FuzzFreeClusters(f *testing.F) {
	f.Add(bitmap(0, 20, 0b11110011, 0xff, 0b0001), int64(4096), int64(1<<20))
	f.Fuzz(func(t *testing.T, b []byte, cluster, size int64) {
		free, err := FreeClusters(b, cluster, size)
		if err != nil {
			return
		}
		end := int64(-1)
		for _, r := range free {
			if r.Offset <= end || r.Length <= 0 || r.End() > size {
				t.Fatalf("%v of a volume of %d bytes", free, size)
			}
			end = r.End()
		}
	})
}

func FuzzExtents(f *testing.F) {
	f.Add(extents(Extent{1, view.Range{Offset: 1 << 20, Length: 500 << 20}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		es, err := ParseExtents(b)
		for _, e := range es {
			if err == nil && (e.Offset < 0 || e.Length <= 0 || e.End() < 0) {
				t.Fatalf("%+v", e)
			}
		}
	})
}

func TestADiskIsItsShadowCopyWithTheRestAroundIt(t *testing.T) {
	disk, shadow := bytes.Repeat([]byte("d"), 100), bytes.Repeat([]byte("s"), 60)
	on := Extent{0, view.Range{Offset: 20, Length: 60}}
	parts := place(on, view.Part{From: bytes.NewReader(shadow)}, []view.Range{{Offset: 10, Length: 5}, {Offset: 55, Length: 5}})
	v, err := view.New(bytes.NewReader(disk), 100, parts)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(io.NewSectionReader(v, 0, 100))
	want := strings.Repeat("d", 20) + strings.Repeat("s", 10) + strings.Repeat("\x00", 5) + strings.Repeat("s", 40) + strings.Repeat("\x00", 5) + strings.Repeat("d", 20)
	if err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
	if rest := v.Rest(); !slices.Equal(rest, []view.Range{{Offset: 0, Length: 20}, {Offset: 80, Length: 20}}) {
		t.Errorf("the rest is %v", rest)
	}
}

func TestOnlyWhatShowsOneInstantIsShadowed(t *testing.T) {
	c := volume{name: "c", paths: []string{`C:\`}, fstype: "NTFS", on: []Extent{{0, view.Range{Offset: 100, Length: 50}}}}
	efi := volume{name: "efi", fstype: "FAT32", on: []Extent{{0, view.Range{Offset: 10, Length: 50}}}}
	recovery := volume{name: "r", fstype: "NTFS", on: []Extent{{0, view.Range{Offset: 200, Length: 50}}}}
	d := volume{name: "d", paths: []string{`D:\`}, fstype: "ReFS", on: []Extent{{1, view.Range{Offset: 100, Length: 50}}}}
	if got, err := shadowed([]volume{efi, c, recovery, d}, []uint32{0}); err != nil || len(got) != 1 || got[0].name != "c" {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := shadowed([]volume{c, d}, []uint32{0, 1}); err == nil || !strings.Contains(err.Error(), "one instant") {
		t.Errorf("two volumes: %v", err)
	}
	d.on = append(d.on, c.on...)
	if _, err := shadowed([]volume{d}, []uint32{1}); err == nil || !strings.Contains(err.Error(), "pieces") {
		t.Errorf("a spanned volume: %v", err)
	}
}

func TestADiskIsNamedAsWindowsNamesIt(t *testing.T) {
	for name, want := range map[string]uint32{`\\.\PhysicalDrive0`: 0, "PHYSICALDRIVE12": 12} {
		if n, err := number(name); err != nil || n != want {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
	for _, name := range []string{"", "C:", "PhysicalDrive", "PhysicalDrive-1", "PhysicalDrive01", "PhysicalDrive99999", `..\PhysicalDrive0`, "PhysicalDrive0 "} {
		if n, err := number(name); err == nil {
			t.Errorf("%q is disk %d", name, n)
		}
	}
}
