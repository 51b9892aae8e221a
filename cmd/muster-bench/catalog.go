package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	_ "modernc.org/sqlite"             // the driver "sqlite"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/database/pgserver"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/master"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// Limits, in milliseconds.
const (
	statusLimit = 50  // of a status page, a tick's questions, a promotion
	pageLimit   = 500 // of every other question
)

// statusPage is how many servers a page of the status shows.
const statusPage = 100

// How often each question is asked: what people and the scheduler ask, and what is asked now and then.
const (
	asked  = 100
	seldom = 5
)

// catalogAtScale measures what people and the scheduler ask of a catalog of many servers and snapshots, on both databases.
func catalogAtScale(ctx context.Context, b *bench) ([]Row, error) {
	f := fleet{servers: b.servers, snapshots: b.history, now: time.Now().Truncate(time.Second)}
	dir, err := b.fresh("catalog")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	rows, err := f.inFile(ctx, dir)
	if err != nil {
		return rows, fmt.Errorf("SQLite: %w", err)
	}
	more, err := f.inServer(ctx, dir)
	if errors.Is(err, pgserver.ErrNotInstalled) {
		fmt.Fprintln(os.Stderr, "NOT measured: the catalog on PostgreSQL, which is not installed (apt-get install postgresql)")
		return rows, nil
	}
	if err != nil {
		return rows, fmt.Errorf("PostgreSQL: %w", err)
	}
	return append(rows, more...), nil
}

// inFile measures a catalog on SQLite.
func (f fleet) inFile(ctx context.Context, dir string) ([]Row, error) {
	file := filepath.Join(dir, "catalog.db")
	defer func() { // room for the other
		for _, name := range []string{file, file + "-wal", file + "-shm"} {
			_ = os.Remove(name)
		}
	}()
	start := time.Now()
	if err := f.fill(ctx, file, dir); err != nil {
		return nil, err
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	return f.measure(ctx, full{"SQLite", file, filepath.Join(dir, "engine.db"), dir, info.Size(), time.Since(start)}, dir)
}

// inServer measures a catalog on a PostgreSQL with the settings of its packagers; only while it is filled it is in a hurry.
func (f fleet) inServer(ctx context.Context, dir string) ([]Row, error) {
	server, err := pgserver.Start(ctx, pgserver.Config{Parent: dir, Hasty: true})
	if err != nil {
		return nil, err
	}
	defer server.Stop()
	var dsn [2]string
	for i := range dsn {
		if dsn[i], err = server.Database(ctx); err != nil {
			return nil, err
		}
	}
	start := time.Now()
	if err := f.fill(ctx, dsn[0], dir); err != nil {
		return nil, err
	}
	if err := server.Settle(ctx); err != nil {
		return nil, err
	}
	filled := time.Since(start)
	db, err := sql.Open("pgx", dsn[0])
	if err != nil {
		return nil, err
	}
	defer db.Close()
	var size int64
	if err := db.QueryRowContext(ctx, `SELECT pg_database_size(current_database())`).Scan(&size); err != nil {
		return nil, err
	}
	return f.measure(ctx, full{"PostgreSQL", dsn[0], dsn[1], dir, size, filled}, dir)
}

// full is a catalog that was filled.
type full struct {
	database   string // which
	dsn, runs  string // of the catalog and of the engine
	folder     string // in which it is
	size       int64  // bytes
	filledTook time.Duration
}

// warm reads all that there is once: a catalog in use is in memory, as far as that goes.
func (f full) warm() error {
	return filepath.WalkDir(f.folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		_, err = io.Copy(io.Discard, file)
		return err
	})
}

// measure asks a catalog that was filled.
func (f fleet) measure(ctx context.Context, full full, dir string) ([]Row, error) {
	fmt.Fprintf(os.Stderr, "%s: filled in %s, %d MiB\n", full.database, full.filledTook.Round(time.Second), full.size>>20)
	c, err := catalog.Open(ctx, full.dsn)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	quiet := slog.New(slog.DiscardHandler)
	e, err := engine.Open(ctx, engine.Config{DSN: full.runs, Version: "bench", Logger: quiet})
	if err != nil {
		return nil, err
	}
	defer e.Close(ctx)
	driver := folder.Driver{Path: filepath.Join(dir, "store-"+full.database)}
	if err := store.Create(ctx, driver, "bench"); err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, driver, "bench")
	if err != nil {
		return nil, err
	}
	defer st.Close(ctx)
	if err := full.warm(); err != nil {
		return nil, err
	}
	m := master.Open(master.Config{Catalog: c, Engine: e, Store: st, Log: quiet})
	if err := f.work(ctx, e, full.runs); err != nil {
		return nil, err
	}
	return f.ask(ctx, full, m)
}

// Runs of the engine: those under way, and for how many days those that are over are remembered.
const (
	runsUnderWay = 200
	runsDays     = 30
)

// work has the engine carry out as many runs as there may be at night, and remember those of a month.
func (f fleet) work(ctx context.Context, e *engine.Engine, dsn string) error {
	engine.Register(e, "bench", func(r *engine.Run, wait bool) error {
		if wait {
			<-r.Context().Done()
		}
		return nil
	})
	if err := e.Launch(ctx); err != nil {
		return err
	}
	const over = "protect.host-over.snap"
	if err := engine.Start(ctx, e, "bench", over, false); err != nil {
		return err
	}
	if _, err := e.Wait(ctx, over); err != nil {
		return err
	}
	for i := range runsUnderWay {
		name := fmt.Sprintf("protect.host-%08d.snap", i)
		if err := engine.Start(ctx, e, "bench", name, true, engine.StartOptions{Key: name}); err != nil {
			return err
		}
	}
	postgres := strings.HasPrefix(dsn, "postgres://")
	driver, address, table := "pgx", dsn, "dbos.workflow_status"
	if !postgres {
		driver, address, table = "sqlite", (&url.URL{Scheme: "file", Path: dsn, RawQuery: "_pragma=busy_timeout(10000)"}).String(), "workflow_status"
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
	columns, err := columnsOf(ctx, conn, "workflow_status", postgres)
	if err != nil {
		return err
	}
	var into, from []string
	for _, c := range columns {
		into = append(into, c.name)
		switch c.name {
		case "workflow_uuid":
			from = append(from, "w.workflow_uuid || n.i")
		case "created_at", "updated_at", "completed_at", "started_at_epoch_ms": // in milliseconds
			from = append(from, fmt.Sprintf("w.%s - n.i * %d", c.name, runsDays*24*3600*1000/(f.servers*runsDays)))
		default:
			from = append(from, "w."+c.name)
		}
	}
	_, err = conn.ExecContext(ctx, fmt.Sprintf(`INSERT INTO %s (%s) WITH RECURSIVE n(i) AS (SELECT CAST(1 AS BIGINT) UNION ALL SELECT i + 1 FROM n WHERE i < %d) SELECT %s FROM %s AS w, n WHERE w.workflow_uuid = '%s'`,
		table, strings.Join(into, ", "), f.servers*runsDays, strings.Join(from, ", "), table, over))
	if err != nil {
		return fmt.Errorf("remember a month of runs: %w", err)
	}
	if postgres {
		_, err = conn.ExecContext(ctx, "ANALYZE "+table)
	}
	return err
}

// question is something that is asked of a catalog; it says how much it was told.
type question struct {
	name string
	ask  func() (int, error)
}

func (f fleet) ask(ctx context.Context, full full, m *master.Master) ([]Row, error) {
	servers, err := m.Catalog.Servers(ctx)
	if err != nil {
		return nil, err
	}
	size := fmt.Sprintf("%d protected servers, %d snapshots each, %d operations of a month, %d under way", len(servers), f.snapshots, f.servers*runsDays, runsUnderWay)
	rng := rand.New(rand.NewPCG(3, 4))
	anyone := func() string { return servers[rng.IntN(len(servers))].Name }
	page := question{"page", func() (int, error) {
		list, err := m.Servers(ctx, anyone(), statusPage)
		if err != nil {
			return 0, err
		}
		_, err = json.Marshal(list)
		return len(list), err
	}}
	status, _, figures, err := clocked(asked, page)
	if err != nil {
		return nil, err
	}
	sum, _, tickFigures, err := clocked(asked, f.tick(ctx, m)...)
	if err != nil {
		return nil, err
	}
	promote, err := f.promotions(ctx, m.Catalog, servers)
	if err != nil {
		return nil, err
	}
	promoted, _, promoteFigures, err := clocked(asked, question{"promotion", promote})
	if err != nil {
		return nil, err
	}
	_, slowest, otherFigures, err := clocked(asked, f.others(ctx, m, anyone, rng)...)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if _, err := m.Figures(ctx); err != nil { // the first counts everything that ever happened, as no process that is started does
		return nil, err
	}
	counted := fmt.Sprintf("; all that ever happened counted in %s", time.Since(start).Round(time.Millisecond))
	_, rare, rareFigures, err := clocked(seldom, f.rare(ctx, m)...)
	if err != nil {
		return nil, err
	}
	start = time.Now()
	all, err := api.AllServers(ctx, m)
	if err != nil {
		return nil, err
	}
	whole := fmt.Sprintf("all %d servers, %d a page: %d ms; %d MiB on disk, filled in %s", len(all), api.MaxServers, time.Since(start).Milliseconds(), full.size>>20, full.filledTook.Round(time.Second))
	return []Row{
		lower("status page, "+full.database, status, statusLimit,
			fmt.Sprintf("milliseconds, the 95th of a hundred, for a page of %d servers at random with newest, last-known-good, due, tickets and what is under way, as JSON; %s", statusPage, size),
			figures+"; "+whole),
		lower("tick, "+full.database, sum, statusLimit, "milliseconds, sum of 95ths, for what the scheduler asks every few seconds; "+size, tickFigures),
		lower("promotion, "+full.database, promoted, statusLimit, "milliseconds, the 95th of a hundred, for the transaction that records a verdict with which last-known-good moves, synced; "+size, promoteFigures),
		lower("slowest other page, "+full.database, slowest, pageLimit, "milliseconds, the 95th of a hundred; "+size, otherFigures),
		lower("slowest of what is asked seldom, "+full.database, rare, pageLimit, fmt.Sprintf("milliseconds, the slowest of %d, for a scrape of all metrics, for what customers had in a month, and for the last-known-goods to be spread, once a minute; %s", seldom, size), rareFigures+counted),
	}, nil
}

// tick is what the scheduler asks at each tick.
func (f fleet) tick(ctx context.Context, m *master.Master) []question {
	return []question{
		{"what is due", func() (int, error) {
			due, err := m.Catalog.Due(ctx, f.now, nil)
			return len(due), err
		}},
		{"tests to be held again", func() (int, error) {
			again, err := m.Catalog.Retests(ctx, f.now)
			return len(again), err
		}},
		{"tests overdue", func() (int, error) {
			late, err := m.Catalog.TestsOverdue(ctx, f.now, master.DefaultGrace)
			return len(late), err
		}},
		{"invocations", func() (int, error) {
			list, err := m.Invocations(ctx, false)
			return len(list), err
		}},
		{"silos", func() (int, error) {
			list, err := m.Catalog.Silos(ctx)
			return len(list), err
		}},
		{"leases", func() (int, error) {
			list, err := m.Catalog.Leases(ctx)
			return len(list), err
		}},
		{"what is under way", func() (int, error) {
			list, err := m.Engine.List(ctx, engine.Filter{Unfinished: true, Limit: f.servers})
			return len(list), err
		}},
	}
}

// others is what else people ask.
func (f fleet) others(ctx context.Context, m *master.Master, anyone func() string, rng *rand.Rand) []question {
	events := func(server string, after func() int64) func() (int, error) {
		return func() (int, error) {
			list, err := m.Events(ctx, after(), api.MaxEvents, server)
			return len(list), err
		}
	}
	last := func() int64 { seq, _ := m.Catalog.LastEvent(ctx); return rng.Int64N(max(seq, 1)) }
	return []question{
		{"server show", func() (int, error) { _, err := m.Server(ctx, anyone()); return 1, err }},
		{"first page", func() (int, error) { list, err := m.Servers(ctx, "", 0); return len(list), err }},
		{"operations", func() (int, error) { list, err := m.Operations(ctx); return len(list), err }},
		{"snapshots of one", func() (int, error) { list, err := m.Snapshots(ctx, anyone()); return len(list), err }},
		{"an appliance's hello", func() (int, error) {
			s, err := m.Catalog.Server(ctx, anyone())
			if err != nil || s.Appliance == "" {
				return 0, err
			}
			w, err := m.Hello(ctx, s.Appliance, api.Hello{Clock: f.now})
			return len(w.Servers), err
		}},
		{"one snapshot", func() (int, error) {
			s, err := m.Catalog.Standing(ctx, anyone())
			if err != nil || s.Newest == nil {
				return 0, err
			}
			_, err = m.Record(ctx, s.Newest.Snapshot.ID)
			return 1, err
		}},
		{"promotions of one", func() (int, error) { list, err := m.Promotions(ctx, anyone()); return len(list), err }},
		{"open tickets", func() (int, error) { list, err := m.Tickets(ctx, false); return len(list), err }},
		{"all tickets", func() (int, error) { list, err := m.Tickets(ctx, true); return len(list), err }},
		{"events", events("", last)},
		{"events of one", func() (int, error) { return events(anyone(), func() int64 { return 0 })() }},
		{"deltas by silo", func() (int, error) { list, err := m.Catalog.Held(ctx); return len(list), err }},
	}
}

// rare is what is asked now and then, of everything.
func (f fleet) rare(ctx context.Context, m *master.Master) []question {
	month := func(back int) func() (int, error) {
		return func() (int, error) {
			list, err := m.Meter(ctx, f.now.UTC().AddDate(0, -back, 1-f.now.UTC().Day()).Format("2006-01"), "")
			return len(list), err
		}
	}
	return []question{
		{"deltas that few hold", func() (int, error) { list, err := m.Catalog.Thin(ctx); return len(list), err }},
		{"what appliances bring", func() (int, error) {
			for n, after := 0, ""; ; {
				page, err := m.Catalog.Expected(ctx, after)
				if n += len(page); err != nil || len(page) < catalog.MaxList {
					return n, err
				}
				after = page[len(page)-1].Server.ID
			}
		}},
		{"figures", func() (int, error) { list, err := m.Figures(ctx); return len(list.Servers), err }},
		{"meter of this month", month(0)},
		{"meter of the last", month(1)},
	}
}

// promotions keeps a new snapshot of some servers and makes a rescue image of each. What it gives records that the next one has passed.
func (f fleet) promotions(ctx context.Context, c *catalog.Catalog, servers []dr.Server) (func() (int, error), error) {
	var passes []dr.Verdict
	l := lives[0]
	c.Now = func() time.Time { return f.now }
	for n := range min(asked, len(servers)) {
		s := l.snapshot(servers[n*len(servers)/asked], nil, 0, f.now)
		if err := c.RecordSnapshot(ctx, s); err != nil {
			return nil, err
		}
		pre := l.preRecovery(s)
		if err := c.RecordPreRecovery(ctx, pre); err != nil {
			return nil, err
		}
		passes = append(passes, l.verdict(s, pre, dr.Pass, f.now))
	}
	n := 0
	return func() (int, error) {
		judged, err := c.RecordVerdict(ctx, passes[n%len(passes)])
		n++
		if err == nil && !judged.Moved {
			err = errors.New("last-known-good did not move")
		}
		return 1, err
	}, nil
}

// clocked asks each question many times, and gives the sum of the 95th percentiles in milliseconds, the greatest, and figures.
func clocked(times int, questions ...question) (sum, greatest float64, figures string, err error) {
	var parts []string
	for _, q := range questions {
		var took []float64
		told := 0
		for range times {
			start := time.Now()
			n, err := q.ask()
			if err != nil {
				return 0, 0, "", fmt.Errorf("%s: %w", q.name, err)
			}
			took = append(took, float64(time.Since(start).Microseconds())/1000)
			told = n
		}
		first := took[0]
		slices.Sort(took)
		p95 := took[len(took)*95/100]
		sum, greatest = sum+p95, max(greatest, p95)
		parts = append(parts, fmt.Sprintf("%s (%d): median %.1f, 95th %.1f, worst %.1f, first %.1f ms", q.name, told, took[len(took)/2], p95, took[len(took)-1], first))
	}
	return sum, greatest, strings.Join(parts, "; "), nil
}
