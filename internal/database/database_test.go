package database_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/musterdr/muster/internal/database"
)

func TestAPasswordIsNotShown(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{"postgres://muster:geheim@db/muster", "postgres://db/muster?user=muster&password=geheim", "postgres://mu%ster:geheim@db/x"} {
		if shown := database.Hidden(dsn); strings.Contains(shown, "geheim") || !strings.HasPrefix(shown, "postgres://") {
			t.Errorf("%s is shown as %s", dsn, shown)
		}
	}
	if shown := database.Hidden("/var/lib/muster/catalog.db"); shown != "/var/lib/muster/catalog.db" {
		t.Errorf("a file is shown as %s", shown)
	}
}

func TestOnlyWhatMayPassIsTriedAgain(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]bool{"57P01": true, "57P03": true, "08006": true, "40001": true, "53300": true, "23505": false, "42P01": false} {
		if got := database.Transient(fmt.Errorf("write: %w", &pgconn.PgError{Code: code})); got != want {
			t.Errorf("%s: %v", code, got)
		}
	}
	for _, err := range []error{nil, context.Canceled, context.DeadlineExceeded, errors.New("no")} {
		if database.Transient(err) {
			t.Errorf("%v would be tried again", err)
		}
	}
}

func TestABackupOfAFileInUseIsWhole(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "data.db")
	db, err := database.SQLite(path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(`CREATE TABLE t (n BIGINT)`); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			if _, err := db.Exec(`INSERT INTO t (n) VALUES (?)`, n); err != nil {
				stopped <- err
				return
			}
		}
	}()
	for i := range 3 {
		file := filepath.Join(t.TempDir(), fmt.Sprint(i))
		if err := database.Backup(t.Context(), path, file, nil); err != nil {
			t.Error(err)
		}
		if err := database.Backup(t.Context(), path, file, nil); err == nil {
			t.Error("a file was overwritten")
		}
		if err := database.Check(t.Context(), file); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}
