// Package network makes the networks that rescue machines are plugged into: bridges that lead nowhere.
//
//	Spec        one bridge; with an Address the host is on it, without one nobody but machines is
//	host-only   the host sits at the address of the server's gateway and reaches the server at its own; the server
//	            reaches nothing: what it sends beyond the host is dropped, and so are connections it begins to the host
//	isolated    no address: the host neither hears nor says anything
//
// The rules that isolate a bridge exist before the bridge does and go after it, so there is no moment without them. They
// are an nftables table of the bridge's own; forwarding is switched off on the bridge besides, for the host whose
// administrator flushes the rules. A bridge is ours if its name begins with Prefix and its MAC address with our own
// three bytes: both are given to it in the instant it is made, so what a crash leaves can be found and removed.
//
// Knows: bridges, addresses, packet filters.
// Must not know: machines, invocations, why a network is wanted.
package network

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
)

// Prefix begins the name of every bridge of ours.
const Prefix = "mu"

const (
	maxName    = 15 // bytes of an interface's name, by Linux
	toolLimit  = 20 * time.Second
	maxMessage = 4 << 10 // bytes of nft's complaint
)

var nameRE = regexp.MustCompile(`^` + Prefix + `[0-9a-z]{1,13}$`)

// oui are the first bytes of our bridges' MAC addresses: locally administered.
var oui = [3]byte{0x02, 0x6d, 0x75}

// Spec is a network.
type Spec struct {
	Name    string       // of the bridge: Prefix and lower-case letters and digits, at most 15 bytes
	Address netip.Prefix // the host's address and subnet; zero: isolated
}

// Create makes a network. One that exists with the same address is put in order and is no error; one with another
// address is an error, and so is a subnet that is on another interface of this host. On error nothing new is left.
func Create(ctx context.Context, spec Spec) error {
	if err := create(ctx, spec); err != nil {
		return fmt.Errorf("create network %s: %w", spec.Name, err)
	}
	return nil
}

func create(ctx context.Context, spec Spec) (err error) {
	if !nameRE.MatchString(spec.Name) {
		return fmt.Errorf("the name is not %s and up to %d lower-case letters and digits", Prefix, maxName-len(Prefix))
	}
	if spec.Address != (netip.Prefix{}) && (!spec.Address.IsValid() || spec.Address.IsSingleIP()) {
		return fmt.Errorf("address %s is no address with a subnet", spec.Address)
	}
	bridge, err := find(spec.Name)
	if err != nil {
		return err
	}
	if err := vacant(spec); err != nil {
		return err
	}
	if bridge == nil {
		defer func() {
			if err != nil {
				err = errors.Join(err, remove(context.WithoutCancel(ctx), spec.Name))
			}
		}()
	}
	if err := nft(ctx, rules(spec)); err != nil {
		return err
	}
	if bridge == nil {
		if bridge, err = newBridge(spec.Name); err != nil {
			return err
		}
	}
	if err := tame(spec); err != nil {
		return err
	}
	if err := address(bridge, spec); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("bring up: %w", err)
	}
	return nil
}

// Remove removes a network and all it leaves. One that does not exist is no error; an interface of that name that is
// not ours is.
func Remove(ctx context.Context, name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("remove network %q: it is none of ours", name)
	}
	if err := remove(ctx, name); err != nil {
		return fmt.Errorf("remove network %s: %w", name, err)
	}
	return nil
}

func remove(ctx context.Context, name string) error {
	bridge, err := find(name)
	if err != nil {
		return err
	}
	if bridge != nil {
		if err := netlink.LinkDel(bridge); err != nil && !notFound(err) {
			return fmt.Errorf("remove bridge: %w", err)
		}
	}
	// Named first, so that removing what is not there is no error.
	return nft(ctx, fmt.Sprintf("table inet %s\ndelete table inet %s\n", table(name), table(name)))
}

// List gives the names of our bridges, sorted.
func List(ctx context.Context) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	var names []string
	for _, link := range links {
		if ours(link) {
			names = append(names, link.Attrs().Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func ours(link netlink.Link) bool {
	a := link.Attrs()
	return link.Type() == "bridge" && nameRE.MatchString(a.Name) && bytes.HasPrefix(a.HardwareAddr, oui[:])
}

func notFound(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing)
}

// find gives our bridge of that name, nil if there is no interface of that name.
func find(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	if notFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for bridge: %w", err)
	}
	if !ours(link) {
		return nil, fmt.Errorf("interface %s exists and is not ours: rename or remove it", name)
	}
	return link, nil
}

// vacant refuses a subnet that another interface is on: two ways to one subnet would send packets down either.
func vacant(spec Spec) error {
	if !spec.Address.IsValid() {
		return nil
	}
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, link := range links {
		prefixes, err := prefixesOf(link)
		if err != nil {
			return err
		}
		for _, p := range prefixes {
			name := link.Attrs().Name
			if name != spec.Name && p.Overlaps(spec.Address.Masked()) {
				return fmt.Errorf("subnet %s is already on interface %s (%s): attach to that network by its bridge, or take it down",
					spec.Address.Masked(), name, p)
			}
			if name == spec.Name && p != spec.Address && !p.Addr().IsLinkLocalUnicast() {
				return fmt.Errorf("it exists with address %s, not %s: remove it first", p, spec.Address)
			}
		}
	}
	return nil
}

// prefixesOf gives an interface's addresses, each with its subnet.
func prefixesOf(link netlink.Link) (list []netip.Prefix, err error) {
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
	}
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		bits, _ := a.Mask.Size()
		if ok {
			list = append(list, netip.PrefixFrom(ip.Unmap(), bits))
		}
	}
	return list, nil
}

// newBridge makes the bridge, down. Its MAC address is its own, so that it does not change with what is plugged in.
func newBridge(name string) (netlink.Link, error) {
	mac := net.HardwareAddr{oui[0], oui[1], oui[2], 0, 0, 0}
	if _, err := rand.Read(mac[3:]); err != nil {
		return nil, err
	}
	snooping := false // it would drop a guest's multicast until somebody asks for it, and nobody does here
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, mac
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return nil, fmt.Errorf("make bridge: %w", err)
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("make bridge: %w", err)
	}
	return link, nil
}

// tame switches off, on this bridge, what would make the host more than a machine on it.
func tame(spec Spec) error {
	four := "/proc/sys/net/ipv4/conf/" + spec.Name + "/"
	six := "/proc/sys/net/ipv6/conf/" + spec.Name + "/"
	switches := []struct{ path, value string }{
		{four + "forwarding", "0"},
		{four + "send_redirects", "0"},
		{four + "accept_redirects", "0"},
		{four + "arp_ignore", "1"}, // say nothing of the host's other addresses
		{four + "rp_filter", "1"},
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		quiet := "1"
		if spec.Address.IsValid() && spec.Address.Addr().Is6() {
			quiet = "0"
		}
		switches = append(switches, []struct{ path, value string }{
			{six + "accept_ra", "0"}, {six + "accept_redirects", "0"}, {six + "forwarding", "0"}, {six + "accept_dad", "0"},
			{six + "disable_ipv6", quiet},
		}...)
	}
	for _, s := range switches {
		if err := os.WriteFile(s.path, []byte(s.value), 0); err != nil {
			return fmt.Errorf("set %s: %w", s.path, err)
		}
	}
	return nil
}

func address(bridge netlink.Link, spec Spec) error {
	if !spec.Address.IsValid() {
		return nil
	}
	a := spec.Address.Addr()
	err := netlink.AddrReplace(bridge, &netlink.Addr{
		IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(spec.Address.Bits(), a.BitLen())},
	})
	if err != nil {
		return fmt.Errorf("give the host address %s: %w", spec.Address, err)
	}
	return nil
}

func table(name string) string { return "muster_" + name }

// rules are the bridge's table, put in place of an earlier one in one transaction. iifname matches by name, so rules may
// exist before the bridge.
func rules(spec Spec) string {
	var b strings.Builder
	name := table(spec.Name)
	fmt.Fprintf(&b, "table inet %s\ndelete table inet %s\ntable inet %s {\n", name, name, name)
	fmt.Fprintf(&b, "  chain forward {\n    type filter hook forward priority -300; policy accept;\n")
	fmt.Fprintf(&b, "    iifname %q drop\n    oifname %q drop\n  }\n", spec.Name, spec.Name)
	fmt.Fprintf(&b, "  chain input {\n    type filter hook input priority -150; policy accept;\n")
	if spec.Address.IsValid() { // after connection tracking: answers to what the host began, and its being there
		fmt.Fprintf(&b, "    iifname %q ct state established,related accept\n", spec.Name)
		fmt.Fprintf(&b, "    iifname %q icmp type echo-request limit rate 20/second accept\n", spec.Name)
		fmt.Fprintf(&b, "    iifname %q icmpv6 type { echo-request, nd-neighbor-solicit, nd-neighbor-advert } limit rate 100/second accept\n", spec.Name)
	}
	fmt.Fprintf(&b, "    iifname %q drop\n  }\n", spec.Name)
	if !spec.Address.IsValid() {
		fmt.Fprintf(&b, "  chain output {\n    type filter hook output priority -300; policy accept;\n    oifname %q drop\n  }\n", spec.Name)
	}
	b.WriteString("}\n")
	return b.String()
}

// nft has nftables carry out a script as one transaction.
func nft(ctx context.Context, script string) error {
	ctx, cancel := context.WithTimeout(ctx, toolLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("nft is not installed (apt install nftables): %w", err)
	case ctx.Err() != nil:
		return fmt.Errorf("nft: %w", ctx.Err())
	}
	return fmt.Errorf("nft: %s", strings.Join(strings.Fields(string(out[:min(len(out), maxMessage)])), " "))
}
