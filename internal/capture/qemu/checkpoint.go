package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/musterdr/muster/internal/image"
)

// Names of checkpoints, and of the bitmaps in the images, which libvirt names alike.
const (
	checkpointPrefix = "muster-snap-"
	maxCheckpoints   = 1024 // of one machine
)

// checkpointName is the checkpoint that begins with a snapshot.
func checkpointName(snapshot string) string { return "muster-" + snapshot }

// checkpoint is one of ours.
type checkpoint struct {
	handle libvirt.DomainCheckpoint
	name   string
	server string
	disks  map[string]string // that have a bitmap, by libvirt's name: which image it was
}

// label is what a checkpoint's description says, for us: whose it is, and of which images.
type label struct {
	Server string            `json:"server"`
	Disks  map[string]string `json:"disks"`
}

// checkpoints lists ours. One whose label does not read covers no disk.
func (s *Source) checkpoints(ctx context.Context, m machine) (ours []checkpoint, err error) {
	err = s.conn.ask(ctx, func(l *libvirt.Libvirt) error {
		ours = nil
		all, _, err := l.DomainListAllCheckpoints(m.dom, 1, 0)
		if err != nil {
			return err
		}
		for _, handle := range all {
			if !strings.HasPrefix(handle.Name, checkpointPrefix) || len(ours) >= maxCheckpoints {
				continue
			}
			text, err := l.DomainCheckpointGetXMLDesc(handle, uint32(libvirt.DomainCheckpointXMLNoDomain))
			if err != nil {
				return err
			}
			var x libvirtxml.DomainCheckpoint
			var about label
			c := checkpoint{handle: handle, name: handle.Name}
			if x.Unmarshal(text) == nil && json.Unmarshal([]byte(x.Description), &about) == nil {
				c.server, c.disks = about.Server, about.Disks
			}
			ours = append(ours, c)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the checkpoints of %s: %w", m.name, err)
	}
	return ours, nil
}

// checkpointXML describes the checkpoint that begins with a backup. Only qcow2 images hold bitmaps.
func checkpointXML(name, server string, disks []disk) (string, error) {
	about := label{Server: server, Disks: map[string]string{}}
	x := libvirtxml.DomainCheckpoint{Name: name, Disks: &libvirtxml.DomainCheckpointDisks{}}
	for _, d := range disks {
		kind := "no"
		if d.format == "qcow2" {
			kind, about.Disks[d.target] = "bitmap", d.identity
		}
		x.Disks.Disks = append(x.Disks.Disks, libvirtxml.DomainCheckpointDisk{Name: d.target, Checkpoint: kind})
	}
	text, err := json.Marshal(about)
	if err != nil {
		return "", err
	}
	x.Description = string(text)
	return x.Marshal()
}

// removeCheckpoints removes those of ours that are to go.
func (s *Source) removeCheckpoints(ctx context.Context, m machine, goes func(checkpoint) bool) error {
	all, err := s.checkpoints(ctx, m)
	if err != nil {
		return err
	}
	for _, c := range all {
		if !goes(c) {
			continue
		}
		if err := s.removeCheckpoint(ctx, m, c); err != nil {
			return fmt.Errorf("remove checkpoint %s of %s: %w", c.name, m.name, err)
		}
	}
	return nil
}

// removeCheckpoint removes a checkpoint with its bitmaps. Of a machine that is shut off libvirt forgets it, and the bitmaps
// are taken out of the images here. A bitmap that is broken already is no reason to keep the rest.
func (s *Source) removeCheckpoint(ctx context.Context, m machine, c checkpoint) error {
	remove := func(flags libvirt.DomainCheckpointDeleteFlags) error {
		err := s.conn.ask(ctx, func(l *libvirt.Libvirt) error { return l.DomainCheckpointDelete(c.handle, flags) })
		if code(err) == libvirt.ErrNoDomainCheckpoint {
			return nil
		}
		return err
	}
	if m.running {
		if remove(0) == nil {
			return nil
		}
		return remove(libvirt.DomainCheckpointDeleteMetadataOnly)
	}
	for _, d := range m.disks {
		if _, has := c.disks[d.target]; has && d.path != "" {
			if err := removeBitmap(ctx, d, c.name); err != nil {
				return err
			}
		}
	}
	return remove(libvirt.DomainCheckpointDeleteMetadataOnly)
}

// removeBitmap takes a bitmap out of an image that no QEMU has open. One that is not there is no error.
func removeBitmap(ctx context.Context, d disk, name string) error {
	place, err := placeOf(d, false)
	if err != nil {
		return err
	}
	mark, err := image.LookAt(d.path)
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "qemu-img", "bitmap", "--remove", place, name).CombinedOutput()
	if err == nil {
		return nil
	}
	if now, look := image.LookAt(d.path); look == nil && now == mark && strings.Contains(string(out), "not found") {
		return nil
	}
	return fmt.Errorf("take a bitmap out of %s: %w: %s", d.path, err, strings.TrimSpace(string(out)))
}

// placeOf names an image to QEMU's tools. Shared, they take no lock on it.
func placeOf(d disk, shared bool) (string, error) {
	driver := "file"
	if !d.file {
		driver = "host_device"
	}
	at := map[string]any{"driver": d.format, "file": map[string]any{"driver": driver, "filename": d.path}}
	if shared {
		at["force-share"] = true
	}
	text, err := json.Marshal(at)
	return "json:" + string(text), err
}
