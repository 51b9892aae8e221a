package catalog

import (
	"context"
	"errors"
	"fmt"

	"github.com/uptrace/bun"

	"github.com/musterdr/muster/internal/dr"
)

// bookRow is what a server had in a month.
type bookRow struct {
	bun.BaseModel `bun:"table:books"`
	ServerID      string   `bun:",pk"`
	Month         dr.Month `bun:",pk"`
	Snapshots     int64
	Added         int64
	Sent          int64
	Replicated    int64
	Stored        int64
	ImageTaken    int64
	ImageSize     int64
	DataTaken     int64
	DataSize      int64
	Tests         int
	TestSeconds   int64
	TestMemory    int64
	TestCPUs      int64 `bun:"test_cpus"`
}

func (row bookRow) book() dr.Book {
	return dr.Book{Month: row.Month, Snapshots: row.Snapshots, Added: row.Added, Sent: row.Sent, Replicated: row.Replicated, Stored: row.Stored,
		Image: dr.Newest{Taken: instant(row.ImageTaken), Size: row.ImageSize}, Data: dr.Newest{Taken: instant(row.DataTaken), Size: row.DataSize},
		Tests: dr.Capacity{Machines: row.Tests, Seconds: row.TestSeconds, Memory: row.TestMemory, CPUs: row.TestCPUs}}
}

func rowOf(serverID string, b dr.Book) bookRow {
	return bookRow{ServerID: serverID, Month: b.Month, Snapshots: b.Snapshots, Added: b.Added, Sent: b.Sent, Replicated: b.Replicated, Stored: b.Stored,
		ImageTaken: stamp(b.Image.Taken), ImageSize: b.Image.Size, DataTaken: stamp(b.Data.Taken), DataSize: b.Data.Size,
		Tests: b.Tests.Machines, TestSeconds: b.Tests.Seconds, TestMemory: b.Tests.Memory, TestCPUs: b.Tests.CPUs}
}

// book writes into a server's books. Those of a server of which the history is still to be added up will hold it then.
func (t *tx) book(server serverRow, write func(b *dr.Books) error) error {
	if server.Booked == 0 {
		return nil
	}
	var rows []bookRow
	if err := t.NewSelect().Model(&rows).Where("server_id = ?", server.ID).Order("month").Scan(t.ctx); err != nil {
		return err
	}
	before := make(map[dr.Month]bookRow, len(rows))
	var books dr.Books
	for _, row := range rows {
		before[row.Month] = row
		books = append(books, row.book())
	}
	if err := write(&books); err != nil {
		return err
	}
	for _, b := range books {
		row := rowOf(server.ID, b)
		was, known := before[b.Month]
		var err error
		switch {
		case !known:
			_, err = t.NewInsert().Model(&row).Exec(t.ctx)
		case row != was:
			_, err = t.NewUpdate().Model(&row).WherePK().Exec(t.ctx)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// bookExpired takes a snapshot that has just expired off its server's books.
func (t *tx) bookExpired(server serverRow, row snapshotRow) error {
	s, err := parse[dr.Snapshot](row.Data)
	if err != nil {
		return err
	}
	return t.book(server, func(b *dr.Books) error {
		return b.Expired(s, t.now, func() (dr.Newest, error) {
			var left []snapshotRow
			err := t.NewSelect().Model(&left).Column("data").Where("server_id = ? AND kind = ? AND state <> 'expired'", server.ID, row.Kind).
				Order("taken DESC").Limit(1).Scan(t.ctx)
			if err != nil || len(left) == 0 {
				return dr.Newest{}, err
			}
			s, err := parse[dr.Snapshot](left[0].Data)
			return dr.Newest{Taken: s.Taken, Size: s.Size()}, err
		})
	})
}

// bookTest adds a boot test to its server's books, if a machine was made for it.
func (t *tx) bookTest(server serverRow, v dr.Verdict) error {
	pre, err := one[preRecoveryRow](t.ctx, t, "pre-recovery", v.PreRecovery)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	p, err := parse[dr.PreRecovery](pre.Brief)
	if err != nil {
		return err
	}
	return t.book(server, func(b *dr.Books) error { b.Test(v, p.Hardware); return nil })
}

// bookBatch bounds one transaction of bookAll, in servers.
const bookBatch = 20

// bookAll adds up the history of servers that were recorded by a release that did not.
func (c *Catalog) bookAll(ctx context.Context) error {
	return c.catchUp(ctx, "add up what servers had", "booked = 0", bookBatch, (*tx).bookHistory)
}

// catchUp does for servers what an earlier release did not, in batches, until none of them is left.
func (c *Catalog) catchUp(ctx context.Context, what, left string, batch int64, do func(t *tx, serverID string) error) error {
	for {
		var rows []serverRow
		if err := c.db.NewSelect().Model(&rows).Column("id").Where(left).Order("id").Limit(batch).Scan(ctx); err != nil {
			return err
		}
		if len(rows) == 0 {
			return nil
		}
		err := c.write(ctx, what, func(t *tx) error {
			for _, row := range rows {
				if err := do(t, row.ID); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
}

// bookHistory adds up what happened to a server, in the order in which it did.
func (t *tx) bookHistory(serverID string) error {
	server, err := one[serverRow](t.ctx, t, "server", serverID)
	if err != nil || server.Booked != 0 {
		return err
	}
	if err := t.do(`UPDATE servers SET booked = 1 WHERE id = ?`, serverID); err != nil {
		return err
	}
	server.Booked = 1
	var happened []struct {
		Kind, Subject             string
		At, Sent                  int64
		Snapshot, Verdict, Rescue string
	}
	err = t.NewRaw(`SELECT e.kind, e.subject, e.at, COALESCE(s.sent, 0) AS sent, COALESCE(s.data, '') AS snapshot, COALESCE(v.brief, '') AS verdict, COALESCE(p.brief, '') AS rescue
		FROM events AS e LEFT JOIN snapshots AS s ON s.id = e.subject LEFT JOIN verdicts AS v ON v.id = e.subject LEFT JOIN pre_recoveries AS p ON p.id = v.pre_recovery
		WHERE e.server_id = ? AND e.kind IN ('snapshot.kept', 'snapshot.replicated', 'snapshot.expired', 'verdict.recorded') ORDER BY e.seq`, serverID).Scan(t.ctx, &happened)
	if err != nil {
		return err
	}
	return t.book(server, func(b *dr.Books) error {
		kept := map[string]dr.Snapshot{}
		for _, e := range happened {
			switch e.Kind {
			case "snapshot.replicated":
				b.Arrival(instant(e.At), e.Sent)
				continue
			case "verdict.recorded":
				if err := bookVerdict(b, e.Verdict, e.Rescue); err != nil {
					return err
				}
				continue
			}
			s, err := parse[dr.Snapshot](e.Snapshot)
			if err != nil {
				return fmt.Errorf("snapshot %s: %w", e.Subject, err)
			}
			if e.Kind == "snapshot.kept" {
				kept[s.ID] = s
				b.Snapshot(s)
				continue
			}
			delete(kept, s.ID)
			if err := b.Expired(s, instant(e.At), func() (dr.Newest, error) { return newestOf(kept, s.IsData()), nil }); err != nil {
				return err
			}
		}
		return nil
	})
}

func bookVerdict(b *dr.Books, verdict, rescue string) error {
	if verdict == "" || rescue == "" {
		return nil
	}
	v, err := parse[dr.Verdict](verdict)
	if err != nil {
		return err
	}
	p, err := parse[dr.PreRecovery](rescue)
	b.Test(v, p.Hardware)
	return err
}

func newestOf(kept map[string]dr.Snapshot, data bool) (out dr.Newest) {
	for _, s := range kept {
		if s.IsData() == data && s.Taken.After(out.Taken) {
			out = dr.Newest{Taken: s.Taken, Size: s.Size()}
		}
	}
	return out
}
