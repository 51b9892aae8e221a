package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/database"
)

// fill makes the fleet in an empty database: its templates live in a file, which is copied as an installation that moves is, and are
// multiplied there.
func (f fleet) fill(ctx context.Context, dsn, dir string) error {
	c, err := catalog.Open(ctx, dsn)
	if err != nil {
		return err
	}
	if err := errors.Join(f.settle(ctx, c, dir), c.Close()); err != nil {
		return err
	}
	// What is made here is only measured: nothing need be durable, and nothing refers to what is not there.
	postgres := database.IsPostgres(dsn)
	driver, address := "pgx", dsn
	before := []string{"SET session_replication_role = replica", "SET maintenance_work_mem = '1GB'", "BEGIN"}
	after := []string{"COMMIT", "VACUUM ANALYZE", "CHECKPOINT"} // as the server does by itself, some minutes later
	if !postgres {
		driver, address = "sqlite", "file:"+dsn
		before = []string{"PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", "PRAGMA cache_size = -2000000", "PRAGMA temp_store = MEMORY", "BEGIN"}
		after = []string{"COMMIT", "PRAGMA journal_mode = WAL"}
	}
	db, err := sql.Open(driver, address)
	if err != nil {
		return err
	}
	defer db.Close()
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	m := multiplier{fleet: f, db: conn, postgres: postgres}
	if err := m.all(ctx, before); err != nil {
		return err
	}
	if err := m.multiply(ctx); err != nil {
		return err
	}
	return m.all(ctx, after)
}

// settle has the templates live in a file, in memory if there is a place for that, and move into a catalog.
func (f fleet) settle(ctx context.Context, into *catalog.Catalog, dir string) error {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		dir = "/dev/shm"
	}
	dir, err := os.MkdirTemp(dir, "fleet")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c, err := catalog.Open(ctx, filepath.Join(dir, "templates.db"))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := f.live(ctx, c); err != nil {
		return err
	}
	_, err = catalog.Copy(ctx, c, into, nil)
	return err
}

// multiplier copies the templates' rows until the fleet is whole, on one connection.
type multiplier struct {
	fleet
	db       *sql.Conn
	postgres bool
}

func (m multiplier) all(ctx context.Context, statements []string) error {
	for _, s := range statements {
		if _, err := m.db.ExecContext(ctx, s); err != nil {
			return fmt.Errorf("%.300s: %w", s, err)
		}
	}
	return nil
}

// copies says of which table's rows a copy is made for every server, and how a row is found to be a template's. Rows of none are kept
// as they are.
var copies = []struct{ table, mine string }{
	{"servers", "t.id"}, {"snapshots", "t.server_id"}, {"pre_recoveries", "(SELECT s.server_id FROM snapshots AS s WHERE s.id = t.snapshot_id)"}, {"verdicts", "t.server_id"},
	{"promotions", "t.server_id"}, {"tickets", "t.server_id"}, {"invocations", "t.server_id"}, {"deltas", "(SELECT s.server_id FROM snapshots AS s WHERE s.id = t.snapshot_id)"},
	{"books", "t.server_id"}, {"events", "t.server_id"},
}

// multiply moves the templates' rows aside, makes those of all servers from them night by night, as they come in earnest, and numbers
// their events anew without a gap.
func (m multiplier) multiply(ctx context.Context) error {
	statements := append([]string{
		// A ticket's identifier is the catalog's own and has no mark.
		`UPDATE verdicts SET ticket = (SELECT 'ticket-' || t.seq || '-' || t.server_id FROM tickets AS t WHERE t.id = verdicts.ticket) WHERE ticket <> ''`,
		`UPDATE events SET subject = (SELECT 'ticket-' || t.seq || '-' || t.server_id FROM tickets AS t WHERE t.id = events.subject) WHERE kind LIKE 'ticket.%'`,
		`UPDATE tickets SET id = 'ticket-' || seq || '-' || server_id`,
		`CREATE TEMP TABLE clones (tpl TEXT, rank BIGINT, mark TEXT, code TEXT, title TEXT, name TEXT)`,
	}, m.clones()...)
	statements = append(statements, `CREATE INDEX clones_tpl ON clones (tpl, rank)`,
		// Each event of a template becomes one of each of its copies, all of them before what happened next.
		`CREATE TEMP TABLE numbers AS SELECT seq, CAST(SUM(n) OVER (ORDER BY seq) AS BIGINT) - n AS base FROM
			(SELECT e.seq, CASE WHEN COUNT(c.tpl) = 0 THEN 1 ELSE COUNT(c.tpl) END AS n FROM events AS e LEFT JOIN clones AS c ON c.tpl = e.server_id GROUP BY e.seq) AS x`,
		`CREATE INDEX numbers_seq ON numbers (seq)`)
	if err := m.all(ctx, statements); err != nil {
		return err
	}
	var inserts []string
	for _, c := range copies {
		columns, err := columnsOf(ctx, m.db, c.table, m.postgres)
		if err != nil {
			return err
		}
		aside, insert := m.insert(c.table, c.mine, columns)
		if err := m.all(ctx, []string{aside}); err != nil {
			return err
		}
		inserts = append(inserts, insert)
	}
	indexes, err := m.indexes(ctx)
	if err != nil {
		return err
	}
	if err := m.empty(ctx, indexes); err != nil {
		return err
	}
	for _, statement := range append(inserts, `UPDATE counters SET value = (SELECT MAX(seq) FROM events) WHERE name = 'event'`) {
		if err := m.all(ctx, []string{statement}); err != nil {
			return err
		}
	}
	for _, index := range indexes {
		if err := m.all(ctx, []string{index.make}); err != nil {
			return err
		}
	}
	return nil
}

// insert gives the statement that moves a table's rows aside and the one that makes those of all servers from them.
func (m multiplier) insert(table, mine string, columns []column) (aside, insert string) {
	order, number := "", "0"
	var names, from []string
	for _, col := range columns {
		names = append(names, col.name)
		switch {
		case col.name == "seq":
			order, number = " ORDER BY t.seq", "(SELECT base FROM numbers WHERE numbers.seq = t.seq)"
			from = append(from, "t.base + c.rank")
		case table == "servers" && col.name == "removed":
			number = "(SELECT base FROM numbers WHERE numbers.seq = t.removed)"
			from = append(from, "CASE WHEN t.removed = 0 THEN 0 ELSE t.base + c.rank END")
		case table == "deltas" && col.name == "silo":
			from = append(from, fmt.Sprintf("'silo-' || ((CAST(substr(t.silo, 6) AS BIGINT) + 7 * c.rank) %% %d)", fleetSilos))
		case col.text:
			from = append(from, fmt.Sprintf("replace(replace(t.%s, c.mark, c.code), c.title, c.name)", col.name))
		default:
			from = append(from, "t."+col.name)
		}
	}
	aside = fmt.Sprintf(`CREATE TEMP TABLE tpl_%s AS SELECT t.*, %s AS base, %s AS mine FROM %s AS t%s`, table, number, mine, table, order)
	join := "CROSS JOIN clones AS c WHERE c.tpl = t.mine" // in this order
	if m.postgres {
		join = "CROSS JOIN LATERAL (SELECT * FROM clones AS o WHERE o.tpl = t.mine ORDER BY o.rank OFFSET 0) AS c"
	}
	insert = fmt.Sprintf(`INSERT INTO %s (%s) SELECT %s FROM tpl_%s AS t %s`, table, strings.Join(names, ", "), strings.Join(from, ", "), table, join)
	if table == "events" { // those of no server
		plain := slices.Clone(names)
		plain[slices.Index(names, "seq")] = "t.base + 1"
		insert += fmt.Sprintf(`; INSERT INTO events (%s) SELECT %s FROM tpl_events AS t WHERE t.server_id = ''`, strings.Join(names, ", "), strings.Join(plain, ", "))
	}
	return aside, insert
}

// empty takes the templates' rows and the indexes away. PostgreSQL need not log what is then written in the same transaction.
func (m multiplier) empty(ctx context.Context, indexes []index) error {
	var statements, tables []string
	for _, i := range indexes {
		statements = append(statements, "DROP INDEX "+i.name)
	}
	for _, c := range slices.Backward(copies) {
		tables = append(tables, c.table)
		if !m.postgres {
			statements = append(statements, "DELETE FROM "+c.table)
		}
	}
	if m.postgres {
		statements = append(statements, "TRUNCATE "+strings.Join(tables, ", "))
	}
	return m.all(ctx, statements)
}

// index is one that was made by a statement of its own.
type index struct{ name, make string }

func (m multiplier) indexes(ctx context.Context) (out []index, err error) {
	query := `SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL`
	if m.postgres {
		query = `SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND indexname NOT IN (SELECT conname FROM pg_constraint)`
	}
	rows, err := m.db.QueryContext(ctx, query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var i index
		if err := rows.Scan(&i.name, &i.make); err != nil {
			return nil, err
		}
		out = append(out, i)
	}
	return out, rows.Err()
}

// clones gives the statements that write down who is a copy of which template. What a server is called and what its identifiers are
// has nothing to do with each other, nor with how it lives.
func (f fleet) clones() (statements []string) {
	of := map[string][]*template{}
	for _, t := range f.templates() {
		of[t.name] = append(of[t.name], t)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	names := rng.Perm(f.servers)
	ranks := map[int]int{}
	var rows []string
	for n := range f.servers {
		life, share := lives[0], n%1000
		for _, l := range lives {
			if share < l.thousand {
				life = l
				break
			}
			share -= l.thousand
		}
		t := of[life.name][rng.IntN(len(of[life.name]))]
		ranks[t.i]++
		rows = append(rows, fmt.Sprintf("('srv-%s', %d, '%s', '%08x', '%s', '%08d')", mark(t.i), ranks[t.i], mark(t.i), uint32(n)*2654435761, title(t.i), names[n]))
	}
	for chunk := range slices.Chunk(rows, 500) {
		statements = append(statements, "INSERT INTO clones VALUES "+strings.Join(chunk, ", "))
	}
	return statements
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
