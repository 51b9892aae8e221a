package trust

import (
	"fmt"
	"time"
)

// Happening is something that happened to a node and that people may want to read later.
type Happening struct {
	At   time.Time
	What What
	Peer Peer
	Text string // a sentence
}

// What happened.
type What string

// What happens to nodes.
const (
	WasEnrolled What = "enrolled" // it was given a token
	HasJoined   What = "joined"
	WasRevoked  What = "revoked"
	WasRefused  What = "refused" // somebody showed its token or its certificate, and was not let in
)

// refusedEach is how often it is told that one node is refused for one reason: who is refused tries again.
const refusedEach = time.Hour

// changes tells what of a book was not in an earlier one, nil for none.
func (b *book) changes(before *book) (all []Happening) {
	for _, e := range b.Nodes {
		old := &entry{}
		if before != nil {
			if known := before.find(e.Name); known != nil {
				old = known
			}
		}
		who := e.peer()
		if i := e.Invitation; i != nil && (old.Invitation == nil || old.Invitation.Hash != i.Hash) {
			all = append(all, Happening{i.Made, WasEnrolled, who, fmt.Sprintf("%s was enrolled: its token lets one machine join until %s", who, i.Expires.UTC().Format(timeForm))})
		}
		if e.Joined != nil && (old.Joined == nil || !old.Joined.Equal(*e.Joined)) {
			all = append(all, Happening{*e.Joined, HasJoined, who, fmt.Sprintf("%s joined", who)})
		}
		if e.Revoked != nil && (old.Revoked == nil || !old.Revoked.Equal(*e.Revoked)) {
			all = append(all, Happening{*e.Revoked, WasRevoked, who, fmt.Sprintf("%s was revoked: it is let in no more", who)})
		}
	}
	return all
}

// tell tells a Happening to whom it is for.
func (h *Hub) tell(all ...Happening) {
	if h.Tell == nil {
		return
	}
	for _, one := range all {
		h.Tell(one)
	}
}

// refused tells that somebody who had to do with a node was not let in.
func (h *Hub) refused(who Peer, reason string) {
	who.Serial = ""
	now := h.authority.now()
	key := who.Name + " " + reason
	h.mu.Lock()
	last, again := h.told[key]
	again = again && now.Sub(last) < refusedEach && !now.Before(last)
	if !again {
		if len(h.told) >= maxNodes {
			clear(h.told)
		}
		h.told[key] = now
	}
	h.mu.Unlock()
	if !again {
		h.tell(Happening{now, WasRefused, who, reason})
	}
}
