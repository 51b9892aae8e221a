package prerecover

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
)

// seen is what looking at a guest gave.
type seen struct {
	view  *View
	facts dr.Facts
	notes []dr.Decision
	blind []string // mount points whose file system is there and could not be mounted
}

const selinuxAttr = "security.selinux"

// Limits of looking.
const (
	maxRoots      = 16 // file systems that are tried for a root
	maxSubvolumes = 32
	maxMounts     = 16
	maxKernels    = 64
)

// look mounts the system of a guest as its fstab says and reads what decisions need. paths are what the overlays name, roots
// are folders whose file systems are wanted as well.
func look(ctx context.Context, g Guest, inv dr.Inventory, paths, roots []string) (seen, error) {
	s := &sight{looker: looker{ctx: ctx, g: g, view: NewView()}, inv: inv}
	for _, step := range []func() error{s.devices, s.findRoot, func() error { return s.mountRest(paths, roots) }, s.system, s.kernels, s.boot,
		s.services, s.firmware, func() error { return s.named(paths) }} {
		if err := step(); err != nil {
			return seen{}, fmt.Errorf("look into image: %w", err)
		}
	}
	return seen{view: s.view, facts: s.facts, notes: s.notes, blind: s.blind}, nil
}

// sight is the work of look.
type sight struct {
	looker
	inv   dr.Inventory
	facts dr.Facts
	notes []dr.Decision
	fstab []fstabLine
	blind []string
}

func (s *sight) note(what, chosen, format string, args ...any) {
	s.notes = append(s.notes, dr.Decision{What: what, Chosen: chosen, Reason: fmt.Sprintf(format, args...)})
}

func (s *sight) devices() error {
	var err error
	if s.view.Disks, err = s.g.Disks(s.ctx); err != nil {
		return err
	}
	if s.view.Devices, err = s.g.Devices(s.ctx); err != nil {
		return err
	}
	s.facts.UUIDs = map[string]string{}
	for _, d := range s.view.Devices {
		if d.UUID != "" {
			s.facts.UUIDs[d.Name] = d.UUID
		}
	}
	known := slices.ContainsFunc(s.view.Devices, func(d Device) bool { return d.Type != "" })
	if !known && !slices.ContainsFunc(s.view.Disks, func(d Disk) bool { return d.Table != "" }) {
		return fmt.Errorf("%w: the disks are empty: there is no partition table and no file system on them", ErrNotRescuable)
	}
	return nil
}

// rootTypes are the file systems a Linux system is installed on.
var rootTypes = []string{"ext2", "ext3", "ext4", "xfs", "btrfs", "reiserfs", "jfs", "f2fs"}

// candidate is a file system that may be the root.
type candidate struct {
	device  Device
	options string
	score   int
}

func (s *sight) findRoot() error {
	var devices []Device
	for _, d := range s.view.Devices {
		if slices.Contains(rootTypes, d.Type) && len(devices) < maxRoots {
			devices = append(devices, d)
		}
	}
	// The one the server's inventory names is tried first, and if it is one, no other.
	known := ""
	for _, f := range s.inv.Filesystems {
		if f.Mount == "/" && f.UUID != "" {
			known = f.UUID
		}
	}
	slices.SortStableFunc(devices, func(a, b Device) int {
		return boolInt(b.UUID == known && known != "") - boolInt(a.UUID == known && known != "")
	})
	var best candidate
	var others []string
	mounted := false // the best one still is
	for _, d := range devices {
		c, err := s.tryRoot(d)
		if err != nil {
			s.note("root", d.Name, "it could not be mounted: %v", err)
			if s.ctx.Err() != nil {
				return err
			}
			continue
		}
		if c.score > 0 {
			others = append(others, d.Name)
		}
		if c.score > best.score {
			best = c
		}
		if c.score >= scoreSystem && (d.UUID == known && known != "" || len(devices) == 1) {
			mounted = !strings.HasPrefix(c.options, "subvol=") || c.options == s.inventorySubvolume(d)
			break
		}
		if err := s.g.Unmount(s.ctx); err != nil {
			return err
		}
	}
	if best.score < scoreSystem {
		return s.noRoot(devices)
	}
	if len(others) > 1 {
		s.note("root", best.device.Name, "of %s it looks most like an installed system", strings.Join(others, ", "))
	}
	return s.mountRoot(best, mounted)
}

// scoreSystem is the least that makes a file system a system.
const scoreSystem = 4

// tryRoot mounts a device and says how much it looks like the root of a system. It stays mounted.
func (s *sight) tryRoot(d Device) (candidate, error) {
	c := candidate{device: d}
	if d.Type == "btrfs" {
		c.options = s.inventorySubvolume(d)
	}
	if err := s.mount(d, "/", c.options); err != nil {
		if c.options == "" {
			return c, err
		}
		c.options = ""
		if err := s.mount(d, "/", ""); err != nil {
			return c, err
		}
	}
	var err error
	if c.score, err = s.score(d, ""); err != nil || c.score >= scoreSystem || d.Type != "btrfs" {
		return c, err
	}
	// The default subvolume is the top one, and the system lies in one below it (@, root, @rootfs, …).
	names, err := s.g.List(s.ctx, "/", maxSubvolumes)
	if err != nil {
		return c, nil
	}
	for _, name := range names {
		if !plainName(name) {
			continue
		}
		score, err := s.score(d, "/"+name)
		if err != nil {
			return c, err
		}
		if score > c.score {
			c.score, c.options = score, "subvol="+name
		}
	}
	return c, nil
}

// mount mounts a device without starting what would write to it by itself: a young ext4 goes on making its inode tables,
// and that would end in the delta.
func (s *sight) mount(d Device, at, options string) error {
	if d.Type == "ext3" || d.Type == "ext4" {
		options = strings.TrimPrefix(options+",noinit_itable", ",")
	}
	return s.g.Mount(s.ctx, d.Name, at, options)
}

// inventorySubvolume is the subvolume the server itself had mounted as its root.
func (s *sight) inventorySubvolume(d Device) string {
	for _, f := range s.inv.Filesystems {
		if f.Mount == "/" && f.UUID == d.UUID {
			return subvolume(strings.Split(f.Options, ","))
		}
	}
	return ""
}

// subvolume keeps of mount options the one that names a btrfs subvolume.
func subvolume(options []string) string {
	for _, o := range options {
		if name, ok := strings.CutPrefix(o, "subvol="); ok && !slices.ContainsFunc(strings.Split(strings.Trim(name, "/"), "/"), func(p string) bool { return !plainName(p) }) {
			return o
		}
	}
	return ""
}

// score looks for the marks of a system below a folder of what is mounted.
func (s *sight) score(d Device, below string) (int, error) {
	marks := []struct {
		points int
		paths  []string
	}{
		{4, []string{"/etc/os-release", "/usr/lib/os-release", "/etc/redhat-release", "/etc/debian_version", "/etc/SuSE-release", "/etc/alpine-release"}},
		{2, []string{"/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd"}},
		{1, []string{"/etc/fstab"}},
		{1, []string{"/etc/passwd"}},
	}
	score := 0
	for _, m := range marks {
		for _, p := range m.paths {
			_, err := s.g.Lstat(s.ctx, below+p)
			if err == nil {
				score += m.points
				break
			}
			if s.ctx.Err() != nil {
				return 0, err
			}
		}
	}
	if score < scoreSystem {
		return score, nil
	}
	fstab, err := s.g.Read(s.ctx, below+"/etc/fstab", maxConfig)
	if err != nil {
		return score, nil
	}
	for _, l := range parseTab(string(fstab)) {
		if e, ok := l.entry(); ok && e.mount == "/" {
			if found, _, ok := (namer{s.view, s.inv}).find(e.spec); ok && found.Name == d.Name {
				score += 8 // it calls itself the root
			}
		}
	}
	return score, nil
}

// noRoot says why no root was found.
func (s *sight) noRoot(tried []Device) error {
	has := func(kind string) (Device, bool) {
		i := slices.IndexFunc(s.view.Devices, func(d Device) bool { return d.Type == kind })
		if i < 0 {
			return Device{}, false
		}
		return s.view.Devices[i], true
	}
	if d, ok := has("crypto_LUKS"); ok {
		return fmt.Errorf("%w: the system lies on an encrypted volume (LUKS, %s), which this release cannot open", ErrNotRescuable, d.Name)
	}
	if d, ok := has("ntfs"); ok {
		return fmt.Errorf("%w: it looks like Windows (NTFS on %s), which this release cannot prepare", ErrNotRescuable, d.Name)
	}
	var list []string
	for _, d := range tried {
		list = append(list, d.Name+" ("+d.Type+")")
	}
	return fmt.Errorf("%w: no Linux system was found; looked at: %s", ErrNotRescuable, orNone(list))
}

func (s *sight) mountRoot(c candidate, mounted bool) error {
	if !mounted {
		if err := s.g.Unmount(s.ctx); err != nil {
			return err
		}
		if err := s.mount(c.device, "/", c.options); err != nil {
			return err
		}
	}
	s.view.Mounts["/"] = c.device.Name
	s.facts.RootDevice, s.facts.RootFS = c.device.Name, c.device.Type
	if c.options != "" {
		s.note("root", c.device.Name, "mounted with %s", c.options)
	}
	text, err := s.text("/etc/fstab")
	if err != nil {
		return err
	}
	s.fstab = parseTab(text)
	if len(s.fstab) > maxTabLines {
		return fmt.Errorf("%w: /etc/fstab has more than %d lines", ErrNotRescuable, maxTabLines)
	}
	return nil
}

// systemMounts are the parts of a system that hold what is looked at or changed. Data is left alone.
var systemMounts = []string{"/boot", "/boot/efi", "/efi", "/usr", "/usr/lib", "/usr/local", "/etc", "/var", "/var/lib", "/opt", "/lib", "/sbin"}

// mountRest mounts what fstab says belongs to the system, and what holds a path an overlay names, outermost first.
func (s *sight) mountRest(paths, roots []string) error {
	var entries []mountEntry
	for _, l := range s.fstab {
		e, ok := l.entry()
		if !ok || e.virtual() || e.network() || e.mount == "/" || path.Clean(e.mount) != e.mount || !strings.HasPrefix(e.mount, "/") || len(e.mount) > 200 {
			continue
		}
		inside := func(p string) bool { return strings.HasPrefix(p, e.mount+"/") }
		around := func(root string) bool { return fileset.Below(root, e.mount) || fileset.Below(e.mount, root) }
		if slices.Contains(systemMounts, e.mount) || slices.ContainsFunc(paths, inside) || slices.ContainsFunc(roots, around) {
			entries = append(entries, e)
		}
	}
	slices.SortStableFunc(entries, func(a, b mountEntry) int { return strings.Count(a.mount, "/") - strings.Count(b.mount, "/") })
	for _, e := range entries[:min(len(entries), maxMounts)] {
		if s.view.Mounts[e.mount] != "" {
			continue
		}
		d, _, found := namer{s.view, s.inv}.find(e.spec)
		if !found {
			s.note("mount", e.mount, "%.100q is not among the disks", e.spec)
			continue
		}
		options := ""
		if d.Type == "btrfs" {
			options = subvolume(e.options)
		}
		if err := s.mount(d, e.mount, options); err != nil {
			if s.ctx.Err() != nil {
				return err
			}
			s.note("mount", e.mount, "it could not be mounted: %v", err)
			s.blind = append(s.blind, e.mount)
			continue
		}
		s.view.Mounts[e.mount] = d.Name
	}
	return nil
}

// named looks at the paths the overlays name.
func (s *sight) named(paths []string) error {
	for _, p := range paths {
		if _, err := s.read(p, maxConfig); err != nil {
			return err
		}
		for dir := path.Dir(p); dir != "/"; dir = path.Dir(dir) {
			if _, err := s.stat(dir); err != nil {
				return err
			}
		}
	}
	if s.facts.SELinux == "" || s.facts.SELinux == "disabled" {
		return nil
	}
	for _, p := range slices.Sorted(maps.Keys(s.view.entries)) {
		if e := s.view.entries[p]; e.exists && e.stat.Mode.IsDir() {
			label, err := s.g.Xattr(s.ctx, p, selinuxAttr)
			if err != nil {
				return err
			}
			if len(label) <= 256 {
				e.label = label
			}
		}
	}
	return nil
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// isText says whether a content can be shown as lines.
func isText(b []byte) bool { return bytes.IndexByte(b, 0) < 0 }
