// Package database opens the two databases in which Muster keeps what it must not forget: a SQLite file, which one process
// has, or a PostgreSQL database, which several masters share.
//
//	DSN        where it is: the path of a SQLite file, or a postgres:// URL
//	Exclusive  of all processes that use a PostgreSQL database one does something: bring tables up to date, for example
//	Transient  an error that is the connection's or the server's, and may be gone at the next attempt
//
// Connections go to PostgreSQL itself, not to a pooler that shares sessions: locks and fencing belong to sessions.
//
// Knows: how to open them safely, what may be tried again.
// Must not know: what is kept in them.
package database

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	_ "modernc.org/sqlite"             // the driver "sqlite"
)

// IsPostgres says whether a DSN is of a PostgreSQL database; otherwise it is the path of a SQLite file.
func IsPostgres(dsn string) bool {
	return strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://")
}

// Hidden is a DSN without its password, for people and logs.
func Hidden(dsn string) string {
	if !IsPostgres(dsn) {
		return dsn
	}
	u, err := url.Parse(dsn)
	if err != nil {
		return "postgres://…"
	}
	query := u.Query()
	if query.Has("password") {
		query.Set("password", "xxxxx")
		u.RawQuery = query.Encode()
	}
	return u.Redacted()
}

// SQLite opens a file and makes it, the owner's alone, if there is none. Without these options most contended
// transactions fail, and a power cut may take what was said to be kept (synchronous=FULL).
func SQLite(path string) (*sql.DB, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	// What SQLite puts beside the file takes after it.
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := file.Close(); err != nil {
		return nil, err
	}
	options := "_txlock=immediate&_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)" +
		"&_pragma=foreign_keys(1)&_pragma=synchronous(FULL)"
	return sql.Open("sqlite", (&url.URL{Scheme: "file", Path: path, RawQuery: options}).String())
}

// Limits of Exclusive.
const (
	exclusiveEvery = 50 * time.Millisecond
	exclusiveLimit = 2 * time.Minute
)

// Exclusive does something in a PostgreSQL database that no other process does meanwhile under the same number. If this
// process dies, the next one may.
func Exclusive(ctx context.Context, dsn string, number int64, do func(ctx context.Context, conn *pgx.Conn) error) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return fmt.Errorf("reach PostgreSQL: %w", err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // and gives the lock back
	// Asked again and again: a session that waits within a statement would keep CREATE INDEX CONCURRENTLY, which the
	// holder may be at, waiting for it.
	limited, cancel := context.WithTimeout(ctx, exclusiveLimit)
	defer cancel()
	tick := time.NewTicker(exclusiveEvery)
	defer tick.Stop()
	for {
		var held bool
		if err := conn.QueryRow(limited, "SELECT pg_try_advisory_lock($1)", number).Scan(&held); err != nil {
			return fmt.Errorf("wait for other processes: %w", err)
		}
		if held {
			return do(ctx, conn)
		}
		select {
		case <-tick.C:
		case <-limited.Done():
			return fmt.Errorf("wait for another process that prepares the database: %w", limited.Err())
		}
	}
}

// Transient says whether an error is of a connection or of a server that is restarted, so that the same may be tried
// again on another connection.
func Transient(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	var server *pgconn.PgError
	if errors.As(err, &server) {
		switch {
		case strings.HasPrefix(server.Code, "08"), // connection
			strings.HasPrefix(server.Code, "57P"), // shut down, starting up, terminated
			server.Code == "53300",                // too many connections
			server.Code == "40001", server.Code == "40P01":
			return true
		}
		return false
	}
	var connect *pgconn.ConnectError
	var network net.Error
	return errors.As(err, &connect) || errors.As(err, &network) || pgconn.SafeToRetry(err) || errors.Is(err, driver.ErrBadConn) ||
		errors.Is(err, sql.ErrConnDone) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}
