package ssh

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/lab/emulated"
)

// guest is a Debian of its own, with a kernel that has a device-mapper, in an emulated machine.
type guest struct {
	t      *testing.T
	dir    string
	source dr.SSHSource
	disks  []int64 // sizes of those that it does not boot from, bytes: vda, vdb, …
}

// newGuest boots a copy of the demo's server with one of the kernels that scripts/guest-kernels fetches ("bookworm", or
// "bookworm-backports" for one that freezes a file system twice), and with empty disks of some sizes in MiB. Only what the tests need
// is started, because all of it is emulated.
func newGuest(t *testing.T, kernel string, disks ...int64) *guest {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs QEMU, the demo's server and kernels for it: set MUSTER_REAL=1 (scripts/test real)")
	}
	base, format := os.Getenv("MUSTER_SHOP"), "raw"
	if filepath.Ext(base) == ".qcow2" {
		format = "qcow2"
	}
	g := &guest{t: t, dir: t.TempDir()}
	command(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", format, g.path("system.qcow2"))
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()
	for _, mib := range disks {
		g.disks = append(g.disks, mib<<20)
	}
	args := []string{"-drive", "if=none,id=system,format=qcow2,cache=unsafe,file=" + g.path("system.qcow2"), "-device", "virtio-blk-pci,drive=system,addr=1e",
		"-netdev", fmt.Sprintf("user,id=net,net=10.77.0.0/24,host=10.77.0.1,hostfwd=tcp:127.0.0.1:%d-10.77.0.10:22", port),
		"-device", "virtio-net-pci,id=nic,netdev=net,mac=ac:1f:6b:77:00:10,romfile="}
	for i, size := range g.disks {
		file := g.disk(i)
		if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, size)); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-drive", fmt.Sprintf("if=none,id=data%d,format=raw,cache=writeback,file=%s", i, file), "-device", fmt.Sprintf("virtio-blk-pci,drive=data%d,addr=%x", i, 0x10+i))
	}
	g.tools(g.path("tools.tar"))
	system := "vd" + string(rune('a'+len(g.disks))) // the last by its address
	emulated.Boot(t, g.dir, emulated.Machine{Kernel: kernel, Modules: guestModules, Memory: 768, Args: args,
		Files: map[string]string{"init": fmt.Sprintf(guestInitramfs, system), "start": guestStart}, Copies: map[string]string{"tools.tar": g.path("tools.tar")}})
	g.source = dr.SSHSource{User: "root", Host: "127.0.0.1", Port: port, KeyFile: os.Getenv("MUSTER_SHOP_KEY"), FreezeLimit: 60 * time.Second}
	// One connection for all that the tests run: a handshake is slow where it is emulated.
	master := exec.Command("ssh", append([]string{"-M", "-N"}, g.ssh("")[:len(g.ssh(""))-1]...)...)
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = master.Process.Kill()
		_ = master.Wait()
	})
	contact := g.open(t)
	about, err := contact.Contact(t.Context())
	if err = errors.Join(err, contact.Close()); err != nil {
		t.Fatal(err)
	}
	g.source.HostKey = about.HostKey
	return g
}

// What the kernel of a guest must have loaded, and what its programs come from where the demo's server lacks them.
var (
	guestModules  = []string{"virtio_pci", "virtio_blk", "virtio_net", "ext4", "dm_mod", "dm_snapshot", "dm_thin_pool", "dm_crypt", "xts", "raid1"}
	guestPackages = []string{"fdisk", "libfdisk1", "lvm2", "dmsetup", "libdevmapper1.02.1", "libdevmapper-event1.02.1", "libaio1", "liblvm2cmd2.03", "libedit2", "libbsd0", "libmd0", "mdadm",
		"thin-provisioning-tools", "libboost-iostreams1.74.0"}
)

// Two scripts that take the place of an installed system's: of the initramfs, and of the system that it finds.
const (
	guestInitramfs = `#!/busybox sh
/busybox mount -t devtmpfs dev /dev
for m in /modules/*; do /busybox insmod $m; done
n=0
while ! /busybox mount -t ext4 /dev/%[1]s2 /system && [ $n -lt 50 ]; do n=$((n+1)); /busybox sleep 0.1; done
/busybox mount --move /dev /system/dev
/busybox chroot /system tar --extract --keep-directory-symlink --skip-old-files </tools.tar
/busybox cp /start /system/sbin/start
exec /busybox switch_root /system /sbin/start
`
	guestStart = `#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run
mkdir -p /run/sshd /run/lock /dev/pts /dev/shm
mount -t devpts pts /dev/pts; mount -t tmpfs shm /dev/shm; mount -t cgroup2 cgroup /sys/fs/cgroup
ip link set lo up; ip link set eth0 up; ip address add 10.77.0.10/24 dev eth0
/lib/systemd/systemd-udevd --daemon; udevadm trigger --action=add --subsystem-match=block; udevadm settle
/usr/sbin/sshd -D &
until (exec 3<>/dev/tcp/127.0.0.1/22) 2>/dev/null; do sleep 0.05; done
echo guest is up >/dev/console
while :; do wait; sleep 1; done
`
)

// in is the guest for a part of a test.
func (g *guest) in(t *testing.T) *guest {
	here := *g
	here.t = t
	return &here
}

func (g *guest) path(name string) string { return filepath.Join(g.dir, name) }
func (g *guest) disk(n int) string       { return g.path(fmt.Sprintf("data%d.img", n)) }

func (g *guest) ssh(line string) []string {
	return []string{"-i", g.source.KeyFile, "-p", strconv.Itoa(g.source.Port), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
		"-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR", "-o", "ControlPath=" + g.path("ssh"), "root@127.0.0.1", line}
}

// run runs a shell script on the guest and gives what it prints.
func (g *guest) run(script string) string {
	g.t.Helper()
	out, err := g.try(script)
	if err != nil {
		g.t.Fatalf("on the guest: %s: %v\n%s", script, err, out)
	}
	return out
}

func (g *guest) try(script string) (string, error) {
	cmd := exec.Command("ssh", g.ssh("bash -e -s")...)
	cmd.Stdin = strings.NewReader(script + "\n")
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// tools packs what the guest lacks from this host's packages: it is a Debian of the same release.
func (g *guest) tools(to string) {
	g.t.Helper()
	var files []string
	for _, p := range guestPackages {
		out, err := exec.Command("dpkg", "-L", p).Output()
		if err != nil {
			continue // not installed: what needs it will say so
		}
		for _, f := range strings.Fields(string(out)) {
			info, err := os.Lstat(f)
			if f = strings.TrimPrefix(f, "/"); err == nil && !info.IsDir() && !strings.HasPrefix(f, "usr/share/") && !slices.Contains(files, f) {
				files = append(files, f)
			}
		}
	}
	command(g.t, "tar", append([]string{"--create", "--file", to, "--directory", "/"}, files...)...)
}

func (g *guest) open(t *testing.T) *Source {
	t.Helper()
	s, err := Open(t.Context(), g.source, program)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// capture captures some of the guest's disks ("vda vdb").
func (g *guest) capture(t *testing.T, parent, disks string, change func(*dr.SSHSource)) dr.Snapshot {
	t.Helper()
	snap, err := g.attempt(t, parent, disks, change)
	if err != nil {
		t.Fatalf("%v\nthe kernel of the guest says:\n%s", err, g.run("dmesg | tail -5"))
	}
	t.Logf("%s by %s, %s, pass %s (%s), passed over %+v: read %d MB, changed %d kB, frozen %s, took %s; %s", disks, snap.Pass.Provider, snap.Consistency, snap.Pass.Kind, snap.Pass.Reason,
		snap.Pass.PassedOver, snap.Stats.Read>>20, snap.Stats.Changed>>10, snap.Stats.Frozen.Round(time.Millisecond), snap.Stats.Duration.Round(time.Millisecond), snap.Notes)
	return snap
}

// attempt is capture for one that may fail.
func (g *guest) attempt(t *testing.T, parent, disks string, change func(*dr.SSHSource)) (dr.Snapshot, error) {
	source := g.source
	source.Disks = strings.Fields(disks)
	change(&source)
	s, err := Open(t.Context(), source, program)
	if err != nil {
		return dr.Snapshot{}, err
	}
	defer s.Close()
	return capture.Take(t.Context(), s, shared, api.SnapshotTask{ID: dr.NewID("snap"), Server: dr.Server{ID: "srv-1", Name: "guest"}, Parent: parent}, nil)
}

// kill kills the agent of a capture with a signal that it cannot catch as soon as a condition holds on the guest.
func (g *guest) kill(t *testing.T, parent, disks, when string) {
	t.Helper()
	ended := make(chan error, 1)
	go func() {
		_, err := g.attempt(t, parent, disks, allowSnapshots)
		ended <- err
	}()
	g.run(`for i in $(seq 1000); do if ` + when + `; then pkill -9 -f 'agent-[0-9a-f]* serve'; exit 0; fi; sleep 0.05; done; echo "it never came to that"; exit 1`)
	if err := <-ended; err == nil {
		t.Errorf("a capture whose agent was killed when %s was kept", when)
	}
	g.run("while pgrep -f 'lvm lvcreate|exe watchdog [0-9]' >/dev/null; do sleep 0.05; done")
}

// ours gives the snapshots of logical volumes that are there and look like ours.
func (g *guest) ours() string {
	return g.run("lvs --noheadings -o lv_name @muster_snapshot | xargs")
}

// tidy has the agent remove what earlier ones have left.
func (g *guest) tidy() { g.run("/var/cache/muster/agent-* forget") }

// volumes gives the names of a volume group's volumes.
func (g *guest) volumes(group string) string {
	return g.run("lvs --noheadings -o lv_name " + group + " | xargs")
}

// restore writes one disk of a snapshot over one of the guest's that nobody has looked at yet.
func (g *guest) restore(t *testing.T, snap dr.Snapshot, from, to int) {
	t.Helper()
	img, err := shared.Image(t.Context(), snap.ID, from)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	out, err := os.OpenFile(g.disk(to), os.O_WRONLY, 0)
	if err == nil {
		_, err = io.Copy(out, io.NewSectionReader(img, 0, img.Size()))
		err = errors.Join(err, out.Sync(), out.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	g.run("blockdev --flushbufs /dev/vd" + string(rune('a'+to)))
}

// writer is a program on the guest that writes numbers to two files of each folder in turn, each synced before the next, and
// then tells the number: in every image all files hold the same number, or those before some point the next one.
const writer = `
import os, sys, time
folders = sys.argv[1:]
files = [os.open(d + "/" + n, os.O_RDWR | os.O_CREAT) for d in folders for n in ("first", "second")]
told = os.open("/run/told", os.O_RDWR | os.O_CREAT)
n = 0
while not os.path.exists("/run/stop"):
    n += 1
    for f in files:
        os.pwrite(f, b"%020d" % n, 0)
        os.fsync(f)
    for d in folders:
        with open("%s/file-%d" % (d, n % 40), "wb") as f:
            f.write(os.urandom(n % 7 * 8000))
    os.pwrite(told, b"%020d" % n, 0)
    time.sleep(0.03)
`

func (g *guest) write(folders ...string) {
	g.t.Helper()
	g.run("cat >/run/writer.py <<'END'" + writer + "END\nrm -f /run/stop /run/told; nohup python3 /run/writer.py " + strings.Join(folders, " ") +
		" >/run/writer.log 2>&1 </dev/null &\nfor i in $(seq 100); do if test -s /run/told; then exit 0; fi; sleep 0.1; done; cat /run/writer.log; exit 1")
}

// awaitWriter waits until the writer has gone on: nothing stands still.
func (g *guest) awaitWriter() {
	g.t.Helper()
	g.run("told=$(cat /run/told); for i in $(seq 100); do test $(cat /run/told) = $told || exit 0; sleep 0.1; done; echo nobody can write; exit 1")
}

func (g *guest) told() int64 { return number(g.t, g.run("cat /run/told")) }

func (g *guest) endWriter() {
	g.t.Helper()
	g.run("touch /run/stop; while pgrep -f /run/writer.py >/dev/null; do sleep 0.1; done; cat /run/writer.log")
}

func number(t *testing.T, s string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// examine checks that folders of a restored disk hold one instant between two numbers that were told.
func (g *guest) examine(t *testing.T, before, after int64, folders ...string) {
	t.Helper()
	var numbers []int64
	for _, s := range strings.Fields(g.run("for f in " + strings.Join(folders, " ") + "; do cat $f/first; echo; cat $f/second; echo; done")) {
		numbers = append(numbers, number(t, s))
	}
	if len(numbers) != 2*len(folders) {
		t.Fatalf("%d numbers in %v", len(numbers), folders)
	}
	t.Logf("told %d before and %d after the capture, in the image %v", before, after, numbers)
	for i, n := range numbers {
		if n < before || n > after+1 {
			t.Errorf("number %d is not between %d and %d", n, before, after)
		}
		if i > 0 && (n > numbers[i-1] || n < numbers[0]-1) {
			t.Errorf("the numbers %v were never there together", numbers)
		}
	}
}
