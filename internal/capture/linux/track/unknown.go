package track

import "fmt"

// Reason is why it is not known what changed. It is written into records: the words do not change.
type Reason string

// The reasons.
const (
	FirstContact Reason = "first contact" // never tracked, or nothing is left of it: a reboot clears /run
	Rebooted     Reason = "rebooted"      // the server was started since
	Upgraded     Reason = "upgraded"      // other programs were installed since, by an older or newer agent
	Detached     Reason = "detached"      // a program, its link or a map is gone, or not the one that was installed
	Replaced     Reason = "replaced"      // another device has the name
	Resized      Reason = "resized"
	Unbalanced   Reason = "unbalanced"  // the kernel counted other writes than were seen
	Missed       Reason = "missed"      // unbalanced, and the kernel skipped program runs; or it is not known where a discard was
	Overflowed   Reason = "overflowed"  // no place to mark or remember an operation
	Passthrough  Reason = "passthrough" // commands of unknown meaning went to the device
	Slept        Reason = "slept"       // suspended or hibernated: others may have written meanwhile
	Busy         Reason = "busy"        // the counters never stood still long enough to be compared
	Untrackable  Reason = "untrackable" // nothing that could be proved: zoned, DAX, without counters, too many disks
)

var reasons = map[Reason]bool{
	FirstContact: true, Rebooted: true, Upgraded: true, Detached: true, Replaced: true, Resized: true, Unbalanced: true,
	Missed: true, Overflowed: true, Passthrough: true, Slept: true, Busy: true, Untrackable: true,
}

// Unknown says that it is not known what changed on a disk since the last snapshot that was kept. Everything has to be
// compared.
type Unknown struct {
	Disk   string // kernel name
	Reason Reason
	Detail string // a sentence for people
}

func (u *Unknown) Error() string {
	return fmt.Sprintf("track %s: it is not known what changed (%s): %s", u.Disk, u.Reason, u.Detail)
}
