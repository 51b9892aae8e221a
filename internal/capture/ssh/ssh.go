// Package ssh captures a live server, Linux or Windows, over its own SSH.
//
//	Source   one connection to one server, checked against the host key it is known by
//	agent    the program that is copied to the server and answers there; given by the caller, one an architecture
//
// All that is ever written on the server is the agent itself, in its own folder (CacheDir), which Forget removes.
//
// Knows: SSH, a POSIX shell, PowerShell.
// Must not know: what an agent does, what is captured.
package ssh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/musterdr/muster/internal/dr"
)

// Limits of a connection.
const (
	dialLimit = 20 * time.Second
	keepalive = 10 * time.Second // between questions whether the server is still there
	silence   = 30 * time.Second // without one byte from it before it is given up
)

// Source is a connection to one server. It implements capture.Source.
type Source struct {
	source  dr.SSHSource
	agents  Agents
	shell   shell
	client  *ssh.Client
	conn    *watched
	hostKey ssh.PublicKey // the one it showed
	cache   string
}

// Agents gives the agent program for a system and an architecture, as Go calls them ("linux", "arm64").
type Agents func(goos, goarch string) ([]byte, error)

// Open connects to a server. Without a host key any is taken, and Capture refuses: somebody has to confirm first the one that Contact tells.
func Open(ctx context.Context, source dr.SSHSource, agents Agents) (*Source, error) {
	s := &Source{source: source, agents: agents, shell: posix, cache: CacheDir}
	signer, err := readKey(source.KeyFile)
	if err != nil {
		return nil, err
	}
	if err := s.dial(ctx, signer); err != nil {
		return nil, fmt.Errorf("connect to %s: %w", source, err)
	}
	go s.keepAlive()
	return s, nil
}

func readKey(path string) (ssh.Signer, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read SSH key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(pem)
	var locked *ssh.PassphraseMissingError
	switch {
	case errors.As(err, &locked):
		return nil, fmt.Errorf("read SSH key %s: it is protected by a passphrase, and nobody is there at night to type it: give a key without one, for this purpose only", path)
	case err != nil:
		return nil, fmt.Errorf("read SSH key %s: it is not a private key that this release can read: %w", path, err)
	}
	return signer, nil
}

// The kinds of host key, best first, that are asked for when none is known.
var hostKeyKinds = []string{ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}

// kinds gives the signature algorithms under which a server may show a key of one kind.
func kinds(key ssh.PublicKey) []string {
	if key.Type() == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return []string{key.Type()}
}

func (s *Source) dial(ctx context.Context, signer ssh.Signer) error {
	want := ssh.PublicKey(nil)
	algorithms := hostKeyKinds
	if s.source.HostKey != "" {
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s.source.HostKey))
		if err != nil {
			return fmt.Errorf("the host key on record is not of the form \"ssh-ed25519 AAAA…\": %w", err)
		}
		want, algorithms = key, kinds(key)
	}
	err := s.handshake(ctx, signer, algorithms, want)
	var mismatch *ssh.AlgorithmNegotiationError
	if want != nil && s.hostKey == nil && errors.As(err, &mismatch) {
		// It has no key of that kind any more. Ask which one it has, to be able to say so.
		if _ = s.handshake(ctx, nil, hostKeyKinds, want); s.hostKey != nil {
			return wrongKey(want, s.hostKey)
		}
	}
	return err
}

// errShown ends a handshake that was only made to see the host key.
var errShown = errors.New("host key seen")

// handshake connects and logs in. Without a signer it only looks at the host key.
func (s *Source) handshake(ctx context.Context, signer ssh.Signer, algorithms []string, want ssh.PublicKey) error {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	address := net.JoinHostPort(s.source.Host, strconv.Itoa(s.source.Port))
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("%w: see that the server is up and lets the appliance reach its SSH", err)
	}
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	conn := &watched{Conn: raw}
	var refused error
	config := &ssh.ClientConfig{
		User: s.source.User, HostKeyAlgorithms: algorithms, Timeout: dialLimit,
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			s.hostKey = key
			switch {
			case signer == nil:
				refused = errShown
			case want != nil && !slices.Equal(key.Marshal(), want.Marshal()):
				refused = wrongKey(want, key)
			}
			return refused
		},
	}
	if signer != nil {
		config.Auth = []ssh.AuthMethod{ssh.PublicKeys(signer)}
	}
	c, channels, requests, err := ssh.NewClientConn(conn, address, config)
	if err != nil {
		raw.Close()
		return s.explain(ctx, signer, err, refused)
	}
	s.conn, s.client = conn, ssh.NewClient(c, channels, requests)
	return nil
}

// explain says what a failed handshake means.
func (s *Source) explain(ctx context.Context, signer ssh.Signer, err, refused error) error {
	switch {
	case refused != nil:
		return refused
	case ctx.Err() != nil:
		return fmt.Errorf("the SSH handshake did not end within %s: %w", dialLimit, ctx.Err())
	case strings.Contains(err.Error(), "unable to authenticate"):
		public := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
		return fmt.Errorf("it refuses the key %s for user %s: add the line %q to that user's authorized_keys on the server, and see that sshd lets it log in", s.source.KeyFile, s.source.User, public)
	}
	return err
}

func wrongKey(want, got ssh.PublicKey) error {
	return fmt.Errorf("the host key is %s %s and should be %s %s: either somebody answers in the server's place, or it was installed anew; find out which before you give the new key with --host-key; nothing was sent",
		got.Type(), ssh.FingerprintSHA256(got), want.Type(), ssh.FingerprintSHA256(want))
}

// watched is a connection that ends when nothing has come for a while: keepAlive sees to it that a server that lives
// answers more often than that.
type watched struct {
	net.Conn
	silent atomic.Bool
}

func (w *watched) Read(p []byte) (int, error) {
	if err := w.SetReadDeadline(time.Now().Add(silence)); err != nil {
		return 0, err
	}
	n, err := w.Conn.Read(p)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		w.silent.Store(true)
		w.Close() // so that whoever writes notices as well
	}
	return n, err
}

// keepAlive asks now and then whether the server is there, until the connection ends.
func (s *Source) keepAlive() {
	ended := make(chan struct{})
	go func() {
		_ = s.client.Wait()
		close(ended)
	}()
	beat := time.NewTicker(keepalive)
	defer beat.Stop()
	for {
		select {
		case <-ended:
			return
		case <-beat.C:
			_, _, _ = s.client.SendRequest("keepalive@openssh.com", true, nil) // a dead connection ends by itself
		}
	}
}

// blame says why a connection broke, where that is known.
func (s *Source) blame(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case s.conn.silent.Load():
		return fmt.Errorf("the server has not answered for %s: %w", silence, err)
	}
	return err
}

// Close ends the connection, and with it whatever of ours runs on the server.
func (s *Source) Close() error {
	if err := s.client.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("disconnect from %s: %w", s.source, err)
	}
	return nil
}
