# kvmprobe: a boot sector that does, in a moment, what an operating system does to a processor: BIOS calls in real mode,
# a timer interrupt, protected mode, paging, long mode, SSE, cpuid and rdtsc. If it comes to its end it writes
# "muster: the processor works" to the debug console and leaves QEMU. Where KVM is broken it hangs, or QEMU dies.
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
	cld

	sti				# two ticks of the timer, asleep in between
	movw 0x46c, %bx
1:	hlt
	movw 0x46c, %ax
	subw %bx, %ax
	cmpw $2, %ax
	jb 1b
	cli

	movw $0x1000, %di		# page tables at 0x1000, 0x2000, 0x3000: the first 2 MiB as they are
	xorl %eax, %eax
	movw $0x3000/4, %cx
	rep stosl
	movl $0x2003, 0x1000
	movl $0x3003, 0x2000
	movl $0x0083, 0x3000

	movl %cr4, %eax			# PAE, and SSE state
	orl $0x620, %eax
	movl %eax, %cr4
	movl $0x1000, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx		# EFER.LME
	rdmsr
	orl $0x100, %eax
	wrmsr
	lgdt gdt_pointer
	movl %cr0, %eax			# paging and protection at once: long mode
	andl $0xfffffffb, %eax
	orl $0x80000003, %eax
	movl %eax, %cr0
	ljmp $8, $long

	.code64
long:	movw $16, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	xorl %eax, %eax
	cpuid
	rdtsc
	movl $1, %eax			# 1, 2, 4 … by SSE; the sum must come out
	movd %eax, %xmm0
	pshufd $0, %xmm0, %xmm0
	movl $20, %ecx
1:	paddd %xmm0, %xmm0
	loop 1b
	movd %xmm0, %eax
	cmpl $1<<20, %eax
	jne 3f
	movabsq $0x100000000, %rax	# a register of 64 bits
	shrq $32, %rax
	cmpq $1, %rax
	jne 3f
	movl $works, %esi
2:	lodsb
	testb %al, %al
	jz 3f
	outb %al, $0xe9
	jmp 2b
3:	outb %al, $0xf4			# isa-debug-exit
	hlt
	jmp 3b

	.balign 8
gdt:	.quad 0
	.quad 0x00209a0000000000	# code, 64 bits
	.quad 0x0000920000000000	# data
gdt_pointer:
	.word . - gdt - 1
	.long gdt
works:	.asciz "muster: the processor works"
	.org 510
	.word 0xaa55
