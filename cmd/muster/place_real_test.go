package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/lab"
	"github.com/musterdr/muster/internal/lab/cable"
	"github.com/musterdr/muster/internal/silo"
	"github.com/musterdr/muster/internal/vm"
	"github.com/musterdr/muster/internal/vm/sim"
)

// place is another machine, as far as a process can tell: a network of its own, an installation of its own. The program that runs
// there can be killed and stopped, and its line be cut, slow, or lose.
type place struct {
	t       testing.TB
	name    string
	bin     string   // the program
	command []string // what of it runs here, as "silo serve"
	dir     string   // of the installation
	space   string   // network namespace
	near    string   // its interface there
	enter   []string // what a command line begins with that is to run there

	env []string
	run *exec.Cmd
	log string // file
}

// netID begins the names of a test's networks, so that tests may run at once. test is a letter.
func netID(test string) string { return fmt.Sprintf("%s%04x", test, os.Getpid()&0xffff) }

func sh(t testing.TB, line string, args ...any) string {
	t.Helper()
	out, err := exec.CommandContext(context.Background(), "sh", "-c", fmt.Sprintf(line, args...)).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", fmt.Sprintf(line, args...), err, out)
	}
	return string(out)
}

// newPlace gives a program a network of its own, with a cable whose other end is far.
func newPlace(t testing.TB, bin, net, name, dir, address, far string) *place {
	t.Helper()
	p := &place{t: t, name: name, bin: bin, dir: dir, space: net + name, near: net + "n" + name, log: dir + ".log"}
	p.enter = []string{"ip", "netns", "exec", p.space}
	sh(t, "ip netns add %s", p.space)
	p.plug(address, far)
	return p
}

// newHost gives a program a lab host of its own: a network, processes and a libvirtd.
func newHost(t testing.TB, bin, net, name, dir, address, far string) *place {
	t.Helper()
	sandbox, err := filepath.Abs("../../scripts/sandbox")
	if err != nil {
		t.Fatal(err)
	}
	p := &place{t: t, name: name, bin: bin, dir: dir, space: net + name, near: net + "n" + name, log: dir + ".log"}
	state := dir + "-host"
	p.enter = []string{sandbox, "enter", state, "--"}
	host := exec.Command(sandbox, "run", "--dir", state, "--", "sh", "-c", "touch "+state+"/up && exec sleep infinity")
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		sh(t, "%s stop %s", sandbox, state)
		_ = host.Wait() // 143: it was stopped
	})
	for deadline := time.Now().Add(time.Minute); !isFile(state + "/up"); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the lab host does not come up")
		}
	}
	sh(t, "ip netns attach %s $(cut -d' ' -f1 %s/pid)", p.space, state)
	p.plug(address, far)
	return p
}

// plug puts a cable into a place.
func (p *place) plug(address, far string) {
	p.t.Helper()
	p.t.Cleanup(func() {
		p.kill()
		_ = exec.Command("ip", "netns", "del", p.space).Run()
	})
	sh(p.t, "ip link add %s type veth peer name %s netns %s && ip link set %s up", far, p.near, p.space, far)
	p.t.Cleanup(func() { _ = exec.Command("ip", "link", "del", far).Run() })
	p.up(address)
}

// up gives it an address.
func (p *place) up(address string) {
	p.t.Helper()
	sh(p.t, "ip -n %s addr add %s dev %s && ip -n %s link set %s up && ip -n %s link set lo up", p.space, address, p.near, p.space, p.near, p.space)
}

// move puts a long cable in the place of a place's own.
func (p *place) move(address, far string, l cable.Line) *cable.Cable {
	p.t.Helper()
	sh(p.t, "ip link del %s", far)
	c, err := cable.Lay(far, p.near, l)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			p.t.Error(err)
		}
	})
	sh(p.t, "ip link set %s netns %s && ip link set %s up", p.near, p.space, far)
	p.up(address)
	return c
}

// there is a command line of the program that runs in this place.
func (p *place) there(args ...string) *exec.Cmd {
	line := append(append(append([]string{}, p.enter...), p.bin), append(args, "--dir", p.dir)...)
	c := exec.Command(line[0], line[1:]...)
	c.Env = append(os.Environ(), p.env...)
	return c
}

// tell runs a command of the program here, and gives what it prints and its exit code.
func (p *place) tell(args ...string) (string, int) {
	c := p.there(args...)
	var out, said bytes.Buffer
	c.Stdout, c.Stderr = &out, &said
	_ = c.Run()
	code := c.ProcessState.ExitCode()
	p.t.Logf("%s: muster %s → %d\n%s%s", p.name, strings.Join(args, " "), code, out.String(), said.String())
	return out.String() + said.String(), code
}

// ok runs a command that has to go well.
func (p *place) ok(args ...string) string {
	p.t.Helper()
	out, code := p.tell(args...)
	if code != exitOK {
		p.t.Fatalf("%s: muster %s: exit code %d\n%s", p.name, strings.Join(args, " "), code, out)
	}
	return out
}

// read runs a command and reads what it prints as JSON.
func (p *place) read(into any, args ...string) error {
	out, err := exec.Command(p.bin, append(args, "--json", "--dir", p.dir)...).Output()
	if err == nil {
		err = json.Unmarshal(out, into)
	}
	return err
}

// serve starts the process.
func (p *place) serve() {
	p.t.Helper()
	f, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	p.run = p.there(p.command...)
	p.run.Stderr = f
	if err := p.run.Start(); err != nil {
		p.t.Fatal(err)
	}
}

// kill ends it as a power cut does.
func (p *place) kill() {
	if p.run != nil {
		_ = p.run.Process.Signal(syscall.SIGKILL) // ip has become it
		_ = p.run.Wait()
		p.run = nil
	}
}

// restart kills the process and starts it again.
func (p *place) restart() {
	p.t.Helper()
	p.kill()
	p.serve()
}

func (p *place) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.run.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// stand has the process stand still for a while, as a host does that sleeps.
func (p *place) stand(d time.Duration) {
	p.t.Helper()
	p.signal(syscall.SIGSTOP)
	time.Sleep(d)
	p.signal(syscall.SIGCONT)
}

// said gives the process's log.
func (p *place) said() string {
	raw, _ := os.ReadFile(p.log)
	return string(raw)
}

// cut cuts the line: nothing arrives any more, on either side, and neither is told.
func (p *place) cut() {
	p.t.Helper()
	sh(p.t, "ip netns exec %s nft 'add table inet cut; add chain inet cut out { type filter hook output priority 0; }; add chain inet cut in { type filter hook input priority 0; }; "+
		"add rule inet cut out oif %s drop; add rule inet cut in iif %s drop'", p.space, p.near, p.near)
}

// mend mends a line that was cut.
func (p *place) mend() {
	p.t.Helper()
	sh(p.t, "ip netns exec %s nft delete table inet cut", p.space)
}

// slow lets so much through in a second, as "40mbit", with a queue before it.
func (p *place) slow(rate string) {
	p.t.Helper()
	sh(p.t, "tc -n %s qdisc replace dev %s root tbf rate %s burst 64kb latency 100ms", p.space, p.near, rate)
}

// lossy loses so many of a hundred packets.
func (p *place) lossy(percent int) {
	p.t.Helper()
	sh(p.t, "ip netns exec %s nft 'add table inet bad; add chain inet bad out { type filter hook output priority 1; }; add chain inet bad in { type filter hook input priority 1; }; "+
		"add rule inet bad out oif %s numgen random mod 100 < %d drop; add rule inet bad in iif %s numgen random mod 100 < %d drop'", p.space, p.near, percent, p.near, percent)
}

// good makes a line good that was slow or lossy.
func (p *place) good() {
	_ = exec.Command("tc", "-n", p.space, "qdisc", "del", "dev", p.near, "root").Run()
	_ = exec.Command("ip", "netns", "exec", p.space, "nft", "delete", "table", "inet", "bad").Run()
}

// sockets lists what the process listens on.
func (p *place) sockets() string {
	p.t.Helper()
	return strings.TrimSpace(sh(p.t, "ip netns exec %s ss -H -lntup", p.space))
}

// socket is where a process answers the command line.
func (p *place) socket() string {
	c := &cobra.Command{}
	c.Flags().String("dir", p.dir, "")
	return apiSocket(installation(c))
}

// noise fills a file with what cannot be compressed.
func noise(t testing.TB, path string, size int, day uint64) {
	t.Helper()
	data := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, day))
	for i := 0; i < len(data); i += 8 {
		v := rng.Uint64()
		for k := range 8 {
			data[i+k] = byte(v >> (8 * k))
		}
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Of a test that is the program on a make-believe host: where it is, and what its silos are.
const (
	makeBelieve  = "muster-sim"         // the program's name then
	envImages    = "MUSTER_TEST_IMAGES" // "real": images are opened by libguestfs, and only machines are make-believe
	simLease     = 5 * time.Second
	simGrace     = 2 * time.Second
	wentPrefix   = "went-" // in the silo's folder: a machine was started
	holdFile     = "hold"  // in the silo's folder: while it is there, machines do not boot
	lookForFiles = 20 * time.Millisecond
)

// simulated is the program with machines that are make-believe, so that many silos find room on one host, and whose silos are
// given up soon.
func simulated() {
	leaseTime, leaseGrace = simLease, simGrace
	really := equip
	equip = func(p *platform, ctx context.Context, i install, set settings, c *silo.Config) (bool, error) {
		host := &sim.Host{Boot: heldBack(i.Dir)}
		p.onClose("make-believe host", host.Close)
		if os.Getenv(envImages) != "real" {
			lab.Equip(c, host.Open(), lab.Debian())
			return false, nil
		}
		if _, err := really(p, ctx, i, set, c); err != nil {
			return false, err
		}
		opener := c.Opener
		lab.Equip(c, host.Open(), nil)
		c.Opener = opener
		return false, nil
	}
	main()
}

// heldBack is a healthy guest that tells when its machine is started, and boots when it may.
func heldBack(dir string) func(vm.Spec) sim.Guest {
	return func(spec vm.Spec) sim.Guest {
		return sim.GuestFunc(func(ctx context.Context, c *sim.Computer) sim.End {
			if os.WriteFile(filepath.Join(dir, wentPrefix+spec.Name), nil, 0o600) != nil {
				return sim.PowerOff
			}
			tick := time.NewTicker(lookForFiles)
			defer tick.Stop()
			for isFile(filepath.Join(dir, holdFile)) {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return sim.PowerOff
				}
			}
			return lab.Healthy(spec).Run(ctx, c)
		})
	}
}
