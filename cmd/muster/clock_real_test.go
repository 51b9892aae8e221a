package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/lab/emulated"
)

// computer is a machine of its own on a realm's bridge: an emulated one, whose clock shows another time than everybody's. Its disk
// has the program on it, and what that keeps.
type computer struct {
	t       *testing.T
	dir     string // its disk, and its console
	port    string // its interface on the bridge
	address string
	boots   int
	off     func()
	line    net.Conn // on which it takes commands
	answers *bufio.Reader
}

const (
	computerDisk = 8 << 30 // bytes, few of which are written
	computerLine = "talk"  // its socket
	computerInit = `#!/busybox sh
for d in "-t devtmpfs dev /dev" "-t proc proc /proc" "-t sysfs sys /sys" "-t tmpfs tmp /tmp"; do /busybox mount $d; done
for m in /modules/*; do /busybox insmod $m; done
/busybox --install -s /bin
export PATH=/bin HOME=/system
n=0
while ! mount -t ext4 /dev/vda /system && [ $n -lt 100 ]; do n=$((n+1)); sleep 0.1; done
mkdir -p /run /var/lib
ip link set lo up; ip link set eth0 up; ip address add %s/24 dev eth0
stty -F /dev/ttyS1 raw -echo
echo guest is up >/dev/console
while read -r line; do (eval "$line") 2>&1; echo "exit code $?"; done </dev/ttyS1 >/dev/ttyS1
`
)

// newComputer makes a machine that is off, with more files on its disk.
func (r *realm) newComputer(name, host string, files ...string) *computer {
	t := r.t
	t.Helper()
	c := &computer{t: t, dir: filepath.Join(r.dir, name), port: r.net + "c" + name, address: r.hosts + host}
	sh(t, "mkdir -p %s/disk.d && cp %s %s %s/disk.d/", c.dir, r.bin, strings.Join(files, " "), c.dir)
	sh(t, "truncate -s %d %s/disk && mkfs.ext4 -q -F -d %s/disk.d %s/disk && rm -r %s/disk.d", computerDisk, c.dir, c.dir, c.dir, c.dir)
	sh(t, "ip tuntap add %s mode tap && ip link set %s master %sr up", c.port, c.port, r.net)
	t.Cleanup(func() { sh(t, "ip link del %s", c.port) })
	t.Cleanup(func() {
		c.pull()
		if t.Failed() {
			t.Logf("%s said: %s", name, c.said())
		}
	})
	return c
}

// boot turns it on. Its clock is so far ahead.
func (c *computer) boot(ahead time.Duration) {
	c.t.Helper()
	c.boots++
	dir := filepath.Join(c.dir, fmt.Sprint("boot-", c.boots))
	if err := os.Mkdir(dir, 0o755); err != nil {
		c.t.Fatal(err)
	}
	began := time.Now()
	socket := filepath.Join(dir, computerLine)
	c.off = emulated.Boot(c.t, dir, emulated.Machine{Kernel: "bookworm", Memory: 1024, Modules: []string{"virtio_pci", "virtio_blk", "virtio_net", "ext4", "crc32c_generic", "loop"},
		Files: map[string]string{"init": fmt.Sprintf(computerInit, c.address)}, Args: []string{
			"-rtc", "base=" + time.Now().Add(ahead).UTC().Format("2006-01-02T15:04:05"),
			"-drive", "if=none,id=disk,format=raw,cache=writeback,file=" + filepath.Join(c.dir, "disk"), "-device", "virtio-blk-pci,drive=disk",
			"-netdev", "tap,id=net,script=no,downscript=no,ifname=" + c.port, "-device", fmt.Sprintf("virtio-net-pci,netdev=net,mac=52:54:00:80:00:%02x,romfile=", len(c.port)+c.boots),
			"-device", "virtio-rng-pci",
			"-chardev", "socket,id=talk,server=on,wait=off,path=" + socket, "-serial", "chardev:talk"}})
	var err error
	if c.line, err = net.Dial("unix", socket); err != nil {
		c.t.Fatal(err)
	}
	c.answers = bufio.NewReader(c.line)
	c.t.Logf("%s is up after %.1f s", filepath.Base(c.dir), time.Since(began).Seconds())
}

// pull pulls its plug.
func (c *computer) pull() {
	if c.line != nil {
		_ = c.line.Close()
		c.line = nil
	}
	if c.off != nil {
		c.off()
	}
}

// commandLimit is how long a command may take that is given to an emulated machine.
const commandLimit = 2 * time.Minute

// tell runs a line of its shell, and gives what it prints and its exit code.
func (c *computer) tell(line string) (out string, code int) {
	c.t.Helper()
	err := c.line.SetDeadline(time.Now().Add(commandLimit))
	if err == nil {
		_, err = fmt.Fprintln(c.line, line)
	}
	for err == nil {
		var said string
		if said, err = c.answers.ReadString('\n'); err != nil {
			break
		}
		if end, ok := strings.CutPrefix(strings.TrimSpace(said), "exit code "); ok {
			if code, err = strconv.Atoi(end); err == nil {
				c.t.Logf("%s: %s → %d\n%s", filepath.Base(c.dir), line, code, out)
				return out, code
			}
		}
		out += said
	}
	c.t.Fatalf("%s: %s: %v\n%s\n%s", filepath.Base(c.dir), line, err, out, c.said())
	return "", 0
}

// muster runs the program there.
func (c *computer) muster(args string) (string, int) {
	return c.tell("/system/" + makeBelieve + " " + args + " --dir /system/inst")
}

func (c *computer) ok(args string) string {
	c.t.Helper()
	out, code := c.muster(args)
	if code != exitOK {
		c.t.Fatalf("muster %s: exit code %d\n%s", args, code, out)
	}
	return out
}

// serve starts a process whose log is on its console.
func (c *computer) serve(args string) {
	c.t.Helper()
	c.tell("/system/" + makeBelieve + " " + args + " --dir /system/inst >/dev/ttyS0 2>&1 </dev/null &")
}

// stop ends its processes, and waits until they are gone: the next one would find that they are there still.
func (c *computer) stop() {
	c.t.Helper()
	c.tell("killall " + makeBelieve + "; while pidof " + makeBelieve + " >/dev/null; do sleep 0.1; done")
}

// said is what its processes have logged since it was turned on.
func (c *computer) said() string {
	return emulated.Said(filepath.Join(c.dir, fmt.Sprint("boot-", c.boots)))
}

// clock is how far its clock is ahead.
func (c *computer) clock() time.Duration {
	c.t.Helper()
	out, _ := c.tell("date +%s")
	n, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		c.t.Fatal(err)
	}
	return time.Until(time.Unix(n, 0)).Round(time.Minute)
}

// ahead waits until the master knows of an appliance with a clock that is so far ahead.
func (r *realm) ahead(t *testing.T, by time.Duration) {
	t.Helper()
	r.until(t, fmt.Sprintf("the master knows that its clock is %s ahead", by), func() bool {
		all, err := r.api.Appliances(t.Context())
		return err == nil && len(all) == 1 && all[0].Connected && (all[0].Skew-by).Abs() < time.Minute
	})
}

// newest takes a snapshot of another day, which has to become last-known-good, and be dated rightly by the clock of this host.
func (r *realm) newest(t *testing.T, box *computer) {
	t.Helper()
	box.tell(fmt.Sprintf("dd if=/dev/urandom of=/system/shop.raw bs=1M count=%d 2>/dev/null; sync", clockDisk))
	began := time.Now().Add(-time.Second) // emulated clocks begin with a whole second
	op, err := r.api.Snapshot(t.Context(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	op = r.finish(t, op)
	all, err := r.api.Snapshots(t.Context(), "shop")
	if err != nil || op.State != api.OperationSucceeded || len(all) == 0 {
		t.Fatalf("%s: %s, %v", op.State, op.Error, err)
	}
	first := all[0]
	if first.Snapshot.ID != op.Subject || !first.LKG || first.Verdict == nil || first.Verdict.Silo != "b" {
		t.Errorf("the newest is %s, last-known-good %v; taken was %s", first.Snapshot.ID, first.LKG, op.Subject)
	}
	if at := first.Snapshot.Taken; at.Before(began.Add(-clockSlack)) || at.After(time.Now().Add(clockSlack)) {
		t.Errorf("it is dated %s, and was taken between %s and %s", at, began.UTC(), time.Now().UTC())
	}
	for i, one := range all[1:] {
		if !one.Snapshot.Taken.Before(all[i].Snapshot.Taken) || one.LKG {
			t.Errorf("%s, taken %s, comes after %s, taken %s", all[i].Snapshot.ID, all[i].Snapshot.Taken, one.Snapshot.ID, one.Snapshot.Taken)
		}
	}
	if kept := slices.DeleteFunc(all, func(one dr.Record) bool { return one.State == dr.Expired }); len(kept) > clockKeep {
		t.Errorf("%d snapshots are kept of %d", len(kept), clockKeep)
	}
	figures, err := r.hq.there("metrics").Output()
	if err != nil || regexp.MustCompile(`(?m)^muster_[^ ]+ -`).Match(figures) {
		t.Errorf("figures below nothing: %v\n%s", err, figures)
	}
}

// Of the test of clocks.
const (
	clockDisk  = 4               // MiB of the server
	clockKeep  = 2               // snapshots that are to be kept of it
	clockSlack = 5 * time.Second // a hello of an emulated machine is not answered at once
)

// A process has no clock of its own: two emulated machines have.
func TestMachinesWhoseClocksAreWrongDoTheirWorkAndAreNamed(t *testing.T) {
	r := newGround(t, "k", "10.213.80.")
	r.patience = 2 * time.Minute
	shop := filepath.Join(r.dir, "shop.raw")
	r.files()
	noise(t, shop, clockDisk<<20, 1)
	r.hq = r.place("hq", "1", "serve")
	box, silo := r.newComputer("box", "2", shop), r.newComputer("b", "3", r.guest())
	r.master()
	r.hq.ok("master", "customer", "add", "acme", "--store", filepath.Join(r.hq.dir, "far"))

	silo.boot(40 * time.Minute)
	if by := silo.clock(); by != 40*time.Minute {
		t.Fatalf("the silo's clock is %s ahead: the test tests nothing", by)
	}
	silo.ok("silo join " + r.invite("--silo", "b"))
	silo.serve("silo serve")
	box.boot(40 * time.Minute)
	box.ok("appliance join " + r.invite("--customer", "acme", "--appliance", "box"))
	box.serve("appliance serve")
	r.ahead(t, 40*time.Minute)
	r.until(t, "the silo is there", func() bool { return r.state("b") == dr.SiloActive })
	r.hq.ok("server", "add", "shop", "--appliance", "box", "--disk", "/system/shop.raw", "--every", "9000h", "--signs", "off", "--check", r.checks(), "--keep-last", fmt.Sprint(clockKeep))
	r.until(t, "the first snapshot is good", func() bool {
		all, err := r.api.Snapshots(t.Context(), "shop")
		return err == nil && len(all) == 1 && all[0].LKG
	})
	r.newest(t, box)
	r.named(t, "40m0s ahead")
	for _, command := range []string{"list", "show b"} {
		if said := r.hq.ok(append([]string{"silo"}, strings.Fields(command)...)...); !strings.Contains(said, "40m0s ahead") {
			t.Errorf("silo %s does not say that its clock is wrong", command)
		}
	}

	box.pull()
	box.boot(-20 * time.Minute)
	if by := box.clock(); by != -20*time.Minute {
		t.Fatalf("the appliance's clock is %s ahead: the test tests nothing", by)
	}
	box.serve("appliance serve")
	r.ahead(t, -20*time.Minute)
	r.newest(t, box)
	r.newest(t, box)
	r.named(t, "20m0s behind")
	if lost := r.events(t, "silo.lost", "b"); len(lost) > 0 {
		t.Errorf("a silo was lost for its clock: %+v", lost)
	}

	box.stop()
	for _, by := range []time.Duration{400 * 24 * time.Hour, -400 * 24 * time.Hour} {
		box.tell(fmt.Sprintf("date -s @%d", time.Now().Add(by).Unix()))
		out, code := box.tell("/system/" + makeBelieve + " appliance join " + r.invite("--customer", "acme", "--appliance", "other") + " --dir /system/other")
		if code == exitOK || !strings.Contains(out, "clock") {
			t.Errorf("joining with a clock that is %s ahead: exit code %d: %s", by, code, out)
		}
		before := len(box.said())
		box.serve("appliance serve")
		r.until(t, "it says why it does not connect", func() bool { return strings.Contains(box.said()[before:], "set the clock") })
		box.stop()
	}
}

// named checks that everybody can see whose clock is wrong, and by how much.
func (r *realm) named(t *testing.T, how string) {
	t.Helper()
	list := r.hq.ok("appliance", "list")
	health, _ := r.hq.tell("health")
	for what, said := range map[string]string{"appliance list": list, "health": health} {
		if !strings.Contains(strings.ToLower(said), "clock") || !strings.Contains(said, how) {
			t.Errorf("%s does not say that the clock is %s", what, how)
		}
	}
	if opened := r.events(t, "ticket.opened", ""); !slices.ContainsFunc(opened, func(e dr.Event) bool { return strings.Contains(e.Message, "clock of appliance box") }) {
		t.Errorf("no event tells of it: %+v", opened)
	}
}
