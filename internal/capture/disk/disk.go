// Package disk captures a server whose disks are image files or block devices of the appliance's own host.
//
//	Source   the paths, in the server's own order
//
// Nothing is frozen: a disk that somebody writes to is refused, and one that changed while it was read is an error. What is
// kept is what a power cut would have left.
//
// Knows: files, block devices.
// Must not know: SSH, agents, what is on a disk.
package disk

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
)

// ErrChanged is a disk that was written to while it was read.
var ErrChanged = errors.New("the disk changed while it was read")

// Source reads disks by path. It implements capture.Source.
type Source struct {
	paths []string
}

var _ capture.Source = (*Source)(nil)

// Open gives the source of a server's disks. They are opened when they are read.
func Open(paths []string) (*Source, error) {
	if len(paths) == 0 || len(paths) > dr.MaxDisks {
		return nil, fmt.Errorf("open disks: %d of them: give 1 to %d", len(paths), dr.MaxDisks)
	}
	return &Source{paths: paths}, nil
}

// Contact implements capture.Source.
func (s *Source) Contact(context.Context) (api.Contact, error) {
	open, err := openAll(s.paths)
	if err != nil {
		return api.Contact{}, err
	}
	defer open.close()
	return api.Contact{Inventory: open.layout().Inventory}, nil
}

// Capture implements capture.Source.
func (s *Source) Capture(ctx context.Context, sink *capture.Sink, report dr.Progress) error {
	open, err := openAll(s.paths)
	if err != nil {
		return err
	}
	defer open.close()
	layout := open.layout()
	if _, err := sink.Begin(ctx, layout); err != nil {
		return err
	}
	out := capture.Outcome{Inventory: layout.Inventory, Taken: time.Now(), Consistency: dr.CrashConsistent, Provider: dr.ProviderRest}
	for i, d := range open {
		if err := sink.Image(ctx, i, d.File, report); err != nil {
			return err
		}
		out.Read += d.Size()
	}
	// All at the end: the disks are to show one instant together.
	for _, d := range open {
		if err := d.unchanged(); err != nil {
			return err
		}
	}
	return sink.Keep(ctx, out)
}

// Forget implements capture.Source: nothing was left anywhere.
func (s *Source) Forget(context.Context) error { return nil }

// Close implements capture.Source.
func (s *Source) Close() error { return nil }

// disks are the open disks of one capture.
type disks []*disk

// disk is an open disk, with what tells whether it was written to.
type disk struct {
	*image.File
	path   string
	before image.Mark
}

func openAll(paths []string) (disks, error) {
	var out disks
	for _, path := range paths {
		f, err := image.OpenFile(path)
		if err != nil {
			out.close()
			return nil, err
		}
		d := &disk{File: f, path: path}
		out = append(out, d)
		if f.Device() {
			f.Direct() // what the device holds, not what an earlier read of it saw
		}
		if d.before, err = image.LookAt(path); err != nil {
			out.close()
			return nil, err
		}
	}
	return out, nil
}

func (ds disks) close() {
	for _, d := range ds {
		_ = d.Close() // only read
	}
}

// layout names the disks after their files. Two files of one name in two folders are told apart by a number.
func (ds disks) layout() capture.Layout {
	l := capture.Layout{Inventory: dr.Inventory{Taken: time.Now().UTC()}}
	seen := map[string]int{}
	for _, d := range ds {
		name := filepath.Base(d.path)
		if seen[name]++; seen[name] > 1 {
			name = fmt.Sprintf("%s-%d", name, seen[name])
		}
		l.Disks = append(l.Disks, capture.Disk{Name: name, Size: d.Size()})
		l.Inventory.Disks = append(l.Inventory.Disks, dr.InventoryDisk{Name: name, Size: d.Size()})
	}
	return l
}

func (d *disk) unchanged() error {
	now, err := image.LookAt(d.path)
	if err != nil {
		return err
	}
	if now != d.before {
		return fmt.Errorf("read disk %s: %w: stop what writes to it, or capture the running server over SSH instead", d.path, ErrChanged)
	}
	return nil
}
