package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/uptrace/bun"

	"github.com/musterdr/muster/internal/dr"
)

// Standing is where a protected server stands.
type Standing struct {
	Server     dr.Server
	Taken      dr.Taken
	Newest     *dr.Record     // by the instant its disks show, of those that have not expired; as Snapshots gives it
	LKG        *dr.Record     // as Snapshots gives it
	Retest     time.Time      // when the newest is tested again because its test was inconclusive; zero: not
	Tickets    int            // open ones
	Invocation *dr.Invocation // the active one
}

// standingRow is a protected server with what a status page shows of it, but its snapshots.
type standingRow struct {
	serverRow  `bun:",extend"`
	Newest     string
	Tickets    int
	Invocation string
}

// Standings gives where protected servers stand, by name: those whose names come after the one given, at most limit, or
// MaxList. It takes two queries however many they are, and none looks at more than it gives.
func (c *Catalog) Standings(ctx context.Context, after string, limit int) ([]Standing, error) {
	out, err := c.standings(ctx, `removed = 0 AND name > ? ORDER BY name LIMIT ?`, after, limited(limit))
	if err != nil {
		return nil, fmt.Errorf("list where servers stand: %w", err)
	}
	return out, nil
}

// Standing gives where one protected server stands. It is named as Server has it.
func (c *Catalog) Standing(ctx context.Context, nameOrID string) (Standing, error) {
	server, err := c.Server(ctx, nameOrID)
	if err != nil {
		return Standing{}, err
	}
	out, err := c.standings(ctx, `removed = 0 AND id = ?`, server.ID)
	if err != nil {
		return Standing{}, fmt.Errorf("look up where server %s stands: %w", server.Name, err)
	}
	if len(out) == 0 {
		return Standing{}, fmt.Errorf("server %s: %w", nameOrID, ErrNotFound)
	}
	return out[0], nil
}

func (c *Catalog) standings(ctx context.Context, which string, args ...any) ([]Standing, error) {
	var rows []standingRow
	err := c.db.NewRaw(`WITH page AS (SELECT id, name, data, lkg, image_at, data_at, last_at, retest FROM servers WHERE `+which+`)
		SELECT p.*,
			COALESCE((SELECT s.id FROM snapshots AS s WHERE s.server_id = p.id AND s.state <> 'expired'
				ORDER BY s.taken DESC, s.seq DESC LIMIT 1), '') AS newest,
			(SELECT COUNT(*) FROM tickets AS t WHERE t.server_id = p.id AND t.closed = 0) AS tickets,
			COALESCE((SELECT i.data FROM invocations AS i WHERE i.server_id = p.id AND i.state IN ('invoking', 'running')), '') AS invocation
		FROM page AS p ORDER BY p.name`, args...).Scan(ctx, &rows)
	if err != nil {
		return nil, err
	}
	records, err := c.recordsOf(ctx, rows)
	if err != nil {
		return nil, err
	}
	return parseAll(rows, func(row standingRow) (Standing, error) { return row.standing(records) })
}

// recordsOf reads the snapshots that a page of standings shows.
func (c *Catalog) recordsOf(ctx context.Context, rows []standingRow) (map[string]*dr.Record, error) {
	var ids []string
	for _, row := range rows {
		if row.Newest != "" {
			ids = append(ids, row.Newest)
		}
		if row.LKG != "" && row.LKG != row.Newest {
			ids = append(ids, row.LKG)
		}
	}
	if len(ids) == 0 {
		return nil, nil
	}
	var found []listed
	if err := c.listing(&found).Where("s.id IN (?)", bun.List(ids)).Scan(ctx); err != nil {
		return nil, err
	}
	out := make(map[string]*dr.Record, len(found))
	for _, row := range found {
		r, err := row.record()
		if err != nil {
			return nil, err
		}
		out[row.ID] = &r
	}
	return out, nil
}

func (row standingRow) standing(records map[string]*dr.Record) (s Standing, err error) {
	s = Standing{Taken: row.taken(), Newest: records[row.Newest], LKG: records[row.LKG], Retest: instant(row.Retest), Tickets: row.Tickets}
	if s.Server, err = parse[dr.Server](row.Data); err != nil || row.Invocation == "" {
		return s, err
	}
	invocation, err := parse[dr.Invocation](row.Invocation)
	s.Invocation = &invocation
	return s, err
}

func (row serverRow) taken() dr.Taken {
	return dr.Taken{Image: instant(row.ImageAt), Data: instant(row.DataAt), Last: instant(row.LastAt)}
}

// Due is a server of which a snapshot is due.
type Due struct {
	Server dr.Server
	Taken  dr.Taken
	At     time.Time // since when, as it is kept: what the next page comes after
}

// Due gives the protected servers of which a snapshot is due now and that are not invoked, the longest due first: those
// after the one given, or from the first; at most MaxList. An invoked server's original is gone or must not be mistaken for
// the truth.
func (c *Catalog) Due(ctx context.Context, now time.Time, after *Due) ([]Due, error) {
	at, id := int64(-1), ""
	if after != nil {
		at, id = stamp(after.At), after.Server.ID
	}
	var rows []serverRow
	// What was taken in the future was taken before the clock was stepped back, and is due at once. Each of the two has its index;
	// one condition of both would be asked of every server.
	err := c.db.NewRaw(`SELECT id, data, image_at, data_at, last_at, due FROM servers AS s
		WHERE id IN (SELECT id FROM servers WHERE removed = 0 AND due <= ? UNION ALL SELECT id FROM servers WHERE removed = 0 AND newest_at > ?)
			AND (due, id) > (?, ?) AND NOT EXISTS
			(SELECT 1 FROM invocations AS i WHERE i.server_id = s.id AND i.state IN ('invoking', 'running'))
		ORDER BY due, id LIMIT ?`, stamp(now), stamp(now), at, id, MaxList).Scan(ctx, &rows)
	if err != nil {
		return nil, fmt.Errorf("list what is due: %w", err)
	}
	return parseAll(rows, func(row serverRow) (Due, error) {
		server, err := parse[dr.Server](row.Data)
		return Due{Server: server, Taken: row.taken(), At: instant(row.Due)}, err
	})
}

// Expected is a server whose snapshots an appliance elsewhere brings.
type Expected struct {
	Server  dr.Server
	Arrived dr.Taken // the newest that have, by the instant they show: what arrives late is not the newest
	Missing bool     // a ticket says that one did not
}

// Expected gives protected servers whose snapshots appliances elsewhere bring, by identifier: those after the one given, at most MaxList.
func (c *Catalog) Expected(ctx context.Context, after string) ([]Expected, error) {
	var rows []struct {
		Data, Ticket    string
		ImageAt, DataAt int64
	}
	const newest = `COALESCE((SELECT s.taken FROM snapshots AS s WHERE s.server_id = p.id AND s.kind = ? AND s.state <> 'kept' ORDER BY s.taken DESC LIMIT 1), 0)`
	err := c.db.NewRaw(`SELECT p.data, `+newest+` AS image_at, `+newest+` AS data_at,
			COALESCE((SELECT t.id FROM tickets AS t WHERE t.server_id = p.id AND t.closed = 0 AND t.problem = ? LIMIT 1), '') AS ticket
		FROM servers AS p WHERE p.removed = 0 AND p.appliance <> '' AND p.id > ? ORDER BY p.id LIMIT ?`,
		dr.SnapshotImage, dr.SnapshotData, dr.ProblemArrival, after, MaxList).Scan(ctx, &rows)
	if err != nil {
		return nil, fmt.Errorf("list what appliances bring: %w", err)
	}
	out := make([]Expected, len(rows))
	for i, row := range rows {
		if out[i].Server, err = parse[dr.Server](row.Data); err != nil {
			return nil, err
		}
		out[i].Arrived = dr.Taken{Image: instant(row.ImageAt), Data: instant(row.DataAt)}
		out[i].Missing = row.Ticket != ""
	}
	return out, nil
}

// Retests gives the protected servers whose newest snapshot was to be tested again by now, by name: the MaxList longest due.
func (c *Catalog) Retests(ctx context.Context, now time.Time) ([]Standing, error) {
	out, err := c.standings(ctx, `removed = 0 AND retest <> 0 AND retest <= ? ORDER BY retest LIMIT ?`, stamp(now), MaxList)
	if err != nil {
		return nil, fmt.Errorf("list tests to be held again: %w", err)
	}
	return out, nil
}

// Retested records that the test of a server's newest snapshot is held again now. What comes of it says whether there is another one.
func (c *Catalog) Retested(ctx context.Context, s Standing) error {
	return c.write(ctx, "record that "+s.Server.Name+" is tested again", func(t *tx) error {
		if _, err := t.event(t.now, "test.again", s.Server.ID, s.Server.Name, s.Newest.Snapshot.ID,
			"the boot test of %s was inconclusive and is held again", s.Newest.Snapshot.ID); err != nil {
			return err
		}
		return t.do(`UPDATE servers SET retest = 0 WHERE id = ?`, s.Server.ID)
	})
}

// plan works out anew what is kept with a server: when its newest snapshots were taken, and when the next is due. Whatever
// changes its definition or its snapshots calls it.
func (t *tx) plan(serverID string) error {
	row, err := one[serverRow](t.ctx, t, "server", serverID)
	if err != nil {
		return err
	}
	server, err := parse[dr.Server](row.Data)
	if err != nil {
		return err
	}
	image, imageSeq, err := t.lastOf(serverID, dr.SnapshotImage)
	if err != nil {
		return err
	}
	data, dataSeq, err := t.lastOf(serverID, dr.SnapshotData)
	if err != nil {
		return err
	}
	taken := dr.Taken{Image: image, Data: data, Last: image}
	if dataSeq > imageSeq {
		taken.Last = data
	}
	var newest time.Time // of what is to be taken still
	if server.HasImage() {
		newest = taken.Image
	}
	if server.HasData() && data.After(newest) {
		newest = data
	}
	due := stamp(server.Dues(taken, newest).Next())
	if server.Appliance != "" { // which captures it when it finds it due
		due, newest = math.MaxInt64, time.Time{}
	}
	return t.do(`UPDATE servers SET appliance = ?, image_at = ?, data_at = ?, last_at = ?, newest_at = ?, due = ?, shown_at =
		COALESCE((SELECT s.taken FROM snapshots AS s WHERE s.server_id = servers.id AND s.state <> 'expired' ORDER BY s.taken DESC LIMIT 1), 0) WHERE id = ?`,
		server.Appliance, stamp(taken.Image), stamp(taken.Data), stamp(taken.Last), stamp(newest), due, serverID)
}

// lastOf says when the snapshot of a kind that was recorded last and has not expired was taken, and its number; zeros for none.
func (t *tx) lastOf(serverID string, kind dr.SnapshotKind) (time.Time, int64, error) {
	var row snapshotRow
	err := t.NewSelect().Model(&row).Column("taken", "seq").Where("server_id = ? AND kind = ? AND state <> 'expired'", serverID, kind).
		Order("seq DESC").Limit(1).Scan(t.ctx)
	if errors.Is(err, sql.ErrNoRows) {
		return time.Time{}, 0, nil
	}
	return instant(row.Taken), row.Seq, err
}

// planBatch bounds one transaction of planAll.
const planBatch = 500

// planAll plans the servers that were recorded by a release that did not.
func (c *Catalog) planAll(ctx context.Context) error {
	return c.catchUp(ctx, "plan servers", "due = -1", planBatch, (*tx).plan)
}
