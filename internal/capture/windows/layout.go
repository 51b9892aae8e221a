package windows

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/musterdr/muster/internal/capture/view"
)

// Limits of what Windows is believed.
const (
	maxExtents  = 1024
	maxClusters = 1 << 33
	maxNumber   = 1 << 10 // of a disk
)

// Extent is where a part of a volume lies.
type Extent struct {
	Disk uint32 // N of PhysicalDriveN
	view.Range
}

// ParseExtents reads the answer to IOCTL_VOLUME_GET_VOLUME_DISK_EXTENTS: a count, and as often a disk, an offset and a
// length in bytes, all as the C compilers of Windows lay them out.
func ParseExtents(b []byte) ([]Extent, error) {
	const head, each = 8, 24
	if len(b) < head {
		return nil, errors.New("read where a volume lies: the answer is too short")
	}
	count := binary.LittleEndian.Uint32(b)
	if count == 0 || count > maxExtents || len(b) < head+int(count)*each {
		return nil, fmt.Errorf("read where a volume lies: %d parts in %d bytes", count, len(b))
	}
	var out []Extent
	for i := range int(count) {
		p := b[head+i*each:]
		e := Extent{Disk: binary.LittleEndian.Uint32(p), Range: view.Range{Offset: int64(binary.LittleEndian.Uint64(p[8:])), Length: int64(binary.LittleEndian.Uint64(p[16:]))}}
		if e.Disk >= maxNumber || e.Offset < 0 || e.Length <= 0 || e.Offset > 1<<62-e.Length {
			return nil, fmt.Errorf("read where a volume lies: %d bytes at %d of disk %d", e.Length, e.Offset, e.Disk)
		}
		out = append(out, e)
	}
	return out, nil
}

// FreeClusters reads the answer to FSCTL_GET_VOLUME_BITMAP for a whole volume: the first cluster, how many there are, and a
// bit for each, lowest first, that is set if it is in use. It gives the byte ranges of the volume that are not.
func FreeClusters(b []byte, cluster, volume int64) ([]view.Range, error) {
	const head = 16
	if len(b) < head || cluster < 512 || cluster > 2<<20 || cluster&(cluster-1) != 0 {
		return nil, fmt.Errorf("read what is free of a volume: %d bytes about clusters of %d", len(b), cluster)
	}
	first, count := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	if first != 0 || count > maxClusters || count > uint64(volume/cluster) || uint64(len(b)-head) < (count+7)/8 {
		return nil, fmt.Errorf("read what is free of a volume of %d bytes: %d clusters of %d from %d, in %d bytes", volume, count, cluster, first, len(b))
	}
	var out []view.Range
	bits := b[head:]
	for at := int64(0); at < int64(count); {
		if at%8 == 0 && bits[at/8] == 0xff {
			at += 8
			continue
		}
		end := at
		for end < int64(count) && bits[end/8]>>(end%8)&1 == 0 {
			end++
		}
		if end == at {
			at++
			continue
		}
		out = append(out, view.Range{Offset: at * cluster, Length: (end - at) * cluster})
		at = end
	}
	return out, nil
}

// place gives the parts of a disk that a shadow copy of a volume makes: read from the copy, but for what is free.
func place(on Extent, from view.Part, free []view.Range) []view.Part {
	var out []view.Part
	for _, r := range view.Without([]view.Range{{Length: on.Length}}, free) {
		out = append(out, view.Part{Range: view.Range{Offset: on.Offset + r.Offset, Length: r.Length}, From: from.From, At: r.Offset})
	}
	for _, r := range view.Join(free) {
		if r.End() <= on.Length {
			out = append(out, view.Part{Range: view.Range{Offset: on.Offset + r.Offset, Length: r.Length}, From: view.Zeros{}})
		}
	}
	return out
}

// number reads the N of PhysicalDriveN, with or without \\.\ before it, in any case.
func number(name string) (uint32, error) {
	digits, ok := strings.CutPrefix(strings.ToLower(strings.TrimPrefix(name, `\\.\`)), "physicaldrive")
	n, err := strconv.ParseUint(digits, 10, 32)
	if !ok || err != nil || n >= maxNumber || digits != strconv.FormatUint(n, 10) {
		return 0, fmt.Errorf("open disk %q: give a name like PhysicalDrive0", name)
	}
	return uint32(n), nil
}

// volume is a volume as Windows lists it.
type volume struct {
	name   string   // \\?\Volume{GUID}\
	paths  []string // where it is mounted: C:\
	fstype string
	on     []Extent
}

// shadowed says which volumes with content on the disks need a shadow copy: those that programs reach by a letter or a
// folder and that can have one. It refuses what this release cannot show at one instant.
func shadowed(volumes []volume, disks []uint32) ([]volume, error) {
	var out []volume
	for _, v := range volumes {
		ours := false
		for _, e := range v.on {
			for _, d := range disks {
				ours = ours || d == e.Disk
			}
		}
		switch {
		case !ours || len(v.paths) == 0:
			continue // nobody reaches it; if somebody writes to it all the same that is seen
		case v.fstype != "NTFS" && v.fstype != "ReFS":
			continue // VSS knows no other; FAT of a boot partition is hardly ever written to, and that is seen
		case len(v.on) > 1:
			return nil, fmt.Errorf("volume %s lies in %d pieces (spanned, striped or mirrored): this release reads simple volumes", v.paths[0], len(v.on))
		}
		out = append(out, v)
	}
	if len(out) > 1 {
		var names []string
		for _, v := range out {
			names = append(names, v.paths[0])
		}
		return nil, fmt.Errorf("volumes %s would get shadow copies one after the other, which do not show one instant: name disks with one volume each", strings.Join(names, ", "))
	}
	return out, nil
}
