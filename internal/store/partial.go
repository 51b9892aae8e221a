package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/manifest"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotfs"

	"github.com/musterdr/muster/internal/dr"
)

// A partial is what was written of a full snapshot that is not finished, with what its capture knows of it. There is at
// most one a server. It is no snapshot: nobody lists, reads, verifies or copies it, and nothing is an increment of it. It
// only keeps its blocks from being collected, and the next Writer of that server may start with them.

// PartialLife is how long a partial is kept that nobody goes on with.
const PartialLife = 7 * 24 * time.Hour

// partialReason is Kopia's word for why the snapshot for which it takes a partial is incomplete. It keeps it out of its lists.
const partialReason = "checkpoint"

// Partial is what an earlier attempt had written, as it is offered to the next.
type Partial struct {
	s *Store
	f *found
}

// Disks are the disks as far as they were written; the rest of them is zeros.
func (p *Partial) Disks() []dr.SnapshotDisk { return p.f.doc.Snapshot.Disks }

// Attachment gives a file that was attached. One that was not is ErrNotFound.
func (p *Partial) Attachment(ctx context.Context, name string) ([]byte, error) {
	data, err := p.s.attachment(ctx, p.f, name)
	if err != nil {
		return nil, fmt.Errorf("read attachment %s of a partial: %w", name, err)
	}
	return data, nil
}

// errNoPartial is that there is nothing to go on with.
var errNoPartial = errors.New("there is no partial")

// GoOn lets the disks of a full snapshot start with what an earlier attempt to capture that server had written, if
// there is any that is younger than PartialLife, whole, and of use: fits says nil to it. Otherwise it is removed, and disks
// start with zeros. It comes before the first Disk.
func (w *Writer) GoOn(ctx context.Context, serverID string, fits func(*Partial) error) (resumed bool, err error) {
	if err := w.usable(ctx); err != nil {
		return false, fmt.Errorf("go on with a snapshot: %w", err)
	}
	if w.parentID != "" || len(w.disks) > 0 || w.files != nil {
		return false, errors.New("go on with a snapshot: only a full one of disks can, before the first of them")
	}
	ctx, done := w.s.bind(ctx)
	defer done()
	f, err := w.s.partial(ctx, serverID)
	if err == nil {
		err = fits(&Partial{s: w.s, f: f})
	}
	if stopped := ctx.Err(); stopped != nil {
		return false, fmt.Errorf("go on with a snapshot: %w", context.Cause(ctx))
	}
	switch {
	case err == nil:
		w.parent, w.resumed = f, true
		return true, nil
	case errors.Is(err, errNoPartial):
		return false, nil
	}
	slog.InfoContext(ctx, "what an earlier attempt wrote is of no use", "snapshot", w.id, "server_id", serverID, "reason", err.Error())
	return false, w.s.DropPartial(ctx, serverID)
}

// KeepPartial keeps what was written so far as the partial of a server, in place of an earlier one, with files attached to
// it. When it returns without an error this outlives the process. Nothing may be written meanwhile; more may be after it.
func (w *Writer) KeepPartial(ctx context.Context, serverID, server string, attach map[string][]byte) error {
	err := w.usable(ctx)
	if err == nil && (w.parentID != "" || w.files != nil) {
		err = errors.New("only a full snapshot of disks has one")
	}
	if err == nil {
		err = w.keepPartial(ctx, serverID, server, attach)
	}
	if err != nil {
		return fmt.Errorf("keep what was written so far of %s: %w", w.id, w.s.explain(err))
	}
	return nil
}

func (w *Writer) keepPartial(ctx context.Context, serverID, server string, attach map[string][]byte) error {
	doc := document{Format: partialFormat, Snapshot: dr.Snapshot{ID: w.id, ServerID: serverID, Server: server, Taken: w.s.now().UTC()}}
	if err := dr.ValidateID(serverID); err != nil {
		return err
	}
	c, err := w.seal(ctx, &doc, attach)
	if err != nil {
		return err
	}
	data, err := encodeDocument(doc)
	if err != nil {
		return err
	}
	return w.s.mutate(ctx, "partial", func(ctx context.Context, rw repo.DirectRepositoryWriter) error {
		if err := dropPartials(ctx, rw, serverID); err != nil {
			return err
		}
		m, err := w.describe(ctx, rw, doc, partialFile, data, c)
		if err != nil {
			return err
		}
		m.Description, m.IncompleteReason = "muster, not finished: "+describe(w.id, server), partialReason
		m.Tags = map[string]string{tagKind: kindPartial, tagServer: serverID}
		_, err = snapshot.SaveSnapshot(ctx, rw, m)
		return err
	})
}

// DropPartial removes what is kept of an unfinished snapshot of a server. Where there is nothing it does nothing.
func (s *Store) DropPartial(ctx context.Context, serverID string) error {
	err := dr.ValidateID(serverID)
	if err == nil {
		err = s.mutate(withReserve(ctx), "drop partial", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			return dropPartials(ctx, w, serverID)
		})
	}
	if err != nil {
		return fmt.Errorf("drop the partial of %s: %w", serverID, err)
	}
	return nil
}

func dropPartials(ctx context.Context, w repo.RepositoryWriter, serverID string) error {
	entries, err := findPartials(ctx, w, serverID)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := w.DeleteManifest(ctx, e.ID); err != nil {
			return err
		}
	}
	return nil
}

// findPartials gives Kopia's manifests of a server's partial, or of all with serverID "".
func findPartials(ctx context.Context, rep repo.Repository, serverID string) ([]*manifest.EntryMetadata, error) {
	labels := map[string]string{manifestTypeKey: snapshot.ManifestType, tagKind: kindPartial}
	if serverID != "" {
		labels[tagServer] = serverID
	}
	entries, err := rep.FindManifests(ctx, labels)
	if err != nil {
		return nil, damaged(err)
	}
	return entries, nil
}

// partial gives the partial of a server, which is whole and young enough.
func (s *Store) partial(ctx context.Context, serverID string) (*found, error) {
	entries, err := findPartials(ctx, s.rep, serverID)
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		return nil, errNoPartial
	}
	f, err := s.loadPartial(ctx, entries[len(entries)-1]) // in the order of time
	if err == nil && f.doc.Snapshot.ServerID != serverID {
		err = fmt.Errorf("%w: the partial of %s says that it is of %s", ErrDamaged, serverID, f.doc.Snapshot.ServerID)
	}
	return f, err
}

// loadPartial reads a partial and requires that everything it names is there.
func (s *Store) loadPartial(ctx context.Context, e *manifest.EntryMetadata) (*found, error) {
	if age := s.now().Sub(e.ModTime); age > PartialLife {
		return nil, fmt.Errorf("it is %s old, and is kept for %s", age.Round(time.Hour), PartialLife)
	}
	f, err := s.load(ctx, e.ID, partialFile, partialFormat)
	if err != nil {
		return nil, err
	}
	if f.doc.Snapshot.Parent != "" || f.doc.Snapshot.IsData() {
		return nil, fmt.Errorf("%w: a partial is of a full snapshot of disks", ErrDamaged)
	}
	// As a collection walks: what this does not find would stop that one.
	w, err := snapshotfs.NewTreeWalker(ctx, snapshotfs.TreeWalkerOptions{
		EntryCallback: func(ctx context.Context, _ fs.Entry, id object.ID, _ string) error {
			_, err := s.rep.VerifyObject(ctx, id)
			return err
		},
	})
	if err != nil {
		return nil, err
	}
	defer w.Close(ctx)
	if err := w.Process(ctx, f.root, ""); err != nil {
		return nil, damaged(err)
	}
	return f, nil
}

// sortPartials removes the partials that are too old or damaged, so that a collection frees what only they name.
func (s *Store) sortPartials(ctx context.Context) error {
	if err := s.rep.Refresh(ctx); err != nil {
		return err
	}
	entries, err := findPartials(ctx, s.rep, "")
	if err != nil {
		return err
	}
	for _, e := range entries {
		_, err := s.loadPartial(ctx, e)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err == nil {
			continue
		}
		slog.InfoContext(ctx, "what was written of an unfinished snapshot is let go", "server_id", e.Labels[tagServer], "reason", err.Error())
		err = s.mutate(ctx, "drop partial", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			return w.DeleteManifest(ctx, e.ID)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
