package ssh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

var (
	_ capture.Source     = (*Source)(nil)
	_ capture.FileSource = (*Source)(nil)

	_ capture.RestoreSource = (*Source)(nil)
)

// endLimit is how long an agent that is done may take to end.
const endLimit = 10 * time.Second

// Contact implements capture.Source. It proves that an agent can run on the server, and takes it away again where there
// was none before. Without a host key that somebody has confirmed it only tells the key, and runs nothing.
func (s *Source) Contact(ctx context.Context) (api.Contact, error) {
	about := api.Contact{
		HostKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.hostKey))), Fingerprint: ssh.FingerprintSHA256(s.hostKey),
	}
	if s.source.HostKey == "" {
		return about, nil
	}
	p, err := s.look(ctx)
	if err != nil {
		return about, fmt.Errorf("contact %s: %w", s.source, err)
	}
	if !p.cache {
		defer func() { _ = s.Forget(ctx) }() // a folder left behind does no harm
	}
	err = s.converse(ctx, p, func(talk *capture.Session) error {
		about.Inventory, err = talk.Inventory(s.source.Disks)
		return err
	})
	if err != nil {
		return about, fmt.Errorf("contact %s: %w", s.source, err)
	}
	return about, nil
}

// Capture implements capture.Source.
func (s *Source) Capture(ctx context.Context, sink *capture.Sink, report dr.Progress) error {
	return s.read(ctx, func(talk *capture.Session) error {
		return talk.Capture(ctx, wire.Plan{Disks: s.source.Disks, FreezeLimit: s.source.FreezeLimit, Rate: s.source.ReadLimit, Track: s.source.Resident, Volumes: s.source.Snapshots, Hooks: s.source.Hooks}, sink, report)
	})
}

// read talks to an agent on a server that somebody has confirmed.
func (s *Source) read(ctx context.Context, talk func(*capture.Session) error) error {
	if s.source.HostKey == "" {
		return fmt.Errorf("read %s: nobody has confirmed its host key %s yet", s.source, ssh.FingerprintSHA256(s.hostKey))
	}
	p, err := s.look(ctx)
	if err == nil {
		err = s.converse(ctx, p, talk)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", s.source, err)
	}
	return nil
}

// CaptureFiles implements capture.FileSource.
func (s *Source) CaptureFiles(ctx context.Context, sink *capture.FilesSink, report dr.Progress) error {
	return s.read(ctx, func(talk *capture.Session) error {
		return talk.Files(ctx, wire.FilesPlan{Rate: s.source.ReadLimit}, sink, report)
	})
}

// Restore implements capture.RestoreSource.
func (s *Source) Restore(ctx context.Context, plan capture.RestorePlan, feed capture.Feed, placed func(capture.Placed) error) error {
	return s.read(ctx, func(talk *capture.Session) error {
		return talk.Restore(ctx, plan, feed, placed, func() { s.client.Close() })
	})
}

// Forget implements capture.Source.
func (s *Source) Forget(ctx context.Context) error {
	if _, err := s.script(ctx, s.shell.forget, "", nil); err != nil {
		return fmt.Errorf("remove %s from %s: %w", s.cache, s.source, err)
	}
	return nil
}

// converse starts the agent, talks to it, and sees it end.
func (s *Source) converse(ctx context.Context, p platform, talk func(*capture.Session) error) error {
	sum, err := s.install(ctx, p)
	if err != nil {
		return err
	}
	session, err := s.client.NewSession()
	if err != nil {
		return fmt.Errorf("open a session: %w", s.blame(ctx, err))
	}
	defer session.Close()
	// Without a connection the agent ends, and with it whatever it holds frozen.
	stop := context.AfterFunc(ctx, func() { s.client.Close() })
	defer stop()
	in, err := session.StdinPipe()
	if err != nil {
		return err
	}
	out, err := session.StdoutPipe()
	if err != nil {
		return err
	}
	var problem said
	session.Stderr = &problem
	if err := session.Start(s.shell.command(s.cache, s.shell.serve, sum)); err != nil {
		return fmt.Errorf("start the agent: %w", s.blame(ctx, err))
	}
	conversation, err := capture.NewSession(out, in)
	if err == nil {
		err = talk(conversation)
	}
	in.Close()
	return s.blame(ctx, s.settle(session, out, err, &problem))
}

// settle waits for the agent to end, and gives the better reason if it failed: its own exit, where the conversation only
// broke off.
func (s *Source) settle(session *ssh.Session, out io.Reader, err error, problem *said) error {
	ended := make(chan error, 1)
	go func() {
		_, _ = io.Copy(io.Discard, out) // an agent that still talks must not wait for a listener
		ended <- session.Wait()
	}()
	var exit error
	select {
	case exit = <-ended:
	case <-time.After(endLimit):
		exit = errors.New("the agent does not end")
	}
	switch {
	case err == nil:
		return nil // all was said before it ended
	case errors.Is(err, io.ErrUnexpectedEOF) && exit != nil:
		return fmt.Errorf("the agent broke off: %w", errors.Join(s.meaning(exit, problem.String()), err))
	}
	return err
}
