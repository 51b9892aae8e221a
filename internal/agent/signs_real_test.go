//go:build linux

package agent

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	crand "crypto/rand"
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
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	imagefile "github.com/musterdr/muster/internal/capture/disk"
	"github.com/musterdr/muster/internal/capture/here"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// watched is a server whose disk is captured day after day, through a real agent or as an image file.
type watched struct {
	*volume
	file      string // behind the device
	store     *store.Store
	records   []dr.Record
	fromImage bool
}

func newWatched(t *testing.T) *watched {
	t.Helper()
	real(t)
	w := &watched{volume: newVolume(t, "ext4", 520<<20)} // from 512 MiB on with blocks of 4 KiB: parts of files lie in cells as they do in files
	w.file = command(t, "losetup", "--noheadings", "--output", "BACK-FILE", w.device)
	drv := folder.Driver{Path: filepath.Join(t.TempDir(), "store")}
	if err := store.Create(t.Context(), drv, "x"); err != nil {
		t.Fatal(err)
	}
	var err error
	if w.store, err = store.Open(t.Context(), drv, "x"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.store.Close(context.WithoutCancel(t.Context())) })
	return w
}

// night takes a snapshot, compared as a master would have it.
func (w *watched) night(t *testing.T) dr.Snapshot {
	t.Helper()
	command(t, "sync", "-f", w.mount)
	task := api.SnapshotTask{ID: dr.NewSnapshotID(time.Now()), Server: dr.Server{ID: "srv-1", Name: "shop"}, Usual: dr.UsualOf(w.records)}
	if n := len(w.records); n > 0 {
		task.Parent = w.records[n-1].Snapshot.ID
	}
	task.Trusted = task.Parent
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var source capture.Source = &here.Source{Agent: self, Env: []string{"MUSTER_TEST_TRACK=" + trackDir()},
		Plan: wire.Plan{Disks: []string{w.device}, FreezeLimit: 20 * time.Second}}
	if w.fromImage {
		command(t, "umount", w.mount) // nobody may write to it
		command(t, "sync", w.file)
		defer command(t, "mount", w.device, w.mount)
		if source, err = imagefile.Open([]string{w.file}); err != nil {
			t.Fatal(err)
		}
	}
	s, err := capture.Take(t.Context(), source, w.store, task, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// ordinary says that the last day was one.
func (w *watched) ordinary(t *testing.T, day string) {
	t.Helper()
	s := w.night(t)
	w.records = append(w.records, dr.Record{Snapshot: s})
	if len(w.records) == 1 {
		if s.Signs == nil || s.Signs.Last != nil || s.Signs.Files == 0 == !w.fromImage {
			t.Fatalf("%s: the first night shows %+v", day, s.Signs)
		}
		return
	}
	b := s.Signs.Last.Blocks
	t.Logf("%-34s %5d of %5d blocks struck, %4d MiB became random, %4d MiB new and random%s", day, b.Struck, b.Changed, b.Became>>20, b.New>>20, told(s.Signs.Last.Names))
	if s.Suspicious() {
		t.Errorf("%s is suspicious: %+v", day, s.Signs.Last.Found)
	}
}

func told(n *dr.NameChange) string {
	if n == nil {
		return ""
	}
	return fmt.Sprintf("; %d files, %.0f %% gone, %.0f %% new", n.Now, 100*n.Gone, 100*n.Come)
}

// attack makes one from a copy of the disk and says what must be seen.
func (w *watched) attack(t *testing.T, name string, do func(t *testing.T), want ...dr.SignKind) {
	t.Helper()
	before := w.file + ".before"
	command(t, "umount", w.mount)
	command(t, "cp", "--sparse=always", w.file, before)
	command(t, "mount", w.device, w.mount)
	do(t)
	s := w.night(t)
	var kinds []dr.SignKind
	for _, f := range s.Signs.Last.Found {
		kinds = append(kinds, f.Kind)
	}
	b := s.Signs.Last.Blocks
	t.Logf("%-34s %5d of %5d blocks struck, %4d MiB became random, %4d MiB new and random%s", name, b.Struck, b.Changed, b.Became>>20, b.New>>20, told(s.Signs.Last.Names))
	for _, f := range s.Signs.Last.Found {
		t.Logf("    %s", f.Text)
	}
	for _, k := range want {
		if !slices.Contains(kinds, k) {
			t.Errorf("%s: %v seen, want %v", name, kinds, want)
		}
	}
	command(t, "umount", w.mount)
	command(t, "dd", "if="+before, "of="+w.file, "bs=4M", "conv=notrunc", "status=none")
	command(t, "blockdev", "--flushbufs", w.device)
	command(t, "mount", w.device, w.mount)
	if err := os.Remove(before); err != nil {
		t.Fatal(err)
	}
}

func (w *watched) path(name string) string { return filepath.Join(w.mount, name) }

func (w *watched) put(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(w.path(name)), 0o755), os.WriteFile(w.path(name), data, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// documents are the files that a criminal would want.
func (w *watched) documents(t *testing.T) (out []string) {
	t.Helper()
	err := filepath.WalkDir(w.path("srv"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			out = append(out, path)
		}
		return err
	})
	if err != nil || len(out) == 0 {
		t.Fatalf("%d documents, %v", len(out), err)
	}
	return out
}

// sources is real text: the source of Go, or what else this machine has as text.
func sources(t *testing.T, atLeast int) []byte {
	t.Helper()
	var out []byte
	for _, root := range []string{"/usr/local/go/src", "/usr/lib/go/src", "/usr/share", "/usr/include", "/usr/lib/python3", "/etc"} {
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if len(out) >= atLeast {
				return fs.SkipAll
			}
			if err != nil || !d.Type().IsRegular() {
				return nil //nolint:nilerr // there is other text
			}
			switch filepath.Ext(path) {
			case ".go", ".h", ".py", ".txt", ".xml", ".html", ".md", ".c", ".conf", ".pl", ".pm", ".json", ".rst", ".po":
				b, _ := os.ReadFile(path)
				out = append(out, b...)
			}
			return nil
		})
	}
	if len(out) < 4<<20 {
		t.Fatalf("this machine has only %d bytes of text", len(out))
	}
	for len(out) < atLeast {
		out = append(out, out...)
	}
	return out[:atLeast]
}

func programs(t *testing.T, skip, atLeast int) (out []byte) {
	t.Helper()
	for _, dir := range []string{"/usr/bin", "/usr/sbin", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if b, err := os.ReadFile(filepath.Join(dir, e.Name())); err == nil && len(b) < 16<<20 {
				out = append(out, b...)
			}
			if len(out) >= skip+atLeast {
				return out[skip : skip+atLeast]
			}
		}
	}
	t.Fatalf("this machine has only %d bytes of programs", len(out))
	return nil
}

func jpegs(t *testing.T, n int) [][]byte {
	t.Helper()
	var out [][]byte
	for i := range n {
		r := rand.New(rand.NewPCG(uint64(i), 5))
		img := image.NewRGBA(image.Rect(0, 0, 1600, 1000))
		for y := range 1000 {
			for x := range 1600 {
				v := uint8(128 + x/20*y/30%90 + r.IntN(40))
				img.SetRGBA(x, y, color.RGBA{v, uint8(x/7) + uint8(i), uint8(y/5) + uint8(r.IntN(12)), 255})
			}
		}
		var b bytes.Buffer
		if err := jpeg.Encode(&b, img, &jpeg.Options{Quality: 92}); err != nil {
			t.Fatal(err)
		}
		out = append(out, b.Bytes())
	}
	return out
}

func ctr(t *testing.T) cipher.Stream {
	t.Helper()
	var key, iv [16]byte
	_, _ = crand.Read(key[:]) // never fails
	c, err := aes.NewCipher(key[:])
	if err != nil {
		t.Fatal(err)
	}
	return cipher.NewCTR(c, iv[:])
}

// pages are those of a database: a head, rows of text and numbers, room.
func pages(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 9))
	out := make([]byte, n*8192)
	for p := range n {
		page := out[p*8192 : (p+1)*8192]
		at := 0
		for at < 6000 {
			row := fmt.Sprintf("%c%c%08d|customer-%d@example.org|%x|2026-03-%02d|", byte(r.IntN(4)), byte(r.IntN(256)), r.IntN(1e8), r.IntN(1e6), r.Uint64(), r.IntN(28))
			at += copy(page[at:], row)
		}
	}
	return out
}

// fill gives the server its content: documents, programs, a database.
func (w *watched) fill(t *testing.T) {
	t.Helper()
	text := sources(t, 75<<20)
	for i := range 300 {
		w.put(t, fmt.Sprintf("srv/%d/document-%d.txt", i%20, i), text[i*256<<10:(i+1)*256<<10])
	}
	for i, p := 0, programs(t, 0, 30<<20); i < 30; i++ {
		w.put(t, fmt.Sprintf("opt/program-%d", i), p[i<<20:(i+1)<<20])
	}
	w.put(t, "data/table", pages(1, 2500))
}

func (w *watched) shell(t *testing.T, script string) {
	t.Helper()
	command(t, "bash", "-euc", "cd "+w.mount+"; "+script)
}

func TestRealOrdinaryDaysAreNotSuspiciousAndAttacksAre(t *testing.T) {
	w := newWatched(t)
	w.fill(t)
	w.ordinary(t, "the first night")
	w.put(t, "log/messages", []byte(strings.Repeat("Mar  1 12:00:00 shop kernel: all is well\n", 400_000)))
	w.ordinary(t, "logs grow")
	// What dm-crypt would write: this test needs no device-mapper for it.
	w.shell(t, `head -c 48M /dev/urandom > volume; echo -n secret | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 volume -`) // where nothing was before
	w.ordinary(t, "an encrypted volume is made")
	for i, p := range jpegs(t, 24) {
		w.put(t, fmt.Sprintf("photos/%d.jpg", i), p)
	}
	w.shell(t, `tar c srv/1 srv/2 srv/3 srv/4 srv/5 | gzip > a.tar.gz; tar c srv/6 srv/7 srv/8 srv/9 | zstd -q > a.tar.zst; tar c opt | xz -1 -T2 > a.tar.xz`)
	w.ordinary(t, "photos and archives are copied")
	for i, p := 0, programs(t, 30<<20, 30<<20); i < 30; i++ {
		if err := os.Remove(w.path(fmt.Sprintf("opt/program-%d", i))); err != nil {
			t.Fatal(err)
		}
		w.put(t, fmt.Sprintf("opt/program-%d.2", i), p[i<<20:(i+1)<<20])
	}
	w.shell(t, `rm a.tar.xz; tar c opt/*[0-4].2 | xz -1 -T2 > cache.deb; gzip -k log/messages; rm log/messages`)
	w.ordinary(t, "packages are upgraded, logs rotated")
	db, r := pages(1, 2500), rand.New(rand.NewPCG(4, 4))
	for range 700 {
		copy(db[r.IntN(2500)*8192:], pages(r.Uint64(), 1))
	}
	w.shell(t, `cat > data/table < /dev/null`)
	w.put(t, "data/table", db)
	w.ordinary(t, "a database is written to")
	w.shell(t, `openssl enc -aes-256-ctr -pass pass:x -nosalt -in opt/program-1.2 2>/dev/null | dd of=volume bs=1M seek=17 conv=notrunc status=none; head -c 16M /dev/urandom | dd of=volume bs=1M seek=30 conv=notrunc status=none`)
	w.ordinary(t, "an encrypted volume is written to")
	w.shell(t, `rm a.tar.gz; tar c srv/11 srv/12 srv/13 srv/14 | gzip > b.tar.gz; tar c srv/15 srv/16 | zstd -q > a.tar.zst`)
	w.ordinary(t, "yesterday's archives are replaced")

	const openssl = `openssl enc -aes-256-ctr -pbkdf2 -iter 1 -pass pass:x -in "$f" 2>/dev/null`
	w.attack(t, "openssl, in place", func(t *testing.T) {
		w.shell(t, `find srv -type f | while read f; do `+openssl+` > /dev/shm/x.$$; dd if=/dev/shm/x.$$ of="$f" bs=1M conv=notrunc status=none; done; rm /dev/shm/x.$$`)
	}, dr.SignBlocks)
	w.attack(t, "openssl, into new files with notes", func(t *testing.T) {
		w.shell(t, `find srv -type f | while read f; do `+openssl+` > "$f.lockd"; rm "$f"; done; for d in srv/*; do echo pay > $d/HOW_TO_DECRYPT.txt; done`)
	}, dr.SignRenamed, dr.SignEnding, dr.SignNotes)
	intermittent := func(t *testing.T) {
		stream := ctr(t)
		for _, path := range w.documents(t) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			page := make([]byte, 4096)
			for off := int64(0); ; off += 16 * 4096 {
				if n, _ := f.ReadAt(page, off); n < len(page) {
					break
				}
				stream.XORKeyStream(page, page)
				if _, err := f.WriteAt(page, off); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.attack(t, "every 16th page", intermittent, dr.SignBlocks)
	w.attack(t, "overwritten with chance", func(t *testing.T) {
		w.shell(t, `find srv -type f -size +100k | while read f; do dd if=/dev/urandom of="$f" bs=256K count=1 conv=notrunc status=none; done`)
	}, dr.SignBlocks)
	w.attack(t, "deleted", func(t *testing.T) { w.shell(t, `rm -r srv`) }, dr.SignGone)
	w.attack(t, "renamed", func(t *testing.T) {
		for _, path := range w.documents(t) {
			if err := os.Rename(path, path+".crypted"); err != nil {
				t.Fatal(err)
			}
		}
	}, dr.SignRenamed, dr.SignEnding)
}

func TestRealAnImageFileShowsBlocksOnly(t *testing.T) {
	w := newWatched(t)
	w.fromImage = true
	w.fill(t)
	w.ordinary(t, "the first night")
	w.put(t, "log/messages", []byte(strings.Repeat("Mar  1 12:00:00 shop kernel: all is well\n", 400_000)))
	w.ordinary(t, "logs grow")
	if s := w.records[1].Snapshot.Signs; s.NoNames == "" || s.Last.Names != nil {
		t.Errorf("names of an image file: %+v", s)
	}
	w.attack(t, "openssl, in place", func(t *testing.T) {
		w.shell(t, `find srv -type f | while read f; do openssl enc -aes-256-ctr -pbkdf2 -iter 1 -pass pass:x -in "$f" 2>/dev/null > /dev/shm/x.$$; dd if=/dev/shm/x.$$ of="$f" bs=1M conv=notrunc status=none; done; rm /dev/shm/x.$$`)
	}, dr.SignBlocks)
}
