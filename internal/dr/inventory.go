package dr

import "time"

// Inventory is what was true of a server, in hardware and software, when a snapshot was taken. It is captured on
// the server by the agent, or, for a bare disk image, left empty but for the disks: then pre-recovery decides from
// the image alone. It comes from a customer's machine and is untrusted: it is data to compare with, never code.
type Inventory struct {
	Taken    time.Time `json:"taken"`
	Hostname string    `json:"hostname,omitempty"`
	Firmware Firmware  `json:"firmware,omitempty"` // "" unknown
	SMBIOS   SMBIOS    `json:"smbios"`
	CPU      CPU       `json:"cpu"`
	Memory   int64     `json:"memory,omitempty"` // bytes
	Kernel   string    `json:"kernel,omitempty"` // uname -r
	Distro   Distro    `json:"distro"`
	Machine  string    `json:"machine_id,omitempty"`
	BootID   string    `json:"boot_id,omitempty"`
	Virt     string    `json:"virt,omitempty"` // systemd-detect-virt: none, kvm, vmware, …

	Disks       []InventoryDisk `json:"disks"`
	Volumes     []Volume        `json:"volumes,omitempty"` // LVM, md, LUKS, partitions as lsblk shows them
	Filesystems []Filesystem    `json:"filesystems,omitempty"`
	Swaps       []string        `json:"swaps,omitempty"`
	NICs        []NIC           `json:"nics,omitempty"`
	Routes      []Route         `json:"routes,omitempty"`
	Resolvers   []string        `json:"resolvers,omitempty"`

	EnabledUnits []string   `json:"enabled_units,omitempty"`
	ActiveUnits  []string   `json:"active_units,omitempty"` // services active at capture
	FailedUnits  []string   `json:"failed_units,omitempty"` // the baseline: failed already on the original
	Listening    []Listener `json:"listening,omitempty"`
	Processes    []string   `json:"processes,omitempty"` // distinct command names of user-space processes
	InitState    string     `json:"init_state,omitempty"`
	Timezone     string     `json:"timezone,omitempty"`
	RTCLocal     bool       `json:"rtc_local,omitempty"` // the hardware clock runs on local time
}

// Firmware is how a machine starts.
type Firmware string

// The two firmwares.
const (
	BIOS Firmware = "bios"
	UEFI Firmware = "uefi"
)

// SMBIOS are the identifying strings of a machine's firmware tables (DMTF DSP0134); licences hang on them.
type SMBIOS struct {
	UUID          string `json:"uuid,omitempty"`
	Manufacturer  string `json:"manufacturer,omitempty"`
	Product       string `json:"product,omitempty"`
	Version       string `json:"version,omitempty"`
	Serial        string `json:"serial,omitempty"`
	SKU           string `json:"sku,omitempty"`
	Family        string `json:"family,omitempty"`
	BIOSVendor    string `json:"bios_vendor,omitempty"`
	BIOSVersion   string `json:"bios_version,omitempty"`
	BIOSDate      string `json:"bios_date,omitempty"`
	BoardVendor   string `json:"board_vendor,omitempty"`
	BoardProduct  string `json:"board_product,omitempty"`
	BoardSerial   string `json:"board_serial,omitempty"`
	ChassisAsset  string `json:"chassis_asset,omitempty"`
	ChassisSerial string `json:"chassis_serial,omitempty"`
}

// CPU describes the processors.
type CPU struct {
	Model string `json:"model,omitempty"`
	Count int    `json:"count,omitempty"` // logical processors
	Level int    `json:"level,omitempty"` // x86-64-v1 … v4; 0 unknown
}

// Distro is what /etc/os-release says.
type Distro struct {
	ID      string   `json:"id,omitempty"`
	Like    []string `json:"like,omitempty"`
	Version string   `json:"version,omitempty"`
	Name    string   `json:"name,omitempty"` // PRETTY_NAME
}

// InventoryDisk is one whole disk of the server. Its position in Inventory.Disks is its number in the snapshot.
type InventoryDisk struct {
	Name       string `json:"name"` // kernel name on the source without /dev/: sda, nvme0n1, vda
	Size       int64  `json:"size"` // bytes
	SectorSize int    `json:"sector_size,omitempty"`
	Serial     string `json:"serial,omitempty"`
	WWN        string `json:"wwn,omitempty"`
	Model      string `json:"model,omitempty"`
	Transport  string `json:"transport,omitempty"` // sata, nvme, virtio, scsi, …
	Rotational bool   `json:"rotational,omitempty"`
	PTUUID     string `json:"ptuuid,omitempty"`
	Boot       bool   `json:"boot,omitempty"` // holds / or /boot
}

// Volume is anything stacked on a disk.
type Volume struct {
	Name     string   `json:"name"` // kernel or mapper path, /dev/sda1, /dev/mapper/vg-root
	Type     string   `json:"type"` // part, lvm, raid1, crypt, …
	Size     int64    `json:"size,omitempty"`
	FSType   string   `json:"fstype,omitempty"` // also LVM2_member, crypto_LUKS, linux_raid_member, swap
	UUID     string   `json:"uuid,omitempty"`
	PartUUID string   `json:"partuuid,omitempty"`
	Label    string   `json:"label,omitempty"`
	Parents  []string `json:"parents,omitempty"`
}

// Filesystem is one mounted file system.
type Filesystem struct {
	Device  string `json:"device"`
	Mount   string `json:"mount"`
	Type    string `json:"type"`
	Options string `json:"options,omitempty"`
	UUID    string `json:"uuid,omitempty"`
	Size    int64  `json:"size,omitempty"`
	Used    int64  `json:"used,omitempty"`
}

// NIC is a network interface, physical or not.
type NIC struct {
	Name      string   `json:"name"`
	MAC       string   `json:"mac"`                 // current address
	Permanent string   `json:"permanent,omitempty"` // burnt-in address where it differs in kind (bonds, bridges)
	Addresses []string `json:"addresses,omitempty"` // CIDR
	Kind      string   `json:"kind,omitempty"`      // "" physical; bond, bridge, vlan, veth, …
	Master    string   `json:"master,omitempty"`
	Driver    string   `json:"driver,omitempty"`
	Up        bool     `json:"up,omitempty"`
	MTU       int      `json:"mtu,omitempty"`
	DHCP      bool     `json:"dhcp,omitempty"`
}

// Physical says whether the interface stands for a device rather than being made by software.
func (n NIC) Physical() bool { return n.Kind == "" && n.MAC != "" && n.Name != "lo" }

// Route is one entry of the main routing table.
type Route struct {
	Destination string `json:"destination"` // CIDR, or "default"
	Gateway     string `json:"gateway,omitempty"`
	Device      string `json:"device,omitempty"`
	Metric      int    `json:"metric,omitempty"`
}

// Listener is a socket that waits for connections.
type Listener struct {
	Proto   string `json:"proto"` // tcp, udp (IPv6 folded in)
	Address string `json:"address"`
	Port    int    `json:"port"`
	Process string `json:"process,omitempty"`
}

// Baseline is what a boot test expects to find again: the part of an Inventory that a carbon copy shows.
type Baseline struct {
	Hostname    string       `json:"hostname,omitempty"`
	Machine     string       `json:"machine_id,omitempty"`
	Kernel      string       `json:"kernel,omitempty"`
	Distro      Distro       `json:"distro"`
	FailedUnits []string     `json:"failed_units,omitempty"`
	ActiveUnits []string     `json:"active_units,omitempty"`
	Listening   []Listener   `json:"listening,omitempty"`
	Processes   []string     `json:"processes,omitempty"`
	NICs        []NIC        `json:"nics,omitempty"`
	Filesystems []Filesystem `json:"filesystems,omitempty"`
	Timezone    string       `json:"timezone,omitempty"`
}

// Baseline extracts from an inventory what its carbon copy must show. An empty inventory gives an empty baseline,
// against which only the explicit checks count.
func (i Inventory) Baseline() Baseline {
	return Baseline{
		Hostname: i.Hostname, Machine: i.Machine, Kernel: i.Kernel, Distro: i.Distro,
		FailedUnits: i.FailedUnits, ActiveUnits: i.ActiveUnits, Listening: i.Listening, Processes: i.Processes,
		NICs: i.NICs, Filesystems: i.Filesystems, Timezone: i.Timezone,
	}
}
