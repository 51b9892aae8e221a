package dr

import (
	"cmp"
	"slices"
)

// DeltaCopies is how many silos hold the deltas of each last-known-good: losing one still leaves an instant boot. They are in
// the store as well; fetching them from there is what this spares on the day.
const DeltaCopies = 2

// Rescue is a rescue image whose deltas are to be held: a last-known-good.
type Rescue struct {
	PreRecovery string
	Customer    string
	Memory      int // MiB that its machine has
}

// Copy is a pre-recovery whose deltas a silo is to fetch.
type Copy struct {
	PreRecovery string
	Silo        string
}

// Spread says which deltas are to be fetched by which silo, so that each is held by DeltaCopies silos that are active and could
// boot it. What a silo that drains or is lost holds does not count. A silo takes its turn by how many it holds, one with KVM
// before all others; where that leaves too few silos, fewer hold it. Nothing is ever taken away: deltas go with their snapshot.
func Spread(images []Rescue, silos []Silo, where Where) (out []Copy) {
	load := map[string]int{}
	for _, holders := range where {
		for _, name := range holders {
			load[name]++
		}
	}
	images = slices.Clone(images)
	slices.SortFunc(images, func(a, b Rescue) int { return cmp.Compare(a.PreRecovery, b.PreRecovery) })
	for _, img := range images {
		var may []Silo
		holders := 0
		for _, s := range silos {
			if s.State != SiloActive || !s.Takes(img.Customer) || s.Memory < img.Memory {
				continue
			}
			if slices.Contains(where[img.PreRecovery], s.Name) {
				holders++
			} else if s.Space >= DeltaSpace {
				may = append(may, s)
			}
		}
		slices.SortFunc(may, func(a, b Silo) int {
			slow := func(s Silo) int { return map[bool]int{true: 0, false: 1}[s.Hypervisor == HypervisorKVM] }
			return cmp.Or(cmp.Compare(slow(a), slow(b)), cmp.Compare(load[a.Name], load[b.Name]), cmp.Compare(a.Name, b.Name))
		})
		for _, s := range may[:min(len(may), max(DeltaCopies-holders, 0))] {
			load[s.Name]++
			out = append(out, Copy{img.PreRecovery, s.Name})
		}
	}
	return out
}

// DeltaSpace is how many bytes a silo must have free to be given deltas to hold. Deltas are small; this is what they may be at worst.
const DeltaSpace = 4 << 30
