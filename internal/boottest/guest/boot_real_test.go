package guest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
)

// The drivers of the virtio port, in the order in which they are loaded.
var drivers = []string{"virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_console"}

// The agent on the two real devices, of which one hangs up whenever nobody is connected.
func TestTheAgentAnswersOnBothPortsOfAGuest(t *testing.T) {
	real(t)
	kernels, _ := filepath.Glob("/boot/vmlinuz-*")
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil || len(kernels) == 0 {
		t.Skip("QEMU or a kernel is not installed")
	}
	kernel := kernels[len(kernels)-1]
	dir, err := os.MkdirTemp("", "guest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	initrd := initramfs(t, dir, strings.TrimPrefix(kernel, "/boot/vmlinuz-"))
	for _, c := range []struct{ name, args string }{{"virtio", "quiet"}, {"no driver", "nodrivers"}} {
		t.Run(c.name, func(t *testing.T) {
			virtio, isa := filepath.Join(dir, c.name+".v"), filepath.Join(dir, c.name+".i")
			cmd := exec.Command(qemu, "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "384", "-nodefaults", "-display", "none",
				"-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 "+c.args, "-no-reboot",
				"-serial", "file:"+filepath.Join(dir, "serial.log"), "-serial", "unix:"+isa+",server=on,wait=off",
				"-device", "virtio-serial-pci", "-chardev", "socket,id=p,server=on,wait=off,path="+virtio,
				"-device", "virtserialport,chardev=p,name="+probe.PortName)
			serve(t, cmd)
			began := time.Now()
			for round := range 3 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				talk := probe.Dial(ctx, dial(virtio), dial(isa))
				hello, err := talk.Hello(ctx) // the agent announces itself on a port to which a host is connected
				if err != nil {
					serial, _ := os.ReadFile(filepath.Join(dir, "serial.log"))
					t.Fatalf("round %d: %v\n%s", round, err, serial)
				}
				t.Logf("round %d: hello after %s, up for %s", round, time.Since(began), hello.Uptime)
				asked := time.Now()
				answer, err := talk.Ask(ctx, probe.Ask{Ask: probe.AskStatus})
				if err != nil || answer.Status.Kernel == "" {
					t.Fatalf("round %d: %+v, %v", round, answer.Status, err)
				}
				t.Logf("round %d: status after %s", round, time.Since(asked))
				check := dr.Check{Name: "agent", Kind: dr.CheckCommand, Command: []string{"/muster-guest", "version"}, Expect: "."}
				if a, err := talk.Ask(ctx, probe.Ask{Ask: probe.AskCheck, Check: &check}); err != nil || a.Result.State != dr.CheckPass {
					t.Fatalf("round %d: %+v, %v", round, a.Result, err)
				}
				talk.Close()
				cancel()
				time.Sleep(time.Duration(round) * 700 * time.Millisecond) // the host is away for a while
			}
		})
	}
}

func dial(path string) probe.Open {
	return func(ctx context.Context) (probe.Channel, error) {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
		if err != nil {
			return nil, err
		}
		return conn.(*net.UnixConn), nil
	}
}

// initramfs makes the guest's only file system.
func initramfs(t *testing.T, dir, release string) string {
	t.Helper()
	path := filepath.Join(dir, "initrd")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := cpio.NewWriter(f)
	add := func(name string, mode cpio.FileMode, content []byte) {
		err := w.WriteHeader(&cpio.Header{Name: name, Mode: mode, Size: int64(len(content))})
		if err == nil {
			_, err = w.Write(content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, pkg := range map[string]string{"init": "./testdata/init", "muster-guest": "github.com/musterdr/muster/cmd/muster-guest"} {
		out := filepath.Join(dir, name)
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if said, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, said)
		}
		content, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		add(name, cpio.TypeReg|0o755, content)
	}
	add("modules", cpio.TypeDir|0o755, nil)
	add("dev", cpio.TypeDir|0o755, nil)
	for i, name := range drivers {
		found, _ := filepath.Glob(filepath.Join("/lib/modules", release, "kernel/drivers/*/"+name+".ko"))
		if len(found) == 0 {
			continue // built in
		}
		content, err := os.ReadFile(found[0])
		if err != nil {
			t.Fatal(err)
		}
		add(fmt.Sprintf("modules/%d-%s.ko", i, name), cpio.TypeReg|0o644, content)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}
