package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/capturetest"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/store"
	"github.com/musterdr/muster/internal/store/folder"
)

// What the test program is started as again: a watchdog, or a capture that is killed.
const (
	asWatchdog = "MUSTER_TEST_WATCHDOG"
	asVictim   = "MUSTER_TEST_VICTIM"
)

// shared is one store for all tests: making one costs more than a capture.
var shared *store.Store

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Getenv(asWatchdog) != "" {
		if err := Watchdog(os.Args[1:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	if os.Getenv("MUSTER_REAL") == "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "muster")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	place := folder.Driver{Path: filepath.Join(dir, "store")}
	if err := store.Create(ctx, place, "password"); err != nil {
		panic(err)
	}
	if shared, err = store.Open(ctx, place, "password"); err != nil {
		panic(err)
	}
	defer shared.Close(ctx)
	if os.Getenv(asVictim) != "" {
		return victim(ctx)
	}
	return m.Run()
}

// real skips a test that was not asked for. Run these as: MUSTER_REAL=1 scripts/sandbox run -- go test ./internal/capture/qemu
func real(t *testing.T) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs libvirtd and QEMU: MUSTER_REAL=1 scripts/sandbox run -- go test ./internal/capture/qemu")
	}
}

func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(context.WithoutCancel(t.Context()), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func virsh(t testing.TB, args ...string) string {
	t.Helper()
	return tool(t, "virsh", append([]string{"-q", "-c", "qemu:///system"}, args...)...)
}

// rig is a machine in the lab, paused before its first instruction: what is written to its disks is written by its QEMU as if
// by the guest.
type rig struct {
	name, dir string
	formats   []string
	host      Host
}

// newRig defines a machine with a disk in each format, filled by capturetest.
func newRig(t *testing.T, formats ...string) *rig {
	t.Helper()
	const images = "/var/lib/libvirt/images"
	if err := os.MkdirAll(images, 0o711); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(images, "rig")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r := &rig{name: filepath.Base(dir), dir: dir, formats: formats, host: testHost(dir)}
	for i, format := range formats {
		raw := filepath.Join(dir, "raw")
		capturetest.Fill(t, raw, uint64(i))
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", format, raw, r.path(i))
		_ = os.Remove(raw)
	}
	r.define(t)
	t.Cleanup(func() {
		_ = exec.Command("virsh", "-q", "-c", "qemu:///system", "destroy", r.name).Run()
		_ = exec.Command("virsh", "-q", "-c", "qemu:///system", "undefine", "--checkpoints-metadata", r.name).Run()
		_ = os.RemoveAll(dir)
	})
	return r
}

func testHost(dir string) Host {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return Host{Run: filepath.Join("/run", filepath.Base(dir)), Scratch: filepath.Join(dir, "scratch"),
		Watchdog: []string{"/usr/bin/env", asWatchdog + "=1", self}}
}

func (r *rig) target(i int) string { return "vd" + string(rune('a'+i)) }

func (r *rig) path(i int) string {
	return filepath.Join(r.dir, fmt.Sprintf("%s, it's.%s", r.target(i), r.formats[i])) // a name that has to be quoted
}

func (r *rig) define(t *testing.T) {
	t.Helper()
	var disks strings.Builder
	for i, format := range r.formats {
		fmt.Fprintf(&disks, `<disk type='file' device='disk'><driver name='qemu' type='%s' discard='unmap'/><source file="%s"/><target dev='%s' bus='virtio'/><serial>disk-%d</serial></disk>`,
			format, r.path(i), r.target(i), i)
	}
	text := fmt.Sprintf(`<domain type='qemu'><name>%s</name><memory unit='MiB'>32</memory><vcpu>2</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>%s
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk><controller type='usb' model='none'/>
<interface type='ethernet'><mac address='52:54:00:12:34:56'/><target dev='%.10s' managed='yes'/><model type='virtio'/></interface></devices></domain>`,
		r.name, disks.String(), "t"+r.name[3:])
	file := filepath.Join(r.dir, "domain.xml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	virsh(t, "define", file)
}

func (r *rig) start(t *testing.T) *rig {
	t.Helper()
	virsh(t, "start", "--paused", r.name)
	return r
}

// io has the machine's QEMU do something with a disk as if the guest had.
func (r *rig) io(t testing.TB, disk int, command string) {
	t.Helper()
	out := virsh(t, "qemu-monitor-command", r.name, "--hmp",
		fmt.Sprintf(`qemu-io -d /machine/peripheral/virtio-disk%d/virtio-backend "%s"`, disk, command))
	if strings.Contains(strings.ToLower(out), "error") || strings.Contains(out, "fail") {
		t.Fatalf("%s: %s", command, out)
	}
}

// running says whether there is a QEMU.
func (r *rig) running(t testing.TB) bool {
	return !strings.Contains(virsh(t, "domstate", r.name), "shut off")
}

func (r *rig) write(t *testing.T, disk int, off int64, data []byte) {
	t.Helper()
	f, err := os.CreateTemp(r.dir, "data")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	_ = f.Chmod(0o644)
	_ = f.Close()
	if r.running(t) {
		r.io(t, disk, fmt.Sprintf("write -s %s %d %d", f.Name(), off, len(data)))
		return
	}
	tool(t, "qemu-io", "-f", r.formats[disk], "-c", fmt.Sprintf("write -s %s %d %d", f.Name(), off, len(data)), r.path(disk))
}

// content reads a disk by another way than we do.
func (r *rig) content(t *testing.T, disk int) []byte {
	t.Helper()
	if r.running(t) {
		r.io(t, disk, "flush")
	}
	flat := filepath.Join(r.dir, "flat")
	defer os.Remove(flat)
	tool(t, "qemu-img", "convert", "-U", "-f", r.formats[disk], "-O", "raw", r.path(disk), flat)
	data, err := os.ReadFile(flat)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func (r *rig) grow(t *testing.T, disk int) {
	t.Helper()
	size := strconv.Itoa(capturetest.DiskSize + 400<<10)
	if r.running(t) {
		virsh(t, "blockresize", r.name, r.target(disk), size+"B")
		return
	}
	tool(t, "qemu-img", "resize", "-q", "-f", r.formats[disk], r.path(disk), size)
}

func (r *rig) open(t testing.TB) *Source {
	t.Helper()
	src, err := Open(dr.VMSource{Domain: r.name}, r.host)
	if err != nil {
		t.Fatal(err)
	}
	return src
}

func (r *rig) bench(tracks bool) *capturetest.Bench {
	b := &capturetest.Bench{Store: shared, Tracks: tracks, Skips: true, Content: r.content, Write: r.write, Grow: r.grow,
		Open: func(t *testing.T) capture.Source { return r.open(t) }}
	for i := range r.formats {
		b.Disks = append(b.Disks, r.path(i))
	}
	return b
}

// try takes a snapshot.
func (r *rig) try(ctx context.Context, t testing.TB, parent string, report dr.Progress) (dr.Snapshot, error) {
	t.Helper()
	src := r.open(t)
	defer src.Close()
	task := api.SnapshotTask{ID: dr.NewSnapshotID(time.Now()), Server: dr.Server{ID: "srv-1", Name: "web"}, Parent: parent}
	return capture.Take(ctx, src, shared, task, report)
}

// take takes a snapshot and compares it with the disks as they are now.
func (r *rig) take(t *testing.T, parent string) dr.Snapshot {
	t.Helper()
	snap, err := r.try(t.Context(), t, parent, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range r.formats {
		r.same(t, snap, i, r.content(t, i))
	}
	return snap
}

func (r *rig) same(t *testing.T, snap dr.Snapshot, disk int, want []byte) {
	t.Helper()
	img, err := shared.Image(t.Context(), snap.ID, disk)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("disk %d of %s is not what was on the machine (%d bytes, want %d; first difference at %d; %v)", disk, snap.ID, len(got), len(want), differ(got, want), err)
	}
}

func differ(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// checkpoints names the machine's checkpoints, oldest first.
func (r *rig) checkpoints(t *testing.T) []string {
	t.Helper()
	return strings.Fields(virsh(t, "checkpoint-list", "--name", "--topological", r.name))
}

// bitmaps names the bitmaps in an image that no QEMU has open.
func (r *rig) bitmaps(t *testing.T, disk int) (names []string) {
	t.Helper()
	var info struct {
		Format struct {
			Data struct{ Bitmaps []struct{ Name string } }
		} `json:"format-specific"`
	}
	if err := json.Unmarshal([]byte(tool(t, "qemu-img", "info", "--output=json", r.path(disk))), &info); err != nil {
		t.Fatal(err)
	}
	for _, b := range info.Format.Data.Bitmaps {
		names = append(names, b.Name)
	}
	return names
}
