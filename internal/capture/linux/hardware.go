package linux

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// Firmware says how this machine was started.
func Firmware(root string) dr.Firmware {
	if _, err := os.Stat(filepath.Join(root, "sys/firmware/efi")); err == nil {
		return dr.UEFI
	}
	return dr.BIOS
}

// SMBIOS reads the identifying strings of the firmware's tables. Serials and the UUID are for root only.
func SMBIOS(root string) dr.SMBIOS {
	id := func(name string) string { return text(root, "sys/class/dmi/id", name) }
	return dr.SMBIOS{
		UUID: id("product_uuid"), Manufacturer: id("sys_vendor"), Product: id("product_name"), Version: id("product_version"),
		Serial: id("product_serial"), SKU: id("product_sku"), Family: id("product_family"),
		BIOSVendor: id("bios_vendor"), BIOSVersion: id("bios_version"), BIOSDate: id("bios_date"),
		BoardVendor: id("board_vendor"), BoardProduct: id("board_name"), BoardSerial: id("board_serial"),
		ChassisAsset: id("chassis_asset_tag"), ChassisSerial: id("chassis_serial"),
	}
}

// The flags that each x86-64 level adds, in the kernel's spelling.
var levels = [][]string{
	{"cx8", "cmov", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"},
	{"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"},
	{"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
	{"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}

// CPU describes the processors.
func CPU(root string) dr.CPU {
	var c dr.CPU
	flags := map[string]bool{}
	for line := range strings.Lines(content(root, "proc/cpuinfo")) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "processor":
			c.Count++
		case "model name":
			c.Model = value
		case "flags":
			if len(flags) == 0 {
				for f := range strings.FieldsSeq(value) {
					flags[f] = true
				}
			}
		}
	}
	for _, level := range levels {
		for _, f := range level {
			if !flags[f] {
				return c
			}
		}
		c.Level++
	}
	return c
}

// Memory is the size of the machine's memory in bytes, as far as the kernel uses it.
func Memory(root string) int64 { return meminfo(root, "MemTotal") }

// Available is the memory in bytes that could be used without swapping.
func Available(root string) int64 { return meminfo(root, "MemAvailable") }

// meminfo reads one line of /proc/meminfo in bytes.
func meminfo(root, key string) int64 {
	for line := range strings.Lines(content(root, "proc/meminfo")) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == key+":" {
			kib, _ := strconv.ParseInt(f[1], 10, 64)
			return kib << 10
		}
	}
	return 0
}

// Virt names the hypervisor that this system runs on, in systemd's words; "none" on bare metal.
func Virt(ctx context.Context, root string) string {
	if root == "/" {
		// It prints "none" and exits with 1 on bare metal.
		if out, _ := run(ctx, "systemd-detect-virt", "--vm"); strings.TrimSpace(out) != "" {
			return strings.TrimSpace(out)
		}
	}
	s := SMBIOS(root)
	for _, known := range []struct{ sign, name string }{
		{"QEMU", "qemu"}, {"KVM", "kvm"}, {"VMware", "vmware"}, {"VirtualBox", "oracle"}, {"innotek", "oracle"}, {"Xen", "xen"},
		{"Amazon EC2", "amazon"}, {"Microsoft Corporation Virtual", "microsoft"}, {"Google", "google"}, {"Parallels", "parallels"},
	} {
		if strings.Contains(s.Manufacturer+" "+s.Product, known.sign) {
			return known.name
		}
	}
	for line := range strings.Lines(content(root, "proc/cpuinfo")) {
		if strings.HasPrefix(line, "flags") && strings.Contains(line, " hypervisor") {
			return "vm-other"
		}
	}
	return "none"
}
