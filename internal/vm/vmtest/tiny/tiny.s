# tiny: a guest that is one boot sector. It needs nothing but a BIOS, and does what a test of a hypervisor has to see:
#
#   COM1  says "tiny: up", writes sector 1 of the first disk, says "tiny: wrote" (or "tiny: no")
#   COM2  sends back every byte it gets, and obeys these afterwards:
#           P  panic (pvpanic)           R  reset by the keyboard controller
#           I  ignore the power button   D  read sector 2048 of the first disk, say "tiny: read" (or "tiny: no")
#   The power button switches it off.
#
# Assemble: go generate
	.code16
	.globl _start
_start:
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7c00, %sp
	movb %dl, drive			# as the BIOS calls the disk we came from
	sti

	movw $0x602, %dx		# PM1_EN: let the power button set its status bit
	movw $0x100, %ax
	outw %ax, %dx

	movw $up, %si
	call say

	movw $mark, %si			# a sector full of the mark
	movw $0x8000, %di
	movw $512/8, %bx
1:	movw $8, %cx
	rep movsb
	subw $8, %si
	decw %bx
	jnz 1b
	movl $1, block
	movb $0x43, %ah
	movw $wrote, %si
	call disk

loop:
	movw $0x600, %dx		# PM1_STS: was the button pressed?
	inw %dx, %ax
	testb $1, %ah
	jz 1f
	cmpb $0, deaf
	jne 1f
	movw $0x604, %dx		# PM1_CNT: sleep, type 0 = off
	movw $0x2000, %ax
	outw %ax, %dx
1:	movw $0x2fd, %dx		# COM2: is there a byte?
	inb %dx, %al
	testb $1, %al
	jnz 2f
	hlt				# until the next tick
	jmp loop
2:	movb $0xf8, %dl
	inb %dx, %al
	outb %al, %dx
	cmpb $'P', %al
	je panic
	cmpb $'R', %al
	je reset
	cmpb $'I', %al
	jne 3f
	incb deaf
3:	cmpb $'D', %al
	jne loop
	movl $2048, block
	movb $0x42, %ah
	movw $read, %si
	call disk
	jmp loop

panic:	movw $0x505, %dx
	movb $1, %al
	outb %al, %dx
	jmp loop
reset:	movb $0xfe, %al
	outb %al, $0x64
	jmp loop

# disk does the request %ah on the block at 0x8000 and says %si, or that it could not.
disk:	pushw %si
	movb drive, %dl
	movb $0, %al
	movw $packet, %si
	int $0x13
	popw %si
	jnc say
	movw $no, %si
# say prints %si to COM1.
say:	pushw %si
	movw $tiny, %si
	call text
	popw %si
text:	movw $0x3f8, %dx
1:	lodsb
	testb %al, %al
	jz 2f
	outb %al, %dx
	jmp 1b
2:	ret

tiny:	.asciz "tiny: "
up:	.asciz "up\r\n"
wrote:	.asciz "wrote\r\n"
read:	.asciz "read\r\n"
no:	.asciz "no\r\n"
mark:	.ascii "scratch!"
drive:	.byte 0
deaf:	.byte 0
	.balign 4
packet:	.byte 16, 0
	.word 1				# one sector
	.word 0x8000, 0			# to or from here
block:	.long 0, 0
	.org 510
	.word 0xaa55
