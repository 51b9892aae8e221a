package store

import (
	"cmp"
	"context"
	"crypto/aes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/kopia/kopia/fs"
	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/content"
	"github.com/kopia/kopia/repo/object"
	"github.com/kopia/kopia/snapshot"
	"github.com/kopia/kopia/snapshot/snapshotfs"
	"golang.org/x/sync/errgroup"

	"github.com/musterdr/muster/internal/dr"
)

// A snapshot is replicated from a near store to a far one that has the same secrets (see CreateLike): the same block has
// the same identifier in both, and its sealed form is good in both. What is missing is found by identifier, in the far
// store's own index; no block is read for that. Packs, the blobs in which the near store laid down its blocks,
// travel as they are, sealed, when the far side lacks what is in them; only where it has much of one already
// are the missing blocks read, proven and packed anew. Last the manifest is published, as the near store has it.

// ReplicateOptions say how a snapshot is replicated.
type ReplicateOptions struct {
	// Rate is how many bytes a second may be sent now: 0 as many as there are, less than 0 none until it says otherwise. It is
	// asked often, from many goroutines. nil: no limit.
	Rate func() int64
}

// Replicated says what was done to replicate a snapshot.
type Replicated struct {
	Snapshot string `json:"snapshot"`
	There    bool   `json:"there"`    // it was there already, and nothing was done
	Sent     int64  `json:"sent"`     // bytes of blobs that were written into the far store, or given to the line to it
	Packs    int64  `json:"packs"`    // packs that were sent as they are
	Found    int64  `json:"found"`    // packs that an earlier attempt had sent
	Repacked int64  `json:"repacked"` // blocks, maps and folders that were packed anew
	Same     int64  `json:"same"`     // of those that had to be looked for, how many the far store had
}

// Limits of a replication.
const (
	wholePack   = 95        // percent of a pack that must be missing for it to travel as it is
	maxWaiting  = 256 << 10 // blocks that wait for the rest of their pack to be asked for; about 100 bytes each
	packsAtOnce = 6         // some are sent while others are read, proven, synced and read back; about 25 MB each on both sides
	packSlack   = 4 << 20   // bytes by which a pack is usually longer than it should be, at most
	packsAFlush = 64        // after so many the far index is written, so that another attempt need not ask for them again
)

// ErrOtherSecrets is that two stores do not share their secrets, so that nothing of one is good in the other.
var ErrOtherSecrets = errors.New("the stores have other secrets")

// Replicate copies a snapshot of a near store into a far one, unless it is there. It returns when all of it is on the far
// medium, was read back there, and is published. It may be called again after any error, and sends again no pack that
// had arrived. Data whose image is not in the far store is ErrNotFound: replicate that first. Stores that are not
// alike are ErrOtherSecrets; a snapshot that somebody else is writing there is ErrBusy.
func Replicate(ctx context.Context, near, far *Store, snapshotID string, o ReplicateOptions, progress dr.Progress) (Replicated, error) {
	r := replication{near: near, far: far, id: snapshotID, pace: newPace(o.Rate), progress: progress, out: Replicated{Snapshot: snapshotID}}
	err := dr.ValidateID(snapshotID)
	if err == nil {
		err = r.run(ctx)
	}
	r.out.Sent = r.sent.n.Load()
	if err != nil {
		return r.out, fmt.Errorf("replicate snapshot %s to %s: %w", snapshotID, far, near.explain(far.explain(err)))
	}
	return r.out, nil
}

// replication is one snapshot on its way. One goroutine walks and decides; others send.
type replication struct {
	near, far *Store
	id        string
	pace      *pace
	progress  dr.Progress
	sent      tally

	source  *found
	known   map[object.ID]bool // segments that a snapshot of the far store has, and with them their blocks
	session repo.DirectRepositoryWriter
	packer  *content.WriteManager // the session's
	waiting map[blob.ID]*packOf
	blocks  int // that wait
	senders *errgroup.Group
	sending context.Context // ends when one of them has failed
	buffers sync.Pool       // of *Buffer that a pack fits into

	mu    sync.Mutex
	out   Replicated
	fresh []*packOf // what was written since the far index was
}

// packOf is a pack of the near store of which the far one lacks something.
type packOf struct {
	id      blob.ID
	size    int64 // of all contents in it; 0 before it was looked into
	missing map[content.ID]content.Info
	bytes   int64 // of the missing ones that would come with the pack
	taken   bool  // it is on its way, or was
}

func (r *replication) run(ctx context.Context) error {
	ctx, done := r.near.bind(ctx)
	defer done()
	ctx, done = r.far.bind(ctx)
	defer done()
	if !alike(r.near, r.far) {
		return fmt.Errorf("%w: create the one like the other", ErrOtherSecrets)
	}
	defer r.near.Pin(r.id)()
	var err error
	if r.source, err = r.near.find(ctx, r.id); err != nil {
		return err
	}
	unlock, err := r.locks(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := r.far.rep.Refresh(ctx); err != nil {
		return err
	}
	if r.out.There, err = exists(ctx, r.far.rep, r.id); r.out.There || err != nil {
		return err
	}
	if err := r.learn(ctx); err != nil {
		return err
	}
	if err := r.send(ctx); err != nil {
		return err
	}
	return r.publish(ctx)
}

// locks takes the locks of the far store, both at once, because it may be far away, and gives what lets both go so.
func (r *replication) locks(ctx context.Context) (unlock func(), err error) {
	var writing, ingesting func()
	unlock = func() {
		var letting sync.WaitGroup
		for _, release := range []func(){writing, ingesting} {
			if release != nil {
				letting.Go(release)
			}
		}
		letting.Wait()
	}
	var taken bool
	var werr, ierr error
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var taking sync.WaitGroup
	taking.Go(func() {
		if writing, taken, werr = r.far.place.TryLock(lockWrite+r.id, true); !taken {
			cancel() // the other need not be waited for
		}
	})
	ingesting, ierr = r.far.lock(ctx, lockIngest, false)
	taking.Wait()
	switch {
	case werr != nil:
		err = werr
	case !taken:
		err = fmt.Errorf("%w: somebody is writing this snapshot", ErrBusy)
	default:
		err = ierr
	}
	if err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// learn finds out which segments need not be looked into: those of the newest snapshot that both have of the server.
func (r *replication) learn(ctx context.Context) error {
	entries, err := findManifests(ctx, r.far.rep, kindSnapshot, "")
	if err != nil {
		return damaged(err)
	}
	r.known = map[object.ID]bool{}
	here := r.source.manifest.Source
	for i := len(entries) - 1; i >= 0; i-- { // the newest first
		// What of it cannot be read here is only looked for block by block.
		if e := entries[i]; e.Labels[snapshot.HostnameLabel] == here.Host && e.Labels[snapshot.PathLabel] == here.Path {
			base, err := r.near.find(ctx, e.Labels[tagSnapshot])
			if err != nil || len(base.doc.Snapshot.Disks) == 0 {
				continue
			}
			for _, d := range base.doc.Snapshot.Disks {
				if geo, err := newGeometry(d.Size, d.BlockSize); err == nil {
					segments, err := readRoot(ctx, r.near.rep, d.Root, geo)
					if err != nil {
						return damaged(err)
					}
					for _, id := range segments {
						r.known[id] = true
					}
				}
			}
			return nil
		}
	}
	return nil
}

// send walks the snapshot and brings over what the far store lacks.
func (r *replication) send(ctx context.Context) error {
	ctx = context.WithValue(ctx, tallyKey{}, &r.sent)
	_, w, err := r.far.rep.NewDirectWriter(ctx, repo.WriteSessionOptions{Purpose: "replicate"})
	if err != nil {
		return err
	}
	defer w.Close(context.WithoutCancel(ctx)) //nolint:errcheck // gives back a reference; what was not flushed is dropped
	r.session, r.packer, r.waiting = w, w.ContentManager(), map[blob.ID]*packOf{}
	r.start(ctx)
	walker, err := snapshotfs.NewTreeWalker(ctx, snapshotfs.TreeWalkerOptions{
		Parallelism: 1, MaxErrors: 1,
		EntryCallback: func(_ context.Context, _ fs.Entry, id object.ID, _ string) error { return r.look(ctx, id) },
	})
	if err != nil {
		return err
	}
	defer walker.Close(ctx)
	err = walker.Process(ctx, r.source.root, "")
	if err = errors.Join(r.senders.Wait(), err); err != nil {
		return err
	}
	r.start(ctx)
	if err := r.settle(ctx); err != nil {
		return err
	}
	return r.flush(ctx)
}

func (r *replication) start(ctx context.Context) {
	r.senders, r.sending = errgroup.WithContext(ctx)
	r.senders.SetLimit(packsAtOnce)
}

// look asks the far store for the contents of one object.
func (r *replication) look(ctx context.Context, id object.ID) error {
	if r.known[id] {
		return nil
	}
	if err := r.sending.Err(); err != nil {
		return context.Cause(r.sending)
	}
	contents, err := r.near.rep.VerifyObject(ctx, id)
	if err != nil {
		return damaged(err)
	}
	lacks, err := r.lacking(ctx, contents)
	if err != nil {
		return err
	}
	for _, l := range lacks {
		if err := r.need(ctx, l); err != nil {
			return err
		}
	}
	if r.blocks < maxWaiting {
		return nil
	}
	if err := r.senders.Wait(); err != nil {
		return err
	}
	r.start(ctx)
	if err := r.settle(ctx); err != nil {
		return err
	}
	r.start(ctx)
	return nil
}

// lack is a content of the near store that the far one cannot give.
type lack struct {
	content.Info
	has presence
}

// lacking gives those of the contents that the far store lacks, pack by pack: the first packs are on their way while the others are looked at,
// and an attempt goes on with those that the one before had begun.
func (r *replication) lacking(ctx context.Context, contents []content.ID) (out []lack, err error) {
	for _, id := range contents {
		has, err := r.has(ctx, id)
		if err != nil {
			return nil, err
		}
		if has == present {
			r.count(func(o *Replicated) { o.Same++ })
			continue
		}
		info, err := r.near.rep.ContentInfo(ctx, id)
		if err != nil {
			return nil, damaged(err)
		}
		out = append(out, lack{info, has})
	}
	slices.SortFunc(out, func(a, b lack) int {
		return cmp.Or(strings.Compare(string(a.PackBlobID), string(b.PackBlobID)), cmp.Compare(a.PackOffset, b.PackOffset))
	})
	return out, nil
}

// need notes a content that the far store lacks, and has its pack sent once most of it is known to be missing.
func (r *replication) need(ctx context.Context, l lack) error {
	p := r.waiting[l.PackBlobID]
	if p == nil {
		p = &packOf{id: l.PackBlobID, missing: map[content.ID]content.Info{}}
		r.waiting[p.id] = p
	}
	if _, again := p.missing[l.ContentID]; again {
		return nil
	}
	p.missing[l.ContentID] = l.Info
	r.blocks++
	if l.has == absent {
		p.bytes += int64(l.PackedLength)
	}
	if p.bytes < packWorth {
		return nil
	}
	whole, err := r.whole(ctx, p)
	if whole {
		r.take(p)
	}
	return err
}

// presence is what the far store says of a content.
type presence int

const (
	absent  presence = iota
	present          // it can be read
	deleted          // an older pack that comes in would not bring it back: its deletion is newer
)

func (r *replication) has(ctx context.Context, id content.ID) (presence, error) {
	return presenceIn(ctx, r.session, id)
}

func presenceIn(ctx context.Context, rep repo.Repository, id content.ID) (presence, error) {
	info, err := rep.ContentInfo(ctx, id)
	switch {
	case errors.Is(err, content.ErrContentNotFound):
		return absent, nil
	case err != nil:
		return absent, err
	case info.Deleted:
		return deleted, nil
	}
	return present, nil
}

// packWorth is how much of a pack must be missing before it is looked into while more of it may turn out to be.
const packWorth = packSize / 2

// whole says whether a pack is to travel as it is. One that holds manifests never is: all of them would come to light
// in the far store, whatever they are of.
func (r *replication) whole(ctx context.Context, p *packOf) (bool, error) {
	if p.taken || !strings.HasPrefix(string(p.id), string(content.PackBlobIDPrefixRegular)) {
		return false, nil
	}
	if p.size == 0 {
		var err error
		if p.size, err = r.near.packed(ctx, p.id); err != nil {
			return false, err
		}
	}
	return p.bytes*100 >= p.size*wholePack, nil
}

// take sends a pack. What turns out to be needed of it later is looked at when it has arrived.
func (r *replication) take(p *packOf) {
	r.blocks -= len(p.missing)
	r.waiting[p.id] = &packOf{id: p.id, missing: map[content.ID]content.Info{}, taken: true}
	r.senders.Go(func() error { return r.sendPack(r.sending, p) })
}

// settle brings over what waits, and returns when it is there: whole packs where nearly all is missing, single contents
// otherwise. Nothing may be on its way.
func (r *replication) settle(ctx context.Context) error {
	for _, id := range slices.Sorted(maps.Keys(r.waiting)) { // in the same order in every attempt
		p := r.waiting[id]
		if err := r.still(ctx, p); err != nil {
			return errors.Join(err, r.senders.Wait())
		}
		whole, err := r.whole(ctx, p)
		if err != nil {
			return errors.Join(err, r.senders.Wait())
		}
		delete(r.waiting, id)
		r.senders.Go(func() error {
			if whole {
				return r.sendPack(r.sending, p)
			}
			return r.repack(r.sending, p)
		})
	}
	r.blocks = 0
	return r.senders.Wait()
}

// still leaves of a pack what is still missing.
func (r *replication) still(ctx context.Context, p *packOf) error {
	p.bytes = 0
	for id, info := range p.missing {
		switch has, err := r.has(ctx, id); {
		case err != nil:
			return err
		case has == present:
			delete(p.missing, id)
		case has == absent:
			p.bytes += int64(info.PackedLength)
		}
	}
	return nil
}

// packed is how many bytes of contents a pack holds, by its own index.
func (s *Store) packed(ctx context.Context, pack blob.ID) (int64, error) {
	_, w, err := s.rep.NewDirectWriter(ctx, repo.WriteSessionOptions{Purpose: "look"})
	if err != nil {
		return 0, err
	}
	defer w.Close(ctx) //nolint:errcheck // nothing was written
	meta, err := s.place.GetMetadata(ctx, pack)
	if err != nil {
		return 0, damaged(err)
	}
	var end Buffer
	length := min(meta.Length, packEnd)
	if err := s.place.GetBlob(ctx, pack, meta.Length-length, length, &end); err != nil {
		return 0, damaged(err)
	}
	all, err := packIndex(ctx, w.ContentManager(), lent{id: pack, at: meta.Length - length, end: end.Bytes()}, false)
	if err != nil {
		return 0, damaged(err)
	}
	var total int64
	for _, c := range all {
		total += int64(c.PackedLength)
	}
	return total, nil
}

const (
	packEnd  = 1 << 20 // bytes at the end of a pack in which its own index lies, if it has no more than some ten thousand contents
	kopiaEnd = 8 << 10 // bytes at the end in which Kopia looks for it
)

// packIndex reads a pack's own index, and enters it into the store's if commit is true. An index is often longer than what Kopia
// reads for it, which would then read all of the pack and copy it twice. It asks from where it believes that the end begins, and
// takes what it is given: so it is told a length by which it asks from where what we have begins.
func packIndex(ctx context.Context, w *content.WriteManager, l lent, commit bool) ([]content.Info, error) {
	return w.RecoverIndexFromPackBlob(context.WithValue(ctx, lentKey{}, l), l.id, l.at+kopiaEnd, commit)
}

// sendPack sends a pack as it is, unless an earlier attempt did, and enters what is in it into the far index.
func (r *replication) sendPack(ctx context.Context, p *packOf) error {
	read, ok := r.buffers.Get().(*Buffer)
	if !ok {
		read = new(Buffer)
		read.Grow(packSize + packSlack)
	}
	if err := r.near.place.GetBlob(ctx, p.id, 0, -1, read); err != nil {
		return damaged(fmt.Errorf("read pack %s: %w", p.id, err))
	}
	data := Bytes(read.Bytes())
	if err := r.prove(p, data); err != nil {
		return err
	}
	sent, err := r.far.guard.bring(ctx, p.id, r.pace.slow(ctx, data))
	if err != nil {
		return err
	}
	if sent {
		r.count(func(o *Replicated) { o.Packs++ })
	} else {
		r.count(func(o *Replicated) { o.Found++ })
	}
	// The pack's own index need not be fetched from afar: it is in what was sent.
	at := max(len(data)-packEnd, 0)
	if _, err := packIndex(ctx, r.packer, lent{id: p.id, at: int64(at), end: data[at:], all: data}, true); err != nil {
		return damaged(err)
	}
	r.buffers.Put(read) // only now: of what was cut off something may still be on its way
	return r.written(ctx, p)
}

// prove breaks the seal of everything that is wanted of a pack, in the bytes that will be sent, so that no rot is spread. A
// seal covers what it encloses to the last bit; what was enclosed was compared when it was kept.
func (r *replication) prove(p *packOf, data Bytes) error {
	for id, c := range p.missing {
		from, to := int64(c.PackOffset), int64(c.PackOffset)+int64(c.PackedLength)
		if to > int64(len(data)) {
			return fmt.Errorf("%w: pack %s ends before block %s does", ErrDamaged, p.id, id)
		}
		hash := id.Hash()
		if err := unseal(r.near.rep.FormatManager().Encryptor().Decrypt, data[from:to], hash[len(hash)-aes.BlockSize:]); err != nil {
			return fmt.Errorf("%w: block %s in pack %s: %w", ErrDamaged, id, p.id, err)
		}
	}
	return nil
}

// unseal breaks a seal and throws away what was in it. The types are Kopia's, of a package that it keeps to itself: they
// follow from decrypt.
func unseal[Sealed, Buffer any](decrypt func(Sealed, []byte, *Buffer) error, data, nonce []byte) error {
	in, out := any(new(Buffer)), new(Buffer)
	buffer, ok := in.(interface {
		io.Writer
		Bytes() Sealed
		Close()
	})
	if !ok {
		return errors.New("kopia's buffers are not what they were")
	}
	defer buffer.Close()
	if c, ok := any(out).(interface{ Close() }); ok {
		defer c.Close()
	}
	if _, err := buffer.Write(data); err != nil {
		return err
	}
	return decrypt(buffer.Bytes(), nonce, out)
}

// repack writes single contents anew. Each must come out under the identifier it had.
func (r *replication) repack(ctx context.Context, p *packOf) error {
	for id := range p.missing {
		data, err := r.near.content(ctx, id)
		if err != nil {
			return damaged(err)
		}
		if err := r.pace.wait(ctx, int64(p.missing[id].PackedLength)); err != nil {
			return err
		}
		compressor := compressorSmall
		if id.Prefix() == mapPrefix {
			compressor = compressorMap
		}
		oid, err := putObject(ctx, r.session, data, string(id.Prefix()), compressor, objectSplitter)
		if err != nil {
			return err
		}
		if got, err := directContent(oid); err != nil || got != id {
			return fmt.Errorf("%w: content %s came out as %s in the far store", ErrOtherSecrets, id, oid)
		}
	}
	if len(p.missing) == 0 {
		return nil
	}
	r.count(func(o *Replicated) { o.Repacked += int64(len(p.missing)) })
	return r.written(ctx, p)
}

func (r *replication) count(what func(*Replicated)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	what(&r.out)
	r.progress.Report("send", r.sent.n.Load(), 0, "bytes")
}

// written notes what was brought over, and writes the far index now and then.
func (r *replication) written(ctx context.Context, p *packOf) error {
	r.mu.Lock()
	r.fresh = append(r.fresh, p)
	due := len(r.fresh) >= packsAFlush
	r.mu.Unlock()
	if !due {
		return nil
	}
	return r.flush(ctx)
}

// flush writes the far index, and requires that what was brought over is found in it: an older pack does not bring back
// what was deleted over there since, and that is seen only now. Such contents are written anew.
func (r *replication) flush(ctx context.Context) error {
	for try := 0; ; try++ {
		r.mu.Lock()
		fresh := r.fresh
		r.fresh = nil
		r.mu.Unlock()
		if err := r.session.Flush(ctx); err != nil {
			return err
		}
		lost := &packOf{missing: map[content.ID]content.Info{}}
		for _, p := range fresh {
			for id, info := range p.missing {
				there, err := presenceIn(ctx, r.far.rep, id)
				if err != nil {
					return err
				}
				if there != present {
					lost.missing[id] = info
				}
			}
		}
		if len(lost.missing) == 0 {
			return nil
		}
		if try > 0 {
			return fmt.Errorf("%w: %d blocks were brought over and are not found in its index", ErrDamaged, len(lost.missing))
		}
		if err := r.repack(ctx, lost); err != nil {
			return err
		}
	}
}

// publish enters the snapshot's manifest, as the near store has it.
func (r *replication) publish(ctx context.Context) error {
	return r.far.mutate(context.WithValue(ctx, tallyKey{}, &r.sent), "replicate", func(ctx context.Context, w repo.DirectRepositoryWriter) error {
		if there, err := exists(ctx, w, r.id); there || err != nil {
			return err
		}
		if image := r.source.doc.Snapshot.Image; image != "" {
			if there, err := exists(ctx, w, image); err != nil {
				return err
			} else if !there {
				return fmt.Errorf("image %s is %w: replicate that first", image, ErrNotFound)
			}
		}
		m := r.source.manifest.Clone()
		m.ID = ""
		_, err := snapshot.SaveSnapshot(ctx, w, m)
		return err
	})
}
