package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/manifest"

	"github.com/musterdr/muster/internal/dr"
)

// Records are Kopia manifests of a type of their own.
const (
	recordType = "muster-record"
	labelKind  = "kind"
	labelID    = "id"

	kindLKG  = "lkg"  // by server: which snapshot is last-known-good
	kindHold = "hold" // by snapshot and owner: who holds it
)

var (
	kindRE = regexp.MustCompile(`^[a-z][a-z0-9-]{0,39}$`)
	idRE   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,199}$`)
)

func validateRecord(kind, id string) error {
	if !kindRE.MatchString(kind) {
		return fmt.Errorf("kind %.80q: use 1 to 40 of a-z, 0-9 and -", kind)
	}
	if !idRE.MatchString(id) {
		return fmt.Errorf("identifier %.220q: use 1 to 200 of letters, digits and . _ : @ / + -", id)
	}
	return nil
}

func recordLabels(kind, id string) map[string]string {
	l := map[string]string{manifestTypeKey: recordType, labelKind: kind}
	if id != "" {
		l[labelID] = id
	}
	return l
}

// PutRecord keeps a value as JSON under a kind and an identifier, in place of what was there. It is on the medium when
// PutRecord returns. Records are for what must survive the catalog.
func (s *Store) PutRecord(ctx context.Context, kind, id string, v any) error {
	if err := validateRecord(kind, id); err != nil {
		return fmt.Errorf("put record: %w", err)
	}
	if kind == kindLKG || kind == kindHold {
		return fmt.Errorf("put record %s %s: the kind is the store's own", kind, id)
	}
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("put record %s %s: %w", kind, id, err)
	}
	err = s.mutate(ctx, "record", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		return replaceRecord(ctx, w, kind, id, data)
	})
	if err != nil {
		return fmt.Errorf("put record %s %s: %w", kind, id, err)
	}
	return nil
}

// replaceRecord puts a record, or removes it if data is nil, together with any older one.
func replaceRecord(ctx context.Context, w repo.RepositoryWriter, kind, id string, data json.RawMessage) error {
	if len(data) > MaxRecord {
		return fmt.Errorf("it has %d bytes; the most is %d", len(data), MaxRecord)
	}
	old, err := w.FindManifests(ctx, recordLabels(kind, id))
	if err != nil {
		return damaged(err)
	}
	for _, e := range old {
		if err := w.DeleteManifest(ctx, e.ID); err != nil {
			return err
		}
	}
	if data == nil {
		return nil
	}
	_, err = w.PutManifest(ctx, recordLabels(kind, id), data)
	return err
}

// DeleteRecord removes a record. One that is not there is no error.
func (s *Store) DeleteRecord(ctx context.Context, kind, id string) error {
	if err := validateRecord(kind, id); err != nil {
		return fmt.Errorf("delete record: %w", err)
	}
	if kind == kindLKG || kind == kindHold {
		return fmt.Errorf("delete record %s %s: the kind is the store's own", kind, id)
	}
	err := s.mutate(ctx, "record", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		return replaceRecord(ctx, w, kind, id, nil)
	})
	if err != nil {
		return fmt.Errorf("delete record %s %s: %w", kind, id, err)
	}
	return nil
}

// Records calls each for every record of a kind, in the order in which they were put, until it returns an error.
func (s *Store) Records(ctx context.Context, kind string, each func(id string, raw json.RawMessage) error) error {
	ctx, done := s.bind(ctx)
	defer done()
	if err := records(ctx, s.rep, kind, each); err != nil {
		return s.explain(fmt.Errorf("list records %s: %w", kind, err))
	}
	return nil
}

func records(ctx context.Context, rep repo.Repository, kind string, each func(id string, raw json.RawMessage) error) error {
	entries, err := rep.FindManifests(ctx, recordLabels(kind, ""))
	if err != nil {
		return damaged(err)
	}
	newest := make(map[string]manifest.ID, len(entries))
	for _, e := range entries { // in the order of time
		newest[e.Labels[labelID]] = e.ID
	}
	for _, e := range entries {
		id := e.Labels[labelID]
		if newest[id] != e.ID || validateRecord(kind, id) != nil || e.Length > MaxRecord {
			continue
		}
		var raw json.RawMessage
		if _, err := rep.GetManifest(ctx, e.ID, &raw); errors.Is(err, manifest.ErrNotFound) {
			continue // deleted just now
		} else if err != nil {
			return damaged(err)
		}
		if err := each(id, raw); err != nil {
			return err
		}
	}
	return nil
}

// pointer is the value of an LKG record.
type pointer struct {
	Snapshot string `json:"snapshot_id"`
}

// SetLKG notes which snapshot of a server is last-known-good; it cannot be forgotten from now on, and the one before
// can. An empty snapshot removes the note. A snapshot that is not kept is ErrNotFound.
func (s *Store) SetLKG(ctx context.Context, serverID, snapshotID string) error {
	err := validateRecord(kindLKG, serverID)
	if err == nil && snapshotID != "" {
		err = dr.ValidateID(snapshotID)
	}
	if err != nil {
		return fmt.Errorf("set last-known-good: %w", err)
	}
	err = s.mutate(ctx, "lkg", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		if snapshotID == "" {
			return replaceRecord(ctx, w, kindLKG, serverID, nil)
		}
		if there, err := exists(ctx, w, snapshotID); err != nil {
			return damaged(err)
		} else if !there {
			return fmt.Errorf("snapshot %s is %w", snapshotID, ErrNotFound)
		}
		data, err := json.Marshal(pointer{Snapshot: snapshotID})
		if err != nil {
			return err
		}
		return replaceRecord(ctx, w, kindLKG, serverID, data)
	})
	if err != nil {
		return fmt.Errorf("set last-known-good of %s: %w", serverID, err)
	}
	return nil
}

// LKG gives the last-known-good snapshot of every server that has one, by the server's identifier.
func (s *Store) LKG(ctx context.Context) (map[string]string, error) {
	ctx, done := s.bind(ctx)
	defer done()
	m, err := lkg(ctx, s.rep)
	if err != nil {
		return nil, s.explain(fmt.Errorf("list last-known-good: %w", err))
	}
	return m, nil
}

func lkg(ctx context.Context, rep repo.Repository) (map[string]string, error) {
	out := map[string]string{}
	err := records(ctx, rep, kindLKG, func(id string, raw json.RawMessage) error {
		var p pointer
		if err := json.Unmarshal(raw, &p); err != nil || dr.ValidateID(p.Snapshot) != nil {
			return fmt.Errorf("%w: the record of %s does not name a snapshot", ErrDamaged, id)
		}
		out[id] = p.Snapshot
		return nil
	})
	return out, err
}

// Hold keeps a snapshot from being forgotten until Unhold, whatever becomes of this process: a machine that runs on it
// outlives us. The owner says who holds it, so that what a crash left can be found and let go; held again by the same
// owner it is held once.
func (s *Store) Hold(ctx context.Context, snapshotID, owner string) error {
	id := snapshotID + "/" + owner
	err := errors.Join(dr.ValidateID(snapshotID), validateRecord(kindHold, id))
	if err == nil {
		err = s.mutate(ctx, "hold", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			if there, err := exists(ctx, w, snapshotID); err != nil {
				return damaged(err)
			} else if !there {
				return ErrNotFound
			}
			return replaceRecord(ctx, w, kindHold, id, json.RawMessage(`{}`))
		})
	}
	if err != nil {
		return fmt.Errorf("hold snapshot %s for %s: %w", snapshotID, owner, err)
	}
	return nil
}

// Unhold lets go of what Hold took. One that is not held is no error.
func (s *Store) Unhold(ctx context.Context, snapshotID, owner string) error {
	id := snapshotID + "/" + owner
	err := validateRecord(kindHold, id)
	if err == nil {
		err = s.mutate(withReserve(ctx), "hold", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
			return replaceRecord(ctx, w, kindHold, id, nil)
		})
	}
	if err != nil {
		return fmt.Errorf("let go of snapshot %s for %s: %w", snapshotID, owner, err)
	}
	return nil
}

// Holds lists the owners of every snapshot that is held.
func (s *Store) Holds(ctx context.Context) (map[string][]string, error) {
	ctx, done := s.bind(ctx)
	defer done()
	m, err := holds(ctx, s.rep)
	if err != nil {
		return nil, s.explain(fmt.Errorf("list holds: %w", err))
	}
	return m, nil
}

func holds(ctx context.Context, rep repo.Repository) (map[string][]string, error) {
	out := map[string][]string{}
	err := records(ctx, rep, kindHold, func(id string, _ json.RawMessage) error {
		if snapshot, owner, ok := strings.Cut(id, "/"); ok {
			out[snapshot] = append(out[snapshot], owner)
		}
		return nil
	})
	return out, err
}

// Pin keeps a snapshot from being forgotten by anybody until release is called or this process ends. An open Image
// pins its snapshot by itself. To keep it for longer than the process lives, use Hold.
func (s *Store) Pin(snapshotID string) (release func()) {
	unlock, err := s.lock(s.life, lockPin+snapshotID, false)
	if err != nil { // the store is closed or its lock file is gone: nothing can be forgotten through it either
		return func() {}
	}
	return unlock
}
