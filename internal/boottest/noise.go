package boottest

import (
	"path"
	"strings"
)

// patterns are shell patterns for whole names.
type patterns []string

func (p patterns) match(name string) bool {
	for _, pattern := range p {
		if ok, _ := path.Match(pattern, name); ok {
			return true
		}
	}
	return false
}

// words are texts that a line may contain.
type words []string

func (w words) match(line string) bool {
	for _, word := range w {
		if strings.Contains(line, word) {
			return true
		}
	}
	return false
}

// outsiders are units that need hardware or a network which an isolated machine does not have. Their failure says
// nothing about the image.
var outsiders = patterns{
	// They wait for, or fetch from, a network.
	"*-wait-online.service", "*-wait-online@*.service", "networking.service", "ifup@*.service", "cloud-*.service",
	"apt-daily*.service", "apt-news.service", "esm-cache.service", "dnf-makecache.service", "dnf-automatic*.service",
	"unattended-upgrades.service", "packagekit*.service", "fwupd*.service", "motd-news.service", "ua-*.service", "ubuntu-advantage*.service",
	"certbot.service", "ntpdate*.service", "chrony-wait.service", "systemd-time-wait-sync.service", "snapd*.service",
	"rhsmcertd.service", "insights-client*.service", "update-notifier-download.service", "geoip*.service",
	// They look after hardware.
	"smartd.service", "smartmontools.service", "mcelog.service", "rasdaemon.service", "edac.service", "ipmi*.service",
	"thermald.service", "irqbalance.service", "lm_sensors.service", "lm-sensors.service", "nvidia-*.service", "microcode.service",
	"multipathd.service", "iscsi*.service", "open-iscsi.service", "fancontrol.service", "upsd.service", "nut-*.service",
	"hv-*.service", "vmtoolsd.service", "open-vm-tools.service", "vboxadd*.service", "xe-daemon.service", "hp*.service",
	"srvadmin*.service", "dsm_*.service", "lldpad.service", "fcoe.service", "watchdog.service", "kdump*.service", "systemd-modules-load.service",
}

// passingProcesses run only while somebody is logged in or something is being done.
var passingProcesses = patterns{
	"sh", "bash", "dash", "zsh", "fish", "sudo", "su", "login", "agetty", "getty", "sleep", "tmux*", "screen", "SCREEN", "less", "more",
	"vi", "vim*", "nano", "top", "htop", "tail", "watch", "man", "ssh", "scp", "rsync", "sftp-server", "sshd-session", "sshd-auth", "ssh-agent", "gpg-agent",
	"cron*", "CRON", "anacron", "run-parts", "apt*", "dpkg*", "dnf*", "yum", "python*", "perl", "awk", "grep", "find", "cat",
	"(sd-pam)", "systemd-tty-ask", "dbus-daemon --session", "dhclient", "dhcpcd", "muster-*", "postgres: *", "kworker*",
	"open-vm-tools", "vmtoolsd", "VGAuthService", "VBoxService", "xe-daemon", "qemu-ga", "smartd", "mcelog", "irqbalance", "thermald",
}

// brokenKernel tells of the kernel itself, or of a file system on an image that should be sound.
var brokenKernel = words{
	"Oops", "kernel BUG at", "BUG: ", "general protection fault", "unable to handle", "Internal error:",
	"EXT4-fs error", "BTRFS error", "BTRFS critical", "XFS (", "Remounting filesystem read-only",
}

// slowHost is what a kernel says that had to wait for its host.
var slowHost = words{"soft lockup", "hard LOCKUP", "detected stall", "blocked for more than", "workqueue lockup"}

// kernelNoise is what kernels say of virtual hardware, or of hardware that is not there.
var kernelNoise = words{
	"dev fd0", "floppy", "dev sr0", "i8042", "psmouse", "atkbd", "piix4_smbus", "i801_smbus", "SMBus", "rtc_cmos", "RAPL", "rapl",
	"regulatory.db", "regulatory.0", "kvm: disabled by", "kvm_intel", "kvm_amd", "SVM not supported", "VMX", "SGX", "Spectre", "MDS: ", "MMIO Stale Data", "RETBleed",
	"mtrr", "x86/cpu", "microcode", "firmware: failed to load", "Direct firmware load", "ACPI Error", "ACPI BIOS Error", "ACPI Warning", "ACPI: ", "pcieport", "pciehp", "shpchp",
	"EDAC", "ERST", "ipmi", "hpwdt", "iTCO_wdt", "watchdog", "tpm_", "efifb", "fb0", "[drm", "drm:", "bochs", "vga16fb", "snd_", "hdaudio", "usb usb", "uvcvideo",
	"Assuming drive cache", "Incomplete mode parameter data", "No Caching mode page", "unsupported sector size", "PM: Image not found", "PM: hibernation",
	"Unstable clock", "tsc: ", "clocksource", "integrity: ", "Lockdown", "zswap", "sev-guest", "megaraid_sas", "mptsas", "hv_", "vmw_",
}

// journalNoise is what programs say because of virtual hardware or of being alone on the network.
var journalNoise = words{
	"Failed to find module", "hypervisor", "sensors", "smartd", "Temporary failure in name resolution", "Network is unreachable",
	"No route to host", "Could not resolve", "Failed to resolve", "no servers can be reached", "No DHCPOFFERS", "no carrier",
	"Timed out waiting for NTP", "System clock unsynchronized", "rngd", "Bluetooth", "pulseaudio", "Failed to start Wait for Network",
}
