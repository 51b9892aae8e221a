package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// apart runs a test on a thread in a network namespace of its own; the thread ends with the test, and with it the
// namespace.
func apart(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	if os.Getenv("MUSTER_REAL") == "" {
		t.Skip("needs root, nft and network namespaces: MUSTER_REAL=1")
	}
	inNamespace(func() { test(t) })
}

// inNamespace runs do in a new network namespace with loopback up and waits for it.
func inNamespace(do func()) {
	done := make(chan any, 1)
	go func() {
		defer func() { done <- recover() }()
		runtime.LockOSThread() // never unlocked
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			panic(err)
		}
		up("lo")
		do()
	}()
	if trouble := <-done; trouble != nil {
		panic(trouble)
	}
}

func up(name string) {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		panic(fmt.Sprint(name, ": ", err))
	}
}

func addressed(name, prefix string) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		panic(err)
	}
	a, err := netlink.ParseAddr(prefix)
	if err == nil {
		err = netlink.AddrAdd(link, a)
	}
	if err != nil {
		panic(err)
	}
}

// guest is a machine on a bridge, in its own namespace on its own thread.
type guest struct {
	do   chan func()
	done chan struct{}
}

func (g guest) run(do func()) { g.do <- do; <-g.done }

// plug makes a guest with an address and a default route by way of the host and plugs it into a bridge.
func plug(t *testing.T, bridge, prefix, gateway string) guest {
	g := guest{do: make(chan func()), done: make(chan struct{})}
	space := make(chan int)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			panic(err)
		}
		fd, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), unix.O_RDONLY, 0)
		if err != nil {
			panic(err)
		}
		space <- fd
		for do := range g.do {
			do()
			g.done <- struct{}{}
		}
	}()
	fd := <-space
	defer unix.Close(fd)
	t.Cleanup(func() { close(g.do) })
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		t.Fatal(err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = "tap"+bridge[2:], master.Attrs().Index
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}); err != nil {
		t.Fatal(err)
	}
	up(attrs.Name)
	g.run(func() {
		up("lo")
		addressed("eth0", prefix)
		up("eth0")
		if gateway != "" {
			if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gateway)}); err != nil {
				panic(err)
			}
		}
	})
	return g
}

// listen listens for TCP on port 80 of an address, on this thread's namespace.
func listen(address string) net.Listener {
	l, err := net.Listen("tcp", address)
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	return l
}

// dial connects on this thread's namespace: with plain system calls, since net.Dial may race addresses elsewhere.
func dial(address string, limit time.Duration) error {
	target := netip.MustParseAddrPort(address)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(limit.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		return err
	}
	return unix.Connect(fd, &unix.SockaddrInet4{Port: int(target.Port()), Addr: target.Addr().As4()})
}

func mustCreate(t *testing.T, name, prefix string) {
	t.Helper()
	spec := Spec{Name: name}
	if prefix != "" {
		spec.Address = netip.MustParsePrefix(prefix)
	}
	if err := Create(context.Background(), spec); err != nil {
		t.Fatal(err)
	}
}

func names(t *testing.T) []string {
	t.Helper()
	list, err := List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func ruleset(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func TestCreateTwiceAndRemoveTwice(t *testing.T) {
	apart(t, func(t *testing.T) {
		for range 2 {
			mustCreate(t, "mushop0", "192.168.7.1/24")
		}
		if got := names(t); !slices.Equal(got, []string{"mushop0"}) {
			t.Fatalf("listed %v", got)
		}
		if strings.Count(ruleset(t), "table inet muster_mushop0") != 1 {
			t.Fatal(ruleset(t))
		}
		if err := Create(context.Background(), Spec{Name: "mushop0", Address: netip.MustParsePrefix("192.168.8.1/24")}); err == nil {
			t.Fatal("took another address")
		}
		for range 2 {
			if err := Remove(context.Background(), "mushop0"); err != nil {
				t.Fatal(err)
			}
		}
		if got := names(t); len(got) != 0 || strings.Contains(ruleset(t), "muster") {
			t.Fatalf("left: %v\n%s", got, ruleset(t))
		}
	})
}

func TestTheHostReachesTheGuestAndTheGuestReachesNothing(t *testing.T) {
	apart(t, func(t *testing.T) {
		mustCreate(t, "mushop0", "192.168.7.1/24")
		mustCreate(t, "mushop1", "192.168.9.1/24")
		shop := plug(t, "mushop0", "192.168.7.10/24", "192.168.7.1")
		other := plug(t, "mushop1", "192.168.9.10/24", "192.168.9.1")
		// The host is a router, with a route to everywhere.
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
		var web, elsewhere net.Listener
		shop.run(func() { web = listen("192.168.7.10:80") })
		other.run(func() { elsewhere = listen("192.168.9.10:80") })
		here := listen("0.0.0.0:80")
		defer web.Close()
		defer elsewhere.Close()
		defer here.Close()

		if err := dial("192.168.7.10:80", 5*time.Second); err != nil {
			t.Errorf("the host does not reach the guest: %v", err)
		}
		if err := dial("192.168.9.10:80", 5*time.Second); err != nil {
			t.Errorf("the host does not reach the other guest: %v", err)
		}
		for _, target := range []string{"192.168.7.1:80", "192.168.9.1:80", "192.168.9.10:80"} {
			var err error
			shop.run(func() { err = dial(target, 500*time.Millisecond) })
			if err == nil {
				t.Errorf("the guest reaches %s", target)
			} else if !errors.Is(err, syscall.EINPROGRESS) && !errors.Is(err, syscall.EAGAIN) && !errors.Is(err, syscall.EHOSTUNREACH) {
				t.Errorf("the guest's attempt at %s: %v, want silence", target, err)
			}
		}

		// The same attempts without our rules and switches come through: the silence above was ours.
		if err := nft(context.Background(), "flush ruleset\n"); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"mushop0", "mushop1"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/forwarding", []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
		}
		for _, target := range []string{"192.168.7.1:80", "192.168.9.10:80"} {
			shop.run(func() {
				if err := dial(target, 5*time.Second); err != nil {
					t.Errorf("without rules the guest does not reach %s either: %v", target, err)
				}
			})
		}
	})
}

func TestAnIsolatedNetworkJoinsMachinesAndNotTheHost(t *testing.T) {
	apart(t, func(t *testing.T) {
		mustCreate(t, "mulab0", "")
		one := plug(t, "mulab0", "10.9.0.1/24", "")
		link, err := netlink.LinkByName("mulab0")
		if err != nil {
			t.Fatal(err)
		}
		if a, err := prefixesOf(link); err != nil || len(a) != 0 {
			t.Fatalf("the host has %v, %v", a, err)
		}
		// Even a host that is given an address by mistake says and hears nothing.
		addressed("mulab0", "10.9.0.200/24")
		var l net.Listener
		one.run(func() { l = listen("10.9.0.1:80") })
		defer l.Close()
		if err := dial("10.9.0.1:80", 500*time.Millisecond); err == nil {
			t.Error("the host reaches a guest on an isolated network")
		}
	})
}

func TestASubnetThatIsInUseIsRefusedByName(t *testing.T) {
	apart(t, func(t *testing.T) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "office"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "far"}); err != nil {
			t.Fatal(err)
		}
		addressed("office", "192.168.7.77/24")
		err := Create(context.Background(), Spec{Name: "mushop0", Address: netip.MustParsePrefix("192.168.7.1/25")})
		if err == nil || !strings.Contains(err.Error(), "office") || !strings.Contains(err.Error(), "192.168.7.77/24") {
			t.Fatalf("error %v, want one that names the interface", err)
		}
		if len(names(t)) != 0 || strings.Contains(ruleset(t), "muster") {
			t.Fatal("something is left")
		}
	})
}

func TestAnInterfaceOfSomebodyElseIsLeftAlone(t *testing.T) {
	apart(t, func(t *testing.T) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "mulder"
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			t.Fatal(err)
		}
		if got := names(t); len(got) != 0 {
			t.Fatalf("listed %v", got)
		}
		if err := Remove(context.Background(), "mulder"); err == nil {
			t.Error("removed it")
		}
		if err := Create(context.Background(), Spec{Name: "mulder"}); err == nil {
			t.Error("took it over")
		}
		if _, err := netlink.LinkByName("mulder"); err != nil {
			t.Error(err)
		}
	})
}

func TestSixAddressesServeToo(t *testing.T) {
	apart(t, func(t *testing.T) {
		mustCreate(t, "mushop0", "2001:db8:7::1/64")
		mustCreate(t, "mushop0", "2001:db8:7::1/64")
		link, err := netlink.LinkByName("mushop0")
		if err != nil {
			t.Fatal(err)
		}
		if list, err := prefixesOf(link); err != nil || !slices.Contains(list, netip.MustParsePrefix("2001:db8:7::1/64")) {
			t.Fatal(list, err)
		}
	})
}
