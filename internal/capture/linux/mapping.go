package linux

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/musterdr/muster/internal/capture/view"
)

// target is one line of a device-mapper table: what a range of a mapped device is made of.
type target struct {
	view.Range
	kind string   // linear, thin, snapshot-origin, …
	args []string // devices are "major:minor", offsets sectors
}

// sector is the unit of device-mapper tables, in bytes.
const sector = 512

// maxTargets bounds what is read of the tables.
const maxTargets = 1 << 16

var tableLine = regexp.MustCompile(`^(.+): (\d+) (\d+) (\S+) ?(.*)$`)

// parseTables reads what "dmsetup table" prints, by the name of the mapped device. Lines that it does not understand are
// skipped: a device without a table that is understood cannot be resolved.
func parseTables(text string) map[string][]target {
	out := map[string][]target{}
	n := 0
	for line := range strings.Lines(text) {
		m := tableLine.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		start, err1 := strconv.ParseInt(m[2], 10, 54)
		length, err2 := strconv.ParseInt(m[3], 10, 54)
		if n++; err1 != nil || err2 != nil || n > maxTargets {
			continue
		}
		out[m[1]] = append(out[m[1]], target{Range: view.Range{Offset: start * sector, Length: length * sector}, kind: m[4], args: strings.Fields(m[5])})
	}
	return out
}

// extent is a range of a device and where on a disk it lies.
type extent struct {
	view.Range        // of the device
	disk       string // kernel name
	at         int64  // on the disk, bytes
}

// mapping knows how block devices lie on disks.
type mapping struct {
	blocks map[string]Block
	byDev  map[string]string   // kernel names by "major:minor"
	names  map[string]string   // device-mapper names by kernel name
	tables map[string][]target // by kernel name
	starts map[string]int64    // of partitions on their disks, bytes
}

// newMapping puts together what the kernel says of block devices and what dmsetup says of those that are mapped.
func newMapping(root, tables string) mapping {
	m := mapping{blocks: Blocks(root), byDev: map[string]string{}, names: map[string]string{}, tables: map[string][]target{}, starts: map[string]int64{}}
	parsed := parseTables(tables)
	for name, b := range m.blocks {
		m.byDev[b.Dev] = name
		if mapped := text(root, "sys/block", name, "dm/name"); mapped != "" {
			m.names[name], m.tables[name] = mapped, parsed[mapped]
			continue
		}
		if len(b.Parents) == 1 {
			if start, ok := partitionStart(root, b.Parents[0], b); ok {
				m.starts[name] = start
			}
		}
	}
	return m
}

// deepest bounds how many devices may lie on each other.
const deepest = 8

// onDisks says where on whole disks a range of a device lies, as long as every layer between only moves it.
func (m mapping) onDisks(name string, r view.Range) ([]extent, error) {
	return m.resolve(name, r, deepest)
}

func (m mapping) resolve(name string, r view.Range, depth int) ([]extent, error) {
	b, ok := m.blocks[name]
	switch start, part := m.starts[name]; {
	case !ok || depth == 0:
		return nil, fmt.Errorf("where %s lies cannot be told", name)
	case r.Offset < 0 || r.Length <= 0 || r.Length > b.Size || r.Offset > b.Size-r.Length:
		return nil, fmt.Errorf("%s has no %d bytes at %d", name, r.Length, r.Offset)
	case part:
		out, err := m.resolve(b.Parents[0], view.Range{Offset: start + r.Offset, Length: r.Length}, depth-1)
		for i := range out {
			out[i].Offset -= start
		}
		return out, err
	case m.names[name] == "" && len(b.Parents) > 0:
		return nil, fmt.Errorf("%s is put together from other devices (%s)", name, strings.Join(b.Parents, ", "))
	case m.names[name] == "":
		return []extent{{Range: r, disk: name, at: r.Offset}}, nil
	}
	var out []extent
	covered := int64(0)
	for _, t := range m.tables[name] {
		from, to := max(r.Offset, t.Offset), min(r.End(), t.End())
		if from >= to {
			continue
		}
		lower, at, err := m.below(name, t)
		if err != nil {
			return nil, err
		}
		shift := at - t.Offset // from an offset in the device to one in the lower
		pieces, err := m.resolve(lower, view.Range{Offset: from + shift, Length: to - from}, depth-1)
		if err != nil {
			return nil, err
		}
		for _, p := range pieces {
			p.Offset -= shift
			out = append(out, p)
		}
		covered += to - from
	}
	if covered != r.Length {
		return nil, fmt.Errorf("the table of %s does not say where all of it lies", m.names[name])
	}
	return out, nil
}

// below gives the device that a target moves its range to, and the offset there in bytes.
func (m mapping) below(name string, t target) (lower string, at int64, err error) {
	arg := ""
	switch {
	case t.kind == "linear" && len(t.args) == 2:
		sectors, err := strconv.ParseInt(t.args[1], 10, 54)
		if err != nil {
			return "", 0, fmt.Errorf("the table of %s begins at %q", m.names[name], t.args[1])
		}
		arg, at = t.args[0], sectors*sector
	case t.kind == "snapshot-origin" && len(t.args) == 1:
		arg, at = t.args[0], t.Offset
	default:
		return "", 0, fmt.Errorf("%s is mapped by %q, which this release cannot read piece by piece", m.names[name], t.kind)
	}
	lower, ok := m.byDev[arg]
	if !ok {
		return "", 0, fmt.Errorf("%s lies on device %s, which the kernel does not list", m.names[name], arg)
	}
	return lower, at, nil
}

// mapped gives the ranges of each disk that lie below mapped devices, whatever they are for.
func (m mapping) mapped() map[string][]view.Range {
	out := map[string][]view.Range{}
	add := func(name string, r view.Range) {
		extents, _ := m.onDisks(name, r) // what cannot be resolved lies on another mapped device, whose ranges are added
		for _, e := range extents {
			out[e.disk] = append(out[e.disk], view.Range{Offset: e.at, Length: e.Length})
		}
	}
	for name, targets := range m.tables {
		for _, t := range targets {
			if t.kind != "striped" {
				add(name, t.Range)
				continue
			}
			// "striped COUNT CHUNK (DEVICE OFFSET)…": each device holds its share in one piece.
			for i := 2; i+1 < len(t.args); i += 2 {
				lower, ok := m.byDev[t.args[i]]
				at, err := strconv.ParseInt(t.args[i+1], 10, 54)
				if count := int64(len(t.args)/2 - 1); ok && err == nil && count > 0 {
					add(lower, view.Range{Offset: at * sector, Length: t.Length / count})
				}
			}
		}
	}
	for disk := range out {
		out[disk] = view.Join(out[disk])
	}
	return out
}

// named finds a mapped device by its device-mapper name.
func (m mapping) named(mapped string) (kernel string, ok bool) {
	for name, n := range m.names {
		if n == mapped {
			return name, true
		}
	}
	return "", false
}
