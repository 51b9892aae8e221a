package ssh

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
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

// The same with a kernel on which a file system can be frozen twice.
func TestRealVolumesOfAGuestShowOneInstant(t *testing.T) {
	g := newGuest(t, "bookworm-backports", 192, 96, 192, 96)
	g.run(blind)
	t.Logf("kernel %s", g.run("uname -r"))
	several(t, g)
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
	// No room: the same, and how much is missing is said.
	g.run("umount /mnt/second; lvremove -q -f da-ta/second; lvcreate -q -l 100%FREE -n full da-ta")
	full := g.capture(t, two.ID, "vda", allowSnapshots)
	if p := full.Pass; p.Provider != dr.ProviderFreeze || len(p.PassedOver) != 2 || !strings.Contains(p.PassedOver[1].Reason, "needs at least 64 MiB") {
		t.Errorf("no room: %+v", p)
	}
	g.run("lvremove -q -f da-ta/full")
	// What an agent that was killed left behind goes; what looks like it and is somebody else's stays.
	g.kill(t, full.ID, "vda", "ls -d /sys/block/dm-* | sed 's,$,/dm/name,' | xargs cat | grep -q muster_")
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
	snap := g.capture(t, full.ID, "vda", allowSnapshots)
	after := g.told()
	if p := snap.Pass; p.Provider != dr.ProviderLVM || len(p.PassedOver) != 1 || snap.Consistency != dr.FilesystemConsistent || snap.Parent != full.ID || snap.Stats.Frozen <= 0 {
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

// several captures two disks, one with two thick volumes and one with two in a thin pool, while the guest's own file system
// stands still too: lvm needs to write nothing there.
func several(t *testing.T, g *guest) {
	g.run(`pvcreate -q -y /dev/vda /dev/vdb; vgcreate -q two /dev/vda; vgcreate -q pool /dev/vdb; lvcreate -q -y --type thin-pool -L 64M -n pool pool
		for v in two/a two/b; do lvcreate -q -y -L 16M -n ${v#*/} two; done
		for v in pool/c pool/d; do lvcreate -q -y -V 32M --thinpool pool -n ${v#*/} pool; done
		for v in two/a two/b pool/c pool/d; do mkfs.ext4 -q /dev/$v; mkdir -p /mnt/${v#*/}; mount /dev/$v /mnt/${v#*/}; done
		mkdir -p /mnt/r; sync`)
	g.write("/mnt/a", "/mnt/c", "/mnt/b", "/mnt/d")
	refused := g.capture(t, "", "vda vdb", func(*dr.SSHSource) {})
	if p := refused.Pass; p.Provider != dr.ProviderFreeze || len(p.PassedOver) != 2 || p.PassedOver[0].Provider != dr.ProviderTracking ||
		p.PassedOver[1].Provider != dr.ProviderLVM || !strings.Contains(p.PassedOver[1].Reason, "not allowed") {
		t.Errorf("nobody allowed snapshots: %+v", p)
	}
	const made = "pgrep -f 'lvm lvcreate.* muster_[0-9]*_[0-9]*_%d ' >/dev/null"
	for _, step := range []string{
		fmt.Sprintf(made, 1), // all stands still, and there is no snapshot yet, or the first of a thick volume
		fmt.Sprintf(made, 2),
		fmt.Sprintf(made, 3), // the first of the pool
		fmt.Sprintf(made, 4),
		"lvs --noheadings -o lv_name @muster_snapshot | grep -q _4$",                                                      // all of them, and the rest of the disks is read
		"if pgrep -f 'agent-[0-9a-f]* watchdog' >/dev/null; then touch /run/dog; false; else rm /run/dog 2>/dev/null; fi", // everything is thawed, and they are read
	} {
		g.kill(t, refused.ID, "vda vdb", step)
		t.Logf("killed when %s: left are %q", step, g.ours())
		told := g.told()
		g.run("for i in $(seq 100); do test $(cat /run/told) = " + fmt.Sprintf("%020d", told) + " || exit 0; sleep 0.1; done; echo nobody can write; exit 1")
		g.tidy()
		if two, pool := g.volumes("two"), g.volumes("pool"); two != "a b" || pool != "c d pool" {
			t.Errorf("left are the volumes %s and %s", two, pool)
		}
	}
	parent := refused.ID
	for range 2 {
		before := g.told()
		g.run("fsfreeze --freeze /")
		snap, err := g.attempt(t, parent, "vda vdb", allowSnapshots)
		g.run("fsfreeze --unfreeze /")
		after := g.told()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%+v %+v", snap.Pass, snap.Stats)
		parent = snap.ID
		if p := snap.Pass; p.Provider != dr.ProviderLVM || len(p.PassedOver) != 1 || snap.Consistency != dr.FilesystemConsistent {
			t.Errorf("%+v, %s", p, snap.Consistency)
		}
		if two, pool := g.volumes("two"), g.volumes("pool"); two != "a b" || pool != "c d pool" {
			t.Errorf("left are the volumes %s and %s", two, pool)
		}
		g.restore(t, snap, 0, 2)
		g.restore(t, snap, 1, 3)
		g.run("vgimportclone -n rtwo /dev/vdc; vgimportclone -n rpool /dev/vdd")
		// What is thin knows of the snapshots, until a capture of the restored server; what is thick never heard of them.
		two, pool := g.volumes("rtwo"), g.volumes("rpool")
		t.Log("in the image:", two, "and", pool)
		if two != "a b" || strings.Count(pool, "muster_") != 2 {
			t.Errorf("the image has the volumes %s and %s", two, pool)
		}
		g.run("vgchange -q -ay rtwo rpool")
		g.tidy()
		if pool := g.volumes("rpool"); pool != "c d pool" {
			t.Errorf("left in the image are the volumes %s", pool)
		}
		g.run(`for v in rtwo/a rtwo/b rpool/c rpool/d; do e2fsck -fn /dev/$v; mkdir -p /run/r/$v; mount -o ro /dev/$v /run/r/$v; done`)
		g.examine(t, before, after, "/run/r/rtwo/a", "/run/r/rpool/c", "/run/r/rtwo/b", "/run/r/rpool/d")
		g.run("umount /run/r/*/*; vgremove -q -f rtwo rpool; wipefs -q -a /dev/vdc /dev/vdd")
	}
	g.endWriter()
}

// layers puts a file system on dm-crypt on LVM on md on a partition. Writes are noted where they reach the whole disk.
func layers(t *testing.T, g *guest) {
	g.run(`printf '2048,\n' | sfdisk -q /dev/vdb
		mdadm --quiet --create /dev/md7 --run --level=1 --raid-devices=2 --metadata=1.2 /dev/vdb1 missing
		pvcreate -q -y /dev/md7; vgcreate -q deep /dev/md7; lvcreate -q -y -L 48M -n lv deep
		dmsetup create locked --table "0 $(blockdev --getsz /dev/deep/lv) crypt aes-xts-plain64 $(printf '%064d' 7) 0 /dev/deep/lv 0"
		mkfs.ext4 -q /dev/mapper/locked; mkdir -p /mnt/deep; mount /dev/mapper/locked /mnt/deep`)
	g.write("/mnt/deep")
	first := g.capture(t, "", "vdb", resident)
	second := g.capture(t, first.ID, "vdb", resident)
	g.endWriter()
	g.run("umount /mnt/deep; dmsetup remove locked; vgchange -q -an deep; mdadm --quiet --stop /dev/md7; sync")
	third := g.capture(t, second.ID, "vdb", resident)
	for _, s := range []dr.Snapshot{second, third} {
		if s.Pass.Kind != dr.PassTracked || s.Pass.Provider != dr.ProviderTracking || s.Stats.Read > g.disks[1]/4 {
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
