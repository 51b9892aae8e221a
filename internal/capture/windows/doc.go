// Package windows reads a running Windows system from inside: what it is made of, and its disks at one instant, through
// shadow copies of its volumes (VSS).
//
//	Extent, ParseExtents   where a volume lies on disks
//	FreeClusters           what of a volume its file system says holds nothing
//	Disk                   a whole disk, \\.\PhysicalDriveN
//	Shadows                shadow copies of the volumes on some disks, and the disks as they were then
//	Inventory              what the system is made of
//
// A shadow copy is a volume as it was: in the view of a disk the volume's range is read from it, and the rest (partition
// table, boot partitions, volumes without a letter) from the disk itself. What reads the bytes that Windows answers with is
// plain Go and tested everywhere; what asks Windows is built and vetted, and has not been run on Windows yet.
//
// Knows: volumes, shadow copies, the codes that Windows' devices are asked with.
// Must not know: the wire, SSH, the store, why somebody asks.
package windows
