package qemu

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	"github.com/musterdr/muster/internal/dr"
)

// writer is the first process of the guest: it starts the guest agent and writes numbers to a file, each of which it tells on
// its serial port once it is safe.
const writer = `#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs dev /dev
for m in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk virtio_console; do $b insmod /modules/$m.ko; done
$b mount -t ext4 /dev/vda /data || { echo no data; $b sleep 1000; }
until [ -e /sys/class/virtio-ports/vport*p1/name ] && [ -e /dev/vport*p1 ]; do $b usleep 10000; done
/bin/qemu-ga -t /run -p /dev/vport*p1 &
i=0
while :; do
	i=$((i+1))
	echo $i >>/data/log && $b sync -d /data/log && echo acked $i
	if [ $((i % 10)) = 0 ]; then $b dd if=/dev/urandom of=/data/file-$((i % 70)) bs=64k count=2 2>/dev/null; fi
done
`

// initramfs packs the guest.
func initramfs(t *testing.T, path string) {
	t.Helper()
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w := cpio.NewWriter(out)
	defer func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}()
	add := func(name string, mode cpio.FileMode, data []byte) {
		if err := w.WriteHeader(&cpio.Header{Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	file := func(name, from string) {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		add(name, 0o100755, data)
	}
	for _, dir := range []string{"bin", "dev", "proc", "sys", "run", "data", "modules", "lib", "lib64", "lib/x86_64-linux-gnu"} {
		add(dir, 0o040755, nil)
	}
	add("init", 0o100755, []byte(writer))
	file("bin/busybox", "/bin/busybox")
	agent := "/usr/sbin/qemu-ga"
	file("bin/qemu-ga", agent)
	for _, lib := range regexp.MustCompile(`(/lib\S*) \(0x`).FindAllStringSubmatch(tool(t, "ldd", agent), -1) {
		file(strings.TrimPrefix(lib[1], "/"), lib[1])
	}
	modules, err := filepath.Glob(filepath.Join("/lib/modules", filepath.Base(kernel(t))[len("vmlinuz-"):], "kernel/drivers/*/virtio*.ko"))
	if err != nil || len(modules) == 0 {
		t.Fatal("no virtio modules", err)
	}
	for _, m := range modules {
		file("modules/"+filepath.Base(m), m)
	}
}

// kernel is one of this host's that has its modules.
func kernel(t *testing.T) string {
	t.Helper()
	all, _ := filepath.Glob("/boot/vmlinuz-*")
	for _, k := range all {
		if _, err := os.Stat("/lib/modules/" + filepath.Base(k)[len("vmlinuz-"):]); err == nil {
			return k
		}
	}
	t.Fatal("no kernel with its modules: apt install linux-image-cloud-amd64")
	return ""
}

// newGuest is a machine that writes, started.
func newGuest(t *testing.T) *rig {
	t.Helper()
	r := newRig(t, "qcow2")
	raw := filepath.Join(r.dir, "raw")
	tool(t, "truncate", "-s", "96M", raw)
	tool(t, "mkfs.ext4", "-q", "-F", raw)
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, r.path(0))
	initramfs(t, filepath.Join(r.dir, "initrd"))
	tool(t, "cp", kernel(t), filepath.Join(r.dir, "kernel"))
	file := filepath.Join(r.dir, "domain.xml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s := strings.NewReplacer("<memory unit='MiB'>32<", "<memory unit='MiB'>256<", "<vcpu>2<", "<vcpu>1<",
		"hvm</type>", fmt.Sprintf("hvm</type><kernel>%[1]s/kernel</kernel><initrd>%[1]s/initrd</initrd><cmdline>console=ttyS0 quiet panic=-1 mitigations=off</cmdline>", r.dir),
		"</devices>", fmt.Sprintf("<serial type='file'><source path='%s/serial'/></serial><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices>", r.dir),
	).Replace(string(text))
	if err := os.WriteFile(file, []byte(s), 0o644); err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(r.dir, 0o777)
	virsh(t, "undefine", r.name)
	virsh(t, "define", file)
	virsh(t, "start", r.name)
	r.ackedBeyond(t, 3)
	r.awaitAgent(t)
	return r
}

func (r *rig) awaitAgent(t *testing.T) {
	t.Helper()
	for until := time.Now().Add(time.Minute); !strings.Contains(virsh(t, "dumpxml", r.name), "state='connected'"); {
		if time.Now().After(until) {
			t.Fatalf("no agent: %s", tool(t, "head", "-c", "2000", r.dir+"/serial"))
		}
	}
}

var ackRE = regexp.MustCompile(`acked (\d+)\r?\n`)

// acked is the last number that the guest said was safe.
func (r *rig) acked(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(r.dir, "serial"))
	if err != nil {
		t.Fatal(err)
	}
	all := ackRE.FindAllStringSubmatch(string(text), -1)
	if len(all) == 0 {
		return 0
	}
	n, _ := strconv.Atoi(all[len(all)-1][1])
	return n
}

// ackedBeyond waits until the guest has written more.
func (r *rig) ackedBeyond(t *testing.T, n int) {
	t.Helper()
	for until := time.Now().Add(2 * time.Minute); r.acked(t) <= n; {
		if time.Now().After(until) {
			t.Fatalf("the guest does not go on after %d: %s", n, tool(t, "tail", "-c", "2000", r.dir+"/serial"))
		}
	}
}

// sound says that a snapshot's file system is clean without a repair and holds every number up to one.
func (r *rig) sound(t *testing.T, snap dr.Snapshot, atLeast int) {
	t.Helper()
	img, err := shared.Image(t.Context(), snap.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	flat := filepath.Join(r.dir, "snapshot")
	defer os.Remove(flat)
	out, err := os.Create(flat)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, io.NewSectionReader(img, 0, img.Size())); err != nil {
		t.Fatal(err)
	}
	_ = out.Close()
	if said, err := exec.CommandContext(t.Context(), "e2fsck", "-fn", flat).CombinedOutput(); err != nil || bytes.Contains(said, []byte("recover")) {
		t.Errorf("e2fsck: %v: %s", err, said)
	}
	log := strings.Fields(tool(t, "debugfs", "-R", "cat /log", flat))
	log = slices.DeleteFunc(log, func(s string) bool { _, err := strconv.Atoi(s); return err != nil }) // debugfs greets
	for i, line := range log {
		if i < atLeast && line != strconv.Itoa(i+1) {
			t.Fatalf("line %d of the log is %q", i+1, line)
		}
	}
	if len(log) < atLeast {
		t.Errorf("the snapshot has %d numbers; %d were safe before it", len(log), atLeast)
	}
}

func TestAGuestThatWritesIsFrozenForAMomentAndLosesNothing(t *testing.T) {
	real(t)
	r := newGuest(t)
	parent := ""
	for i := range 6 {
		before := r.acked(t)
		snap, err := r.try(t.Context(), t, parent, nil)
		if err != nil {
			t.Fatal(err)
		}
		if snap.Consistency != dr.FilesystemConsistent || snap.Stats.Frozen <= 0 {
			t.Errorf("consistency %s, frozen %s, notes %q", snap.Consistency, snap.Stats.Frozen, snap.Notes)
		}
		if i > 0 {
			wantPass(t, snap, dr.PassTracked)
		}
		r.sound(t, snap, before)
		t.Logf("snapshot %d: frozen %s, took %s, read %d, changed %d, read/changed %.2f, acked %d", i, snap.Stats.Frozen, snap.Stats.Duration,
			snap.Stats.Read, snap.Stats.Changed, float64(snap.Stats.Read)/float64(max(1, snap.Stats.Changed)), before)
		parent = snap.ID
		r.ackedBeyond(t, r.acked(t)+20)
	}
	// Stopped in the middle of a write, the snapshot is the disk, byte for byte.
	virsh(t, "suspend", r.name)
	snap := r.take(t, parent)
	wantPass(t, snap, dr.PassTracked)
	if snap.Consistency != dr.CrashConsistent {
		t.Errorf("consistency %s of a machine that stands still", snap.Consistency)
	}
	virsh(t, "resume", r.name)

	// We die while it is frozen: it goes on.
	self, _ := os.Executable()
	victim := exec.CommandContext(t.Context(), self, r.name, r.dir, "frozen")
	victim.Env = append(os.Environ(), asVictim+"=1")
	out, err := victim.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "frozen\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if said := virsh(t, "qemu-agent-command", r.name, `{"execute":"guest-fsfreeze-status"}`); !strings.Contains(said, `"frozen"`) {
		t.Fatalf("it is not frozen: %s", said)
	}
	_ = victim.Process.Kill()
	_ = victim.Wait()
	r.ackedBeyond(t, r.acked(t)+3)
	before := r.acked(t)
	last, err := r.try(t.Context(), t, snap.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	wantPass(t, last, dr.PassTracked)
	r.sound(t, last, before)
}
