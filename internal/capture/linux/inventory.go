package linux

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/musterdr/muster/internal/dr"
)

// Inventory gathers what is true of this system now, for the given disks (kernel names or absolute paths) in this order.
// What could not be learned is empty.
func Inventory(ctx context.Context, disks []string) dr.Inventory {
	const root = "/"
	inv := dr.Inventory{
		Taken: time.Now().UTC(), Hostname: Hostname(root), Firmware: Firmware(root), SMBIOS: SMBIOS(root), CPU: CPU(root),
		Memory: Memory(root), Kernel: Kernel(root), Distro: OSRelease(root), Machine: MachineID(root), BootID: BootID(root),
		Virt: Virt(ctx, root), Swaps: Swaps(root), Resolvers: Resolvers(root), Listening: Listeners(root),
		Processes: Processes(root), Timezone: Timezone(root), RTCLocal: RTCLocal(root),
	}
	boot := bootDisks(root)
	var kernel []string
	blocks := Blocks(root)
	for _, disk := range disks {
		name := kernelName(blocks, disk)
		if name == "" { // a file
			about := dr.InventoryDisk{Name: filepath.Base(disk)}
			if info, err := os.Stat(disk); err == nil {
				about.Size = info.Size()
			}
			inv.Disks = append(inv.Disks, about)
			continue
		}
		about := DescribeDisk(root, name)
		about.Boot = slices.Contains(boot, name)
		inv.Disks = append(inv.Disks, about)
		kernel = append(kernel, name)
	}
	inv.Volumes = Volumes(ctx, root, kernel)
	inv.Filesystems, _ = Mounts(root)
	inv.NICs, _ = NICs()
	inv.Routes, _ = Routes()
	units, _ := Units(ctx)
	inv.EnabledUnits, inv.ActiveUnits, inv.FailedUnits, inv.InitState = units.Enabled, units.Active, units.Failed, units.State
	return inv
}

// bootDisks gives the disks below /, /boot and /boot/efi.
func bootDisks(root string) []string {
	table, _ := Mountinfo(root)
	blocks := Blocks(root)
	var out []string
	for _, m := range table {
		if m.Mount != "/" && m.Mount != "/boot" && m.Mount != "/boot/efi" && m.Mount != "/efi" {
			continue
		}
		for _, name := range ofMount(root, blocks, m) {
			out = append(out, below(blocks, name)...)
		}
	}
	return out
}
