package trust

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/musterdr/muster/internal/durable"
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
