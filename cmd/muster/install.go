package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/database"
	"github.com/musterdr/muster/internal/durable"
	"github.com/musterdr/muster/internal/store"
)

// install is an installation: one folder with its settings, keys, catalog and silo, and where its sockets are.
//
//	DIR/muster.yaml   settings
//	DIR/store.key     what opens the store; without it the store is noise
//	DIR/store/        the installation's own store, unless settings name another place; customers' far stores are beside it
//	DIR/cache*/       what was read of a store in a bucket
//	DIR/catalog.db    what is known and proven, unless settings name a database
//	DIR/engine.db     work under way, likewise
//	DIR/silo/         deltas, evidence, live layers
type install struct {
	Dir string
	Run string // sockets: a short path of its own, because a socket's path is limited to 107 bytes
}

// settings is the content of muster.yaml.
type settings struct {
	Store     string `yaml:"store"`              // folder of the store, or s3://BUCKET/PREFIX?…
	MaxMemory int    `yaml:"max_memory"`         // MiB a rescue machine may have; 0: half this host's
	MaxCPUs   int    `yaml:"max_cpus"`           // 0: this host's
	Tests     int    `yaml:"tests"`              // boot tests at once; 0: 1
	Libvirt   string `yaml:"libvirt"`            // libvirt's socket; "": the system's
	Customer  string `yaml:"customer,omitempty"` // whose far store this store is, of releases that knew only one; "": nobody's

	StoreCredentials string `yaml:"store_credentials,omitempty"` // file of a bucket's; "": the environment's
	StoreCache       int    `yaml:"store_cache,omitempty"`       // GiB of a bucket kept on this host; 0: defaultCache

	// Database is where catalog and work are: a postgres:// URL, which other masters may share; "": files of the installation.
	Database string `yaml:"database,omitempty"`
	Host     string `yaml:"host,omitempty"` // this master's name among those that share a database; "": the host's and DIR
}

// host is the master's name among others. An earlier process of it is dead, because the lock is on the folder.
func (i install) host(s settings) string {
	if s.Host != "" {
		return s.Host
	}
	name, err := os.Hostname()
	if err != nil {
		name = "localhost"
	}
	return name + ":" + i.Dir
}

// catalog and engine say where the databases are.
func (i install) catalog(s settings) string {
	if s.Database != "" {
		return s.Database
	}
	return i.path("catalog.db")
}

func (i install) engine(s settings) string {
	if s.Database != "" {
		return s.Database
	}
	return i.path("engine.db")
}

func defaultDir() string {
	if dir := os.Getenv("MUSTER_DIR"); dir != "" {
		return dir
	}
	return "/var/lib/muster"
}

func installation(cmd *cobra.Command) install {
	dir, _ := cmd.Flags().GetString("dir")
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	sum := sha256.Sum256([]byte(dir))
	base := "/run/muster"
	if os.Geteuid() != 0 {
		base = filepath.Join(os.TempDir(), fmt.Sprintf("muster-%d", os.Geteuid()))
	}
	return install{Dir: dir, Run: filepath.Join(base, hex.EncodeToString(sum[:4]))}
}

func apiSocket(i install) string { return filepath.Join(i.Run, "api.sock") }

func (i install) path(name string) string { return filepath.Join(i.Dir, name) }

func (i install) settings() (settings, error) {
	var s settings
	raw, err := os.ReadFile(i.path("muster.yaml"))
	if errors.Is(err, os.ErrNotExist) {
		return s, withCode(exitUnavailable, fmt.Errorf("%s is no installation of Muster: make one with 'muster init --dir %s'", i.Dir, i.Dir))
	}
	if err != nil {
		return s, fmt.Errorf("read settings: %w", err)
	}
	if err := yaml.UnmarshalWithOptions(raw, &s, yaml.Strict()); err != nil {
		return s, fmt.Errorf("read settings %s: %s", i.path("muster.yaml"), yaml.FormatError(err, false, true))
	}
	return s, nil
}

func (i install) password() (string, error) {
	raw, err := os.ReadFile(i.path("store.key"))
	if err != nil {
		return "", fmt.Errorf("read the store's key: %w; put the copy you kept of it back there", err)
	}
	return strings.TrimSpace(string(raw)), nil
}

// openStore opens the installation's store in this process.
func (i install) openStore(cmd *cobra.Command) (*store.Store, settings, error) {
	s, err := i.settings()
	if err != nil {
		return nil, s, err
	}
	password, err := i.password()
	if err != nil {
		return nil, s, err
	}
	driver, err := i.driver(s)
	if err != nil {
		return nil, s, err
	}
	st, err := store.Open(cmd.Context(), driver, password)
	if err != nil {
		return nil, s, fmt.Errorf("open store %s: %w", s.Store, err)
	}
	return st, s, nil
}

func initCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "init", Short: "Make an installation: its folder, its store and the store's key", Args: cobra.NoArgs,
		Long: `Make an installation in --dir: settings, a store, and the key that opens it. Copy the key, and the file
kopia.repository.f of the store, to a safe place elsewhere: without both nobody, you included, can read the store.

To recover a lost installation, give the old store and the copy of its key, then run 'muster serve' and 'muster store adopt'.`,
		Example: `  muster init
  muster init --store /mnt/backup/muster
  muster init --store /mnt/backup/muster --key-file /media/usb/store.key   # attach an existing store
  muster init --store 's3://backup/muster?endpoint=https://s3.example.org&lock-days=30' --store-credentials /etc/muster/s3`}
	storePath := cmd.Flags().String("store", "", "folder of the store, or s3://BUCKET/PREFIX?endpoint=https://HOST (default DIR/store)")
	credentials := cmd.Flags().String("store-credentials", "", "file of a bucket's credentials, as ~/.aws/credentials; without it those of the environment")
	cache := cmd.Flags().Int("store-cache", 0, fmt.Sprintf("GiB of what was read from a bucket to keep on this host (default %d)", defaultCache))
	keyFile := cmd.Flags().String("key-file", "", "key of an existing store")
	maxMemory := cmd.Flags().Int("max-memory", 0, "MiB a rescue machine may have; 0: half this host's")
	libvirt := cmd.Flags().String("libvirt", "", "libvirt's socket; empty: the system's")
	db := cmd.Flags().String("database", "", "postgres:// URL of the database for catalog and work, which several masters may share; empty: files in DIR")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		i := installation(cmd)
		s := settings{Store: *storePath, MaxMemory: *maxMemory, Libvirt: *libvirt, StoreCredentials: *credentials, StoreCache: *cache, Database: *db}
		if *db != "" && !database.IsPostgres(*db) {
			return withCode(exitUsage, fmt.Errorf("--database %s: give a postgres:// URL", *db))
		}
		if err := s.place(i); err != nil {
			return err
		}
		if err := i.create(cmd, s, *keyFile); err != nil {
			return err
		}
		if wantJSON(cmd) {
			return printJSON(cmd, map[string]string{"dir": i.Dir, "store": s.Store, "key": i.path("store.key")})
		}
		fmt.Fprintf(cmd.OutOrStdout(), "Installed in %s, store in %s.\nCopy %s and %s to a safe place elsewhere NOW: without both the store cannot be read.\nNext: 'muster doctor', then 'muster serve', or 'systemctl start muster' where the package is installed.\n",
			i.Dir, s.Store, i.path("store.key"), s.formatFile())
		return nil
	}
	return cmd
}

// create makes an installation. The settings file is written last: without it there is no installation, and init may
// be run again.
func (i install) create(cmd *cobra.Command, s settings, keyFile string) error {
	if _, err := os.Stat(i.path("muster.yaml")); err == nil {
		return withCode(exitRefused, fmt.Errorf("%s is an installation already: nothing was changed", i.Dir))
	}
	if err := os.MkdirAll(i.Dir, 0o711); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	password := newKey()
	if keyFile != "" {
		raw, err := os.ReadFile(keyFile)
		if err != nil {
			return fmt.Errorf("read key: %w", err)
		}
		password = strings.TrimSpace(string(raw))
	} else if raw, err := os.ReadFile(i.path("store.key")); err == nil {
		password = strings.TrimSpace(string(raw)) // an init that was cut off
	}
	if err := durable.WriteFile(i.path("store.key"), []byte(password+"\n"), 0o600); err != nil {
		return err
	}
	driver, err := i.driver(s)
	if err != nil {
		return err
	}
	st, err := store.Open(cmd.Context(), driver, password)
	switch {
	case err == nil:
		if err := st.Close(cmd.Context()); err != nil {
			return err
		}
	case keyFile != "":
		return fmt.Errorf("open store %s with that key: %w", s.Store, err)
	default:
		if err := store.Create(cmd.Context(), driver, password); err != nil {
			return fmt.Errorf("make store in %s: %w", s.Store, err)
		}
	}
	return i.writeSettings(s)
}

// writeSettings replaces the settings. A database's URL may hold a password.
func (i install) writeSettings(s settings) error {
	raw, err := yaml.Marshal(s)
	if err != nil {
		return err
	}
	mode := os.FileMode(0o644)
	if s.Database != "" {
		mode = 0o600
	}
	return durable.WriteFile(i.path("muster.yaml"), raw, mode)
}

func newKey() string {
	var b [32]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic("muster: the system has no randomness: " + err.Error())
	}
	return base64.RawURLEncoding.EncodeToString(b[:])
}
