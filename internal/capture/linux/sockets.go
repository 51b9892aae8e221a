package linux

import (
	"encoding/hex"
	"net/netip"
	"sort"
	"strconv"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// Socket states in /proc/net.
const (
	tcpListen      = "0A"
	udpUnconnected = "07"
)

// Listeners lists the sockets that wait for connections, ordered by protocol, port and address. A UDP socket in the range
// of ephemeral ports that a process holds is taken for a client waiting for an answer and left out.
func Listeners(root string) []dr.Listener {
	held := holders(root)
	low, high := ephemeral(root)
	seen := map[dr.Listener]bool{}
	var out []dr.Listener
	for _, table := range []struct{ file, proto, state string }{
		{"tcp", "tcp", tcpListen}, {"tcp6", "tcp", tcpListen}, {"udp", "udp", udpUnconnected}, {"udp6", "udp", udpUnconnected},
	} {
		for line := range strings.Lines(content(root, "proc/net", table.file)) {
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != table.state {
				continue
			}
			at, ok := parseSocket(f[1])
			if !ok || at.Port() == 0 {
				continue
			}
			inode, _ := strconv.ParseUint(f[9], 10, 64)
			who, port := held[inode], int(at.Port())
			if table.proto == "udp" && who != "" && port >= low && port <= high {
				continue
			}
			l := dr.Listener{Proto: table.proto, Address: at.Addr().String(), Port: port, Process: who}
			if !seen[l] {
				seen[l] = true
				out = append(out, l)
			}
		}
	}
	sort.Slice(out, func(i, j int) bool {
		a, b := out[i], out[j]
		if a.Proto != b.Proto {
			return a.Proto < b.Proto
		}
		if a.Port != b.Port {
			return a.Port < b.Port
		}
		return a.Address < b.Address
	})
	return cut(out)
}

func ephemeral(root string) (low, high int) {
	if f := strings.Fields(content(root, "proc/sys/net/ipv4/ip_local_port_range")); len(f) == 2 {
		low, _ = strconv.Atoi(f[0])
		high, _ = strconv.Atoi(f[1])
		return low, high
	}
	return 32768, 60999 // the kernel's default
}

// parseSocket reads "0100007F:0016": words of the address in the machine's byte order (little-endian on every
// architecture the agent is built for), the port as a number.
func parseSocket(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	n, err := strconv.ParseUint(port, 16, 16)
	b, herr := hex.DecodeString(host)
	if !ok || err != nil || herr != nil || (len(b) != 4 && len(b) != 16) {
		return netip.AddrPort{}, false
	}
	for w := 0; w < len(b); w += 4 {
		b[w], b[w+1], b[w+2], b[w+3] = b[w+3], b[w+2], b[w+1], b[w]
	}
	addr, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr.Unmap(), uint16(n)), ok
}
