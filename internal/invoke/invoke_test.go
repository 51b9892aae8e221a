package invoke

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/musterdr/muster/internal/dr"
)

var shop = dr.Inventory{Hostname: "shop",
	NICs: []dr.NIC{
		{Name: "lo", Addresses: []string{"127.0.0.1/8"}},
		{Name: "ens3", MAC: "52:54:00:00:00:01", Addresses: []string{"10.77.0.10/24", "fe80::1/64"}},
		{Name: "ens4", MAC: "52:54:00:00:00:02", Addresses: []string{"192.168.9.1/30"}},
		{Name: "ens5", MAC: "52:54:00:00:00:03", Master: "bond0"},
		{Name: "ens6", MAC: "52:54:00:00:00:04", Master: "bond0"},
		{Name: "bond0", MAC: "52:54:00:00:00:03", Kind: "bond", Addresses: []string{"172.20.0.5/16"}},
		{Name: "ens7", MAC: "52:54:00:00:00:05"},
	},
	Routes: []dr.Route{{Destination: "default", Gateway: "10.77.0.1", Device: "ens3"}},
}

func nics(macs ...string) (hw dr.Hardware) {
	for _, m := range macs {
		hw.NICs = append(hw.NICs, dr.HWNIC{MAC: m})
	}
	return hw
}

func TestHostTakesTheGatewaysPlace(t *testing.T) {
	a, err := Attach(dr.NetworkChoice{Kind: dr.NetworkHostOnly}, nics("52:54:00:00:00:01"), shop)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := a.Segments[0].Host, netip.MustParsePrefix("10.77.0.1/24"); got != want {
		t.Errorf("host sits at %v, want %v", got, want)
	}
	if !slices.Equal(a.Addresses, []string{"10.77.0.10"}) {
		t.Errorf("addresses %v, want only the production address", a.Addresses)
	}
}

func TestHostNeverTakesAnAddressTheServerUses(t *testing.T) {
	a, err := Attach(dr.NetworkChoice{}, nics("52:54:00:00:00:02"), shop)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := a.Segments[0].Host, netip.MustParsePrefix("192.168.9.2/30"); got != want {
		t.Errorf("host sits at %v, want %v", got, want)
	}
}

func TestBondedNICsShareOneNetwork(t *testing.T) {
	a, err := Attach(dr.NetworkChoice{}, nics("52:54:00:00:00:03", "52:54:00:00:00:04", "52:54:00:00:00:01"), shop)
	if err != nil {
		t.Fatal(err)
	}
	if a.Segments[0].Index != a.Segments[1].Index || a.Segments[0].Index == a.Segments[2].Index {
		t.Errorf("segments %+v: the two bonded ones belong together, the third apart", a.Segments)
	}
}

func TestNICWithoutAddressGetsANetworkOnWhichTheHostIsSilent(t *testing.T) {
	a, err := Attach(dr.NetworkChoice{}, nics("52:54:00:00:00:05"), shop)
	if err != nil {
		t.Fatal(err)
	}
	if s := a.Segments[0]; !s.Own || s.Host.IsValid() {
		t.Errorf("segment %+v: want one of our own without a host address", s)
	}
}

func TestBridgeMustBeNamed(t *testing.T) {
	if _, err := Attach(dr.NetworkChoice{Kind: dr.NetworkBridge}, nics("x"), shop); err == nil {
		t.Error("a bridge without a name was accepted")
	}
	a, err := Attach(dr.NetworkChoice{Kind: dr.NetworkBridge, Bridge: "br0"}, nics("52:54:00:00:00:01"), shop)
	if err != nil || a.Segments[0].Bridge != "br0" || a.Segments[0].Own {
		t.Errorf("segments %+v, error %v: want the named bridge", a.Segments, err)
	}
}
