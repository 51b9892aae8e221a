package database

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Querier is a database, a connection or a transaction.
type Querier interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// Side is one end of a copy. Values travel as text, which both databases read back as what it was.
type Side struct {
	Querier
	Postgres bool
}

// Table is a table that was copied.
type Table struct {
	Name string `json:"name"`
	Rows int64  `json:"rows"`
	sum  [4]uint64
}

// Same says whether two tables hold the same rows, in whatever order.
func (t Table) Same(other Table) bool { return t.Rows == other.Rows && t.sum == other.sum }

// copyBatch is how many rows are written with one statement; SQLite takes at most 32,766 values.
const copyBatch = 100

// Copy copies tables, one after another, into tables of the same names and columns that are empty, then reads both sides
// and compares them row by row. to is a transaction, which the caller commits if there is no error. Progress may be nil.
func Copy(ctx context.Context, from, to Side, tables []string, progress func(t Table)) ([]Table, error) {
	var out []Table
	for _, name := range tables {
		columns, err := common(ctx, from, to, name)
		if err != nil {
			return nil, err
		}
		if err := copyRows(ctx, from, to, name, columns); err != nil {
			return nil, fmt.Errorf("copy table %s: %w", name, err)
		}
		before, err := Sum(ctx, from, name, columns)
		if err != nil {
			return nil, err
		}
		after, err := Sum(ctx, to, name, columns)
		if err != nil {
			return nil, err
		}
		if !before.Same(after) {
			return nil, fmt.Errorf("table %s did not arrive as it was: %d rows there, %d here", name, before.Rows, after.Rows)
		}
		if progress != nil {
			progress(after)
		}
		out = append(out, after)
	}
	return out, nil
}

// common gives the columns that are copied: all of the source's. A newer release may have more.
func common(ctx context.Context, from, to Side, table string) ([]Column, error) {
	source, err := Columns(ctx, from, table)
	if err != nil {
		return nil, err
	}
	target, err := Columns(ctx, to, table)
	if err != nil {
		return nil, err
	}
	var out []Column
	for _, c := range source {
		i := slices.IndexFunc(target, func(t Column) bool { return t.Name == c.Name })
		if i < 0 {
			return nil, fmt.Errorf("table %s has no column %s here: it comes of a newer release", table, c.Name)
		}
		out = append(out, target[i])
	}
	return out, nil
}

func copyRows(ctx context.Context, from, to Side, table string, columns []Column) error {
	var batch []any
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := insert(ctx, to, table, columns, batch)
		batch = batch[:0]
		return err
	}
	err := eachRow(ctx, from, table, columns, func(row []sql.NullString) error {
		for _, v := range row {
			if v.Valid {
				batch = append(batch, v.String)
			} else {
				batch = append(batch, nil)
			}
		}
		if len(batch) < copyBatch*len(columns) {
			return nil
		}
		return flush()
	})
	if err != nil {
		return err
	}
	return flush()
}

func insert(ctx context.Context, to Side, table string, columns []Column, values []any) error {
	var q strings.Builder
	fmt.Fprintf(&q, "INSERT INTO %s (%s) VALUES ", quoted(table, to.Postgres), names(columns))
	for i := range values {
		switch i % len(columns) {
		case 0:
			if i > 0 {
				q.WriteString("), ")
			}
			q.WriteString("(")
		default:
			q.WriteString(", ")
		}
		if to.Postgres {
			fmt.Fprintf(&q, "CAST($%d::text AS %s)", i+1, columns[i%len(columns)].Type)
		} else {
			fmt.Fprintf(&q, "?%d", i+1)
		}
	}
	q.WriteString(")")
	_, err := to.ExecContext(ctx, q.String(), values...)
	return err
}

// Sum counts the rows of a table and adds up what is in them.
func Sum(ctx context.Context, side Side, table string, columns []Column) (Table, error) {
	t := Table{Name: table}
	err := eachRow(ctx, side, table, columns, func(row []sql.NullString) error {
		t.Rows++
		h := sha256.New()
		var head [9]byte
		for _, v := range row {
			head[0] = 0
			if v.Valid {
				head[0] = 1
			}
			binary.BigEndian.PutUint64(head[1:], uint64(len(v.String)))
			h.Write(head[:])
			h.Write([]byte(v.String))
		}
		sum := h.Sum(nil)
		for i := range t.sum {
			t.sum[i] += binary.BigEndian.Uint64(sum[8*i:])
		}
		return nil
	})
	if err != nil {
		return t, fmt.Errorf("read table %s: %w", table, err)
	}
	return t, nil
}

// eachRow reads a table, values as text.
func eachRow(ctx context.Context, side Side, table string, columns []Column, row func(row []sql.NullString) error) error {
	texts := make([]string, len(columns))
	for i, c := range columns {
		texts[i] = "CAST(" + quote(c.Name) + " AS TEXT)"
	}
	rows, err := side.QueryContext(ctx, "SELECT "+strings.Join(texts, ", ")+" FROM "+quoted(table, side.Postgres))
	if err != nil {
		return err
	}
	defer rows.Close()
	values := make([]sql.NullString, len(columns))
	into := make([]any, len(columns))
	for i := range values {
		into[i] = &values[i]
	}
	for rows.Next() {
		if err := rows.Scan(into...); err != nil {
			return err
		}
		if err := row(values); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Column is a column of a table, with its type as the database calls it.
type Column struct{ Name, Type string }

// Columns lists the columns of a table in the order of their names.
func Columns(ctx context.Context, side Side, table string) ([]Column, error) {
	query := `SELECT name, type FROM pragma_table_info(?1) ORDER BY name`
	if side.Postgres {
		query = `SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
			WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attname COLLATE "C"`
		table = quoted(table, true)
	}
	rows, err := side.QueryContext(ctx, query, table)
	if err != nil {
		return nil, fmt.Errorf("read the columns of table %s: %w", table, err)
	}
	defer rows.Close()
	var out []Column
	for rows.Next() {
		var c Column
		if err := rows.Scan(&c.Name, &c.Type); err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("there is no table %s: it was made by another release", table)
	}
	return out, nil
}

// Tables lists the tables of a database, those first that others refer to; of a PostgreSQL database, those of one schema,
// "" for where tables are made.
func Tables(ctx context.Context, side Side, schema string) ([]string, error) {
	all := `SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name`
	references := `SELECT m.name, f."table" FROM sqlite_master m, pragma_foreign_key_list(m.name) f WHERE m.type = 'table'`
	var args []any
	if side.Postgres {
		all = `SELECT tablename FROM pg_tables WHERE schemaname = COALESCE(NULLIF($1, ''), current_schema()) ORDER BY tablename`
		references = `SELECT c.relname, p.relname FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_class p ON p.oid = k.confrelid
			JOIN pg_namespace n ON n.oid = c.relnamespace WHERE k.contype = 'f' AND n.nspname = COALESCE(NULLIF($1, ''), current_schema())`
		args = []any{schema}
	}
	names, err := pairs(ctx, side, all, args, 1)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	refs, err := pairs(ctx, side, references, args, 2)
	if err != nil {
		return nil, fmt.Errorf("list what tables refer to: %w", err)
	}
	var out []string
	for len(out) < len(names) {
		before := len(out)
		for _, n := range names {
			waits := slices.ContainsFunc(refs, func(r [2]string) bool {
				return r[0] == n[0] && r[1] != n[0] && !slices.Contains(out, r[1])
			})
			if !waits && !slices.Contains(out, n[0]) {
				out = append(out, n[0])
			}
		}
		if len(out) == before {
			return nil, errors.New("list tables: they refer to each other in a circle")
		}
	}
	return out, nil
}

func pairs(ctx context.Context, side Side, query string, args []any, columns int) (out [][2]string, err error) {
	rows, err := side.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var p [2]string
		if err := rows.Scan([]any{&p[0], &p[1]}[:columns]...); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, rows.Err()
}

func quote(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// quoted is a table's name for a statement. On PostgreSQL it may have its schema before a dot.
func quoted(table string, postgres bool) string {
	if schema, name, ok := strings.Cut(table, "."); ok && postgres {
		return quote(schema) + "." + quote(name)
	}
	return quote(table)
}

func names(columns []Column) string {
	out := make([]string, len(columns))
	for i, c := range columns {
		out[i] = quote(c.Name)
	}
	return strings.Join(out, ", ")
}
