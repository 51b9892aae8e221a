// Package prerecover makes a rescue image of an image: it looks inside the unbooted disks, chooses virtual hardware that
// the system on them already has drivers for, and changes, in a thin layer above them, only what hardware cannot help.
//
//	Opener   opens the disks of an image below fresh deltas (prerecover/guestfs for real, prerecover/tree for speed;
//	         prerecover/editortest proves both alike)
//	Guest    the opened disks: devices, file systems, files; everything read from it is hostile
//	View     what was read of a guest, by value: the input of every decision
//	Facts    what the view says the system is (dr.Facts)
//	Overlay  a named, versioned, reversible set of edits with the condition under which it applies: data, never code
//	Data     files that are newer than the image and are put into it (R22)
//	Edit     one change with its reason, its before and its after (dr.Edit)
//
// # The road
//
//	Open ──► look ──► merge ──► Decide ──► PlanEdits ──► apply ──► Close
//	         View     data      Hardware    edits        delta
//
// Only look, merge and apply touch the guest. Decide and PlanEdits are functions of their arguments, so that what was chosen
// and why can be tested without a disk and explained afterwards. Whatever breaks on the road, the image is untouched,
// because everything is written to the deltas, and the deltas are removed.
//
// Nothing asks a question, nothing runs a program of the guest, nothing regenerates an initramfs or a boot loader's
// configuration. Two guests with the same content cost the same however large their disks are.
//
// Knows: distributions, boot loaders, file formats of /etc, which driver drives which virtual device.
// Must not know: where an image's blocks come from, how a machine is booted, what a verdict is.
package prerecover
