package track

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// text reads a small file of the kernel's; "" if there is none.
func text(path ...string) string {
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// identify looks which device has a name now. Its error is an *Unknown if the device cannot be tracked.
func identify(name string) (identity, error) {
	refuse := func(detail string) (identity, error) {
		return identity{}, &Unknown{Disk: name, Reason: Untrackable, Detail: detail}
	}
	if !goodName(name) {
		return refuse("that is no kernel name of a disk, like sda")
	}
	dir := filepath.Join("/sys/block", name)
	var major, minor uint32
	if _, err := fmt.Sscanf(text(dir, "dev"), "%d:%d", &major, &minor); err != nil {
		return refuse("the kernel lists no whole disk of this name")
	}
	size, err := strconv.ParseInt(text(dir, "size"), 10, 64)
	if err != nil || size <= 0 || size > maxSize/512 {
		return refuse("it has no size that can be tracked")
	}
	if zoned := text(dir, "queue/zoned"); zoned != "" && zoned != "none" {
		return refuse("it is a zoned device (" + zoned + ")")
	}
	if text(dir, "queue/dax") == "1" {
		return refuse("programs may write to it through memory (DAX), which nobody sees")
	}
	if text(dir, "queue/iostats") == "0" {
		return refuse("the kernel does not count its operations; write 1 to " + filepath.Join(dir, "queue/iostats"))
	}
	i := identity{Number: major<<20 | minor, Size: size * 512}
	i.Seq, _ = strconv.ParseUint(text(dir, "diskseq"), 10, 64)
	if _, err := os.Stat(filepath.Join(dir, "mq")); errors.Is(err, fs.ErrNotExist) {
		i.Bios = true
	}
	return i, nil
}

// differs says why a device is not the one it was; nil if it is.
func (i identity) differs(now identity, name string) *Unknown {
	switch {
	case i.Number != now.Number || i.Seq != now.Seq || i.Bios != now.Bios:
		return &Unknown{name, Replaced, "another device has its name now"}
	case i.Size != now.Size:
		return &Unknown{name, Resized, fmt.Sprintf("it had %d bytes and has %d now", i.Size, now.Size)}
	}
	return nil
}

// counters are the kernel's own of a whole disk.
type counters struct {
	sectors uint64 // written and discarded
	writing uint64 // writes and discards in flight
}

// Columns of /sys/block/X/stat.
const (
	columnWritten   = 6
	columnDiscarded = 13 // from Linux 4.18
)

func readCounters(stat, inflight *os.File) (counters, error) {
	var both [2]string
	for i, f := range []*os.File{stat, inflight} {
		var buf [512]byte
		n, err := unix.Pread(int(f.Fd()), buf[:], 0)
		if err != nil {
			return counters{}, fmt.Errorf("read %s: %w", f.Name(), err)
		}
		both[i] = string(buf[:n])
	}
	return parseCounters(both[0], both[1])
}

// parseCounters reads /sys/block/X/stat and /sys/block/X/inflight, which has the reads and the writes.
func parseCounters(stat, inflight string) (c counters, err error) {
	var reads uint64
	if _, err := fmt.Sscanf(inflight, "%d %d", &reads, &c.writing); err != nil {
		return counters{}, fmt.Errorf("read how many operations are in flight: %w", err)
	}
	fields := strings.Fields(stat)
	if len(fields) <= columnWritten {
		return counters{}, fmt.Errorf("read the kernel's counters: %d columns are too few", len(fields))
	}
	for i, f := range fields {
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			return counters{}, fmt.Errorf("read the kernel's counters: %w", err)
		}
		if i == columnWritten || i == columnDiscarded {
			c.sectors += n
		}
	}
	return c, nil
}

// slept gives how long the machine has been suspended since it was started.
func slept() (time.Duration, error) {
	var with, without unix.Timespec
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_MONOTONIC, &without), unix.ClockGettime(unix.CLOCK_BOOTTIME, &with)); err != nil {
		return 0, fmt.Errorf("read the clocks: %w", err)
	}
	return time.Duration(with.Nano() - without.Nano()), nil
}

// awake is how far two readings of slept may lie apart if the machine did not sleep: the clocks are read one after the
// other, and this process may have to wait in between.
const awake = 500 * time.Millisecond

func bootID() (string, error) {
	id := text("/proc/sys/kernel/random/boot_id")
	if id == "" {
		return "", errors.New("find which boot this is: /proc/sys/kernel/random/boot_id cannot be read")
	}
	return id, nil
}
