package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/backup"
	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/database"
	"github.com/musterdr/muster/internal/engine"
	"github.com/musterdr/muster/internal/store/folder"
)

// sqliteTarget is how one says that catalog and work go back into files of the installation.
const sqliteTarget = "sqlite"

func migrateCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "migrate --to sqlite|postgres://…", Short: "Move catalog and work to another database", Args: cobra.NoArgs,
		Long: `Move the installation to another database: from its files to PostgreSQL, which several masters may share, to another PostgreSQL,
or back to files. 'muster serve' must not run on it meanwhile, on any host.

Every table of the catalog is copied and compared row by row: all of it arrives, or nothing. The old catalog stays as it was, and
is marked, so that nobody starts on it by mistake. Cut off, it can be run again.

Operations that are not finished do not move: start 'muster serve', let them finish or cancel them, and stop it. Finished ones
stay behind as well: what came of them is in the catalog.`,
		Example: `  muster master migrate --to postgres://muster@db.example.com/muster
  muster master migrate --to sqlite`}
	to := cmd.Flags().String("to", "", "postgres:// URL of an empty database, or sqlite")
	must(cmd.MarkFlagRequired("to"))
	must(cmd.RegisterFlagCompletionFunc("to", cobra.FixedCompletions([]string{sqliteTarget, "postgres://"}, cobra.ShellCompDirectiveNoSpace)))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		target := *to
		if target == sqliteTarget {
			target = ""
		} else if !database.IsPostgres(target) {
			return withCode(exitUsage, fmt.Errorf("--to %s: give sqlite or a postgres:// URL", target))
		}
		return installation(cmd).migrate(cmd, target)
	}
	return cmd
}

// must is for mistakes in the program.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// migrate moves catalog and work to a database, "" for files. Each step may be repeated: a copy that is there is compared,
// and the settings lead to it last.
func (i install) migrate(cmd *cobra.Command, target string) error {
	ctx := cmd.Context()
	from, err := i.settings()
	if err != nil {
		return err
	}
	p := &platform{log: slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))}
	defer p.close()
	if err := p.lock(i); err != nil {
		return err
	}
	to := from
	to.Database = target
	if from.Database == target {
		return withCode(exitRefused, fmt.Errorf("the catalog is in %s already: nothing was changed", database.Hidden(i.catalog(to))))
	}
	place := database.Hidden(i.catalog(to))
	source, err := catalog.Open(ctx, i.catalog(from))
	if moved := new(catalog.MovedError); errors.As(err, &moved) && moved.Place == place {
		return i.migrated(cmd, to, nil) // all but the settings was done
	}
	if err != nil {
		return err
	}
	defer source.Close()
	tables, err := i.copyTo(cmd, from, to, source)
	if err != nil {
		return err
	}
	if err := source.Leave(ctx, place); err != nil {
		return err
	}
	return i.migrated(cmd, to, tables)
}

func (i install) copyTo(cmd *cobra.Command, from, to settings, source *catalog.Catalog) ([]database.Table, error) {
	ctx := cmd.Context()
	if to.Database == "" {
		if err := i.setAside(ctx); err != nil {
			return nil, err
		}
	}
	target, err := catalog.Open(ctx, i.catalog(to))
	if moved := new(catalog.MovedError); errors.As(err, &moved) {
		return nil, withCode(exitRefused, fmt.Errorf("%s holds a catalog that has moved to %s: give an empty database", database.Hidden(i.catalog(to)), moved.Place))
	}
	if err != nil {
		return nil, err
	}
	defer target.Close()
	if err := engine.Follow(ctx, i.engine(from), i.engine(to)); errors.Is(err, engine.ErrUnfinished) || errors.Is(err, engine.ErrLocked) {
		return nil, withCode(exitRefused, fmt.Errorf("%w; they would be lost: with 'muster serve' running let them finish, or end them with 'muster operation cancel'", err))
	} else if err != nil {
		return nil, err
	}
	tables, err := catalog.Copy(ctx, source, target, func(t database.Table) {
		fmt.Fprintf(cmd.ErrOrStderr(), "copied and compared %s: %d rows\n", t.Name, t.Rows)
	})
	if errors.Is(err, catalog.ErrNotEmpty) {
		return nil, withCode(exitRefused, fmt.Errorf("%w in %s: give an empty database", err, database.Hidden(i.catalog(to))))
	}
	return tables, err
}

// setAside makes place for files where those are from which the installation moved away before.
func (i install) setAside(ctx context.Context) error {
	c, err := catalog.Open(ctx, i.path("catalog.db"))
	if err == nil {
		return c.Close() // whether it is empty is seen when it is copied to
	}
	if moved := new(catalog.MovedError); !errors.As(err, &moved) {
		return err
	}
	stamp := ".before-" + time.Now().UTC().Format("20060102t150405")
	for _, name := range []string{"engine.db", "catalog.db"} {
		for _, end := range []string{"-wal", "-shm", ""} {
			if err := os.Rename(i.path(name+end), i.path(name+stamp+end)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("put the old files aside: %w", err)
			}
		}
	}
	return nil
}

func (i install) migrated(cmd *cobra.Command, to settings, tables []database.Table) error {
	if err := i.writeSettings(to); err != nil {
		return err
	}
	place := database.Hidden(i.catalog(to))
	if wantJSON(cmd) {
		return printJSON(cmd, map[string]any{"database": place, "tables": tables})
	}
	var rows int64
	for _, t := range tables {
		rows += t.Rows
	}
	fmt.Fprintf(cmd.OutOrStdout(), "The catalog is in %s: %d tables with %d rows, each compared with what it was. Start 'muster serve'.\n", place, len(tables), rows)
	return nil
}

// seals are the ways to seal and open a backup.
type seals struct {
	recipients         *[]string
	passphrase, opener *string
}

func (s seals) scrypt() (string, error) {
	raw, err := os.ReadFile(*s.passphrase)
	if err != nil {
		return "", fmt.Errorf("read passphrase: %w", err)
	}
	phrase := strings.TrimRight(string(raw), "\r\n")
	if len(phrase) < minPassphrase {
		return "", withCode(exitUsage, fmt.Errorf("the passphrase has fewer than %d characters", minPassphrase))
	}
	return phrase, nil
}

const minPassphrase = 12

// sealing gives whom a backup is sealed to, and what opens it again, if that is known.
func (s seals) sealing() (to []age.Recipient, by []age.Identity, err error) {
	if *s.passphrase != "" {
		phrase, err := s.scrypt()
		if err != nil {
			return nil, nil, err
		}
		r, err := age.NewScryptRecipient(phrase)
		if err != nil {
			return nil, nil, err
		}
		by, err := s.opening()
		return []age.Recipient{r}, by, err
	}
	for _, text := range *s.recipients {
		r, err := age.ParseRecipients(strings.NewReader(text))
		if err != nil {
			return nil, nil, withCode(exitUsage, fmt.Errorf("--recipient %s: %w", text, err))
		}
		to = append(to, r...)
	}
	return to, nil, nil
}

// opening gives what opens a backup.
func (s seals) opening() ([]age.Identity, error) {
	if *s.passphrase != "" {
		phrase, err := s.scrypt()
		if err != nil {
			return nil, err
		}
		id, err := age.NewScryptIdentity(phrase)
		return []age.Identity{id}, err
	}
	f, err := os.Open(*s.opener)
	if err != nil {
		return nil, fmt.Errorf("read identity: %w", err)
	}
	defer f.Close()
	ids, err := age.ParseIdentities(f)
	if err != nil {
		return nil, fmt.Errorf("read identity %s: %w", *s.opener, err)
	}
	return ids, nil
}

func backupCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "backup FILE", Short: "Write what this master cannot do without into a sealed file", Args: cobra.ExactArgs(1),
		Long: `Write catalog, work under way, settings and keys into one file, sealed with age to recipients or a passphrase, while 'muster serve'
runs or not. The store, which has its own copies, and what a silo can make again are not in it. The file is read back before the
command ends; sealed to recipients, of whom this host has no key, what is read back is compared with what was written.

Take one every night after the tests, keep it away from this site, and keep what opens it away from both.`,
		Example: `  muster master backup --recipient age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p /mnt/elsewhere/muster-$(date +%F).age
  muster master backup --passphrase-file /root/phrase /mnt/elsewhere/muster.age`}
	s := seals{recipients: cmd.Flags().StringArray("recipient", nil, "public key (age1…) that can open it; may be given several times"),
		passphrase: cmd.Flags().String("passphrase-file", "", "file with the passphrase that opens it")}
	cmd.MarkFlagsOneRequired("recipient", "passphrase-file")
	cmd.MarkFlagsMutuallyExclusive("recipient", "passphrase-file")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		i := installation(cmd)
		set, err := i.settings()
		if err != nil {
			return err
		}
		if _, err := os.Lstat(args[0]); err == nil {
			return withCode(exitRefused, fmt.Errorf("%s is there already: nothing was written", args[0]))
		}
		to, by, err := s.sealing()
		if err != nil {
			return err
		}
		m, err := backup.Write(cmd.Context(), args[0], i.contents(set), to, by)
		if err != nil {
			return err
		}
		return printBackup(cmd, fmt.Sprintf("Backed up to %s", args[0]), m)
	}
	return cmd
}

func printBackup(cmd *cobra.Command, what string, m backup.Manifest) error {
	if wantJSON(cmd) {
		return printJSON(cmd, m)
	}
	var bytes int64
	for _, f := range m.Files {
		bytes += f.Size
		fmt.Fprintf(cmd.OutOrStdout(), "  %10s  %s\n", size(f.Size), f.Name)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: %d files, %s, of %s.\n", what, len(m.Files), size(bytes), when(m.Made))
	return nil
}

// Kinds of databases in a backup.
const (
	kindSQLite   = "sqlite"
	kindPostgres = "postgres"
)

// postgresCopy is the name of the copy of a PostgreSQL database in a backup.
const postgresCopy = "database.db"

// notOfAMaster is what a backup leaves out of an installation's folder: what others keep or can make again, what is of a
// process, and databases, of which copies are made. Everything else is taken.
var notOfAMaster = []string{"silo", "scratch", "cache", "cache-*", "lock", "kvm-probe.json", "catalog.db*", "engine.db*", "*.new"}

// databaseParts is what of a PostgreSQL database is the master's.
var databaseParts = []database.Part{
	{Except: []string{"goose_db_version", engine.HostTable}},
	{Schema: engine.LibrarySchema, Except: []string{engine.LibraryVersions}},
}

// contents is what a backup of the master holds.
func (i install) contents(set settings) backup.Contents {
	c := backup.Contents{Dir: i.Dir, Release: version, Kind: kindSQLite, Skip: func(name string) bool {
		for _, pattern := range notOfAMaster {
			if ok, err := filepath.Match(pattern, name); err != nil || ok {
				return ok
			}
		}
		return i.path(name) == set.Store || isFile(filepath.Join(i.path(name), folder.FormatFile)) // customers' stores
	}}
	copyOf := func(name, dsn string) backup.Copy {
		return backup.Copy{Name: name, Make: func(ctx context.Context, path string) error { return database.Backup(ctx, dsn, path, databaseParts) }}
	}
	if set.Database != "" {
		c.Kind, c.Copies = kindPostgres, []backup.Copy{copyOf(postgresCopy, set.Database)}
		return c
	}
	// Work first: a step that is in the catalog already and not yet known to be done is repeated, which is safe. The other
	// way round it would be missing.
	c.Copies = []backup.Copy{copyOf("engine.db", i.engine(set)), copyOf("catalog.db", i.catalog(set))}
	return c
}

func restoreCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "restore FILE", Short: "Make this host the master again, of a backup", Args: cobra.ExactArgs(1),
		Long: `Put a backup back into --dir, which must be empty or not there, and, if its catalog was in PostgreSQL, into an empty database.
All of it comes back, or nothing. Then start 'muster serve': it knows every server, last-known-good and ticket, and goes on with
work that was under way. What the master was told after the backup, it does not know; 'muster store adopt' finds snapshots and
verdicts that the store has and the catalog has not.

Make sure that the old master is gone. Should it wake up, silos refuse it what the new one works on.`,
		Example: `  muster master restore --identity /media/usb/key.txt /mnt/elsewhere/muster-2026-11-22.age
  muster master restore --passphrase-file /root/phrase --database postgres://muster@db2.example.com/muster muster.age`}
	s := seals{passphrase: cmd.Flags().String("passphrase-file", "", "file with the passphrase it was sealed with"),
		opener: cmd.Flags().String("identity", "", "file with the private key (AGE-SECRET-KEY-…) it was sealed to")}
	db := cmd.Flags().String("database", "", "postgres:// URL of an empty database, if the catalog was in PostgreSQL (default: where it was)")
	store := cmd.Flags().String("store", "", "folder of the store, if it is not where it was")
	cmd.MarkFlagsOneRequired("identity", "passphrase-file")
	cmd.MarkFlagsMutuallyExclusive("identity", "passphrase-file")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		by, err := s.opening()
		if err != nil {
			return err
		}
		i := installation(cmd)
		if there, err := os.ReadDir(i.Dir); err == nil && len(there) > 0 {
			return withCode(exitRefused, fmt.Errorf("%s is not empty: nothing was changed; give another folder with --dir", i.Dir))
		}
		m, err := i.restore(cmd, args[0], by, *db, *store)
		if err != nil {
			return err
		}
		return printBackup(cmd, "Restored to "+i.Dir, m)
	}
	return cmd
}

// restore puts a backup back beside the installation's folder, makes it fit, and gives it its name last.
func (i install) restore(cmd *cobra.Command, file string, by []age.Identity, db, store string) (m backup.Manifest, err error) {
	part := install{Dir: i.Dir + ".restoring", Run: i.Run}
	if err := os.MkdirAll(filepath.Dir(i.Dir), 0o755); err != nil {
		return m, err
	}
	if m, err = backup.Unpack(file, part.Dir, by); err != nil {
		return m, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(part.Dir))
		}
	}()
	set, err := part.settings()
	if err != nil {
		return m, err
	}
	if store != "" {
		if set.Store, err = filepath.Abs(store); err != nil {
			return m, err
		}
	}
	if m.Kind == kindPostgres {
		if db != "" {
			set.Database = db
		}
		if err := part.restoreDatabase(cmd, set); err != nil {
			return m, err
		}
	} else if db != "" {
		return m, withCode(exitUsage, errors.New("the catalog was in files: restore it without --database, and move it with 'muster master migrate'"))
	}
	if err := engine.Restored(cmd.Context(), part.engine(set)); err != nil {
		return m, err
	}
	if err := part.writeSettings(set); err != nil {
		return m, err
	}
	if err := os.Remove(i.Dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return m, err
	}
	return m, os.Rename(part.Dir, i.Dir)
}

func (i install) restoreDatabase(cmd *cobra.Command, set settings) error {
	ctx := cmd.Context()
	c, err := catalog.Open(ctx, set.Database) // makes its tables
	if err != nil {
		return err
	}
	empty, err := c.Empty(ctx)
	if err := errors.Join(err, c.Close()); err != nil {
		return err
	}
	if !empty {
		return withCode(exitRefused, fmt.Errorf("there is a catalog in %s: nothing was changed; give an empty database with --database", database.Hidden(set.Database)))
	}
	e, err := engine.Open(ctx, engine.Config{DSN: set.Database, Version: "none", Logger: slog.New(slog.DiscardHandler)}) // makes its tables
	if err != nil {
		return err
	}
	if err := e.Close(ctx); err != nil {
		return err
	}
	err = database.Restore(ctx, i.path(postgresCopy), set.Database, databaseParts, func(t database.Table) {
		fmt.Fprintf(cmd.ErrOrStderr(), "put back and compared %s: %d rows\n", t.Name, t.Rows)
	})
	if err != nil {
		return err
	}
	return os.Remove(i.path(postgresCopy))
}
