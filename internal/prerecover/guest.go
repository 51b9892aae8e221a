package prerecover

import (
	"context"
	"errors"
	"io"
	"io/fs"

	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/vm"
)

// Opener opens the disks of an image as one guest.
type Opener interface {
	// Open creates one delta a disk in dir, delta-0.qcow2, delta-1.qcow2, …, each above base of the same index, and
	// opens them together. Nothing is ever written to a base. dir must exist and hold no delta yet. On error nothing
	// is left in dir.
	Open(ctx context.Context, dir string, base []vm.Layer) (Guest, error)
}

// Guest is an image opened below its deltas. It is used by one goroutine. Paths are absolute paths of the guest; links
// in them are followed inside the guest and never lead out of it. Names may hold any byte but 0. Answers are hostile: a
// size or a list is only as long as the limit that was asked for. A path that is not there is fs.ErrNotExist.
type Guest interface {
	// Disks gives the whole disks in the order of the bases.
	Disks(ctx context.Context) ([]Disk, error)
	// Devices gives everything on the disks that can hold data: partitions, logical volumes, arrays, and whole disks
	// without a partition table, at most MaxDevices.
	Devices(ctx context.Context) ([]Device, error)

	// Mount mounts a device read-write at a folder of what is already mounted; the first is mounted at "/". Options are
	// those of mount -o, "" for none. What is below a mount point is hidden until Unmount.
	Mount(ctx context.Context, device, at, options string) error
	// Unmount unmounts everything.
	Unmount(ctx context.Context) error

	// Stat describes what a path leads to, following links; Lstat describes the path itself.
	Stat(ctx context.Context, path string) (Stat, error)
	Lstat(ctx context.Context, path string) (Stat, error)
	// List gives the names in a folder, sorted, without . and .., or ErrTooLarge if there are more than limit.
	List(ctx context.Context, path string, limit int) ([]string, error)
	// Read gives the content of a regular file, following links, or ErrTooLarge if it is longer than limit bytes. What
	// is neither a file nor absent is ErrNotRegular.
	Read(ctx context.Context, path string, limit int64) ([]byte, error)
	// Space says how much room is left on the file system that holds path.
	Space(ctx context.Context, path string) (Space, error)
	// Xattr gives an extended attribute, "" if there is none.
	Xattr(ctx context.Context, path, name string) (string, error)

	// Write makes content the content of a regular file, following links. A file that is there keeps its owner, mode
	// and attributes; a new one belongs to root with mode 0644.
	Write(ctx context.Context, path string, content []byte) error
	// Mkdir makes a folder of root's with mode 0755 and those above it that are missing. One that is there is no error.
	Mkdir(ctx context.Context, path string) error
	// Symlink makes path a symbolic link, in place of a file or link that is there.
	Symlink(ctx context.Context, target, path string) error
	// Remove removes a file or link. One that is not there is no error; a folder is an error.
	Remove(ctx context.Context, path string) error
	Chmod(ctx context.Context, path string, mode fs.FileMode) error
	Chown(ctx context.Context, path string, uid, gid int) error
	SetXattr(ctx context.Context, path, name, value string) error

	// Walk gives a folder and everything below it in fileset.Compare's order, as entries that have what can be compared without
	// reading a file: kind, path, mode, owner, size, mtime, ctime and inode; what cannot be told is zero. Links are not
	// followed, mounted file systems are entered. Here paths may be as long as fileset.MaxPath. More than MaxWalk bytes of
	// names are ErrTooLarge.
	Walk(ctx context.Context, folder string) ([]fileset.Entry, error)
	// RemoveAll removes whatever is at a path, with everything below it. Nothing there is no error.
	RemoveAll(ctx context.Context, path string) error
	// Unpack unpacks a tar stream at / with everything it says of each entry. What is there is replaced. Its names must not
	// pass through links: whoever calls has made sure. It may take long, which does not count against the guest's own limit.
	Unpack(ctx context.Context, tar io.Reader) error

	// Deltas are the paths of the deltas in the order of the bases.
	Deltas() []string
	// Close writes out everything, ends the guest and keeps the deltas. They are complete only if it returns nil.
	Close(ctx context.Context) error
	// Abandon ends the guest and removes the deltas. After Close it only removes them.
	Abandon()
}

// Errors of a Guest, matched with errors.Is; and fs.ErrNotExist.
var (
	ErrTooLarge   = errors.New("larger than the limit")
	ErrNotRegular = errors.New("not a regular file")
)

// MaxDevices is the largest number of devices a guest is looked at for.
const MaxDevices = 256

// MaxWalk bounds the names that Walk gives, in bytes.
const MaxWalk = 256 << 20

// MaxPath is the longest path in a guest, in bytes. Linux allows 4096; no path an overlay names comes near.
const MaxPath = 1024

// Disk is a whole disk.
type Disk struct {
	Name     string // as the guest is opened: /dev/sda
	Table    string // gpt, dos, or "" for none
	BootCode bool   // the first sector holds boot code
}

// Device is something on a disk that can hold data.
type Device struct {
	Name     string // /dev/sda1, /dev/vg/root, /dev/md127
	Disk     int    // index of the disk a partition lies on; -1 for what spans disks
	Number   int    // of the partition; 0 if it is none
	Type     string // ext4, xfs, btrfs, vfat, swap, crypto_LUKS, LVM2_member, …; "" unknown
	UUID     string
	Label    string
	PartUUID string
	PartType string // GPT type GUID in lower case, or 0x… for dos
}

// GPT partition types that say how a machine starts.
const (
	partESP      = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
	partBIOSBoot = "21686148-6449-6e6f-744e-656564454649"
	partESPDOS   = "0xef"
)

// ESP says whether the device is an EFI system partition.
func (d Device) ESP() bool { return d.PartType == partESP || d.PartType == partESPDOS }

// Stat describes a path.
type Stat struct {
	Mode fs.FileMode // type and permissions
	Size int64
	UID  int
	GID  int
	Link string // where a symbolic link leads, only from Lstat
}

// Space is the room left on a file system.
type Space struct {
	Free   int64 // bytes
	Inodes int64 // -1 if the file system does not count them
}

// ErrNotRescuable says that the image itself cannot be made to boot here, with the reason in the error that wraps it.
// Trying again does not help.
var ErrNotRescuable = errors.New("the image is not rescuable")
