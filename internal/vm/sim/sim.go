// Package sim is a hypervisor without machines: guests are Go code that boots in no time. It exists so that whatever
// sits on vm can be tested in milliseconds and in ways that real guests cannot be made to misbehave. It keeps the same
// promises as vm/libvirt; vmtest holds both to them.
//
//	Host        the make-believe host: memory, machines; it outlives every Hypervisor opened on it, as a real one would
//	Guest       what a machine does from power-on to power-off, written by the test
//	Computer    what a Guest sees: serial port, agent's ports, screen, power button, disks
//
// A test that "crashes" its own process forgets its Hypervisor, opens another on the same Host and finds its machines
// still running.
//
// Knows: the promises of vm.
// Must not know: the conversation of probe, what a boot test looks for.
package sim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

const (
	defaultMemory = 64 << 30 // bytes of a Host that says nothing else
	maxDir        = 80       // bytes of Spec.Dir, as for the real sockets
)

// Host is a make-believe host. Its zero value runs guests that find nothing to boot. Set the fields before first use.
type Host struct {
	// Boot gives the guest that a machine of this spec is. Nil: nothing bootable on any disk.
	Boot func(spec vm.Spec) Guest
	// Memory is what there is for machines, in bytes. 0: 64 GiB.
	Memory int64

	mu       sync.Mutex
	machines map[string]*machine
}

// Open gives a hypervisor on the host. Closing it stops no machine.
func (h *Host) Open() *Hypervisor { return &Hypervisor{host: h} }

// Close pulls the plug of every machine and waits until their guests have returned.
func (h *Host) Close() error {
	h.mu.Lock()
	all := make([]*machine, 0, len(h.machines))
	for _, m := range h.machines {
		all = append(all, m)
	}
	h.mu.Unlock()
	var errs []error
	for _, m := range all {
		errs = append(errs, m.stop(context.Background()))
	}
	return errors.Join(errs...)
}

func (h *Host) memory() int64 {
	if h.Memory > 0 {
		return h.Memory
	}
	return defaultMemory
}

// free is what no machine holds. The caller holds the lock.
func (h *Host) free() int64 {
	free := h.memory()
	for _, m := range h.machines {
		free -= int64(m.spec.Hardware.Memory) << 20
	}
	return free
}

// Hypervisor is one process's view of a Host.
type Hypervisor struct {
	host   *Host
	mu     sync.Mutex
	closed bool
}

var _ vm.Hypervisor = (*Hypervisor)(nil)

func (v *Hypervisor) check(ctx context.Context) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return errors.New("the hypervisor was closed")
	}
	return ctx.Err()
}

// Host says what the make-believe host can do.
func (v *Hypervisor) Host(ctx context.Context) (vm.Host, error) {
	if err := v.check(ctx); err != nil {
		return vm.Host{}, fmt.Errorf("ask host: %w", err)
	}
	v.host.mu.Lock()
	defer v.host.mu.Unlock()
	return vm.Host{
		Accelerator: "tcg", KVMReason: "the machines of this host are make-believe", Emulator: "sim", Version: "1",
		UEFI: true, Memory: v.host.memory(), Free: v.host.free(), CPUs: 4,
	}, nil
}

// Start starts a machine.
func (v *Hypervisor) Start(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	if err := v.check(ctx); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	if err := plausible(spec); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	h := v.host
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.machines[spec.Name] != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, vm.ErrExists)
	}
	if need, free := int64(spec.Hardware.Memory)<<20, h.free(); need > free {
		return nil, fmt.Errorf("start %s: %d MiB are needed, %d MiB are free: %w", spec.Name, need>>20, free>>20, vm.ErrCapacity)
	}
	var guest Guest = nothing{}
	if h.Boot != nil {
		guest = h.Boot(spec)
	}
	m, err := power(h, spec, guest)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	if h.machines == nil {
		h.machines = map[string]*machine{}
	}
	h.machines[spec.Name] = m
	return m, nil
}

// Find gives a running machine by name.
func (v *Hypervisor) Find(ctx context.Context, name string) (vm.Machine, error) {
	if err := v.check(ctx); err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	v.host.mu.Lock()
	defer v.host.mu.Unlock()
	m := v.host.machines[name]
	if m == nil {
		return nil, fmt.Errorf("find %s: %w", name, vm.ErrGone)
	}
	return m, nil
}

// List gives every machine, by name.
func (v *Hypervisor) List(ctx context.Context) ([]vm.Owned, error) {
	if err := v.check(ctx); err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	v.host.mu.Lock()
	defer v.host.mu.Unlock()
	var list []vm.Owned
	for name, m := range v.host.machines {
		list = append(list, vm.Owned{Name: name, Owner: m.spec.Owner})
	}
	slices.SortFunc(list, func(a, b vm.Owned) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// Close closes the view. Machines run on.
func (v *Hypervisor) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closed = true
	return nil
}

// plausible refuses what the real hypervisor would refuse.
func plausible(spec vm.Spec) error {
	if err := dr.ValidateID(spec.Name); err != nil {
		return err
	}
	hw := spec.Hardware
	switch {
	case len(spec.Dir) == 0 || spec.Dir[0] != '/' || len(spec.Dir) >= maxDir:
		return fmt.Errorf("folder %q must be absolute and shorter than %d bytes", spec.Dir, maxDir)
	case hw.CPUs < 1 || hw.Memory < 1:
		return fmt.Errorf("%d processors and %d MiB of memory are no machine", hw.CPUs, hw.Memory)
	case len(spec.Disks) != len(hw.Disks):
		return fmt.Errorf("%d disks for hardware of %d", len(spec.Disks), len(hw.Disks))
	case len(spec.Networks) != len(hw.NICs):
		return fmt.Errorf("%d networks for hardware with %d network cards", len(spec.Networks), len(hw.NICs))
	}
	if info, err := os.Stat(spec.Dir); err != nil || !info.IsDir() {
		return fmt.Errorf("folder %s of the machine does not exist", spec.Dir)
	}
	for i, disk := range spec.Disks {
		if len(disk.Layers) == 0 {
			return fmt.Errorf("disk %d has no layer", i)
		}
		if disk.Layers[0].Path == "" {
			return fmt.Errorf("disk %d: the top layer must be a file, an export is only read", i)
		}
		for _, layer := range disk.Layers {
			path := layer.Path + layer.Socket
			if _, err := os.Stat(path); err != nil {
				return fmt.Errorf("disk %d: layer %q cannot be opened", i, path)
			}
		}
	}
	return nil
}
