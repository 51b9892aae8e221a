package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/dr"
)

func TestShowSaysHowAServerIsReadAndWhyNotInABetterWay(t *testing.T) {
	record := func(pass dr.CapturePass) *dr.Record { return &dr.Record{Snapshot: dr.Snapshot{Pass: pass}} }
	ssh := dr.Source{SSH: &dr.SSHSource{}}
	for _, c := range []struct {
		source dr.Source
		newest *dr.Record
		want   []string
	}{
		{ssh, nil, []string{"read         not yet"}},
		{ssh, record(dr.CapturePass{Provider: dr.ProviderTracking}), []string{"ebpf: ", "--resident"}},
		{ssh, record(dr.CapturePass{Provider: dr.ProviderFreeze, PassedOver: []dr.PassedOver{
			{Provider: dr.ProviderTracking, Reason: "no BTF"}, {Provider: dr.ProviderLVM, Reason: "an \x1b[31mevil\nserver"}}}),
			[]string{"read         freeze: every disk compared", "\n  not ebpf:   no BTF\n", "\n  not lvm:    an "}},
		{dr.Source{}, record(dr.CapturePass{Provider: dr.ProviderReflink}), []string{"reflink: a clone"}},
	} {
		var out bytes.Buffer
		printProvider(&out, c.source, c.newest)
		for _, want := range c.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%q is not in:\n%s", want, out.String())
			}
		}
		if strings.Contains(out.String(), "\x1b") || strings.Contains(out.String(), "\nserver") {
			t.Errorf("a server writes to the terminal: %q", out.String())
		}
	}
	for _, p := range []dr.Provider{dr.ProviderTracking, dr.ProviderLVM, dr.ProviderZFS, dr.ProviderFreeze, dr.ProviderCrash, dr.ProviderQEMU, dr.ProviderVSS, dr.ProviderReflink, dr.ProviderRest} {
		if ways[p] == "" || !p.Known() {
			t.Errorf("provider %s has no words", p)
		}
	}
}
