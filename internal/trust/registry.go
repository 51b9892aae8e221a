package trust

import (
	"crypto/x509"
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
	if err == nil && r.facts.Version != factsVersion {
		err = fmt.Errorf("it is of version %d, this release knows %d", r.facts.Version, factsVersion)
	}
	if err != nil {
		return nil, fmt.Errorf("open authority: read %s: %w", r.path(fileFacts), err)
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
