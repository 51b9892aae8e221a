// Package track knows which parts of a server's disks were written since the last snapshot that was kept, without a kernel
// module: small programs that the kernel runs (eBPF) mark every write when it completes, before whoever wrote is told.
//
//	Tracker   what runs in the kernel and the maps it marks, installed or found running
//	Disk      one whole disk of it: take what changed, prove that nothing was missed, keep it or put it back
//	Extent    a byte range in which something was written
//	Unknown   why it is not known what changed, so that everything has to be compared
//
// Programs and maps are pinned: they go on when the agent ends, is killed or replaced by a newer one, until Remove or a
// reboot. A capture goes like this, disk by disk:
//
//	Take          everything since the last kept snapshot, or *Unknown: read it
//	Take …        what was written since the Take before: read it, while the server goes on
//	(freeze)
//	Take          the rest: read it
//	Prove         the kernel's own counters say that no write was missed; if not, *Unknown: compare everything
//	(thaw)
//	Kept          the snapshot is safe: forget what was taken       or Restore, if it was not kept
//
// A Take moves marks from one map, current, to a second, taken. Until Kept nothing is forgotten: the end of the agent at
// any point is the same as Restore. After an *Unknown the tracker has begun afresh at that moment, so what is read after it,
// with the Takes that follow, is whole; but until Kept the next capture will be told the same reason again.
//
// # Not knowing
//
// A write is remembered when it begins, because in some kernels no program is told of some ends: what is left over is taken
// as written. Beyond that nothing that runs in the kernel is trusted to be whole. The sectors that the programs saw written
// and discarded must be those that the kernel counts in /sys/block/X/stat, to the sector. Further: another boot, another
// device of the same name, another size, programs or maps that are gone or not those that were installed, commands of
// unknown meaning (SG_IO, nvme passthrough), a write for which there was no place, a machine that slept. Each is a Reason.
//
// # Sizes and limits
//
// A mark stands for a granule of 16 KiB; for disks above 8 TiB granules double until there are at most 2^29. A bit a granule
// in two maps takes 2 x 8 MiB + 16 KiB of kernel memory for a disk of 1 TiB, 16 KiB and a page for every further GiB or part
// of it. Kernels before 5.12, which have no atomic OR, take a byte instead: 128 MiB. An operation of more than 32 MiB marks whole
// regions of 16 MiB in a map of their own, so that a discard of a whole disk costs no more than a write. A Take gives at
// most 2^20 extents: from there on it joins those that lie close, and gives more than what changed.
//
// At most 256 disks. Linux 5.10 and newer, with BTF; CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN. Disks that have no
// counters, as nvme multipath heads and RAM disks, are never balanced: everything is compared each time. Zoned disks and
// those that are mapped into memory around the block layer (DAX) are not tracked at all. What another machine writes to a shared
// disk nobody here can see. Neither is the erasure of a whole nvme disk by an administrative command (nvme format).
//
// Knows: block devices, eBPF.
// Must not know: what is on a disk, who reads, snapshots.
package track
