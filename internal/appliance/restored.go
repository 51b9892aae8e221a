package appliance

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/files"
)

// tellLimit bounds how long somebody who put files back waits for a master to hear of it.
const tellLimit = 10 * time.Second

// begun writes down that files are about to be put back. That this is not written down is no reason to put nothing back.
func (a *Appliance) begun(ctx context.Context, r api.RestoreRequest, p placing, snap dr.Snapshot, to dr.Server) dr.FileRestore {
	rec := dr.FileRestore{ID: dr.NewID("restore"), By: r.By, Began: time.Now().UTC(), Snapshot: snap.ID, Server: snap.Server, ToServer: to.Name, ToID: to.ID,
		Path: files.Text(p.paths[0]), Paths: len(p.paths), Overwrite: r.Overwrite}
	if p.to != "" {
		rec.ToPath = files.Text(p.to)
	}
	a.mu.Lock()
	if a.restoring == nil {
		a.restoring = map[string]bool{}
	}
	a.restoring[rec.ID] = true
	a.mu.Unlock()
	a.note(ctx, rec)
	return rec
}

// ended writes down what became of it, and tells whoever is there.
func (a *Appliance) ended(ctx context.Context, rec dr.FileRestore, out api.Restored, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tellLimit)
	defer cancel()
	rec.Ended = time.Now().UTC()
	rec.Restored, rec.Replaced, rec.Beside, rec.Failed, rec.Bytes, rec.Error = out.Restored, out.Replaced, out.Beside, out.Failed, out.Bytes, out.Error
	if err != nil {
		rec.Error = err.Error()
	}
	a.note(ctx, rec)
	a.mu.Lock()
	delete(a.restoring, rec.ID)
	a.mu.Unlock()
	slog.InfoContext(ctx, "files were put back", "restore", rec.ID, "by", rec.By, "snapshot", rec.Snapshot, "server", rec.ToServer, "restored", rec.Restored,
		"replaced", rec.Replaced, "beside", rec.Beside, "failed", rec.Failed, "error", rec.Error)
	if err := a.TellRestores(ctx); err != nil {
		slog.WarnContext(ctx, "no master knows yet that files were put back: it is told later", "restore", rec.ID, "error", err)
	}
}

func (a *Appliance) note(ctx context.Context, rec dr.FileRestore) {
	if err := a.Store.PutRecord(ctx, dr.FileRestoreRecord, rec.ID, rec); err != nil {
		slog.ErrorContext(ctx, "write down that files are put back", "restore", rec.ID, "by", rec.By, "snapshot", rec.Snapshot, "server", rec.ToServer, "error", err)
	}
}

// TellRestores tells a master of what was put back and it has not heard of: also by a process that ended in the middle of
// it, and while there was no master. It is called when one is there; without one it does nothing.
func (a *Appliance) TellRestores(ctx context.Context) error {
	if a.Journal == nil {
		return nil
	}
	var untold []dr.FileRestore
	err := a.Store.Records(ctx, dr.FileRestoreRecord, func(_ string, raw json.RawMessage) error {
		var rec dr.FileRestore
		if err := json.Unmarshal(raw, &rec); err != nil {
			return err
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if !a.restoring[rec.ID] {
			untold = append(untold, rec)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("tell of files that were put back: %w", err)
	}
	for _, rec := range untold {
		if err := a.Journal.FilesRestored(ctx, rec); err != nil {
			return fmt.Errorf("tell of files that were put back: %w", err)
		}
		if err := a.Store.DeleteRecord(ctx, dr.FileRestoreRecord, rec.ID); err != nil {
			return fmt.Errorf("forget that a master was told of %s: %w", rec.ID, err)
		}
	}
	return nil
}
