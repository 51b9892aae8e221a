package guestfs_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/prerecover/guestfs"
	"github.com/musterdr/muster/internal/vm"
)

const (
	rootUUID = "0b5c1f5e-0000-4000-8000-000000000001"
	mib      = 1 << 20
)

func needReal(t *testing.T) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("set MUSTER_REAL=1 to run libguestfs")
	}
}

// system writes a folder that looks like an installed Debian, with this host's own kernel and initramfs.
func system(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	put := func(name, content string, mode os.FileMode) {
		t.Helper()
		p := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(content), mode)); err != nil {
			t.Fatal(err)
		}
	}
	kernels, _ := filepath.Glob("/boot/vmlinuz-*")
	if len(kernels) == 0 {
		t.Fatal("this test needs a kernel in /boot")
	}
	version := strings.TrimPrefix(kernels[len(kernels)-1], "/boot/vmlinuz-")
	for _, f := range []string{"/boot/initrd.img-" + version, "/lib/modules/" + version + "/modules.dep", "/lib/modules/" + version + "/modules.builtin", "/bin/true", "/etc/os-release"} {
		content, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		put(f, string(content), 0o755)
	}
	put("boot/vmlinuz-"+version, "kernel", 0o644)
	put("boot/grub/grub.cfg", "menuentry 'x' {\n\tlinux /boot/vmlinuz-"+version+" root=/dev/sda2 ro quiet\n}\n", 0o444)
	put("boot/grub/i386-pc/core.img", "x", 0o644)
	put("etc/fstab", "/dev/sda2 / ext4 errors=remount-ro 0 1\nUUID=gone /gone xfs defaults 0 2\n", 0o644)
	put("etc/passwd", "root:x:0:0::/root:/bin/sh\n", 0o644)
	put("etc/hostname", "shop\n", 0o644)
	put("etc/systemd/system/keep.service", "[Unit]\n", 0o644)
	put("usr/lib/systemd/system/open-vm-tools.service", "[Unit]\n", 0o644)
	put("usr/lib/systemd/systemd", "\x7fELF", 0o755)
	put("boot/vmlinuz-$(touch /x)\n\"'", "hostile", 0o644)
	if err := errors.Join(os.MkdirAll(root+"/sbin", 0o755), os.Symlink("/usr/lib/systemd/systemd", root+"/sbin/init")); err != nil {
		t.Fatal(err)
	}
	return root
}

// disk makes a GPT disk of a size with a BIOS boot partition and the system on ext4.
func disk(t *testing.T, root string, size int64) string {
	t.Helper()
	img := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("\xeb\x63\x90 boot code"), 0); err != nil {
		t.Fatal(err)
	}
	run(t, "sgdisk", "-n", "1:2048:+1M", "-t", "1:ef02", "-n", "2:4096:0", "-t", "2:8300", img)
	blocks := (size - 2*mib - mib) / 4096 // what lies before the partition, and the second table after it
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-U", rootUUID, "-d", root, "-E", "root_owner=0:0,offset=2097152", img, fmt.Sprint(blocks))
	return img
}

func hash(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// export serves an image read-only over NBD, as the store does.
func export(t *testing.T, img string) vm.Layer {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	pidFile := filepath.Join(dir, "pid")
	run(t, "qemu-nbd", "--fork", "--pid-file", pidFile, "-r", "-t", "-e", "8", "-f", "raw", "-k", socket, "-x", "disk0", img)
	t.Cleanup(func() {
		pid, err := os.ReadFile(pidFile)
		if err == nil {
			_ = exec.Command("kill", strings.TrimSpace(string(pid))).Run()
		}
		_ = os.RemoveAll(dir)
	})
	return vm.Layer{Socket: socket, Export: "disk0"}
}

// attach says again what lies below a delta, for tools that ask the file.
func attach(t *testing.T, delta string, base vm.Layer) vm.Layer {
	t.Helper()
	run(t, "qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", base.Name(), delta)
	return vm.Layer{Path: delta, Format: "qcow2"}
}

// clock notes when each part of a run began.
type clock struct {
	t     *testing.T
	name  string
	part  string
	began time.Time
	total time.Duration
}

func (c *clock) report(part string, _, _ int64, _ string) {
	if part != c.part {
		c.stop()
		c.part, c.began = part, time.Now()
	}
}

func (c *clock) stop() {
	if c.part != "" {
		c.t.Logf("%s: %-5s %6.2f s", c.name, c.part, time.Since(c.began).Seconds())
		c.total += time.Since(c.began)
	}
	c.part = ""
}

func rescue(t *testing.T, name string, base vm.Layer, inv dr.Inventory) (dr.PreRecovery, time.Duration) {
	t.Helper()
	c := &clock{t: t, name: name}
	p, err := prerecover.Run(context.Background(), guestfs.Driver{Work: t.TempDir(), Cache: cache(t)}, prerecover.Request{
		ID: "pre-1", Dir: t.TempDir(), Base: []vm.Layer{base}, Agent: []byte(strings.Repeat("\x7fELF agent\x00", 300_000)),
		Snapshot: dr.Snapshot{ID: "snap-1", ServerID: "srv-1", Server: "shop", Disks: []dr.SnapshotDisk{{Name: "sda"}}, Inventory: inv},
	}, c.report)
	c.stop()
	if err != nil {
		t.Fatal(err)
	}
	return p, c.total
}

var serverNIC = dr.Inventory{Taken: time.Unix(1, 0), Disks: []dr.InventoryDisk{{Name: "sda", Boot: true}}, NICs: []dr.NIC{{Name: "ens3", MAC: "52:54:00:12:34:56"}}}

func TestARealImageBecomesARescueImage(t *testing.T) {
	needReal(t)
	if err := guestfs.Ready(); err != nil {
		t.Fatal(err)
	}
	img := disk(t, system(t), 1<<30)
	before := hash(t, img)
	base := export(t, img)
	p, _ := rescue(t, "1 GB over NBD", base, serverNIC)
	if hash(t, img) != before {
		t.Error("the image was written to")
	}
	written, err := vm.LayerWritten(context.Background(), p.Deltas[0])
	if err != nil || written > 24*mib {
		t.Errorf("the delta holds %d bytes, %v", written, err)
	}
	t.Logf("the delta holds %.1f MiB, of which 3.3 are the agent; %d edits", float64(written)/mib, len(p.Edits))
	f := p.Facts
	if f.Firmware != dr.BIOS || f.PartTable != "gpt" || f.Distro.ID == "" || f.Init != "systemd" || f.Arch != "x86_64" || len(f.Kernels) != 1 ||
		f.RootDevice != "/dev/sda2" || f.UUIDs["/dev/sda2"] != rootUUID || len(f.Kernels[0].Drivers) == 0 {
		t.Errorf("facts = %+v", f)
	}
	t.Logf("drivers of %s: %v", f.Default, f.Kernels[0].Drivers)

	// Everything is there when the rescue image is opened again, below one more layer.
	ctx := context.Background()
	g, err := guestfs.Driver{Work: t.TempDir(), Cache: cache(t)}.Open(ctx, t.TempDir(), []vm.Layer{attach(t, p.Deltas[0], base)})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Abandon()
	if err := g.Mount(ctx, "/dev/sda2", "/", ""); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"/etc/fstab":          "UUID=" + rootUUID + " / ext4 errors=remount-ro 0 1\nUUID=gone /gone xfs nofail,x-systemd.device-timeout=10s 0 2\n",
		"/boot/grub/grub.cfg": "root=UUID=" + rootUUID + " ro quiet console=tty0 console=ttyS0,115200 loglevel=7\n",
		"/etc/systemd/network/10-muster-ens3.link":                      "Name=ens3\n",
		"/etc/systemd/system/sysinit.target.wants/muster-guest.service": "ExecStart=/usr/lib/muster/muster-guest\n",
	} {
		if got, err := g.Read(ctx, name, mib); err != nil || !strings.Contains(string(got), want) {
			t.Errorf("%s = %q, %v", name, got, err)
		}
	}
	if s, err := g.Stat(ctx, "/usr/lib/muster/muster-guest"); err != nil || s.Mode != 0o755 || s.Size != 3_300_000 {
		t.Errorf("agent: %+v, %v", s, err)
	}
	if s, err := g.Lstat(ctx, "/etc/systemd/system/open-vm-tools.service"); err != nil || s.Link != "/dev/null" {
		t.Errorf("mask: %+v, %v", s, err)
	}
	for _, e := range p.Edits {
		if e.After == "" || e.Action == "link" {
			continue
		}
		got, err := g.Read(ctx, e.Path, 16*mib)
		last := e.After
		for _, other := range p.Edits { // a later edit of the same file has the last word
			if other.Path == e.Path {
				last = other.After
			}
		}
		if sum := sha256.Sum256(got); err != nil || hex.EncodeToString(sum[:]) != last {
			t.Errorf("%s is not what the edits say, %v", e.Path, err)
		}
	}
}

// How long it takes beside a small disk is a number of make bench, which measures on a quiet machine; a test that fails by
// the clock proves nothing.
func TestALargeDiskBecomesARescueImage(t *testing.T) {
	needReal(t)
	p, took := rescue(t, "200 GB", vm.Layer{Path: disk(t, system(t), 200<<30), Format: "raw"}, serverNIC)
	written, err := vm.LayerWritten(context.Background(), p.Deltas[0])
	if err != nil || written > 24*mib {
		t.Errorf("the delta holds %d bytes, %v: it grew with the disk", written, err)
	}
	t.Logf("200 GB: %.2f s, the delta holds %.1f MiB", took.Seconds(), float64(written)/mib)
}

func TestWhatIsNoSystemIsRefused(t *testing.T) {
	needReal(t)
	img := filepath.Join(t.TempDir(), "empty.img")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 1<<30); err != nil {
		t.Fatal(err)
	}
	dir, work := t.TempDir(), t.TempDir()
	_, err := prerecover.Run(context.Background(), guestfs.Driver{Work: work, Cache: cache(t)}, prerecover.Request{
		ID: "pre-1", Dir: dir, Base: []vm.Layer{{Path: img, Format: "raw"}}, Agent: []byte("x"),
		Snapshot: dr.Snapshot{ID: "snap-1", Disks: []dr.SnapshotDisk{{}}}}, nil)
	if !errors.Is(err, prerecover.ErrNotRescuable) || !strings.Contains(err.Error(), "empty") {
		t.Errorf("error = %v", err)
	}
	for _, d := range []string{dir, work} {
		if left, _ := filepath.Glob(d + "/*"); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
}

func TestALimitEndsTheApplianceAndLeavesNothing(t *testing.T) {
	needReal(t)
	img := disk(t, system(t), 1<<30)
	dir, work := t.TempDir(), t.TempDir()
	_, err := guestfs.Driver{Work: work, Cache: cache(t), Limit: 4 * time.Second}.Open(context.Background(), dir, []vm.Layer{{Path: img, Format: "raw"}})
	if err == nil || !strings.Contains(err.Error(), "longer than the limit") {
		t.Errorf("error = %v", err)
	}
	for _, d := range []string{dir, work} {
		if left, _ := filepath.Glob(d + "/*"); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
	// A killed process is gone from /proc as soon as it is reaped; the emulator's parent is then init.
	for end := time.Now().Add(10 * time.Second); ; {
		running := processesWith(t, dir)
		if len(running) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("still running: %q", running)
		}
	}
}

// processesWith lists the processes that were started with a path.
func processesWith(t *testing.T, path string) (out []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if line, err := os.ReadFile(f); err == nil && strings.Contains(string(line), path) {
			out = append(out, strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return out
}

// TestAnEFISystemOnLVMBecomesARescueImage builds its image with guestfish itself: no other tool here can make a volume
// group without the host's device-mapper.
func TestAnEFISystemOnLVMBecomesARescueImage(t *testing.T) {
	needReal(t)
	root := system(t)
	for name, text := range map[string]string{
		"etc/fstab":                      "/dev/mapper/vg0-root / xfs defaults 0 0\n/dev/sda1 /boot/efi vfat umask=0077 0 2\n/dev/sda2 /boot ext4 defaults 0 2\nnas:/x /mnt nfs rw 0 0\n",
		"etc/lvm/devices/system.devices": "IDTYPE=sys_wwid IDNAME=naa.1\n",
		"etc/selinux/config":             "SELINUX=enforcing\n",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755), os.WriteFile(filepath.Join(root, name), []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	img, tar := filepath.Join(dir, "disk.img"), filepath.Join(dir, "root.tar")
	run(t, "tar", "-C", root, "--owner=0", "--group=0", "-cf", tar, ".")
	script := `disk-create ` + img + ` raw 1500M
add ` + img + ` format:raw
set-smp 1
set-append "quiet mitigations=off"
run
part-init /dev/sda gpt
part-add /dev/sda p 2048 133119
part-add /dev/sda p 133120 657407
part-add /dev/sda p 657408 -2048
part-set-gpt-type /dev/sda 1 C12A7328-F81F-11D2-BA4B-00A0C93EC93B
mkfs vfat /dev/sda1
mkfs ext4 /dev/sda2
pvcreate /dev/sda3
vgcreate vg0 /dev/sda3
lvcreate root vg0 700
mkfs xfs /dev/vg0/root
mount /dev/vg0/root /
mkdir /boot
mount /dev/sda2 /boot
mkdir /boot/efi
mount /dev/sda1 /boot/efi
tar-in ` + tar + ` /
mkdir-p /boot/efi/EFI/Rocky
write /boot/efi/EFI/Rocky/shimx64.efi shim
write /boot/efi/EFI/Rocky/grubx64.efi grub
lsetxattr security.selinux "system_u:object_r:systemd_unit_file_t:s0" 40 /etc/systemd/system
`
	cmd := exec.Command("guestfish")
	cmd.Stdin = strings.NewReader(script)
	cmd.Env = append(os.Environ(), "LIBGUESTFS_BACKEND=direct", "LIBGUESTFS_BACKEND_SETTINGS=force_tcg", "LIBGUESTFS_CACHEDIR="+cache(t))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the image: %v\n%s", err, out)
	}
	p, err := func() (dr.PreRecovery, error) {
		c := &clock{t: t, name: "UEFI, LVM, XFS"}
		defer c.stop()
		return prerecover.Run(context.Background(), guestfs.Driver{Work: t.TempDir(), Cache: cache(t)}, prerecover.Request{
			ID: "pre-1", Dir: t.TempDir(), Base: []vm.Layer{{Path: img, Format: "raw"}}, Agent: []byte("agent\x00"), Limits: prerecover.Limits{UEFI: true},
			Snapshot: dr.Snapshot{ID: "snap-1", ServerID: "srv-1", Disks: []dr.SnapshotDisk{{Name: "sda"}}},
		}, c.report)
	}()
	if err != nil {
		t.Fatal(err)
	}
	if p.Facts.Firmware != dr.UEFI || p.Facts.RootDevice != "/dev/vg0/root" || p.Facts.RootFS != "xfs" || p.Facts.SELinux != "enforcing" {
		t.Errorf("facts = %+v", p.Facts)
	}
	ctx := context.Background()
	g, err := guestfs.Driver{Work: t.TempDir(), Cache: cache(t)}.Open(ctx, t.TempDir(), []vm.Layer{attach(t, p.Deltas[0], vm.Layer{Path: img, Format: "raw"})})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Abandon()
	for _, m := range [][2]string{{"/dev/vg0/root", "/"}, {"/dev/sda2", "/boot"}, {"/dev/sda1", "/boot/efi"}} {
		if err := g.Mount(ctx, m[0], m[1], ""); err != nil {
			t.Fatal(err)
		}
	}
	fstab, err := g.Read(ctx, "/etc/fstab", mib)
	for _, want := range []string{"/dev/mapper/vg0-root / xfs", "UUID=" + p.Facts.UUIDs["/dev/sda1"] + " /boot/efi", "UUID=" + p.Facts.UUIDs["/dev/sda2"] + " /boot ext4", "nfs rw,nofail,"} {
		if err != nil || !strings.Contains(string(fstab), want) {
			t.Errorf("fstab has no %q: %q, %v", want, fstab, err)
		}
	}
	for name, want := range map[string]string{"/boot/efi/EFI/BOOT/BOOTX64.EFI": "shim", "/boot/efi/EFI/BOOT/grubx64.efi": "grub"} {
		if got, err := g.Read(ctx, name, mib); err != nil || string(got) != want {
			t.Errorf("%s = %q, %v", name, got, err)
		}
	}
	if _, err := g.Lstat(ctx, "/etc/lvm/devices/system.devices"); err == nil {
		t.Error("the list of LVM's devices is still there")
	}
	for name, want := range map[string]string{"/etc/systemd/system/muster-guest.service": "system_u:object_r:systemd_unit_file_t:s0",
		"/usr/lib/muster/muster-guest": "system_u:object_r:bin_t:s0", "/boot/efi/EFI/BOOT/BOOTX64.EFI": ""} {
		if got, err := g.Xattr(ctx, name, "security.selinux"); err != nil || got != want {
			t.Errorf("label of %s = %q, %v", name, got, err)
		}
	}
}

// TestAnImageOfYourOwn explains what would be done to the raw image named in MUSTER_IMAGE.
func TestAnImageOfYourOwn(t *testing.T) {
	needReal(t)
	img := os.Getenv("MUSTER_IMAGE")
	if img == "" {
		t.Skip("set MUSTER_IMAGE to a raw disk image")
	}
	p, _ := rescue(t, img, vm.Layer{Path: img, Format: "raw"}, dr.Inventory{})
	if err := prerecover.Explain(os.Stdout, p, testing.Verbose()); err != nil {
		t.Fatal(err)
	}
}
