package capture_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/jpeg"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store/storetest"
)

// daily is a shelf whose files are captured day after day, each compared as a master would have it.
type daily struct {
	*shelf
	records []dr.Record
	n       int
}

// night takes a set, compared with the last that was recorded and, if that is another one, the last that is not held.
func (d *daily) night() dr.Snapshot {
	d.t.Helper()
	d.n++
	server := dr.Server{ID: "srv-1", Name: "web", Tier: dr.TierImageData, Data: dr.DataSet{Paths: []string{"/srv"}}}
	task := api.SnapshotTask{ID: fmt.Sprintf("snap-%d", d.n), Server: server, Image: d.image, Trusted: dr.Trusted(d.records), Usual: dr.UsualOf(d.records)}
	if n := len(d.records); n > 0 {
		task.Parent = d.records[n-1].Snapshot.ID
	}
	s, err := capture.TakeFiles(d.t.Context(), d, d.st, task, nil)
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

func (d *daily) record(s dr.Snapshot) dr.Snapshot {
	d.records = append(d.records, dr.Record{Snapshot: s})
	held := dr.Holds(d.records)
	for i, r := range d.records {
		d.records[i].HeldBy = held[r.Snapshot.ID]
	}
	return s
}

func (d *daily) ordinary(day string) {
	d.t.Helper()
	s := d.record(d.night())
	if len(d.records) == 1 {
		return
	}
	b, n := s.Signs.Last.Blocks, s.Signs.Last.Names
	d.t.Logf("%-34s %5d of %5d blocks struck, %4d KiB of %d became random; %d files, %.0f %% gone, %.0f %% new", day, b.Struck, b.Changed, b.Became>>10, b.Readable>>10, n.Now, 100*n.Gone, 100*n.Come)
	if s.Suspicious() {
		d.t.Errorf("%s is suspicious: %+v", day, s.Signs.Last.Found)
	}
}

// attack says what must be seen of what is done to a copy of the server.
func (d *daily) attack(name string, do func(), want ...dr.SignKind) {
	d.t.Helper()
	srv, before := d.top+"/srv", d.top+"/before"
	d.must(errors.Join(os.Rename(srv, before), os.CopyFS(srv, os.DirFS(before))))
	do()
	s := d.night()
	var kinds []dr.SignKind
	for _, f := range s.Signs.Last.Found {
		kinds = append(kinds, f.Kind)
		d.t.Logf("%-34s %s", name, f.Text)
	}
	for _, k := range want {
		if !slices.Contains(kinds, k) {
			d.t.Errorf("%s: %v seen, want %v: %+v", name, kinds, want, s.Signs.Last.Blocks)
		}
	}
	d.must(errors.Join(os.RemoveAll(srv), os.Rename(before, srv)))
}

func (d *daily) each(folder string, do func(path string)) {
	d.t.Helper()
	err := filepath.WalkDir(d.top+folder, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			do(path)
		}
		return err
	})
	if err != nil {
		d.t.Fatal(err)
	}
}

// must does to a file what a criminal or an ordinary day does.
func (d *daily) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

// prose is text of some seed.
func prose(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 3))
	words := strings.Fields("the of order customer invoice paid shipped and to in 2026 street total thank you regards 17.50 49.00 draft report")
	var b bytes.Buffer
	for b.Len() < n {
		b.WriteString(words[r.IntN(len(words))])
		b.WriteByte(" \n"[r.IntN(8)/7])
	}
	return b.Bytes()[:n]
}

func encrypted(data []byte) []byte {
	key, out := make([]byte, len(data)), make([]byte, len(data))
	storetest.Noise(key, rand.Uint64())
	for i := range data {
		out[i] = data[i] ^ key[i]
	}
	return out
}

func gzipped(data []byte, level int) []byte {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err == nil {
		_, err = w.Write(data)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		panic(err) // memory does not fail
	}
	return b.Bytes()
}

func photos(quality int) (out [][]byte) {
	for i := range 15 {
		r := rand.New(rand.NewPCG(uint64(i), 5))
		img := image.NewRGBA(image.Rect(0, 0, 160, 120))
		for y := range 120 {
			for x := range 160 {
				img.SetRGBA(x, y, color.RGBA{uint8(128 + x/20*y/30%90 + r.IntN(40)), uint8(x/2) + uint8(i), uint8(y) + uint8(r.IntN(12)), 255})
			}
		}
		var b bytes.Buffer
		if err := jpeg.Encode(&b, img, &jpeg.Options{Quality: quality}); err != nil {
			panic(err) // memory does not fail
		}
		out = append(out, b.Bytes())
	}
	return out
}

const documents = 320

func newDaily(t *testing.T) *daily {
	t.Helper()
	d := &daily{shelf: newShelf(t)}
	for i := range documents {
		d.put(fmt.Sprintf("/srv/docs/%d/document-%d.txt", i%20, i), prose(uint64(i), 8<<10))
	}
	for i, p := 0, photos(92); i < 300; i++ {
		d.put(fmt.Sprintf("/srv/photos/%d.jpg", i), p[i%len(p)])
	}
	for i := range 40 {
		d.put(fmt.Sprintf("/srv/log/%d.log", i), prose(uint64(i)+1000, 4<<10))
		d.put(fmt.Sprintf("/srv/log/%d.log.1.gz", i), gzipped(prose(uint64(i)+2000, 12<<10), 6))
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 30 {
		d.put(fmt.Sprintf("/srv/opt/program-%d", i), program[i<<15:(i+1)<<15])
	}
	return d
}

func TestOrdinaryDaysOfASetAreNotSuspiciousAndAttacksAre(t *testing.T) {
	t.Parallel()
	d := newDaily(t)
	d.ordinary("the first night")
	d.ordinary("nothing happens")
	for i := range documents {
		path := fmt.Sprintf("/srv/docs/%d/document-%d.txt", i%20, i)
		if i%3 == 0 { // as editors do: written anew under another name, put in its place
			d.put(path+"~", append([]byte("corrected\n"), prose(uint64(i), 10<<10)...))
			d.must(os.Rename(d.top+path+"~", d.top+path))
		}
	}
	for i := range 60 {
		d.put(fmt.Sprintf("/srv/docs/%d/new-%d.txt", i%20, i), prose(uint64(i)+5000, 8<<10))
	}
	d.ordinary("documents are edited and added")
	for i := range 40 {
		log := d.top + fmt.Sprintf("/srv/log/%d.log", i)
		old, err := os.ReadFile(log)
		d.must(err)
		d.must(os.Rename(log+".1.gz", log+".2.gz"))
		d.must(os.WriteFile(log+".1.gz", gzipped(old, 6), 0o644))
		d.must(os.WriteFile(log, prose(uint64(i)+3000, 1<<10), 0o644))
	}
	d.ordinary("logs are rotated")
	program, err := os.ReadFile("/proc/self/exe")
	d.must(err)
	for i := range 30 {
		d.must(os.Remove(d.top + fmt.Sprintf("/srv/opt/program-%d", i)))
		d.put(fmt.Sprintf("/srv/opt/program-%d.2", i), program[(40+i)<<15:(41+i)<<15])
		d.put(fmt.Sprintf("/srv/opt/cache/%d.deb", i), gzipped(program[(40+i)<<15:(41+i)<<15], 9))
	}
	d.ordinary("a package is upgraded")
	for i, p := 0, photos(75); i < 300; i++ {
		d.put(fmt.Sprintf("/srv/photos/%d.jpg", i), p[i%len(p)])
	}
	d.ordinary("photos are compressed once more")
	for i := range 12 { // much that is random, and nothing readable lost
		key := make([]byte, 1<<19)
		storetest.Noise(key, uint64(i))
		d.put(fmt.Sprintf("/srv/backup/%d.gz", i), key)
	}
	d.ordinary("encrypted archives are put there")

	d.attack("encrypted in place", func() {
		d.each("/srv/docs", func(path string) {
			b, err := os.ReadFile(path)
			d.must(err)
			d.must(os.WriteFile(path, encrypted(b), 0o644))
		})
	}, dr.SignBlocks)
	d.attack("one page of each, in place", func() {
		d.each("/srv/docs", func(path string) {
			b, err := os.ReadFile(path)
			d.must(err)
			d.must(os.WriteFile(path, append(encrypted(b[:4096]), b[4096:]...), 0o644))
		})
	}, dr.SignBlocks)
	d.attack("photos, in place", func() {
		d.each("/srv/photos", func(path string) {
			b, err := os.ReadFile(path)
			d.must(err)
			d.must(os.WriteFile(path, encrypted(b), 0o644))
		})
	}, dr.SignBlocks)
	d.attack("into new files with notes", func() {
		d.each("/srv/docs", func(path string) {
			b, err := os.ReadFile(path)
			d.must(err)
			d.must(os.WriteFile(path+".lockd", encrypted(b), 0o644))
			d.must(os.Remove(path))
		})
		for i := range 20 {
			d.put(fmt.Sprintf("/srv/docs/%d/HOW_TO_DECRYPT.txt", i), []byte("pay"))
		}
	}, dr.SignRenamed, dr.SignEnding, dr.SignNotes)
	d.attack("renamed", func() {
		d.each("/srv", func(path string) { d.must(os.Rename(path, path+".crypted")) })
	}, dr.SignRenamed, dr.SignEnding)
	d.attack("deleted", func() {
		d.must(errors.Join(os.RemoveAll(d.top+"/srv/docs"), os.RemoveAll(d.top+"/srv/photos")))
	}, dr.SignGone)
}

func TestASetThatWasEncryptedIsSeenUntilItIsBroughtBack(t *testing.T) {
	t.Parallel()
	d := newDaily(t)
	d.ordinary("the first night")
	before := t.TempDir()
	d.must(os.CopyFS(before, os.DirFS(d.top+"/srv")))
	d.each("/srv", func(path string) {
		b, err := os.ReadFile(path)
		d.must(err)
		d.must(os.WriteFile(path, encrypted(b), 0o644))
	})
	if s := d.record(d.night()); !s.Suspicious() || s.Signs.Trusted != nil {
		t.Errorf("encrypted: %+v", s.Signs)
	}
	d.put("/srv/docs/0/another.txt", prose(9, 8<<10))
	if s := d.record(d.night()); s.Suspicious() || s.Signs.Trusted == nil || len(s.Signs.Trusted.Found) == 0 {
		t.Errorf("a quiet night after it: %+v, %+v", s.Signs.Last, s.Signs.Trusted)
	}
	d.must(errors.Join(os.RemoveAll(d.top+"/srv"), os.CopyFS(d.top+"/srv", os.DirFS(before))))
	s := d.record(d.night())
	if d.records[3].HeldBy != "" || d.records[2].HeldBy != "snap-2" {
		t.Errorf("held: %+v", dr.Holds(d.records))
	}
	if trusted := s.Signs.Trusted; trusted == nil || len(trusted.Found) > 0 || trusted.Blocks == nil || trusted.Names == nil || trusted.Blocks.Struck > 2 || trusted.Blocks.Changed != 0 {
		t.Errorf("brought back: %+v", trusted)
	}
}

// What is not read of a set is known from the snapshot before, wherever its names come to lie.
func TestSignsOfASetThatIsReadInPartAreThoseOfAll(t *testing.T) {
	t.Parallel()
	d := &daily{shelf: newShelf(t)}
	r := rand.New(rand.NewPCG(1, 1))
	for day := range 6 {
		for range 12 {
			path := fmt.Sprintf("/srv/%d/%d", r.IntN(4), r.IntN(30))
			switch n := r.IntN(300 << 10); r.IntN(4) {
			case 0:
				data := make([]byte, n) // the same in every run: one in some thousand small pieces of chance looks packed, if only a part of it is counted
				storetest.Noise(data, r.Uint64())
				d.put(path, data)
			case 1:
				d.must(os.RemoveAll(d.top + path))
			case 2:
				d.put(path, make([]byte, n))
			default:
				d.put(path, prose(uint64(n), n))
			}
		}
		s := d.record(d.night())
		full := &daily{shelf: d.shelf, n: 100 + day}
		other := full.night()
		for _, name := range []string{"signs-0", "names"} {
			a, err := d.st.Attachment(t.Context(), s.ID, name)
			d.must(err)
			b, err := d.st.Attachment(t.Context(), other.ID, name)
			if err != nil || !bytes.Equal(a, b) {
				t.Fatalf("day %d: %s of an increment has %d bytes, of a full one %d, or others, %v", day, name, len(a), len(b), err)
			}
		}
		if day > 0 && s.Signs.Last.Blocks.Struck > s.Signs.Last.Blocks.Changed {
			t.Errorf("day %d: %+v", day, s.Signs.Last.Blocks)
		}
	}
}

func TestFoldersThatAPersonLeavesOutAreNotFilesThatAreGone(t *testing.T) {
	t.Parallel()
	d := newDaily(t)
	d.take("snap-a", "")
	s := d.take("snap-b", "snap-a", "docs")
	if s.Suspicious() || s.Signs.Last.Names != nil || s.Signs.Last.Blocks == nil {
		t.Errorf("%+v", s.Signs.Last)
	}
}
