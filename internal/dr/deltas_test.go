package dr

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestDeltasAreHeldWhereTheyAreOfUse(t *testing.T) {
	lost, small, bank, full := host("d", 64), host("b", 2), host("c", 64, "bank"), host("e", 64)
	lost.State, full.Space = SiloLost, 1<<20
	for name, c := range map[string]struct {
		silos []Silo
		where Where
		want  []Copy
	}{
		"one more than the one that made them": {[]Silo{host("a", 8), host("b", 8)}, Where{"pre": {"a"}}, []Copy{{"pre", "b"}}},
		"no third":                             {[]Silo{host("a", 8), host("b", 8), host("c", 8)}, Where{"pre": {"a", "b"}}, nil},
		"alone is alone":                       {[]Silo{host("a", 8)}, Where{"pre": {"a"}}, nil},
		"a lost one does not count":            {[]Silo{lost, host("a", 8), host("b", 8)}, Where{"pre": {"d", "a"}}, []Copy{{"pre", "b"}}},
		"only where it could boot":             {[]Silo{host("a", 8), small, bank, full}, Where{"pre": {"a"}}, nil},
		"who holds fewer first":                {[]Silo{host("a", 8), host("b", 8), host("c", 8)}, Where{"pre": {"a"}, "other": {"b"}}, []Copy{{"pre", "c"}}},
	} {
		if got := Spread([]Rescue{{PreRecovery: "pre", Customer: "shop", Memory: 4 << 10}}, c.silos, c.where); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestLosingAnySiloLeavesAnInstantBoot(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		silos, _, _, _ := farm(t)
		where := Where{}
		var images []Rescue
		for i := range rapid.IntRange(1, 30).Draw(t, "images") {
			img := Rescue{PreRecovery: fmt.Sprintf("pre-%d", i), Customer: rapid.SampledFrom([]string{"", "shop", "bank"}).Draw(t, "of"), Memory: 1 << 10}
			images = append(images, img)
			where[img.PreRecovery] = []string{rapid.SampledFrom(silos).Draw(t, "by").Name}
		}
		for _, c := range Spread(images, silos, where) {
			where[c.PreRecovery] = append(where[c.PreRecovery], c.Silo)
		}
		if again := Spread(images, silos, where); len(again) > 0 {
			t.Fatalf("it does not come to rest: %v", again)
		}
		for _, img := range images {
			could, holds := 0, 0
			for _, s := range silos {
				if s.State == SiloActive && s.Takes(img.Customer) && s.Memory >= img.Memory {
					has := slices.Contains(where[img.PreRecovery], s.Name)
					if has || s.Space >= DeltaSpace {
						could++
					}
					if has {
						holds++
					}
				}
			}
			if holds < min(could, DeltaCopies) {
				t.Fatalf("%s is held by %d of the %d silos that could", img.PreRecovery, holds, could)
			}
		}
	})
}
