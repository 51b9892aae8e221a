package hooks

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// postgres is one PostgreSQL cluster, primary or standby. At one instant its files are what a power cut would leave, without a
// torn page, and it recovers from them by itself, without a label file, because all of its write-ahead log is among them.
// A checkpoint just before makes that recovery short, and backup mode proves that the server was there all the time. Nobody
// has to wait for either.
type postgres struct {
	server  server
	talk    *session
	version int    // as the server counts: 150018
	stop    string // ends what start began
	weaker  string // why there is no backup mode
}

func (p *postgres) String() string {
	if p.version == 0 {
		return p.server.String()
	}
	number := fmt.Sprintf("%d.%d", p.version/10000, p.version%10000)
	if p.version < 100000 {
		number = fmt.Sprintf("%d.%d.%d", p.version/10000, p.version/100%100, p.version%100)
	}
	return fmt.Sprintf("PostgreSQL %s at %s", number, p.server.socket)
}

// done marks the answer of a statement that was carried out.
const done = "muster-done"

// prerequisite is the SQLSTATE of a server whose settings allow no backup mode.
const prerequisite = "55000"

func (p *postgres) begin(ctx context.Context, limit time.Duration) error {
	if err := p.connect(ctx, limit); err != nil {
		return err
	}
	start := ""
	switch {
	case p.version >= 150000:
		start, p.stop = "pg_backup_start('muster', true)", "pg_backup_stop(false)"
	case p.version >= 100000:
		start, p.stop = "pg_start_backup('muster', true, false)", "pg_stop_backup(false, false)"
	case p.version >= 90600:
		start, p.stop = "pg_start_backup('muster', true, false)", "pg_stop_backup(false)"
	}
	if start != "" {
		err := p.do(ctx, limit, "SELECT '"+done+"' FROM "+start+";")
		if err == nil {
			return nil
		}
		if !strings.Contains(err.Error(), prerequisite) {
			return p.advise(err, limit)
		}
		p.weaker = err.Error()
	}
	p.stop = ""
	answer, err := p.talk.ask(ctx, limit, "CHECKPOINT;")
	if err == nil && len(answer) > 0 {
		err = trouble(answer)
	}
	return p.advise(err, limit)
}

// connect starts the session and asks for the version.
func (p *postgres) connect(ctx context.Context, limit time.Duration) error {
	name, home, err := p.server.account()
	if err != nil {
		return err
	}
	program, err := p.server.client("psql")
	if err != nil {
		return fmt.Errorf("%w: install postgresql-client", err)
	}
	dir, port := filepath.Split(p.server.socket)
	port = strings.TrimPrefix(port, ".s.PGSQL.")
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("its socket %s has no port", p.server.socket)
	}
	// Limits of the server's own: what a killed client asked for ends as well.
	env := []string{"HOME=" + home, "PGAPPNAME=muster", "PGCONNECT_TIMEOUT=" + strconv.Itoa(int(connectLimit/time.Second)),
		fmt.Sprintf("PGOPTIONS=-c statement_timeout=%d -c lock_timeout=%d -c client_min_messages=error", limit.Milliseconds(), lockLimit.Milliseconds())}
	for _, database := range []string{"postgres", "template1"} {
		args := []string{"-X", "-q", "-A", "-t", "-w", "-v", "VERBOSITY=verbose", "-h", filepath.Clean(dir), "-p", port, "-U", name, "-d", database}
		if p.talk, err = dial(p.server, program, args, env); err != nil {
			return err
		}
		var answer []string
		answer, err = p.talk.ask(ctx, connectLimit, "SHOW server_version_num;")
		if err == nil {
			if i := slices.IndexFunc(answer, func(s string) bool { _, bad := strconv.Atoi(s); return bad == nil }); i >= 0 {
				p.version, _ = strconv.Atoi(answer[i])
				// So that a failure can be read; and a server that drops the idle would end the backup. Old ones know neither.
				_, err = p.talk.ask(ctx, connectLimit, "SET lc_messages = 'C'; SET idle_session_timeout = 0;")
				return err
			}
			err = trouble(answer)
		}
		p.talk.close()
		p.talk = nil
		if !strings.Contains(err.Error(), "does not exist") {
			break
		}
	}
	return fmt.Errorf("%w: it has to let the user %s in over its socket without a password: add 'local all %s peer' to its pg_hba.conf and reload it", err, name, name)
}

// do carries out a statement that answers with a line that says so.
func (p *postgres) do(ctx context.Context, limit time.Duration, statement string) error {
	if p.talk == nil {
		return errGone
	}
	answer, err := p.talk.ask(ctx, limit, statement)
	if err == nil && !slices.Contains(answer, done) {
		err = trouble(answer)
	}
	return err
}

// advise adds what to do about an error.
func (p *postgres) advise(err error, limit time.Duration) error {
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), "57014"), strings.Contains(err.Error(), "gave no answer"):
		return fmt.Errorf("its checkpoint took longer than %s: raise the limit of hooks for this server, or choose a quieter time (%w)", limit, err)
	case strings.Contains(err.Error(), "42501"):
		name, _, _ := p.server.account()
		return fmt.Errorf("%w: the role %s has to be a superuser, or be granted EXECUTE on pg_backup_start and pg_backup_stop (before version 15: pg_start_backup and pg_stop_backup)", err, name)
	}
	return err
}

// lock holds nothing: it asks whether the session is there.
func (p *postgres) lock(ctx context.Context, limit time.Duration) error {
	return p.do(ctx, limit, "SELECT '"+done+"';")
}

func (p *postgres) unlock(ctx context.Context) error {
	return p.do(ctx, unlockLimit, "SELECT '"+done+"';")
}

func (p *postgres) end(ctx context.Context, limit time.Duration) error {
	if p.talk == nil {
		return errGone
	}
	defer p.talk.close()
	if p.stop == "" {
		return p.do(ctx, unlockLimit, "SELECT '"+done+"';")
	}
	err := p.do(ctx, limit, "SELECT '"+done+"' FROM "+p.stop+";")
	if err != nil && !errors.Is(err, errGone) {
		err = fmt.Errorf("end backup mode: %w", err)
	}
	return err
}

// stands says whether anybody has to wait from lock to unlock.
func (p *postgres) stands() bool { return false }

func (p *postgres) notes() []string {
	if p.weaker == "" {
		return nil
	}
	return []string{fmt.Sprintf("%s: a checkpoint was made, without backup mode: %s", p, p.weaker)}
}
