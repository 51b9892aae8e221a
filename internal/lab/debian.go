package lab

import (
	"bytes"

	"github.com/cavaliergopher/cpio"

	"github.com/musterdr/muster/internal/prerecover"
	"github.com/musterdr/muster/internal/prerecover/tree"
)

// biosBoot is the GPT type of a BIOS boot partition.
const biosBoot = "21686148-6449-6e6f-744e-656564454649"

const grubConfig = `menuentry 'Debian GNU/Linux' {
	linux	/boot/vmlinuz-6.1.0-25-amd64 root=UUID=0fc63daf-8483-4772-8e79-3d69d8477de4 ro
	initrd	/boot/initrd.img-6.1.0-25-amd64
}
`

// Debian is the inside of a small Debian on one disk with a BIOS boot loader.
func Debian() *tree.System {
	elf := append([]byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x03\x00"), 62, 0)
	root := &tree.Filesystem{Device: prerecover.Device{Name: "/dev/sda2", Number: 2, Type: "ext4", UUID: "0fc63daf-8483-4772-8e79-3d69d8477de4"}}
	root.File("/etc/fstab", []byte("/dev/sda2 / ext4 errors=remount-ro 0 1\n"), 0o644).
		File("/etc/os-release", []byte("PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_ID=\"12\"\n"), 0o644).
		File("/etc/passwd", []byte("root:x:0:0::/root:/bin/bash\n"), 0o644).
		File("/etc/hostname", []byte("shop\n"), 0o644).
		File("/usr/bin/true", elf, 0o755).
		File("/usr/lib/systemd/systemd", elf, 0o755).
		File("/boot/vmlinuz-6.1.0-25-amd64", []byte("kernel"), 0o644).
		File("/boot/initrd.img-6.1.0-25-amd64", initramfs("ahci", "sd_mod", "virtio_blk", "virtio_pci"), 0o644).
		File("/boot/grub/grub.cfg", []byte(grubConfig), 0o444).
		File("/lib/modules/6.1.0-25-amd64/modules.dep", []byte("kernel/drivers/net/virtio_net.ko:\nkernel/drivers/char/virtio_console.ko:\nkernel/drivers/virtio/virtio_pci.ko:\n"), 0o644).
		File("/lib/modules/6.1.0-25-amd64/modules.builtin", []byte("kernel/fs/ext4/ext4.ko\n"), 0o644).
		Link("/sbin/init", "/lib/systemd/systemd").
		Folder("/etc/systemd/system").Folder("/etc/systemd/network")
	return &tree.System{
		Disks: []prerecover.Disk{{Name: "/dev/sda", Table: "gpt", BootCode: true}},
		Filesystems: []*tree.Filesystem{
			{Device: prerecover.Device{Name: "/dev/sda1", Number: 1, PartType: biosBoot}},
			root,
		},
	}
}

// initramfs is one that is not compressed and holds these modules.
func initramfs(modules ...string) []byte {
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	for _, m := range modules {
		name := "usr/lib/modules/6.1.0-25-amd64/kernel/drivers/" + m + ".ko"
		if w.WriteHeader(&cpio.Header{Name: name, Mode: 0o644 | cpio.TypeReg, Size: 5}) == nil {
			_, _ = w.Write([]byte("12345"))
		}
	}
	_ = w.Close()
	return b.Bytes()
}
