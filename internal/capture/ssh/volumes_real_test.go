package ssh

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/dr"
)

func allowSnapshots(s *dr.SSHSource) { s.Snapshots = true }
func resident(s *dr.SSHSource)       { s.Resident = true }

// One guest for all of it: a boot costs more than everything else.
func TestRealVolumesOfAGuest(t *testing.T) {
	g := newGuest(t, "bookworm")
	kernel := g.run("uname -r")
	const nests = false // linux.nestingProven: true there and here, on a guest with Linux 6.8 or newer, is the proof
	t.Logf("kernel %s", kernel)
	const blind = "mount --bind /dev/null /sys/kernel/btf/vmlinux" // a kernel that was built without type information cannot track
	g.run(blind)
	t.Run("SeveralVolumesShowOneInstantOrAreNotSnapshotted", func(t *testing.T) { several(t, g.in(t), nests) })
	if nests {
		t.Run("AThinPoolHoldsOneInstant", func(t *testing.T) { thin(t, g.in(t)) })
	}
	t.Run("AThickVolumeIsReadFromItsSnapshot", func(t *testing.T) { thick(t, g.in(t)) })
	g.run("umount /sys/kernel/btf/vmlinux")
	t.Run("WhatIsWrittenThroughEveryLayerIsTracked", func(t *testing.T) { layers(t, g.in(t)) })
}

func thick(t *testing.T, g *guest) {
	// A partition beside the volume group is frozen, and read as it lies.
	g.run(`printf '2048,20480\n22528,\n' | sfdisk -q /dev/vda
		pvcreate -q /dev/vda2; vgcreate -q da-ta /dev/vda2; lvcreate -q -L 80M -n main da-ta; lvcreate -q -L 8M -n swap da-ta
		mkfs.ext4 -q /dev/da-ta/main; mkfs.ext4 -q /dev/vda1; mkswap -q /dev/da-ta/swap; swapon /dev/da-ta/swap
		mkdir -p /mnt/main /mnt/boot; mount /dev/da-ta/main /mnt/main; mount /dev/vda1 /mnt/boot`)
	g.write("/mnt/boot", "/mnt/main")
	refused := g.capture(t, "", "vda", func(*dr.SSHSource) {})
	if p := refused.Pass; p.Provider != dr.ProviderFreeze || len(p.PassedOver) != 2 || p.PassedOver[0].Provider != dr.ProviderTracking ||
		p.PassedOver[1].Provider != dr.ProviderLVM || !strings.Contains(p.PassedOver[1].Reason, "not allowed") {
		t.Errorf("nobody allowed snapshots: %+v", p)
	}
	// What an agent that was killed left behind goes; what looks like it and is somebody else's stays.
	killed := make(chan error, 1)
	go func() {
		_, err := g.attempt(t, refused.ID, "vda", allowSnapshots)
		killed <- err
	}()
	g.run(`for i in $(seq 600); do if lvs --noheadings -o lv_name @muster_snapshot 2>/dev/null | grep -q muster_; then pkill -9 -f 'agent-[0-9a-f]* serve'; exit 0; fi; sleep 0.1; done; exit 1`)
	if err := <-killed; err == nil {
		t.Error("a capture whose agent was killed was kept")
	}
	if left := g.run("while pgrep lvcreate >/dev/null; do sleep 0.1; done; lvs --noheadings -o lv_name da-ta | xargs"); !strings.Contains(left, "muster_") {
		t.Errorf("nothing is left by an agent that was killed: %s", left)
	}
	g.run(`lvcreate -q -s -L 8M -n theirs --addtag muster_snapshot da-ta/main; lvcreate -q -L 4M -n muster_999999_1_2 da-ta`)
	g.capture(t, refused.ID, "vda", allowSnapshots)
	if left := g.run("lvs --noheadings -o lv_name da-ta | xargs"); left != "main muster_999999_1_2 swap theirs" {
		t.Errorf("left are the volumes %s", left)
	}
	g.run("lvremove -q -f da-ta/theirs da-ta/muster_999999_1_2")

	before := g.told()
	snap := g.capture(t, refused.ID, "vda", allowSnapshots)
	after := g.told()
	if p := snap.Pass; p.Provider != dr.ProviderLVM || len(p.PassedOver) != 1 || snap.Consistency != dr.FilesystemConsistent || snap.Parent != refused.ID || snap.Stats.Frozen <= 0 {
		t.Errorf("%+v, %s", p, snap.Consistency)
	}
	if left := g.run("lvs --noheadings -o lv_name da-ta | xargs"); left != "main swap" {
		t.Errorf("left are the volumes %s", left)
	}
	// The image is a disk with a volume group that knows of no snapshot.
	g.restore(t, snap, 2)
	g.run("partx -u /dev/vdc; vgimportclone -n restored /dev/vdc2; vgchange -q -ay restored; e2fsck -fn /dev/restored/main; e2fsck -fn /dev/vdc1")
	if volumes := g.run("lvs --noheadings -o lv_name restored | xargs"); volumes != "main swap" {
		t.Errorf("the image has the volumes %s", volumes)
	}
	g.run("mkdir -p /mnt/r1 /mnt/r2; mount -o ro /dev/vdc1 /mnt/r1; mount -o ro /dev/restored/main /mnt/r2")
	g.examine(t, before, after, "/mnt/r1", "/mnt/r2")
	g.run("umount /mnt/r1 /mnt/r2; vgremove -q -f restored; wipefs -q -a /dev/vdc")

	// No room: the next best way, and how much is missing is said.
	g.run("lvcreate -q -l 100%FREE -n full da-ta")
	full := g.capture(t, snap.ID, "vda", allowSnapshots)
	if p := full.Pass; p.Provider != dr.ProviderFreeze || len(p.PassedOver) != 2 || !strings.Contains(p.PassedOver[1].Reason, "needs at least 64 MiB") {
		t.Errorf("no room: %+v", p)
	}
	g.endWriter()
	g.run("umount /mnt/main /mnt/boot; swapoff -a; vgremove -q -f da-ta; wipefs -q -a /dev/vda")
}

func several(t *testing.T, g *guest, nests bool) {
	g.run(`pvcreate -q -y /dev/vda; vgcreate -q two /dev/vda; lvcreate -q -y -L 40M -n a two; lvcreate -q -y -L 40M -n b two
		mkfs.ext4 -q /dev/two/a; mkfs.ext4 -q /dev/two/b; mkdir -p /mnt/a /mnt/b; mount /dev/two/a /mnt/a; mount /dev/two/b /mnt/b`)
	g.write("/mnt/a", "/mnt/b")
	before := g.told()
	snap := g.capture(t, "", "vda", allowSnapshots)
	after := g.told()
	g.endWriter()
	if p := snap.Pass; !nests && (p.Provider != dr.ProviderFreeze || len(p.PassedOver) != 2 || !strings.Contains(p.PassedOver[1].Reason, "cannot be snapshotted at one instant")) ||
		nests && p.Provider != dr.ProviderLVM {
		t.Errorf("%+v", p)
	}
	g.restore(t, snap, 2)
	g.run(`vgimportclone -n restored /dev/vdc; vgchange -q -ay restored; e2fsck -fn /dev/restored/a; e2fsck -fn /dev/restored/b
		mkdir -p /mnt/r1 /mnt/r2; mount -o ro /dev/restored/a /mnt/r1; mount -o ro /dev/restored/b /mnt/r2`)
	g.examine(t, before, after, "/mnt/r1", "/mnt/r2")
	g.run("umount /mnt/r1 /mnt/r2 /mnt/a /mnt/b; vgremove -q -f restored two; wipefs -q -a /dev/vdc /dev/vda")
}

func thin(t *testing.T, g *guest) {
	g.run(`pvcreate -q -y /dev/vda; vgcreate -q thin /dev/vda; lvcreate -q -y --type thin-pool -L 120M -n pool thin
		for v in a b; do lvcreate -q -y -V 60M --thinpool pool -n $v thin; mkfs.ext4 -q /dev/thin/$v; mkdir -p /mnt/$v; mount /dev/thin/$v /mnt/$v; done`)
	g.write("/mnt/a", "/mnt/b")
	parent := ""
	for range 2 {
		before := g.told()
		snap := g.capture(t, parent, "vda", allowSnapshots)
		after := g.told()
		parent = snap.ID
		if p := snap.Pass; p.Provider != dr.ProviderLVM || snap.Consistency != dr.FilesystemConsistent {
			t.Errorf("%+v, %s", p, snap.Consistency)
		}
		if left := g.run("lvs --noheadings -o lv_name thin | xargs"); left != "a b pool" {
			t.Errorf("left are the volumes %s", left)
		}
		g.restore(t, snap, 2)
		g.run(`vgimportclone -n restored /dev/vdc; vgchange -q -ay restored; e2fsck -fn /dev/restored/a; e2fsck -fn /dev/restored/b
			mkdir -p /mnt/r1 /mnt/r2; mount -o ro /dev/restored/a /mnt/r1; mount -o ro /dev/restored/b /mnt/r2`)
		g.examine(t, before, after, "/mnt/r1", "/mnt/r2")
		g.run("umount /mnt/r1 /mnt/r2; vgremove -q -f restored; wipefs -q -a /dev/vdc")
	}
	g.endWriter()
	g.run("umount /mnt/a /mnt/b; vgremove -q -f thin; wipefs -q -a /dev/vda")
}

// layers puts a file system on dm-crypt on LVM on md on a partition. Writes are noted where they reach the whole disk.
func layers(t *testing.T, g *guest) {
	g.run(`printf '2048,\n' | sfdisk -q /dev/vdb
		mdadm --quiet --create /dev/md7 --run --level=1 --raid-devices=2 --metadata=1.2 /dev/vdb1 missing
		pvcreate -q -y /dev/md7; vgcreate -q deep /dev/md7; lvcreate -q -y -L 100M -n lv deep
		dmsetup create locked --table "0 $(blockdev --getsz /dev/deep/lv) crypt aes-xts-plain64 $(printf '%064d' 7) 0 /dev/deep/lv 0"
		mkfs.ext4 -q /dev/mapper/locked; mkdir -p /mnt/deep; mount /dev/mapper/locked /mnt/deep`)
	g.write("/mnt/deep")
	first := g.capture(t, "", "vdb", resident)
	second := g.capture(t, first.ID, "vdb", resident)
	g.endWriter()
	g.run("umount /mnt/deep; dmsetup remove locked; vgchange -q -an deep; mdadm --quiet --stop /dev/md7; sync")
	third := g.capture(t, second.ID, "vdb", resident)
	for _, s := range []dr.Snapshot{second, third} {
		if s.Pass.Kind != dr.PassTracked || s.Pass.Provider != dr.ProviderTracking || s.Stats.Read > guestDiskSize/4 {
			t.Errorf("%+v, %d MB read", s.Pass, s.Stats.Read>>20)
		}
	}
	want, _, _ := strings.Cut(g.run("sha256sum </dev/vdb"), " ")
	img, err := shared.Image(t.Context(), third.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(img, 0, img.Size())); err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		t.Errorf("what was tracked makes an image that is not the disk: %s, want %s", got, want)
	}
	s := g.open(t)
	defer s.Close()
	if err := s.Forget(t.Context()); err != nil {
		t.Error(err)
	}
}
