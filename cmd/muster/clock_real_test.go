package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
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
	computerDisk = 768 << 20 // bytes
	computerLine = "talk"    // its socket
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
	t.Cleanup(func() { c.pull() })
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
	c.t.Fatalf("%s: %s: %v\n%s\n%s", filepath.Base(c.dir), line, err, out, emulated.Said(filepath.Dir(c.line.RemoteAddr().String())))
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

// A machine's clock is never really its own: here two emulated machines have one.
func TestMachinesWhoseClocksAreWrongDoTheirWorkAndAreNamed(t *testing.T) {
	r := newGround(t, "k", "10.213.80.")
	r.patience = 2 * time.Minute
	if err := os.WriteFile(filepath.Join(r.dir, "muster-guest"), []byte("\x7fELF test agent"), 0o755); err != nil {
		t.Fatal(err)
	}
	r.hq = r.place("hq", "1", "serve")
	r.silos["a"] = r.place("a", "3", "silo", "serve")
	box := r.newComputer("box", "2")
	noise(t, filepath.Join(r.dir, "shop.raw"), 4<<20, 1)
	r.master()
	r.hq.ok("master", "customer", "add", "acme", "--store", filepath.Join(r.hq.dir, "far"))
	r.joined("a")

	box.boot(40 * time.Minute)
	if ahead := box.clock(); ahead != 40*time.Minute {
		t.Fatalf("its clock is %s ahead: the test tests nothing", ahead)
	}
	box.ok("appliance join " + r.invite("--customer", "acme", "--appliance", "box"))
	box.serve("appliance serve")
	r.until(t, "the appliance is there", r.connected)
	_ = errors.Is
	_ = regexp.MustCompile
	_ = api.Version{}
	_ = dr.Verified
}
