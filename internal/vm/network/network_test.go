package network

import (
	"context"
	"net/netip"
	"strings"
	"testing"
)

func TestNamesThatAreNotOursAreRefused(t *testing.T) {
	for _, name := range []string{"", "mu", "eth0", "virbr0", "mu-shop", "muABC", "mu0123456789abcdef", "mu; reboot", "mu/../x"} {
		if err := Create(context.Background(), Spec{Name: name}); err == nil {
			t.Errorf("%q was made", name)
		}
		if err := Remove(context.Background(), name); err == nil {
			t.Errorf("%q was removed", name)
		}
	}
}

func TestAnAddressWithoutASubnetIsRefused(t *testing.T) {
	err := Create(context.Background(), Spec{Name: "mushop0", Address: netip.MustParsePrefix("192.168.7.1/32")})
	if err == nil {
		t.Fatal("accepted")
	}
}

func TestRulesDropBothWaysOfForwarding(t *testing.T) {
	for _, spec := range []Spec{{Name: "mulab0"}, {Name: "mulab0", Address: netip.MustParsePrefix("10.0.0.1/24")}} {
		text := rules(spec)
		for _, want := range []string{"hook forward", `iifname "mulab0" drop`, `oifname "mulab0" drop`, "hook input"} {
			if !strings.Contains(text, want) {
				t.Errorf("%v: no %q in\n%s", spec, want, text)
			}
		}
		if strings.Contains(text, "hook output") == spec.Address.IsValid() {
			t.Errorf("%v: output\n%s", spec, text)
		}
	}
}
