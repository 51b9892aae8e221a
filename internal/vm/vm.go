// Package vm starts, watches, photographs and stops virtual machines.
//
//	Hypervisor  a host that runs machines (vm/libvirt for real, vm/sim for speed; vmtest proves both)
//	Spec        all that a machine is made of; nothing is defaulted by the hypervisor
//	Machine     one that was started
//
// Every machine is transient: it is gone from the hypervisor when it stops. It carries its Owner in the hypervisor's own
// metadata, so that after a crash of ours the machines nobody owns any more can be found and removed.
//
// Knows: machines, their devices, their life.
// Must not know: what is on a disk, what an image or a snapshot is, why a machine runs.
package vm

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Hypervisor runs machines. Methods may be called from many goroutines.
type Hypervisor interface {
	// Host says what this host can do. It is measured (KVM by running a guest), kept, and cheap to ask again.
	Host(ctx context.Context) (Host, error)
	// Start starts a machine from nothing and returns when its processors run. On error nothing is left.
	// A machine of that name that is already there is ErrExists.
	Start(ctx context.Context, spec Spec) (Machine, error)
	// Find gives a running machine by name, also one started by an earlier process. ErrGone if there is none.
	Find(ctx context.Context, name string) (Machine, error)
	// List gives every machine that carries an Owner, whoever started it.
	List(ctx context.Context) ([]Owned, error)
	io.Closer
}

// Errors of Hypervisor and Machine, matched with errors.Is.
var (
	ErrGone     = errors.New("no such machine")
	ErrExists   = errors.New("a machine of that name exists")
	ErrCapacity = errors.New("the host has no room for the machine")
)

// Owned is a machine and whose it is.
type Owned struct {
	Name  string
	Owner Owner
}

// Owner says why a machine exists.
type Owner struct {
	Kind string `json:"kind"` // test, invocation
	ID   string `json:"id"`   // of the verdict or invocation
	Term int64  `json:"term"` // fencing number of the work that started it
}

// Host is what a host can do.
type Host struct {
	Accelerator string // kvm or tcg
	KVMReason   string // why not kvm, "" if it is
	Emulator    string // path of QEMU
	Version     string // of QEMU
	UEFI        bool   // firmware for UEFI guests is installed
	Memory      int64  // bytes, total
	Free        int64  // bytes, available
	CPUs        int
}

// Spec is all that a machine is made of.
type Spec struct {
	Name     string // ValidateID form
	Owner    Owner
	Hardware dr.Hardware
	Disks    []Disk    // same order and number as Hardware.Disks
	Networks []Network // same order and number as Hardware.NICs; Hardware.NICs[i] is plugged into Networks[i]
	Dir      string    // existing folder of this machine's own: serial log, sockets, NVRAM; absolute, under 80 bytes
	// Freeze: start with processors stopped (for tests of the harness). Normally false.
	Paused bool
	// NoReboot: a guest that reboots is Off instead. Used for boot tests of hopeless images. (A guest that panics is
	// never rebooted: it stays, Crashed, to be looked at.)
	NoReboot bool
}

// NVRAMFile is the name in Spec.Dir of what the firmware of a UEFI machine remembers. One that is there when the machine is started is used.
const NVRAMFile = "nvram.fd"

// Disk is a chain of layers, top first. The top is written to; everything below is only read.
type Disk struct {
	Layers []Layer
	// Scratch: what is written is thrown away with the machine, so it is never flushed to stable storage. A power cut
	// of the host ruins the top layer. Never for a live layer.
	Scratch bool
}

// Layer is one layer of a disk: a qcow2 or raw file, or an NBD export on a unix socket.
type Layer struct {
	Path   string // file; "" for an export
	Format string // qcow2 or raw
	Socket string // unix socket of the NBD server
	Export string // name on that server
}

// Network is what a NIC is plugged into.
type Network struct {
	Bridge string // existing bridge on the host; "" for none: the cable is out
}

// State is whether a machine runs.
type State string

// The states of a machine.
const (
	Running State = "running"
	Paused  State = "paused"  // by us or by an I/O error, see Machine.State
	Crashed State = "crashed" // the guest panicked or the emulator died
	Off     State = "off"
)

// Machine is a started machine. It outlives the process that started it.
type Machine interface {
	Name() string
	Owner() Owner
	// State says whether it runs, and why not where that is known ("I/O error").
	State(ctx context.Context) (State, string, error)
	// Channel connects to the test agent's port. Only one connection at a time; what the guest sent while nobody was
	// connected may be lost. Close disconnects.
	Channel(ctx context.Context, port dr.GuestPort) (Channel, error)
	// SerialLog is the path of the file to which the first serial port is written. It may not exist yet. The firmware
	// writes there too what it and its boot loader show on the screen, so that "No bootable device." and a boot loader's
	// prompt can be read: UEFI does so by itself, SeaBIOS where it is told (libvirt: <bios useserial='yes'/>).
	// A log that grows beyond what the host allows (2 MiB by libvirt's default) is renamed to SerialLog + ".0" and a new
	// one begun.
	SerialLog() string
	// Screenshot is what the screen shows, as PNG.
	Screenshot(ctx context.Context) ([]byte, error)
	// Resume lets a paused machine run on: one that was started Paused, or one stopped by an I/O error whose cause is
	// mended; the guest's request is tried again and the guest has noticed nothing. One that runs is no error.
	Resume(ctx context.Context) error
	// Usage is what it has used so far.
	Usage(ctx context.Context) (Usage, error)
	// Shutdown presses the power button and waits until the machine is off, at most limit; then it pulls the plug.
	// It says whether the guest went down by itself. A machine already gone is no error.
	Shutdown(ctx context.Context, limit time.Duration) (clean bool, err error)
	// Destroy pulls the plug. A machine already gone is no error.
	Destroy(ctx context.Context) error
}

// Channel is a connection to a guest's port. Hostile: the guest may send anything, at any rate, or nothing.
type Channel interface {
	io.ReadWriteCloser
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
}

// Usage is what a machine has used.
type Usage struct {
	CPU time.Duration // processor time of the emulator, virtual CPUs and all else
	// Waited is how long its virtual CPUs, all together, were ready to run while the host ran something else: what a guest calls
	// stolen time. 0 where the host does not tell.
	Waited     time.Duration
	ReadBytes  int64 // from its disks
	WriteBytes int64
	ReadOps    int64
}
