package main

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

// A fleet is a catalog as large as one will be: a few servers live through their nights by the catalog's own verbs, and the
// database copies what came of it, row by row and night by night, for thousands of others.
type fleet struct {
	servers   int // fewer than spread
	snapshots int // a server
	now       time.Time
}

// life is a way in which a server lives; every one has its share of the fleet.
type life struct {
	name     string
	thousand int // of a thousand servers, how many live so; the first takes what is left
	tier     dr.Tier
	failing  int // every so many nights the test fails; 0: never
	last     dr.Outcome
	untested bool // the last snapshot has no verdict yet
	never    bool // never captured
	invoked  bool
	removed  bool
	age      time.Duration // of its last snapshot; 0: usual
}

var lives = []life{
	{name: "well", last: dr.Pass, failing: 97},
	{name: "shaky", thousand: 100, last: dr.Pass, failing: 17},
	{name: "data", thousand: 70, tier: dr.TierImageData, last: dr.Pass, failing: 41},
	{name: "broken", thousand: 20, last: dr.Fail},
	{name: "fresh", thousand: 20, last: dr.Pass, untested: true, age: 20 * time.Minute},
	{name: "overdue", thousand: 5, last: dr.Pass, untested: true, age: 3 * time.Hour},
	{name: "due", thousand: 5, last: dr.Pass, age: 24*time.Hour + time.Minute},
	{name: "new", thousand: 3, never: true},
	{name: "invoked", thousand: 2, last: dr.Pass, invoked: true},
	{name: "gone", thousand: 10, last: dr.Pass, removed: true},
}

// mark is what stands for a server in the identifiers of a template and is replaced in its copies; title the same in its name.
func mark(i int) string  { return fmt.Sprintf("qqqqqq%02d", i) }
func title(i int) string { return fmt.Sprintf("wwwwww%02d", i) }

// usualAge is how old the last snapshot of a server is in the middle of the day.
const usualAge = 9 * time.Hour

// spread is how far apart the numbers of two events of a template come to lie: there is room for as many servers between.
const spread = 1 << 24

// retained is how many snapshots the servers of a fleet keep; the others have expired.
const retained = 30

// live lets one server of each kind live through its nights.
func (f fleet) live(ctx context.Context, c *catalog.Catalog) error {
	for i, l := range lives {
		n := f.snapshots
		if l.never {
			n = 0
		}
		if err := l.live(ctx, c, i, n, f.now); err != nil {
			return fmt.Errorf("live as %s: %w", l.name, err)
		}
	}
	return nil
}

func (l life) live(ctx context.Context, c *catalog.Catalog, i, nights int, now time.Time) error {
	start := now.Add(-cmp.Or(l.age, usualAge) - time.Duration(max(nights-1, 0))*24*time.Hour)
	at := start
	c.Now = func() time.Time { return at }
	server := l.server(i, start)
	if err := c.AddServer(ctx, server); err != nil {
		return err
	}
	var kept []dr.Snapshot
	for n := range nights {
		at = start.Add(time.Duration(n) * 24 * time.Hour)
		s := l.snapshot(server, kept, n, at)
		kept = append(kept, s)
		if err := l.night(ctx, c, s, n, nights, &at); err != nil {
			return err
		}
		if old := n - retained; old >= 0 && !(l.tier != "" && kept[old].Kind != dr.SnapshotData) {
			if err := c.Expire(ctx, kept[old].ID); err != nil {
				return err
			}
		}
	}
	switch {
	case l.removed:
		return c.RemoveServer(ctx, server.ID)
	case l.invoked:
		lkg := kept[len(kept)-1]
		return c.RecordInvocation(ctx, dr.Invocation{ID: "inv-" + mark(i), ServerID: server.ID, Server: server.Name, SnapshotID: lkg.ID,
			State: dr.Invoking, By: "an engineer", Reason: "the original burns"})
	}
	return nil
}

// night is one night: capture, rescue image, boot test.
func (l life) night(ctx context.Context, c *catalog.Catalog, s dr.Snapshot, n, nights int, at *time.Time) error {
	if err := c.RecordSnapshot(ctx, s); err != nil {
		return err
	}
	if l.untested && n == nights-1 {
		return nil
	}
	if l.tier != "" && s.Kind != dr.SnapshotData {
		return nil // it is tested with the data
	}
	*at = at.Add(2 * time.Minute)
	id := strings.TrimPrefix(s.ID, "snap-")
	pre := dr.PreRecovery{ID: "pre-" + id, SnapshotID: s.ID, Hardware: dr.Hardware{Firmware: dr.UEFI, DiskBus: dr.BusVirtio},
		Overlays: []string{"serial@1", "agent@3", "fstab@2", "network@4"}, Edits: make([]dr.Edit, 6), Facts: dr.Facts{Hostname: s.Server},
		Deltas: []string{"/var/lib/muster/silo/" + s.ID + "/delta-0.qcow2"}}
	if err := c.RecordPreRecovery(ctx, pre); err != nil {
		return err
	}
	*at = at.Add(time.Minute)
	outcome := dr.Pass
	if n == nights-1 {
		outcome = l.last
	} else if l.failing > 0 && n%l.failing == l.failing-1 {
		outcome = dr.Fail
	}
	_, err := c.RecordVerdict(ctx, l.verdict(s, pre, id, outcome, *at))
	return err
}

func (l life) verdict(s dr.Snapshot, pre dr.PreRecovery, id string, o dr.Outcome, at time.Time) dr.Verdict {
	v := dr.Verdict{ID: "verdict-" + id, SnapshotID: s.ID, PreRecovery: pre.ID, Outcome: o, Started: at, Rung: "virtio/virtio-net", Accelerator: "kvm",
		Summary: "it booted, was stable and answered every check", BootID: "c1f5e1f2-7b0c-4f6e-9f6d-0123456789ab", RTA: 41 * time.Second, RPA: 4 * time.Minute,
		Phases:  []dr.Phase{{Name: dr.PhaseAssemble, Duration: time.Second}, {Name: dr.PhaseKernel, Duration: 9 * time.Second}, {Name: dr.PhaseChecks, Duration: 3 * time.Second}},
		Results: []dr.CheckResult{{Name: "http", State: dr.CheckPass}, {Name: "postgres", State: dr.CheckPass}}}
	if o == dr.Fail {
		v.Code, v.Summary = dr.CodePanic, "its kernel panicked: unable to mount the root file system"
	}
	return v
}

func (l life) server(i int, created time.Time) dr.Server {
	s := dr.Server{ID: "srv-" + mark(i), Name: "host-" + title(i), Created: created, Tier: l.tier, Schedule: dr.Schedule{Every: 24 * time.Hour},
		Objectives: dr.Objectives{RTO: 5 * time.Minute, RPO: 25 * time.Hour}, Retention: dr.Retention{KeepLast: retained},
		Source: dr.Source{SSH: &dr.SSHSource{User: "root", Host: "host-" + title(i) + ".example.net", Port: 22, KeyFile: "/etc/muster/keys/site", Resident: true,
			HostKey: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE0M4Dg8hZ0s4uYt8QmXx2nq7R1w5cV6b9a3k0fJpTzL"}},
		Checks: []dr.Check{{Name: "http", Kind: dr.CheckHTTP}, {Name: "ssh", Kind: dr.CheckTCP}}}
	if l.tier != "" {
		s.Schedule.Every = 7 * 24 * time.Hour
		s.Data = dr.DataSet{Paths: []string{"/srv", "/home"}, Every: 24 * time.Hour}
	}
	return s
}

// snapshot is the nth of a server: of one with data every seventh is an image, the others go onto the last of those.
func (l life) snapshot(server dr.Server, before []dr.Snapshot, n int, at time.Time) dr.Snapshot {
	id := fmt.Sprintf("%s-%s", at.Format("20060102t150405"), strings.TrimPrefix(server.ID, "srv-"))
	s := dr.Snapshot{ID: "snap-" + id, ServerID: server.ID, Server: server.Name, Kind: dr.SnapshotImage, Taken: at, Consistency: dr.ApplicationConsistent,
		Pass: dr.CapturePass{Kind: dr.PassTracked, Provider: dr.ProviderTracking},
		Disks: []dr.SnapshotDisk{{Name: "sda", Size: 64 << 30, BlockSize: 128 << 10, Data: 21 << 30, Root: "Ixc3d266c56318d4e80fd90209f8aa3793b3d18571b97d73369ae23dff74f767a3"},
			{Name: "sdb", Size: 512 << 30, BlockSize: 128 << 10, Data: 200 << 30, Root: "Ixb81f6a0c56318d4e80fd90209f8aa3793b3d18571b97d73369ae23dff74f76aa1"}},
		Stats:        dr.CaptureStats{Read: 3 << 30, Changed: 2 << 30, Sent: 900 << 20, New: 1 << 30, Stored: 400 << 20, Frozen: 64 * time.Millisecond, Duration: 3 * time.Minute},
		Applications: []dr.Application{{Name: "PostgreSQL 15 at /var/run/postgresql/.s.PGSQL.5432", AtRest: true}},
		Inventory:    dr.Inventory{Hostname: server.Name, Kernel: "6.1.0-28-amd64", Processes: []string{"systemd", "sshd", "nginx", "postgres"}}}
	images := slices.DeleteFunc(slices.Clone(before), dr.Snapshot.IsData)
	if l.tier != "" && n%7 != 0 {
		s.Kind, s.Image, s.Disks = dr.SnapshotData, images[len(images)-1].ID, nil
		s.Files = &dr.SnapshotFiles{Roots: server.Data.Paths, Index: "kc3d266c56318d4e80fd90209f8aa3793b3d18571b97d73369ae23dff74f767a3", Entries: 1_200_000, Bytes: 80 << 30, Changed: 900}
	}
	if n > 0 {
		s.Parent = before[n-1].ID
	}
	return s
}

// copies says of which table's rows a copy is made for every other server, and how a row is found to be a template's.
var copies = []struct{ table, mine string }{
	{"servers", "t.id"}, {"snapshots", "t.server_id"}, {"pre_recoveries", ""}, {"verdicts", "t.server_id"}, {"promotions", "t.server_id"},
	{"tickets", "t.server_id"}, {"invocations", "t.server_id"}, {"events", "t.server_id"},
}

// multiply copies the templates' rows until the fleet is whole, on one connection, and counts what there is.
func (f fleet) multiply(ctx context.Context, db *sql.Conn, postgres bool) error {
	run := func(format string, args ...any) error {
		if _, err := db.ExecContext(ctx, fmt.Sprintf(format, args...)); err != nil {
			return fmt.Errorf("%.200s: %w", fmt.Sprintf(format, args...), err)
		}
		return nil
	}
	// A ticket's identifier is the catalog's own and has no mark.
	for _, statement := range []string{
		`UPDATE verdicts SET ticket = (SELECT 'ticket-' || t.seq || '-' || t.server_id FROM tickets AS t WHERE t.id = verdicts.ticket) WHERE ticket <> ''`,
		`UPDATE events SET subject = (SELECT 'ticket-' || t.seq || '-' || t.server_id FROM tickets AS t WHERE t.id = events.subject) WHERE kind LIKE 'ticket.%'`,
		`UPDATE tickets SET id = 'ticket-' || seq || '-' || server_id`,
	} {
		if err := run("%s", statement); err != nil {
			return err
		}
	}
	if err := run(`CREATE TEMP TABLE clones (tpl TEXT, n BIGINT, mark TEXT, code TEXT, title TEXT, name TEXT)`); err != nil {
		return err
	}
	for _, values := range f.clones() {
		if err := run(`INSERT INTO clones VALUES %s`, values); err != nil {
			return err
		}
	}
	for _, c := range copies {
		columns, err := columnsOf(ctx, db, c.table, postgres)
		if err != nil {
			return err
		}
		mine, join := c.mine, ""
		if mine == "" {
			mine, join = "s.server_id", " JOIN snapshots AS s ON s.id = t.snapshot_id"
		}
		if err := run(`CREATE TEMP TABLE tpl AS SELECT t.*, %s AS mine FROM %s AS t%s`, mine, c.table, join); err != nil {
			return err
		}
		var from []string
		nightly := false
		for _, col := range columns {
			switch {
			case col.name == "seq":
				nightly = true
				from = append(from, fmt.Sprintf("t.seq * %d + c.n", spread))
			case col.text:
				from = append(from, fmt.Sprintf("replace(replace(t.%s, c.mark, c.code), c.title, c.name)", col.name))
			default:
				from = append(from, "t."+col.name)
			}
		}
		names := make([]string, len(columns))
		for i, col := range columns {
			names[i] = col.name
		}
		insert := fmt.Sprintf(`INSERT INTO %s (%s) SELECT %s FROM tpl AS t JOIN clones AS c ON c.tpl = t.mine`, c.table, strings.Join(names, ", "), strings.Join(from, ", "))
		// Night by night, as the rows of real servers come.
		keys := []string{""}
		if nightly {
			if keys, err = texts(ctx, db, `SELECT CAST(seq AS TEXT) FROM tpl ORDER BY seq`); err != nil {
				return err
			}
		}
		for _, k := range keys {
			where := ""
			if k != "" {
				where = " WHERE t.seq = " + k
			}
			if err := run("%s%s", insert, where); err != nil {
				return err
			}
		}
		if err := run(`DROP TABLE tpl`); err != nil {
			return err
		}
	}
	return run(`UPDATE counters SET value = (SELECT MAX(seq) FROM events) WHERE name = 'event'`)
}

// clones gives the rows of the table of clones, some at a time. What a server is called and what its identifiers are has
// nothing to do with each other, nor with how it lives.
func (f fleet) clones() (batches []string) {
	rng := rand.New(rand.NewPCG(1, 2))
	names := rng.Perm(f.servers)
	var rows []string
	for n := 1; n <= f.servers-len(lives); n++ {
		i, share := 0, n%1000
		for j, l := range lives {
			if share < l.thousand {
				i = j
				break
			}
			share -= l.thousand
		}
		rows = append(rows, fmt.Sprintf("('srv-%s', %d, '%s', '%08x', '%s', '%08d')", mark(i), n, mark(i), uint32(n)*2654435761, title(i), names[n]))
	}
	for chunk := range slices.Chunk(rows, 500) {
		batches = append(batches, strings.Join(chunk, ", "))
	}
	return batches
}

type column struct {
	name string
	text bool
}

func columnsOf(ctx context.Context, db *sql.Conn, table string, postgres bool) (out []column, err error) {
	query := `SELECT name, type FROM pragma_table_info('` + table + `')`
	if postgres {
		query = `SELECT column_name, data_type FROM information_schema.columns WHERE table_name = '` + table + `' ORDER BY ordinal_position`
	}
	rows, err := db.QueryContext(ctx, query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var c column
		var kind string
		if err := rows.Scan(&c.name, &kind); err != nil {
			return nil, err
		}
		c.text = strings.EqualFold(kind, "text")
		out = append(out, c)
	}
	return out, cmp.Or(rows.Err(), rows.Close())
}

// texts reads one column of text.
func texts(ctx context.Context, db *sql.Conn, query string) (out []string, err error) {
	rows, err := db.QueryContext(ctx, query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var s string
		if err := rows.Scan(&s); err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, rows.Err()
}
