package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/doctor"
	filesguestfs "github.com/musterdr/muster/internal/files/guestfs"
	"github.com/musterdr/muster/internal/trust"
	"github.com/musterdr/muster/internal/vm/libvirt"
)

func doctorCommand() *cobra.Command {
	return &cobra.Command{Use: "doctor", Short: "Say what this host can do, what it lacks, and how to get it", Args: cobra.NoArgs,
		Long: `Look at this host: hypervisor (KVM is tried by running a guest), firmware, libguestfs, space, clock. It needs no master. An appliance is asked for
what an appliance needs, which is no hypervisor. Exit code 5 if something needed is missing.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings, err := installation(cmd).examine(cmd.Context())
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				if err := printJSON(cmd, findings); err != nil {
					return err
				}
			} else {
				printFindings(cmd, findings)
			}
			for _, f := range findings {
				if f.State == "fail" {
					return withCode(exitUnavailable, errors.New("something that is needed is missing: see above"))
				}
			}
			return nil
		}}
}

// examine looks at this host with the eyes of whatever lives in the folder.
func (i install) examine(ctx context.Context) ([]api.Finding, error) {
	if i.isAppliance() {
		set, err := i.applianceSettings()
		if err != nil {
			return nil, err
		}
		return doctor.Examine(ctx, doctor.Patient{Data: i.Dir, Store: set.nearStore().Path, Appliance: true, Files: filesguestfs.Driver{}.Ready, ProbeKVM: probeKVM}), nil
	}
	set, err := i.settings()
	if err != nil {
		set = settings{Store: i.path("store")}
	}
	hv, err := libvirt.Open(ctx, libvirt.Config{Socket: set.Libvirt, ProbeFile: probeFile(i)})
	if err == nil {
		defer hv.Close()
	}
	return diagnose(ctx, i, set, hv, err), nil
}

// isAppliance says whether the folder is that of an appliance alone, which need not have joined yet where its package made the folder.
func (i install) isAppliance() bool {
	if node, err := trust.OpenNode(i.nodeDir()); err == nil {
		return node.Peer().Role == trust.Appliance
	}
	return i.Dir == roleDirs[trust.Appliance]
}

// probeFile is where the answer to whether KVM works is kept, if there is an installation to keep it in.
func probeFile(i install) string {
	if _, err := os.Stat(i.Dir); err != nil {
		return ""
	}
	return i.path("kvm-probe.json")
}

func diagnose(ctx context.Context, i install, set settings, hv *libvirt.Hypervisor, unreached error) []api.Finding {
	p := doctor.Patient{Data: i.Dir, Store: set.Store, Hypervisor: unreached, AppArmor: append(libvirt.AppArmorRules(i.Dir), libvirt.AppArmorRules(i.Run)[:1]...), ProbeKVM: probeKVM}
	if hv != nil && unreached == nil {
		if host, err := hv.Host(ctx); err == nil {
			p.Machines = &host
		} else {
			p.Hypervisor = err
		}
	}
	if !set.inBucket() {
		return doctor.Examine(ctx, p)
	}
	p.Store = ""
	return append(doctor.Examine(ctx, p), examineBucket(ctx, set)...)
}

func probeKVM(ctx context.Context) string {
	reason, err := libvirt.ProbeKVM(ctx, "qemu-system-x86_64")
	if err != nil {
		return err.Error()
	}
	return reason
}

func printFindings(cmd *cobra.Command, findings []api.Finding) {
	for _, f := range findings {
		fmt.Fprintf(cmd.OutOrStdout(), "%-5s %-14s %s\n", f.State, f.Name, f.Detail)
		if f.Fix != "" {
			fmt.Fprintf(cmd.OutOrStdout(), "%-20s → %s\n", "", f.Fix)
		}
	}
}
