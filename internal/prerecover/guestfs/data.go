package guestfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/guestfish"
	"github.com/musterdr/muster/internal/prerecover"
)

// unpackLimit is how long unpacking may take.
const unpackLimit = 12 * time.Hour

// Walk implements prerecover.Guest.
func (g *guest) Walk(ctx context.Context, folder string) ([]fileset.Entry, error) {
	ctx, cancel := g.bound(ctx)
	defer cancel()
	out, err := g.fish.Walk(ctx, folder, filepath.Join(g.work, "walk"), prerecover.MaxWalk)
	if errors.Is(err, guestfish.ErrTooLarge) {
		err = fmt.Errorf("%w (%w)", prerecover.ErrTooLarge, err)
	}
	return out, err
}

// RemoveAll implements prerecover.Guest.
func (g *guest) RemoveAll(ctx context.Context, path string) error {
	if !strings.HasPrefix(path, "/") || path == "/" || len(path) > fileset.MaxPath {
		return fmt.Errorf("remove %.80q: use an absolute path", path)
	}
	_, err := g.do(ctx, "rm-rf", path)
	return err
}

// Unpack implements prerecover.Guest. The stream reaches guestfish through a named pipe, so that it lies nowhere.
func (g *guest) Unpack(ctx context.Context, tar io.Reader) error {
	began := time.Now()
	defer func() { g.deadline = g.deadline.Add(time.Since(began)) }()
	ctx, cancel := context.WithTimeout(ctx, unpackLimit)
	defer cancel()
	pipe := filepath.Join(g.work, "tar")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	defer os.Remove(pipe)
	fed := make(chan error, 1)
	go func() { fed <- feed(pipe, tar) }()
	// Labels and access lists are attributes in the stream. Asked for access lists, tar would take them from elsewhere, find
	// none, and remove those that it has just set.
	_, err := g.fish.Do(ctx, "tar-in", pipe, "/", "xattrs:true")
	// If guestfish never opened the pipe, or stopped reading it, whoever feeds it must not wait for ever.
	if f, oerr := os.OpenFile(pipe, os.O_RDONLY|syscall.O_NONBLOCK, 0); oerr == nil {
		f.Close()
	}
	ferr := <-fed
	switch {
	case err != nil && ferr != nil && !errors.Is(ferr, syscall.EPIPE):
		return fmt.Errorf("unpack: %w", errors.Join(ferr, err)) // what it was fed was cut off
	case err != nil:
		return fmt.Errorf("unpack: %w", err)
	case ferr != nil:
		return fmt.Errorf("unpack: %w", ferr)
	}
	return nil
}

// feed writes a stream into a named pipe.
func feed(pipe string, from io.Reader) error {
	f, err := os.OpenFile(pipe, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	return errors.Join(err, f.Close())
}
