package boottest

import (
	"context"
	"fmt"
	"time"

	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/vm"
)

// tooBusy is the part of the time that a guest waited for a processor from which on what did not come up says nothing of it: what
// takes long then runs into limits inside, as the minute and a half that systemd gives a service. Measured on a host of two processors that
// emulates: with the processors for itself a boot of 40 s waited 9 % of the time; beside other work 54 %, took twice as long, and passed; beside
// ten busy loops more 80 %, which is a fifth of the speed.
const tooBusy = 0.7

// sure are the codes of what no want of processor time brings about: a FAIL with one of them stays one on any host.
var sure = map[dr.Code]bool{dr.CodeNoBootable: true, dr.CodeGrubRescue: true, dr.CodeDiskError: true}

// excuse takes a FAIL back that a host without time for the guest may have brought about. A pass stays a pass.
func excuse(v *dr.Verdict, waited float64) {
	if v.Outcome != dr.Fail || sure[v.Code] || waited < tooBusy {
		return
	}
	v.Summary = fmt.Sprintf("the host was too busy: the guest waited %.0f %% of the time for a processor. Seen was %s: %s", waited*100, v.Code, v.Summary)
	v.Outcome, v.Code = dr.Inconclusive, dr.CodeHostBusy
}

// meter measures how long a guest has to wait for a processor.
type meter struct {
	from, to    time.Time
	first, last vm.Usage
}

// read asks the hypervisor. What a machine that is gone used is what was read of it last.
func (m *meter) read(ctx context.Context, machine vm.Machine, now time.Time) (vm.Usage, bool) {
	u, err := machine.Usage(ctx)
	if err != nil {
		return m.last, false
	}
	if m.from.IsZero() {
		m.from, m.first = now, u
	}
	m.to, m.last = now, u
	return u, true
}

// waited is the part, 0 to 1, of the time for which a guest wanted a processor and was given none. A guest is taken to want one
// all the time at least: of one that slept, and had to wait whenever it woke, something else was missing.
func (m *meter) waited() float64 {
	waited := m.last.Waited - m.first.Waited
	if waited <= 0 {
		return 0
	}
	wanted := max(waited+m.last.CPU-m.first.CPU, m.to.Sub(m.from))
	return float64(waited) / float64(wanted)
}
