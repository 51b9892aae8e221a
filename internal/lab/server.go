package lab

import (
	"context"
	"net"

	"github.com/musterdr/muster/internal/agent"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/disk"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// live stands for a live server: its disk is a file, its files lie in a folder, and the agent that reads them is the real
// one at the other end of a pipe.
type live struct {
	capture.Source
	top string
}

func (l *Lab) openSource(_ context.Context, source dr.Source) (capture.Source, error) {
	if source.SSH == nil {
		return disk.Open(source.Disks)
	}
	disks, err := disk.Open([]string{l.path("shop.raw")})
	return live{Source: disks, top: l.path(source.SSH.Host)}, err
}

// CaptureFiles implements capture.FileSource.
func (s live) CaptureFiles(ctx context.Context, sink *capture.FilesSink, report dr.Progress) error {
	return s.talk(ctx, func(talk *capture.Session, _ func()) error { return talk.Files(ctx, wire.FilesPlan{}, sink, report) })
}

// Restore implements capture.RestoreSource.
func (s live) Restore(ctx context.Context, plan capture.RestorePlan, feed capture.Feed, placed func(capture.Placed) error) error {
	return s.talk(ctx, func(talk *capture.Session, hangUp func()) error { return talk.Restore(ctx, plan, feed, placed, hangUp) })
}

func (s live) talk(ctx context.Context, what func(talk *capture.Session, hangUp func()) error) error {
	ours, theirs := net.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer theirs.Close()
		_ = agent.Agent{Version: "lab", Top: s.top}.Serve(ctx, theirs, theirs) // it has told why over the line
	}()
	talk, err := capture.NewSession(ours, ours)
	if err == nil {
		err = what(talk, func() { ours.Close() })
	}
	ours.Close()
	<-ended
	return err
}
