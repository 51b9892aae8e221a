package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/musterdr/muster/internal/catalog"
	"github.com/musterdr/muster/internal/dr"
)

// A fleet is a catalog as large as one will be: a few servers live through their nights by the catalog's own verbs, and the
// database copies what came of it, row by row and night by night, for thousands of others.
type fleet struct {
	servers   int
	snapshots int // a server
	now       time.Time
}

// fleetSilos is how many silos it has. The deltas of each rescue image are held by two of them.
const fleetSilos = 20

// life is a way in which a server lives; every one has its share of the fleet.
type life struct {
	name     string
	thousand int // of a thousand servers, how many live so; the first takes what is left
	variants int // servers that live so, each with bad nights of its own, and are copied; 0: one
	tier     dr.Tier
	failing  int // every so many nights the test fails; 0: never
	last     dr.Outcome
	untested bool // the last snapshot has no verdict yet
	never    bool // never captured
	invoked  bool
	removed  bool
	brought  bool          // by an appliance elsewhere
	age      time.Duration // of its last snapshot; 0: usual
}

var lives = []life{
	{name: "well", variants: 8, last: dr.Pass, failing: 97},
	{name: "shaky", thousand: 100, variants: 4, last: dr.Pass, failing: 17},
	{name: "brought", thousand: 500, variants: 4, last: dr.Pass, failing: 53, brought: true},
	{name: "data", thousand: 70, variants: 2, tier: dr.TierImageData, last: dr.Pass, failing: 41},
	{name: "broken", thousand: 20, last: dr.Fail},
	{name: "fresh", thousand: 20, last: dr.Pass, untested: true, age: 20 * time.Minute},
	{name: "overdue", thousand: 5, last: dr.Pass, untested: true, age: 3 * time.Hour},
	{name: "due", thousand: 5, last: dr.Pass, age: 24*time.Hour + time.Minute},
	{name: "new", thousand: 3, never: true},
	{name: "invoked", thousand: 2, last: dr.Pass, invoked: true},
	{name: "gone", thousand: 10, last: dr.Pass, removed: true},
}

// template is a server that lives, and is copied.
type template struct {
	life
	i, variant int // among all, and of its life
	server     dr.Server
	start      time.Time
	kept       []dr.Snapshot
}

// mark is what stands for a server in the identifiers of a template and is replaced in its copies; title the same in its name.
func mark(i int) string  { return fmt.Sprintf("qqqqqq%02d", i) }
func title(i int) string { return fmt.Sprintf("wwwwww%02d", i) }

// usualAge is how old the last snapshot of a server is in the middle of the day.
const usualAge = 9 * time.Hour

// retained is how many snapshots the servers of a fleet keep; the others have expired.
const retained = 30

// templates are the servers that live.
func (f fleet) templates() (all []*template) {
	for _, l := range lives {
		for v := range max(l.variants, 1) {
			t := &template{life: l, i: len(all), variant: v, start: f.now.Add(-cmp.Or(l.age, usualAge) - time.Duration(max(f.nights(l)-1, 0))*24*time.Hour)}
			t.server = l.server(t.i, t.start)
			all = append(all, t)
		}
	}
	return all
}

func (f fleet) nights(l life) int {
	if l.never {
		return 0
	}
	return f.snapshots
}

// live lets the templates live through their nights, all of them side by side, so that what happens is written down in the order in
// which it would be.
func (f fleet) live(ctx context.Context, c *catalog.Catalog) error {
	at := f.now
	c.Now = func() time.Time { return at }
	all := f.templates()
	slices.SortStableFunc(all, func(a, b *template) int { return a.start.Compare(b.start) })
	at = all[0].start
	for n := range fleetSilos {
		_, _, err := c.Beat(ctx, dr.Silo{Name: fmt.Sprintf("silo-%d", n), Hypervisor: dr.HypervisorKVM, Memory: 64 << 10, Cores: 16, Space: 4 << 40}, at)
		if err != nil {
			return err
		}
	}
	for _, t := range all {
		at = t.start
		if err := c.AddServer(ctx, t.server); err != nil {
			return err
		}
	}
	for n := range f.snapshots {
		for _, t := range all {
			if n >= f.nights(t.life) {
				continue
			}
			at = t.start.Add(time.Duration(n) * 24 * time.Hour)
			if err := t.night(ctx, c, n, f.snapshots, &at); err != nil {
				return fmt.Errorf("live as %s: %w", t.name, err)
			}
		}
	}
	at = f.now
	for _, t := range all {
		if err := t.end(ctx, c); err != nil {
			return fmt.Errorf("live as %s: %w", t.name, err)
		}
	}
	return nil
}

// end is what becomes of a server after its nights.
func (t *template) end(ctx context.Context, c *catalog.Catalog) error {
	switch {
	case t.removed:
		return c.RemoveServer(ctx, t.server.ID)
	case t.invoked:
		lkg := t.kept[len(t.kept)-1]
		return c.RecordInvocation(ctx, dr.Invocation{ID: "inv-" + mark(t.i), ServerID: t.server.ID, Server: t.server.Name, SnapshotID: lkg.ID,
			State: dr.Invoking, By: "an engineer", Reason: "the original burns"})
	}
	return nil
}

// night is one night: capture, rescue image, boot test, and what is not kept any longer.
func (t *template) night(ctx context.Context, c *catalog.Catalog, n, nights int, at *time.Time) error {
	s := t.snapshot(t.server, t.kept, n, *at)
	t.kept = append(t.kept, s)
	if err := c.RecordSnapshot(ctx, s); err != nil {
		return err
	}
	if untested := t.untested && n == nights-1; !untested && (t.tier == "" || s.Kind == dr.SnapshotData) { // an image is tested with the data
		if err := t.test(ctx, c, s, n, nights, at); err != nil {
			return err
		}
	}
	return t.retire(ctx, c, n)
}

// test makes the nth snapshot a rescue image and boots it.
func (t *template) test(ctx context.Context, c *catalog.Catalog, s dr.Snapshot, n, nights int, at *time.Time) error {
	*at = at.Add(2 * time.Minute)
	pre := t.preRecovery(s)
	if err := c.RecordPreRecovery(ctx, pre); err != nil {
		return err
	}
	if err := c.RecordDeltas(ctx, pre.ID, s.ID, "silo-0", ""); err != nil {
		return err
	}
	*at = at.Add(time.Minute)
	outcome := dr.Pass
	if n == nights-1 {
		outcome = t.last
	} else if t.failing > 0 && (n+t.variant*11)%t.failing == t.failing-1 {
		outcome = dr.Fail
	}
	judged, err := c.RecordVerdict(ctx, t.verdict(s, pre, outcome, *at))
	if err != nil {
		return err
	}
	if !judged.Moved {
		return nil
	}
	for _, silo := range []string{"silo-0", "silo-1"} {
		if err := c.RecordDeltas(ctx, pre.ID, s.ID, silo, deltasDigest); err != nil {
			return err
		}
	}
	return nil
}

// retire lets go what is not kept any longer after the nth night.
func (t *template) retire(ctx context.Context, c *catalog.Catalog, n int) error {
	old := n - retained
	if old < 0 || t.tier != "" && t.kept[old].Kind != dr.SnapshotData {
		return nil
	}
	gone := []string{t.kept[old].ID}
	if image := t.kept[old].Image; image != "" && t.kept[old+1].Image != image { // no data that is kept goes onto it any more
		gone = append(gone, image)
	}
	return c.Expire(ctx, gone...)
}

// deltasDigest has the form of one.
const deltasDigest = "b3:8f434346648f6b96df89dda901c5176b10a6d83961dd3c1ac88b59b2dc327aa4"

func (l life) preRecovery(s dr.Snapshot) dr.PreRecovery {
	return dr.PreRecovery{ID: "pre-" + strings.TrimPrefix(s.ID, "snap-"), SnapshotID: s.ID, Hardware: dr.Hardware{Firmware: dr.UEFI, DiskBus: dr.BusVirtio, Memory: 4096, CPUs: 2},
		Overlays: []string{"serial@1", "agent@3", "fstab@2", "network@4"}, Edits: make([]dr.Edit, 6), Facts: dr.Facts{Hostname: s.Server},
		Deltas: []string{"/var/lib/muster/silo/" + s.ID + "/delta-0.qcow2"}}
}

func (l life) verdict(s dr.Snapshot, pre dr.PreRecovery, o dr.Outcome, at time.Time) dr.Verdict {
	v := dr.Verdict{ID: "verdict-" + strings.TrimPrefix(s.ID, "snap-"), SnapshotID: s.ID, PreRecovery: pre.ID, Outcome: o, Started: at, Rung: "virtio/virtio-net", Accelerator: "kvm",
		Summary: "it booted, was stable and answered every check", BootID: "c1f5e1f2-7b0c-4f6e-9f6d-0123456789ab", RTA: 41 * time.Second, RPA: 4 * time.Minute,
		Phases:  []dr.Phase{{Name: dr.PhaseAssemble, Duration: time.Second}, {Name: dr.PhaseKernel, Duration: 9 * time.Second}, {Name: dr.PhaseChecks, Duration: 3 * time.Second}},
		Results: []dr.CheckResult{{Name: "http", State: dr.CheckPass}, {Name: "postgres", State: dr.CheckPass}}}
	if o == dr.Fail {
		v.Code, v.Summary = dr.CodePanic, "its kernel panicked: unable to mount the root file system"
	}
	return v
}

func (l life) server(i int, created time.Time) dr.Server {
	s := dr.Server{ID: "srv-" + mark(i), Name: "host-" + title(i), Created: created, Tier: l.tier, Schedule: dr.Schedule{Every: 24 * time.Hour},
		Objectives: dr.Objectives{RTO: 5 * time.Minute, RPO: 25 * time.Hour}, Retention: dr.Retention{KeepLast: retained},
		Source: dr.Source{SSH: &dr.SSHSource{User: "root", Host: "host-" + title(i) + ".example.net", Port: 22, KeyFile: "/etc/muster/keys/site", Resident: true,
			HostKey: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE0M4Dg8hZ0s4uYt8QmXx2nq7R1w5cV6b9a3k0fJpTzL"}},
		Checks: []dr.Check{{Name: "http", Kind: dr.CheckHTTP}, {Name: "ssh", Kind: dr.CheckTCP}}}
	if l.brought {
		s.Appliance = "box-" + title(i)
	}
	if l.tier != "" {
		s.Schedule.Every = 7 * 24 * time.Hour
		s.Data = dr.DataSet{Paths: []string{"/srv", "/home"}, Every: 24 * time.Hour}
	}
	return s
}

// snapshot is the nth of a server: of one with data every seventh is an image, the others go onto the last of those.
func (l life) snapshot(server dr.Server, before []dr.Snapshot, n int, at time.Time) dr.Snapshot {
	id := fmt.Sprintf("%s-%s", at.Format("20060102t150405"), strings.TrimPrefix(server.ID, "srv-"))
	s := dr.Snapshot{ID: "snap-" + id, ServerID: server.ID, Server: server.Name, Kind: dr.SnapshotImage, Taken: at, Consistency: dr.ApplicationConsistent,
		Pass: dr.CapturePass{Kind: dr.PassTracked, Provider: dr.ProviderTracking},
		Disks: []dr.SnapshotDisk{{Name: "sda", Size: 64 << 30, BlockSize: 128 << 10, Data: 21 << 30, Root: "Ixc3d266c56318d4e80fd90209f8aa3793b3d18571b97d73369ae23dff74f767a3"},
			{Name: "sdb", Size: 512 << 30, BlockSize: 128 << 10, Data: 200 << 30, Root: "Ixb81f6a0c56318d4e80fd90209f8aa3793b3d18571b97d73369ae23dff74f76aa1"}},
		Stats:        dr.CaptureStats{Read: 3 << 30, Changed: 2 << 30, Sent: 900 << 20, New: 1 << 30, Stored: 400 << 20, Frozen: 64 * time.Millisecond, Duration: 3 * time.Minute},
		Applications: []dr.Application{{Name: "PostgreSQL 15 at /var/run/postgresql/.s.PGSQL.5432", AtRest: true}},
		Inventory:    dr.Inventory{Hostname: server.Name, Kernel: "6.1.0-28-amd64", Processes: []string{"systemd", "sshd", "nginx", "postgres"}}}
	images := slices.DeleteFunc(slices.Clone(before), dr.Snapshot.IsData)
	if l.tier != "" && n%7 != 0 {
		s.Kind, s.Image, s.Disks = dr.SnapshotData, images[len(images)-1].ID, nil
		s.Files = &dr.SnapshotFiles{Roots: server.Data.Paths, Index: "kc3d266c56318d4e80fd90209f8aa3793b3d18571b97d73369ae23dff74f767a3", Entries: 1_200_000, Bytes: 80 << 30, Changed: 900}
	}
	if n > 0 {
		s.Parent = before[n-1].ID
	}
	return s
}
