package image

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Mark is what changes when a file or block device is written to: for a file its times and size, for a device the kernel's
// count of sectors written and discarded. Two marks that are equal mean that nobody wrote in between, and that the path leads
// to the same file.
type Mark struct {
	device, inode  uint64
	size           int64
	mtime, ctime   unix.Timespec
	written, other string
}

// LookAt gives the mark of a file or block device as it is now.
func LookAt(path string) (Mark, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Mark{}, fmt.Errorf("look at disk %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return Mark{device: st.Dev, inode: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}, nil
	}
	m := Mark{device: st.Rdev, inode: st.Ino}
	stat, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if err != nil {
		return Mark{}, fmt.Errorf("count what is written to disk %s: %w", path, err)
	}
	const sectorsWritten, sectorsDiscarded = 6, 13
	f := strings.Fields(string(stat))
	if len(f) > sectorsWritten {
		m.written = f[sectorsWritten]
	}
	if len(f) > sectorsDiscarded {
		m.other = f[sectorsDiscarded]
	}
	return m, nil
}
