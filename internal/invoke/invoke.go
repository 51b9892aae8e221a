// Package invoke is what running a rescue image for real needs beyond a boot test: where it is attached, and, in later
// releases, who may ask, in which order servers start, how people reach them and how they come home.
//
//	Attachment  the networks of one machine, one Segment a NIC
//	Segment     one network: an existing bridge, or one of its own with the host at the gateway's address
//
// In this release one server is invoked at a time by whoever may use the command line. The seam for more is the
// invocation's record: it names who asked, why, and every step.
//
// Knows: how an inventory's addresses become networks.
// Must not know: how a bridge is made, what a hypervisor is, where images are.
package invoke

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// Attachment says what each of a machine's NICs is plugged into, in the order of its hardware's NICs.
type Attachment struct {
	Segments  []Segment // by NIC; several NICs may share one
	Addresses []string  // the machine's own addresses that the host reaches, most useful first
}

// Segment is one network.
type Segment struct {
	Index  int          // segments made by us are numbered from 0; NICs with the same index share the network
	Bridge string       // existing bridge to use; "" for none or for one of our own
	Own    bool         // a bridge of our own is to be made
	Host   netip.Prefix // the host's address on our own bridge; zero: none, the host only listens
}

// Attach decides the networks of an invoked machine.
//
// On a host-only network the host takes the place of the server's gateway, so that the server finds the network it
// knows and the host reaches it at its production address. Where the gateway is not known it takes the lowest address
// of the subnet that the server does not use. A NIC without a static address in the inventory gets a network on which
// the host has no address.
func Attach(choice dr.NetworkChoice, hw dr.Hardware, inv dr.Inventory) (Attachment, error) {
	var a Attachment
	switch choice.Kind {
	case dr.NetworkNone:
		a.Segments = make([]Segment, len(hw.NICs))
	case dr.NetworkBridge:
		if choice.Bridge == "" {
			return a, fmt.Errorf("attach %s: name the bridge (--network bridge:NAME)", inv.Hostname)
		}
		for range hw.NICs {
			a.Segments = append(a.Segments, Segment{Bridge: choice.Bridge})
		}
		for _, nic := range hw.NICs {
			a.Addresses = append(a.Addresses, hostsOf(prefixesOf(inv, nic.MAC))...)
		}
	case dr.NetworkHostOnly, "":
		return hostOnly(hw, inv), nil
	default:
		return a, fmt.Errorf("attach %s: network kind %q: use host-only, none or bridge:NAME", inv.Hostname, choice.Kind)
	}
	return a, nil
}

func hostOnly(hw dr.Hardware, inv dr.Inventory) Attachment {
	var a Attachment
	bySubnet := map[netip.Prefix]Segment{}
	next := 0
	for _, nic := range hw.NICs {
		own := prefixesOf(inv, nic.MAC)
		var seg Segment
		var known bool
		if len(own) > 0 {
			seg, known = bySubnet[own[0].Masked()]
		}
		if !known {
			seg = Segment{Index: next, Own: true}
			next++
			if len(own) > 0 {
				seg.Host = hostAddress(inv, own[0])
				bySubnet[own[0].Masked()] = seg
			}
		}
		a.Segments = append(a.Segments, seg)
		if seg.Host.IsValid() {
			for _, p := range own {
				if seg.Host.Masked() == p.Masked() {
					a.Addresses = append(a.Addresses, p.Addr().String())
				}
			}
		}
	}
	return a
}

// prefixesOf gives the static-looking addresses of the interface with this MAC, or of the bond or bridge it is part
// of, IPv4 first. Link-local addresses lead nowhere.
func prefixesOf(inv dr.Inventory, mac string) []netip.Prefix {
	var v4, v6 []netip.Prefix
	take := func(n dr.NIC) {
		for _, text := range n.Addresses {
			p, err := netip.ParsePrefix(text)
			if err != nil || p.Addr().IsLinkLocalUnicast() || p.Addr().IsLoopback() || p.IsSingleIP() {
				continue
			}
			if p.Addr().Is4() {
				v4 = append(v4, p)
			} else {
				v6 = append(v6, p)
			}
		}
	}
	for _, n := range inv.NICs {
		if !strings.EqualFold(n.MAC, mac) && !strings.EqualFold(n.Permanent, mac) {
			continue
		}
		take(n)
		for _, m := range inv.NICs {
			if n.Master != "" && m.Name == n.Master {
				take(m)
			}
		}
		break
	}
	return append(v4, v6...)
}

func hostAddress(inv dr.Inventory, own netip.Prefix) netip.Prefix {
	for _, r := range inv.Routes {
		gw, err := netip.ParseAddr(r.Gateway)
		if err == nil && own.Contains(gw) && gw != own.Addr() {
			return netip.PrefixFrom(gw, own.Bits())
		}
	}
	used := map[netip.Addr]bool{}
	for _, n := range inv.NICs {
		for _, text := range n.Addresses {
			if p, err := netip.ParsePrefix(text); err == nil {
				used[p.Addr()] = true
			}
		}
	}
	addr := own.Masked().Addr().Next()
	for used[addr] {
		addr = addr.Next()
	}
	if !own.Contains(addr) {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(addr, own.Bits())
}

func hostsOf(ps []netip.Prefix) (out []string) {
	for _, p := range ps {
		out = append(out, p.Addr().String())
	}
	return out
}
