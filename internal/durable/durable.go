// Package durable writes small files that are there in full or not at all, also after a power cut.
//
// Knows: files, folders, syncing.
// Must not know: what is in them.
package durable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// WriteFile writes a file and its name to the medium. Until it returns nil the file is what it was before, or not there.
// Two writers of one path must take turns. On an error nothing is left but, after a power cut, a file PATH.new.
func WriteFile(path string, content []byte, mode os.FileMode) error {
	if err := replace(path, content, mode); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func replace(path string, content []byte, mode os.FileMode) error {
	part := path + ".new"
	f, err := os.OpenFile(part, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(part))
	}
	if err := os.Rename(part, path); err != nil {
		return errors.Join(err, os.Remove(part))
	}
	return Sync(filepath.Dir(path))
}

// Sync writes the content of a file, or the names in a folder, to the medium.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
