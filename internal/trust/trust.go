// Package trust says who is who between machines, and is the line between them.
//
// A master is an authority: it has a key that signs certificates, and a book of those it has enrolled. A node, which is
// an appliance or a silo, is enrolled once with a token that a person carries to it, and has a certificate from then on
// that lives for days and renews itself.
//
//	Authority  the master's folder: its sealed key, customers' sealed keys, and its Registry
//	Registry   the book: who was invited, who is enrolled, which certificates live, who was revoked
//	Token      what an invited node needs to come: where the master is, how to know it, a secret for one use
//	Node       a node's folder: its key, its certificate, its master, for an appliance its customer's key
//	Hub        the master's end of all lines
//
// The line. A node only ever dials out, to the master's one port, over TLS 1.3 with certificates on both sides. What it
// says by ALPN decides who asks whom on that connection:
//
//	h2                the node asks:   (*Node).Client  ──requests──►  a handler on the master, which finds the Peer in the context
//	muster-reverse/1  the master asks: (*Node).Serve   ◄──requests──  (*Hub).Client
//
// Both are HTTP/2. Above this package both directions are a plain http.Handler and an *http.Client. Either end notices
// within half a minute that the other is gone, and the node comes back by itself.
//
// Who a peer is comes from its verified certificate alone, from one URI in it:
//
//	muster://appliance/CUSTOMER/NAME   muster://silo/NAME   muster://master/NAME
//
// A certificate is good if the authority signed it, the clock is within its time, and its serial number stands in the
// book. Nothing is revoked by a list of what is bad: what is not in the book is refused.
//
// Knows: certificates, tokens, sealed keys, connections, who may connect.
// Must not know: what is asked over the line, snapshots, stores, the catalog.
package trust

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Role is what a machine is to the others.
type Role string

// The roles. Only a node can be enrolled; the master has a certificate too.
const (
	Appliance  Role = "appliance"
	Silo       Role = "silo"
	roleMaster Role = "master"
)

// Peer is the other end of a connection, out of its verified certificate.
type Peer struct {
	Role     Role   `json:"role"`
	Customer string `json:"customer,omitempty"` // "" for a silo
	Name     string `json:"name"`               // unique on a master, whatever the role
	Serial   string `json:"serial"`             // of the certificate, in hexadecimal
}

// String names a peer for people: "appliance office of customer acme".
func (p Peer) String() string {
	if p.Customer == "" {
		return string(p.Role) + " " + p.Name
	}
	return string(p.Role) + " " + p.Name + " of customer " + p.Customer
}

// validate says what is wrong with a node's names.
func (p Peer) validate() error {
	if err := dr.ValidateLabel(string(p.Role), p.Name); err != nil {
		return err
	}
	switch p.Role {
	case Appliance:
		return dr.ValidateLabel("customer", p.Customer)
	case Silo:
		if p.Customer != "" {
			return fmt.Errorf("silo %s: a silo belongs to no customer", p.Name)
		}
		return nil
	}
	return fmt.Errorf("role %q: use %s or %s", p.Role, Appliance, Silo)
}

type peerKey struct{}

// PeerOf gives the node that makes a request, in a handler of the master's. It is false for a request that did not come
// over the line.
func PeerOf(ctx context.Context) (Peer, bool) {
	p, ok := ctx.Value(peerKey{}).(Peer)
	return p, ok
}

// Refusal is an answer, not a fault on the way: trying again without doing what it says does not help.
type Refusal struct {
	Reason string // a sentence that says what to do
}

func (r *Refusal) Error() string { return r.Reason }

func refuse(format string, args ...any) *Refusal { return &Refusal{fmt.Sprintf(format, args...)} }

// ErrAway means that a node is not connected now. It comes back by itself when it can.
var ErrAway = errors.New("the node is not connected")

// ErrUnknown means that a master has no node of that name.
var ErrUnknown = errors.New("the master has no such node: see 'muster master nodes'")

// Times of certificates.
const (
	// Life is how long a node's certificate lives. It is renewed when a third of that is left.
	Life = 7 * 24 * time.Hour
	// backdate is how far behind the master's clock a node's may be when it gets its certificate.
	backdate = time.Hour
	// authorityLife is how long the authority's own certificate lives.
	authorityLife = 20 * 365 * 24 * time.Hour
)

// random gives n bytes that nobody can guess.
func random(n int) []byte {
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		panic("trust: the system has no randomness: " + err.Error())
	}
	return b
}

// timeForm is how instants are written in sentences, in UTC.
const timeForm = "2006-01-02 15:04 MST"

// clockHint is what to say where a certificate's time and a clock do not agree.
func clockHint(from, until, now time.Time) string {
	return fmt.Sprintf("it is valid from %s to %s, and now it is %s", from.UTC().Format(timeForm), until.UTC().Format(timeForm), now.UTC().Format(timeForm))
}
