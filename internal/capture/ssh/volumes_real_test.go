package ssh

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/dr"
)

func allowSnapshots(s *dr.SSHSource) { s.Snapshots = true }
func resident(s *dr.SSHSource)       { s.Resident = true }

// blind is for a kernel that was built without type information, and cannot track.
const blind = "mount --bind /dev/null /sys/kernel/btf/vmlinux"

// One guest for all of it: a boot costs more than most of its parts.
func TestRealVolumesOfAGuest(t *testing.T) {
	g := newGuest(t, "bookworm", 128, 96, 128)
	g.run(blind)
	t.Logf("kernel %s", g.run("uname -r"))
	t.Run("AThickVolumeIsReadFromItsSnapshot", func(t *testing.T) { thick(t, g.in(t)) })
	g.run("umount /sys/kernel/btf/vmlinux")
	t.Run("WhatIsWrittenThroughEveryLayerIsTracked", func(t *testing.T) { layers(t, g.in(t)) })
}

// On a kernel that freezes a file system twice: thick and thin volumes on two disks, while the guest's own file system
// stands still too, because lvm needs to write nothing there.
func TestRealVolumesOfAGuestShowOneInstant(t *testing.T) {
	g := newGuest(t, "bookworm-backports", 96, 96, 96, 96)
	t.Logf("kernel %s", g.run(blind+"; uname -r"))
	g.run(`pvcreate -q -y /dev/vda /dev/vdb; vgcreate -q thick /dev/vda; vgcreate -q thin /dev/vdb; lvcreate -q -y -L 12M -n a thick; lvcreate -q -y --type thin-pool -L 48M -n pool thin
		for v in c d; do lvcreate -q -y -V 24M --thinpool pool -n $v thin; done
		for v in thick/a thin/c thin/d; do mkfs.ext4 -q /dev/$v; mkdir -p /mnt/$v; mount /dev/$v /mnt/$v; done; sync`)
	g.write("/mnt/thin/c", "/mnt/thick/a", "/mnt/thin/d")
	g.kill(t, "", "vda vdb", making(2))
	if left := g.ours(); strings.Count(left, "muster_") < 1 {
		t.Errorf("an agent that was killed has left %q", left)
	}
	g.awaitWriter()
	before := g.told()
	g.run("fsfreeze --freeze /")
	snap, err := g.attempt(t, "", "vda vdb", allowSnapshots)
	g.run("fsfreeze --unfreeze /")
	after := g.told()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v, %+v", snap.Pass, snap.Stats)
	if p := snap.Pass; p.Provider != dr.ProviderLVM || len(p.PassedOver) != 1 || snap.Consistency != dr.FilesystemConsistent || snap.Stats.Frozen <= 0 {
		t.Errorf("%+v, %s", p, snap.Consistency)
	}
	if thick, thin := g.volumes("thick"), g.volumes("thin"); thick != "a" || thin != "c d pool" {
		t.Errorf("left are the volumes %s and %s", thick, thin)
	}
	g.endWriter()
	g.restore(t, snap, 0, 2)
	g.restore(t, snap, 1, 3)
	g.run("vgimportclone -n rthick /dev/vdc; vgimportclone -n rthin /dev/vdd; vgchange -q -ay rthick rthin")
	// The thick group never heard of a snapshot. A pool names them, until the restored server is captured.
	if thick, thin := g.volumes("rthick"), g.volumes("rthin"); thick != "a" || strings.Count(thin, "muster_") != 2 {
		t.Errorf("the image has the volumes %s and %s", thick, thin)
	}
	g.tidy()
	if thin := g.volumes("rthin"); thin != "c d pool" {
		t.Errorf("left in the image are the volumes %s", thin)
	}
	g.run("for v in thick/a thin/c thin/d; do e2fsck -fn /dev/r$v; mkdir -p /run/r$v; mount -o ro /dev/r$v /run/r$v; done")
	g.examine(t, before, after, "/run/rthin/c", "/run/rthick/a", "/run/rthin/d")
}

// making says on a guest that lvm is at work on a capture's snapshot of some number.
func making(n int) string {
	return fmt.Sprintf("pgrep -f 'lvm lvcreate.* muster_[0-9]*_[0-9]*_%d ' >/dev/null", n)
}

func thick(t *testing.T, g *guest) {
	// A partition beside the volume group is frozen, and read as it lies.
	g.run(`printf '2048,20480\n22528,\n' | sfdisk -q /dev/vda
		pvcreate -q /dev/vda2; vgcreate -q da-ta /dev/vda2; lvcreate -q -L 28M -n main da-ta; lvcreate -q -L 8M -n swap da-ta
		mkfs.ext4 -q /dev/da-ta/main; mkfs.ext4 -q /dev/vda1; mkswap -q /dev/da-ta/swap; swapon /dev/da-ta/swap
		mkdir -p /mnt/main /mnt/boot; mount /dev/da-ta/main /mnt/main; mount /dev/vda1 /mnt/boot`)
	g.write("/mnt/boot", "/mnt/main")
	// Two volumes one after the other are not one instant: the next best way, and why is said.
	g.run("lvcreate -q -L 8M -n second da-ta; mkfs.ext4 -q /dev/da-ta/second; mkdir -p /mnt/second; mount /dev/da-ta/second /mnt/second")
	two := g.capture(t, "", "vda", allowSnapshots)
	if p := two.Pass; p.Provider != dr.ProviderFreeze || len(p.PassedOver) != 2 || !strings.Contains(p.PassedOver[1].Reason, "cannot be snapshotted at one instant") {
		t.Errorf("two volumes: %+v", p)
	}
	g.run("umount /mnt/second; lvremove -q -f da-ta/second")
	// What an agent that was killed left behind goes; what looks like it and is somebody else's stays.
	g.kill(t, two.ID, "vda", thawed)
	if g.ours() == "" {
		t.Error("nothing is left by an agent that was killed")
	}
	g.run(`lvcreate -q -s -L 8M -n theirs --addtag muster_snapshot da-ta/main; lvcreate -q -L 4M -n muster_999999_1_2 da-ta`)
	g.tidy()
	if left := g.volumes("da-ta"); left != "main muster_999999_1_2 swap theirs" {
		t.Errorf("left are the volumes %s", left)
	}
	g.run("lvremove -q -f da-ta/theirs da-ta/muster_999999_1_2")

	before := g.told()
	snap := g.capture(t, two.ID, "vda", allowSnapshots)
	after := g.told()
	if p := snap.Pass; p.Provider != dr.ProviderLVM || len(p.PassedOver) != 1 || snap.Consistency != dr.FilesystemConsistent || snap.Parent != two.ID || snap.Stats.Frozen <= 0 {
		t.Errorf("%+v, %s", p, snap.Consistency)
	}
	if left := g.volumes("da-ta"); left != "main swap" {
		t.Errorf("left are the volumes %s", left)
	}
	g.endWriter()
	// The image is a disk with a volume group that knows of no snapshot.
	g.restore(t, snap, 0, 2)
	g.run("partx -u /dev/vdc; vgimportclone -n restored /dev/vdc2; vgchange -q -ay restored; e2fsck -fn /dev/restored/main; e2fsck -fn /dev/vdc1")
	if volumes := g.volumes("restored"); volumes != "main swap" {
		t.Errorf("the image has the volumes %s", volumes)
	}
	g.run("mkdir -p /mnt/r1 /mnt/r2; mount -o ro /dev/vdc1 /mnt/r1; mount -o ro /dev/restored/main /mnt/r2")
	g.examine(t, before, after, "/mnt/r1", "/mnt/r2")
	g.run("umount /mnt/r1 /mnt/r2 /mnt/main /mnt/boot; swapoff -a; vgchange -q -an da-ta restored")
}

// thawed says on a guest, where it is asked again and again, that a capture has just thawed what stood still, and goes on.
const thawed = "if pgrep -f 'exe watchdog [0-9]' >/dev/null; then touch /run/held; false; else rm /run/held 2>/dev/null; fi"

// layers puts a file system on dm-crypt on LVM on md on a partition. Writes are noted where they reach the whole disk.
func layers(t *testing.T, g *guest) {
	g.run(`printf '2048,\n' | sfdisk -q /dev/vdb
		mdadm --quiet --create /dev/md7 --run --level=1 --raid-devices=2 --metadata=1.2 /dev/vdb1 missing
		pvcreate -q -y /dev/md7; vgcreate -q deep /dev/md7; lvcreate -q -y -L 48M -n lv deep
		dmsetup create locked --table "0 $(blockdev --getsz /dev/deep/lv) crypt aes-xts-plain64 $(printf '%064d' 7) 0 /dev/deep/lv 0"
		mkfs.ext4 -q /dev/mapper/locked; mkdir -p /mnt/deep; mount /dev/mapper/locked /mnt/deep`)
	g.write("/mnt/deep")
	first := g.capture(t, "", "vdb", resident)
	g.endWriter()
	g.run("umount /mnt/deep; dmsetup remove locked; vgchange -q -an deep; mdadm --quiet --stop /dev/md7; sync")
	second := g.capture(t, first.ID, "vdb", resident)
	if second.Pass.Kind != dr.PassTracked || second.Pass.Provider != dr.ProviderTracking || second.Stats.Read > g.disks[1]/4 {
		t.Errorf("%+v, %d MB read", second.Pass, second.Stats.Read>>20)
	}
	img, err := shared.Image(t.Context(), second.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
	if err != nil {
		t.Fatal(err)
	}
	if want, err := os.ReadFile(g.disk(1)); err != nil || !bytes.Equal(got, want) {
		t.Errorf("what was tracked makes an image that is not the disk: %v", err)
	}
	s := g.open(t)
	defer s.Close()
	if err := s.Forget(t.Context()); err != nil {
		t.Error(err)
	}
}
