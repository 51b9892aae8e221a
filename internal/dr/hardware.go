package dr

import "time"

// Hardware is the virtual hardware on which a rescue image boots: chosen so that the image needs as few edits as
// possible. It is kept with the pre-recovery and used by every boot of that image, test or real.
type Hardware struct {
	Firmware Firmware   `json:"firmware"`
	Machine  string     `json:"machine"`   // QEMU machine family: q35 or pc
	CPULevel int        `json:"cpu_level"` // x86-64-vN the guest needs at least; 0: no demand
	CPUs     int        `json:"cpus"`
	Memory   int        `json:"memory_mib"` // MiB
	DiskBus  DiskBus    `json:"disk_bus"`
	NICModel NICModel   `json:"nic_model"`
	Disks    []HWDisk   `json:"disks"`
	NICs     []HWNIC    `json:"nics"`
	SMBIOS   SMBIOS     `json:"smbios"`
	RTCLocal bool       `json:"rtc_local,omitempty"`
	Channel  GuestPort  `json:"channel"`           // where the test agent answers
	Reasons  []Decision `json:"reasons,omitempty"` // why each choice was made, for --explain
}

// Decision is one choice with its reason.
type Decision struct {
	What   string `json:"what"`   // "disk bus", "firmware", …
	Chosen string `json:"chosen"` // "virtio"
	Reason string `json:"reason"` // "virtio_blk is in the initramfs of 6.1.0-25-amd64"
}

// HWDisk carries a source disk's identity over to the virtual one.
type HWDisk struct {
	Serial string `json:"serial,omitempty"`
	WWN    string `json:"wwn,omitempty"` // only buses that can carry it
	Boot   bool   `json:"boot,omitempty"`
}

// HWNIC carries a source NIC's identity over.
type HWNIC struct {
	MAC  string `json:"mac"`
	Name string `json:"name,omitempty"` // what the guest calls it
}

// DiskBus is a virtual disk controller.
type DiskBus string

// The rungs of the disk ladder, best first.
const (
	BusNVMe       DiskBus = "nvme"
	BusVirtio     DiskBus = "virtio"
	BusVirtioSCSI DiskBus = "virtio-scsi"
	BusSATA       DiskBus = "sata"
	BusLSI        DiskBus = "lsi"     // lsi53c895a, sym53c8xx
	BusMegaSAS    DiskBus = "megasas" // megaraid_sas
	BusMPTSAS     DiskBus = "mptsas"  // mptsas1068
	BusPVSCSI     DiskBus = "pvscsi"  // vmw_pvscsi
	BusIDE        DiskBus = "ide"
)

// NICModel is a virtual network card.
type NICModel string

// The rungs of the NIC ladder, best first.
const (
	NICVirtio  NICModel = "virtio"
	NICE1000e  NICModel = "e1000e"
	NICE1000   NICModel = "e1000"
	NICVMXNet3 NICModel = "vmxnet3"
	NICRTL8139 NICModel = "rtl8139"
)

// GuestPort is the device on which the test agent is reached.
type GuestPort string

// The two ports. The virtual machine always has both; the guest uses the best it has a driver for.
const (
	PortVirtio GuestPort = "virtio-serial" // /dev/virtio-ports/org.muster.guest.0
	PortISA    GuestPort = "isa-serial"    // second serial port, ttyS1
)

// PreRecovery is what was done to an unbooted image to make it a rescue image. The changed bytes themselves are the
// delta, one qcow2 file a disk.
type PreRecovery struct {
	ID         string      `json:"id"`
	SnapshotID string      `json:"snapshot_id"`
	Silo       string      `json:"silo,omitempty"` // that made it
	Hardware   Hardware    `json:"hardware"`
	Overlays   []string    `json:"overlays"` // "name@version" applied, in order
	Edits      []Edit      `json:"edits"`
	Facts      Facts       `json:"facts"`
	Deltas     []string    `json:"deltas"` // paths on the silo, one a disk, same order as the snapshot's
	Notes      []Decision  `json:"notes,omitempty"`
	Data       *MergedData `json:"data,omitempty"` // what was put into the image; nil for none
}

// MergedData says which data was put into an image.
type MergedData struct {
	Snapshot   string    `json:"snapshot"`
	Taken      time.Time `json:"taken"`
	Image      string    `json:"image"`
	ImageTaken time.Time `json:"image_taken"`
	Roots      []string  `json:"roots"`
	Entries    int64     `json:"entries"` // names of the data
	Written    int64     `json:"written"` // files that the image had not, or had otherwise
	Bytes      int64     `json:"bytes"`   // of content in them
	Removed    int64     `json:"removed"` // files and whole folders that the data has not any more
}

// Edit is one change to the unbooted image.
type Edit struct {
	Overlay string `json:"overlay"` // "name@version"
	Action  string `json:"action"`  // write, replace, remove, link, mkdir, copy, chmod
	Path    string `json:"path"`    // in the image
	Reason  string `json:"reason"`
	Before  string `json:"before,omitempty"` // sha256 of the old content, "" if there was none
	After   string `json:"after,omitempty"`  // sha256 of the new content, "" if there is none
	Diff    string `json:"diff,omitempty"`   // for text: what changed, limited in length
	Reverse string `json:"reverse"`          // how failback takes it back
}

// Facts are what pre-recovery found inside the unbooted image. Hostile input: every string is data.
type Facts struct {
	Firmware   Firmware          `json:"firmware"`
	PartTable  string            `json:"part_table,omitempty"` // gpt, dos
	RootDevice string            `json:"root_device,omitempty"`
	RootFS     string            `json:"root_fs,omitempty"`
	Distro     Distro            `json:"distro"`
	Arch       string            `json:"arch,omitempty"`
	Hostname   string            `json:"hostname,omitempty"`
	Init       string            `json:"init,omitempty"` // systemd, openrc, sysv
	Kernels    []KernelFacts     `json:"kernels,omitempty"`
	Default    string            `json:"default_kernel,omitempty"`
	UUIDs      map[string]string `json:"uuids,omitempty"` // device as on the appliance or source → UUID
	Network    string            `json:"network,omitempty"`
	SELinux    string            `json:"selinux,omitempty"` // enforcing, permissive, disabled, ""
}

// KernelFacts is one installed kernel and what its early user space can drive.
type KernelFacts struct {
	Version   string   `json:"version"`
	Initramfs string   `json:"initramfs,omitempty"`
	Drivers   []string `json:"drivers,omitempty"` // of the ladder's drivers: in the initramfs or built in
	Modules   []string `json:"modules,omitempty"` // of the ladder's drivers: under /lib/modules
}
