package dr

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Server is a protected machine. Its definition is kept in the catalog and, so that a lost catalog can be rebuilt,
// as a record in the store. It holds no secret: an SSH key is named by its path.
type Server struct {
	ID         string     `json:"id"`                  // opaque, never reused
	Name       string     `json:"name"`                // what people call it; see ValidateName
	Customer   string     `json:"customer,omitempty"`  // whose it is, named like a server; "": the installation's own
	Appliance  string     `json:"appliance,omitempty"` // that captures it, by name; "": the master's own process
	Source     Source     `json:"source"`
	Schedule   Schedule   `json:"schedule"`
	Tier       Tier       `json:"tier,omitempty"`    // "": TierImage
	Data       DataSet    `json:"data,omitzero"`     // what is captured file by file; of no tier but TierImage
	Standby    string     `json:"standby,omitempty"` // of TierData: name or ID of the server whose image the data goes onto
	Objectives Objectives `json:"objectives"`
	Checks     []Check    `json:"checks,omitempty"`
	Memory     int        `json:"memory_mib,omitempty"` // MiB for its rescue machine; 0: as the inventory says, within the silo's limits
	CPUs       int        `json:"cpus,omitempty"`       // 0: as the inventory says, within the silo's limits
	Overlays   string     `json:"overlays,omitempty"`   // folder with the customer's own overlays on the silo; "" none
	Retention  Retention  `json:"retention"`
	Signs      SignLevel  `json:"signs,omitempty"` // how soon a snapshot is suspicious; "": SignsNormal
	Created    time.Time  `json:"created"`
}

// ServerRecord is the kind under which a store keeps definitions of servers, by their identifiers.
const ServerRecord = "server"

// Source says where a server's disks are read from. Exactly one of Disks, SSH and VM is set.
type Source struct {
	Disks []string   `json:"disks,omitempty"` // paths of raw disk images or block devices, in the server's own order
	SSH   *SSHSource `json:"ssh,omitempty"`
	VM    *VMSource  `json:"vm,omitempty"`
}

// VMSource is a virtual machine on QEMU that the appliance's own host runs under libvirt, read through the hypervisor.
type VMSource struct {
	URI    string   `json:"uri,omitempty"`   // libvirt's: DefaultVMURI, or the same with ?socket=/PATH; "" is DefaultVMURI
	Domain string   `json:"domain"`          // name or UUID
	Disks  []string `json:"disks,omitempty"` // libvirt's names of disks, as vda; none: every disk that the machine can write to
}

// DefaultVMURI is where virtual machines are looked for.
const DefaultVMURI = "qemu:///system"

// SSHSource is a live Linux server reached over its own SSH as a user that may read block devices.
type SSHSource struct {
	User        string        `json:"user"`
	Host        string        `json:"host"`
	Port        int           `json:"port"`
	KeyFile     string        `json:"key_file"`               // private key on the appliance
	HostKey     string        `json:"host_key"`               // authorized_keys form: "ssh-ed25519 AAAA…"; checked on every connection
	Disks       []string      `json:"disks,omitempty"`        // kernel names or absolute paths; none: every disk in use
	FreezeLimit time.Duration `json:"freeze_limit,omitempty"` // the longest a file system may stay frozen; 0: DefaultFreezeLimit
	ReadLimit   int64         `json:"read_limit,omitempty"`   // bytes a second that are read at most while the server goes on, of disks and of files; 0: no limit
	// Resident leaves the agent on the server, and programs in its kernel that note what is written, so that a snapshot
	// reads only that.
	Resident bool `json:"resident,omitempty"`
	// Hooks says what is done about its applications.
	Hooks Hooks `json:"hooks,omitzero"`
	// Snapshots lets a capture make snapshots of the server's logical volumes, which it removes again. That writes to the
	// metadata of the volume group, and as long as a snapshot lives to the group's free room.
	Snapshots bool `json:"snapshots,omitempty"`
}

// DefaultFreezeLimit is how long a file system may stay frozen before the watchdog thaws it.
const DefaultFreezeLimit = 10 * time.Second

// MinReadLimit is the smallest SSHSource.ReadLimit: slower a disk is not read before it has changed again.
const MinReadLimit = 1 << 20

// Kind names the source in one word, for people: "disk", "ssh" or "vm".
func (s Source) Kind() string {
	switch {
	case s.SSH != nil:
		return "ssh"
	case s.VM != nil:
		return "vm"
	}
	return "disk"
}

func (s Source) String() string {
	switch {
	case s.SSH != nil:
		return s.SSH.String()
	case s.VM != nil:
		return s.VM.String()
	}
	return strings.Join(s.Disks, ", ")
}

func (v VMSource) String() string {
	if v.URI == "" {
		return v.Domain + " on " + DefaultVMURI
	}
	return v.Domain + " on " + v.URI
}

// Socket reads the URI: the path of libvirtd's socket on this host, "" for the usual one. Machines of another host are not
// reached: their disks would have to cross the network unsealed.
func (v VMSource) Socket() (string, error) {
	if v.URI == "" || v.URI == DefaultVMURI {
		return "", nil
	}
	socket, ok := strings.CutPrefix(v.URI, DefaultVMURI+"?socket=")
	if !ok || !filepath.IsAbs(socket) || strings.ContainsAny(socket, "&%# \t\n") {
		return "", fmt.Errorf("libvirt URI %q: this release reads machines of its own host only: use %s or %s?socket=/PATH; protect a machine elsewhere with --ssh",
			v.URI, DefaultVMURI, DefaultVMURI)
	}
	return socket, nil
}

func (s SSHSource) String() string {
	return fmt.Sprintf("%s@%s:%d", s.User, s.Host, s.Port)
}

// ParseSSH reads "user@host[:port]" (IPv6 in brackets).
func ParseSSH(text string) (SSHSource, error) {
	user, host, ok := strings.Cut(text, "@")
	if !ok || user == "" {
		return SSHSource{}, fmt.Errorf("read SSH address %q: it has no user; write it as root@HOST or root@HOST:PORT", text)
	}
	port := 22
	if h, p, found := cutPort(host); found {
		n, err := strconv.Atoi(p)
		if err != nil || n < 1 || n > 65535 {
			return SSHSource{}, fmt.Errorf("read SSH address %q: %q is not a port from 1 to 65535", text, p)
		}
		host, port = h, n
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if host == "" || strings.ContainsAny(host, " \t\n/\\") || strings.HasPrefix(host, "-") {
		return SSHSource{}, fmt.Errorf("read SSH address %q: %q is not a host name or address", text, host)
	}
	return SSHSource{User: user, Host: host, Port: port}, nil
}

func cutPort(host string) (name, port string, found bool) {
	i := strings.LastIndexByte(host, ':')
	if i < 0 || strings.HasSuffix(host, "]") || (strings.Count(host, ":") > 1 && !strings.HasPrefix(host, "[")) {
		return host, "", false
	}
	return host[:i], host[i+1:], true
}

// Schedule says how often a server is captured.
type Schedule struct {
	Every time.Duration `json:"every"` // at least MinEvery
}

// Tier says what of a server is captured.
type Tier string

// The tiers. Where data is captured, what is tested and run is always an image with the newest data put into it.
const (
	TierImage     Tier = "image"      // all disks, every time
	TierImageData Tier = "image+data" // all disks now and then, folders file by file more often
	TierData      Tier = "data"       // folders file by file; they go onto the image of a standby with a compatible system (R55)
)

// HasImage says whether the server's own disks are captured.
func (s Server) HasImage() bool { return s.Tier != TierData }

// HasData says whether folders of the server are captured file by file.
func (s Server) HasData() bool { return s.Tier == TierImageData || s.Tier == TierData }

// DataSet is what is captured file by file.
type DataSet struct {
	Paths   []string      `json:"paths,omitempty"`   // absolute paths of folders on the server
	Exclude []string      `json:"exclude,omitempty"` // patterns: *.tmp is any one name, /srv/cache a whole path
	Every   time.Duration `json:"every,omitempty"`   // 0: DefaultEvery
}

// Schedule says how often the data is captured.
func (d DataSet) Schedule() Schedule {
	if d.Every == 0 {
		return Schedule{Every: DefaultEvery}
	}
	return Schedule{Every: d.Every}
}

// The default schedule (R5) and the shortest one this release takes.
const (
	DefaultEvery = 24 * time.Hour
	MinEvery     = time.Minute
)

// Due says when the next snapshot is to be taken. A server never captured is due at once. A clock that was stepped
// back, which would make the last snapshot lie in the future, makes it due at once too: late is better than never.
func (s Schedule) Due(last, now time.Time) time.Time {
	if last.IsZero() || last.After(now) {
		return now
	}
	return last.Add(s.Every)
}

// Objectives are what was promised. Zero means nothing was promised.
type Objectives struct {
	RTO time.Duration `json:"rto,omitempty"` // recovery time objective
	RPO time.Duration `json:"rpo,omitempty"` // recovery point objective
}

// Retention says which snapshots are kept besides last-known-good and the newest, which always are.
type Retention struct {
	KeepLast int `json:"keep_last,omitempty"` // newest N; 0: all
}

var nameRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidateName accepts what is also a DNS label, because a server's name becomes part of machine, file and export
// names: 1 to 63 of a-z, 0-9 and -, with no - at either end.
func ValidateName(name string) error { return ValidateLabel("server", name) }

// ValidateLabel does the same for the name of something else, which the error calls by its kind.
func ValidateLabel(kind, name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("%s name %q: use 1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'", kind, name)
	}
	return nil
}

// maxDomain bounds the name of a virtual machine in bytes.
const maxDomain = 255

func (v VMSource) validate() error {
	if _, err := v.Socket(); err != nil {
		return err
	}
	if v.Domain == "" || len(v.Domain) > maxDomain || strings.ContainsAny(v.Domain, "/\n\x00") {
		return fmt.Errorf("virtual machine %q: give its name or UUID, as 'virsh list --all' shows it", v.Domain)
	}
	if len(v.Disks) > MaxDisks {
		return fmt.Errorf("virtual machine %s has %d disks: the most is %d", v.Domain, len(v.Disks), MaxDisks)
	}
	return nil
}

// StoredFor names the customer in whose far store the server's snapshots lie; "" is the installation's own store, into which the
// master's own process captures, whoever it is for.
func (s Server) StoredFor() string {
	if s.Appliance == "" {
		return ""
	}
	return s.Customer
}

// ValidateCustomer accepts what ValidateName does, and "" for the installation's own.
func ValidateCustomer(name string) error {
	if name != "" && !nameRE.MatchString(name) {
		return fmt.Errorf("customer %q: use 1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'", name)
	}
	return nil
}

// Limits on a server's definition.
const (
	MaxDisks  = 32
	MaxChecks = 64
)

// Validate says what is wrong with a server's definition, all at once.
func (s Server) Validate() error {
	var errs []error
	add := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if err := ValidateName(s.Name); err != nil {
		errs = append(errs, err)
	}
	if err := ValidateCustomer(s.Customer); err != nil {
		errs = append(errs, err)
	}
	if s.Appliance != "" && !nameRE.MatchString(s.Appliance) {
		add("appliance name %q: use 1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'", s.Appliance)
	}
	sources := 0
	for _, set := range []bool{len(s.Source.Disks) > 0, s.Source.SSH != nil, s.Source.VM != nil} {
		if set {
			sources++
		}
	}
	switch {
	case sources == 0:
		add("server %s has no source: give --disk PATH, --ssh USER@HOST or --vm DOMAIN", s.Name)
	case sources > 1:
		add("server %s has %d sources: give one of --disk, --ssh and --vm", s.Name, sources)
	case len(s.Source.Disks) > MaxDisks:
		add("server %s has %d disks: the most is %d", s.Name, len(s.Source.Disks), MaxDisks)
	}
	for _, d := range s.Source.Disks {
		if !filepath.IsAbs(d) {
			add("disk %q: give an absolute path", d)
		}
	}
	if ssh := s.Source.SSH; ssh != nil {
		if ssh.KeyFile == "" || !filepath.IsAbs(ssh.KeyFile) {
			add("SSH key %q: give the absolute path of a private key (--key FILE)", ssh.KeyFile)
		}
		if ssh.HostKey == "" {
			add("server %s has no host key: connect once and confirm it, or give --host-key", s.Name)
		}
		if len(ssh.Disks) > MaxDisks {
			add("server %s has %d disks: the most is %d", s.Name, len(ssh.Disks), MaxDisks)
		}
		if ssh.FreezeLimit < 0 || ssh.FreezeLimit > 10*time.Minute {
			add("freeze limit %s: use up to 10 minutes", ssh.FreezeLimit)
		}
		if err := ssh.Hooks.Validate(); err != nil {
			errs = append(errs, err)
		}
		if ssh.ReadLimit != 0 && ssh.ReadLimit < MinReadLimit {
			add("read limit of %d bytes a second: use 0 for none, or at least 1 MiB a second", ssh.ReadLimit)
		}
	}
	if vm := s.Source.VM; vm != nil {
		if err := vm.validate(); err != nil {
			errs = append(errs, err)
		}
	}
	if s.Schedule.Every < MinEvery {
		add("schedule every %s: the shortest is %s", s.Schedule.Every, MinEvery)
	}
	if s.Objectives.RTO < 0 || s.Objectives.RPO < 0 {
		add("objectives must not be negative")
	}
	if len(s.Checks) > MaxChecks {
		add("server %s has %d checks: the most is %d", s.Name, len(s.Checks), MaxChecks)
	}
	for i, c := range s.Checks {
		if err := c.Validate(); err != nil {
			add("check %d: %w", i+1, err)
		}
	}
	errs = append(errs, s.validateTier()...)
	if s.Memory < 0 || s.Memory > 4<<20 || s.CPUs < 0 || s.CPUs > 512 {
		add("memory (MiB) and cpus must be sensible: got %d and %d", s.Memory, s.CPUs)
	}
	if err := s.Signs.Validate(); err != nil {
		errs = append(errs, err)
	}
	if s.Retention.KeepLast < 0 {
		add("keep-last %d must not be negative", s.Retention.KeepLast)
	}
	return errors.Join(errs...)
}

// validateTier says what is wrong with what is captured. The folders and patterns themselves are checked by whoever walks them.
func (s Server) validateTier() (errs []error) {
	add := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	switch s.Tier {
	case "", TierImage, TierImageData, TierData:
	default:
		add("tier %q: use image, image+data or data", s.Tier)
	}
	switch {
	case s.HasData() && len(s.Data.Paths) == 0:
		add("server %s has tier %s and no data: name folders with --data /srv", s.Name, s.Tier)
	case !s.HasData() && len(s.Data.Paths) > 0:
		add("server %s names data, which tier image does not capture: give --tier image+data", s.Name)
	}
	if s.HasData() && s.Source.SSH == nil {
		add("tier %s: only a server that is reached with --ssh can be captured file by file", s.Tier)
	}
	if every := s.Data.Schedule().Every; every < MinEvery {
		add("data every %s: the shortest is %s", every, MinEvery)
	}
	switch {
	case s.Tier == TierData && s.Standby == "":
		add("tier data: name the server whose image the data goes onto with --standby")
	case s.Tier != TierData && s.Standby != "":
		add("standby %s: only tier data has one", s.Standby)
	}
	return errs
}
