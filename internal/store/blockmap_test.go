package store

import (
	"slices"
	"testing"

	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
)

func someIDs(t testing.TB, n int) []object.ID {
	t.Helper()
	ids := make([]object.ID, n)
	for i := range ids {
		hash := make([]byte, 32)
		hash[0], hash[1], hash[31] = byte(i), byte(i>>8), 1
		cid, err := content.IDFromHash("", hash)
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = object.DirectObjectID(cid)
	}
	return ids
}

func TestMapComesBackAsItWasWritten(t *testing.T) {
	for _, c := range []struct {
		unit, total int64
	}{{4096, 1}, {4096, 4096}, {4096, 4097}, {128 << 10, SegmentSize}, {128 << 10, SegmentSize - 1}, {SegmentSize, MaxDiskSize / 4096}} {
		ids := someIDs(t, int(ceilDiv(c.total, c.unit)))
		data := encodeMap(ids, c.unit, c.total)
		got, err := decodeMap(data, c.unit, c.total)
		if err != nil || !slices.Equal(got, ids) {
			t.Errorf("%+v: %v", c, err)
		}
		if _, err := decodeMap(data, c.unit, c.total+c.unit); err == nil {
			t.Errorf("%+v: a map of another size was accepted", c)
		}
	}
}

func TestMapThatIsNotOursIsRefused(t *testing.T) {
	good := string(encodeMap(someIDs(t, 2), 4096, 5000))
	for _, bad := range []string{
		"", "{}", "null", `{"stream":"kopia:directory","entries":[]}`,
		`{"stream":"kopia:indirect","entries":[{"l":4096,"o":"aa"}]}`,
		`{"stream":"kopia:indirect","entries":[{"l":4096,"o":""},{"s":4096,"l":904,"o":"aa"}]}`,
		`{"stream":"kopia:indirect","entries":[{"l":4096,"o":"aa"},{"s":4097,"l":903,"o":"aa"}]}`,
		`{"stream":"kopia:indirect","entries":[{"l":4096,"o":"aa"},{"s":4096,"l":4096,"o":"aa"}]}`,
		good + string(make([]byte, 1<<20)),
	} {
		if _, err := decodeMap([]byte(bad), 4096, 5000); err == nil {
			t.Errorf("%.80q was accepted", bad)
		}
	}
}

func FuzzDecodeMap(f *testing.F) {
	f.Add(encodeMap(someIDs(f, 2), 4096, 5000), int64(4096), int64(5000))
	f.Add([]byte(`{"stream":"kopia:indirect","entries":[{"l":1,"o":"Ixab"}]}`), int64(128<<10), int64(1))
	f.Add([]byte(`{"entries":[{"s":-1,"l":-1,"o":"ZZ"}]}`), int64(1), int64(1))
	f.Fuzz(func(t *testing.T, data []byte, unit, total int64) {
		if unit > 0 && total/unit > 1<<20 {
			return // the limit is on the bytes; do not make the fuzzer allocate it
		}
		ids, err := decodeMap(data, unit, total)
		if err != nil {
			return
		}
		again, err := decodeMap(encodeMap(ids, unit, total), unit, total)
		if err != nil || !slices.Equal(again, ids) {
			t.Fatalf("accepted %q, which does not come back: %v", data, err)
		}
		if _, err := blocksOf(ids, zeros{Block: ids[0].String()}); err == nil && ids[0].String() == "" {
			t.Fatal("an empty block was accepted")
		}
	})
}

func FuzzDecodeDocument(f *testing.F) {
	f.Add([]byte(`{"format":"muster-snapshot-1","snapshot":{"id":"snap-1","disks":[{"name":"sda","size":5,"block_size":131072,"root":"Ixaa"}]},"zeros":[{}]}`))
	f.Add([]byte(`{"format":"muster-snapshot-1","snapshot":{"id":"../x"}}`))
	f.Add([]byte(`{"format":"muster-partial-1","snapshot":{"id":"snap-1","server_id":"srv-1","disks":[{"name":"sda","size":5,"block_size":131072,"root":"Ixaa"}]},"zeros":[{}]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := decodeDocument(data, manifestFormat)
		partial, perr := decodeDocument(data, partialFormat)
		if err == nil && perr == nil {
			t.Fatalf("%q is taken for a snapshot and for a partial", data)
		}
		if perr == nil {
			d, err = partial, nil
		}
		if err != nil || d.Snapshot.IsData() {
			return
		}
		if len(d.Snapshot.Disks) == 0 || len(d.Snapshot.Disks) != len(d.Zeros) {
			t.Fatalf("accepted %q", data)
		}
		for _, disk := range d.Snapshot.Disks {
			g, err := newGeometry(disk.Size, disk.BlockSize)
			if err != nil || g.segments() > MaxDiskSize/SegmentSize {
				t.Fatalf("accepted a disk of %d in blocks of %d", disk.Size, disk.BlockSize)
			}
		}
	})
}

func TestFilterKnowsWhatItSaw(t *testing.T) {
	f := newFilter(1000)
	fresh := 0
	for _, id := range someIDs(t, 1000) {
		cid, _, _ := id.ContentID()
		hash := make([]byte, 32)
		for i := range hash { // spread, as a hash is
			hash[i] = cid.Hash()[0]*byte(i*7+1) + cid.Hash()[1]*byte(i*13+5) + byte(i)
		}
		if f.add(hash) {
			fresh++
		}
		if f.add(hash) {
			t.Fatal("a block was new twice")
		}
	}
	if fresh < 950 {
		t.Errorf("only %d of 1000 blocks were new", fresh)
	}
}
