package main

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// hostNetwork is what of the network this machine has, and where it listens.
type hostNetwork struct {
	cards   []card
	routers []netip.Addr
	names   []string // name servers
	listens []string // where something listens, as "tcp 0.0.0.0:22"
}

type card struct {
	name      string
	cable     bool
	addresses []netip.Prefix
}

// maxTable bounds a table of the kernel's, and resolv.conf, in lines.
const maxTable = 10_000

// readNetwork reads it from the kernel; root is "/" but for tests. What cannot be read is left out.
func readNetwork(root string) (n hostNetwork) {
	found, _ := net.Interfaces()
	for _, one := range found {
		if one.Flags&net.FlagLoopback != 0 {
			continue
		}
		c := card{name: one.Name, cable: one.Flags&net.FlagRunning != 0}
		addresses, _ := one.Addrs()
		for _, a := range addresses {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
				c.addresses = append(c.addresses, p)
			}
		}
		n.cards = append(n.cards, c)
	}
	eachLine(filepath.Join(root, "proc/net/route"), func(f []string) {
		if len(f) > 2 && f[1] == "00000000" {
			if a, ok := kernelAddress(f[2]); ok && !a.IsUnspecified() {
				n.routers = append(n.routers, a)
			}
		}
	})
	eachLine(filepath.Join(root, "etc/resolv.conf"), func(f []string) {
		if len(f) > 1 && f[0] == "nameserver" {
			n.names = append(n.names, f[1])
		}
	})
	for _, protocol := range []string{"tcp", "tcp6", "udp", "udp6"} {
		n.listens = append(n.listens, listening(filepath.Join(root, "proc/net", protocol), protocol[:3])...)
	}
	return n
}

// listening gives the sockets of one of the kernel's tables that wait for others to begin: TCP's that listen, and UDP's that are
// not bound to one peer.
func listening(path, protocol string) (out []string) {
	waits := map[string]string{"tcp": "0A", "udp": "07"}[protocol]
	eachLine(path, func(f []string) {
		if len(f) < 4 || f[3] != waits {
			return
		}
		at, port, _ := strings.Cut(f[1], ":")
		a, ok := kernelAddress(at)
		number, err := hex.DecodeString(port)
		if !ok || err != nil || len(number) != 2 {
			return
		}
		line := protocol + " " + netip.AddrPortFrom(a, binary.BigEndian.Uint16(number)).String()
		if !slices.Contains(out, line) {
			out = append(out, line)
		}
	})
	return out
}

// kernelAddress reads an address as the kernel prints it: words of four bytes in this machine's order.
func kernelAddress(text string) (netip.Addr, bool) {
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.Addr{}, false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	a, ok := netip.AddrFromSlice(raw)
	return a.Unmap(), ok
}

// eachLine gives the words of each line of a file.
func eachLine(path string, tell func(words []string)) {
	f, err := os.Open(path)
	if err != nil {
		return
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 0; n < maxTable && lines.Scan(); n++ {
		tell(strings.Fields(lines.Text()))
	}
}

func (n hostNetwork) addressed() bool {
	return slices.ContainsFunc(n.cards, func(c card) bool { return len(c.addresses) > 0 })
}

func (n hostNetwork) print(out io.Writer) {
	for _, c := range n.cards {
		state := "no address"
		switch {
		case len(c.addresses) > 0:
			state = joined(c.addresses)
		case !c.cable:
			state = "no cable"
		}
		fmt.Fprintf(out, "network      %s: %s\n", tame(c.name), state)
	}
	if len(n.routers) > 0 {
		fmt.Fprintf(out, "router       %s\n", joined(n.routers))
	}
	if len(n.names) > 0 {
		fmt.Fprintf(out, "name server  %s\n", tame(strings.Join(n.names, ", ")))
	}
	listens := "nowhere"
	if len(n.listens) > 0 {
		listens = strings.Join(n.listens, ", ")
	}
	fmt.Fprintf(out, "listens      %s\n", listens)
}

func joined[T fmt.Stringer](list []T) string {
	var words []string
	for _, one := range list {
		words = append(words, one.String())
	}
	return strings.Join(words, ", ")
}
