package linux

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/capture/view"
)

const mib = 1 << 20

// stacks is a machine with two disks: sda has a volume group on sda2, whose volume main lies in two pieces and has a snapshot,
// and sdb is a physical volume with a thin pool. sectors: sda2 begins at 4 MiB.
func stacks(t *testing.T) mapping {
	t.Helper()
	dm := map[string]string{
		"dm-0": "vg-main", "dm-1": "vg-main-real", "dm-2": "vg-old", "dm-3": "vg-old-cow",
		"dm-4": "thin-pool_tmeta", "dm-5": "thin-pool_tdata", "dm-6": "thin-pool-tpool", "dm-7": "thin-a", "dm-8": "raid", "dm-9": "striped",
	}
	files := map[string]string{
		"sys/block/sda/dev": "8:0", "sys/block/sda/size": "204800", "sys/block/sda/sda2/partition": "2", "sys/block/sda/sda2/dev": "8:2",
		"sys/block/sda/sda2/size": "196608", "sys/block/sda/sda2/start": "8192",
		"sys/block/sdb/dev": "8:16", "sys/block/sdb/size": "204800",
	}
	for name, mapped := range dm {
		files["sys/block/"+name+"/dev"] = "253:" + strings.TrimPrefix(name, "dm-")
		files["sys/block/"+name+"/dm/name"] = mapped
		files["sys/block/"+name+"/size"] = "65536"
		files["sys/block/"+name+"/slaves/x"] = ""
	}
	return newMapping(tree(t, files), `vg-main: 0 65536 snapshot-origin 253:1
vg-main-real: 0 32768 linear 8:2 2048
vg-main-real: 32768 32768 linear 8:2 67584
vg-old: 0 65536 snapshot 253:1 253:3 P 8
vg-old-cow: 0 8192 linear 8:2 40960
thin-pool_tmeta: 0 8192 linear 8:16 2048
thin-pool_tdata: 0 65536 linear 8:16 10240
thin-pool-tpool: 0 65536 thin-pool 253:4 253:5 128 0 0
thin-a: 0 65536 thin 253:6 1
raid: 0 65536 raid raid1 3 0 region_size 1024 2 253:4 253:5 - -
striped: 0 65536 striped 2 128 8:16 100000 8:2 150000
no table
bad: 0 99999999999999999999 linear 8:2 0
`)
}

func TestAVolumeIsFoundWhereItsPiecesLie(t *testing.T) {
	m := stacks(t)
	got, err := m.onDisks("dm-0", view.Range{Length: 32 * mib})
	want := []extent{
		{Range: view.Range{Offset: 0, Length: 16 * mib}, disk: "sda", at: 4*mib + 1*mib},
		{Range: view.Range{Offset: 16 * mib, Length: 16 * mib}, disk: "sda", at: 4*mib + 33*mib},
	}
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "main", got, want)
	got, err = m.onDisks("dm-0", view.Range{Offset: 15 * mib, Length: 2 * mib})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "a part of main", got, []extent{
		{Range: view.Range{Offset: 15 * mib, Length: mib}, disk: "sda", at: 20 * mib},
		{Range: view.Range{Offset: 16 * mib, Length: mib}, disk: "sda", at: 37 * mib},
	})
}

func TestWhatCannotBeReadPieceByPieceIsRefusedByName(t *testing.T) {
	m := stacks(t)
	for name, want := range map[string]string{"dm-2": `mapped by "snapshot"`, "dm-7": `mapped by "thin"`, "dm-8": `mapped by "raid"`, "dm-9": `mapped by "striped"`, "sdz": "cannot be told"} {
		if got, err := m.onDisks(name, view.Range{Length: 32 * mib}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v, want %q", name, got, err, want)
		}
	}
	if _, err := m.onDisks("sda2", view.Range{Offset: 90 * mib, Length: 10 * mib}); err == nil {
		t.Error("bytes behind the end of a partition were found")
	}
}

func TestWhatAnyVolumeHoldsIsNotTakenForFree(t *testing.T) {
	got := stacks(t).mapped()
	equal(t, "sda", got["sda"], []view.Range{
		{Offset: 5 * mib, Length: 16 * mib},            // main
		{Offset: 24 * mib, Length: 4 * mib},            // what its snapshot keeps
		{Offset: 37 * mib, Length: 16 * mib},           // main
		{Offset: 4*mib + 150000*512, Length: 16 * mib}, // its half of a striped volume
	})
	equal(t, "sdb", got["sdb"], []view.Range{{Offset: 1 * mib, Length: 36 * mib}, {Offset: 100000 * 512, Length: 16 * mib}})
}

func FuzzTables(f *testing.F) {
	f.Add("vg-main: 0 65536 linear 8:2 2048\nb: 0 8 striped 2 128 8:16 0 8:2 8\nc: 0 1 snapshot-origin 253:0")
	f.Fuzz(func(t *testing.T, text string) {
		m := mapping{blocks: map[string]Block{"sda": {Name: "sda", Dev: "8:0", Size: mib}}, byDev: map[string]string{"8:0": "sda"}, names: map[string]string{}, tables: map[string][]target{}}
		for name, targets := range parseTables(text) {
			m.blocks[name] = Block{Name: name, Dev: name, Size: mib, Parents: []string{"sda"}}
			m.names[name], m.tables[name] = name, targets
			m.byDev[name] = name
		}
		for name := range m.tables {
			extents, err := m.onDisks(name, view.Range{Length: mib})
			for _, e := range extents {
				if err == nil && (e.at < 0 || e.Length <= 0 || e.at > mib-e.Length || e.disk != "sda") {
					t.Fatalf("%s lies at %+v", name, e)
				}
			}
		}
		m.mapped()
	})
}

const lvsReport = `{"report":[{"lv":[
 {"vg_name":"da-ta","lv_name":"main","lv_size":"314572800","vg_free":"268435456","vg_extent_size":"4194304","pool_lv":"","lv_kernel_major":"253","lv_kernel_minor":"0","data_percent":"","metadata_percent":""},
 {"vg_name":"da-ta","lv_name":"off","lv_size":"4194304","vg_free":"268435456","vg_extent_size":"4194304","pool_lv":"","lv_kernel_major":"-1","lv_kernel_minor":"-1","data_percent":"","metadata_percent":""},
 {"vg_name":"t","lv_name":"pool","lv_size":"419430400","vg_free":"0","vg_extent_size":"4194304","pool_lv":"","lv_kernel_major":"253","lv_kernel_minor":"6","data_percent":"12.50","metadata_percent":"10.9"}]}]}`

func TestLogicalVolumesAreReadAsLVMReportsThem(t *testing.T) {
	got, err := parseLogical(lvsReport)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "volumes", got, []logical{
		{VG: "da-ta", Name: "main", Dev: "253:0", Size: 300 * mib, Free: 256 * mib, Extent: 4 * mib},
		{VG: "da-ta", Name: "off", Size: 4 * mib, Free: 256 * mib, Extent: 4 * mib},
		{VG: "t", Name: "pool", Dev: "253:6", Size: 400 * mib, Extent: 4 * mib, Data: 12.5, Metadata: 10.9},
	})
	for _, garbage := range []string{"", "no json", `{"report":[{"lv":[{"vg_name":1}]}]}`} {
		if _, err := parseLogical(garbage); err == nil {
			t.Errorf("%q was understood", garbage)
		}
	}
}

func TestASnapshotTakesAFifthAndSaysHowMuchIsMissing(t *testing.T) {
	for _, c := range []struct{ size, free, sharers, want int64 }{
		{10 << 30, 100 << 30, 1, 2 << 30},      // a fifth
		{1 << 30, 100 << 30, 1, 256 * mib},     // at least so much
		{10 << 30, 1 << 30, 1, 1 << 30},        // what there is
		{10 << 30, 1 << 30, 2, 512 * mib},      // shared
		{10 << 30, 200 * mib, 1, 0},            // less than a fiftieth
		{1 << 30, 63 * mib, 1, 0},              // less than the least
		{300 * mib, 66 * mib, 1, 64 * mib},     // whole extents
		{300 * mib, 127 * mib, 2, 0},           // each too small
		{80 * mib, 1 << 30, 1, 84 * mib},       // no more than it can fill
		{100 << 40, 100 << 40, 1, 20480 << 30}, // no limit above
	} {
		got, err := logical{Name: "main", VG: "vg", Size: c.size, Free: c.free, Extent: 4 * mib}.room(c.sharers)
		if got != c.want || (err == nil) != (c.want > 0) || err != nil && !strings.Contains(err.Error(), "needs at least") {
			t.Errorf("%+v: %d MiB, %v", c, got/mib, err)
		}
	}
	if _, err := (logical{Size: 1 << 30, Free: 1 << 40}).room(1); err == nil {
		t.Error("extents of no size")
	}
}

func TestOnlyNewKernelsFreezeTwice(t *testing.T) {
	for release, want := range map[string]bool{"6.12.0": true, "6.11.12-x": false, "6.8.0": false, "7.0": true, "5.14.0-427.el9": false, "6.12.95+deb12-amd64": true, "": false, "six": false} {
		if nests(release) != want {
			t.Errorf("%q: %v", release, !want)
		}
	}
}

func TestASnapshotBelongsToTheAgentThatMadeIt(t *testing.T) {
	us, err := mark(strconv.Itoa(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"muster_" + us + "_1": true, "muster_" + us + "0_1": false, "muster_4194305_1_1": false, "muster_": false, "home": false} {
		if alive(name) != want {
			t.Errorf("%s: alive %v", name, !want)
		}
	}
}

func TestASnapshotThatOverflowedIsNoImage(t *testing.T) {
	s := &Snapshots{made: []string{"muster_1_2_1"}, origins: make([]*Disk, 1)}
	const held = "da--ta-muster_1_2_1: 0 163840 snapshot 3600/155648 16\nda--ta-main: 0 163840 snapshot-origin 253:1\nda--ta-theirs: 0 8 snapshot Invalid\n"
	if err := s.judge(held); err != nil {
		t.Errorf("one that holds: %v", err)
	}
	for _, bad := range []string{"vg-muster_1_2_1: 0 163840 snapshot Invalid\n", "vg-muster_1_2_1: 0 163840 snapshot Overflow\n", "vg-muster_1_2_1: 0 163840 snapshot \n", ""} {
		if err := s.judge(bad); !errors.Is(err, ErrVoid) {
			t.Errorf("%q: %v, want ErrVoid", bad, err)
		}
	}
	s = &Snapshots{mapping: mapping{names: map[string]string{"dm-6": "thin-pool-tpool"}}, volumes: []snapshotted{{pool: "dm-6"}}}
	const pool = "thin-pool-tpool: 0 245760 thin-pool 1 12/1024 100/1920 - %s no_discard_passdown queue_if_no_space - 1024\n"
	for mode, want := range map[string]bool{"rw": true, "ro": false, "out_of_data_space": false} {
		if err := s.judge(fmt.Sprintf(pool, mode)); (err == nil) != want {
			t.Errorf("a pool that is %s: %v", mode, err)
		}
	}
	if err := s.judge("thin-pool-tpool: 0 245760 thin-pool Fail\n"); !errors.Is(err, ErrVoid) {
		t.Errorf("a pool that failed: %v", err)
	}
}
