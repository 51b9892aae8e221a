package catalog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/musterdr/muster/internal/dr"
)

// Adopted is what Adopt added, and what it could not.
type Adopted struct {
	Servers       int      `json:"servers"`
	Snapshots     int      `json:"snapshots"`
	PreRecoveries int      `json:"pre_recoveries"`
	Verdicts      int      `json:"verdicts"`
	Rulings       int      `json:"rulings"`
	LKG           int      `json:"lkg"` // servers that have one now and had none
	Left          []string `json:"left,omitempty"`
}

// Adopt rebuilds a lost catalog, or completes one, from what a store holds. What is recorded already stays as it is;
// adopting again adds nothing. States, last-known-good and its history follow from the verdicts, by the same rules as
// ever, but no tickets are opened for what was judged long ago, only for what is held still. lkg, by server, is what the store says; where the
// verdicts prove another or none, theirs is taken and Left says so. So does it of every record that does not fit.
func (c *Catalog) Adopt(ctx context.Context, servers []dr.Server, snapshots []dr.Snapshot, pres []dr.PreRecovery,
	verdicts []dr.Verdict, rulings []dr.Ruling, lkg map[string]string) (Adopted, error) {
	var done Adopted
	err := c.write(ctx, "adopt", func(t *tx) error {
		done = Adopted{}
		a := adoption{tx: t, done: &done}
		return a.all(servers, snapshots, pres, verdicts, rulings, lkg)
	})
	return done, err
}

type adoption struct {
	*tx
	done *Adopted
}

func (a adoption) left(format string, args ...any) {
	if len(a.done.Left) < MaxList {
		a.done.Left = append(a.done.Left, fmt.Sprintf(format, args...))
	}
}

func (a adoption) all(servers []dr.Server, snapshots []dr.Snapshot, pres []dr.PreRecovery, verdicts []dr.Verdict, rulings []dr.Ruling, lkg map[string]string) error {
	if err := a.servers(servers); err != nil {
		return err
	}
	had, err := a.lkgs()
	if err != nil {
		return err
	}
	snapshots, verdicts = slices.Clone(snapshots), slices.Clone(verdicts)
	slices.SortFunc(snapshots, func(x, y dr.Snapshot) int {
		return cmp.Or(x.Taken.Compare(y.Taken), cmp.Compare(x.ID, y.ID))
	})
	slices.SortFunc(verdicts, func(x, y dr.Verdict) int {
		return cmp.Or(x.Started.Compare(y.Started), cmp.Compare(x.ID, y.ID))
	})
	for _, s := range snapshots {
		if err := a.try(func() (bool, error) { return a.recordSnapshot(s) }, &a.done.Snapshots, "snapshot "+s.ID); err != nil {
			return err
		}
	}
	if err := a.rulings(rulings); err != nil {
		return err
	}
	for id := range had {
		if _, _, err := a.rehold(id); err != nil {
			return err
		}
	}
	if err := a.proofs(pres, verdicts); err != nil {
		return err
	}
	if err := a.tickets(); err != nil {
		return err
	}
	has, err := a.lkgs()
	if err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(has)) {
		if had[id] == "" && has[id] != "" {
			a.done.LKG++
		}
		if want := lkg[id]; want != "" && want != has[id] {
			a.left("last-known-good of server %s: the store says %s, its verdicts prove %q", id, want, has[id])
		}
	}
	return nil
}

// try carries out one part. What does not fit is left, and what was written of it is taken back; a broken database ends all.
func (a adoption) try(part func() (bool, error), count *int, what string) error {
	seq := a.seq
	if err := a.do("SAVEPOINT part"); err != nil {
		return err
	}
	added, err := part()
	if err != nil {
		a.seq = seq
		a.left("%s: %s", what, err)
		if err := a.do("ROLLBACK TO SAVEPOINT part"); err != nil {
			return err
		}
	} else if added {
		*count++
	}
	return a.do("RELEASE SAVEPOINT part")
}

// servers adds those whose id the catalog does not know. One it knows, even removed, it knows better.
func (a adoption) servers(servers []dr.Server) error {
	for _, s := range servers {
		known, err := a.NewSelect().Model((*serverRow)(nil)).Where("id = ?", s.ID).Count(a.ctx)
		if err != nil {
			return err
		}
		if known > 0 {
			continue
		}
		if err := a.try(func() (bool, error) { return a.addServer(s) }, &a.done.Servers, "server "+s.Name); err != nil {
			return err
		}
	}
	return nil
}

// rulings records what people said. One that is known stays, and one on a snapshot that is gone is of no use.
func (a adoption) rulings(rulings []dr.Ruling) error {
	for _, r := range rulings {
		row, err := one[snapshotRow](a.ctx, a, "snapshot", r.SnapshotID)
		if errors.Is(err, ErrNotFound) || err == nil && row.Ruling != "" {
			continue
		}
		if err != nil {
			return err
		}
		state := row.State
		if !r.Accept && dr.Follow(state, dr.Rejected) == nil {
			state = dr.Rejected
		}
		if err := a.noteRuling(row.ID, r, state); err != nil {
			return err
		}
		a.done.Rulings++
	}
	return nil
}

// tickets opens one for each server of which the newest snapshot is held, if there is none.
func (a adoption) tickets() error {
	var rows []serverRow
	if err := a.NewSelect().Model(&rows).Where("removed = 0").Order("id").Scan(a.ctx); err != nil {
		return err
	}
	for _, server := range rows {
		var newest []snapshotRow
		err := a.NewSelect().Model(&newest).Where("server_id = ? AND state <> ?", server.ID, dr.Expired).Order("seq DESC").Limit(1).Scan(a.ctx)
		if err != nil {
			return err
		}
		if len(newest) == 0 || newest[0].HeldBy == "" {
			continue
		}
		s, err := parse[dr.Snapshot](newest[0].Data)
		if err != nil {
			return err
		}
		if _, err := a.tampering(newest[0], server, s, false); err != nil {
			return err
		}
	}
	return nil
}

// proofs records pre-recoveries and verdicts in the order in which they must have come: each verdict after the
// pre-recovery it names, and what nobody judged last.
func (a adoption) proofs(pres []dr.PreRecovery, verdicts []dr.Verdict) error {
	byID := make(map[string]dr.PreRecovery, len(pres))
	for _, p := range pres {
		byID[p.ID] = p
	}
	made := func(p dr.PreRecovery) error {
		return a.try(func() (bool, error) { return a.recordPreRecovery(p) }, &a.done.PreRecoveries, "pre-recovery "+p.ID)
	}
	for _, v := range verdicts {
		if p, ok := byID[v.PreRecovery]; ok {
			delete(byID, p.ID)
			if err := made(p); err != nil {
				return err
			}
		}
		known, err := a.NewSelect().Model((*verdictRow)(nil)).Where("id = ?", v.ID).Count(a.ctx)
		if err != nil {
			return err
		}
		if known > 0 {
			continue
		}
		judge := func() (bool, error) { _, err := a.judge(v, false); return true, err }
		if err := a.try(judge, &a.done.Verdicts, "verdict "+v.ID); err != nil {
			return err
		}
	}
	for _, id := range slices.Sorted(maps.Keys(byID)) {
		if err := made(byID[id]); err != nil {
			return err
		}
	}
	return nil
}

func (a adoption) lkgs() (map[string]string, error) {
	var rows []serverRow
	if err := a.NewSelect().Model(&rows).Column("id", "lkg").Scan(a.ctx); err != nil {
		return nil, err
	}
	out := make(map[string]string, len(rows))
	for _, row := range rows {
		out[row.ID] = row.LKG
	}
	return out, nil
}
