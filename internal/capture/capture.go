// Package capture turns a server into a snapshot: every disk at one instant, with the inventory of the machine.
//
//	Source   one way to read a server (capture/ssh, capture/qemu, capture/disk; capturetest proves them right)
//	Sink     the snapshot being written, into which a source puts what it reads
//	Session  the appliance's side of the conversation with an agent, over whatever carries it
//	Take     a source, a store, a task: a kept snapshot or an error, nothing between
//
// What changed since the last snapshot is found by fingerprints (wire.Sums): one a block, kept with each snapshot, sent to
// whoever reads the disks, so that only blocks that differ travel.
//
// While blocks pass they are looked at for signs of tampering (signs); what they held is kept with each snapshot too.
//
// Knows: disks, blocks, the store, an agent's conversation.
// Must not know: SSH, what is on a disk, when a snapshot is due, what becomes of it.
package capture

import (
	"context"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/signs"
)

// Source is one way to read one server. It is used by one goroutine.
type Source interface {
	// Contact looks at the server and changes nothing that lasts.
	Contact(ctx context.Context) (api.Contact, error)
	// Capture reads every disk at one instant into the sink and has it kept: nil means that Sink.Keep was. On an error
	// what the sink got is worth nothing. An image read while it changed is an error.
	Capture(ctx context.Context, sink *Sink, report dr.Progress) error
	// Forget removes what captures left on the server. Nothing to remove is no error.
	Forget(ctx context.Context) error
	// Close lets go of the server. Nothing of a capture runs on it afterwards.
	Close() error
}

// Disk is one disk that a source reads.
type Disk = wire.Disk

// Layout is what a source is about to read.
type Layout struct {
	Inventory dr.Inventory
	Disks     []Disk // same order as Inventory.Disks
	Compares  bool   // the source works by fingerprints
}

// Outcome is what a capture came to.
type Outcome struct {
	Inventory   dr.Inventory
	Taken       time.Time // the instant, by the appliance's clock
	Consistency dr.Consistency
	Read        int64 // bytes read from disks
	Sent        int64 // bytes over the wire from the server
	Frozen      time.Duration
	Provider    dr.Provider
	PassedOver  []dr.PassedOver
	Reasons     []string // of each disk: why it was read as a whole, "" if only what was written was; nil: it always is
	Notes       []string
	Names       *signs.Listing // of the server's files; nil: NoNames says why not
	NoNames     string
	// Applications are those that were found running; all of them at rest, and at least one, if that is the consistency.
	Applications []dr.Application
}
