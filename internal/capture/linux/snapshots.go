package linux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/capture/view"
)

// ErrSnapshot is that snapshots of logical volumes could not be made although it looked as if they could.
var ErrSnapshot = errors.New("logical volumes could not be snapshotted")

// maxLabels bounds what is kept in memory of the metadata of volume groups, in bytes.
const maxLabels = 64 << 20

// Snapshots are those of the logical volumes below the mounted file systems of some disks, all made while everything stands
// still. A thick volume is read from its snapshot. A thin one is read where it lies: what its snapshot shares with it is
// written elsewhere from then on, so the pool holds both until the snapshot is removed.
//
// The disks are then a view: the volumes, whenever there is time; what no volume holds, at any time; swap as if it were new; the rest (partition
// table, boot file systems, the pool's metadata) while everything stands still. Where volumes are thick the metadata of the
// volume group is what it was just before, so that the image knows no snapshot; a thin pool has noted its snapshot
// elsewhere as well, so there it is what it is just after, and the next capture of a restored server removes it.
//
// Used once at a time, by one goroutine.
type Snapshots struct {
	disks   []*Disk
	mapping mapping
	volumes []snapshotted
	labels  []view.Range // of the volume groups of thick volumes, in the order of labelOn
	labelOn []*Disk
	loose   map[string][]view.Range // by disk: may be read at any time
	swap    map[string][]view.Range // by disk: of no use after this boot

	serial   int
	made     []string // names of snapshots
	origins  []*Disk  // open snapshots of thick volumes
	Since    time.Time
	Took     time.Duration // from the first to the last, an upper bound of what they cost whoever writes
	nests    bool
	identity string
}

// snapshotted is a logical volume that gets a snapshot.
type snapshotted struct {
	logical
	kernel string
	system string // "major:minor" of the file system
	room   int64  // bytes of its snapshot; 0 of a thin one
	on     []extent
	pool   string // kernel name of the thin pool
}

// PlanSnapshots finds the logical volumes below the mounted file systems of the disks, or says in an error why not all of
// them can be snapshotted at one instant. It changes nothing.
func PlanSnapshots(ctx context.Context, disks []*Disk) (*Snapshots, error) {
	systems, err := writableOn("/", kernelNames(disks))
	if err != nil {
		return nil, err
	}
	s := &Snapshots{disks: disks, loose: map[string][]view.Range{}, swap: map[string][]view.Range{}, nests: nests(release())}
	if s.identity, err = mark(strconv.Itoa(os.Getpid())); err != nil {
		return nil, err
	}
	blocks := Blocks("/")
	for _, fs := range systems {
		for _, device := range ofMount("/", blocks, fs.Mount) {
			if isLogical("/", device) && !slices.ContainsFunc(s.volumes, func(v snapshotted) bool { return v.kernel == device }) {
				s.volumes = append(s.volumes, snapshotted{kernel: device, system: fs.Dev})
			}
		}
	}
	if len(s.volumes) == 0 {
		return nil, errors.New("no file system that is mounted for writing lies right on a logical volume of these disks")
	}
	table, err := tables(ctx)
	if err != nil {
		return nil, err
	}
	s.mapping = newMapping("/", table)
	volumes, err := reportLogical(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.identify(volumes); err != nil {
		return nil, err
	}
	if err := s.fit(volumes); err != nil {
		return nil, err
	}
	groups, err := reportPhysical(ctx)
	if err != nil {
		return nil, err
	}
	return s, s.layOut(groups)
}

// identify finds out what lvm calls the volumes, and where they lie.
func (s *Snapshots) identify(volumes []logical) error {
	for i := range s.volumes {
		v := &s.volumes[i]
		n := slices.IndexFunc(volumes, func(l logical) bool { return l.Dev == s.mapping.blocks[v.kernel].Dev })
		if n < 0 {
			return fmt.Errorf("lvm does not list the volume %s", s.mapping.names[v.kernel])
		}
		v.logical = volumes[n]
		whole := view.Range{Length: s.mapping.blocks[v.kernel].Size}
		var err error
		if table := s.mapping.tables[v.kernel]; len(table) == 1 && table[0].kind == "thin" {
			err = s.locateThin(v, table[0])
		} else {
			v.on, err = s.mapping.onDisks(v.kernel, whole)
		}
		if err != nil {
			return err
		}
	}
	thick := func(v snapshotted) bool { return v.pool == "" }
	switch {
	case !s.nests && len(s.volumes) > 1:
		return fmt.Errorf("%d volumes with mounted file systems cannot be snapshotted at one instant on this kernel (%s): that needs Linux 6.12", len(s.volumes), release())
	case !s.nests && !thick(s.volumes[0]):
		return fmt.Errorf("the metadata of a thin pool would not stand still on this kernel (%s): that needs Linux 6.12", release())
	}
	for _, v := range s.volumes {
		if slices.ContainsFunc(s.volumes, func(o snapshotted) bool { return o.VG == v.VG && thick(o) != thick(v) }) {
			return fmt.Errorf("volume group %s has thick and thin volumes with mounted file systems: this release snapshots only the one or the other", v.VG)
		}
	}
	return nil
}

// locateThin finds where the pool of a thin volume keeps data. Every volume of the pool that is active must be one that gets
// a snapshot: of any other the content would go on changing in place.
func (s *Snapshots) locateThin(v *snapshotted, t target) error {
	if len(t.args) < 2 {
		return fmt.Errorf("the table of %s does not name its pool", s.mapping.names[v.kernel])
	}
	if len(t.args) > 2 {
		return fmt.Errorf("%s has an origin outside of its pool, which this release does not read", s.mapping.names[v.kernel])
	}
	v.pool = s.mapping.byDev[t.args[0]]
	for name, table := range s.mapping.tables {
		other := len(table) == 1 && table[0].kind == "thin" && len(table[0].args) > 0 && s.mapping.byDev[table[0].args[0]] == v.pool
		if other && !slices.ContainsFunc(s.volumes, func(o snapshotted) bool { return o.kernel == name }) {
			return fmt.Errorf("volume %s of the same thin pool is active and has no mounted file system that could stand still", s.mapping.names[name])
		}
	}
	pool := s.mapping.tables[v.pool]
	if len(pool) != 1 || pool[0].kind != "thin-pool" || len(pool[0].args) < 2 {
		return fmt.Errorf("%s has no thin pool that this release can read", s.mapping.names[v.kernel])
	}
	data := s.mapping.byDev[pool[0].args[1]]
	var err error
	v.on, err = s.mapping.onDisks(data, view.Range{Length: s.mapping.blocks[data].Size})
	return err
}

// fit sees whether there is room for the snapshots.
func (s *Snapshots) fit(volumes []logical) (err error) {
	sharers := map[string]int64{}
	for _, v := range s.volumes {
		sharers[v.VG]++
	}
	for i := range s.volumes {
		v := &s.volumes[i]
		if v.pool == "" {
			if v.room, err = v.logical.room(sharers[v.VG]); err != nil {
				return err
			}
			continue
		}
		n := slices.IndexFunc(volumes, func(l logical) bool { return l.VG == v.VG && l.Name == v.Pool })
		if n < 0 {
			return fmt.Errorf("lvm does not list the thin pool of %s", v.Name)
		}
		if p := volumes[n]; p.Data > 100-poolRoom || p.Metadata > 100-poolRoom {
			return fmt.Errorf("thin pool %s/%s is %.0f %% full, its metadata %.0f %%: what is written during a snapshot needs %.0f %% of each", p.VG, p.Name, p.Data, p.Metadata, poolRoom)
		}
	}
	return nil
}

// layOut finds what else the volume groups keep on the disks.
func (s *Snapshots) layOut(groups []physical) error {
	total, mapped := int64(0), s.mapping.mapped()
	for _, p := range groups {
		i := slices.IndexFunc(s.volumes, func(v snapshotted) bool { return v.VG == p.VG })
		name := kernelName(s.mapping.blocks, p.Path)
		if i < 0 || name == "" {
			continue
		}
		whole := view.Range{Length: s.mapping.blocks[name].Size}
		on, err := s.mapping.onDisks(name, whole)
		if err != nil || len(on) != 1 {
			return fmt.Errorf("physical volume %s: %w", p.Path, errors.Join(err, errors.New("it does not lie right on a disk or a partition")))
		}
		disk := slices.IndexFunc(s.disks, func(d *Disk) bool { return d.Kernel == on[0].disk })
		if disk < 0 {
			continue // not captured
		}
		area := view.Range{Offset: on[0].at + p.Start, Length: p.Count * p.Extent}
		if p.Start <= 0 || area.Length <= 0 || area.Length > whole.Length || p.Start > whole.Length-area.Length {
			return fmt.Errorf("physical volume %s: what lvm says of it makes no sense", p.Path)
		}
		s.loose[on[0].disk] = append(s.loose[on[0].disk], view.Without([]view.Range{area}, mapped[on[0].disk])...)
		if s.volumes[i].pool != "" {
			continue
		}
		for _, label := range view.Without([]view.Range{{Offset: on[0].at, Length: whole.Length}}, []view.Range{area}) {
			if total += label.Length; total > maxLabels {
				return fmt.Errorf("volume group %s keeps more than %d MiB of metadata", p.VG, int64(maxLabels)>>20)
			}
			s.labels, s.labelOn = append(s.labels, label), append(s.labelOn, s.disks[disk])
		}
	}
	for _, swap := range Swaps("/") {
		name := kernelName(s.mapping.blocks, swap)
		size := s.mapping.blocks[name].Size
		extents, _ := s.mapping.onDisks(name, view.Range{Offset: swapHead, Length: size - swapHead}) // a file, or nothing that can be told
		for _, e := range extents {
			s.swap[e.disk] = append(s.swap[e.disk], view.Range{Offset: e.at, Length: e.Length})
		}
	}
	return nil
}

// Apart is what a freeze leaves to the snapshots.
func (s *Snapshots) Apart() (a Apart) {
	if s == nil {
		return a
	}
	for _, v := range s.volumes {
		a.Devices = append(a.Devices, v.kernel)
		if !s.nests {
			a.Systems = append(a.Systems, v.system)
		}
	}
	return a
}

// Take makes the snapshots. Everything else stands still meanwhile. On an error some may have been made: Remove them.
func (s *Snapshots) Take(ctx context.Context) ([]*view.View, error) {
	views, err := s.take(ctx)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", ErrSnapshot, err)
	}
	return views, err
}

func (s *Snapshots) take(ctx context.Context) ([]*view.View, error) {
	labels, err := s.readLabels()
	if err != nil {
		return nil, err
	}
	s.Since = time.Now()
	for _, v := range s.volumes {
		s.serial++
		name := fmt.Sprintf("muster_%s_%d", s.identity, s.serial)
		args := []string{"lvcreate", "--quiet", "--yes", "--snapshot", "--name", name, "--addtag", snapshotTag, "--config", quietly}
		if v.pool == "" {
			args = append(args, "--permission", "r", "--size", strconv.FormatInt(v.room, 10)+"b")
		} else {
			args = append(args, "--setactivationskip", "y")
		}
		s.made = append(s.made, name)
		if _, err := lvm(ctx, append(args, v.VG+"/"+v.Name)...); err != nil {
			return nil, err
		}
	}
	s.Took = time.Since(s.Since)
	return s.compose(ctx, labels)
}

// readLabels reads what the volume groups of thick volumes say of themselves.
func (s *Snapshots) readLabels() ([][]byte, error) {
	var out [][]byte
	for i, r := range s.labels {
		from := r.Offset / view.Alignment * view.Alignment
		to := min(s.labelOn[i].Size, (r.End()+view.Alignment-1)/view.Alignment*view.Alignment)
		buf := view.Buffer(int(to - from))
		if _, err := s.labelOn[i].ReadAt(buf, from); err != nil {
			return nil, err
		}
		out = append(out, buf[r.Offset-from:r.End()-from])
	}
	return out, nil
}

// compose puts the views together, one a disk.
func (s *Snapshots) compose(ctx context.Context, labels [][]byte) ([]*view.View, error) {
	table, err := tables(ctx)
	if err != nil {
		return nil, err
	}
	now := newMapping("/", table)
	parts := map[string][]view.Part{}
	loose := map[string][]view.Range{}
	taken := map[string][]view.Range{} // of what is loose: it holds snapshots now
	for disk, ranges := range s.loose {
		loose[disk] = ranges
	}
	for i, v := range s.volumes {
		if v.pool != "" {
			for _, e := range v.on {
				loose[e.disk] = append(loose[e.disk], view.Range{Offset: e.at, Length: e.Length})
			}
			continue
		}
		on, err := now.onDisks(v.kernel, view.Range{Length: s.mapping.blocks[v.kernel].Size})
		if err != nil || !slices.Equal(on, v.on) {
			return nil, fmt.Errorf("volume %s/%s has moved: %w", v.VG, v.Name, errors.Join(err, ErrVoid))
		}
		from, cow, err := s.open(now, v, s.made[len(s.made)-len(s.volumes)+i])
		if err != nil {
			return nil, err
		}
		for _, e := range cow {
			taken[e.disk] = append(taken[e.disk], view.Range{Offset: e.at, Length: e.Length})
		}
		for _, e := range on {
			parts[e.disk] = append(parts[e.disk], view.Part{Range: view.Range{Offset: e.at, Length: e.Length}, From: from, At: e.Offset})
		}
	}
	for i, r := range s.labels {
		disk := s.labelOn[i].Kernel
		parts[disk] = append(parts[disk], view.Part{Range: r, From: bytes.NewReader(labels[i])})
	}
	var out []*view.View
	for _, d := range s.disks {
		mine := parts[d.Kernel]
		for _, r := range view.Without(loose[d.Kernel], taken[d.Kernel]) {
			mine = append(mine, view.Part{Range: r})
		}
		for _, r := range view.Join(append(taken[d.Kernel], s.swap[d.Kernel]...)) {
			mine = append(mine, view.Part{Range: r, From: view.Zeros{}})
		}
		v, err := view.New(d, d.Size, mine)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// open opens the snapshot of a thick volume, and says where it keeps what changes.
func (s *Snapshots) open(now mapping, v snapshotted, name string) (io.ReaderAt, []extent, error) {
	mapped := strings.ReplaceAll(v.VG, "-", "--") + "-" + name
	kernel, ok := now.named(mapped)
	cow, ok2 := now.named(mapped + "-cow")
	if !ok || !ok2 {
		return nil, nil, fmt.Errorf("the kernel does not list snapshot %s", mapped)
	}
	d, err := OpenDisk(kernel)
	if err != nil {
		return nil, nil, err
	}
	s.origins = append(s.origins, d)
	on, err := now.onDisks(cow, view.Range{Length: now.blocks[cow].Size})
	return d, on, err
}

// Rest is what of a disk has to be read while it stands still, as far as that can be told before the snapshots are made.
func (s *Snapshots) Rest(disk *Disk) []view.Range {
	held := slices.Concat(s.loose[disk.Kernel], s.swap[disk.Kernel])
	for _, v := range s.volumes {
		for _, e := range v.on {
			if e.disk == disk.Kernel {
				held = append(held, view.Range{Offset: e.at, Length: e.Length})
			}
		}
	}
	return view.Without([]view.Range{{Length: disk.Size}}, held)
}

// Check says whether the snapshots hold what they should. ErrVoid if one has overflowed: then what was read is no image.
func (s *Snapshots) Check(ctx context.Context) error {
	path, err := program("dmsetup")
	if err != nil {
		return err
	}
	out, err := undisturbed(ctx, path, "status")
	if err != nil {
		return err
	}
	return s.judge(out)
}

// judge reads what "dmsetup status" prints.
func (s *Snapshots) judge(status string) error {
	seen := 0
	for line := range strings.Lines(status) {
		m := tableLine.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		ours := slices.ContainsFunc(s.made, func(name string) bool { return strings.HasSuffix(m[1], "-"+name) })
		pool := slices.ContainsFunc(s.volumes, func(v snapshotted) bool { return v.pool != "" && s.mapping.names[v.pool] == m[1] })
		switch {
		case ours && m[4] == "snapshot" && (m[5] == "" || m[5][0] < '0' || m[5][0] > '9'):
			return fmt.Errorf("snapshot %s: %s: more was written to the volume than it had room for: %w", m[1], m[5], ErrVoid)
		case pool && (strings.Contains(m[5], "out_of_data_space") || strings.Contains(m[5], "Fail") || strings.Contains(m[5], " ro ")):
			return fmt.Errorf("thin pool %s: %s: %w", m[1], m[5], ErrVoid)
		case ours && m[4] == "snapshot":
			seen++
		}
	}
	if seen != len(s.origins) {
		return fmt.Errorf("%d of %d snapshots are still there: %w", seen, len(s.origins), ErrVoid)
	}
	return nil
}

// Remove removes the snapshots. It may be called again.
func (s *Snapshots) Remove(ctx context.Context) error {
	for _, d := range s.origins {
		_ = d.Close() // only read
	}
	s.origins = nil
	if len(s.made) == 0 {
		return nil
	}
	made := s.made
	err := removeSnapshots(ctx, func(name string) bool { return slices.Contains(made, name) })
	if err == nil {
		s.made = nil
	}
	return err
}

// Describe names the volumes, for people.
func (s *Snapshots) Describe() string {
	var out []string
	for _, v := range s.volumes {
		out = append(out, v.VG+"/"+v.Name)
	}
	return strings.Join(out, ", ")
}
