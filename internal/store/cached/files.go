package cached

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/zeebo/xxh3"
)

// An entry is the checksum of its name and its content, and the content. It is not synced: one that a power cut tore
// does not match its checksum.
const sumSize = 16

// tempMark is in the name of a file that is being written.
const tempMark = ".tmp."

// touchAfter is how old the time of an entry may be before reading it sets it anew; tempAge how long a file may be under way.
const (
	touchAfter = 10 * time.Minute
	tempAge    = time.Hour
)

// The cache is cleared up after a sixteenth of its limit was written, to what leaves room for that and for another process.
const (
	writtenShare = 16
	clearedShare = 8
)

func sum(key string, data []byte) [sumSize]byte {
	h := xxh3.New()
	_, _ = h.WriteString(key)
	_, _ = h.Write([]byte{0})
	_, _ = h.Write(data)
	return h.Sum128().Bytes()
}

// load reads an entry. One that is damaged is removed.
func load(e entry) ([]byte, bool) {
	f, err := os.Open(e.path)
	if err != nil {
		return nil, false
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil || info.Size() > maxEntry+sumSize {
		return nil, false
	}
	raw := make([]byte, info.Size())
	if _, err := io.ReadFull(f, raw); err == nil && len(raw) > sumSize {
		if want := sum(e.key, raw[sumSize:]); bytes.Equal(raw[:sumSize], want[:]) {
			if now := time.Now(); now.Sub(info.ModTime()) > touchAfter {
				_ = os.Chtimes(e.path, now, now)
			}
			return raw[sumSize:], true
		}
	}
	slog.Warn("a damaged entry of the cache is read again from the store", "file", e.path)
	_ = os.Remove(e.path)
	return nil, false
}

// write writes entries until there are no more, and clears up before and in between.
func (p *place) write() {
	p.clear()
	var written int64
	var complained time.Time
	for e := range p.queue {
		if err := save(e); err != nil && time.Since(complained) > time.Minute {
			slog.Warn("the cache of the store cannot be written", "error", err.Error())
			complained = time.Now()
		}
		if written += int64(len(e.data)) + sumSize; written >= p.limit/writtenShare {
			p.clear()
			written = 0
		}
	}
}

func save(e entry) error {
	if err := os.MkdirAll(filepath.Dir(e.path), 0o700); err != nil {
		return err
	}
	s := sum(e.key, e.data)
	temp := e.path + tempMark + rand.Text()
	err := os.WriteFile(temp, append(s[:], e.data...), 0o600)
	if err == nil {
		err = os.Rename(temp, e.path)
	}
	if err != nil {
		_ = os.Remove(temp)
	}
	return err
}

// clear removes what was used longest ago until the cache is small enough.
func (p *place) clear() {
	type file struct {
		path string
		size int64
		used time.Time
	}
	var all []file
	var total int64
	_ = filepath.WalkDir(p.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return nil //nolint:nilerr // gone, or not ours to read: another process clears up too
		}
		info, err := e.Info()
		if err != nil {
			return nil //nolint:nilerr // the same
		}
		if strings.Contains(e.Name(), tempMark) && time.Since(info.ModTime()) > tempAge {
			_ = os.Remove(path)
			return nil
		}
		all = append(all, file{path, info.Size(), info.ModTime()})
		total += info.Size()
		return nil
	})
	goal := p.limit - p.limit/clearedShare
	if total <= goal {
		return
	}
	slices.SortFunc(all, func(a, b file) int { return cmp.Or(a.used.Compare(b.used), cmp.Compare(a.path, b.path)) })
	for _, f := range all {
		if total <= goal {
			return
		}
		if err := os.Remove(f.path); err == nil || errors.Is(err, fs.ErrNotExist) {
			total -= f.size
			_ = os.Remove(filepath.Dir(f.path)) // if it was the last of its blob
		}
	}
}
