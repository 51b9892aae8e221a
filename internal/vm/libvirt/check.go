package libvirt

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

// check refuses a Spec that cannot be started, before anything is touched.
func check(spec vm.Spec) error {
	if err := dr.ValidateID(spec.Name); err != nil {
		return err
	}
	hw := spec.Hardware
	switch {
	case !filepath.IsAbs(spec.Dir) || len(spec.Dir) >= maxDir:
		return fmt.Errorf("folder %q must be absolute and shorter than %d bytes", spec.Dir, maxDir)
	case hw.Machine != "q35" && hw.Machine != "pc":
		return fmt.Errorf("machine %q: use q35 or pc", hw.Machine)
	case hw.Firmware != dr.BIOS && hw.Firmware != dr.UEFI:
		return fmt.Errorf("firmware %q: use bios or uefi", hw.Firmware)
	case hw.CPUs < 1 || hw.CPUs > maxCPUs:
		return fmt.Errorf("%d processors: use 1 to %d", hw.CPUs, maxCPUs)
	case hw.Memory < 16 || hw.Memory > maxMemory:
		return fmt.Errorf("%d MiB of memory: use 16 to %d", hw.Memory, maxMemory)
	}
	if info, err := os.Stat(spec.Dir); err != nil {
		return fmt.Errorf("folder of the machine: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("folder of the machine: %s is not a folder", spec.Dir)
	}
	return errors.Join(checkDisks(spec), checkNetworks(spec))
}

func checkDisks(spec vm.Spec) error {
	hw := spec.Hardware
	max := buses[hw.DiskBus].max
	if hw.DiskBus == dr.BusNVMe {
		max = maxNVMe
	}
	switch {
	case len(spec.Disks) != len(hw.Disks):
		return fmt.Errorf("%d disks for hardware of %d", len(spec.Disks), len(hw.Disks))
	case len(spec.Disks) == 0:
		return nil
	case max == 0:
		return fmt.Errorf("disk bus %q is unknown", hw.DiskBus)
	case len(spec.Disks) > max:
		return fmt.Errorf("%d disks on a %s bus: it takes %d", len(spec.Disks), hw.DiskBus, max)
	case hw.DiskBus == dr.BusIDE && hw.Machine != "pc":
		return fmt.Errorf("a %s machine has no IDE disks: use machine pc", hw.Machine)
	}
	for i, d := range spec.Disks {
		if len(d.Layers) == 0 || len(d.Layers) > maxLayers {
			return fmt.Errorf("disk %d has %d layers: use 1 to %d", i, len(d.Layers), maxLayers)
		}
		if d.Layers[0].Socket != "" {
			return fmt.Errorf("disk %d: the top layer must be a file, an export is only read", i)
		}
		for n, l := range d.Layers {
			if err := checkLayer(l, n == len(d.Layers)-1); err != nil {
				return fmt.Errorf("disk %d, layer %d: %w", i, n, err)
			}
		}
	}
	return nil
}

func checkLayer(l vm.Layer, last bool) error {
	path := l.Path
	switch {
	case l.Socket != "" && l.Path != "":
		return errors.New("give a path or a socket, not both")
	case format(l) != "raw" && format(l) != "qcow2":
		return fmt.Errorf("format %q is neither raw nor qcow2", l.Format)
	case format(l) == "raw" && !last:
		return errors.New("nothing can be below a raw layer")
	case l.Socket != "":
		path = l.Socket
	}
	if !filepath.IsAbs(path) {
		return fmt.Errorf("path %q is not absolute", path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if l.Socket != "" && info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is not a socket", path)
	}
	if l.Socket == "" && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", path)
	}
	return nil
}

func checkNetworks(spec vm.Spec) error {
	hw := spec.Hardware
	switch {
	case len(spec.Networks) != len(hw.NICs):
		return fmt.Errorf("%d networks for hardware with %d network cards", len(spec.Networks), len(hw.NICs))
	case len(hw.NICs) > maxNICs:
		return fmt.Errorf("%d network cards: use at most %d", len(hw.NICs), maxNICs)
	case len(hw.NICs) > 0 && !slices.Contains(nicNames, hw.NICModel):
		return fmt.Errorf("network card %q is unknown", hw.NICModel)
	}
	for i, nic := range hw.NICs {
		if !macRE.MatchString(nic.MAC) {
			return fmt.Errorf("network card %d: %q is no unicast MAC address", i, nic.MAC)
		}
		bridge := spec.Networks[i].Bridge
		if bridge == "" {
			continue
		}
		if !bridgeRE.MatchString(bridge) {
			return fmt.Errorf("network %d: %q is no name of a bridge", i, bridge)
		}
		if _, err := os.Stat("/sys/class/net/" + bridge + "/bridge"); err != nil {
			return fmt.Errorf("network %d: there is no bridge %s on this host", i, bridge)
		}
	}
	return nil
}

// leavings are the files that a start which failed has to take away again.
type leavings []string

func (l leavings) remove() {
	for _, path := range l {
		_ = os.Remove(path)
	}
}

// prepare gives QEMU's group what it needs of the files in a Spec and makes the NVRAM. Layers keep their owner; the
// group of a top layer may write it, that of a layer below may only read it.
func (h *Hypervisor) prepare(spec vm.Spec, host vm.Host) (made leavings, err error) {
	for _, name := range []string{serialLog, isaSocket, portSocket} {
		path := filepath.Join(spec.Dir, name)
		if _, err := os.Lstat(path); err == nil {
			if err := os.Remove(path); err != nil {
				return made, fmt.Errorf("remove what an earlier machine left: %w", err)
			}
		}
		made = append(made, path)
	}
	if err := h.admit(spec.Dir, 0o010); err != nil {
		return made, err
	}
	for _, d := range spec.Disks {
		for n, l := range d.Layers {
			if l.Path == "" {
				continue
			}
			bits := fs.FileMode(0o040)
			if n == 0 {
				bits = 0o060
			}
			if err := h.admit(l.Path, bits); err != nil {
				return made, err
			}
		}
	}
	if spec.Hardware.Firmware != dr.UEFI {
		return made, nil
	}
	fw, ok := findFirmware()
	if !ok {
		return made, errors.New("no firmware for UEFI guests on this host: apt install ovmf")
	}
	path := filepath.Join(spec.Dir, vm.NVRAMFile)
	if _, err := os.Stat(path); err == nil {
		return made, h.admit(path, 0o060) // a machine that is started again keeps its variables
	}
	made = append(made, path)
	if err := copyFile(path, fw.vars); err != nil {
		return made, fmt.Errorf("make NVRAM: %w", err)
	}
	return made, h.admit(path, 0o060)
}

// admit adds permissions for QEMU's group to a file, unless everybody has them or the group has them already.
func (h *Hypervisor) admit(path string, bits fs.FileMode) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	everybody := bits >> 3
	if info.Mode().Perm()&everybody == everybody {
		return nil
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || int(stat.Gid) != h.gid {
		if err := os.Chown(path, -1, h.gid); err != nil {
			return fmt.Errorf("let QEMU's group %d use %s: %w", h.gid, path, err)
		}
	}
	if info.Mode().Perm()&bits == bits {
		return nil
	}
	if err := os.Chmod(path, info.Mode().Perm()|bits); err != nil {
		return fmt.Errorf("let QEMU's group %d use %s: %w", h.gid, path, err)
	}
	return nil
}

// explain adds what to do when QEMU was denied a file because of a folder above it.
func (h *Hypervisor) explain(err error, spec vm.Spec) error {
	if !strings.Contains(err.Error(), "ermission denied") {
		return err
	}
	for _, d := range spec.Disks {
		for _, l := range d.Layers {
			for dir := filepath.Dir(l.Path + l.Socket); dir != "/"; dir = filepath.Dir(dir) {
				if !h.enters(dir) {
					return fmt.Errorf("%w (QEMU runs as user %d and cannot enter folder %s: chmod o+x %s)", err, h.uid, dir, dir)
				}
			}
		}
	}
	return err
}

// enters says whether the permission bits of a folder let QEMU pass.
func (h *Hypervisor) enters(dir string) bool {
	info, err := os.Stat(dir)
	if err != nil {
		return true
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch mode := info.Mode().Perm(); {
	case !ok:
		return true
	case int(stat.Uid) == h.uid:
		return mode&0o100 != 0
	case int(stat.Gid) == h.gid:
		return mode&0o010 != 0
	default:
		return mode&0o001 != 0
	}
}

func copyFile(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
