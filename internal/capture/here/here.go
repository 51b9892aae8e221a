// Package here captures the machine it runs on: its agent is a child of this process. Tests and benchmarks use it where a
// real agent is wanted and a way to it plays no part.
//
//	Source   a disk of this machine, and what an agent needs to capture it
//
// Knows: how an agent is started and how one speaks with it.
// Must not know: a network, or what is kept of a capture.
package here

import (
	"context"
	"errors"
	"os"
	"os/exec"

	"github.com/musterdr/muster/internal/api"
	"github.com/musterdr/muster/internal/capture"
	"github.com/musterdr/muster/internal/capture/wire"
	"github.com/musterdr/muster/internal/dr"
)

// Source is this machine: a capture.Source and a capture.FileSource.
type Source struct {
	Agent string    // the program
	Env   []string  // more environment for it
	Plan  wire.Plan // for Capture

	// Began, if set, is called with the process that an agent is, and what it gives when the agent has been told to end.
	Began func(pid int) (ends func())
}

// Contact says nothing.
func (s *Source) Contact(context.Context) (api.Contact, error) { return api.Contact{}, nil }

// Close does nothing: between conversations there is no agent.
func (s *Source) Close() error { return nil }

// Forget removes what an agent has left on this machine.
func (s *Source) Forget(ctx context.Context) error {
	return exec.CommandContext(ctx, s.Agent, "forget").Run()
}

// Capture implements capture.Source.
func (s *Source) Capture(ctx context.Context, sink *capture.Sink, report dr.Progress) error {
	return s.converse(ctx, func(talk *capture.Session) error { return talk.Capture(ctx, s.Plan, sink, report) })
}

// CaptureFiles implements capture.FileSource.
func (s *Source) CaptureFiles(ctx context.Context, sink *capture.FilesSink, report dr.Progress) error {
	return s.converse(ctx, func(talk *capture.Session) error { return talk.Files(ctx, wire.FilesPlan{}, sink, report) })
}

func (s *Source) converse(ctx context.Context, say func(*capture.Session) error) error {
	c := exec.CommandContext(ctx, s.Agent, "serve")
	c.Env = append(os.Environ(), s.Env...)
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		return err
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	ends := func() {}
	if s.Began != nil {
		ends = s.Began(c.Process.Pid)
	}
	talk, err := capture.NewSession(out, in)
	if err == nil {
		err = say(talk)
	}
	_ = in.Close() // it ends
	ends()
	return errors.Join(err, c.Wait())
}
