// Package backup puts what a machine cannot do without into one sealed file, and takes it out again: the recovery platform
// recovers itself.
//
//	Contents  a folder, of which everything is taken but what is named, and copies of databases made for the occasion
//	file      age over tar: a manifest first, then each file of it
//
// Everything of the folder is taken unless it is left out by name: a key that a later release puts there is not forgotten.
// A file is written beside its place, read back and compared before it takes it.
//
// Knows: tar, age, folders.
// Must not know: what the files are for.
package backup

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/musterdr/muster/internal/durable"
)

// Limits.
const (
	MaxFile     = 64 << 20 // bytes of a file of the folder: a master's files are small
	maxManifest = 16 << 20
	maxFiles    = 10_000
)

const manifestName = "manifest.json"

// Manifest says what is in a backup.
type Manifest struct {
	Format  int       `json:"format"` // 1
	Made    time.Time `json:"made"`
	Release string    `json:"release"`
	Kind    string    `json:"kind"` // what the databases are copies of, for whoever puts them back
	Files   []File    `json:"files"`
}

// File is one file of a backup, by its path below the folder.
type File struct {
	Name   string      `json:"name"`
	Mode   fs.FileMode `json:"mode"`
	Size   int64       `json:"size"`
	SHA256 string      `json:"sha256"`
}

// Contents is what is to be kept.
type Contents struct {
	Dir     string
	Skip    func(name string) bool // of files and folders below Dir that are left out
	Copies  []Copy                 // made one after the other
	Release string
	Kind    string
}

// Copy makes a copy of something that is in use, at a path that is not there yet.
type Copy struct {
	Name string // in the backup
	Make func(ctx context.Context, path string) error
}

// Write writes a backup, sealed to recipients, and reads it back. With an identity that opens it, its contents are
// compared; without one, that the file is what was written. The file is there in full or not at all, and must not be there
// before.
func Write(ctx context.Context, file string, c Contents, recipients []age.Recipient, identities []age.Identity) (Manifest, error) {
	m, err := write(ctx, file, c, recipients, identities)
	if err != nil {
		return m, fmt.Errorf("back up %s: %w", c.Dir, err)
	}
	return m, nil
}

func write(ctx context.Context, file string, c Contents, recipients []age.Recipient, identities []age.Identity) (m Manifest, err error) {
	if _, err := os.Lstat(file); !errors.Is(err, os.ErrNotExist) {
		return m, fmt.Errorf("%s is there already", file)
	}
	work, err := os.MkdirTemp(c.Dir, ".backup-") // on the disk of the folder, the owner's alone
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	m = Manifest{Format: 1, Made: time.Now().UTC(), Release: c.Release, Kind: c.Kind}
	paths, err := gather(ctx, c, work, &m)
	if err != nil {
		return m, err
	}
	part := file + ".new"
	sum, err := seal(part, m, paths, recipients)
	if err == nil {
		err = verify(part, m, sum, identities)
	}
	if err == nil {
		err = os.Rename(part, file)
	}
	if err == nil {
		err = durable.Sync(filepath.Dir(file))
	}
	if err != nil {
		return m, errors.Join(err, os.RemoveAll(part))
	}
	return m, nil
}

// gather finds what belongs into the backup, makes the copies, and lists both in the manifest. It gives where each file is.
func gather(ctx context.Context, c Contents, work string, m *Manifest) (paths []string, err error) {
	add := func(path, name string) error {
		f, err := describe(path, name)
		if err == nil {
			m.Files, paths = append(m.Files, f), append(paths, path)
		}
		if err == nil && len(paths) > maxFiles {
			err = fmt.Errorf("more than %d files: something else is in the folder", maxFiles)
		}
		return err
	}
	for i, copy := range c.Copies {
		path := filepath.Join(work, fmt.Sprint(i))
		if err := copy.Make(ctx, path); err != nil {
			return nil, err
		}
		if err := add(path, copy.Name); err != nil {
			return nil, err
		}
	}
	err = filepath.WalkDir(c.Dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(c.Dir, path)
		switch {
		case err != nil || name == ".":
			return err
		case strings.HasPrefix(name, ".backup-") || c.Skip(name):
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		case entry.IsDir() || !entry.Type().IsRegular():
			return nil
		}
		info, err := entry.Info()
		if err == nil && info.Size() > MaxFile {
			err = fmt.Errorf("%s has %d bytes: files of a master have at most %d; put it elsewhere", path, info.Size(), MaxFile)
		}
		if err != nil {
			return err
		}
		return add(path, name)
	})
	return paths, err
}

func describe(path, name string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return File{}, err
	}
	h := sha256.New()
	n, err := io.Copy(h, f)
	return File{Name: name, Mode: info.Mode().Perm(), Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}, err
}

// seal writes the file and gives the fingerprint of what was written.
func seal(path string, m Manifest, paths []string, recipients []age.Recipient) (sum string, err error) {
	out, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	h := sha256.New()
	sealed, err := age.Encrypt(io.MultiWriter(out, h), recipients...)
	if err != nil {
		return "", fmt.Errorf("seal: %w", err)
	}
	list, err := json.Marshal(m)
	if err != nil {
		return "", err
	}
	tw := tar.NewWriter(sealed)
	if err := entry(tw, manifestName, 0o600, int64(len(list)), strings.NewReader(string(list))); err != nil {
		return "", err
	}
	for i, f := range m.Files {
		if err := entryOf(tw, f, paths[i]); err != nil {
			return "", err
		}
	}
	if err := errors.Join(tw.Close(), sealed.Close(), out.Sync()); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func entryOf(tw *tar.Writer, f File, path string) error {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	return entry(tw, f.Name, f.Mode, f.Size, in)
}

func entry(tw *tar.Writer, name string, mode fs.FileMode, size int64, content io.Reader) error {
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: int64(mode), Size: size, Format: tar.FormatPAX}); err != nil {
		return err
	}
	if _, err := io.Copy(tw, content); err != nil {
		return fmt.Errorf("%s changed while it was read: %w", name, err)
	}
	return nil
}

// verify reads back what was written.
func verify(path string, m Manifest, sum string, identities []age.Identity) error {
	if len(identities) == 0 {
		f, err := describe(path, "")
		if err == nil && f.SHA256 != sum {
			err = errors.New("what was written is not what is read back: the medium is bad")
		}
		return err
	}
	read, err := open(path, identities, func(File, io.Reader) error { return nil })
	if err == nil && !slices.Equal(read.Files, m.Files) {
		err = errors.New("what was written is not what is read back: the medium is bad")
	}
	if err != nil {
		return fmt.Errorf("read the backup back: %w", err)
	}
	return nil
}

// open reads a backup to its end and gives each file to take, whose content is compared with the manifest.
func open(path string, identities []age.Identity, take func(f File, content io.Reader) error) (m Manifest, err error) {
	in, err := os.Open(path)
	if err != nil {
		return m, err
	}
	defer in.Close()
	plain, err := age.Decrypt(in, identities...)
	if err != nil {
		return m, fmt.Errorf("open the seal: %w", err)
	}
	tr := tar.NewReader(plain)
	head, err := tr.Next()
	if err != nil || head.Name != manifestName {
		return m, errors.Join(errors.New("it is no backup of a master"), err)
	}
	if err := json.NewDecoder(io.LimitReader(tr, maxManifest)).Decode(&m); err != nil {
		return m, fmt.Errorf("read its manifest: %w", err)
	}
	if m.Format != 1 {
		return m, fmt.Errorf("it has format %d: this release reads format 1", m.Format)
	}
	for _, f := range m.Files {
		head, err := tr.Next()
		if err != nil {
			return m, fmt.Errorf("%s is missing: %w", f.Name, err)
		}
		if head.Name != f.Name || !filepath.IsLocal(f.Name) {
			return m, fmt.Errorf("%s is where %s should be", head.Name, f.Name)
		}
		h := sha256.New()
		content := io.TeeReader(tr, h)
		if err := take(f, content); err != nil {
			return m, err
		}
		if _, err := io.Copy(io.Discard, content); err != nil {
			return m, fmt.Errorf("read %s: %w", f.Name, err)
		}
		if hex.EncodeToString(h.Sum(nil)) != f.SHA256 {
			return m, fmt.Errorf("%s is damaged", f.Name)
		}
	}
	_, err = io.Copy(io.Discard, plain) // to the end, which is sealed too
	return m, err
}

// Unpack takes a backup out into a folder that is not there yet: all of it, or nothing.
func Unpack(file, dir string, identities []age.Identity) (m Manifest, err error) {
	if err := os.Mkdir(dir, 0o711); err != nil {
		return m, fmt.Errorf("put backup back: %w", err)
	}
	m, err = open(file, identities, func(f File, content io.Reader) error {
		path := filepath.Join(dir, f.Name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, f.Mode)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, content)
		return errors.Join(err, out.Sync(), out.Close())
	})
	if err != nil {
		return m, errors.Join(fmt.Errorf("put backup %s back: %w", file, err), os.RemoveAll(dir))
	}
	return m, nil
}
