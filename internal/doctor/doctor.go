// Package doctor says what a host can do for Muster, what it lacks, and the command that gives it that.
//
//	Patient  what the caller knows of the host: its folders, its hypervisor
//	signs    what was seen: files of the kernel, versions of programs, the clock, free space
//	finding  one thing judged from the signs: ok, warn (works, but worse), fail (something will not work)
//
// Seeing and judging are apart: judging is a function of the signs.
//
// Knows: programs, kernel files and limits that recovering servers needs.
// Must not know: servers, images, and how a machine is started.
package doctor

import (
	"context"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/vm"
)

// Patient is what the caller knows of the host.
type Patient struct {
	Data       string   // folder of the installation; it need not exist yet
	Store      string   // folder of the store; "" if it does not lie in a folder of this host
	Machines   *vm.Host // what the hypervisor says; nil if it could not be asked
	Hypervisor error    // why it could not be asked
	AppArmor   []string // the rules QEMU needs where AppArmor confines it
	// ProbeKVM runs a guest where the hypervisor could not be asked, and says why that did not work; "" if it did.
	ProbeKVM func(context.Context) string

	// Appliance: the host only captures, keeps and sends. It boots no machine, and Store is its near one.
	Appliance bool
	Files     func() error // why images cannot be looked into for single files now, in a sentence that says what to do; asked of an appliance
}

// The states of a finding.
const (
	ok   = "ok"
	warn = "warn"
	fail = "fail"
)

// Examine looks at this host and says what it found, the same findings in the same order each time. Every Fix is a
// command to paste, as root. It takes up to a few seconds: without a hypervisor to ask, KVM is probed by running a guest.
func Examine(ctx context.Context, p Patient) []api.Finding {
	return judge(p, look(ctx, "/", p))
}
