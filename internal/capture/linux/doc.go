// Package linux reads a running Linux system from inside: what it is made of, what runs on it, and the content of its
// disks at one instant.
//
//	gatherers  Mounts, Listeners, Processes, NICs, Routes, OSRelease, Units, Timezone, …: one fact each
//	Inventory  all of them together
//	Disk       a whole disk of the running system, and what is stacked on it
//	Freeze     every writable file system on some disks held still, by a Watchdog process that thaws whatever happens
//
// A gatherer that takes a root reads files below it: "/" is this system, anything else a fixture tree in a test. What
// cannot be read is left empty: half an inventory is worth more than none. Nothing here writes to a disk.
//
// Knows: /proc, /sys, /run/udev, netlink, systemctl, FIFREEZE.
// Must not know: the wire, SSH, the store, why somebody asks.
package linux

import (
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Limits of what is read from one system.
const (
	MaxItems = 4096    // entries of any list
	maxText  = 8 << 20 // bytes of any one text file or command output
	maxPIDs  = 1 << 18 // processes looked at
)

// text reads a small file below root without the white space around it; "" if it cannot be read.
func text(root string, path ...string) string {
	return strings.TrimSpace(content(root, path...))
}

// content reads a text file below root, up to maxText bytes; "" if it cannot be read.
func content(root string, path ...string) string {
	f, err := os.Open(filepath.Join(append([]string{root}, path...)...))
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxText))
	if err != nil {
		return ""
	}
	return string(b)
}

// names lists the entries of a folder below root, in order; none if it cannot be read.
func names(root string, path ...string) []string {
	f, err := os.Open(filepath.Join(append([]string{root}, path...)...))
	if err != nil {
		return nil
	}
	defer f.Close()
	out, _ := f.Readdirnames(maxPIDs)
	return out
}

// cut bounds a list.
func cut[T any](list []T) []T {
	if len(list) > MaxItems {
		return list[:MaxItems]
	}
	return list
}
