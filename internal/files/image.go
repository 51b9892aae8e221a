package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/store"
)

// Opener opens the disks of an image. Nothing is ever written to them.
type Opener interface {
	Open(ctx context.Context, disks []Disk) (Guest, error)
}

// Disk is a disk offered over NBD.
type Disk struct {
	Socket string
	Export string
}

// Guest is an image, open. It is used by one goroutine. What it answers is hostile and has been limited.
type Guest interface {
	// Look finds the file systems and says where their files are to appear.
	Look(ctx context.Context) (mounts []Mount, notes []string, err error)
	// Mount mounts file systems, read-only. Those that cannot be are told in notes.
	Mount(ctx context.Context, mounts []Mount) (notes []string, err error)
	// Walk gives everything in fileset.Compare's order, without attributes. What is of no kind of fileset's is left out.
	Walk(ctx context.Context) (entries []fileset.Entry, notes []string, err error)
	// Attrs fills in the attributes of entries of one folder.
	Attrs(ctx context.Context, entries []*fileset.Entry) error
	// Read writes the content of a file, which was seen to be one, to w.
	Read(ctx context.Context, path string, w io.Writer) error
	// Folder gives everything below a folder at once, a folder before what is in it: many files come far sooner than one by
	// one. What it cannot give is left out. content is that of a file, holes as zeros.
	Folder(ctx context.Context, path string, each func(m Member, content io.Reader) error) error
	Close()
}

// Member is what Folder gives of one name.
type Member struct {
	Path  string
	Again string // not "": the name, given before, of which this is a further one
	File  bool   // content is that of a file
	Size  int64  // of the content
	Attrs []fileset.Attr
}

// idleLimit is how long a guest is kept for the next question.
const idleLimit = 2 * time.Minute

// guest is an image that is open, with what it stands on.
type guest struct {
	Guest
	snapshot string
	closes   []func()
	idle     *time.Timer
}

func (g *guest) close() {
	for _, f := range slices.Backward(g.closes) {
		f()
	}
}

// launch opens the disks of an image for a guest.
func (b *Browser) launch(ctx context.Context, snap dr.Snapshot) (g *guest, err error) {
	g = &guest{snapshot: snap.ID}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	dir, err := os.MkdirTemp(b.Run, "files-")
	if err != nil {
		return nil, fmt.Errorf("make folder for a socket: %w", err)
	}
	g.closes = append(g.closes, func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "nbd")
	l, err := image.Listen(socket, 0o600, -1)
	if err != nil {
		return nil, err
	}
	server := image.NewServer()
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(context.Background(), l) }()
	g.closes = append(g.closes, func() { _ = server.Close(); <-served })
	var disks []Disk
	for n := range snap.Disks {
		img, err := b.Store.Image(ctx, snap.ID, n)
		if err != nil {
			return nil, fmt.Errorf("open disk %d of %s: %w", n, snap.ID, err)
		}
		g.closes = append([]func(){func() { img.Close() }}, g.closes...) // after the server
		name := fmt.Sprintf("disk%d", n)
		if err := server.Add(name, img); err != nil {
			return nil, err
		}
		disks = append(disks, Disk{Socket: socket, Export: name})
	}
	if g.Guest, err = b.Opener.Open(ctx, disks); err != nil {
		return nil, fmt.Errorf("open the image %s: %w", snap.ID, err)
	}
	g.closes = append(g.closes, g.Close)
	return g, nil
}

// withGuest has something done with an image, mounted as an index says. One image is open at a time, and stays open a while.
func (b *Browser) withGuest(ctx context.Context, snap dr.Snapshot, do func(g *guest, fresh bool) error) error {
	select {
	case b.slot <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for another image to be read: %w", ctx.Err())
	}
	defer func() { <-b.slot }()
	g, fresh := b.warm, false
	b.warm = nil
	if g != nil {
		g.idle.Stop()
		if g.snapshot != snap.ID {
			g.close()
			g = nil
		}
	}
	if g == nil {
		var err error
		if g, err = b.launch(ctx, snap); err != nil {
			return err
		}
		fresh = true
	}
	if err := do(g, fresh); err != nil || b.closed {
		g.close()
		return err
	}
	b.warm = g
	g.idle = time.AfterFunc(idleLimit, func() {
		b.slot <- struct{}{}
		defer func() { <-b.slot }()
		if b.warm == g {
			b.warm = nil
			g.close()
		}
	})
	return nil
}

// Close ends what is open. Nothing may be under way.
func (d *desk) Close() error {
	d.slot <- struct{}{}
	defer func() { <-d.slot }()
	d.closed = true
	if d.warm != nil {
		d.warm.idle.Stop()
		d.warm.close()
		d.warm = nil
	}
	return nil
}

// makeIndex looks into an image, and keeps what it saw with the snapshot.
func (b *Browser) makeIndex(ctx context.Context, snap dr.Snapshot) error {
	return b.withGuest(ctx, snap, func(g *guest, fresh bool) error {
		if b.indexed(ctx, snap.ID) { // somebody else was faster
			return nil
		}
		if !fresh {
			return errors.New("the image is open and has no index: try again")
		}
		mounts, notes, err := g.Look(ctx)
		if err != nil {
			return fmt.Errorf("look into %s: %w", snap.ID, err)
		}
		mounts = mounts[:min(len(mounts), maxMounts)]
		more, err := g.Mount(ctx, mounts)
		if err != nil {
			return fmt.Errorf("mount the file systems of %s: %w", snap.ID, err)
		}
		notes = append(notes, more...)
		entries, more, err := g.Walk(ctx)
		if err != nil {
			return fmt.Errorf("list the files of %s: %w", snap.ID, err)
		}
		if notes = append(notes, more...); len(entries) > MaxEntries {
			notes = append(notes, fmt.Sprintf("it has %d files; only the first %d are listed", len(entries), MaxEntries))
			entries = entries[:MaxEntries]
		}
		notes = notes[:min(len(notes), maxNotes)]
		r, w := io.Pipe()
		go func() {
			w.CloseWithError(writeIndex(w, Header{Made: time.Now().UTC(), Mounts: mounts, Notes: notes}, entries))
		}()
		err = b.Store.Keep(ctx, snap.ID, indexName, r)
		r.Close()
		return err
	})
}

// indexed says whether a snapshot can be browsed without being opened.
func (b *Browser) indexed(ctx context.Context, id string) bool {
	kept, err := b.Store.Kept(ctx, id)
	return err == nil && slices.ContainsFunc(kept, func(k store.KeptFile) bool { return k.Name == indexName })
}

// readIndex calls each for everything in an image that has an index.
func (b *Browser) readIndex(ctx context.Context, id string, each func(*fileset.Entry) error) (Header, error) {
	r, w := io.Pipe()
	go func() { w.CloseWithError(b.Store.Fetch(ctx, id, indexName, w)) }()
	h, err := readIndex(r, each)
	r.Close()
	return h, err
}
