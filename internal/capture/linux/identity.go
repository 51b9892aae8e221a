package linux

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/musterdr/muster/internal/dr"
)

// OSRelease says which distribution is installed below root.
func OSRelease(root string) dr.Distro {
	release := content(root, "etc/os-release")
	if release == "" {
		release = content(root, "usr/lib/os-release")
	}
	value := func(key string) string {
		for line := range strings.Lines(release) {
			if v, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok {
				return strings.Trim(v, `"'`)
			}
		}
		return ""
	}
	return dr.Distro{ID: value("ID"), Like: strings.Fields(value("ID_LIKE")), Version: value("VERSION_ID"), Name: value("PRETTY_NAME")}
}

// Timezone is the name of the local time zone ("Europe/Vienna"), "" if it cannot be told.
func Timezone(root string) string {
	if target, err := os.Readlink(filepath.Join(root, "etc/localtime")); err == nil {
		if _, zone, ok := strings.Cut(target, "zoneinfo/"); ok {
			return zone
		}
	}
	return text(root, "etc/timezone")
}

// RTCLocal says whether the hardware clock runs on local time.
func RTCLocal(root string) bool {
	lines := strings.Split(content(root, "etc/adjtime"), "\n")
	return len(lines) > 2 && strings.TrimSpace(lines[2]) == "LOCAL"
}

// Hostname is the host name in use.
func Hostname(root string) string { return text(root, "proc/sys/kernel/hostname") }

// Kernel is the release of the running kernel, as uname -r prints it.
func Kernel(root string) string { return text(root, "proc/sys/kernel/osrelease") }

// MachineID identifies the installation.
func MachineID(root string) string { return text(root, "etc/machine-id") }

// BootID identifies this boot.
func BootID(root string) string { return text(root, "proc/sys/kernel/random/boot_id") }

// Resolvers lists the name servers. Where a local stub answers, it lists those that the stub asks.
func Resolvers(root string) []string {
	conf := content(root, "run/systemd/resolve/resolv.conf")
	if conf == "" {
		conf = content(root, "etc/resolv.conf")
	}
	var out []string
	for line := range strings.Lines(conf) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "nameserver" {
			out = append(out, f[1])
		}
	}
	return cut(out)
}
