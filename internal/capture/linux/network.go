package linux

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/musterdr/muster/internal/dr"
)

// NICs lists the network interfaces of this process's network namespace, in the kernel's order.
func NICs() ([]dr.NIC, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	byIndex := map[int]string{}
	for _, l := range links {
		byIndex[l.Attrs().Index] = l.Attrs().Name
	}
	var out []dr.NIC
	for _, l := range links {
		a := l.Attrs()
		n := dr.NIC{
			Name: a.Name, MAC: a.HardwareAddr.String(), Kind: kind(l), Master: byIndex[a.MasterIndex],
			Up: a.Flags&net.FlagUp != 0, MTU: a.MTU,
		}
		if p := permanent(a); p != "" && p != n.MAC {
			n.Permanent = p
		}
		if target, err := os.Readlink(filepath.Join("/sys/class/net", a.Name, "device/driver")); err == nil {
			n.Driver = filepath.Base(target)
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", a.Name, err)
		}
		for _, addr := range addrs {
			n.Addresses = append(n.Addresses, addr.IPNet.String())
			// Whoever leases an address tells the kernel when it ends.
			if addr.IP.To4() != nil && addr.Flags&unix.IFA_F_PERMANENT == 0 {
				n.DHCP = true
			}
		}
		out = append(out, n)
	}
	return cut(out), nil
}

// kind is "" for an interface that stands for a device, else what made it.
func kind(l netlink.Link) string {
	switch k := l.Type(); k {
	case "device":
		return ""
	default:
		return k
	}
}

// permanent is the burnt-in address: from netlink, or on kernels before 5.6 from the driver.
func permanent(a *netlink.LinkAttrs) string {
	if len(a.PermHWAddr) > 0 {
		return a.PermHWAddr.String()
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	// struct ethtool_perm_addr, and a struct ifreq that points to it.
	ask := struct {
		cmd, size uint32
		addr      [32]byte
	}{cmd: unix.ETHTOOL_GPERMADDR, size: 32}
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:unix.IFNAMSIZ-1], a.Name)
	req.data = unsafe.Pointer(&ask)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); e != 0 || ask.size != 6 {
		return ""
	}
	mac := net.HardwareAddr(ask.addr[:6])
	if mac.String() == "00:00:00:00:00:00" {
		return ""
	}
	return mac.String()
}

// Routes lists the main routing table without what the kernel adds by itself for each address.
func Routes() ([]dr.Route, error) {
	var out []dr.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if r.Protocol == unix.RTPROT_KERNEL {
				continue
			}
			out = append(out, route(r)...)
		}
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].Metric < out[j].Metric })
	return cut(out), nil
}

// route gives one entry, or one a next hop.
func route(r netlink.Route) []dr.Route {
	dst := "default"
	if r.Dst != nil {
		if ones, _ := r.Dst.Mask.Size(); ones > 0 || !r.Dst.IP.IsUnspecified() {
			dst = r.Dst.String()
		}
	}
	hop := func(gw net.IP, index int) dr.Route {
		out := dr.Route{Destination: dst, Metric: r.Priority}
		if gw != nil {
			out.Gateway = gw.String()
		}
		if i, err := net.InterfaceByIndex(index); err == nil {
			out.Device = i.Name
		}
		return out
	}
	if len(r.MultiPath) == 0 {
		return []dr.Route{hop(r.Gw, r.LinkIndex)}
	}
	var out []dr.Route
	for _, h := range r.MultiPath {
		out = append(out, hop(h.Gw, h.LinkIndex))
	}
	return out
}
