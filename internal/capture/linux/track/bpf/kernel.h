/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the program touches of the kernel's own structures, and no more. The real offsets are filled in when it is loaded, from
 * the BTF of the running kernel; the names after ___ are the shapes of older kernels. */
#pragma once

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u8 __u8;
typedef unsigned short __u16;
typedef u32 __u32;
typedef u64 __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

/* Of uapi/linux/bpf.h, which would need the headers of one processor. */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_F_MMAPABLE = 1 << 10,
	BPF_F_INNER_MAP = 1 << 12,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct gendisk {
	int major;
	int first_minor;
};

struct request_queue {
	struct gendisk *disk; /* from 5.15 */
};

struct block_device {
	struct gendisk *bd_disk;
};

struct bvec_iter {
	u64 bi_sector;
	u32 bi_size;
};

struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev; /* from 5.12 */
	u32 bi_opf;
	struct bvec_iter bi_iter;
};

struct bio___before512 {
	struct gendisk *bi_disk;
};

struct request {
	struct request_queue *q;
	u32 cmd_flags;
	u32 __data_len;
	u64 __sector;
	struct bio *bio;
	u64 start_time_ns; /* when it was made; requests are made anew in the same memory */
};

struct request___before517 {
	struct gendisk *rq_disk;
};

#pragma clang attribute pop
