package guestfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/guestfish"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/vm"
)

// guest implements prerecover.Guest.
type guest struct {
	fish     *guestfish.Fish
	work     string
	deltas   []string
	disks    int
	deadline time.Time
	limit    time.Duration
	closed   bool
	known    []string // whole disks, once listed
}

var errLimit = errors.New("the guest was open for longer than the limit")

// bound adds the guest's own time limit to a context.
func (g *guest) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithDeadlineCause(ctx, g.deadline, fmt.Errorf("%w of %s", errLimit, g.limit))
}

func (g *guest) do(ctx context.Context, command string, args ...string) ([]byte, error) {
	ctx, cancel := g.bound(ctx)
	defer cancel()
	out, err := g.fish.Do(ctx, command, args...)
	if errors.Is(err, guestfish.ErrTooLarge) {
		err = fmt.Errorf("%w (%w)", prerecover.ErrTooLarge, err)
	}
	return out, err
}

// doPath is do for a path of the guest.
func (g *guest) doPath(ctx context.Context, command, path string, more ...string) ([]byte, error) {
	if err := checkPath(path); err != nil {
		return nil, fmt.Errorf("%s: %w", command, err)
	}
	return g.do(ctx, command, append([]string{path}, more...)...)
}

func checkPath(path string) error {
	if !strings.HasPrefix(path, "/") || len(path) > prerecover.MaxPath {
		return fmt.Errorf("path %.80q: use an absolute path of at most %d bytes", path, prerecover.MaxPath)
	}
	return nil
}

// deviceRE is what a device of the appliance may be called. LVM allows no other characters in names.
var deviceRE = regexp.MustCompile(`^/dev/[A-Za-z0-9+_./-]{1,250}$`)

func (g *guest) deviceList(ctx context.Context, command string) ([]string, error) {
	out, err := g.do(ctx, command)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, name := range strings.Fields(string(out)) {
		if deviceRE.MatchString(name) && len(names) < prerecover.MaxDevices {
			names = append(names, name)
		}
	}
	return names, nil
}

// blkid probes one device. One with no known signature is an empty answer.
func (g *guest) blkid(ctx context.Context, device string) (map[string]string, error) {
	out, err := g.do(ctx, "blkid", device)
	if err != nil {
		if g.fish.Broken() != nil {
			return nil, err
		}
		return nil, nil // blkid fails on a device without a signature, and on nothing else that matters here
	}
	answer := map[string]string{}
	for _, line := range strings.Split(string(out), "\n") {
		if key, value, ok := strings.Cut(line, ": "); ok && len(value) < 256 {
			answer[key] = value
		}
	}
	return answer, nil
}

// wholeDisks lists the disks, in the order in which they were added.
func (g *guest) wholeDisks(ctx context.Context) ([]string, error) {
	if g.known != nil {
		return g.known, nil
	}
	names, err := g.deviceList(ctx, "list-devices")
	if err != nil {
		return nil, err
	}
	if len(names) != g.disks {
		return nil, fmt.Errorf("the appliance shows %d disks of %d", len(names), g.disks)
	}
	g.known = names
	return names, nil
}

func (g *guest) Disks(ctx context.Context) ([]prerecover.Disk, error) {
	names, err := g.wholeDisks(ctx)
	if err != nil {
		return nil, fmt.Errorf("list disks: %w", err)
	}
	disks := make([]prerecover.Disk, 0, len(names))
	for _, name := range names {
		id, err := g.blkid(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("list disks: %w", err)
		}
		d := prerecover.Disk{Name: name, Table: id["PTTYPE"]}
		code, err := g.do(ctx, "pread-device", name, "440", "0")
		if err == nil {
			d.BootCode = len(bytes.Trim(code, "\x00")) > 0
		} else if g.fish.Broken() != nil {
			return nil, fmt.Errorf("list disks: %w", err)
		}
		disks = append(disks, d)
	}
	return disks, nil
}

func (g *guest) Devices(ctx context.Context) ([]prerecover.Device, error) {
	disks, err := g.wholeDisks(ctx)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var names []string
	for _, command := range []string{"list-partitions", "list-md-devices", "lvs"} {
		more, err := g.deviceList(ctx, command)
		if err != nil {
			return nil, fmt.Errorf("list devices: %w", err)
		}
		names = append(names, more...)
	}
	for _, d := range disks {
		if !slices.ContainsFunc(names, func(n string) bool { return isPartition(n, d) }) {
			names = append(names, d)
		}
	}
	if len(names) > prerecover.MaxDevices {
		names = names[:prerecover.MaxDevices]
	}
	devices := make([]prerecover.Device, 0, len(names))
	for _, name := range names {
		id, err := g.blkid(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("list devices: %w", err)
		}
		d := prerecover.Device{Name: name, Disk: -1, Type: id["TYPE"], UUID: id["UUID"], Label: id["LABEL"],
			PartUUID: id["PART_ENTRY_UUID"], PartType: strings.ToLower(id["PART_ENTRY_TYPE"])}
		for i, disk := range disks {
			if name == disk {
				d.Disk = i
			} else if isPartition(name, disk) {
				d.Disk = i
				d.Number, _ = strconv.Atoi(name[len(disk):])
			}
		}
		devices = append(devices, d)
	}
	return devices, nil
}

// isPartition says whether /dev/sda1 lies on /dev/sda.
func isPartition(name, disk string) bool {
	rest, ok := strings.CutPrefix(name, disk)
	return ok && rest != "" && strings.Trim(rest, "0123456789") == ""
}

func (g *guest) Mount(ctx context.Context, device, at, options string) error {
	if err := checkPath(at); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	// Reading a guest must not write to it.
	options = strings.TrimSuffix("noatime,"+options, ",")
	if _, err := g.do(ctx, "mount-options", options, device, at); err != nil {
		return fmt.Errorf("mount %s at %s: %w", device, at, err)
	}
	return nil
}

func (g *guest) Unmount(ctx context.Context) error {
	if _, err := g.do(ctx, "umount-all"); err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	return nil
}

func (g *guest) Stat(ctx context.Context, path string) (prerecover.Stat, error) {
	return g.stat(ctx, "statns", path)
}

func (g *guest) Lstat(ctx context.Context, path string) (prerecover.Stat, error) {
	s, err := g.stat(ctx, "lstatns", path)
	if err != nil || s.Mode&fs.ModeSymlink == 0 {
		return s, err
	}
	out, err := g.doPath(ctx, "readlink", path)
	if err != nil {
		return s, err
	}
	s.Link = strings.TrimSuffix(string(out), "\n")
	return s, nil
}

func (g *guest) stat(ctx context.Context, command, path string) (prerecover.Stat, error) {
	out, err := g.doPath(ctx, command, path)
	if err != nil {
		return prerecover.Stat{}, err
	}
	field := map[string]int64{}
	for _, line := range strings.Split(string(out), "\n") {
		if key, value, ok := strings.Cut(line, ": "); ok {
			if n, err := strconv.ParseInt(value, 10, 64); err == nil {
				field[key] = n
			}
		}
	}
	mode, ok := field["st_mode"]
	if !ok {
		return prerecover.Stat{}, fmt.Errorf("%s: guestfish gave no mode", command)
	}
	return prerecover.Stat{Mode: fileMode(mode), Size: field["st_size"], UID: int(field["st_uid"]), GID: int(field["st_gid"])}, nil
}

// fileMode turns a mode of Linux into Go's.
func fileMode(m int64) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	switch m & 0o170000 {
	case 0o040000:
		mode |= fs.ModeDir
	case 0o120000:
		mode |= fs.ModeSymlink
	case 0o010000:
		mode |= fs.ModeNamedPipe
	case 0o140000:
		mode |= fs.ModeSocket
	case 0o020000:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case 0o060000:
		mode |= fs.ModeDevice
	}
	if m&0o4000 != 0 {
		mode |= fs.ModeSetuid
	}
	if m&0o2000 != 0 {
		mode |= fs.ModeSetgid
	}
	if m&0o1000 != 0 {
		mode |= fs.ModeSticky
	}
	return mode
}

func (g *guest) List(ctx context.Context, path string, limit int) ([]string, error) {
	s, err := g.Stat(ctx, path)
	if err != nil {
		return nil, err
	}
	if !s.Mode.IsDir() {
		return nil, fmt.Errorf("list: not a folder: %w", fs.ErrNotExist)
	}
	host := filepath.Join(g.work, "list")
	if _, err := g.doPath(ctx, "ls0", path, host); err != nil {
		return nil, err
	}
	raw, err := readHost(host, int64(limit)*256)
	if err != nil {
		return nil, fmt.Errorf("list: %w", err)
	}
	names := strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
	names = slices.DeleteFunc(names, func(n string) bool { return n == "" || n == "." || n == ".." || strings.Contains(n, "/") })
	if len(names) > limit {
		return nil, fmt.Errorf("list: %w of %d names", prerecover.ErrTooLarge, limit)
	}
	slices.Sort(names)
	return names, nil
}

func (g *guest) Read(ctx context.Context, path string, limit int64) ([]byte, error) {
	s, err := g.Stat(ctx, path)
	if err != nil {
		return nil, err
	}
	if !s.Mode.IsRegular() {
		return nil, prerecover.ErrNotRegular
	}
	if s.Size > limit {
		return nil, fmt.Errorf("%w: %d bytes of at most %d", prerecover.ErrTooLarge, s.Size, limit)
	}
	if s.Size <= shortRead {
		return g.readShort(ctx, path, s.Size)
	}
	host := filepath.Join(g.work, "read")
	if _, err := g.doPath(ctx, "download", path, host); err != nil {
		return nil, err
	}
	return readHost(host, limit)
}

// Contents up to these lengths, in bytes, travel in the conversation.
const (
	shortRead  = 1 << 20
	shortWrite = 32 << 10
	writePiece = 1400 // of one command; each byte may become four
	shortPath  = 400
)

func (g *guest) readShort(ctx context.Context, path string, size int64) ([]byte, error) {
	if size == 0 {
		return []byte{}, nil
	}
	content, err := g.doPath(ctx, "pread", path, strconv.FormatInt(size, 10), "0")
	if err != nil {
		return nil, err
	}
	if int64(len(content)) != size {
		return nil, fmt.Errorf("read: %d bytes of %d", len(content), size)
	}
	return content, nil
}

// writeShort writes a content that holds no zero byte, which guestfish cannot be told.
func (g *guest) writeShort(ctx context.Context, path string, content []byte) error {
	command := "write"
	for first := true; first || len(content) > 0; first = false {
		n := min(len(content), writePiece)
		if _, err := g.doPath(ctx, command, path, string(content[:n])); err != nil {
			return err
		}
		command, content = "write-append", content[n:]
	}
	return nil
}

// readHost reads and removes a file guestfish has written for us.
func readHost(host string, limit int64) ([]byte, error) {
	b, err := guestfish.ReadHost(host, limit)
	if errors.Is(err, guestfish.ErrTooLarge) {
		err = prerecover.ErrTooLarge
	}
	return b, err
}

func (g *guest) Space(ctx context.Context, path string) (prerecover.Space, error) {
	out, err := g.doPath(ctx, "statvfs", path)
	if err != nil {
		return prerecover.Space{}, err
	}
	field := map[string]int64{}
	for _, line := range strings.Split(string(out), "\n") {
		if key, value, ok := strings.Cut(line, ": "); ok {
			if n, err := strconv.ParseInt(value, 10, 64); err == nil {
				field[key] = n
			}
		}
	}
	s := prerecover.Space{Free: field["frsize"] * field["bavail"], Inodes: field["favail"]}
	if field["files"] == 0 {
		s.Inodes = -1 // vfat and btrfs make them as needed
	}
	return s, nil
}

func (g *guest) Xattr(ctx context.Context, path, name string) (string, error) {
	out, err := g.doPath(ctx, "lgetxattr", path, name)
	if err != nil {
		if g.fish.Broken() == nil && !errors.Is(err, fs.ErrNotExist) {
			return "", nil
		}
		return "", err
	}
	return strings.TrimRight(string(out), "\x00"), nil
}

func (g *guest) Write(ctx context.Context, path string, content []byte) error {
	s, err := g.Stat(ctx, path)
	isNew := errors.Is(err, fs.ErrNotExist)
	switch {
	case err != nil && !isNew:
		return err
	case err == nil && !s.Mode.IsRegular():
		return prerecover.ErrNotRegular
	}
	if len(content) <= shortWrite && len(path) <= shortPath && bytes.IndexByte(content, 0) < 0 {
		err = g.writeShort(ctx, path, content)
	} else {
		err = g.upload(ctx, path, content)
	}
	if err != nil {
		return err
	}
	if isNew {
		return g.Chmod(ctx, path, 0o644)
	}
	return nil
}

func (g *guest) upload(ctx context.Context, path string, content []byte) error {
	host := filepath.Join(g.work, "write")
	if err := os.WriteFile(host, content, 0o600); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	defer os.Remove(host)
	_, err := g.do(ctx, "upload", host, path)
	return err
}

func (g *guest) Mkdir(ctx context.Context, path string) error {
	if s, err := g.Stat(ctx, path); err == nil && s.Mode.IsDir() {
		return nil
	}
	_, err := g.doPath(ctx, "mkdir-p", path)
	return err
}

func (g *guest) Symlink(ctx context.Context, target, path string) error {
	if len(target) > prerecover.MaxPath {
		return errors.New("link: the target is too long")
	}
	if err := g.Remove(ctx, path); err != nil {
		return err
	}
	_, err := g.do(ctx, "ln-s", target, path)
	return err
}

func (g *guest) Remove(ctx context.Context, path string) error {
	s, err := g.stat(ctx, "lstatns", path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case s.Mode.IsDir():
		return fmt.Errorf("remove: it is a folder: %w", prerecover.ErrNotRegular)
	}
	_, err = g.doPath(ctx, "rm", path)
	return err
}

func (g *guest) Chmod(ctx context.Context, path string, mode fs.FileMode) error {
	_, err := g.do(ctx, "chmod", fmt.Sprintf("0%o", mode.Perm()), path)
	return err
}

func (g *guest) Chown(ctx context.Context, path string, uid, gid int) error {
	_, err := g.do(ctx, "lchown", strconv.Itoa(uid), strconv.Itoa(gid), path)
	return err
}

func (g *guest) SetXattr(ctx context.Context, path, name, value string) error {
	_, err := g.do(ctx, "lsetxattr", name, value, strconv.Itoa(len(value)), path)
	return err
}

func (g *guest) Deltas() []string { return slices.Clone(g.deltas) }

func (g *guest) Close(ctx context.Context) error {
	if g.closed {
		return nil
	}
	for _, command := range []string{"umount-all", "sync", "shutdown"} {
		if _, err := g.do(ctx, command); err != nil {
			return fmt.Errorf("close image: %w", err)
		}
	}
	g.fish.Quit()
	g.closed = true
	if err := os.RemoveAll(g.work); err != nil {
		return fmt.Errorf("close image: %w", err)
	}
	for _, d := range g.deltas {
		if err := vm.Detach(ctx, d); err != nil {
			return fmt.Errorf("close image: %w", err)
		}
	}
	return syncFiles(g.deltas)
}

// syncFiles puts the deltas on stable storage: the appliance's disks are written without waiting, for speed.
func syncFiles(paths []string) error {
	for _, p := range paths {
		f, err := os.OpenFile(p, os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("close image: %w", err)
		}
		err = errors.Join(f.Sync(), f.Close())
		if err != nil {
			return fmt.Errorf("close image: write out %s: %w", p, err)
		}
	}
	return nil
}

func (g *guest) Abandon() {
	if g.fish != nil && !g.closed {
		g.fish.Kill()
		g.fish.Quit()
		g.closed = true
	}
	for _, d := range g.deltas {
		_ = os.Remove(d)
	}
	_ = os.RemoveAll(g.work)
}
