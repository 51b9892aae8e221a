package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
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
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/master"
)

// statusLimit is how many milliseconds a status page, or a tick's questions, may take.
const statusLimit = 50

// statusPage is how many servers a page of the status shows.
const statusPage = 100

// asked is how often each question is asked.
const asked = 100

// catalogAtScale measures what people and the scheduler ask of a catalog of many servers and snapshots, on both databases.
func catalogAtScale(ctx context.Context, b *bench) ([]Row, error) {
	f := fleet{servers: b.servers, snapshots: b.history, now: time.Now().Truncate(time.Second)}
	dir, err := b.fresh("catalog")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "catalog.db")
	rows, err := f.measure(ctx, "SQLite", file, filepath.Join(dir, "engine.db"))
	if err != nil {
		return rows, fmt.Errorf("SQLite: %w", err)
	}
	for _, name := range []string{file, file + "-wal"} { // room for the other
		_ = os.Remove(name)
	}
	server, err := pgserver.Start(ctx, pgserver.Config{Parent: dir, Hasty: true})
	if errors.Is(err, pgserver.ErrNotInstalled) {
		fmt.Fprintln(os.Stderr, "NOT measured: the catalog on PostgreSQL, which is not installed (apt-get install postgresql)")
		return rows, nil
	}
	if err != nil {
		return rows, err
	}
	defer server.Stop()
	var dsn [2]string
	for i := range dsn {
		if dsn[i], err = server.Database(ctx); err != nil {
			return rows, err
		}
	}
	more, err := f.measure(ctx, "PostgreSQL", dsn[0], dsn[1])
	if err != nil {
		err = fmt.Errorf("PostgreSQL: %w", err)
	}
	return append(rows, more...), err
}

// measure fills a catalog and asks it.
func (f fleet) measure(ctx context.Context, database, dsn, runs string) ([]Row, error) {
	start := time.Now()
	if err := f.fill(ctx, dsn); err != nil {
		return nil, err
	}
	fmt.Fprintf(os.Stderr, "%s: filled in %s\n", database, time.Since(start).Round(time.Second))
	c, err := catalog.Open(ctx, dsn)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	quiet := slog.New(slog.DiscardHandler)
	e, err := engine.Open(ctx, engine.Config{DSN: runs, Version: "bench", Logger: quiet})
	if err != nil {
		return nil, err
	}
	defer e.Close(ctx)
	m := master.Open(master.Config{Catalog: c, Engine: e, Log: quiet})
	if err := f.work(ctx, e, runs); err != nil {
		return nil, err
	}
	return f.ask(ctx, database, m)
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

// fill makes the fleet in an empty database.
func (f fleet) fill(ctx context.Context, dsn string) error {
	postgres := strings.HasPrefix(dsn, "postgres://")
	hurried := dsn
	if postgres {
		hurried += "&synchronous_commit=off"
	}
	c, err := catalog.Open(ctx, hurried)
	if err != nil {
		return err
	}
	err = f.live(ctx, c)
	if cerr := c.Close(); err != nil || cerr != nil {
		return errors.Join(err, cerr)
	}
	// What is made here is only measured: nothing need be durable, and nothing refers to what is not there.
	driver, address := "pgx", dsn
	before := []string{"SET synchronous_commit = off", "SET session_replication_role = replica", "BEGIN"}
	after := []string{"COMMIT", "VACUUM ANALYZE"} // as the server does by itself, some minutes later
	if !postgres {
		driver, address = "sqlite", (&url.URL{Scheme: "file", Path: dsn}).String()
		before = []string{"PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", "PRAGMA cache_size = -1000000", "PRAGMA temp_store = MEMORY", "BEGIN"}
		after = []string{"COMMIT"}
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
	for _, statement := range before {
		if _, err := conn.ExecContext(ctx, statement); err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	if err := f.multiply(ctx, conn, postgres); err != nil {
		return err
	}
	for _, statement := range after {
		if _, err := conn.ExecContext(ctx, statement); err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	return nil
}

// question is something that is asked of a catalog; it says how much it was told.
type question struct {
	name string
	ask  func() (int, error)
}

func (f fleet) ask(ctx context.Context, database string, m *master.Master) ([]Row, error) {
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
	tick := []question{
		{"what is due", func() (int, error) {
			due, err := m.Catalog.Due(ctx, f.now, nil)
			return len(due), err
		}},
		{"tests overdue", func() (int, error) {
			late, err := m.Catalog.TestsOverdue(ctx, f.now, master.DefaultGrace)
			return len(late), err
		}},
		{"invocations", func() (int, error) {
			list, err := m.Invocations(ctx, false)
			return len(list), err
		}},
		{"what is under way", func() (int, error) {
			list, err := m.Engine.List(ctx, engine.Filter{Unfinished: true, Limit: f.servers})
			return len(list), err
		}},
	}
	others := []question{
		{"server show", func() (int, error) { _, err := m.Server(ctx, anyone()); return 1, err }},
		{"operations", func() (int, error) { list, err := m.Operations(ctx); return len(list), err }},
		{"snapshots of one", func() (int, error) {
			list, err := m.Snapshots(ctx, anyone())
			return len(list), err
		}},
		{"open tickets", func() (int, error) { list, err := m.Tickets(ctx, false); return len(list), err }},
		{"events", func() (int, error) {
			list, err := m.Events(ctx, spread*rng.Int64N(100), api.MaxEvents, "")
			return len(list), err
		}},
		{"events of one", func() (int, error) {
			list, err := m.Events(ctx, 0, api.MaxEvents, anyone())
			return len(list), err
		}},
	}
	status, _, figures, err := clocked([]question{page})
	if err != nil {
		return nil, err
	}
	sum, _, tickFigures, err := clocked(tick)
	if err != nil {
		return nil, err
	}
	_, slowest, otherFigures, err := clocked(others)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	all, err := api.AllServers(ctx, m)
	if err != nil {
		return nil, err
	}
	whole := fmt.Sprintf("all %d servers, %d a page: %d ms", len(all), api.MaxServers, time.Since(start).Milliseconds())
	return []Row{
		lower("status page, "+database, status, statusLimit,
			fmt.Sprintf("milliseconds, the 95th of a hundred, for a page of %d servers at random with newest, last-known-good, due, tickets and what is under way, as JSON; %s", statusPage, size),
			figures+"; "+whole),
		lower("tick, "+database, sum, statusLimit, "milliseconds, sum of 95ths, for what the scheduler asks every few seconds; "+size, tickFigures),
		lower("slowest other question, "+database, slowest, statusLimit, "milliseconds, the 95th of a hundred; "+size, otherFigures),
	}, nil
}

// clocked asks each question many times, and gives the sum of the 95th percentiles in milliseconds, the greatest, and figures.
func clocked(questions []question) (sum, greatest float64, figures string, err error) {
	var parts []string
	for _, q := range questions {
		var took []float64
		told := 0
		for range asked {
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
