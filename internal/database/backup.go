package database

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
)

// Part is what of a PostgreSQL database belongs into a backup: all tables of a schema, "" for where tables are made, but
// some.
type Part struct {
	Schema string
	Except []string
}

// Backup writes a copy of a database, as it is at one instant, into a SQLite file that is not there yet, and checks it.
// Others may use the database meanwhile. Of a SQLite file it is that file; of a PostgreSQL database each table of parts is a
// table of the name SCHEMA.TABLE with values as text, for Restore.
func Backup(ctx context.Context, dsn, file string, parts []Part) error {
	if _, err := os.Lstat(file); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("copy database: %s is there already", file)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600) // the owner's alone from the beginning
	if err != nil {
		return fmt.Errorf("copy database: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("copy database: %w", err)
	}
	if IsPostgres(dsn) {
		err = backupPostgres(ctx, dsn, file, parts)
	} else {
		err = backupSQLite(ctx, dsn, file)
	}
	if err == nil {
		err = Check(ctx, file)
	}
	if err != nil {
		return fmt.Errorf("copy database: %w", err)
	}
	return nil
}

func backupSQLite(ctx context.Context, path, file string) error {
	if _, err := os.Stat(path); err != nil {
		return err
	}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: path, RawQuery: "_pragma=busy_timeout(10000)"}).String())
	if err != nil {
		return err
	}
	defer db.Close()
	_, err = db.ExecContext(ctx, `VACUUM INTO ?`, file) // into an empty file it may
	return err
}

// Check reads a SQLite file to the end and says whether it is whole.
func Check(ctx context.Context, file string) error {
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: file, RawQuery: "mode=ro"}).String())
	if err != nil {
		return err
	}
	defer db.Close()
	var said string
	if err := db.QueryRowContext(ctx, `PRAGMA integrity_check`).Scan(&said); err != nil {
		return fmt.Errorf("check %s: %w", file, err)
	}
	if said != "ok" {
		return fmt.Errorf("check %s: %s", file, said)
	}
	return nil
}

// plain opens a SQLite file without a log beside it: it is to be one file.
func plain(file string) (*sql.DB, error) {
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: file, RawQuery: "_pragma=journal_mode(DELETE)"}).String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	return db, nil
}

func backupPostgres(ctx context.Context, dsn, file string, parts []Part) error {
	source, err := sql.Open("pgx", dsn)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := plain(file)
	if err != nil {
		return err
	}
	defer target.Close()
	reading, err := source.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
	if err != nil {
		return err
	}
	defer func() { _ = reading.Rollback() }()
	writing, err := target.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = writing.Rollback() }()
	from, to := Side{reading, true}, Side{writing, false}
	tables, err := partTables(ctx, from, parts)
	if err != nil {
		return err
	}
	for _, table := range tables {
		columns, err := Columns(ctx, from, table)
		if err != nil {
			return err
		}
		if _, err := writing.ExecContext(ctx, "CREATE TABLE "+quoted(table, false)+" ("+names(columns)+")"); err != nil {
			return err
		}
	}
	if _, err := Copy(ctx, from, to, tables, nil); err != nil {
		return err
	}
	return writing.Commit()
}

// partTables lists what belongs to parts, each with its schema, those first that others refer to.
func partTables(ctx context.Context, side Side, parts []Part) ([]string, error) {
	var out []string
	for _, p := range parts {
		schema := p.Schema
		if schema == "" {
			names, err := pairs(ctx, side, `SELECT current_schema()`, nil, 1)
			if err != nil {
				return nil, err
			}
			schema = names[0][0]
		}
		tables, err := Tables(ctx, side, schema)
		if err != nil {
			return nil, err
		}
		for _, table := range tables {
			if !contains(p.Except, table) {
				out = append(out, schema+"."+table)
			}
		}
	}
	return out, nil
}

func contains(list []string, s string) bool {
	for _, other := range list {
		if other == s {
			return true
		}
	}
	return false
}

// Restore puts a file that Backup made of a PostgreSQL database back into one with the same tables, in place of the few
// rows with which they are made: all of it, compared row by row, or nothing.
func Restore(ctx context.Context, file, dsn string, parts []Part, progress func(t Table)) error {
	if err := restore(ctx, file, dsn, parts, progress); err != nil {
		return fmt.Errorf("put database back: %w", err)
	}
	return nil
}

func restore(ctx context.Context, file, dsn string, parts []Part, progress func(t Table)) error {
	source, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: file, RawQuery: "mode=ro"}).String())
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := sql.Open("pgx", dsn)
	if err != nil {
		return err
	}
	defer target.Close()
	writing, err := target.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = writing.Rollback() }()
	from, to := Side{source, false}, Side{writing, true}
	there, err := partTables(ctx, to, parts)
	if err != nil {
		return err
	}
	kept, err := Tables(ctx, from, "")
	if err != nil {
		return err
	}
	var tables []string
	for _, table := range there {
		if contains(kept, table) {
			tables = append(tables, table)
		}
	}
	if len(tables) != len(kept) {
		return fmt.Errorf("the copy has the tables %s, and there are %s: it comes of a newer release", strings.Join(kept, ", "), strings.Join(there, ", "))
	}
	for i := len(tables) - 1; i >= 0; i-- { // the other way round: nothing may refer to what goes
		if _, err := writing.ExecContext(ctx, "DELETE FROM "+quoted(tables[i], true)); err != nil {
			return err
		}
	}
	if _, err := Copy(ctx, from, to, tables, progress); err != nil {
		return err
	}
	return writing.Commit()
}
