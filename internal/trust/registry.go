package trust

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/durable"
)

// Registry is a master's book of nodes, a file. Any number of processes may have it open: a change is made under a lock,
// replaces the file, and is seen by all of them when they next look. So enrolling and revoking are the same whether a
// master runs or not.
type Registry struct {
	dir   string
	facts facts
	now   func() time.Time

	mu   sync.Mutex
	seen os.FileInfo // the file that book was read from
	last *book
}

// Enrolled is a node as the book has it.
type Enrolled struct {
	Role     Role       `json:"role"`
	Customer string     `json:"customer,omitempty"`
	Name     string     `json:"name"`
	State    State      `json:"state"`
	Invited  *time.Time `json:"invited_until,omitempty"` // there is a token that has not been used
	Joined   *time.Time `json:"joined,omitempty"`
	Expires  *time.Time `json:"expires,omitempty"` // its newest certificate
	Revoked  *time.Time `json:"revoked,omitempty"`
	Serials  []string   `json:"serials"` // of the certificates that are let in, newest last
}

// State says in a word where a node stands.
type State string

// The states.
const (
	Invited State = "invited" // it has not joined yet
	Joined  State = "joined"
	Expired State = "expired" // it was away for longer than its certificate lived: enrol it again
	Revoked State = "revoked"
)

// book is the content of the file.
type book struct {
	Version int      `json:"version"`
	Nodes   []*entry `json:"nodes"`
}

// entry is a node in the file.
type entry struct {
	Role         Role          `json:"role"`
	Customer     string        `json:"customer,omitempty"`
	Name         string        `json:"name"`
	Invitation   *invitation   `json:"invitation,omitempty"` // the newest; an older one is void
	Joined       *time.Time    `json:"joined,omitempty"`
	Revoked      *time.Time    `json:"revoked,omitempty"`
	Certificates []certificate `json:"certificates,omitempty"` // oldest first
}

type invitation struct {
	Hash    string     `json:"hash"` // SHA-256 of the secret, in hexadecimal
	Made    time.Time  `json:"made"`
	Expires time.Time  `json:"expires"`
	Used    *time.Time `json:"used,omitempty"`
	Key     string     `json:"key,omitempty"` // SHA-256 of the public key it was used for
}

type certificate struct {
	Serial  string    `json:"serial"`
	Issued  time.Time `json:"issued"`
	Expires time.Time `json:"expires"`
}

// Limits of the book.
const (
	bookVersion = 1
	maxBook     = 64 << 20 // bytes
	maxNodes    = 10000
	maxSerials  = 8 // of one node: more than are ever alive, so that an answer that was lost shuts nobody out
	maxValid    = 365 * 24 * time.Hour
)

// Files of a master's folder.
const (
	fileFacts     = "master.json"
	fileBook      = "nodes.json"
	fileAuthority = "ca.crt"
	fileKey       = "ca.key.age"
	fileUnlock    = "unlock.age"
	dirCustomers  = "customers"
)

// facts are what a master's folder says of it to everyone who may read it.
type facts struct {
	Version   int       `json:"version"`
	Name      string    `json:"name"`
	Listen    string    `json:"listen"`
	Addresses []string  `json:"addresses"`
	KeyFile   string    `json:"key_file,omitempty"` // "": a passphrase
	Created   time.Time `json:"created"`
}

// OpenRegistry opens the book of the master in a folder. It needs no secret.
func OpenRegistry(dir string) (*Registry, error) {
	r := &Registry{dir: dir, now: time.Now}
	raw, err := os.ReadFile(r.path(fileFacts))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open authority: %w in %s: make one with 'muster master init'", ErrNone, dir)
	}
	if err == nil {
		err = json.Unmarshal(raw, &r.facts)
	}
	if err != nil {
		return nil, fmt.Errorf("open authority: %w", err)
	}
	_, err = r.book()
	return r, err
}

// ErrNone means that a folder holds no master's authority, or no node's certificate.
var ErrNone = errors.New("there is none")

func (r *Registry) path(name string) string { return filepath.Join(r.dir, name) }

// Name is the master's.
func (r *Registry) Name() string { return r.facts.Name }

// Listen is the address for nodes to connect to, as it was given when the master was made.
func (r *Registry) Listen() string { return r.facts.Listen }

// authority reads the authority's certificate.
func (r *Registry) authority() (*x509.Certificate, error) {
	raw, err := os.ReadFile(r.path(fileAuthority))
	if err != nil {
		return nil, fmt.Errorf("read the authority's certificate: %w", err)
	}
	cert, err := decodeCert(string(raw))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", r.path(fileAuthority), err)
	}
	return cert, nil
}

// book gives the book as it is now. It is not to be changed.
func (r *Registry) book() (*book, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	info, err := os.Stat(r.path(fileBook))
	if err != nil {
		return nil, fmt.Errorf("read the book of nodes: %w", err)
	}
	if r.seen != nil && os.SameFile(r.seen, info) && r.seen.ModTime().Equal(info.ModTime()) && r.seen.Size() == info.Size() {
		return r.last, nil
	}
	b, err := readBook(r.path(fileBook))
	if err != nil {
		return nil, err
	}
	r.seen, r.last = info, b
	return b, nil
}

func readBook(path string) (*book, error) {
	info, err := os.Stat(path)
	if err == nil && info.Size() > maxBook {
		err = fmt.Errorf("it has %d bytes, the most is %d", info.Size(), maxBook)
	}
	var raw []byte
	if err == nil {
		raw, err = os.ReadFile(path)
	}
	b := &book{}
	if err == nil {
		err = json.Unmarshal(raw, b)
	}
	if err == nil && b.Version != bookVersion {
		err = fmt.Errorf("it is of version %d, this release knows %d", b.Version, bookVersion)
	}
	if err != nil {
		return nil, fmt.Errorf("read the book of nodes %s: %w", path, err)
	}
	return b, nil
}

// update changes the book while nobody else does. If change fails nothing is changed.
func (r *Registry) update(change func(*book) error) error {
	unlock, err := lockFolder(r.dir)
	if err != nil {
		return err
	}
	defer unlock()
	b, err := readBook(r.path(fileBook))
	if err != nil {
		return err
	}
	if err := change(b); err != nil {
		return err
	}
	return b.write(r.path(fileBook))
}

// lockFolder waits until no other process, and nobody else of this one, changes a folder.
func lockFolder(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock folder: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock folder %s: %w", dir, err), f.Close())
		}
	}
}

func (b *book) write(path string) error {
	raw, err := json.MarshalIndent(b, "", " ")
	if err != nil {
		return err
	}
	return durable.WriteFile(path, append(raw, '\n'), 0o600)
}

// find gives the node of a name, nil if there is none.
func (b *book) find(name string) *entry {
	if i := slices.IndexFunc(b.Nodes, func(e *entry) bool { return e.Name == name }); i >= 0 {
		return b.Nodes[i]
	}
	return nil
}

func (e *entry) peer() Peer { return Peer{Role: e.Role, Customer: e.Customer, Name: e.Name} }

// Enrol invites a node. addresses are where it reaches the master; none: those the master was made with. A node that is
// enrolled may be invited anew, and loses its present certificate when it comes. An earlier token for it is void.
func (r *Registry) Enrol(who Peer, valid time.Duration, addresses []string) (Token, error) {
	who.Serial = ""
	if len(addresses) == 0 {
		addresses = r.facts.Addresses
	}
	if valid <= 0 || valid > maxValid {
		return Token{}, fmt.Errorf("enrol %s: a token is valid for up to %.0f hours, not %s", who, maxValid.Hours(), valid)
	}
	authority, err := r.authority()
	if err != nil {
		return Token{}, err
	}
	now := r.now().UTC().Truncate(time.Second)
	t := Token{Peer: who, Masters: addresses, Pin: pinOf(authority), Expires: now.Add(valid).Truncate(time.Second), secret: [secretSize]byte(random(secretSize))}
	if err := t.validate(); err != nil {
		return Token{}, fmt.Errorf("enrol: %w", err)
	}
	err = r.update(func(b *book) error {
		e := b.find(who.Name)
		switch {
		case e == nil && len(b.Nodes) >= maxNodes:
			return refuse("enrol %s: this master has %d nodes, the most there may be", who, maxNodes)
		case e == nil:
			e = &entry{Role: who.Role, Customer: who.Customer, Name: who.Name}
			b.Nodes = append(b.Nodes, e)
		case e.peer() != who:
			return refuse("enrol %s: the name is taken by %s; choose another", who, e.peer())
		}
		e.Invitation = &invitation{Hash: digest(t.secret[:]), Made: now, Expires: t.Expires}
		return nil
	})
	return t, err
}

// Revoke shuts a node out, at once: its connections are cut and its certificates and tokens are refused. Its name stays
// in the book, and Enrol lets it in again.
func (r *Registry) Revoke(name string) (Enrolled, error) {
	now := r.now().UTC().Truncate(time.Second)
	var out Enrolled
	err := r.update(func(b *book) error {
		e := b.find(name)
		if e == nil {
			return fmt.Errorf("revoke %s: %w", name, ErrUnknown)
		}
		e.Revoked, e.Invitation, e.Certificates = &now, nil, nil
		out = e.view(now)
		return nil
	})
	return out, err
}

// Nodes lists the book, by customer and name.
func (r *Registry) Nodes() ([]Enrolled, error) {
	b, err := r.book()
	if err != nil {
		return nil, err
	}
	now := r.now()
	out := make([]Enrolled, 0, len(b.Nodes))
	for _, e := range b.Nodes {
		out = append(out, e.view(now))
	}
	slices.SortFunc(out, func(a, b Enrolled) int {
		return strings.Compare(a.Customer+"\x00"+a.Name, b.Customer+"\x00"+b.Name)
	})
	return out, nil
}

func (e *entry) view(now time.Time) Enrolled {
	out := Enrolled{Role: e.Role, Customer: e.Customer, Name: e.Name, Joined: e.Joined, Revoked: e.Revoked, State: Invited, Serials: []string{}}
	if i := e.Invitation; i != nil && i.Used == nil && now.Before(i.Expires) {
		out.Invited = &i.Expires
	}
	for _, c := range e.Certificates {
		out.Serials = append(out.Serials, c.Serial)
		out.Expires = &c.Expires
	}
	switch {
	case e.Revoked != nil:
		out.State = Revoked
	case out.Expires != nil && now.After(*out.Expires):
		out.State = Expired
	case out.Expires != nil:
		out.State = Joined
	}
	return out
}

// admit says why a node with a verified certificate is not let in; else since when it has been the node it is.
// issued is when its certificate was.
func (r *Registry) admit(p Peer, issued time.Time) (joined time.Time, err error) {
	b, err := r.book()
	if err != nil {
		return time.Time{}, err
	}
	return b.admit(p, issued)
}

func (b *book) admit(p Peer, issued time.Time) (joined time.Time, err error) {
	e := b.find(p.Name)
	if e == nil || e.Role != p.Role || e.Customer != p.Customer {
		return time.Time{}, refuse("the master does not know %s: ask for a token ('muster master enrol') and join again", p)
	}
	if e.Revoked != nil {
		return time.Time{}, refuse("%s was revoked on %s: to let it in again, enrol it ('muster master enrol') and join with the new token", p, e.Revoked.Format(timeForm))
	}
	known := slices.ContainsFunc(e.Certificates, func(c certificate) bool { return c.Serial == p.Serial })
	// One that the book has not, and that was issued after the node joined, is a renewal that a book from a backup never heard of.
	if !known && (e.Joined == nil || !issued.After(*e.Joined)) {
		return time.Time{}, refuse("%s was enrolled anew, and this certificate is of before: if this is the right machine, enrol it ('muster master enrol') and join with the new token", p)
	}
	return *e.Joined, nil
}

// still says whether a node that was let in as the one that joined at a time may stay. The certificate that it had then
// need not be alive any more.
func (b *book) still(p Peer, joined time.Time) bool {
	e := b.find(p.Name)
	return e != nil && e.Role == p.Role && e.Customer == p.Customer && e.Revoked == nil && e.Joined != nil && e.Joined.Equal(joined)
}

// invitedBy finds the node that a secret invites, and whether it may be used for a key by who asks.
func (b *book) invitedBy(secret, key []byte, who Peer, now time.Time) (*entry, error) {
	hash := digest(secret)
	i := slices.IndexFunc(b.Nodes, func(e *entry) bool { return e.Invitation != nil && e.Invitation.Hash == hash })
	if i < 0 {
		return nil, refuse("this master does not know the token: it was replaced by a newer one, its node was revoked, or another master made it; ask for a new one ('muster master enrol')")
	}
	e := b.Nodes[i]
	switch it := e.Invitation; {
	case it.Used != nil && it.Key != digest(key):
		return nil, refuse("the token was used already, on %s: ask for a new one ('muster master enrol'); if nobody of yours used it, revoke %s first", it.Used.Format(timeForm), e.Name)
	case now.After(it.Expires):
		return nil, refuse("the token expired on %s, and at the master it is %s: ask for a new one ('muster master enrol')", it.Expires.Format(timeForm), now.Format(timeForm))
	case e.peer() != who:
		return nil, refuse("the token is for %s, not for %s: use it there, or ask for one for this name ('muster master enrol')", e.peer(), who)
	}
	return e, nil
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// invited says whether redeem would do it now.
func (r *Registry) invited(secret, key []byte, who Peer) error {
	b, err := r.book()
	if err == nil {
		_, err = b.invitedBy(secret, key, who, r.now().UTC())
	}
	return err
}

// redeem enters the certificate that issue makes for the node that a secret invites. It is then the only one that lets
// this node in. Repeated for the same key it does the same again: the answer may have been lost on its way.
func (r *Registry) redeem(secret, key []byte, who Peer, issue func() (*x509.Certificate, error)) (cert *x509.Certificate, err error) {
	now := r.now().UTC().Truncate(time.Second)
	err = r.update(func(b *book) error {
		e, err := b.invitedBy(secret, key, who, now)
		if err != nil {
			return err
		}
		if cert, err = issue(); err != nil {
			return err
		}
		e.Invitation.Used, e.Invitation.Key = &now, digest(key)
		joined := r.now().UTC() // to the nanosecond: another join is another time
		e.Joined, e.Revoked, e.Certificates = &joined, nil, nil
		e.add(cert, now)
		return nil
	})
	return cert, err
}

// renew enters the certificate that issue makes for a node. The one it has now stays good, in case the answer is lost.
func (r *Registry) renew(p Peer, joined time.Time, issue func() (*x509.Certificate, error)) (cert *x509.Certificate, err error) {
	now := r.now().UTC().Truncate(time.Second)
	err = r.update(func(b *book) error {
		if !b.still(p, joined) {
			return refuse("%s was revoked or enrolled anew: enrol it ('muster master enrol') and join with the new token", p)
		}
		if cert, err = issue(); err != nil {
			return err
		}
		e := b.find(p.Name)
		for len(e.Certificates) >= maxSerials {
			oldest := 0
			if e.Certificates[0].Serial == p.Serial {
				oldest = 1
			}
			e.Certificates = slices.Delete(e.Certificates, oldest, oldest+1)
		}
		e.add(cert, now)
		return nil
	})
	return cert, err
}

func (e *entry) add(cert *x509.Certificate, now time.Time) {
	e.Certificates = append(e.Certificates, certificate{Serial: serialOf(cert), Issued: now, Expires: cert.NotAfter})
}
