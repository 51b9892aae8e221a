package guest

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/musterdr/muster/internal/dr"
)

// AskAs is the only argument with which the agent starts itself: to ask a database as the operating system's user that
// the check names, where the server looks who is on the other end of its socket. It reads a check from standard input
// and writes one JSON object to standard output.
const AskAs = "ask-as"

// The sockets used where a check names no address.
const (
	postgresSocket = "/var/run/postgresql"
	mysqlSocket    = "/var/run/mysqld"
)

type asked struct {
	Value string `json:"value"`
	Error string `json:"error,omitempty"`
}

// askSQL asks a database and compares the first value of its answer.
func askSQL(ctx context.Context, c dr.Check) (string, error) {
	re, err := regexp.Compile(c.Expect)
	if err != nil {
		return "", fmt.Errorf("read pattern: %w", err)
	}
	var value string
	if as := credential(c); as != nil {
		value, err = queryAs(ctx, c, as)
	} else {
		value, err = query(ctx, c)
	}
	if err != nil {
		return "", err
	}
	if !re.MatchString(value) {
		return "", fmt.Errorf("the first value does not match %q: %q", c.Expect, excerpt([]byte(value)))
	}
	return fmt.Sprintf("%q", excerpt([]byte(value))), nil
}

// credential gives the user of the operating system as whom a database on a local socket is asked, nil for ourselves.
func credential(c dr.Check) *syscall.Credential {
	if c.User == "" || !local(c) || os.Geteuid() != 0 {
		return nil
	}
	u, err := user.Lookup(c.User)
	if err != nil {
		return nil // a user of the database only
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err1 != nil || err2 != nil || uid == 0 {
		return nil
	}
	as := &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	groups, _ := u.GroupIds() // without them a socket that only a group may use is refused, and the answer says so
	for _, g := range groups {
		if id, err := strconv.ParseUint(g, 10, 32); err == nil {
			as.Groups = append(as.Groups, uint32(id))
		}
	}
	return as
}

func local(c dr.Check) bool { return c.Address == "" || strings.HasPrefix(c.Address, "/") }

// queryAs asks in a child of ourselves that runs as another user.
func queryAs(ctx context.Context, c dr.Check, as *syscall.Credential) (string, error) {
	in, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("encode check: %w", err)
	}
	out, exit, err := run(ctx, []string{"/proc/self/exe", AskAs}, as, bytes.NewReader(in))
	if err != nil {
		return "", fmt.Errorf("ask as user %s: %w", c.User, err)
	}
	var answer asked
	if err := json.Unmarshal(out, &answer); err != nil {
		return "", fmt.Errorf("ask as user %s: exit code %d: %s", c.User, exit, excerpt(out))
	}
	if answer.Error != "" {
		return "", errors.New(answer.Error)
	}
	return answer.Value, nil
}

// AnswerAs is the other end of AskAs: what the child does with its standard input, and writes to its standard output.
func AnswerAs(ctx context.Context, in []byte) []byte {
	var c dr.Check
	err := json.Unmarshal(in, &c)
	var answer asked
	if err == nil {
		answer.Value, err = query(ctx, c)
	}
	if err != nil {
		answer = asked{Error: err.Error()}
	}
	out, _ := json.Marshal(answer) // two strings
	return out
}

// query asks a database for the first value of the first row, as text. The session is read-only: the machine may be
// the recovered server itself.
func query(ctx context.Context, c dr.Check) (string, error) {
	if c.Kind == dr.CheckMySQL {
		return queryMySQL(ctx, c)
	}
	return queryPostgres(ctx, c)
}

func queryPostgres(ctx context.Context, c dr.Check) (string, error) {
	host, port, err := postgresAddress(c.Address)
	if err != nil {
		return "", err
	}
	quoted := strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(host)
	config, err := pgconn.ParseConfig(fmt.Sprintf("host='%s' port=%d sslmode=prefer connect_timeout=10", quoted, port))
	if err != nil {
		return "", fmt.Errorf("set up PostgreSQL: %w", err)
	}
	config.User, config.Password, config.Database = c.User, c.Password, c.Database
	if config.User == "" {
		config.User = "postgres"
	}
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		return "", fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "SET default_transaction_read_only = on").ReadAll(); err != nil {
		return "", fmt.Errorf("make the session read-only: %w", err)
	}
	results := conn.Exec(ctx, c.Query)
	for results.NextResult() {
		if rows := results.ResultReader(); rows.NextRow() {
			if values := rows.Values(); len(values) > 0 {
				return string(values[0]), nil // closing the connection abandons the rest
			}
		}
	}
	if err := results.Close(); err != nil {
		return "", fmt.Errorf("query: %w", err)
	}
	return "", errors.New("the query answered no row")
}

// postgresAddress reads HOST:PORT or the folder of a socket.
func postgresAddress(address string) (string, uint16, error) {
	if address == "" {
		address = postgresSocket
	}
	if strings.HasPrefix(address, "/") {
		return socketIn(address)
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return address, 5432, nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("read address %q: %q is not a port", address, port)
	}
	return host, uint16(n), nil
}

// socketIn finds the socket of the only server in a folder, the standard port's if there are several.
func socketIn(folder string) (string, uint16, error) {
	if exists(filepath.Join(folder, ".s.PGSQL.5432")) {
		return folder, 5432, nil
	}
	found, _ := filepath.Glob(filepath.Join(folder, ".s.PGSQL.*"))
	for _, path := range found {
		if n, err := strconv.ParseUint(strings.TrimPrefix(filepath.Base(path), ".s.PGSQL."), 10, 16); err == nil {
			return folder, uint16(n), nil
		}
	}
	return "", 0, fmt.Errorf("connect to PostgreSQL: no server's socket is in %s", folder)
}

func queryMySQL(ctx context.Context, c dr.Check) (string, error) {
	config := mysql.NewConfig()
	config.User, config.Passwd, config.DBName = c.User, c.Password, c.Database
	config.Net, config.Addr = "tcp", c.Address
	config.AllowNativePasswords = true
	config.TLSConfig = "preferred"
	config.Logger = silent{}
	if config.User == "" {
		config.User = "root"
	}
	if local(c) {
		path, err := mysqlPath(c.Address)
		if err != nil {
			return "", err
		}
		config.Net, config.Addr, config.TLSConfig = "unix", path, ""
	} else if _, _, err := net.SplitHostPort(c.Address); err != nil {
		config.Addr = net.JoinHostPort(c.Address, "3306")
	}
	connector, err := mysql.NewConnector(config)
	if err != nil {
		return "", fmt.Errorf("set up MySQL: %w", err)
	}
	db := sql.OpenDB(connector)
	defer db.Close()
	conn, err := db.Conn(ctx)
	if err != nil {
		return "", fmt.Errorf("connect to MySQL: %w", err)
	}
	defer conn.Close()
	if _, err := conn.ExecContext(ctx, "SET SESSION TRANSACTION READ ONLY"); err != nil {
		return "", fmt.Errorf("make the session read-only: %w", err)
	}
	rows, err := conn.QueryContext(ctx, c.Query)
	if err != nil {
		return "", fmt.Errorf("query: %w", err)
	}
	defer rows.Close()
	return firstValue(rows)
}

func firstValue(rows *sql.Rows) (string, error) {
	columns, err := rows.Columns()
	if err != nil {
		return "", fmt.Errorf("query: %w", err)
	}
	if !rows.Next() || len(columns) == 0 {
		return "", errors.Join(errors.New("the query answered no row"), rows.Err())
	}
	values := make([]any, len(columns))
	var first sql.NullString
	values[0] = &first
	for i := range values[1:] {
		values[i+1] = new(sql.RawBytes)
	}
	if err := rows.Scan(values...); err != nil {
		return "", fmt.Errorf("query: %w", err)
	}
	return first.String, nil
}

// mysqlPath finds the socket: the path itself, or the one in that folder.
func mysqlPath(address string) (string, error) {
	if address == "" {
		address = mysqlSocket
	}
	info, err := os.Stat(address)
	if err != nil {
		return "", fmt.Errorf("connect to MySQL: %w", err)
	}
	if !info.IsDir() {
		return address, nil
	}
	for _, name := range []string{"mysqld.sock", "mysql.sock", "mariadb.sock"} {
		if path := filepath.Join(address, name); exists(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("connect to MySQL: no server's socket is in %s", address)
}

// silent takes the driver's log: what matters is in its errors.
type silent struct{}

func (silent) Print(...any) {}
