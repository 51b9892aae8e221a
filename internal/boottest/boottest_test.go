package boottest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/musterdr/muster/internal/boottest/guest"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/probe"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/sim"
)

// The serial log of a healthy boot, as far as it matters here.
const healthySerial = "SeaBIOS (version 1.16.2-debian-1.16.2-1)\r\nBooting from Hard Disk...\r\n" +
	"\x1b[2J\x1b[HGNU GRUB  version 2.06\r\n Press enter to boot the selected OS, `e' to edit the commands before booting or `c' for a command-line.\r\n" +
	"[    0.000000] Linux version 6.1.0-25-amd64 (debian-kernel@lists.debian.org)\r\n[    1.200000] Run /init as init process\r\n" +
	"[    4.100000] systemd[1]: Detected virtualization qemu.\r\n"

const verdictID = "verdict-aaaaaaaaaaaaaaaa"

var (
	shopStatus = probe.Status{
		InitState: "running", Kernel: "6.1.0-25-amd64", Hostname: "shop", Timezone: "Europe/Vienna",
		Distro:      dr.Distro{ID: "debian", Version: "12"},
		ActiveUnits: []string{"nginx.service", "postgresql@15-main.service"},
		Fstab:       []probe.FstabEntry{{Spec: "UUID=1", Mount: "/", Type: "ext4"}, {Spec: "/dev/sdb1", Mount: "/data", Type: "xfs", Nofail: true}},
		Mounts:      []dr.Filesystem{{Device: "/dev/vda1", Mount: "/", Type: "ext4"}, {Device: "/dev/vdb1", Mount: "/data", Type: "xfs"}},
		NICs:        []dr.NIC{{Name: "lo"}, {Name: "ens3", MAC: "52:54:00:00:00:01", Addresses: []string{"10.9.0.2/24"}}},
		Listening: []dr.Listener{
			{Proto: "tcp", Address: "0.0.0.0", Port: 80, Process: "nginx"}, {Proto: "tcp", Address: "::", Port: 22, Process: "sshd"},
			{Proto: "tcp", Address: "127.0.0.1", Port: 5432, Process: "postgres"},
		},
		Processes: []string{"nginx", "postgres", "sshd", "systemd"},
	}
	shopInventory = dr.Inventory{
		BootID: "boot-of-the-source", Hostname: "shop", Machine: "machine-1", Kernel: "6.1.0-25-amd64",
		Distro: dr.Distro{ID: "debian", Version: "12"}, Timezone: "Europe/Vienna",
		NICs:      []dr.NIC{{Name: "ens3", MAC: "52:54:00:00:00:01", Addresses: []string{"10.9.0.2/24", "fe80::1/64"}}, {Name: "veth1", MAC: "02:00:00:00:00:01", Kind: "veth"}},
		Listening: append([]dr.Listener{{Proto: "tcp", Address: "127.0.0.1", Port: 6010, Process: "sshd"}, {Proto: "tcp", Address: "0.0.0.0", Port: 45123, Process: "rpc.statd"}}, shopStatus.Listening...),
		Processes: []string{"nginx", "postgres", "sshd", "systemd", "bash"},
	}
)

// inside is a guest of the sim that boots as told and then answers as the real agent does, with the status given.
type inside struct {
	serial string
	status func(n int) probe.Status // n counts from 0; nil: shopStatus
	hello  func() probe.Hello       // nil: of the shop
	try    func(context.Context, dr.Check) dr.CheckResult
	port   dr.GuestPort // "" virtio
	then   func(ctx context.Context, c *sim.Computer) sim.End
}

func (g inside) Run(ctx context.Context, c *sim.Computer) sim.End {
	time.Sleep(20 * time.Millisecond)
	fmt.Fprint(c.Serial(), g.serial)
	time.Sleep(2 * pollEvery)
	if g.hello == nil {
		g.hello = func() probe.Hello {
			return probe.Hello{BootID: fmt.Sprintf("boot-%d", c.Runs), Machine: "machine-1", Hostname: "shop", Kernel: "6.1.0-25-amd64", Uptime: 10 * time.Millisecond}
		}
	}
	if g.port == "" {
		g.port = dr.PortVirtio
	}
	var n atomic.Int32
	agent := &guest.Agent{Version: "test", Who: g.hello, Try: g.try, Look: func(context.Context, bool) probe.Status {
		s := shopStatus
		if g.status != nil {
			s = g.status(int(n.Add(1)) - 1)
		}
		return fresh(s)
	}}
	if g.then == nil {
		g.then = func(ctx context.Context, _ *sim.Computer) sim.End { <-ctx.Done(); return sim.PowerOff }
	}
	ctx, cancel := context.WithCancel(ctx)
	served := make(chan struct{})
	go func() { defer close(served); _ = agent.Serve(ctx, closer{c.Port(g.port)}) }()
	end := g.then(ctx, c)
	cancel()
	if end == sim.PowerOff && ctx.Err() == nil {
		<-served
	}
	return end
}

// fresh is a copy taken now: the agent cuts what it is given to size, and tests run side by side.
func fresh(s probe.Status) (out probe.Status) {
	text, err := json.Marshal(s)
	if err == nil {
		err = json.Unmarshal(text, &out)
	}
	if err != nil {
		panic(err)
	}
	out.Now = time.Now()
	return out
}

type closer struct{ io.ReadWriter }

func (closer) Close() error { return nil }

// mute is a guest without an agent.
func mute(serial string) sim.Guest {
	return sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
		fmt.Fprint(c.Serial(), serial)
		<-ctx.Done()
		return sim.PowerOff
	})
}

// bench is a host with one image to test.
type bench struct {
	host    *sim.Host
	hv      *sim.Hypervisor
	request Request
}

func newBench(t *testing.T, g sim.Guest) *bench {
	t.Helper()
	dir, err := os.MkdirTemp("", "bt") // t.TempDir is too long a name for the sockets of a real machine
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	base := filepath.Join(dir, "delta")
	if err := os.WriteFile(base, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	host := &sim.Host{Boot: func(vm.Spec) sim.Guest { return g }}
	t.Cleanup(func() { _ = host.Close() })
	return &bench{host: host, hv: host.Open(), request: Request{
		VerdictID: verdictID, Term: 7,
		Snapshot: dr.Snapshot{ID: "snap-1", Taken: time.Now().Add(-time.Hour), Inventory: shopInventory},
		PreRecovery: dr.PreRecovery{ID: "pre-1", Hardware: dr.Hardware{
			CPUs: 1, Memory: 512, DiskBus: dr.BusVirtio, NICModel: dr.NICVirtio, Disks: []dr.HWDisk{{}}, NICs: []dr.HWNIC{{MAC: "52:54:00:00:00:01"}},
		}},
		Network: vm.Network{Bridge: "isolated"},
		Disks:   []vm.Disk{{Layers: []vm.Layer{{Path: base, Format: "raw"}}}}, ScratchDir: filepath.Join(dir, "s"), EvidenceDir: filepath.Join(dir, "e"),
		Limits: Limits{Sample: 20 * time.Millisecond},
		NewLayer: func(_ context.Context, path string, below vm.Layer) (vm.Layer, error) {
			return vm.Layer{Path: path, Format: "raw"}, os.WriteFile(path, nil, 0o600)
		},
	}}
}

func (b *bench) run(t *testing.T) dr.Verdict {
	t.Helper()
	v, err := Run(t.Context(), b.hv, b.request, nil)
	if err != nil {
		t.Fatal(err)
	}
	b.nothingLeft(t)
	return v
}

func (b *bench) nothingLeft(t *testing.T) {
	t.Helper()
	if left, err := b.hv.List(context.WithoutCancel(t.Context())); err != nil || len(left) > 0 {
		t.Errorf("machines are left: %v, %v", left, err)
	}
	if left, _ := os.ReadDir(b.request.ScratchDir); len(left) > 0 {
		t.Errorf("in the scratch folder is left: %v", left)
	}
}

func want(t *testing.T, v dr.Verdict, outcome dr.Outcome, code dr.Code, words string) {
	t.Helper()
	if v.Outcome != outcome || v.Code != code || !strings.Contains(v.Summary, words) {
		t.Fatalf("got %s %s: %s\n%+v", v.Outcome, v.Code, v.Summary, v.Results)
	}
}

func TestAHealthyCopyPasses(t *testing.T) {
	t.Parallel()
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<h1>Shop</h1>") }))
	defer page.Close()
	b := newBench(t, inside{serial: healthySerial})
	b.request.Checks = []dr.Check{
		{Name: "page", Kind: dr.CheckHTTP, URL: page.URL, Body: "(?i)shop"},
		{Name: "port", Kind: dr.CheckTCP, Address: page.Listener.Addr().String()},
		{Name: "command", Kind: dr.CheckCommand, Command: []string{"echo", "42"}, Expect: `^42\b`},
	}
	b.request.Objectives = dr.Objectives{RTO: time.Minute, RPO: time.Minute}
	v := b.run(t)
	want(t, v, dr.Pass, dr.CodeNone, "")
	for _, r := range v.Results {
		if r.State != dr.CheckPass {
			t.Errorf("%s is %s: %s", r.Name, r.State, r.Got)
		}
	}
	if v.BootID != "boot-0" || v.Accelerator != "tcg" || v.Rung != "virtio/virtio" {
		t.Errorf("%+v", v)
	}
	var sum time.Duration
	var names []string
	for _, p := range v.Phases {
		sum += p.Duration
		names = append(names, p.Name)
	}
	if got := strings.Join(names, " "); got != "assemble firmware kernel userspace stable checks" || sum != v.RTA {
		t.Errorf("phases %s, %s of %s", got, sum, v.RTA)
	}
	if v.RTOMet == nil || !*v.RTOMet || v.RPOMet == nil || *v.RPOMet || v.RPA < time.Hour {
		t.Errorf("objectives: %v %v, data %s old", v.RTOMet, v.RPOMet, v.RPA)
	}
	kinds := map[string]string{}
	for _, e := range v.Evidence {
		content, err := os.ReadFile(e.Path)
		if err != nil || int64(len(content)) != e.Size {
			t.Errorf("%s: %v", e.Kind, err)
		}
		kinds[e.Kind] = string(content)
	}
	if !strings.Contains(kinds["serial"], "Linux version") || strings.Contains(kinds["serial"], "\x1b") {
		t.Errorf("serial log %q", kinds["serial"])
	}
	if !strings.HasPrefix(kinds["screenshot"], "\x89PNG") || !strings.Contains(kinds["answers"], `"boot_id": "boot-0"`) {
		t.Error("the evidence is not complete")
	}
}

// Every text is from a real boot that went wrong so.
func TestABootThatFailsIsNamed(t *testing.T) {
	t.Parallel()
	kernel := healthySerial
	for name, c := range map[string]struct {
		serial string
		code   dr.Code
		words  string
	}{
		"nothing on the disk": {
			"SeaBIOS (version 1.16.2-debian-1.16.2-1)\r\nBooting from Hard Disk...\r\nBoot failed: not a bootable disk\r\n\nNo bootable device.\r\n",
			dr.CodeNoBootable, "No bootable device",
		},
		"no loader on the ESP": {
			"BdsDxe: failed to load Boot0001 \"UEFI QEMU HARDDISK QM00001 \" from PciRoot(0x0)/Pci(0x1F,0x2)/Sata(0x0,0xFFFF,0x0): Not Found\r\n" +
				"BdsDxe: No bootable option or device was found.\r\nBdsDxe: Press any key to enter the Boot Manager Menu.\r\n",
			dr.CodeNoBootable, "No bootable option",
		},
		"the firmware's shell": {
			"\x1b[2J\x1b[01;01HUEFI Interactive Shell v2.2\x1b[02;01HEDK II\r\nPress ESC in 1 seconds to skip startup.nsh or any other key to continue.\r\nShell> ",
			dr.CodeNoBootable, "shell",
		},
		"no GRUB modules": {
			"SeaBIOS (version 1.16.2)\r\nBooting from Hard Disk...\r\nGRUB loading.\r\nWelcome to GRUB!\r\n\r\nerror: no such device: 5a7f.\r\nEntering rescue mode...\r\ngrub rescue> ",
			dr.CodeGrubRescue, "prompt",
		},
		"no GRUB configuration": {
			"\x1b[0m\x1b[30m\x1b[47m\x1b[2J\x1b[01;01HGNU GRUB  version 2.06\r\n\r\n   Minimal BASH-like line editing is supported. For the first word, TAB lists possible command completions.\r\n\r\n\x1b[08;01Hgrub> ",
			dr.CodeGrubRescue, "prompt",
		},
		"no kernel": {
			"Loading Linux 6.1.0-25-amd64 ...\r\nerror: file `/vmlinuz' not found.\r\nLoading initial ramdisk ...\r\nerror: you need to load the kernel first.\r\n\r\nPress any key to continue...",
			dr.CodeGrubRescue, "kernel",
		},
		"Debian without its root": {
			"[    0.000000] Linux version 6.1.0\r\nLoading, please wait...\r\nBegin: Waiting for root file system ... done.\r\nGave up waiting for root file system device.  Common problems:\r\n" +
				" - Boot args (cat /proc/cmdline)\r\nALERT!  UUID=0b1c does not exist.  Dropping to a shell!\r\n\r\n\r\nBusyBox v1.35.0 (Debian 1:1.35.0-4+b3) built-in shell (ash)\r\n(initramfs) ",
			dr.CodeInitrdTimeout, "root file system",
		},
		"Rocky without its root": {
			"[  192.3] dracut-initqueue[395]: Warning: dracut-initqueue: timeout, still waiting for following initqueue hooks:\r\n" +
				"[  193.100000] systemd[1]: Starting Dracut Emergency Shell...\r\nWarning: /dev/mapper/rl-root does not exist\r\n\r\nGenerating \"/run/initramfs/rdsosreport.txt\"\r\n\r\nEntering emergency mode. Exit the shell to continue.\r\nGive root password for maintenance\r\n(or press Control-D to continue): ",
			dr.CodeInitrdTimeout, "root file system",
		},
		"Alpine without its root": {
			"Mounting root: failed. \r\ninitramfs emergency recovery shell launched. Type 'exit' to continue boot\r\n/ # ",
			dr.CodeInitrdTimeout, "root file system",
		},
		"a data disk is missing": {
			kernel + "[\x1b[0;1;33mDEPEND\x1b[0m] Dependency failed for Local File Systems.\r\nYou are in emergency mode. After logging in, type \"journalctl -xb\" to view\r\nsystem logs\r\nGive root password for maintenance\r\n",
			dr.CodeEmergency, "emergency mode",
		},
		"a panic": {
			kernel + "[    2.1] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n[    2.2] Rebooting in 10 seconds..\r\nSeaBIOS (version 1.16.2)\r\n",
			dr.CodePanic, "Unable to mount root",
		},
		"no agent": {kernel + "\r\nDebian GNU/Linux 12 shop ttyS0\r\n\r\nshop login: ", dr.CodeLoginNoAgent, "login prompt"},
		"silence":  {"", dr.CodeTimeout, "nothing has moved"},
		"a loop without end": {
			strings.Repeat("A start job is running for something\r\n", 1000), dr.CodeTimeout, "nothing has moved",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, mute(c.serial))
				b.request.Limits.Login, b.request.Limits.Stall = 5*time.Second, 30*time.Second
				began := time.Now()
				v := b.run(t)
				want(t, v, dr.Fail, c.code, c.words)
				if took := time.Since(began); took > 45*time.Second {
					t.Errorf("it was known only after %s", took)
				}
				if v.BootID != "" || len(v.Evidence) < 2 {
					t.Errorf("%+v", v)
				}
				b.host.Close()
			})
		})
	}
}

// A boot that shows a symptom and gets over it is not ill.
func TestASymptomThatPassesIsNone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
			fmt.Fprint(c.Serial(), "UEFI Interactive Shell v2.2\r\nPress ESC in 5 seconds to skip startup.nsh\r\nShell> ")
			time.Sleep(5 * time.Second)
			fmt.Fprint(c.Serial(), "\r\nFS0:\\> bootx64.efi\r\n")
			return inside{serial: healthySerial}.Run(ctx, c)
		}))
		want(t, b.run(t), dr.Pass, "", "")
		b.host.Close()
	})
}

func TestAMachineThatStopsIsNamed(t *testing.T) {
	t.Parallel()
	pause := func(reason string) func(ctx context.Context, c *sim.Computer) sim.End {
		return func(ctx context.Context, c *sim.Computer) sim.End {
			time.Sleep(100 * time.Millisecond)
			c.Pause(ctx, reason)
			return sim.PowerOff
		}
	}
	end := func(e sim.End) func(context.Context, *sim.Computer) sim.End {
		return func(context.Context, *sim.Computer) sim.End { time.Sleep(time.Second); return e }
	}
	starting := func(int) probe.Status { return probe.Status{InitState: "starting", Jobs: 3} }
	for name, c := range map[string]struct {
		then    func(ctx context.Context, c *sim.Computer) sim.End
		outcome dr.Outcome
		code    dr.Code
		words   string
	}{
		"it dies": {func(_ context.Context, c *sim.Computer) sim.End {
			time.Sleep(time.Second)
			c.Die()
			return sim.PowerOff
		}, dr.Fail, dr.CodeDied, "emulator died"},
		"it goes down":         {end(sim.PowerOff), dr.Fail, dr.CodeDied, "switched itself off"},
		"it panics":            {end(sim.Panic), dr.Fail, dr.CodePanic, "panicked"},
		"a disk error":         {pause("I/O error"), dr.Fail, dr.CodeDiskError, "disk"},
		"no room for it":       {pause("I/O error: no space left on device"), dr.Inconclusive, dr.CodeNoCapacity, "no room"},
		"somebody paused it":   {pause("paused by an operator"), dr.Inconclusive, dr.CodeInfrastructure, "from outside"},
		"it restarts for ever": {end(sim.Reboot), dr.Fail, dr.CodeDied, "times over"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, inside{serial: healthySerial, status: starting, then: c.then})
				want(t, b.run(t), c.outcome, c.code, c.words)
				b.host.Close()
			})
		})
	}
}

func TestAGuestThatRestartsOnceIsAskedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		// A relabelling: the first boot does its work and reboots.
		b := newBench(t, sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
			g := inside{serial: healthySerial}
			if c.Runs == 0 {
				g.status = func(int) probe.Status { return probe.Status{InitState: "starting", Jobs: 3} }
				g.then = func(context.Context, *sim.Computer) sim.End { time.Sleep(5 * time.Second); return sim.Reboot }
			}
			return g.Run(ctx, c)
		}))
		v := b.run(t)
		want(t, v, dr.Pass, "", "")
		if v.BootID != "boot-1" {
			t.Errorf("boot id %s", v.BootID)
		}
		b.host.Close()
	})
}

func TestAHostileGuestGainsNothing(t *testing.T) {
	t.Parallel()
	hostile := func(do func(ctx context.Context, port io.ReadWriter)) sim.Guest {
		return sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
			fmt.Fprint(c.Serial(), healthySerial)
			done := make(chan struct{})
			go func() { defer close(done); do(ctx, c.Port(dr.PortVirtio)) }()
			<-ctx.Done()
			<-done
			return sim.PowerOff
		})
	}
	flood := func(piece string) func(context.Context, io.ReadWriter) {
		chunk := bytes.Repeat([]byte(piece), 1<<16/len(piece))
		return func(ctx context.Context, port io.ReadWriter) {
			for ctx.Err() == nil {
				if _, err := port.Write(chunk); err != nil {
					return
				}
				time.Sleep(time.Millisecond)
			}
		}
	}
	reply := func(answer func(ask probe.Ask) any) func(context.Context, io.ReadWriter) {
		return func(_ context.Context, port io.ReadWriter) {
			in := probe.NewReader(port, 0)
			for {
				ask, err := in.Ask()
				if err != nil || probe.Write(port, answer(ask)) != nil {
					return
				}
			}
		}
	}
	hello := func(ask probe.Ask) probe.Answer {
		return probe.Answer{Answer: probe.AskHello, Challenge: ask.Challenge, Hello: &probe.Hello{BootID: "b", Agent: "a"}}
	}
	for name, c := range map[string]struct {
		do    func(context.Context, io.ReadWriter)
		code  dr.Code
		words string
	}{
		"an endless line": {flood("A"), dr.CodeBadAnswer, "garbage"},
		"endless lines":   {flood("garbage\n"), dr.CodeBadAnswer, "garbage"},
		"another's challenge": {reply(func(ask probe.Ask) any {
			a := hello(ask)
			a.Challenge = strings.Repeat("0", 32)
			return a
		}), dr.CodeTimeout, "nothing has moved"},
		"an answer recorded on the source": {reply(func(ask probe.Ask) any {
			a := hello(ask)
			a.Hello.BootID = shopInventory.BootID
			return a
		}), dr.CodeBadAnswer, "no new boot"},
		"nothing after hello": {reply(func(ask probe.Ask) any { return hello(ask) }), dr.CodeBadAnswer, "not status"},
		"only errors": {reply(func(ask probe.Ask) any {
			if ask.Ask == probe.AskHello {
				return hello(ask)
			}
			return probe.Answer{Answer: ask.Ask, Challenge: ask.Challenge, ID: ask.ID, Error: "no\x1b[2J"}
		}), dr.CodeBadAnswer, "could not answer"},
		"a check that is neither": {reply(func(ask probe.Ask) any {
			a := probe.Answer{Answer: ask.Ask, Challenge: ask.Challenge, ID: ask.ID}
			switch ask.Ask {
			case probe.AskHello:
				return hello(ask)
			case probe.AskStatus:
				s := fresh(shopStatus)
				a.Status = &s
			default:
				a.Result = &dr.CheckResult{Name: "other", State: "skip", Code: "x"}
			}
			return a
		}), dr.CodeBaseline, "machine id"}, // hello names no machine; the check is looked at below
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, hostile(c.do))
				b.request.Limits.Stall = 30 * time.Second
				b.request.Checks = []dr.Check{{Name: "mine", Kind: dr.CheckTCP, Address: "127.0.0.1:1"}}
				if name == "a check that is neither" {
					b.request.Snapshot.Inventory.Machine = ""
					v := b.run(t)
					want(t, v, dr.Fail, dr.CodeBadAnswer, "neither pass nor fail")
				} else {
					want(t, b.run(t), dr.Fail, c.code, c.words)
				}
				b.host.Close()
			})
		})
	}
}

func TestASlowAnswerIsWaitedFor(t *testing.T) {
	t.Parallel()
	b := newBench(t, sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
		fmt.Fprint(c.Serial(), healthySerial)
		agent := guest.Agent{
			Who:  func() probe.Hello { return probe.Hello{BootID: "b", Machine: "machine-1"} },
			Look: func(context.Context, bool) probe.Status { return fresh(shopStatus) },
		}
		go func() { _ = agent.Serve(ctx, dribble{c.Port(dr.PortISA)}) }() // the port that needs no driver
		<-ctx.Done()
		return sim.PowerOff
	}))
	want(t, b.run(t), dr.Pass, "", "")
}

type dribble struct{ io.ReadWriter }

func (d dribble) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := d.ReadWriter.Write(p[i : i+1]); err != nil {
			return i, err
		}
		if i%16 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	return len(p), nil
}

func (dribble) Close() error { return nil }

func TestAServiceThatStartsLateIsWaitedForAndOneThatFailedIsNot(t *testing.T) {
	t.Parallel()
	late := func(n int) probe.Status {
		s := shopStatus
		switch {
		case n < 5:
			s.InitState, s.Jobs, s.Listening = "starting", 5-n, nil
		case n < int(time.Minute/briefEvery): // a minute in which PostgreSQL replays its log
			s.Listening = s.Listening[:2]
		}
		return s
	}
	broken := func(n int) probe.Status {
		s := shopStatus
		s.InitState, s.FailedUnits, s.Listening = "degraded", []string{"postgresql@15-main.service"}, s.Listening[:2]
		return s
	}
	rescue := func(int) probe.Status { return probe.Status{InitState: "maintenance"} }
	waiting := func(int) probe.Status {
		s := shopStatus
		s.InitState, s.Jobs = "starting", 1 // wait-online, without a network
		return s
	}
	for name, c := range map[string]struct {
		status  func(int) probe.Status
		outcome dr.Outcome
		code    dr.Code
		min     time.Duration
		max     time.Duration
	}{
		"late":                {late, dr.Pass, "", 50 * time.Second, 80 * time.Second},
		"failed":              {broken, dr.Fail, dr.CodeServiceFailed, 0, 30 * time.Second},
		"init waits for ever": {waiting, dr.Pass, "", 0, 20 * time.Second},
		"rescue mode":         {rescue, dr.Fail, dr.CodeEmergency, 0, 10 * time.Second},
		"healthy":             {nil, dr.Pass, "", 0, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, inside{serial: healthySerial, status: c.status})
				v := b.run(t)
				want(t, v, c.outcome, c.code, "")
				if v.RTA < c.min || v.RTA > c.max {
					t.Errorf("it took %s", v.RTA)
				}
				b.host.Close()
			})
		})
	}
}

func TestWhatIsOurFaultIsInconclusive(t *testing.T) {
	t.Parallel()
	t.Run("no room", func(t *testing.T) {
		b := newBench(t, inside{serial: healthySerial})
		b.host.Memory = 64 << 20
		want(t, b.run(t), dr.Inconclusive, dr.CodeNoCapacity, "start the machine")
	})
	t.Run("no scratch layer", func(t *testing.T) {
		b := newBench(t, inside{serial: healthySerial})
		b.request.NewLayer = func(context.Context, string, vm.Layer) (vm.Layer, error) { return vm.Layer{}, errors.New("disk full") }
		want(t, b.run(t), dr.Inconclusive, dr.CodeInfrastructure, "disk full")
	})
	t.Run("the channel cannot be connected", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t, mute(healthySerial+"\r\nshop login: "))
			v, err := Run(t.Context(), deaf{b.hv}, b.request, nil)
			if err != nil {
				t.Fatal(err)
			}
			want(t, v, dr.Inconclusive, dr.CodeInfrastructure, "cannot be connected")
			b.nothingLeft(t)
			b.host.Close()
		})
	})
}

// starved is a guest that waits for a processor for a part of the time.
func starved(share float64, g sim.Guest) sim.Guest {
	return sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
		began, waited := time.Now(), time.Duration(0)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		inner, cancel := context.WithCancel(ctx)
		done := make(chan sim.End, 1)
		go func() { done <- g.Run(inner, c) }()
		defer cancel()
		for {
			select {
			case end := <-done:
				return end
			case <-tick.C:
				// A make-believe machine uses a processor all the time: it wants what it has and what it waits for.
				due := time.Duration(float64(time.Since(began)) * share / (1 - share))
				c.Starve(due - waited)
				waited = due
			}
		}
	})
}

func TestAHostThatLetsNoGuestRunCondemnsNone(t *testing.T) {
	t.Parallel()
	broken := func(int) probe.Status {
		s := shopStatus
		s.InitState, s.FailedUnits, s.Listening = "degraded", []string{"postgresql@15-main.service"}, s.Listening[:2]
		return s
	}
	noBootable := mute("SeaBIOS (version 1.16.2)\r\nBooting from Hard Disk...\r\nNo bootable device.\r\n")
	ill := inside{serial: healthySerial, status: broken}
	for name, c := range map[string]struct {
		guest   sim.Guest
		waits   float64
		outcome dr.Outcome
		code    dr.Code
		words   string
	}{
		"a service failed, and the host was busy":         {ill, 0.8, dr.Inconclusive, dr.CodeHostBusy, "waited 80 % of the time for a processor. Seen was service-failed: failed units"},
		"a service failed, and the host was half busy":    {ill, 0.5, dr.Fail, dr.CodeServiceFailed, ""},
		"it was silent, and the host was busy":            {mute(healthySerial), 0.8, dr.Inconclusive, dr.CodeHostBusy, "nothing has moved"},
		"nothing boots from the disk, however busy it is": {noBootable, 0.9, dr.Fail, dr.CodeNoBootable, ""},
		"it passed all the same":                          {inside{serial: healthySerial}, 0.9, dr.Pass, dr.CodeNone, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, starved(c.waits, c.guest))
				want(t, b.run(t), c.outcome, c.code, c.words)
				b.host.Close()
			})
		})
	}
}

// One that slept, and had to wait for a processor whenever it woke, was not kept from anything.
func TestAGuestThatSleptIsNotExcused(t *testing.T) {
	t.Parallel()
	now := time.Now()
	asleep := meter{from: now, to: now.Add(100 * time.Second), last: vm.Usage{CPU: time.Second, Waited: 9 * time.Second}}
	if share := asleep.waited(); share != 0.09 {
		t.Errorf("it waited %v of the time", share)
	}
	many := meter{from: now, to: now.Add(100 * time.Second), last: vm.Usage{CPU: 100 * time.Second, Waited: 300 * time.Second}}
	if share := many.waited(); share != 0.75 {
		t.Errorf("four processors that shared one waited %v of the time", share)
	}
}

// deaf is a hypervisor whose machines' ports cannot be connected.
type deaf struct{ *sim.Hypervisor }

func (d deaf) Start(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	m, err := d.Hypervisor.Start(ctx, spec)
	return deafMachine{m}, err
}

type deafMachine struct{ vm.Machine }

func (deafMachine) Channel(context.Context, dr.GuestPort) (vm.Channel, error) {
	return nil, errors.New("connection refused")
}

func TestAnImageThatCannotBeReadFailsAtOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t, inside{serial: healthySerial, status: func(int) probe.Status { return probe.Status{InitState: "starting", Jobs: 1} }})
	b.request.DiskError = func() error { return errors.New("disk 0 at 4096: block is damaged") }
	want(t, b.run(t), dr.Fail, dr.CodeDiskError, "at 4096")
}

func TestTheHostMayLoseItsChannel(t *testing.T) {
	t.Parallel()
	b := newBench(t, inside{serial: healthySerial})
	lossy := &lossyHost{Hypervisor: b.hv}
	v, err := Run(t.Context(), lossy, b.request, nil)
	if err != nil {
		t.Fatal(err)
	}
	want(t, v, dr.Pass, "", "")
	if lossy.opened < 4 {
		t.Errorf("the channel was opened %d times only", lossy.opened)
	}
}

// lossyHost gives channels that break after a few hundred bytes, the first times.
type lossyHost struct {
	*sim.Hypervisor
	opened int
}

func (l *lossyHost) Start(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	m, err := l.Hypervisor.Start(ctx, spec)
	return lossyMachine{m, l}, err
}

type lossyMachine struct {
	vm.Machine
	host *lossyHost
}

func (m lossyMachine) Channel(ctx context.Context, port dr.GuestPort) (vm.Channel, error) {
	if port != dr.PortVirtio {
		return nil, errors.New("not this one")
	}
	ch, err := m.Machine.Channel(ctx, port)
	if m.host.opened++; err != nil || m.host.opened >= 4 {
		return ch, err
	}
	return &lossyChannel{Channel: ch, left: 500}, nil
}

type lossyChannel struct {
	vm.Channel
	left int
}

func (c *lossyChannel) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, net.ErrClosed
	}
	n, err := c.Channel.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

func TestACancelledTestLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, after := range []time.Duration{0, 30 * time.Millisecond, 400 * time.Millisecond} {
		b := newBench(t, inside{serial: healthySerial, status: func(int) probe.Status { return probe.Status{InitState: "starting", Jobs: 1} }})
		ctx, cancel := context.WithTimeout(t.Context(), after)
		v, err := Run(ctx, b.hv, b.request, nil)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || v.Outcome != "" {
			t.Errorf("after %s: %+v, %v", after, v, err)
		}
		b.nothingLeft(t)
	}
}

func TestACrashLeavesNothingThatReapDoesNotFind(t *testing.T) {
	t.Parallel()
	b := newBench(t, inside{serial: healthySerial})
	ctx := t.Context()
	for _, id := range []string{verdictID, "verdict-bbbbbbbbbbbbbbbb"} {
		r := b.request
		r.VerdictID = id
		if _, err := r.start(ctx, b.hv); err != nil { // and the process dies here
			t.Fatal(err)
		}
	}
	other, err := b.hv.Start(ctx, vm.Spec{Name: "iv-x", Owner: vm.Owner{Kind: "invocation", ID: "inv-x"}, Hardware: dr.Hardware{CPUs: 1, Memory: 1}, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	again := b.host.Open()
	removed, err := Reap(ctx, again, b.request.ScratchDir, map[string]bool{"verdict-bbbbbbbbbbbbbbbb": true})
	if err != nil || len(removed) != 1 || removed[0] != verdictID {
		t.Fatalf("%v, %v", removed, err)
	}
	if left, _ := again.List(ctx); len(left) != 2 {
		t.Errorf("left are %v", left)
	}
	// The same test run again clears its own way.
	b.request.VerdictID = "verdict-bbbbbbbbbbbbbbbb"
	v, err := Run(ctx, again, b.request, nil)
	if err != nil || v.Outcome != dr.Pass {
		t.Fatalf("%+v, %v", v, err)
	}
	if err := other.Destroy(ctx); err != nil {
		t.Fatal(err)
	}
	b.nothingLeft(t)
}

func TestAttendLeavesTheMachineRunning(t *testing.T) {
	t.Parallel()
	b := newBench(t, inside{serial: healthySerial, port: dr.PortISA})
	m, err := b.request.start(t.Context(), b.hv)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time the agent has long announced itself
		a, err := Attend(t.Context(), m, b.request.questions(), nil)
		if err != nil || a.BootID != "boot-0" {
			t.Fatalf("%+v, %v", a, err)
		}
	}
	if state, _, err := m.State(t.Context()); state != vm.Running || err != nil {
		t.Fatalf("%s, %v", state, err)
	}
}

func TestAClockThatWasSetBackMakesNoDataYounger(t *testing.T) {
	t.Parallel()
	b := newBench(t, inside{serial: healthySerial})
	b.request.Snapshot.Taken = time.Now().Add(time.Hour)
	b.request.Objectives.RPO = time.Minute
	if v := b.run(t); v.RPA != 0 {
		t.Errorf("the data is %s old", v.RPA)
	}
}
