package windows

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/windows"

	"github.com/musterdr/muster/internal/dr"
)

// Inventory gathers what is true of this system now, for the given disks in this order. What could not be learned is empty.
func Inventory(disks []string) dr.Inventory {
	version := windows.RtlGetVersion()
	inv := dr.Inventory{
		Taken: time.Now().UTC(), CPU: dr.CPU{Count: runtime.NumCPU()}, Memory: memory().total,
		Kernel: fmt.Sprintf("%d.%d.%d", version.MajorVersion, version.MinorVersion, version.BuildNumber),
		Distro: dr.Distro{ID: "windows", Version: fmt.Sprint(version.BuildNumber), Name: fmt.Sprintf("Windows, build %d", version.BuildNumber)},
	}
	inv.Hostname, _ = os.Hostname()
	all, _ := volumes()
	system, _ := windows.GetSystemWindowsDirectory()
	for _, name := range disks {
		about := dr.InventoryDisk{Name: name}
		if d, err := OpenDisk(name); err == nil {
			about.Name, about.Size = d.Name, d.Size
			about.Boot = slices.ContainsFunc(all, func(v volume) bool {
				return len(system) > 3 && slices.Contains(v.paths, system[:3]) && slices.ContainsFunc(v.on, func(e Extent) bool { return e.Disk == d.number })
			})
			d.Close()
		}
		inv.Disks = append(inv.Disks, about)
	}
	for _, v := range all {
		for _, p := range v.paths {
			inv.Filesystems = append(inv.Filesystems, dr.Filesystem{Device: v.name, Mount: p, Type: v.fstype})
		}
	}
	cards, _ := net.Interfaces()
	for _, c := range cards {
		if c.Flags&net.FlagLoopback != 0 || len(c.HardwareAddr) == 0 {
			continue
		}
		nic := dr.NIC{Name: c.Name, MAC: c.HardwareAddr.String()}
		addresses, _ := c.Addrs()
		for _, a := range addresses {
			nic.Addresses = append(nic.Addresses, a.String())
		}
		inv.NICs = append(inv.NICs, nic)
	}
	return inv
}
