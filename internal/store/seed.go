package store

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot/snapshotfs"
	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/durable"
)

// A seed is a disk on which packs are carried by hand from a near store to a far one with the same secrets, because the line is too
// thin for a first copy. The packs are on it as they are in the near store, sealed: no key is carried. The far store takes them in
// as it takes in those of a replication that was cut off: nothing names them yet, and Replicate finds them and sends
// only the rest. docs/formats/seed.md has every byte of it.

// Files of a seed.
const (
	seedFile    = "seed.json"
	seedList    = "packs.txt"
	seedPacks   = "packs"
	seedPart    = ".part"
	seedFormat  = "muster-seed-1"
	maxSeedFile = 64 << 10
	maxSeedList = 1 << 30
	maxPack     = 256 << 20
)

// Seed is what a disk carries, or what was done with it.
type Seed struct {
	Format    string    `json:"format"`
	Snapshots []string  `json:"snapshots"` // of which it has all packs that were worth carrying
	Packs     int64     `json:"packs"`
	Bytes     int64     `json:"bytes"`
	List      string    `json:"list"` // SHA-256 of the list of packs
	Made      time.Time `json:"made"`

	Digest string `json:"-"` // SHA-256 of the seed's own file: who knows it knows that nothing on the disk was changed
	New    int64  `json:"-"` // packs that were not there before
}

// ErrSeed is a disk that is not as it was made, or that is none.
var ErrSeed = errors.New("the disk does not carry what it should")

var packRE = regexp.MustCompile(`^p[0-9a-f]{16,64}(-[0-9a-z]{1,64})?$`)

// packLine is one line of a seed's list.
type packLine struct {
	sum  string
	size int64
	id   blob.ID
}

func (p packLine) String() string { return fmt.Sprintf("%s %d %s\n", p.sum, p.size, p.id) }

func seedPath(dir string, id blob.ID) string {
	return filepath.Join(dir, seedPacks, string(id)[1:3], string(id))
}

// ExportSeed writes the packs of some snapshots into a folder of a disk. Each is read back from the disk and compared. Cut off, it
// is called again: what is there and right is not written again. Where a seed of the same store is already, it
// becomes that of these snapshots, and packs that it does not need are left there.
func (s *Store) ExportSeed(ctx context.Context, dir string, snapshots []string, progress dr.Progress) (Seed, error) {
	ctx, done := s.bind(ctx)
	defer done()
	seed, err := s.exportSeed(ctx, dir, snapshots, progress)
	if err != nil {
		return seed, fmt.Errorf("write seed to %s: %w", dir, s.explain(err))
	}
	return seed, nil
}

func (s *Store) exportSeed(ctx context.Context, dir string, snapshots []string, progress dr.Progress) (Seed, error) {
	seed := Seed{Format: seedFormat, Snapshots: snapshots, Made: time.Now().UTC().Truncate(time.Second)}
	if len(snapshots) == 0 {
		return seed, errors.New("there is no snapshot to carry")
	}
	packs := map[blob.ID]int64{}
	for _, id := range snapshots {
		defer s.Pin(id)()
		if err := s.packsOf(ctx, id, packs); err != nil {
			return seed, fmt.Errorf("find the packs of %s: %w", id, err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, seedPacks), 0o700); err != nil {
		return seed, err
	}
	if err := os.Remove(filepath.Join(dir, seedFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return seed, err // whole again only at the end
	}
	var total, put int64
	for _, size := range packs {
		total += size
	}
	var lines []packLine
	for id, size := range packs {
		line, fresh, err := s.exportPack(ctx, dir, id)
		if err != nil {
			return seed, err
		}
		lines = append(lines, line)
		seed.Packs, seed.Bytes, put = seed.Packs+1, seed.Bytes+line.size, put+size
		if fresh {
			seed.New++
		}
		progress.Report("write seed", put, total, "bytes")
	}
	slices.SortFunc(lines, func(a, b packLine) int { return cmp.Compare(a.id, b.id) })
	return seed, seed.finish(dir, lines)
}

// finish writes the list, and last the file that makes a seed of a folder.
func (seed *Seed) finish(dir string, lines []packLine) error {
	var list strings.Builder
	for _, line := range lines {
		list.WriteString(line.String())
	}
	if err := durable.WriteFile(filepath.Join(dir, seedList), []byte(list.String()), 0o600); err != nil {
		return err
	}
	seed.List = digestOf([]byte(list.String()))
	raw, err := json.MarshalIndent(seed, "", "  ")
	if err != nil {
		return err
	}
	seed.Digest = digestOf(raw)
	return durable.WriteFile(filepath.Join(dir, seedFile), raw, 0o600)
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// packsOf collects the packs that hold contents of a snapshot, but those of manifests, which never travel whole.
func (s *Store) packsOf(ctx context.Context, snapshotID string, packs map[blob.ID]int64) error {
	f, err := s.find(ctx, snapshotID)
	if err != nil {
		return err
	}
	seen := map[object.ID]bool{}
	look := func(_ context.Context, _ fs.Entry, id object.ID, _ string) error {
		if seen[id] {
			return nil
		}
		seen[id] = true
		contents, err := s.rep.VerifyObject(ctx, id)
		if err != nil {
			return damaged(err)
		}
		for _, c := range contents {
			info, err := s.rep.ContentInfo(ctx, c)
			if err != nil {
				return damaged(err)
			}
			if strings.HasPrefix(string(info.PackBlobID), string(content.PackBlobIDPrefixRegular)) {
				packs[info.PackBlobID] += int64(info.PackedLength)
			}
		}
		return nil
	}
	walker, err := snapshotfs.NewTreeWalker(ctx, snapshotfs.TreeWalkerOptions{Parallelism: 1, MaxErrors: 1, EntryCallback: look})
	if err != nil {
		return err
	}
	defer walker.Close(ctx)
	return walker.Process(ctx, f.root, "")
}

// exportPack has one pack on the disk, and gives its line.
func (s *Store) exportPack(ctx context.Context, dir string, id blob.ID) (line packLine, fresh bool, err error) {
	if !packRE.MatchString(string(id)) {
		return line, false, fmt.Errorf("pack %q has a name that no seed carries", id)
	}
	var read Buffer
	if err := s.place.GetBlob(ctx, id, 0, -1, &read); err != nil {
		return line, false, damaged(fmt.Errorf("read pack %s: %w", id, err))
	}
	data := read.Bytes()
	line = packLine{sum: digestOf(data), size: int64(len(data)), id: id}
	path := seedPath(dir, id)
	if line.check(path) == nil {
		return line, false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return line, false, err
	}
	if err := writeSynced(path+seedPart, data); err != nil {
		return line, false, err
	}
	if err := os.Rename(path+seedPart, path); err != nil {
		return line, false, err
	}
	if err := durable.Sync(filepath.Dir(path)); err != nil {
		return line, false, err
	}
	return line, true, line.check(path)
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// check reads a pack from the disk and compares it with its line.
func (p packLine) check(path string) error {
	_, err := p.read(path)
	return err
}

func (p packLine) read(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: pack %s: %w", ErrSeed, p.id, err)
	}
	if !info.Mode().IsRegular() || info.Size() != p.size {
		return nil, fmt.Errorf("%w: pack %s has %d bytes and should have %d", ErrSeed, p.id, info.Size(), p.size)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()                                         //nolint:errcheck // only read
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // from the medium, not from memory
	data, err := io.ReadAll(io.LimitReader(f, p.size+1))
	if err != nil {
		return nil, fmt.Errorf("%w: pack %s: %w", ErrSeed, p.id, err)
	}
	if int64(len(data)) != p.size || digestOf(data) != p.sum {
		return nil, fmt.Errorf("%w: pack %s was changed or rotted: its SHA-256 is another", ErrSeed, p.id)
	}
	return data, nil
}

// OpenSeed reads what a disk carries. digest is what the one who made it was told; without it nobody knows what became of the disk on
// its way. The packs themselves are checked when they are read.
func OpenSeed(dir, digest string) (Seed, []byte, error) {
	var seed Seed
	raw, err := readBounded(filepath.Join(dir, seedFile), maxSeedFile)
	if err != nil {
		return seed, nil, fmt.Errorf("read seed: %w; a seed that was cut off has none: run the export again", err)
	}
	if seed.Digest = digestOf(raw); !strings.EqualFold(seed.Digest, digest) {
		return seed, nil, fmt.Errorf("read seed %s: %w: its digest is %s; the export said %s", dir, ErrSeed, seed.Digest, digest)
	}
	if err := json.Unmarshal(raw, &seed); err != nil || seed.Format != seedFormat {
		return seed, nil, fmt.Errorf("read seed %s: %w: it is of another format (%.40q)", dir, ErrSeed, seed.Format)
	}
	list, err := readBounded(filepath.Join(dir, seedList), maxSeedList)
	if err == nil && digestOf(list) != seed.List {
		err = fmt.Errorf("%w: its list of packs was changed or rotted", ErrSeed)
	}
	if err != nil {
		return seed, nil, fmt.Errorf("read seed %s: %w", dir, err)
	}
	return seed, list, nil
}

func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("%s has more than %d bytes", path, most)
	}
	return data, err
}

// ImportSeed adds the packs of a seed to the place of a far store. Each is compared with its line before it is put, and read back
// after. Nothing that is there is replaced or removed. It needs no key. Cut off, it is called again.
func ImportSeed(ctx context.Context, drv Driver, dir, digest string, progress dr.Progress) (Seed, error) {
	seed, list, err := OpenSeed(dir, digest)
	if err != nil {
		return seed, err
	}
	place, err := drv.Open(ctx)
	if err != nil {
		return seed, fmt.Errorf("take in seed %s: %w", dir, err)
	}
	err = seed.importInto(ctx, place, dir, list, progress)
	if err = errors.Join(err, place.Close(ctx)); err != nil {
		return seed, fmt.Errorf("take in seed %s: %w", dir, err)
	}
	return seed, nil
}

func (seed *Seed) importInto(ctx context.Context, place Place, dir string, list []byte, progress dr.Progress) error {
	// Whoever collects would remove what nothing names: not before the seed is in.
	unlock, taken, err := place.TryLock(lockIngest, false)
	if err != nil {
		return err
	}
	if !taken {
		return fmt.Errorf("%w: its garbage is being collected; try again later", ErrBusy)
	}
	defer unlock()
	var done int64
	for lines := bufio.NewScanner(bytes.NewReader(list)); lines.Scan(); {
		line, err := parsePackLine(lines.Text())
		if err != nil {
			return err
		}
		fresh, err := line.put(ctx, place, dir)
		if err != nil {
			return err
		}
		if fresh {
			seed.New++
		}
		done += line.size
		progress.Report("take in seed", done, seed.Bytes, "bytes")
	}
	return place.Sync(ctx)
}

func parsePackLine(text string) (p packLine, err error) {
	var id string
	if _, err := fmt.Sscanf(text, "%64s %d %s", &p.sum, &p.size, &id); err != nil || !packRE.MatchString(id) || p.size <= 0 || p.size > maxPack {
		return p, fmt.Errorf("%w: line %.120q of its list", ErrSeed, text)
	}
	p.id = blob.ID(id)
	return p, nil
}

func (p packLine) put(ctx context.Context, place Place, dir string) (fresh bool, err error) {
	data, err := p.read(seedPath(dir, p.id))
	if err != nil {
		return false, err
	}
	there, err := place.GetMetadata(ctx, p.id)
	switch {
	case errors.Is(err, blob.ErrBlobNotFound):
		fresh = true
		if err := place.PutBlob(ctx, p.id, Bytes(data), blob.PutOptions{}); err != nil {
			return false, fmt.Errorf("put pack %s: %w", p.id, err)
		}
	case err != nil:
		return false, err
	case there.Length != p.size:
		return false, fmt.Errorf("%w: pack %s has %d bytes there and %d on the disk", ErrDamaged, p.id, there.Length, p.size)
	}
	var back Buffer
	if err := GetFromMedium(ctx, place, p.id, &back); err != nil {
		return false, fmt.Errorf("read back pack %s: %w", p.id, err)
	}
	if digestOf(back.Bytes()) != p.sum {
		return false, fmt.Errorf("%w: pack %s is another there than on the disk", ErrDamaged, p.id)
	}
	return fresh, nil
}
