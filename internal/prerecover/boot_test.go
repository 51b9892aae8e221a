package prerecover

import (
	"slices"
	"strings"
	"testing"

	"github.com/musterdr/muster/internal/dr"
)

func TestKernelArgumentsAreAddedInPlace(t *testing.T) {
	add := func(args []string) []string { return append(args, "console=ttyS0,115200") }
	for _, c := range []struct{ file, text, want string }{
		{"/boot/grub/grub.cfg", "\tlinux\t/vmlinuz root=UUID=1 ro  quiet \n", "\tlinux\t/vmlinuz root=UUID=1 ro  quiet console=ttyS0,115200\n"},
		{"/boot/grub/grub.cfg", "linux16 /vmlinuz ro\nlinuxefi /vmlinuz ro\r\n", "linux16 /vmlinuz ro console=ttyS0,115200\nlinuxefi /vmlinuz ro console=ttyS0,115200\r\n"},
		{"/boot/grub/grub.cfg", "linux /vmlinuz", "linux /vmlinuz console=ttyS0,115200"},
		{"/boot/grub/grub.cfg", "# linux /vmlinuz\nset linux=1\nlinux_flag x\n", "# linux /vmlinuz\nset linux=1\nlinux_flag x\n"},
		{"/boot/grub/grub.cfg", "linux16 /boot/memtest86+.bin\nkernel /xen.gz dom0=1\n", "linux16 /boot/memtest86+.bin\nkernel /xen.gz dom0=1\n"},
		{"/boot/grub/menu.lst", "kernel (hd0,0)/vmlinuz ro\n", "kernel (hd0,0)/vmlinuz ro console=ttyS0,115200\n"},
		{"/boot/loader/entries/x.conf", "linux /vmlinuz\noptions $kernelopts $tuned\ninitrd /i\n", "linux /vmlinuz\noptions $kernelopts $tuned console=ttyS0,115200\ninitrd /i\n"},
		{"/boot/extlinux.conf", "LABEL lts\n  LINUX vmlinuz-lts\n  APPEND root=UUID=1\n", "LABEL lts\n  LINUX vmlinuz-lts\n  APPEND root=UUID=1 console=ttyS0,115200\n"},
	} {
		if got := editArgs(c.file, c.text, add); got != c.want {
			t.Errorf("%s: %q became %q, want %q", c.file, c.text, got, c.want)
		}
	}
}

func TestAKernelThatIsToldADiskIsToldAUUID(t *testing.T) {
	facts := dr.Facts{Kernels: []dr.KernelFacts{{Version: "6", Initramfs: "/boot/i"}}}
	v := table().WithFile("/boot/grub/grub.cfg", []byte("linux /v root=/dev/sda2 resume=/dev/sdb1 x=/dev/sda2\nlinux /v root=/dev/mapper/vg--x-lv\nlinux /v root=LABEL=root\n"))
	p, err := plan(t, v, facts, "edits:\n  - action: cmdline-by-uuid\n")
	if err != nil || len(p.Edits) != 1 || string(p.Edits[0].Content) != "linux /v root=UUID=uuid-a2 resume=UUID=uuid-b1 x=/dev/sda2\nlinux /v root=/dev/mapper/vg--x-lv\nlinux /v root=LABEL=root\n" {
		t.Errorf("plan = %+v, %v", p, err)
	}
	facts.Kernels[0].Initramfs = "" // only an initramfs knows what a UUID is
	if p, err = plan(t, v, facts, "edits:\n  - action: cmdline-by-uuid\n"); err != nil || len(p.Edits) != 0 {
		t.Errorf("plan = %+v, %v", p, err)
	}
}

func TestAgentAndMasksFitEveryInit(t *testing.T) {
	standard := func(init string, v *View) []string {
		t.Helper()
		p, err := PlanEdits(PlanInput{View: v, Facts: dr.Facts{Init: init}, Overlays: Standard(), Agent: []byte("agent"),
			NICs: []dr.HWNIC{{MAC: "02:00:00:00:00:01", Name: "eth0"}, {MAC: "02:00:00:00:00:02"}}})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range p.Edits {
			if e.Action != "mkdir" {
				got = append(got, strings.TrimSpace(e.Action+" "+e.Path+" "+e.Target))
			}
		}
		return got
	}
	agent := "write /usr/lib/muster/muster-guest"
	for _, c := range []struct {
		init string
		view *View
		want []string
	}{
		{"systemd", NewView().WithFolder("/lib/systemd/system", "vboxadd.service", "cron.service", "dsm_sa_datamgrd.service").WithFolder("/etc/init.d", "xe-daemon"), []string{
			"write /etc/systemd/network/10-muster-eth0.link", "link /etc/systemd/system/vboxadd.service /dev/null", "link /etc/systemd/system/xe-daemon.service /dev/null",
			"link /etc/systemd/system/dsm_sa_datamgrd.service /dev/null", agent, "write /etc/systemd/system/muster-guest.service",
			"link /etc/systemd/system/sysinit.target.wants/muster-guest.service /etc/systemd/system/muster-guest.service"}},
		{"openrc", NewView().WithFolder("/etc/runlevels/default", "open-vm-tools", "sshd").WithFolder("/etc/runlevels/boot", "watchdog"), []string{
			"remove /etc/runlevels/default/open-vm-tools", "remove /etc/runlevels/boot/watchdog", agent, "write /etc/init.d/muster-guest",
			"link /etc/runlevels/boot/muster-guest /etc/init.d/muster-guest"}},
		{"sysv", NewView().WithFolder("/etc/rc.d/rc3.d", "S10vmware-tools", "K20hpilo", "S50sshd").WithFolder("/etc/udev/rules.d").WithFile("/etc/inittab", []byte("id:3:initdefault:\n")), []string{
			"write /etc/udev/rules.d/70-persistent-net.rules", "remove /etc/rc.d/rc3.d/S10vmware-tools", agent, "replace /etc/inittab"}},
		{"sysv", NewView().WithFolder("/etc/init", "rc.conf"), []string{agent, "write /etc/init/muster-guest.conf"}},
	} {
		got := standard(c.init, c.view)
		slices.Sort(got)
		slices.Sort(c.want)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s:\n got %s\nwant %s", c.init, strings.Join(got, "\n     "), strings.Join(c.want, "\n     "))
		}
	}
}

func TestVersionsCompareAsPeopleDo(t *testing.T) {
	for _, pair := range [][2]string{{"6.1.0-9-amd64", "6.1.0-25-amd64"}, {"5.14.0-70.el9", "5.14.0-427.el9"}, {"4.19", "4.19.1"}, {"6.9", "6.10"}} {
		if compareVersions(pair[0], pair[1]) >= 0 || compareVersions(pair[1], pair[0]) <= 0 || compareVersions(pair[0], pair[0]) != 0 {
			t.Errorf("%s is not before %s", pair[0], pair[1])
		}
	}
}

func TestADiffIsShortAndHarmless(t *testing.T) {
	if d := diffText([]byte("a\nb\nc\nd\n"), []byte("a\nB\nc\nd\ne\n")); d != "-b\n+B\n+e\n" {
		t.Errorf("diff = %q", d)
	}
	if d := diffText([]byte("x\x1b[31m\n"), []byte("y\n")); strings.Contains(d, "\x1b") {
		t.Errorf("diff = %q", d)
	}
	long := []byte(strings.Repeat("line of a long file\n", 10000))
	if d := diffText(nil, long); len(d) > maxDiff+32 || !strings.Contains(d, "more") {
		t.Errorf("diff of %d bytes", len(d))
	}
	if d := diffText([]byte("a\x00"), []byte("bc\x00")); d != "(binary, 2 bytes became 3)\n" {
		t.Errorf("diff = %q", d)
	}
}
