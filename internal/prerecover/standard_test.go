package prerecover

import "testing"

func TestStandardOverlaysAreValidAndNamedOnce(t *testing.T) {
	seen := map[string]bool{}
	for _, o := range Standard() {
		if seen[o.Name] {
			t.Errorf("%s comes twice", o.Name)
		}
		seen[o.Name] = true
	}
	if len(seen) < 14 {
		t.Errorf("%d standard overlays", len(seen))
	}
}
