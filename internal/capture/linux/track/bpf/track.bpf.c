// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// The part of the tracker that runs in the kernel: it marks what was written when the write is complete, before whoever
// wrote is told. docs/formats/tracking.md describes the maps, the Go package track the rest.

#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

char _license[] SEC("license") = "Dual MIT/GPL";

// Limits, mirrored in maps.go.
#define MAX_DISKS 256
#define MAX_UNDERWAY 65536 // operations that have begun, on all disks
#define MAX_CHAIN 256      // bios in one request
#define REGION 1024        // granules in a region of the coarse map

#define SECTOR_SHIFT 9
#define REQ_OP_MASK 0xff
#define REQ_OP_DISCARD 3
#define REQ_OP_DRIVER 32 // from here on: commands of a driver or of a program, of unknown meaning

// Filled in before loading. What is not needed is cut away by the verifier.
const volatile u32 bytes = 0;     // no atomic OR in this kernel (before 5.12): a byte a granule
const volatile u32 bios_used = 0; // some disk is bio-based
const volatile u32 begin_arg = 0; // which argument of block_rq_issue and block_bio_queue is the request or bio

struct disk {
	u32 slot;
	u32 shift;  // sectors to granules
	u32 coarse; // words of the coarse map, which come first
	u32 bios;   // bio-based
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DISKS);
	__type(key, u32); // major << 20 | minor
	__type(value, struct disk);
} disks SEC(".maps");

struct counts {
	u64 sectors;     // written and discarded, to be compared with the kernel's
	u64 passthrough; // commands of unknown meaning
	u64 overflow;    // operations that found no room: beyond the map, too many bios
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_DISKS);
	__type(key, u32);
	__type(value, struct counts);
} counts SEC(".maps");

struct words {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	__type(key, u32);
	__type(value, u64);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_DISKS);
	__type(key, u32);
	__array(values, struct words);
} current SEC(".maps");

// What an operation that has begun is about to write. A bio comes back with its iterator consumed, and the end of a request is
// not always told: in some kernels no program runs in some interrupts.
struct range {
	u32 dev;
	u32 bytes;
	u64 sector;
	u64 began;     // when its request was made, nanoseconds; 0 of one that has ended, and of a bio
	u32 kind;
	struct {
		u32 slot;
		u32 shift;
		u32 coarse;
	} disk; // as it was then, which saves looking it up again
};

// Kinds. A discard of several ranges, which need not touch each other, is remembered as a request and with every range as a part.
#define WHOLE 0
#define SCATTERED 1
#define PART 2
#define NOWHERE 3 // scattered, and not all of its parts could be remembered
#define BIO 4

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_UNDERWAY);
	__type(key, u64); // address of the request or bio
	__type(value, struct range);
} underway SEC(".maps");

enum tally { SECTORS, PASSTHROUGH, OVERFLOW };

static __always_inline void count(u32 slot, enum tally what, u64 n)
{
	struct counts *c = bpf_map_lookup_elem(&counts, &slot);

	// Atomic because an interrupt may count on the same CPU.
	if (!c)
		return;
	if (what == SECTORS)
		__sync_fetch_and_add(&c->sectors, n);
	else if (what == PASSTHROUGH)
		__sync_fetch_and_add(&c->passthrough, n);
	else
		__sync_fetch_and_add(&c->overflow, n);
}

// set marks some of the granules that a word stands for, from first to last, both inside the word. Like mark it is a function of
// its own that takes numbers only, so that the verifier looks at it once and not once a turn of a loop.
__attribute__((noinline)) int set(u32 slot, u32 index, u32 first, u32 last)
{
	void *map = bpf_map_lookup_elem(&current, &slot);
	u64 *word;

	if (!map)
		return -1;
	word = bpf_map_lookup_elem(map, &index);
	if (!word)
		return -1;
	if (bytes) {
		u8 *each = (u8 *)word;

		// No unmarked granule may become marked: the reader would read too much, and it cannot be told from what was written.
#pragma unroll
		for (u32 i = 0; i < 8; i++)
			if (i >= first && i <= last)
				each[i] = 1;
		return 0;
	}
	u64 mask = (~0ULL >> (63 - ((last - first) & 63))) << (first & 63);
	// A bit that is set already needs no mark: whoever clears it reads afterwards, and this write is on the disk.
	if ((*word & mask) != mask)
		__sync_fetch_and_or(word, mask);
	return 0;
}

// span marks granules from first to last in consecutive words from base on, as many words as two regions may need.
__attribute__((noinline)) int span(u32 slot, u32 base, u64 first, u64 last)
{
	const u32 shift = bytes ? 3 : 6;
	const u64 in = bytes ? 7 : 63;
	u64 word = first >> shift, end = last >> shift;

	for (u32 i = 0; i < 2 * REGION / 8 + 1; i++) {
		if (word > end)
			return 0;
		if (set(slot, base + word, i ? 0 : first & in, word == end ? last & in : in))
			return -1;
		word++;
	}
	return word > end ? 0 : -1;
}

// mark marks sectors of a disk.
__attribute__((noinline)) int mark(u32 slot, u32 shift, u32 coarse, u64 sector, u64 sectors)
{
	u64 first = sector >> (shift & 31), last = (sector + sectors - 1) >> (shift & 31);
	u64 region, beyond; // whole regions in between

	if (!sectors)
		return 0;
	if (last - first < 2 * REGION) {
		if (span(slot, coarse, first, last))
			goto overflow;
		return 0;
	}
	region = (first + REGION - 1) / REGION;
	beyond = (last + 1) / REGION;
	if (first < region * REGION && span(slot, coarse, first, region * REGION - 1))
		goto overflow;
	if (beyond * REGION <= last && span(slot, coarse, beyond * REGION, last))
		goto overflow;
	// The largest operation has 4 GiB: 256 regions. A range that is not inside the map must not reach into the fine words.
	if ((beyond - 1) >> (bytes ? 3 : 6) >= coarse || span(slot, 0, region, beyond - 1))
		goto overflow;
	return 0;
overflow:
	count(slot, OVERFLOW, 1);
	return 0;
}

static __always_inline u32 number(struct gendisk *disk)
{
	return (u32)disk->major << 20 | (u32)disk->first_minor;
}

static __always_inline struct gendisk *disk_of_request(struct request *rq)
{
	if (bpf_core_field_exists(struct request___before517, rq_disk))
		return ((struct request___before517 *)rq)->rq_disk;
	return rq->q->disk;
}

static __always_inline struct gendisk *disk_of_bio(struct bio *bio)
{
	if (bpf_core_field_exists(struct bio___before512, bi_disk))
		return ((struct bio___before512 *)bio)->bi_disk;
	return bio->bi_bdev->bd_disk;
}

// ended marks what a remembered bio wrote, once: whoever can forget it does the work.
static __always_inline void ended(u64 bio)
{
	struct range *found = bpf_map_lookup_elem(&underway, &bio), r;
	struct disk *d;

	if (!found || found->kind != BIO) // a request had this memory
		return;
	r = *found;
	if (bpf_map_delete_elem(&underway, &bio))
		return;
	d = bpf_map_lookup_elem(&disks, &r.dev);
	if (!d)
		return;
	mark(d->slot, d->shift, d->coarse, r.sector, ((u64)r.bytes + 511) >> SECTOR_SHIFT);
	count(d->slot, SECTORS, r.bytes >> SECTOR_SHIFT);
}

// ended_in_request is the same for the verifier to look at once, and not once a turn of a loop.
__attribute__((noinline)) int ended_in_request(u64 bio)
{
	ended(bio);
	return 0;
}

// unordered marks a discard of several ranges, which need not touch each other.
static __always_inline void unordered(struct disk *d, struct request *rq, u32 size)
{
	struct bio *bio = rq->bio;
	u32 slot = d->slot, shift = d->shift, coarse = d->coarse;
	u64 sum = 0;

	for (int i = 0; i < MAX_CHAIN && bio; i++) {
		u32 length = bio->bi_iter.bi_size;
		u64 key = (u64)bio;

		mark(slot, shift, coarse, bio->bi_iter.bi_sector, ((u64)length + 511) >> SECTOR_SHIFT);
		bpf_map_delete_elem(&underway, &key);
		sum += length;
		bio = bio->bi_next;
	}
	if (sum < size)
		count(slot, OVERFLOW, 1);
}

// aside keeps the range of a request whose end was not told, once its memory is used for another one: under the time, which is no
// address.
static __always_inline void aside(struct range *found)
{
	struct range r = *found;
	u64 key = bpf_ktime_get_ns() << 6 | (bpf_get_smp_processor_id() & 63);

	if (!r.began)
		return;
	found->began = 0;
	bpf_map_update_elem(&underway, &key, &r, BPF_NOEXIST); // if there is no room it will be missing
}

// part remembers one range of a scattered discard.
__attribute__((noinline)) int part(u64 bio, u32 dev, u32 size, u64 sector, u64 began)
{
	struct range r = {.dev = dev, .bytes = size, .sector = sector, .began = began, .kind = PART};
	struct range *found = bpf_map_lookup_elem(&underway, &bio);

	if (found)
		aside(found);
	return bpf_map_update_elem(&underway, &bio, &r, BPF_ANY);
}

// scatter remembers the ranges of a scattered discard.
static __always_inline u64 scatter(struct request *rq, u32 dev, u64 began)
{
	struct bio *bio = rq->bio;
	u64 key; // the same as bio to anybody but the verifier

	bpf_probe_read_kernel(&key, sizeof(key), &rq->bio);
	for (int i = 0; i < MAX_CHAIN; i++) {
		if (!bio)
			return SCATTERED;
		if (part(key, dev, bio->bi_iter.bi_size, bio->bi_iter.bi_sector, began))
			return NOWHERE;
		bpf_probe_read_kernel(&key, sizeof(key), &bio->bi_next);
		bio = bio->bi_next;
	}
	return NOWHERE;
}

// request_begun remembers what a request is about to write. One that could not be remembered is marked at its end all the same.
// Its place in the table stays for the next request in the same memory: there are not many, and making one takes long.
static __always_inline int request_begun(struct request *rq)
{
	struct range r = {}, *found;
	u32 op = rq->cmd_flags & REQ_OP_MASK;
	u64 key = (u64)rq;
	struct gendisk *gd;
	struct disk *d;

	r.bytes = rq->__data_len;
	if (!(op & 1) || op >= REQ_OP_DRIVER || !r.bytes)
		return 0; // reads, flushes, and what is of unknown meaning
	gd = disk_of_request(rq);
	if (!gd)
		return 0;
	r.dev = number(gd);
	d = bpf_map_lookup_elem(&disks, &r.dev);
	if (!d || d->bios)
		return 0;
	r.sector = rq->__sector;
	r.began = rq->start_time_ns;
	r.disk.slot = d->slot;
	r.disk.shift = d->shift;
	r.disk.coarse = d->coarse;
	found = bpf_map_lookup_elem(&underway, &key);
	if (found) {
		// The driver begins anew.
		if (found->began && found->dev == r.dev && found->sector == r.sector && found->bytes == r.bytes && found->began == r.began)
			return 0;
		aside(found);
	}
	if (op == REQ_OP_DISCARD && rq->bio && rq->bio->bi_next)
		r.kind = scatter(rq, r.dev, r.began);
	if (!found) {
		bpf_map_update_elem(&underway, &key, &r, BPF_NOEXIST);
		return 0;
	}
	found->dev = r.dev;
	found->bytes = r.bytes;
	found->sector = r.sector;
	found->kind = r.kind;
	found->disk = r.disk;
	barrier();
	found->began = r.began; // last: before that nobody believes the rest
	return 0;
}

// A kernel from 6.1 on does not start a program on a CPU that is in the middle of it, and so the hooks that mark have a twin. Whoever
// ends a request does the work, and of one that is not remembered the primary. Never do both: what is counted twice could hide
// what is not counted at all.
static __always_inline int request_done(struct request *rq, u32 size, int twin)
{
	u32 op = rq->cmd_flags & REQ_OP_MASK, dev;
	u64 sector = rq->__sector, key = (u64)rq;
	struct range *found;
	struct gendisk *gd;
	struct disk *d;
	int mine;

	if (op >= REQ_OP_DRIVER) {
		// One that brought data in read it. One that sent data out, or none, may have done anything.
		if (!(op & 1) && size)
			return 0;
	} else if (!(op & 1) || !size) {
		return 0; // reads and flushes
	} else {
		if (bios_used) {
			struct bio *bio = rq->bio;
			u64 number; // the same as bio to anybody but the verifier

			// Some drivers send the very bio on to a lower disk, and then its end is never told.
			bpf_probe_read_kernel(&number, sizeof(number), &rq->bio);
			for (int i = 0; i < MAX_CHAIN && bio; i++) {
				ended_in_request(number);
				bpf_probe_read_kernel(&number, sizeof(number), &bio->bi_next);
				bio = bio->bi_next;
			}
		}
		found = bpf_map_lookup_elem(&underway, &key);
		mine = found && found->began && found->began == rq->start_time_ns && found->sector == sector;
		if (mine && found->bytes > size) {
			found->sector += size >> SECTOR_SHIFT; // a part of it; the twin sees that it is done
			found->bytes -= size;
			if (found->kind == SCATTERED)
				found->kind = NOWHERE; // which parts are done is not known
		} else if (mine && found->kind == WHOLE) {
			found->began = 0; // the usual case
			mark(found->disk.slot, found->disk.shift, found->disk.coarse, sector, ((u64)size + 511) >> SECTOR_SHIFT);
			count(found->disk.slot, SECTORS, size >> SECTOR_SHIFT);
			return 0;
		} else if (mine) {
			found->began = 0;
		} else if (twin) {
			return 0;
		} else if (found) {
			aside(found); // of another request, in the same memory
		}
	}
	gd = disk_of_request(rq);
	if (!gd)
		return 0;
	dev = number(gd);
	d = bpf_map_lookup_elem(&disks, &dev);
	if (!d || d->bios)
		return 0;
	if (op >= REQ_OP_DRIVER) {
		count(d->slot, PASSTHROUGH, 1);
		return 0;
	}
	if (op == REQ_OP_DISCARD && rq->bio && rq->bio->bi_next)
		unordered(d, rq, size);
	else
		mark(d->slot, d->shift, d->coarse, sector, ((u64)size + 511) >> SECTOR_SHIFT);
	count(d->slot, SECTORS, size >> SECTOR_SHIFT);
	return 0;
}

static __always_inline int bio_queued(struct bio *bio, int twin)
{
	struct range r = {};
	struct gendisk *gd;
	struct disk *d;
	u64 key = (u64)bio;
	u32 op = bio->bi_opf & REQ_OP_MASK;

	r.bytes = bio->bi_iter.bi_size;
	if (!(op & 1) || !r.bytes)
		return 0;
	gd = disk_of_bio(bio);
	if (!gd)
		return 0;
	r.dev = number(gd);
	d = bpf_map_lookup_elem(&disks, &r.dev);
	if (!d || !d->bios)
		return 0;
	r.kind = BIO;
	r.sector = bio->bi_iter.bi_sector;
	// The twin writes the same again: what lies there may be a bio of the same address that was never told to have ended.
	if (bpf_map_update_elem(&underway, &key, &r, BPF_ANY) && twin)
		count(d->slot, OVERFLOW, 1);
	return 0;
}

static __always_inline u64 begins(u64 *ctx)
{
	return begin_arg ? ctx[1] : ctx[0];
}

SEC("tp_btf/block_rq_issue")
int issue(u64 *ctx)
{
	return request_begun((struct request *)begins(ctx));
}

SEC("tp_btf/block_rq_complete")
int request_primary(u64 *ctx)
{
	return request_done((struct request *)ctx[0], (u32)ctx[2], 0);
}

SEC("tp_btf/block_rq_complete")
int request_twin(u64 *ctx)
{
	return request_done((struct request *)ctx[0], (u32)ctx[2], 1);
}

SEC("tp_btf/block_bio_queue")
int queue_primary(u64 *ctx)
{
	return bio_queued((struct bio *)begins(ctx), 0);
}

SEC("tp_btf/block_bio_queue")
int queue_twin(u64 *ctx)
{
	return bio_queued((struct bio *)begins(ctx), 1);
}

SEC("tp_btf/block_bio_complete")
int bio_primary(u64 *ctx)
{
	ended(ctx[1]);
	return 0;
}

SEC("tp_btf/block_bio_complete")
int bio_twin(u64 *ctx)
{
	ended(ctx[1]);
	return 0;
}
