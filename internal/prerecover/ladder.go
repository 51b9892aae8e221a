package prerecover

import (
	"slices"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// rung is one kind of virtual disk controller and what a guest needs to drive it. Needs is a list of alternatives: of
// each inner list one module is enough.
type rung struct {
	bus    dr.DiskBus
	needs  [][]string
	family string // what the kernel calls its disks: sd, vd, nvme, hd
}

// diskLadder is the order in which controllers are tried, best first.
var diskLadder = []rung{
	{dr.BusNVMe, [][]string{{"nvme"}}, "nvme"},
	{dr.BusVirtio, [][]string{{"virtio_blk"}, {"virtio_pci"}}, "vd"},
	{dr.BusVirtioSCSI, [][]string{{"virtio_scsi"}, {"virtio_pci"}, {"sd_mod"}}, "sd"},
	{dr.BusSATA, [][]string{{"ahci"}, {"sd_mod"}}, "sd"},
	{dr.BusLSI, [][]string{{"sym53c8xx"}, {"sd_mod"}}, "sd"},
	{dr.BusMegaSAS, [][]string{{"megaraid_sas"}, {"sd_mod"}}, "sd"},
	{dr.BusMPTSAS, [][]string{{"mptsas"}, {"sd_mod"}}, "sd"},
	{dr.BusPVSCSI, [][]string{{"vmw_pvscsi"}, {"sd_mod"}}, "sd"},
	{dr.BusIDE, [][]string{{"ata_piix"}, {"sd_mod"}}, "sd"},
	{dr.BusIDE, [][]string{{"piix", "ide_pci_generic"}, {"ide_gd_mod", "ide_disk", "ide_core"}}, "hd"},
}

// nicLadder is the same for network cards. They are driven after the root file system is there, so the modules on it do.
var nicLadder = []struct {
	model dr.NICModel
	needs [][]string
}{
	{dr.NICVirtio, [][]string{{"virtio_net"}, {"virtio_pci"}}},
	{dr.NICE1000e, [][]string{{"e1000e"}}},
	{dr.NICE1000, [][]string{{"e1000"}}},
	{dr.NICVMXNet3, [][]string{{"vmxnet3"}}},
	{dr.NICRTL8139, [][]string{{"8139cp", "8139too"}}},
}

var channelNeeds = [][]string{{"virtio_console"}, {"virtio_pci"}}

// ladderModules are all the modules the ladders ask for: only these are kept in the facts.
var ladderModules = func() map[string]bool {
	all := map[string]bool{}
	add := func(needs [][]string) {
		for _, alternatives := range needs {
			for _, m := range alternatives {
				all[m] = true
			}
		}
	}
	for _, r := range diskLadder {
		add(r.needs)
	}
	for _, r := range nicLadder {
		add(r.needs)
	}
	add(channelNeeds)
	return all
}()

// onLadder keeps the names a ladder asks for, sorted.
func onLadder(names map[string]bool) []string {
	var out []string
	for n := range names {
		if ladderModules[n] {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

// missing names what of the needs a list of modules does not have.
func missing(needs [][]string, have []string) []string {
	var out []string
	for _, alternatives := range needs {
		if !slices.ContainsFunc(alternatives, func(m string) bool { return slices.Contains(have, m) }) {
			out = append(out, strings.Join(alternatives, " or "))
		}
	}
	return out
}

func needNames(needs [][]string) string {
	var out []string
	for _, alternatives := range needs {
		out = append(out, strings.Join(alternatives, "/"))
	}
	return strings.Join(out, ", ")
}
