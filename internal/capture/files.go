package capture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
	"github.com/musterdr/muster/internal/fileset"
	"github.com/musterdr/muster/internal/store"
)

// FileSource is a Source that can also read folders file by file.
type FileSource interface {
	// CaptureFiles reads the files of a set into the sink and has them kept: nil means that FilesSink.Keep was. On an error
	// what the sink got is worth nothing.
	CaptureFiles(ctx context.Context, sink *FilesSink, report dr.Progress) error
}

// TakeFiles captures a server's data into the store as the snapshot that the task asks for, which goes onto the image it
// names. The snapshot is complete, or there is none.
func TakeFiles(ctx context.Context, src Source, st *store.Store, task api.SnapshotTask, report dr.Progress) (dr.Snapshot, error) {
	from, ok := src.(FileSource)
	if !ok {
		return dr.Snapshot{}, fmt.Errorf("capture the data of %s: its source cannot be read file by file", task.Server.Name)
	}
	k := &FilesSink{store: st, task: task, parent: task.Parent, began: time.Now(),
		set: fileset.Set{Roots: task.Server.Data.Paths, Exclude: task.Server.Data.Exclude}}
	defer k.abort(ctx)
	if err := from.CaptureFiles(ctx, k, report); err != nil {
		return dr.Snapshot{}, fmt.Errorf("capture the data of %s: %w", task.Server.Name, err)
	}
	if k.kept == nil {
		return dr.Snapshot{}, fmt.Errorf("capture the data of %s: the source gave nothing", task.Server.Name)
	}
	return *k.kept, nil
}

// FilesSink is a snapshot of files being written. It is used by one goroutine.
type FilesSink struct {
	store  *store.Store
	task   api.SnapshotTask
	set    fileset.Set
	began  time.Time
	parent string
	reason string // why there is nothing to build on
	writer *store.Writer
	files  *store.FilesWriter
	known  *earlier // what the parent has; nil for nothing
	watch  *setWatch
	kept   *dr.Snapshot

	content *store.ContentWriter // of the file whose entry is to come
	entries int64
}

// Begin is called once, first.
func (k *FilesSink) Begin(ctx context.Context) error {
	if k.writer != nil {
		return errors.New("begin a snapshot: it has begun")
	}
	var err error
	if k.watch, err = newSetWatch(); err != nil {
		return err
	}
	if err := k.compare(ctx); err != nil {
		return err
	}
	if k.writer, err = k.store.Begin(ctx, k.task.ID, k.parent); err != nil {
		return err
	}
	k.files, err = k.writer.Files(ctx, k.task.Image, k.set)
	return err
}

// compare opens the earlier sets that this one is compared with, and says whether it can be built on the last.
func (k *FilesSink) compare(ctx context.Context) error {
	k.reason = "there is no earlier snapshot of the data"
	if k.parent != "" {
		last, err := openEarlier(ctx, k.store, k.parent, k.set)
		switch {
		case err != nil:
			k.parent, k.reason = "", fmt.Sprintf("the earlier snapshot %s cannot be read: %v", k.parent, err)
		case last.kept == nil:
			k.parent, k.reason = "", fmt.Sprintf("what the files of the earlier snapshot %s held was not kept", k.parent)
		default:
			k.known = last
		}
		if err == nil {
			if err := k.watch.against(last, true); err != nil {
				return err
			}
		}
	}
	if k.task.Trusted != "" && k.task.Trusted != k.task.Parent {
		if trusted, err := openEarlier(ctx, k.store, k.task.Trusted, k.set); err == nil {
			return k.watch.against(trusted, false)
		}
	}
	return nil
}

// Known calls each for everything that is known, in fileset.Compare's order. It may run beside all else.
func (k *FilesSink) Known(ctx context.Context, each func(path string, id fileset.Identity) error) error {
	if k.known == nil {
		return nil
	}
	for all := k.known.files.All(); ; {
		e, err := all.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = each(e.Path, e.Identity())
		}
		if err != nil {
			return err
		}
	}
}

// head is what was not dealt with yet of what is known; nil for nothing.
func (k *FilesSink) head() *store.FileEntry {
	if k.known == nil {
		return nil
	}
	return k.known.head
}

// Same takes the next entries of the parent as they are.
func (k *FilesSink) Same(ctx context.Context, count int64) error {
	for ; count > 0; count-- {
		head := k.head()
		if head == nil {
			return fmt.Errorf("take what is known: there is no more: %w", wire.ErrGarbage)
		}
		if err := k.files.Add(ctx, &head.Entry, head.Content, true); err != nil {
			return err
		}
		k.entries++
		k.watch.same(k.known)
		k.watch.entry(ctx, k.files, &head.Entry, head.Content)
		if err := k.known.advance(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Gone drops the next entries of the parent.
func (k *FilesSink) Gone(ctx context.Context, count int64) error {
	for ; count > 0; count-- {
		if k.head() == nil {
			return fmt.Errorf("drop what is known: there is no more: %w", wire.ErrGarbage)
		}
		k.files.Gone()
		if err := k.known.advance(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Piece takes a piece of the content of the file whose entry is to come.
func (k *FilesSink) Piece(data []byte) error {
	if k.content == nil {
		k.content = k.files.Content()
	}
	k.watch.piece(data)
	_, err := k.content.Write(data)
	return err
}

// Again throws the pieces away that came since the last entry.
func (k *FilesSink) Again() {
	if k.content != nil {
		k.content.Close()
		k.content = nil
		k.watch.again()
	}
}

// Entry takes a name that is new or changed, after its content.
func (k *FilesSink) Entry(ctx context.Context, e *fileset.Entry) error {
	defer k.Again()
	var content store.Content
	if k.content != nil {
		var err error
		if content, err = k.content.Result(); err != nil {
			return err
		}
	}
	head := k.head()
	if head != nil && fileset.Compare(head.Path, e.Path) < 0 {
		return fmt.Errorf("take %.200q: nothing was said of %.200q: %w", e.Path, head.Path, wire.ErrGarbage)
	}
	if err := k.files.Add(ctx, e, content, false); err != nil {
		return err
	}
	k.entries++
	k.watch.rest()
	k.watch.entry(ctx, k.files, e, content)
	if head != nil && head.Path == e.Path {
		return k.known.advance(ctx)
	}
	return nil
}

// Keep is called once, last: it makes a snapshot of what was taken. After nil the snapshot is safe.
func (k *FilesSink) Keep(ctx context.Context, out Outcome) error {
	switch {
	case k.writer == nil:
		return errors.New("keep a snapshot: none has begun")
	case k.head() != nil:
		return fmt.Errorf("keep a snapshot: nothing was said of what is known from %.200q on: %w", k.head().Path, wire.ErrGarbage)
	case k.content != nil:
		return fmt.Errorf("keep a snapshot: a file has no entry: %w", wire.ErrGarbage)
	}
	pass := dr.CapturePass{Kind: dr.PassTracked, Provider: dr.ProviderFiles}
	if k.parent == "" {
		pass.Kind, pass.Reason = dr.PassFull, k.reason
	}
	found, err := k.watch.keep(k.writer, k.task)
	if err != nil {
		return err
	}
	kept, err := k.writer.Commit(ctx, dr.Snapshot{
		ServerID: k.task.Server.ID, Server: k.task.Server.Name, Taken: dated(k.task, out.Taken), Consistency: dr.FileConsistent, Pass: pass,
		Notes: append(out.Notes, k.watch.notes...), Signs: found,
		Stats: dr.CaptureStats{Read: out.Read, Sent: out.Sent, Duration: time.Since(k.began)},
	})
	if err != nil {
		return fmt.Errorf("keep the snapshot: %w", err)
	}
	k.kept = &kept
	return nil
}

// abort gives up what was not committed, and lets the parent go.
func (k *FilesSink) abort(ctx context.Context) {
	k.Again()
	if k.watch != nil {
		k.watch.close()
	}
	abort(ctx, k.writer, k.task.ID)
}

// Files reads the sink's file set into it and has it kept.
func (s *Session) Files(ctx context.Context, plan wire.FilesPlan, sink *FilesSink, report dr.Progress) error {
	plan.Roots, plan.Exclude = sink.set.Roots, sink.set.Exclude
	if err := sink.Begin(ctx); err != nil {
		return err
	}
	taken := time.Now() // nothing is older than this in what follows
	if err := s.w.Message(wire.KindAskFiles, plan); err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// It ends with the conversation at the latest: whoever carries that closes it.
	go func() {
		if err := s.tellFiles(ctx, sink); err != nil {
			cancel(err) // the agent will not end by itself: it waits for more
		}
	}()
	done, err := s.takeFiles(ctx, sink, report)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		return err
	}
	out := Outcome{Taken: taken, Read: done.Read, Sent: s.counted.n.Load()}
	for _, n := range done.Notes {
		out.Notes = append(out.Notes, plain(n))
	}
	return sink.Keep(ctx, out)
}

// tellFiles sends what is known.
func (s *Session) tellFiles(ctx context.Context, sink *FilesSink) error {
	was := s.w.Was()
	err := sink.Known(ctx, func(path string, id fileset.Identity) error {
		return was.Add(wire.KnownFile{Path: path, Identity: id})
	})
	if err == nil {
		err = was.Go()
	}
	if err != nil {
		return fmt.Errorf("tell the agent what is known: %w", err)
	}
	return nil
}

// takeFiles takes frames until the agent is done.
func (s *Session) takeFiles(ctx context.Context, sink *FilesSink, report dr.Progress) (done wire.FilesDone, err error) {
	// The options are constants that the library accepts.
	unzip, _ := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(wire.MaxPiece), zstd.WithDecoderLowmem(true))
	defer unzip.Close()
	var buf, unpacked []byte
	for {
		kind, payload, err := s.r.Next(buf)
		if err != nil {
			return done, fmt.Errorf("hear from the agent: the connection ended in the middle of the files: %w", cut(err))
		}
		if err := ctx.Err(); err != nil {
			return done, context.Cause(ctx)
		}
		buf = payload
		switch kind {
		case wire.KindPiece:
			zipped, data, err := wire.ParsePiece(payload)
			if err == nil && zipped {
				if unpacked, err = unzip.DecodeAll(data, unpacked[:0]); err != nil {
					err = fmt.Errorf("unpack a piece of a file: %w: %w", wire.ErrGarbage, err)
				}
				data = unpacked
			}
			if err == nil {
				err = sink.Piece(data)
			}
			if err != nil {
				return done, err
			}
		case wire.KindDone:
			return done, s.endFiles(payload, &done, sink)
		default:
			if err := takeFile(ctx, kind, payload, sink, report); err != nil {
				return done, err
			}
		}
	}
}

// takeFile takes a frame that is neither a piece nor the end.
func takeFile(ctx context.Context, kind wire.Kind, payload []byte, sink *FilesSink, report dr.Progress) error {
	switch kind {
	case wire.KindSame, wire.KindGone:
		n, err := wire.ParseCount(payload)
		if err != nil {
			return err
		}
		if kind == wire.KindGone {
			return sink.Gone(ctx, n)
		}
		return sink.Same(ctx, n)
	case wire.KindEntry:
		e, err := wire.ParseEntry(payload)
		if err != nil {
			return err
		}
		return sink.Entry(ctx, &e)
	case wire.KindAgain:
		sink.Again()
		return nil
	case wire.KindTick:
		var t wire.Tick
		if err := wire.Decode(payload, &t); err != nil {
			return err
		}
		report.Report("read files", max(0, t.Done), 0, "bytes")
		return nil
	case wire.KindFailure:
		return failure(payload)
	}
	return fmt.Errorf("hear from the agent: %w: kind %q in the middle of files", wire.ErrGarbage, byte(kind))
}

// endFiles checks the agent's last word.
func (s *Session) endFiles(payload []byte, done *wire.FilesDone, sink *FilesSink) error {
	if err := wire.Decode(payload, done); err != nil {
		return err
	}
	if done.Read < 0 || len(done.Notes) > maxNotes {
		return fmt.Errorf("end the files: the agent's figures make no sense: %w", wire.ErrGarbage)
	}
	if done.Entries != sink.entries {
		return fmt.Errorf("end the files: %d names arrived of %d", sink.entries, done.Entries)
	}
	return nil
}
