package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

// patientExports makes QEMU wait for exports that go away, where libvirt does not know how to say so: libvirt 9 takes
// <reconnect> below an NBD source and forgets it, and a QEMU that was not told to wait does not connect a second time.
//
// The machine has not run yet. Beside each node that libvirt made for an export, one is made that waits, and the raw
// layer above is put on it; libvirt's own stays, unused. It works or changes nothing: a machine that does not wait is
// better than none.
func (h *Hypervisor) patientExports(ctx context.Context, dom libvirt.Domain, spec vm.Spec) {
	if err := h.replaceExports(ctx, dom, spec); err != nil {
		slog.WarnContext(ctx, "the machine will not wait for an export that is restarted", "machine", spec.Name, "error", err)
	}
}

func (h *Hypervisor) replaceExports(ctx context.Context, dom libvirt.Domain, spec vm.Spec) error {
	var text string
	err := h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		text, err = l.DomainGetXMLDesc(dom, 0)
		return err
	})
	if err != nil {
		return err
	}
	var live libvirtxml.Domain
	if err := live.Unmarshal(text); err != nil {
		return fmt.Errorf("read description: %w", err)
	}
	if live.Devices == nil || len(live.Devices.Disks) != len(spec.Disks) {
		return errors.New("the description has other disks than were asked for")
	}
	for i, d := range live.Devices.Disks {
		layers := spec.Disks[i].Layers
		bottom := layers[len(layers)-1]
		if bottom.Socket == "" {
			continue
		}
		below := d.BackingStore
		for range len(layers) - 2 {
			if below == nil {
				return fmt.Errorf("disk %d: the description has fewer layers than were asked for", i)
			}
			below = below.BackingStore
		}
		if below == nil || below.Source == nil || below.Source.Network == nil {
			return fmt.Errorf("disk %d: the description does not end in an export", i)
		}
		if below.Source.Network.Reconnect != nil {
			continue // this libvirt understood
		}
		if err := h.replaceExport(ctx, dom, fmt.Sprintf("muster-%d-export", i), below.Index, bottom); err != nil {
			return fmt.Errorf("disk %d: %w", i, err)
		}
	}
	return nil
}

// replaceExport puts libvirt's raw layer of that index on an export that waits.
func (h *Hypervisor) replaceExport(ctx context.Context, dom libvirt.Domain, name string, index uint, l vm.Layer) error {
	raw := fmt.Sprintf("libvirt-%d-format", index)
	err := h.command(ctx, dom, "blockdev-add", map[string]any{
		"driver": "nbd", "server": map[string]any{"type": "unix", "path": l.Socket}, "export": l.Export,
		"reconnect-delay": reconnect, "node-name": name, "read-only": true, "discard": "unmap",
	})
	if err != nil {
		return err
	}
	return h.command(ctx, dom, "blockdev-reopen", map[string]any{"options": []any{map[string]any{
		"driver": "raw", "node-name": raw, "read-only": true, "file": name,
	}}})
}

// command has QEMU carry out a command that answers nothing.
func (h *Hypervisor) command(ctx context.Context, dom libvirt.Domain, execute string, arguments map[string]any) error {
	text, err := json.Marshal(map[string]any{"execute": execute, "arguments": arguments})
	if err != nil {
		return err
	}
	var answer string
	err = h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		answer, err = l.QEMUDomainMonitorCommand(dom, string(text), 0)
		return err
	})
	if err != nil {
		return err
	}
	var result struct {
		Error *struct {
			Description string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(answer), &result); err != nil {
		return fmt.Errorf("read QEMU's answer to %s: %w", execute, err)
	}
	if result.Error != nil {
		return fmt.Errorf("QEMU on %s: %s", execute, result.Error.Description)
	}
	return nil
}

// hasExports says whether libvirt knows of exports below the machine's disks.
func hasExports(spec vm.Spec) bool {
	if spec.Hardware.DiskBus == dr.BusNVMe {
		return false
	}
	for _, d := range spec.Disks {
		if d.Layers[len(d.Layers)-1].Socket != "" {
			return true
		}
	}
	return false
}
