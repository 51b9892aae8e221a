// Package libvirt runs machines on QEMU through libvirt's system daemon, so that they outlive our process, are confined
// as the host's distribution confines guests, and show up where an operator looks for them (virsh list).
//
//	Config       where the daemon and the emulator are
//	Hypervisor   the connection; made when needed, made again when libvirtd was restarted
//	domain       what libvirt calls a machine; all of ours are transient and carry their vm.Owner in their metadata
//
// Nothing here waits without a limit: libvirt's calls take no context, so each runs beside its caller, who leaves it
// behind when time is up; a connection on which a call has hung for callLimit is cut.
//
// QEMU runs as the daemon's unprivileged user. libvirt is told to leave the owners of disk files alone (a layer may be
// below many machines at once); Start gives that user's group the access it needs to the files in the Spec, and the
// server of an export does so for its socket.
//
// Knows: libvirt's calls and XML, QEMU's devices and command line, which firmware files distributions install.
// Must not know: how layers are made, what the test agent says, what a network leads to.
package libvirt

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/musterdr/muster/internal/vm"
)

// Config says where things are. The zero value is right on an ordinary host.
type Config struct {
	Socket   string // of libvirtd; "" for the system's
	Emulator string // QEMU for x86-64; "" to look for it
	// ProbeFile keeps the answer to whether KVM works until the host is booted again; "" for no file.
	ProbeFile string
}

const (
	defaultSocket = "/var/run/libvirt/libvirt-sock"

	callLimit  = 30 * time.Second // for one answer of libvirtd
	startLimit = 2 * time.Minute  // for libvirtd to start one machine
	maxCalls   = 64               // calls under way at once
	maxDomains = 4096             // machines of one host
	maxEnded   = 1024             // remembered ends of machines
)

// Hypervisor is a libvirt daemon.
type Hypervisor struct {
	conn     *connection
	config   Config
	emulator string
	uid, gid int // QEMU's

	probing sync.Mutex
	kvm     *verdict // nil until probed

	rooms   sync.Mutex
	pending int64 // bytes of machines that are being started

	lines sync.Mutex
	busy  map[string]bool // sockets of ports that are connected
}

var _ vm.Hypervisor = (*Hypervisor)(nil)

// Open connects to libvirtd and looks for the emulator. Whether KVM works is found out when it is first asked for.
func Open(ctx context.Context, config Config) (*Hypervisor, error) {
	if config.Socket == "" {
		config.Socket = defaultSocket
	}
	h := &Hypervisor{config: config, conn: newConnection(config.Socket), busy: map[string]bool{}}
	emulator, err := findEmulator(config.Emulator)
	if err != nil {
		return nil, fmt.Errorf("open libvirt: %w", err)
	}
	h.emulator = emulator
	var capabilities string
	err = h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		capabilities, err = l.ConnectGetCapabilities()
		return err
	})
	if err == nil {
		h.uid, h.gid, err = qemuUser(capabilities)
	}
	if err != nil {
		_ = h.conn.close()
		return nil, fmt.Errorf("open libvirt: %w", err)
	}
	return h, nil
}

// findEmulator looks where distributions put QEMU for x86-64.
func findEmulator(asked string) (string, error) {
	names := []string{"qemu-system-x86_64", "/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm"}
	if asked != "" {
		names = []string{asked}
	}
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no QEMU for x86-64 (%s): apt install qemu-system-x86", strings.Join(names, ", "))
}

// qemuUser reads from libvirt's capabilities as whom it runs QEMU.
func qemuUser(capabilities string) (uid, gid int, err error) {
	var caps libvirtxml.Caps
	if err := caps.Unmarshal(capabilities); err != nil {
		return 0, 0, fmt.Errorf("read capabilities: %w", err)
	}
	for _, model := range caps.Host.SecModel {
		if model.Name != "dac" {
			continue
		}
		for _, label := range model.Labels {
			user, group, _ := strings.Cut(label.Value, ":")
			uid, err1 := strconv.Atoi(strings.TrimPrefix(user, "+"))
			gid, err2 := strconv.Atoi(strings.TrimPrefix(group, "+"))
			if err1 == nil && err2 == nil {
				return uid, gid, nil
			}
		}
	}
	return 0, 0, errors.New("libvirtd does not say as whom it runs QEMU: connect to qemu:///system, not to a session")
}

// User is the user and group as whom QEMU runs: whoever serves an export on a socket must let that group in.
func (h *Hypervisor) User() (uid, gid int) { return h.uid, h.gid }

// AppArmorRules are the lines that a host with AppArmor needs in /etc/apparmor.d/local/abstractions/libvirt-qemu when
// layers and sockets of exports are kept below root. libvirt itself allows each machine its files; it does not allow
// sockets of exports, nor the layers of NVMe disks, which it does not know.
func AppArmorRules(root string) []string {
	return []string{`"` + root + `/**.sock" rw,`, `"` + root + `/**.qcow2" rwk,`}
}

// Start starts a machine.
func (h *Hypervisor) Start(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	m, err := h.start(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	return m, nil
}

func (h *Hypervisor) start(ctx context.Context, spec vm.Spec) (*machine, error) {
	if err := check(spec); err != nil {
		return nil, err
	}
	host, err := h.Host(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := h.lookup(ctx, spec.Name); err == nil {
		return nil, vm.ErrExists
	} else if !errors.Is(err, vm.ErrGone) {
		return nil, err
	}
	release, err := h.reserve(ctx, spec)
	if err != nil {
		return nil, err
	}
	defer release()

	id := newUUID()
	text, err := describe(spec, host, id)
	if err != nil {
		return nil, err
	}
	made, err := h.prepare(spec, host)
	if err != nil {
		made.remove()
		return nil, err
	}
	dom, err := h.create(ctx, spec, id, text)
	if err != nil {
		made.remove()
		return nil, h.explain(err, spec)
	}
	return &machine{h: h, dom: dom, tag: tagOf(spec)}, nil
}

// create has libvirt start the machine. It sees the call to its end even if the caller no longer waits, because a
// machine that starts after its caller has left would belong to nobody.
func (h *Hypervisor) create(ctx context.Context, spec vm.Spec, id libvirt.UUID, text string) (libvirt.Domain, error) {
	flags := libvirt.DomainNone
	if spec.Paused || hasExports(spec) {
		flags |= libvirt.DomainStartPaused
	}
	patient, cancel := context.WithTimeout(context.WithoutCancel(ctx), startLimit)
	defer cancel()
	var dom libvirt.Domain
	err := h.conn.once(patient, startLimit, func(l *libvirt.Libvirt) (err error) {
		dom, err = l.DomainCreateXML(text, flags)
		return err
	})
	if err == nil {
		err = ctx.Err()
	}
	if err == nil && hasExports(spec) {
		h.patientExports(ctx, dom, spec)
		if !spec.Paused {
			err = h.conn.ask(ctx, func(l *libvirt.Libvirt) error { return l.DomainResume(dom) })
		}
	}
	if err == nil {
		return dom, nil
	}
	if failed := h.destroy(context.WithoutCancel(ctx), libvirt.Domain{Name: spec.Name, UUID: id}); failed != nil {
		err = errors.Join(err, failed)
	}
	if found, lost := h.lookup(context.WithoutCancel(ctx), spec.Name); lost == nil && found.UUID != id {
		return dom, vm.ErrExists // somebody was faster
	}
	return dom, err
}

// destroy pulls the plug of a domain; one that is gone is no error.
func (h *Hypervisor) destroy(ctx context.Context, dom libvirt.Domain) error {
	err := h.conn.ask(ctx, func(l *libvirt.Libvirt) error { return l.DomainDestroyFlags(dom, libvirt.DomainDestroyDefault) })
	if errors.Is(err, vm.ErrGone) {
		return nil
	}
	return err
}

// Find gives a running machine by name.
func (h *Hypervisor) Find(ctx context.Context, name string) (vm.Machine, error) {
	dom, err := h.lookup(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	t, err := h.readTag(ctx, dom)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	return &machine{h: h, dom: dom, tag: t}, nil
}

func (h *Hypervisor) lookup(ctx context.Context, name string) (dom libvirt.Domain, err error) {
	var found libvirt.Domain
	err = h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		found, err = l.DomainLookupByName(name)
		return err
	})
	if err != nil {
		return dom, err
	}
	return found, nil
}

// List gives every machine that carries our metadata, by name.
func (h *Hypervisor) List(ctx context.Context) ([]vm.Owned, error) {
	var doms []libvirt.Domain
	err := h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		doms, _, err = l.ConnectListAllDomains(maxDomains, libvirt.ConnectListDomainsActive)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	var list []vm.Owned
	for _, dom := range doms {
		t, err := h.readTag(ctx, dom)
		if errors.Is(err, vm.ErrGone) {
			continue // not ours, or it ended just now
		}
		if err != nil {
			return nil, fmt.Errorf("list machines: %w", err)
		}
		list = append(list, vm.Owned{Name: dom.Name, Owner: t.owner()})
	}
	slices.SortFunc(list, func(a, b vm.Owned) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// Close cuts the connection. Machines run on.
func (h *Hypervisor) Close() error { return h.conn.close() }

// namespace marks our element in a domain's metadata.
const namespace = "https://musterdr.org/xml/machine/1"

// tag is what a domain's metadata remembers of its Spec.
type tag struct {
	XMLName xml.Name `xml:"machine"`
	Kind    string   `xml:"kind,attr"`
	ID      string   `xml:"id,attr"`
	Term    int64    `xml:"term,attr"`
	Dir     string   `xml:"dir,attr"`
	NVMe    bool     `xml:"nvme,attr,omitempty"` // its disks are not known to libvirt
}

func tagOf(spec vm.Spec) tag {
	return tag{
		Kind: spec.Owner.Kind, ID: spec.Owner.ID, Term: spec.Owner.Term, Dir: spec.Dir, NVMe: hasNVMe(spec),
	}
}

func (t tag) owner() vm.Owner { return vm.Owner{Kind: t.Kind, ID: t.ID, Term: t.Term} }

// readTag reads a domain's metadata. A domain that is not ours is as good as none: ErrGone.
func (h *Hypervisor) readTag(ctx context.Context, dom libvirt.Domain) (t tag, err error) {
	var text string
	err = h.conn.ask(ctx, func(l *libvirt.Libvirt) (err error) {
		text, err = l.DomainGetMetadata(dom, int32(libvirt.DomainMetadataElement), libvirt.OptString{namespace}, libvirt.DomainAffectCurrent)
		return err
	})
	if code(err) == libvirt.ErrNoDomainMetadata {
		return t, fmt.Errorf("%w that we started: another of that name runs", vm.ErrGone)
	}
	if err != nil {
		return t, err
	}
	if err := xml.Unmarshal([]byte(text), &t); err != nil {
		return t, fmt.Errorf("read metadata: %w", err)
	}
	return t, nil
}
