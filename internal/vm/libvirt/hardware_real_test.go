package libvirt_test

import (
	"bytes"
	"context"
	"errors"
	"image/png"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/image"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/libvirt"
	"github.com/musterdr/muster/internal/vm/vmtest"
)

// patience is how long the tiny guest may take to do anything.
const patience = 20 * time.Second

// start starts a machine for the length of a test.
func start(t *testing.T, h vm.Hypervisor, spec vm.Spec) vm.Machine {
	t.Helper()
	began := time.Now()
	m, err := h.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("started in %s", time.Since(began).Round(time.Millisecond))
	t.Cleanup(func() {
		if err := m.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return m
}

// soon waits until something is true.
func soon(t *testing.T, what string, true func() bool) {
	t.Helper()
	began := time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !true() {
		<-tick.C
		if time.Since(began) > patience {
			t.Fatalf("after %s still not: %s", patience, what)
		}
	}
	t.Logf("%s after %s", what, time.Since(began).Round(time.Millisecond))
}

func says(t *testing.T, m vm.Machine, text string) {
	t.Helper()
	soon(t, "the guest says "+text, func() bool {
		log, _ := os.ReadFile(m.SerialLog())
		return bytes.Contains(log, []byte(text))
	})
}

// tell sends the guest a letter.
func tell(t *testing.T, m vm.Machine, letter string) {
	t.Helper()
	c, err := m.Channel(t.Context(), dr.PortISA)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, letter); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

// pid finds the emulator of a machine.
func pid(t *testing.T, name string) int {
	t.Helper()
	text, err := os.ReadFile("/run/libvirt/qemu/" + name + ".pid")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestEveryDiskBusBootsReadsAndWrites(t *testing.T) {
	real(t)
	h := open(t)
	for _, bus := range []dr.DiskBus{
		dr.BusNVMe, dr.BusVirtio, dr.BusVirtioSCSI, dr.BusSATA, dr.BusLSI, dr.BusMegaSAS, dr.BusMPTSAS, dr.BusPVSCSI, dr.BusIDE,
	} {
		for _, machine := range []string{"q35", "pc"} {
			if bus == dr.BusIDE && machine == "q35" {
				continue
			}
			t.Run(string(bus)+" on "+machine, func(t *testing.T) {
				spec := rig().Spec(t)
				spec.Hardware.DiskBus, spec.Hardware.Machine = bus, machine
				// A second disk, and the boot disk is not the first: order and addresses must hold.
				second := filepath.Join(spec.Dir, "second")
				if err := os.WriteFile(second, make([]byte, 1<<20), 0o600); err != nil {
					t.Fatal(err)
				}
				spec.Disks = append([]vm.Disk{{Layers: []vm.Layer{{Path: second, Format: "raw"}}}}, spec.Disks...)
				spec.Hardware.Disks = append([]dr.HWDisk{{Serial: "a customer's serial / number, rather long", WWN: "0x5000c500a1b2c3d4"}}, spec.Hardware.Disks...)
				m := start(t, h, spec)
				says(t, m, "tiny: wrote")
				tell(t, m, "D")
				says(t, m, "tiny: read")
				if bus == dr.BusIDE || bus == dr.BusNVMe {
					u, err := m.Usage(t.Context())
					if err != nil || u.WriteBytes != 512 || u.ReadBytes < 1024 {
						t.Fatalf("usage %+v, %v", u, err)
					}
				}
				if err := m.Destroy(t.Context()); err != nil {
					t.Fatal(err)
				}
				if got := sector(t, spec.Disks[1].Layers[0], 1); !bytes.HasPrefix(got, []byte(vmtest.Mark)) {
					t.Fatalf("the write is not on the boot disk: %q", got[:16])
				}
			})
		}
	}
}

func TestEveryNetworkCardIsPluggedIntoItsBridge(t *testing.T) {
	real(t)
	h := open(t)
	const bridge = "muvmtest"
	if out, err := exec.Command("ip", "link", "add", bridge, "type", "bridge").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", bridge).Run() })
	for _, model := range []dr.NICModel{dr.NICVirtio, dr.NICE1000e, dr.NICE1000, dr.NICVMXNet3, dr.NICRTL8139} {
		t.Run(string(model), func(t *testing.T) {
			spec := rig().Spec(t)
			spec.Hardware.NICModel = model
			spec.Hardware.NICs = append(spec.Hardware.NICs, dr.HWNIC{MAC: "00:50:56:AB:CD:EF"})
			spec.Networks = []vm.Network{{Bridge: bridge}, {}}
			m := start(t, h, spec)
			says(t, m, "tiny: up")
			ports, err := os.ReadDir("/sys/class/net/" + bridge + "/brif")
			if err != nil || len(ports) != 1 {
				t.Fatalf("%d ports on the bridge, %v; want that of the first card only", len(ports), err)
			}
		})
	}
	spec := rig().Spec(t)
	spec.Networks = []vm.Network{{Bridge: "munone"}}
	if _, err := h.Start(t.Context(), spec); err == nil || !strings.Contains(err.Error(), "munone") {
		t.Fatalf("a bridge that is not there: %v", err)
	}
}

func TestUEFIStartsWithVariablesOfItsOwn(t *testing.T) {
	real(t)
	h := open(t)
	spec := rig().Spec(t)
	spec.Hardware.Firmware, spec.Hardware.Memory = dr.UEFI, 256
	m := start(t, h, spec)
	says(t, m, "BdsDxe")
	if info, err := os.Stat(filepath.Join(spec.Dir, "nvram.fd")); err != nil || info.Size() == 0 {
		t.Fatal(info, err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(spec.Dir, "nvram.fd")); err != nil || info.Size() == 0 {
		t.Fatal("variables do not outlive the machine", info, err)
	}
	start(t, h, spec) // and are used again
}

func TestTheSerialLogHoldsWhatTheBIOSShows(t *testing.T) {
	real(t)
	h := open(t)
	spec := rig().Spec(t)
	empty := filepath.Join(spec.Dir, "empty")
	if err := os.WriteFile(empty, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	spec.Disks = []vm.Disk{{Layers: []vm.Layer{{Path: empty, Format: "raw"}}}}
	m := start(t, h, spec)
	says(t, m, "No bootable device")
	shot, err := m.Screenshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	picture, err := png.Decode(bytes.NewReader(shot))
	if err != nil {
		t.Fatal(err)
	}
	lit := 0
	for y := range picture.Bounds().Dy() {
		for x := range picture.Bounds().Dx() {
			if r, g, b, _ := picture.At(x, y).RGBA(); r+g+b > 0 {
				lit++
			}
		}
	}
	if lit == 0 {
		t.Error("the screen is black: the text must be on it too")
	}
}

// disk is a disk image whose reads from sector 2048 on fail while broken.
type disk struct {
	*bytes.Reader
	mu     sync.Mutex
	broken bool
}

func (d *disk) setBroken(b bool) { d.mu.Lock(); defer d.mu.Unlock(); d.broken = b }

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broken && off+int64(len(p)) > 2048*512 {
		return 0, errors.New("a block does not match its hash")
	}
	return d.Reader.ReadAt(p, off)
}

func (d *disk) Extents(_ context.Context, off, length int64, yield func(image.Extent) bool) error {
	yield(image.Extent{Offset: off, Length: length})
	return nil
}

// export serves a disk that boots the tiny guest, and gives the chain scratch → delta → export on it.
func export(t *testing.T, h vm.Hypervisor, spec *vm.Spec) (d *disk, stop, restart func()) {
	t.Helper()
	d = &disk{Reader: bytes.NewReader(vmtest.Disk())}
	socket := filepath.Join(filepath.Dir(spec.Dir), "export.sock")
	_, gid := h.(*libvirt.Hypervisor).User()
	var server *image.Server
	restart = func() {
		s := image.NewServer()
		if err := s.Add("snap/0", d); err != nil {
			t.Fatal(err)
		}
		var l net.Listener
		l, err := image.Listen(socket, 0o660, gid)
		if err != nil {
			t.Fatal(err)
		}
		server = s
		go func() { _ = s.Serve(context.Background(), l) }()
	}
	stop = func() { _ = server.Close() }
	restart()
	t.Cleanup(func() { stop() })

	bottom := vm.Layer{Socket: socket, Export: "snap/0", Format: "raw"}
	delta := overlay(t, filepath.Join(filepath.Dir(spec.Dir), "delta"), bottom)
	scratch := overlay(t, filepath.Join(spec.Dir, "scratch"), delta)
	spec.Disks = []vm.Disk{{Layers: []vm.Layer{scratch, delta, bottom}, Scratch: true}}
	return d, stop, restart
}

func TestAMachineBootsFromAnExport(t *testing.T) {
	real(t)
	h := open(t)
	for _, bus := range []dr.DiskBus{dr.BusVirtio, dr.BusNVMe} {
		t.Run(string(bus), func(t *testing.T) {
			spec := rig().Spec(t)
			spec.Hardware.DiskBus = bus
			export(t, h, &spec)
			m := start(t, h, spec)
			says(t, m, "tiny: wrote")
			tell(t, m, "D")
			says(t, m, "tiny: read")
		})
	}
}

func TestAReadErrorPausesTheMachineWithItsReason(t *testing.T) {
	real(t)
	h := open(t)
	spec := rig().Spec(t)
	d, _, _ := export(t, h, &spec)
	m := start(t, h, spec)
	says(t, m, "tiny: wrote")
	d.setBroken(true)
	tell(t, m, "D")
	var reason string
	soon(t, "the machine is paused", func() bool {
		state, why, err := m.State(t.Context())
		reason = why
		return err == nil && state == vm.Paused
	})
	if !strings.HasPrefix(reason, "I/O error") {
		t.Fatalf("reason %q", reason)
	}
	if clean, err := m.Shutdown(t.Context(), time.Minute); err != nil || clean {
		t.Fatalf("shutdown of a paused machine: clean %v, %v", clean, err)
	}
}

func TestAMachineWaitsForAnExportThatComesBack(t *testing.T) {
	real(t)
	h := open(t)
	for _, bus := range []dr.DiskBus{dr.BusVirtio, dr.BusSATA, dr.BusNVMe} {
		t.Run(string(bus), func(t *testing.T) {
			spec := rig().Spec(t)
			spec.Hardware.DiskBus = bus
			_, stop, restart := export(t, h, &spec)
			m := start(t, h, spec)
			says(t, m, "tiny: wrote")
			stop()
			tell(t, m, "D")
			restart()
			says(t, m, "tiny: read")
			if state, why, err := m.State(t.Context()); err != nil || state != vm.Running {
				t.Fatalf("state %s (%s), %v; want running", state, why, err)
			}
		})
	}
}

func TestAMachineWhoseExportIsGoneCanBeDestroyed(t *testing.T) {
	real(t)
	h := open(t)
	spec := rig().Spec(t)
	_, stop, _ := export(t, h, &spec)
	m := start(t, h, spec)
	says(t, m, "tiny: wrote")
	stop()
	tell(t, m, "D")
	began := time.Now()
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("destroyed in %s", time.Since(began).Round(time.Millisecond))
}

func TestAnEmulatorThatIsKilledIsCrashedAndGone(t *testing.T) {
	real(t)
	h := open(t)
	m := start(t, h, rig().Spec(t))
	if err := syscall.Kill(pid(t, m.Name()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	soon(t, "the machine is crashed", func() bool {
		state, _, err := m.State(t.Context())
		return err == nil && state == vm.Crashed
	})
	if _, err := h.Find(t.Context(), m.Name()); !errors.Is(err, vm.ErrGone) {
		t.Fatalf("find: %v, want ErrGone", err)
	}
}

func TestTheEmulatorRunsUnprivileged(t *testing.T) {
	real(t)
	h := open(t)
	m := start(t, h, rig().Spec(t))
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid(t, m.Name())) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := h.(*libvirt.Hypervisor).User()
	for line := range strings.Lines(string(status)) {
		fields := strings.Fields(line)
		if fields[0] == "Uid:" && (uid == 0 || fields[1] != strconv.Itoa(uid)) {
			t.Errorf("runs as user %s, want %d", fields[1], uid)
		}
		if fields[0] == "CapEff:" && fields[1] != "0000000000000000" {
			t.Errorf("has capabilities %s", fields[1])
		}
	}
}

func TestTwoCopiesOfOneServerRunSideBySide(t *testing.T) {
	real(t)
	h := open(t)
	for range 2 {
		spec := rig().Spec(t)
		m := start(t, h, spec)
		line, err := os.ReadFile("/proc/" + strconv.Itoa(pid(t, m.Name())) + "/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(line, []byte("type=1,uuid="+spec.Hardware.SMBIOS.UUID)) {
			t.Errorf("the guest does not see the server's own UUID:\n%s", bytes.ReplaceAll(line, []byte{0}, []byte{' '}))
		}
	}
}

func TestAHandleOutlivesARestartOfLibvirtd(t *testing.T) {
	real(t)
	const file = "/run/libvirt/libvirtd.pid" // as scripts/sandbox starts it; never the machine's own daemon
	text, err := os.ReadFile(file)
	if err != nil {
		t.Skip("not in a sandbox: ", err)
	}
	daemon, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	h := open(t)
	m := start(t, h, rig().Spec(t))
	says(t, m, "tiny: wrote")
	if err := syscall.Kill(daemon, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	soon(t, "libvirtd is gone", func() bool { _, err := os.Stat(file); return err != nil })
	if _, _, err := m.State(t.Context()); err == nil {
		t.Fatal("an answer without a daemon")
	}
	if out, err := exec.Command("libvirtd", "--daemon", "--pid-file", file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	soon(t, "the machine is seen again", func() bool {
		state, _, err := m.State(t.Context())
		return err == nil && state == vm.Running
	})
	tell(t, m, "D")
	if clean, err := m.Shutdown(t.Context(), patience); err != nil || !clean {
		t.Fatal(clean, err)
	}
}
