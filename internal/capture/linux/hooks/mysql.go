package hooks

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// mysql is one MariaDB or MySQL server. InnoDB recovers from an instant by itself; other engines (MyISAM, Aria) are clean in it
// only if nobody wrote. MariaDB from 10.4 on is held by its backup stages, which wait for nobody who only reads. Others are held by
// FLUSH TABLES WITH READ LOCK.
type mysql struct {
	server  server
	talk    *session
	version string
	mariadb bool
	stages  bool   // it has backup stages
	id      string // of the connection
}

func (m *mysql) String() string {
	name := "MySQL"
	switch {
	case m.version == "":
		return m.server.String()
	case m.mariadb:
		name = "MariaDB"
	}
	number, _, _ := strings.Cut(m.version, "-")
	return fmt.Sprintf("%s %s at %s", name, number, m.server.socket)
}

// longQuery is how long a query may have been running for the tables not to be flushed: whoever wants to read a table that was
// flushed while a query reads it waits for that query, even after the flush was given up.
const longQuery = time.Second

func (m *mysql) begin(ctx context.Context, _ time.Duration) error {
	name, home, err := m.server.account()
	if err != nil {
		return err
	}
	program, err := m.server.client("mariadb", "mysql")
	if err != nil {
		return fmt.Errorf("%w: install mariadb-client or mysql-client", err)
	}
	args := []string{"--no-defaults", "--protocol=socket", "--socket=" + m.server.socket, "--user=" + name, "--batch", "--skip-column-names", "--unbuffered",
		"--force", "--skip-reconnect", "--no-auto-rehash", "--local-infile=0", "--connect-timeout=" + strconv.Itoa(int(connectLimit/time.Second))}
	if m.talk, err = dial(m.server, program, args, []string{"HOME=" + home}); err != nil {
		return err
	}
	answer, err := m.talk.ask(ctx, connectLimit, "SELECT CONCAT('"+done+" ', CONNECTION_ID(), ' ', VERSION());")
	if err == nil {
		for _, line := range answer {
			if f := strings.Fields(line); len(f) == 3 && f[0] == done {
				m.id, m.version = f[1], plain(f[2])
			}
		}
		if m.version == "" {
			err = trouble(answer)
		}
	}
	if err != nil {
		m.talk.close()
		m.talk = nil
		return fmt.Errorf("%w: it has to let the user %s in over its socket: %s", err, name, m.grant(name))
	}
	m.mariadb = strings.Contains(m.version, "MariaDB")
	m.stages = m.mariadb && atLeast(m.version, 10, 4)
	// A server that drops the idle would drop the lock. Old ones do not know all of these.
	_, err = m.talk.ask(ctx, connectLimit, "SET SESSION wait_timeout = 86400; SET SESSION max_statement_time = 0;")
	return err
}

func (m *mysql) grant(name string) string {
	plugin := "auth_socket" // MySQL; before it has answered, nobody knows which
	if m.mariadb || strings.Contains(m.server.program, "mariadb") {
		plugin = "unix_socket"
	}
	return fmt.Sprintf("CREATE USER %s@localhost IDENTIFIED WITH %s; GRANT RELOAD, PROCESS ON *.* TO %s@localhost", name, plugin, name)
}

// atLeast compares the first two numbers of a version.
func atLeast(version string, major, minor int) bool {
	a, rest, _ := strings.Cut(version, ".")
	b, _, _ := strings.Cut(rest, ".")
	x, errX := strconv.Atoi(a)
	y, errY := strconv.Atoi(b)
	return errX == nil && errY == nil && (x > major || x == major && y >= minor)
}

// lock returns when nobody can write any more. If that takes longer than the limit nobody has to wait for us any longer.
func (m *mysql) lock(ctx context.Context, limit time.Duration) error {
	if m.talk == nil {
		return errGone
	}
	until := time.Now().Add(limit)
	var err error
	if m.stages {
		for _, stage := range []string{"START", "FLUSH", "BLOCK_DDL", "BLOCK_COMMIT"} {
			if err = m.do(ctx, until, "BACKUP STAGE "+stage+";"); err != nil {
				break
			}
		}
	} else if err = m.quiet(ctx, until); err == nil {
		err = m.do(ctx, until, "FLUSH TABLES WITH READ LOCK;")
	}
	if err == nil {
		return nil
	}
	if strings.Contains(err.Error(), "1205") || strings.Contains(err.Error(), "gave no answer") {
		err = fmt.Errorf("it could not be locked within %s, because somebody writes for that long: choose a quieter time (%w)", limit, err)
	}
	if strings.Contains(err.Error(), "1227") {
		name, _, _ := m.server.account()
		err = fmt.Errorf("%w: GRANT RELOAD, PROCESS ON *.* TO %s@localhost", err, name)
	}
	_ = m.release(ctx) // a stage that failed may have ended all of them
	return err
}

// do carries out a statement that answers nothing, within what is left of the time. The server's own limit is set as well,
// so that a statement whose client was killed does not go on waiting.
func (m *mysql) do(ctx context.Context, until time.Time, statement string) error {
	left := time.Until(until)
	seconds := int(left / time.Second)
	if left <= 0 {
		return errors.New("it gave no answer in time")
	}
	answer, err := m.talk.ask(ctx, left+time.Second, fmt.Sprintf("SET SESSION lock_wait_timeout = %d;\n%s", max(1, seconds), statement))
	if err == nil && len(answer) > 0 {
		err = trouble(answer)
	}
	return err
}

// quiet waits until no query has been running for long.
func (m *mysql) quiet(ctx context.Context, until time.Time) error {
	ask := fmt.Sprintf("SELECT CONCAT('%s ', COUNT(*), ' ', COALESCE(MAX(TIME), 0)) FROM INFORMATION_SCHEMA.PROCESSLIST"+
		" WHERE COMMAND IN ('Query', 'Execute') AND TIME >= %d AND ID <> CONNECTION_ID();", done, int(longQuery/time.Second))
	for {
		answer, err := m.talk.ask(ctx, max(time.Until(until), time.Second), ask)
		if err != nil {
			return err
		}
		if len(answer) != 1 || !strings.HasPrefix(answer[0], done+" ") {
			return trouble(answer)
		}
		f := strings.Fields(answer[0])
		if len(f) == 3 && f[1] == "0" {
			return nil
		}
		if time.Until(until) < longQuery {
			return fmt.Errorf("queries are running (%s of them, the longest for %s s) behind which everybody would have to wait: choose a quieter time", plain(f[1]), plain(f[len(f)-1]))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// release lets go of whatever is held. It was held all the time if that works, and in this connection.
func (m *mysql) release(ctx context.Context) (held error) {
	end := "UNLOCK TABLES;"
	if m.stages {
		end = "BACKUP STAGE END;"
	}
	same := done + " " + m.id
	answer, err := m.talk.ask(ctx, unlockLimit, end+"\nSELECT CONCAT('"+done+" ', CONNECTION_ID());")
	if err != nil || !slices.Contains(answer, same) {
		m.talk.close() // whatever it still holds ends with its connection
		m.talk = nil
	}
	if err == nil && (len(answer) != 1 || answer[0] != same) {
		err = trouble(answer)
	}
	return err
}

func (m *mysql) unlock(ctx context.Context) error {
	if m.talk == nil {
		return errGone
	}
	return m.release(ctx)
}

func (m *mysql) end(context.Context, time.Duration) error {
	if m.talk == nil {
		return errGone
	}
	m.talk.close()
	return nil
}

func (m *mysql) stands() bool { return true }

func (m *mysql) notes() []string { return nil }
