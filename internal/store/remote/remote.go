// Package remote keeps a store on another machine: New is a store.Driver whose place is reached over HTTP, Server serves a
// place of any driver so. The one who serves sees nothing but sealed blobs, and needs no key.
//
//	Driver   a place over there, reached by an HTTP client that says who we are
//	Server   places over here, for those whom open lets in
//	Rights   what one may do: Read, Append, Own
//
// Who appends may add blobs and cannot change or take away one: what is kept outlives an appliance that fell into wrong
// hands. Only markers of sessions, which Kopia writes and removes around every flush and which hold nothing, may go;
// and the settings of a store may be replaced as long as it holds no block.
//
// A blob is there when its digest was right, it was synced, dropped from the cache, read from the medium and compared;
// PutBlob returns after that. What arrived of a blob before a cut is kept for a while, by digest, and the rest is
// asked for only.
//
// A lock lives as long as the request that took it. Whoever lost one, for the connection broke, may change nothing until it
// has let it go: every change names the locks under which it is made, and is refused if one is not held.
//
// The place may be far away: what can be asked in one question is (lists, room), and what nobody waits for is not waited for.
//
// The wire is described in docs/formats/remote.md.
//
// Knows: blobs, HTTP.
// Must not know: what is in a blob, TLS, who a peer is.
package remote

import (
	"errors"
	"net/http"
	"time"
)

// Rights are what one may do with a place. Each includes those before.
type Rights int

// The rights.
const (
	None   Rights = iota
	Read          // blobs, and locks of what is read
	Append        // new blobs
	Make          // a place where there is none
	Own           // all else: overwriting and deleting
)

// Limits.
const (
	MaxBlob     = 256 << 20 // bytes of one blob over the wire
	maxUploads  = 512 << 20 // bytes of blobs being received at once; others wait
	maxName     = 200       // bytes of the name of a blob or lock
	partialLife = 24 * time.Hour
	maxPartials = 512 << 20 // bytes of beginnings of blobs that were cut off
	resumable   = 64 << 10  // bytes from which on the beginning of a blob is worth keeping
)

// errLockLost is that a change was to be made under a lock that is no longer held.
var errLockLost = errors.New("a lock was lost with the connection; what is under way has to begin anew")

// Paths and headers.
const (
	pathPlace    = "/place"
	pathBlobs    = "/blobs/"
	pathList     = "/list"
	pathLocks    = "/locks"
	pathArrived  = "/arrived"
	pathCapacity = "/capacity"
	pathSync     = "/sync"
	pathSweep    = "/sweep"

	headerDigest = "X-Muster-Digest" // BLAKE3-256 of the whole blob, in hex
	headerSize   = "X-Muster-Size"   // bytes of the whole blob
	headerOffset = "X-Muster-Offset" // of what is sent
	headerTime   = "X-Muster-Time"   // when a blob was put, RFC 3339 with nanoseconds
	headerLocks  = "X-Muster-Locks"  // tokens of the locks under which a change is made, with commas
	headerRoom   = "X-Muster-Room"   // bytes of the place, and how many of them are free
)

// Statuses that mean something of their own here.
const (
	statusExists   = http.StatusConflict           // Create: the place holds something
	statusTaken    = http.StatusLocked             // somebody else has the lock
	statusLockLost = http.StatusPreconditionFailed // a lock named in a change is not held
	statusFull     = http.StatusInsufficientStorage
	statusNoStore  = http.StatusGone // Open: there is no store
)
