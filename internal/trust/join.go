package trust

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"github.com/musterdr/muster/internal/durable"
)

// Join makes a machine the node that a token invites, and its folder, unless it has been that already. Cut off at any
// point it can be repeated with the same token. A folder of the same node gets the new certificate; another's is left
// alone.
func Join(ctx context.Context, dir string, token Token) (*Node, error) {
	n := newNode(dir)
	if old, err := n.load(); err == nil {
		who := old.peer
		if who.Serial = ""; who != token.Peer {
			return nil, refuse("join: %s is the folder of %s: to make this machine another node, move that folder away", dir, who)
		}
	} else if !errors.Is(err, ErrNone) {
		return nil, err
	}
	if err := n.join(ctx, token); err != nil {
		return nil, fmt.Errorf("join as %s: %w", token.Peer, err)
	}
	return OpenNode(dir)
}

func (n *Node) join(ctx context.Context, token Token) error {
	if now := n.now(); now.After(token.Expires) {
		n.Log.WarnContext(ctx, "the token has expired by this machine's clock", "expired", token.Expires, "now", now)
	}
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(n.dir, 0o700); err != nil {
		return err
	}
	key, err := n.joiningKey()
	if err != nil {
		return err
	}
	request, err := newRequest(token.Peer, key)
	if err != nil {
		return err
	}
	var authority *x509.Certificate
	client := &http.Client{CheckRedirect: noRedirect, Transport: heed{&http.Transport{Protocols: onlyHTTP2(), HTTP2: n.timing.http2(), MaxResponseHeaderBytes: maxHeader, DisableKeepAlives: true,
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			config := baseTLS()
			config.NextProtos = []string{alpnRequests}
			config.InsecureSkipVerify = true // it is verified below, by the pin
			config.VerifyConnection = func(state tls.ConnectionState) (err error) {
				if authority, err = pinned(state, token.Pin); err != nil {
					return err
				}
				return masterOf(state, authority, n.now())
			}
			c, err := dial(ctx, token.Masters, config, n.timing.dial)
			if err != nil {
				return nil, err
			}
			return c, nil
		}}}}
	out, err := ask(ctx, client, pathJoin, joinRequest{Secret: token.secret[:], Request: request})
	if err != nil {
		return err
	}
	cert, err := out.certificateFor(token.Peer, key, authority, n.now())
	if err != nil {
		return err
	}
	text, err := encodeKey(key)
	if err != nil {
		return err
	}
	p := token.Peer
	if err := n.store(nodeFile{Version: nodeVersion, Role: p.Role, Customer: p.Customer, Name: p.Name, Master: out.Master, Masters: token.Masters,
		Authority: encodeCert(authority), Certificate: encodeCert(cert), Key: text, CustomerKey: out.CustomerKey}, nil); err != nil {
		return err
	}
	return os.Remove(filepath.Join(n.dir, fileJoining))
}

// pinned finds the authority that a token knows among what the other end shows.
func pinned(state tls.ConnectionState, pin [sha256.Size]byte) (*x509.Certificate, error) {
	for _, cert := range state.PeerCertificates {
		if cert.IsCA && pinOf(cert) == pin {
			return cert, nil
		}
	}
	return nil, refuse("what answers there is not the master that made the token: check the address; if the master was made anew, ask for a new token")
}

// joiningKey makes the node's key, or takes the one of an attempt whose end is not known.
func (n *Node) joiningKey() (ed25519.PrivateKey, error) {
	path := filepath.Join(n.dir, fileJoining)
	raw, err := os.ReadFile(path)
	if err == nil {
		return decodeKey(string(raw))
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return key, durable.WriteFile(path, []byte(text), 0o600)
}
