package dr

import (
	"errors"
	"fmt"
	"time"
)

// Snapshot is what of a server was captured at one instant, as the store keeps it: immutable, complete or absent. Of kind
// SnapshotImage it is every disk; of kind SnapshotData it is files, which together with the disks of one image make a rescue
// image. That pair is tested, promoted and run under the identifier of the data.
type Snapshot struct {
	ID          string         `json:"id"`              // SnapshotID form
	ServerID    string         `json:"server_id"`       // Server.ID
	Server      string         `json:"server"`          // Server.Name at the time
	Kind        SnapshotKind   `json:"kind,omitempty"`  // "" in snapshots of releases before there were several: an image
	Image       string         `json:"image,omitempty"` // data: the snapshot of the image that it goes onto
	Parent      string         `json:"parent"`          // snapshot this is an increment of, of the same kind; "" for a full one
	Taken       time.Time      `json:"taken"`           // the instant the disks show, UTC
	Consistency Consistency    `json:"consistency"`     // what that instant promises
	Pass        CapturePass    `json:"pass"`            // how it was read, and why so
	Notes       []string       `json:"notes,omitempty"` // what an operator may want to know of the capture
	Disks       []SnapshotDisk `json:"disks"`           // image: same order as Inventory.Disks
	Files       *SnapshotFiles `json:"files,omitempty"` // data
	Inventory   Inventory      `json:"inventory"`       // image
	Stats       CaptureStats   `json:"stats"`
	Signs       *Signs         `json:"signs,omitempty"` // of tampering; nil in snapshots of releases that did not look
	// Applications are those that were found running, and whether they were at rest at that instant; see Hooks.
	Applications []Application `json:"applications,omitempty"`
}

// SnapshotDisk is one disk's image.
type SnapshotDisk struct {
	Name      string `json:"name"`       // kernel name on the source, or the file's base name
	Size      int64  `json:"size"`       // bytes
	BlockSize int    `json:"block_size"` // bytes, a power of two; never changes within a chain
	Root      string `json:"root"`       // object id of the image map's root in the store
	Data      int64  `json:"data"`       // bytes of non-zero blocks
}

// SnapshotKind is what a snapshot consists of.
type SnapshotKind string

// The kinds of snapshot.
const (
	SnapshotImage SnapshotKind = "image"
	SnapshotData  SnapshotKind = "data"
)

// SnapshotFiles is a set of files.
type SnapshotFiles struct {
	Roots   []string `json:"roots"`
	Exclude []string `json:"exclude,omitempty"`
	Index   string   `json:"index"`   // object id of the list of listings in the store
	Entries int64    `json:"entries"` // names, of whatever kind
	Bytes   int64    `json:"bytes"`   // of content, holes left out
	Changed int64    `json:"changed"` // entries that are not as the parent has them
	Gone    int64    `json:"gone"`    // entries that the parent has and this has not
}

// IsData says whether the snapshot consists of files.
func (s Snapshot) IsData() bool { return s.Kind == SnapshotData }

// ImageID is the snapshot whose disks are booted: of data the image that it goes onto, otherwise the snapshot itself.
func (s Snapshot) ImageID() string {
	if s.IsData() {
		return s.Image
	}
	return s.ID
}

// Onto gives what a rescue image of data shows: the disks and the machine of the image, at the time of the data.
func (s Snapshot) Onto(image Snapshot) Snapshot {
	s.Disks, s.Inventory = image.Disks, image.Inventory
	return s
}

// Validate says what is wrong with a snapshot that came from elsewhere. What is in the store is checked when it is read.
func (s Snapshot) Validate() error {
	err := errors.Join(ValidateID(s.ID), ValidateID(s.ServerID))
	if s.Parent != "" {
		err = errors.Join(err, ValidateID(s.Parent))
	}
	switch {
	case err != nil:
	case s.Taken.IsZero():
		err = errors.New("it does not say when it was taken")
	case s.IsData() && (s.Files == nil || ValidateID(s.Image) != nil || len(s.Disks) > 0):
		err = errors.New("data has files, no disks, and an image that it goes onto")
	case !s.IsData() && (s.Kind != "" && s.Kind != SnapshotImage || s.Image != "" || len(s.Disks) == 0 || len(s.Disks) > MaxDisks):
		err = fmt.Errorf("an image has 1 to %d disks", MaxDisks)
	}
	for _, d := range s.Disks {
		if err == nil && (d.Size <= 0 || d.BlockSize <= 0) {
			err = errors.New("a disk has no size")
		}
	}
	if err != nil {
		return fmt.Errorf("snapshot %.100q: %w", s.ID, err)
	}
	return nil
}

// Size is the total size of the disks in bytes, or of the files' content.
func (s Snapshot) Size() (n int64) {
	if s.Files != nil {
		return s.Files.Bytes
	}
	for _, d := range s.Disks {
		n += d.Size
	}
	return n
}

// Consistency says what the content of a snapshot promises.
type Consistency string

// From weakest to strongest.
const (
	CrashConsistent       Consistency = "crash"       // as if the power had been cut at that instant
	FileConsistent        Consistency = "file"        // each file for itself, one after another
	FilesystemConsistent  Consistency = "filesystem"  // every file system was frozen at that instant
	ApplicationConsistent Consistency = "application" // and every application that was found was at rest
)

// CapturePass says how a capture saw the disks at one instant, and how it found out what changed.
type CapturePass struct {
	Kind       PassKind     `json:"kind"`
	Reason     string       `json:"reason,omitempty"`      // why not a cheaper kind
	Provider   Provider     `json:"provider,omitempty"`    // "" in snapshots of releases before there were several
	PassedOver []PassedOver `json:"passed_over,omitempty"` // the providers before it in the order of preference, in that order
}

// Provider is a way to see every disk of a server at one instant.
type Provider string

// The providers. Of those that a server's source allows, the first that works is used.
const (
	ProviderTracking Provider = "ebpf"    // tracked in the running kernel, copied while the server goes on, then a short freeze
	ProviderLVM      Provider = "lvm"     // snapshots of the logical volumes, thin or thick
	ProviderZFS      Provider = "zfs"     // snapshots of volumes (zvol)
	ProviderFreeze   Provider = "freeze"  // everything compared, then the file systems frozen for a last pass
	ProviderCrash    Provider = "crash"   // everything compared in a moment in which nobody wrote, without a freeze
	ProviderQEMU     Provider = "qemu"    // dirty bitmaps and a backup export of the hypervisor, from outside
	ProviderVSS      Provider = "vss"     // shadow copies of Windows
	ProviderReflink  Provider = "reflink" // a clone of an image file, made by its file system (btrfs, xfs)
	ProviderRest     Provider = "rest"    // an image file or device that nobody wrote to
	ProviderFiles    Provider = "files"   // of data: the files themselves, one after another
)

// Known says whether this release knows the provider.
func (p Provider) Known() bool {
	switch p {
	case ProviderTracking, ProviderLVM, ProviderZFS, ProviderFreeze, ProviderCrash, ProviderQEMU, ProviderVSS, ProviderReflink, ProviderRest:
		return true
	}
	return false
}

// PassedOver says why a provider was not used.
type PassedOver struct {
	Provider Provider `json:"provider"`
	Reason   string   `json:"reason"`
}

// PassKind is a way of finding what changed.
type PassKind string

// The kinds of pass.
const (
	PassFull    PassKind = "full"    // no parent: everything was read and kept
	PassCompare PassKind = "compare" // everything was read, what differs from the parent was kept
	PassTracked PassKind = "tracked" // only what is known to have changed was read
)

// CaptureStats are the measured costs of a capture, in bytes unless named otherwise.
type CaptureStats struct {
	Read     int64         `json:"read"`              // read from the source's disks, all passes
	Changed  int64         `json:"changed"`           // in blocks that differ from the parent (full: the non-zero data)
	Resumed  int64         `json:"resumed,omitempty"` // in blocks that an earlier attempt, which was cut off, had kept: they were not sent again
	Sent     int64         `json:"sent"`              // over the wire from the source, framing included; 0 for local disks
	New      int64         `json:"new"`               // in blocks the store did not have, before compression
	Stored   int64         `json:"stored"`            // by which the store grew, after compression and sealing
	Frozen   time.Duration `json:"frozen"`            // how long the file systems stood still
	Duration time.Duration `json:"duration"`          // the whole capture
}

// State is what has been proven of a snapshot.
type State string

// The states of a snapshot. See the package comment for the order.
const (
	Kept         State = "kept"
	Replicated   State = "replicated"
	PreRecovered State = "pre-recovered"
	Verified     State = "verified"
	Rejected     State = "rejected"
	Expired      State = "expired"
)

var follows = map[State][]State{
	Kept:         {Replicated, PreRecovered, Rejected, Expired},
	Replicated:   {PreRecovered, Rejected, Expired},
	PreRecovered: {Verified, Rejected, Expired, PreRecovered},
	// A verified or rejected snapshot may be prepared and tested again, by a person or a newer release.
	Verified: {PreRecovered, Verified, Rejected, Expired},
	Rejected: {PreRecovered, Verified, Rejected, Expired},
}

// Follow says whether a snapshot may go from one state to another.
func Follow(from, to State) error {
	for _, s := range follows[from] {
		if s == to {
			return nil
		}
	}
	return fmt.Errorf("a snapshot that is %s cannot become %s", from, to)
}
